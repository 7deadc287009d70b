"""The safetensors container: a header that is not trusted, and reads of exactly the bytes asked for.

The header's claims are checked against the size of the file before anything is allocated: lengths, dtypes,
shapes, and offsets that must cover the data without gap or overlap.
"""

import json
import math
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_nvfp4.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 8
MAX_EXTENT = 1 << 48

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Where one tensor lies. `start` counts from the beginning of the file."""

    name: str
    file: int  # index into the checkpoint's files
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """One open file. Reads go through `read_into`; `tensor` is a view of the mapped file."""

    def __init__(self, path: Path, index: int = 0):
        self.path = path
        self._map: mmap.mmap | None = None
        self.fd = open_regular(path)
        try:
            self.size = os.fstat(self.fd).st_size
            self.tensors = parse_header(self._header(), self.size, path.name, index)
        except BaseException:
            self.close()
            raise

    def _header(self) -> bytes:
        prefix = os.pread(self.fd, 8, 0)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{self.path.name}: {self.size} bytes; a safetensors file starts with an 8-byte header length. "
                "Download the file again."
            )
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, self.size - 8):
            raise CheckpointError(
                f"{self.path.name}: the header claims {length:,} bytes; the file has {self.size - 8:,} after the "
                f"length field and the limit is {MAX_HEADER_BYTES:,}. The file is truncated or not safetensors: "
                "download it again."
            )
        header = bytearray(length)
        self.read_into(8, [memoryview(header)])
        return bytes(header)

    def read_into(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Fills the buffers, in order, from the bytes that begin at `start`."""
        pending = [buffer for buffer in buffers if buffer.nbytes]
        while pending:
            try:
                count = os.preadv(self.fd, pending, start)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path.name}: the file ends at byte {start:,}; it was {self.size:,} bytes when opened. "
                    "It changed while it was read: load it again."
                )
            start += count
            while pending and count >= pending[0].nbytes:
                count -= pending.pop(0).nbytes
            if count:
                pending[0] = pending[0][count:]

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """A tensor over the mapped file: nothing is copied, pages are read when touched.

        The mapping is private, so writing to the tensor does not change the file.
        """
        if self.fd < 0:
            raise CheckpointError(f"{self.path}: closed; take tensors before closing the checkpoint")
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path.name}: {info.name!r:.200}: dtype {info.dtype}; expected one of {', '.join(TORCH_DTYPES)}"
            )
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        if info.start % dtype.itemsize:  # a header that is not padded; torch wants aligned elements
            flat = torch.empty(info.nbytes, dtype=torch.uint8)
            self.read_into(info.start, [flat.numpy().data])
            return flat.view(dtype).view(info.shape)
        if self._map is None:
            self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_COPY)
        count = info.nbytes // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=info.start).view(info.shape)

    def close(self) -> None:
        """Closes the file; tensors that view the mapping keep the mapping, and with it a descriptor, alive."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._map = None


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file; CheckpointError for everything else, without waiting."""
    try:
        # O_NONBLOCK: opening a named pipe must fail the check below, not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r:.300}: cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have
        raise CheckpointError(f"{str(path)!r:.300}: cannot be opened: {error}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: not a regular file")
    return fd


def parse_header(raw: bytes, file_size: int, where: str, file: int = 0) -> dict[str, TensorInfo]:
    """Tensors of a header, in the order of their offsets. Raises CheckpointError on any broken rule."""
    if raw[:1] != b"{":
        raise CheckpointError(f"{where}: the header starts with {raw[:1]!r}; expected a JSON object")
    try:
        header = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        "".join(header).encode("utf-8")  # a name with half a surrogate pair could not even be printed
    except (ValueError, RecursionError) as error:  # also bad UTF-8 and numbers of absurd length
        raise CheckpointError(
            f"{where}: the header is not JSON ({type(error).__name__}). Download the file again."
        ) from error
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise CheckpointError(f"{where}: __metadata__: expected an object of strings")
    data_start = 8 + len(raw)
    tensors = [_parse_entry(name, entry, data_start, where, file) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    position = data_start
    for info in tensors:
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{where}: {info.name!r:.200}: starts at data byte {info.start - data_start:,} and {problem}, "
                f"which ends at {position - data_start:,}. Tensors must follow each other: write the file again."
            )
        position += info.nbytes
    if position != file_size:
        problem = "truncated" if position > file_size else "longer than its tensors"
        raise CheckpointError(
            f"{where}: the tensors end at byte {position:,} and the file at {file_size:,}: it is {problem}. "
            "Download it again."
        )
    return {info.name: info for info in tensors}


_ENTRY = {"dtype", "shape", "data_offsets"}


def _parse_entry(name: str, entry: Any, data_start: int, where: str, file: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise CheckpointError(f"{where}: {name!r:.200}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(f"{where}: {name!r:.200}: dtype {dtype!r:.40}; expected one of {', '.join(BITS)}")
    if not _are_sizes(shape, MAX_DIMENSIONS) or (0 in shape and math.prod(filter(None, shape)) >= MAX_EXTENT):
        raise CheckpointError(
            f"{where}: {name!r:.200}: shape {shape!r:.80}; expected at most {MAX_DIMENSIONS} sizes below 2^48"
        )
    if not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: {name!r:.200}: data_offsets {offsets!r:.80}; expected [begin, end]")
    nbytes, total_bits = offsets[1] - offsets[0], math.prod(shape) * bits
    if total_bits != 8 * nbytes:
        raise CheckpointError(
            f"{where}: {name!r:.200}: {dtype} of shape {shape} takes {total_bits / 8:,.0f} bytes; "
            f"data_offsets span {nbytes:,}"
        )
    return TensorInfo(name, file, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(value: Any, most: int) -> bool:
    if not isinstance(value, list) or len(value) > most:
        return False
    # A loop: a generator expression takes longer than the rest of an entry.
    for item in value:  # noqa: SIM110
        if type(item) is not int or not 0 <= item < MAX_EXTENT:
            return False
    return True


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
