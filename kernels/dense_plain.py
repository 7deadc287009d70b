"""Dense linears in plain Triton: the products for every architecture, and decoding to bfloat16 for cuBLAS.

    y[m, n] = sum_k x[m, k] w[n, k]

Letters: M rows of x, N rows and K columns of the weight. `dense_rows.py` is faster for few rows.
"""

from typing import Final, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.fragments import FragmentTensor, from_fragments
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, decode_e4m3
from moe_nvfp4.kernels.sizes import cdiv

_TILES: Final = 4  # tiles of 64 columns that a program decodes at a time


def decode_rows_torch(weight: FragmentTensor | FP8Tensor, start: int, stop: int) -> Tensor:
    """The torch twin: rows start..stop of the weight in bfloat16, rounded once. FP8 holds no NaN."""
    if isinstance(weight, FP8Tensor):
        scale = weight.scale if weight.scale.ndim == 0 else weight.scale[start:stop, None]
        return (decode_e4m3(weight.values[start:stop]) * scale).bfloat16()
    part = slice(start // 16, -(-stop // 16))
    one = torch.ones((), device=weight.words.device)
    unscaled = from_fragments(FragmentTensor(weight.words[part], weight.scales[part], one)).dequantize()
    scale = weight.global_scale
    each = scale if scale.ndim == 0 else scale[part].repeat_interleave(16)[:, None]
    return (unscaled * each).bfloat16()[start % 16 : stop - start + start % 16]


def decode_rows(weight: FragmentTensor | FP8Tensor, start: int, stop: int) -> Tensor:
    """The launcher of the decoding; for fragments `start` is a multiple of 16."""
    if isinstance(weight, FP8Tensor):
        values = weight.values[start:stop]
        out = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
        scale = weight.scale if weight.scale.ndim == 0 else weight.scale[start:]
        grid = (cdiv(out.shape[1], 1024), out.shape[0])
        decode_fp8_kernel[grid](values, scale, out, out.shape[1], min(scale.ndim, 1), BLOCK=1024)
        return out
    assert start % 16 == 0, start
    strips, tiles = cdiv(stop - start, 16), weight.words.shape[1]
    out = torch.empty(strips * 16, tiles * 64, dtype=torch.bfloat16, device=weight.words.device)
    first = start // 16
    step = min(weight.global_scale.ndim, 1)
    decode_nvfp4_kernel[(cdiv(tiles, _TILES), strips)](
        weight.words[first:], weight.scales[first:], weight.global_scale[first:] if step else weight.global_scale, out,
        tiles, step, TILES=_TILES,
    )  # fmt: skip
    return out[: stop - start]


def dense_plain(
    x_MK: Tensor, weight: Tensor | FragmentTensor | FP8Tensor, *, block_m: Literal[16, 64] | None = None
) -> Tensor:
    """The launcher of the product, [M, N] bfloat16; its twin is `dense_linear_torch` in dense.py. `block_m`: rows of a
    program, which choose the instruction; default: by the number of rows."""
    (rows, columns), num_out = x_MK.shape, weight.shape[0]
    y_MN = torch.empty(rows, num_out, dtype=torch.bfloat16, device=x_MK.device)
    block_m = block_m or (16 if rows <= 16 else 64)
    grid = (cdiv(num_out, 64), cdiv(rows, block_m))
    if isinstance(weight, FragmentTensor):
        parts, kind, step = (weight.words, weight.scales, weight.global_scale), "nvfp4", weight.global_scale.ndim
    elif isinstance(weight, FP8Tensor):
        parts, kind, step = (weight.values, weight.values, weight.scale), "fp8", weight.scale.ndim
    else:
        parts, kind, step = (weight, weight, weight), "bf16", 0
    operand = tl.bfloat16 if x_MK.is_cuda else tl.float32  # Triton's interpreter has no bfloat16 dot
    dense_plain_kernel[grid](
        x_MK.contiguous(), *parts, y_MN, rows, num_out, columns, min(step, 1),
        KIND=kind, BLOCK_M=block_m, OPERAND=operand, num_warps=4 if block_m == 16 else 8,
    )  # fmt: skip
    return y_MN


@triton.jit
def e4m3_to_float(bits):
    """Moved to where float32 keeps exponent and mantissa, the value is 2^-120 times itself, subnormals included."""
    moved = (bits.to(tl.int32) << 24) >> 4
    return (moved & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def code(halves, scale, SIGN: tl.constexpr, MAGNITUDE: tl.constexpr):
    """One of the four codes of a half-word as float32 times its block scale."""
    bits = (((halves >> MAGNITUDE) & 7) << 22) | (((halves >> SIGN) & 1) << 31)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale  # magnitudes are 2^-126 times theirs


@triton.jit
def fragments_to_float(words, scale_0, scale_1, STRIPS: tl.constexpr, TILES: tl.constexpr):
    """[16 STRIPS, 64 TILES] from words [STRIPS, 8, 16 TILES] and the scale bytes of rows r and r + 8."""
    low, high = words & 0xFFFF, (words >> 16) & 0xFFFF
    scale_0 = ((scale_0.to(tl.int32) << 20) + (117 << 23)).to(tl.float32, bitcast=True)
    scale_1 = ((scale_1.to(tl.int32) << 20) + (117 << 23)).to(tl.float32, bitcast=True)
    row_0 = tl.join(
        tl.join(code(low, scale_0, 15, 6), code(low, scale_0, 13, 0)),
        tl.join(code(high, scale_0, 15, 6), code(high, scale_0, 13, 0)),
    )  # s, r, column / 4, i2, i0
    row_1 = tl.join(
        tl.join(code(low, scale_1, 12, 3), code(low, scale_1, 14, 9)),
        tl.join(code(high, scale_1, 12, 3), code(high, scale_1, 14, 9)),
    )
    both = tl.permute(tl.join(row_0, row_1), (0, 5, 1, 2, 3, 4))
    return tl.reshape(both, (16 * STRIPS, 64 * TILES))


@triton.jit
def load_fragments(w_ptr, s_ptr, strip, tile, strips, tiles, STRIPS: tl.constexpr, TILES: tl.constexpr):
    """Weights without the global scale, [16 STRIPS, 64 TILES]; zero past the end."""
    s = strip + tl.arange(0, STRIPS)[:, None, None]
    r = tl.arange(0, 8)[None, :, None]
    q = tl.arange(0, 16 * TILES)[None, None, :]  # tile, c, j
    live = (s < strips) & (tile + q // 16 < tiles) & (r >= 0)
    first = s.to(tl.int64) * tiles + tile + q // 16
    words = tl.load(w_ptr + (first * 8 + r) * 16 + q % 16, mask=live, other=0)
    pair = s_ptr + ((first * 8 + r) * 4 + q % 16 // 4) * 2
    scale_0 = tl.load(pair, mask=live, other=0)
    scale_1 = tl.load(pair + 1, mask=live, other=0)
    return fragments_to_float(words, scale_0, scale_1, STRIPS, TILES)


@triton.jit
def decode_nvfp4_kernel(w_ptr, s_ptr, g_ptr, out_ptr, tiles, scale_step, TILES: tl.constexpr):
    tile, strip = tl.program_id(0) * TILES, tl.program_id(1)
    w = load_fragments(w_ptr, s_ptr, strip, tile, strip + 1, tiles, 1, TILES) * tl.load(g_ptr + strip * scale_step)
    row = strip.to(tl.int64) * 16 + tl.arange(0, 16)[:, None]
    column = tile * 64 + tl.arange(0, 64 * TILES)[None, :]
    tl.store(out_ptr + row * (tiles * 64) + column, w.to(tl.bfloat16), mask=(column < tiles * 64) & (row >= 0))


@triton.jit
def decode_fp8_kernel(v_ptr, g_ptr, out_ptr, K, scale_step, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * K + column
    w = e4m3_to_float(tl.load(v_ptr + at, mask=column < K, other=0)) * tl.load(g_ptr + row * scale_step)
    tl.store(out_ptr + at, w.to(tl.bfloat16), mask=column < K)


@triton.jit
def dense_plain_kernel(
    x_ptr, w_ptr, s_ptr, g_ptr, y_ptr, M, N, K, scale_step,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """64 rows of the weight and BLOCK_M of x; 64 columns at a time."""
    n = tl.program_id(0) * 64 + tl.arange(0, 64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, 64)
    acc = tl.zeros((BLOCK_M, 64), tl.float32)
    for first in range(0, K, 64):
        inside = first + k < K
        x = tl.load(
            x_ptr + m.to(tl.int64)[:, None] * K + first + k[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0
        )
        at = n.to(tl.int64)[:, None] * K + first + k[None, :]
        live = (n < N)[:, None] & inside[None, :]
        if KIND == "nvfp4":
            w = load_fragments(w_ptr, s_ptr, tl.program_id(0) * 4, first // 64, N // 16, tl.cdiv(K, 64), 4, 1)
        elif KIND == "fp8":
            w = e4m3_to_float(tl.load(w_ptr + at, mask=live, other=0))
        else:
            w = tl.load(w_ptr + at, mask=live, other=0.0)
        acc = tl.dot(x.to(OPERAND), tl.trans(w.to(OPERAND)), acc)
    if KIND == "nvfp4":
        acc *= tl.load(g_ptr + n // 16 * scale_step, mask=n < N, other=0.0)[None, :]
    elif KIND == "fp8":
        acc *= tl.load(g_ptr + n * scale_step, mask=n < N, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, acc.to(tl.bfloat16), mask=(m < M)[:, None] & (n < N)[None, :])


def compile_cases() -> list[CompileCase]:
    integers = {"M": "i32", "N": "i32", "K": "i32", "scale_step": "i32"}
    cases = [
        CompileCase(
            name=f"dense_plain {kind} {block_m}",
            function=dense_plain_kernel,
            signature={"x_ptr": "*bf16", "w_ptr": w, "s_ptr": s, "g_ptr": g, "y_ptr": "*bf16", **integers},
            constexprs={"KIND": kind, "BLOCK_M": block_m, "OPERAND": tl.bfloat16},
            options={"num_warps": 4 if block_m == 16 else 8},
        )
        for kind, w, s, g in (
            ("nvfp4", "*i32", "*u8", "*fp32"), ("fp8", "*u8", "*u8", "*fp32"), ("bf16", "*bf16", "*bf16", "*bf16"),
        )
        for block_m in (16, 64)
    ]  # fmt: skip
    fragments = {"w_ptr": "*i32", "s_ptr": "*u8", "g_ptr": "*fp32", "out_ptr": "*bf16"}
    values = {"v_ptr": "*u8", "g_ptr": "*fp32", "out_ptr": "*bf16", "K": "i32", "scale_step": "i32"}
    return [
        *cases,
        CompileCase(
            name="decode_nvfp4",
            function=decode_nvfp4_kernel,
            signature={**fragments, "tiles": "i32", "scale_step": "i32"},
            constexprs={"TILES": _TILES},
        ),
        CompileCase(
            name="decode_fp8",
            function=decode_fp8_kernel,
            signature=values,
            constexprs={"BLOCK": 1024},
            divisible=("K",),
        ),
    ]
