"""Reads and checks scales before any weight: they are an eighth of the codes, and a bad one spoils every output."""

import math
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.safetensors_file import TensorInfo
from moe_nvfp4.weight_source import WeightSource

E4M3_NAN, E4M3_NEGATIVE, E4M3_SMALLEST_NORMAL = 0x7F, 0x80, 0x08
SMALLEST_DIVISOR = 2.0**-128  # the reciprocal of this one overflows float32


class BlockScaleStats(NamedTuple):
    """Counts over the E4M3 block scales of one weight."""

    total: int
    nan: int
    negative: int
    zero: int
    subnormal: int  # fewer than four significant bits are left: the exporter's amax underflowed


def read_values(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    """A small tensor as float32, flattened."""
    raw = checkpoint.read(info)
    dtype = torch.bfloat16 if info.dtype == "BF16" else torch.float32
    return torch.frombuffer(raw, dtype=dtype).float()


def stored_global(checkpoint: Checkpoint, source: WeightSource) -> float:
    """The NVFP4 global scale as the file holds it."""
    assert source.global_scale is not None
    (stored,) = struct.unpack("<f", checkpoint.read(source.global_scale))
    return float(stored)


def as_multiplier(stored: float, is_divisor: bool) -> float | None:
    """What a stored global scale multiplies by; None where that is not a finite number or is negative.

    Zero is a dead weight and allowed; a zero divisor is not.
    """
    if not math.isfinite(stored) or stored < 0:
        return None
    if not is_divisor:
        return stored
    return float(np.float32(1 / stored)) if stored > SMALLEST_DIVISOR else None


def global_multiplier(checkpoint: Checkpoint, source: WeightSource) -> float:
    """The NVFP4 global scale in its multiplier form."""
    stored = stored_global(checkpoint, source)
    multiplier = as_multiplier(stored, source.global_is_divisor)
    if multiplier is None:
        assert source.global_scale is not None
        rule = "a positive divisor" if source.global_is_divisor else "zero or a positive multiplier"
        raise CheckpointError(
            f"{checkpoint.where(source.global_scale)}: {stored}; expected {rule}. The export is broken: quantise again."
        )
    return multiplier


def fp8_scale(checkpoint: Checkpoint, source: WeightSource) -> torch.Tensor:
    assert source.scale is not None
    values = read_values(checkpoint, source.scale)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise CheckpointError(
            f"{checkpoint.where(source.scale)}: NaN, infinite or negative; FP8 scales are finite and not negative. "
            "The export is broken: quantise again."
        )
    return values


def check_block_scales(checkpoint: Checkpoint, sources: Iterable[WeightSource], readers: int) -> None:
    """Raises for the first weight whose block scales hold NaN or a negative value."""

    def check(source: WeightSource, scales: np.ndarray) -> None:
        if scales.size and scales.max() >= E4M3_NAN:
            stats = block_scale_stats(scales)
            if stats.nan or stats.negative:
                assert source.scale is not None
                raise CheckpointError(
                    f"{checkpoint.where(source.scale)}: {stats.nan:,} NaN and {stats.negative:,} negative block scales "
                    f"of {stats.total:,}; expected none. The export is broken: quantise again."
                )

    visit_block_scales(checkpoint, sources, check, readers)


def block_scale_stats(scales: np.ndarray) -> BlockScaleStats:
    # Passes over bytes in the cache; a histogram would widen every byte to eight, as would the sum of a mask.
    smallest, largest = (int(scales.min()), int(scales.max())) if scales.size else (0xFF, 0)
    if smallest >= E4M3_SMALLEST_NORMAL and largest < E4M3_NAN:
        return BlockScaleStats(scales.size, 0, 0, 0, 0)
    magnitude, count = scales & 0x7F, np.count_nonzero
    zero = scales.size - int(count(magnitude))
    tiny = int(count(magnitude < E4M3_SMALLEST_NORMAL)) - zero
    if largest < E4M3_NAN:
        return BlockScaleStats(scales.size, 0, 0, zero, tiny)
    negative = int(count(scales > E4M3_NEGATIVE)) - int(count(scales == 0xFF))
    return BlockScaleStats(scales.size, int(count(magnitude == E4M3_NAN)), negative, zero, tiny)


def visit_block_scales(
    checkpoint: Checkpoint,
    sources: Iterable[WeightSource],
    visit: Callable[[WeightSource, np.ndarray], None],
    readers: int,
) -> None:
    """Calls `visit(source, E4M3 bytes)` for every NVFP4 weight, from several threads, in file order."""
    todo = sorted(
        (source for source in sources if source.format == "nvfp4" and source.scale is not None),
        key=lambda source: (source.scale.file, source.scale.start),  # type: ignore[union-attr]
    )
    local, stop = threading.local(), threading.Event()

    def run(part: Sequence[WeightSource]) -> None:
        for source in part:
            if stop.is_set():
                return
            info = source.scale
            assert info is not None
            scratch = getattr(local, "scratch", None)
            if scratch is None or scratch.size < info.nbytes:
                scratch = local.scratch = np.empty(max(info.nbytes, 1 << 20), dtype=np.uint8)
            scales = scratch[: info.nbytes]
            checkpoint.files[info.file].read_into(info.start, [scales.data])
            visit(source, scales)

    step = max(1, min(64, len(todo) // (4 * readers) or 1))
    with ThreadPoolExecutor(readers, thread_name_prefix="scales") as pool:
        futures = [pool.submit(run, todo[i : i + step]) for i in range(0, len(todo), step)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()
