"""Bytes of synthetic tensors: windows into a few pools of random values, made once.

The value at a place of a tensor depends on the seed, the tensor's name and the place alone, so that threads
may write in any order.
"""

import math
import struct
from collections.abc import Callable
from hashlib import blake2b
from threading import Lock

import numpy
import torch

from moe_nvfp4.published import QUANTIZED, StoredTensor

# Pool lengths are odd, so that the rows of a tensor longer than its pool are not copies of each other.
CODE_BYTES = (64 << 20) + 1
PLAIN_ITEMS = (8 << 20) + 1
VECTOR_ITEMS = (64 << 10) + 1  # norms, biases and the like

E2M1_RMS = math.sqrt(8.5625)  # of the 16 codes: the mean of 0, .25, 1, 2.25, 4, 9, 16, 36
FIRST_BLOCK_SCALE, BLOCK_SCALES = 0x30, 16  # E4M3 bytes of 0.5 to 1.875
BLOCK_SCALE_RMS = math.sqrt(sum((2 ** (i // 8 - 1) * (1 + i % 8 / 8)) ** 2 for i in range(16)) / 16)
FP8_STD = 64.0  # 448 is seven of these
INPUT_AMAX = 16.0  # of activations, for input scales
KV_AMAX = 8.0

# Numbers of a module's scales; `weight` is the standard deviation that its dequantised weight shall have.
_SCALARS: dict[str, Callable[[float, float], float]] = {
    "global_scale": lambda weight, _: weight / (E2M1_RMS * BLOCK_SCALE_RMS),
    "global_divisor": lambda weight, _: E2M1_RMS * BLOCK_SCALE_RMS / weight,
    "nvfp4_input_scale": lambda _, factor: factor * INPUT_AMAX / (6 * 448),
    "nvfp4_input_divisor": lambda _, factor: 6 * 448 / (factor * INPUT_AMAX),
    "fp8_scale": lambda weight, _: weight / FP8_STD,
    "fp8_input_scale": lambda _, factor: factor * INPUT_AMAX / 448,
    "kv_scale": lambda _, factor: factor * KV_AMAX / 448,
}


class SyntheticValues:
    """`largest` is the item count of the checkpoint's largest tensor: small ones need no large pools."""

    def __init__(self, seed: int, largest: int) -> None:
        self._key = struct.pack("<Q", seed)
        self._plain_items = min(PLAIN_ITEMS, max(largest, VECTOR_ITEMS)) | 1
        self._code_bytes = min(CODE_BYTES, max(largest, VECTOR_ITEMS)) | 1
        self._pools: dict[tuple[object, ...], memoryview] = {}
        self._lock = Lock()
        self._normal: numpy.ndarray | None = None

    def buffers(self, tensor: StoredTensor, start: int, stop: int) -> list[memoryview | bytes]:
        """Bytes start to stop of a tensor, in pieces."""
        draw = int.from_bytes(blake2b(tensor.name.encode(), digest_size=8, key=self._key).digest(), "little")
        factor = 2.0 ** (2 * (draw >> 40) / (1 << 24) - 1)  # 1/2 to 2, apart for each tensor
        if scalar := _SCALARS.get(tensor.meaning):
            return [struct.pack("<f", scalar(factor / math.sqrt(tensor.fan_in), factor))[start:stop]]
        pool, item = self._pool(tensor, factor)
        position = (draw % (len(pool) // item) * item + start) % len(pool)
        pieces: list[memoryview | bytes] = []
        while start < stop:
            length = min(stop - start, len(pool) - position)
            pieces.append(pool[position : position + length])
            start, position = start + length, 0
        return pieces

    def _pool(self, tensor: StoredTensor, factor: float) -> tuple[memoryview, int]:
        """The pool that a tensor is cut from, and its item size."""
        meaning, dtype = tensor.meaning, tensor.spec.dtype
        if meaning in QUANTIZED:
            return self._cached((meaning,), lambda: self._quantized_pool(meaning)), 1
        if meaning == "linear":
            # Half octaves: a pool for each of the few levels that occur, instead of one for each tensor.
            level = round(2 * math.log2(factor / math.sqrt(tensor.fan_in)))
        else:
            level = tensor.fan_in if meaning == "unscaled_norm" else 0
        pool = self._cached((meaning, dtype, level), lambda: self._plain_pool(meaning, dtype, level))
        return pool, 4 if dtype == "F32" else 2

    def _cached(self, key: tuple[object, ...], make: Callable[[], memoryview]) -> memoryview:
        pool = self._pools.get(key)
        if pool is None:
            with self._lock:
                pool = self._pools.get(key)
                if pool is None:
                    pool = self._pools[key] = make()
        return pool

    def _random(self, purpose: int) -> numpy.random.Generator:
        return numpy.random.Generator(numpy.random.PCG64([int.from_bytes(self._key, "little"), purpose]))

    def _normals(self) -> numpy.ndarray:
        if self._normal is None:
            self._normal = self._random(0).standard_normal(self._plain_items, dtype=numpy.float32)
        return self._normal

    def _quantized_pool(self, meaning: str) -> memoryview:
        if meaning == "codes":
            return memoryview(self._random(1).bytes(self._code_bytes))
        if meaning == "block_scale":
            draws = numpy.frombuffer(self._random(2).bytes(self._plain_items), dtype=numpy.uint8)
            scales = draws % numpy.uint8(BLOCK_SCALES) + numpy.uint8(FIRST_BLOCK_SCALE)
            return scales.data.cast("B")
        clipped = numpy.clip(self._normals() * numpy.float32(FP8_STD), -448, 448)
        return _converted(clipped, torch.float8_e4m3fn)

    def _plain_pool(self, meaning: str, dtype: str, level: int) -> memoryview:
        if meaning == "linear":
            values = self._normals() * numpy.float32(2 ** (level / 2))
        elif meaning == "embedding":
            values = self._normals()
        else:
            values = self._vector_values(meaning, level)
        return _converted(values, torch.float32 if dtype == "F32" else torch.bfloat16)

    def _vector_values(self, meaning: str, size: int) -> numpy.ndarray:
        random = self._random(3)
        tenth = 0.1 * random.standard_normal(VECTOR_ITEMS, dtype=numpy.float32)
        uniform = random.random(VECTOR_ITEMS, dtype=numpy.float32)
        match meaning:
            case "offset_norm" | "bias":
                values = tenth
            case "norm" | "scalar":
                values = 1 + tenth
            case "unscaled_norm":
                values = (1 + tenth) * size**-0.25
            case "decay":  # log of 1 to 16
                values = numpy.log(1 + 15 * uniform)
            case "step":  # inverse softplus of a time step of 0.001 to 0.1
                step = 10 ** (2 * uniform - 3)
                values = step + numpy.log(-numpy.expm1(-step))
            case other:
                raise ValueError(f"no synthetic values for {other!r}")
        return values.astype(numpy.float32)


def _converted(values: numpy.ndarray, dtype: torch.dtype) -> memoryview:
    converted = torch.from_numpy(numpy.ascontiguousarray(values)).to(dtype).view(torch.uint8).numpy()
    return converted.data.cast("B")
