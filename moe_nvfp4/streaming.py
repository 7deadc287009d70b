"""Bytes from files into memory that already exists: several readers, no second copy.

On the CPU the kernel scatters a run of adjacent tensors straight into their targets (`preadv`). For a GPU, or
where the dtype widens, the readers fill small staging buffers, pinned for a GPU, and this thread copies from them.

Readers do nothing but read. With torch calls in every reader, 16 GB from the page cache to an H200 took 1.4 to 2.4 s,
most of it spent handing the interpreter's lock around; so it takes 0.65 s.
"""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from moe_nvfp4.progress import Progress
from moe_nvfp4.safetensors_file import TORCH_DTYPES, SafetensorsFile, TensorInfo

CHUNK_BYTES = 8 << 20  # one task: long enough to hide its overhead, short enough to spread over readers
MAX_VECTORS = 512  # buffers of one preadv; Linux allows 1024
DEFAULT_READERS = min(4, os.cpu_count() or 1)  # four read 36 GB/s from a page cache, enough for one GPU


class Transfer(NamedTuple):
    """One tensor of a file and the contiguous memory it fills; the target's dtype may be wider."""

    source: TensorInfo
    target: torch.Tensor


class _Piece(NamedTuple):
    """Part of a transfer: `nbytes` of the file at `start` fill `target`, a flat view of its own dtype."""

    start: int
    nbytes: int
    dtype: torch.dtype
    target: torch.Tensor


class _Task(NamedTuple):
    file: int
    start: int
    nbytes: int
    pieces: list[_Piece]


class _Ring:
    """Staging buffers that take turns; one is used again when the copies out of it are done."""

    def __init__(self, size: int, pinned: bool):
        self._size, self._pinned = size, pinned
        self._made = 0
        self._copied: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def take(self) -> torch.Tensor:
        if self._copied and (self._made == self._size or not self._pinned):
            buffer, event = self._copied.popleft()
            if event is not None:
                event.synchronize()
            return buffer
        self._made += 1
        return torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._pinned)

    def give_back(self, buffer: torch.Tensor, device: torch.device) -> None:
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
        self._copied.append((buffer, event))


def stream(
    files: Sequence[SafetensorsFile],
    transfers: Iterable[Transfer],
    *,
    readers: int = DEFAULT_READERS,
    progress: Progress | None = None,
) -> None:
    """Fills every target. Returns when the last byte is there, also on a GPU."""
    transfers = sorted(transfers, key=lambda transfer: (transfer.source.file, transfer.source.start))
    gpus = {transfer.target.device for transfer in transfers if transfer.target.device.type == "cuda"}
    ahead = 2 * max(1, readers)  # reads under way or waiting for their copies
    ring, stop = _Ring(2 * ahead, pinned=bool(gpus)), threading.Event()
    pending: deque[tuple[_Task, torch.Tensor | None, Future[None]]] = deque()

    def read(task: _Task, views: list[memoryview]) -> None:
        if not stop.is_set():  # after an error the other readers end with their current task
            files[task.file].read_into(task.start, views)

    def finish_oldest() -> None:
        task, buffer, reading = pending.popleft()
        reading.result()
        if buffer is not None:
            _copy(task, buffer)
            ring.give_back(buffer, task.pieces[0].target.device)
        if progress is not None:
            progress.advance(task.nbytes)

    with ThreadPoolExecutor(max(1, readers), thread_name_prefix="reader") as pool:
        try:
            for task in _tasks(transfers):
                if len(pending) >= ahead:
                    finish_oldest()
                buffer = None if _is_direct(task.pieces[0]) else ring.take()
                views = _views(task) if buffer is None else [buffer[: task.nbytes].numpy().data]
                pending.append((task, buffer, pool.submit(read, task, views)))
            while pending:
                finish_oldest()
        finally:
            stop.set()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


def _tasks(transfers: Sequence[Transfer]) -> Iterator[_Task]:
    """Runs of adjacent pieces of one file that go the same way, at most CHUNK_BYTES long."""
    run: list[_Piece] = []
    file, end, size, direct = -1, -1, 0, False
    for transfer in transfers:
        for piece in _pieces(transfer):
            joins = (
                transfer.source.file == file
                and piece.start == end
                and size + piece.nbytes <= CHUNK_BYTES
                and len(run) < MAX_VECTORS
                and _is_direct(piece) == direct
            )
            if not joins and run:
                yield _Task(file, run[0].start, size, run)
                run, size = [], 0
            run.append(piece)
            file, end, direct = transfer.source.file, piece.start + piece.nbytes, _is_direct(piece)
            size += piece.nbytes
    if run:
        yield _Task(file, run[0].start, size, run)


def _pieces(transfer: Transfer) -> Iterator[_Piece]:
    source, target = transfer
    dtype = TORCH_DTYPES[source.dtype]
    if target.numel() * dtype.itemsize != source.nbytes or not target.is_contiguous():
        raise AssertionError(f"{source.name}: {source.nbytes} bytes do not fill {tuple(target.shape)} {target.dtype}")
    if target.dtype.itemsize == dtype.itemsize and not target.dtype.is_floating_point:
        dtype = target.dtype  # E4M3 kept as bytes
    flat = target.view(-1)
    step = CHUNK_BYTES // dtype.itemsize
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        yield _Piece(source.start + begin * dtype.itemsize, part.numel() * dtype.itemsize, dtype, part)


def _is_direct(piece: _Piece) -> bool:
    return piece.target.device.type == "cpu" and piece.target.dtype == piece.dtype


def _views(task: _Task) -> list[memoryview]:
    return [piece.target.view(torch.uint8).numpy().data for piece in task.pieces]


def _copy(task: _Task, buffer: torch.Tensor) -> None:
    for piece in task.pieces:
        begin = piece.start - task.start
        staged = buffer[begin : begin + piece.nbytes]
        if begin % piece.dtype.itemsize:
            staged = staged.clone()  # torch wants aligned elements
        piece.target.copy_(staged.view(piece.dtype), non_blocking=True)
