"""The NVFP4 and FP8 formats in plain torch: what every kernel is measured against.

    w[n, k] = e2m1(codes[n, k]) * e4m3(block_scales[n, k // 16]) * global_scale

Shape letters: N rows (outputs), K columns (inputs), `...` leading dimensions such as experts. Two 4-bit codes
share a byte, the even column in the low nibble. E4M3 values are uint8 bit patterns, because sm_80 and sm_86
have no FP8 type to load. The global scale in memory is always the multiplier: ModelOpt's `weight_scale_2`,
the reciprocal of compressed-tensors' `weight_global_scale`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

BLOCK: Final = 16
E2M1_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0
E4M3_TINY: Final = 2.0**-9  # the smallest subnormal
# What compressed-tensors stores where a block scale would round to zero.
CT_ZERO_SCALE: Final = 0.125

# Bounds on relative_error. float32 and bfloat16: the same maths with sums in another order and results
# rounded to that type (bfloat16 rounding alone gives 1.7e-3). fp8 and nvfp4: a quantised tensor against its
# original (Gaussian weights give 0.027 and 0.095).
TOLERANCE: Final = {"float32": 1e-5, "bfloat16": 5e-3, "fp8": 0.04, "nvfp4": 0.12}

Rule = Literal["modelopt", "compressed-tensors"]

_DEQUANTIZE_CHUNK: Final = 1 << 20  # elements; about 10 bytes of scratch for each
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


class NVFP4Tensor(NamedTuple):
    codes: Tensor  # uint8 [..., N, K/2]
    block_scales: Tensor  # uint8 [..., N, K/16], E4M3 bits
    global_scale: Tensor  # float32 [...], multiplier

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize(self, dtype)


class FP8Tensor(NamedTuple):
    values: Tensor  # uint8 [N, K], E4M3 bits
    scale: Tensor  # float32 [] or [N], multiplier

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        _expect_dtype("FP8Tensor.values", self.values, torch.uint8)
        _expect_dtype("FP8Tensor.scale", self.scale, torch.float32)
        if self.values.ndim != 2 or self.scale.shape not in (torch.Size(), self.values.shape[:1]):
            raise ValueError(
                f"FP8Tensor.scale has shape {list(self.scale.shape)} for values {list(self.values.shape)}; "
                "values must be [N, K] and the scale [] or [N], so reshape a stored [1] or [N, 1]"
            )
        scale = self.scale if self.scale.ndim == 0 else self.scale[:, None]
        return (decode_e4m3(self.values) * scale).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; to be compared with TOLERANCE."""
    wanted = expected.double()
    norm, off = wanted.norm().item(), (actual.double() - wanted).norm().item()
    if norm == 0.0:
        return 0.0 if off == 0.0 else math.inf
    return float(off / norm)


def pack(codes: Tensor) -> Tensor:
    """4-bit codes, uint8 [..., K], to bytes, uint8 [..., K/2]."""
    _expect_dtype("codes", codes, torch.uint8)
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes have shape {list(codes.shape)}; two share a byte, so K must be even")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes, uint8 [..., K/2], to 4-bit codes, uint8 [..., K]."""
    _expect_dtype("packed", packed, torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_e4m3(bits: Tensor) -> Tensor:
    """E4M3 bit patterns to float32, exactly. 0x7F and 0xFF are NaN; there is no infinity."""
    _expect_dtype("bits", bits, torch.uint8)
    if bits.device.type == "cpu":  # a third to a fifth of the time
        return bits.view(torch.float8_e4m3fn).float()
    return _decode_e4m3_bits(bits)


def _decode_e4m3_bits(bits: Tensor) -> Tensor:
    magnitude = bits.int() & 0x7F
    # Exponent and mantissa move up to where float32 keeps them; 120 is the difference of the biases, 127 - 7.
    normal = ((magnitude << 20) + (120 << 23)).view(torch.float32)
    value = torch.where(magnitude < 8, magnitude * E4M3_TINY, normal)
    value.masked_fill_(magnitude == 0x7F, math.nan)
    return torch.where(bits >= 0x80, -value, value)


def encode_e4m3(x: Tensor) -> Tensor:
    """float32 to E4M3 bits: nearest, ties to even, saturating at 448; NaN stays NaN."""
    _expect_dtype("x", x, torch.float32)
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """4-bit codes, uint8 below 16, to float32; bit 3 is the sign, so code 8 is -0.0."""
    _expect_dtype("codes", codes, torch.uint8)
    values = torch.tensor((*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)), device=codes.device)
    return values[codes.int()]


@cache
def _values_of_bytes() -> Tensor:
    """float32 [256, 2]: the two values of each byte."""
    return decode_e2m1(unpack(torch.arange(256, dtype=torch.uint8)[:, None]))


def _decode_packed(packed: Tensor) -> Tensor:
    """decode_e2m1(unpack(packed)), float32 [N, K]; on a CPU in a seventh of the time."""
    if packed.device.type != "cpu":
        return decode_e2m1(unpack(packed))
    pairs = _values_of_bytes().view(torch.float64).flatten()  # so that one look-up gives both
    return pairs.index_select(0, packed.flatten().int()).view(torch.float32).view(packed.shape[0], -1)


def encode_e2m1(x: Tensor) -> Tensor:
    """Floats to 4-bit codes, uint8: nearest, ties to the even code, saturating at 6.

    A negative value that rounds to zero keeps its sign (code 8) while -0.0 itself gives code 0: both ModelOpt
    and compressed-tensors take the sign from x < 0. NaN gives 0.
    """
    _expect_float("x", x)
    magnitude = x.float().abs()
    codes = (x < 0).to(torch.uint8) << 3
    for code in range(7):
        midpoint = (E2M1_MAGNITUDES[code] + E2M1_MAGNITUDES[code + 1]) / 2
        codes += magnitude > midpoint if code % 2 == 0 else magnitude >= midpoint
    return codes


def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.float32, *, divisor: Tensor | None = None) -> Tensor:
    """The weight [..., N, K], computed in float32, with little scratch beside the result.

    code * block scale has six significant bits and is exact, so multiplying by the global scale last rounds
    once. `divisor` (float32 [...]) replaces the global scale by compressed-tensors' arithmetic,
    code * (scale / divisor), for results equal to that package's to the bit; they differ by 2 ulp of float32.
    """
    _check_parts(q)
    shape = q.shape
    if divisor is not None:
        _check_global_scale("divisor", divisor, shape)
    out = torch.empty(shape, dtype=dtype, device=q.codes.device)
    out_rows, codes = out.view(-1, shape[-1]), q.codes.reshape(-1, q.codes.shape[-1])
    scales = q.block_scales.reshape(-1, shape[-1] // BLOCK)
    per_row = (q.global_scale if divisor is None else divisor)[..., None].expand(shape[:-1]).reshape(-1, 1, 1)
    step = max(1, _DEQUANTIZE_CHUNK // shape[-1])
    for start in range(0, codes.shape[0], step):
        rows = slice(start, start + step)
        values = _in_blocks(_decode_packed(codes[rows]))
        scale = decode_e4m3(scales[rows])[..., None]
        if divisor is None:
            values.mul_(scale).mul_(per_row[rows])
        else:
            values.mul_(scale / per_row[rows])
        out_rows[rows] = values.flatten(1)
    return out


def tensor_amax(weight: Tensor) -> Tensor:
    """Largest magnitude of each [N, K] matrix, [...], in the weight's own dtype (which rule CT needs)."""
    return weight.abs().amax(dim=(-2, -1))


def global_scale_modelopt(amax: Tensor) -> Tensor:
    """ModelOpt's `weight_scale_2`, a float32 multiplier: amax / (6 * 448)."""
    return _divide(amax.float(), E2M1_MAX * E4M3_MAX)


def global_scale_compressed_tensors(amax: Tensor) -> Tensor:
    """compressed-tensors' `weight_global_scale`, a float32 divisor: 448 * 6 / amax; NaN and inf become 1.

    To the bit this is reciprocal(amax) * 2688, each step rounded to amax's dtype: torch computes
    `number / tensor` that way. So bfloat16 weights get a bfloat16 divisor, and float16 weights with amax
    below 0.04 overflow to the fallback of 1.
    """
    _expect_float("amax", amax)
    divisor = amax.clamp(min=torch.finfo(amax.dtype).tiny).reciprocal() * (E2M1_MAX * E4M3_MAX)
    return divisor.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).float()


def quantize(weight: Tensor, *, global_scale: Tensor | None = None, rule: Rule = "modelopt") -> NVFP4Tensor:
    """Quantise [..., N, K], as the named exporter does, to the bit.

    `global_scale`, float32 [...], is for scales shared between tensors. It is what the rule stores in a file
    and what its global_scale_* function returns: "modelopt" the multiplier, "compressed-tensors" the divisor.
    The result always carries the multiplier; whoever needs the exact divisor computes it and passes it in.
    """
    _check_weight(weight)
    if rule not in get_args(Rule):
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(map(repr, get_args(Rule)))}")
    blocks = _in_blocks(weight)
    block_amax = blocks.abs().amax(dim=-1)
    if not bool(block_amax.isfinite().all()):
        raise ValueError("weight holds NaN or infinity; NVFP4 has neither, so repair the weight first")
    if global_scale is None:
        pick = global_scale_modelopt if rule == "modelopt" else global_scale_compressed_tensors
        global_scale = pick(block_amax.amax(dim=(-2, -1)))
    _check_global_scale("global_scale", global_scale, weight.shape)

    spread = global_scale[..., None, None]
    if rule == "modelopt":
        scale = block_amax.float() / (E2M1_MAX * spread)
        scale = scale.masked_fill(block_amax == 0, 1.0).clamp(E4M3_TINY, E4M3_MAX)
        block_scales = encode_e4m3(scale)
        step = decode_e4m3(block_scales) * spread
        multiplier = global_scale
    else:
        # The division rounds to the weight's dtype, the product with the divisor is float32.
        block_scales = encode_e4m3(_divide(block_amax, E2M1_MAX).float() * spread)
        scale = decode_e4m3(block_scales)
        scale = scale.masked_fill(scale == 0, CT_ZERO_SCALE)
        block_scales = encode_e4m3(scale)
        step = scale / spread
        multiplier = global_scale.reciprocal()
    codes = encode_e2m1((blocks.float() / step[..., None]).flatten(-2))
    return NVFP4Tensor(pack(codes), block_scales, multiplier)


def _in_blocks(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def _divide(x: Tensor, number: float) -> Tensor:
    # A tensor on the device, because CUDA turns division by a Python number into x * (1 / number).
    return x / x.new_full((), number)


def _expect_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        remedy = "; view E4M3 tensors as uint8 with .view(torch.uint8)" if dtype == torch.uint8 else ""
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {dtype}{remedy}")


def _expect_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be one of {', '.join(map(str, _FLOATS))}")


def _check_weight(weight: Tensor) -> None:
    _expect_float("weight", weight)
    if weight.ndim < 2 or weight.shape[-1] % BLOCK or weight.numel() == 0:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; it must be [..., N, K], not empty, K a multiple of 16"
        )


def _check_global_scale(name: str, scale: Tensor, shape: torch.Size) -> None:
    _expect_dtype(name, scale, torch.float32)
    if scale.shape != shape[:-2]:
        raise ValueError(
            f"{name} has shape {list(scale.shape)} for a weight {list(shape)}; "
            f"it must be {list(shape[:-2])}, one per matrix, so reshape a stored [1]"
        )


def _check_parts(q: NVFP4Tensor) -> None:
    _expect_dtype("codes", q.codes, torch.uint8)
    _expect_dtype("block_scales", q.block_scales, torch.uint8)
    if q.codes.ndim < 2 or q.codes.shape[-1] == 0 or q.codes.shape[-1] % (BLOCK // 2):
        raise ValueError(f"codes have shape {list(q.codes.shape)}; they must be [..., N, K/2], K a multiple of 16")
    shape = q.shape
    expected = torch.Size((*shape[:-1], shape[-1] // BLOCK))
    if q.block_scales.shape != expected:
        raise ValueError(
            f"block_scales have shape {list(q.block_scales.shape)} for codes {list(q.codes.shape)}; "
            f"they must be {list(expected)}, one per {BLOCK} columns"
        )
    _check_global_scale("global_scale", q.global_scale, shape)
