"""Bytes from files into memory that already exists: several readers, no second copy.

On the CPU the kernel scatters a run of adjacent tensors straight into their targets (`preadv`). For a GPU, or
where the dtype widens, each reader owns small staging buffers, pinned for a GPU, and copies from there.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moe_nvfp4.progress import Progress
from moe_nvfp4.safetensors_file import TORCH_DTYPES, SafetensorsFile, TensorInfo

CHUNK_BYTES = 8 << 20  # one task: long enough to hide its overhead, short enough to spread over readers
MAX_VECTORS = 512  # buffers of one preadv; Linux allows 1024
# 18.1 GB from the page cache to an H200, 16 cores: 1.64 s with 4 readers, 2.4 s with 8 to 16, which fight over
# the interpreter's lock.
DEFAULT_READERS = min(4, os.cpu_count() or 1)


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
    pieces: list[_Piece]


@dataclass
class _Staging:
    """Buffers of one reader: on a GPU two, so that copying to the device overlaps the next read."""

    device: torch.device
    buffers: list[torch.Tensor] = field(default_factory=list)
    copied: list[torch.cuda.Event] = field(default_factory=list)
    turn: int = 0

    def next(self, nbytes: int) -> torch.Tensor:
        on_gpu = self.device.type == "cuda"
        if len(self.buffers) < (2 if on_gpu else 1):
            self.buffers.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu))
            if on_gpu:
                self.copied.append(torch.cuda.Event())
            self.turn = len(self.buffers) - 1
        elif on_gpu:
            self.turn ^= 1
            self.copied[self.turn].synchronize()
        return self.buffers[self.turn][:nbytes]

    def release(self) -> None:
        if self.copied:
            self.copied[self.turn].record(torch.cuda.current_stream(self.device))


def stream(
    files: Sequence[SafetensorsFile],
    transfers: Iterable[Transfer],
    *,
    readers: int = DEFAULT_READERS,
    progress: Progress | None = None,
) -> None:
    """Fills every target. Returns when the last byte is there, also on a GPU."""
    transfers = sorted(transfers, key=lambda transfer: (transfer.source.file, transfer.source.start))
    local, stop = threading.local(), threading.Event()
    devices = {transfer.target.device for transfer in transfers}

    def run(task: _Task) -> None:
        if stop.is_set():
            return
        try:
            # A thread has its own inference mode; without it, targets made under one could not be written.
            with torch.inference_mode():
                _execute(files[task.file], task, local)
        except BaseException:
            stop.set()  # the other readers end with their current task
            raise
        if progress is not None:
            progress.advance(sum(piece.nbytes for piece in task.pieces))

    with ThreadPoolExecutor(max(1, readers), thread_name_prefix="reader") as pool:
        try:
            futures = [pool.submit(run, task) for task in _tasks(transfers)]
            for future in futures:
                future.result()
        finally:
            stop.set()
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


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
                yield _Task(file, run[0].start, run)
                run, size = [], 0
            run.append(piece)
            file, end, direct = transfer.source.file, piece.start + piece.nbytes, _is_direct(piece)
            size += piece.nbytes
    if run:
        yield _Task(file, run[0].start, run)


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


def _execute(file: SafetensorsFile, task: _Task, local: threading.local) -> None:
    device = task.pieces[0].target.device
    if _is_direct(task.pieces[0]):
        views = [piece.target.view(torch.uint8).numpy().data for piece in task.pieces]
        file.read_into(task.start, views)
        return
    if getattr(local, "device", None) != device:
        local.device, local.staging = device, _Staging(device)
    buffer = local.staging.next(sum(piece.nbytes for piece in task.pieces))
    file.read_into(task.start, [buffer.numpy().data])
    for piece in task.pieces:
        begin = piece.start - task.start
        staged = buffer[begin : begin + piece.nbytes]
        if begin % piece.dtype.itemsize:
            staged = staged.clone()  # torch wants aligned elements
        piece.target.copy_(staged.view(piece.dtype), non_blocking=True)
    local.staging.release()
