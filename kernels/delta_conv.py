"""The convolution of prompts before the gated delta rule, 64 rows at a time: q, k and v as its tensor cores read them.

    y = silu(sum_j w[:, K - 1 - j] mixed[t - j]),  q and k divided by their norms

in float16. Rows of q and k have length 1; v is divided by a unit for each chunk and head, so that no size of v leaves
float16's range. Inputs before the step's first row come from the ring, whose cell p % K holds that of position p.

Letters: L rows of a chunk, N places for chunks (rows.chunk_places).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.delta_state import DeltaState
from moe_nvfp4.kernels.rows import CHUNK, Rows
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases


class Chunks(NamedTuple):
    """Rows past the end of a sequence's last chunk are finite, whatever else."""

    q: Tensor  # float16 [N, HK, L, DK]
    k: Tensor  # the same
    v: Tensor  # float16 [N, HV, L, DV]
    units: Tensor  # float32 [N, HV], of v


def delta_conv(mixed_TC: Tensor, conv_CK: Tensor, state: DeltaState, rows: Rows) -> Chunks:
    """Of all sequences of `rows`. Reads the ring, does not write it."""
    heads, places = state.heads, rows.chunks.numel()
    half = mixed_TC.new_empty
    chunks = Chunks(
        half(places, heads.HK, CHUNK, heads.DK, dtype=torch.float16),
        half(places, heads.HK, CHUNK, heads.DK, dtype=torch.float16),
        half(places, heads.HV, CHUNK, heads.DV, dtype=torch.float16),
        half(places, heads.HV, dtype=torch.float32),
    )
    convolve[(2 * heads.HK + heads.HV, places)](
        mixed_TC, conv_CK, state.conv, rows.slots, rows.starts, rows.lengths, rows.chunks, *chunks,
        mixed_TC.stride(0),
        **heads._asdict(), K=state.conv.shape[1], L=CHUNK, ASM=mixed_TC.is_cuda,
        num_warps=max(1, max(heads.DK, heads.DV) // 32), **launch_options(mixed_TC),
    )  # fmt: skip
    return chunks


@triton.jit
def convolve(
    mixed_ptr, conv_ptr, ring_ptr, slots_ptr, starts_ptr, lengths_ptr, chunks_ptr, q_ptr, k_ptr, v_ptr, units_ptr,
    stride_mixed,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    place = tl.program_id(1)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence = tl.load(chunks_ptr + place)
    if sequence < 0:
        return
    start = tl.load(starts_ptr + sequence)
    rows = tl.load(starts_ptr + sequence + 1) - start
    first = (place - start // L - sequence) * L
    before = tl.load(lengths_ptr + sequence) - rows
    place = place.to(tl.int64)
    mixed_ptr += start.to(tl.int64) * stride_mixed
    ring_ptr += tl.load(slots_ptr + sequence).to(tl.int64) * (K * C)
    source = (mixed_ptr, conv_ptr, ring_ptr, first, rows, before, stride_mixed)
    if head < HK:
        _store_keys(q_ptr + (place * HK + head) * (L * DK), source, head * DK, C, DK, K, L, ASM)
    elif head < 2 * HK:
        _store_keys(k_ptr + (place * HK + head - HK) * (L * DK), source, head * DK, C, DK, K, L, ASM)
    else:
        value = place * HV + head - 2 * HK
        channel = 2 * HK * DK + (head - 2 * HK) * DV
        _store_values(v_ptr + value * (L * DV), units_ptr + value, source, channel, C, DV, K, L, ASM)


@triton.jit
def _store_keys(
    out_ptr, source, channel, C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, L: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    ys = _rows(source, channel, C, D, K, L, ASM)
    out_ptr += tl.arange(0, 8)[:, None] * (L // 8 * D) + tl.arange(0, D)[None, :]
    for i in tl.static_range(L // 8):
        y = ys[i] * tl.rsqrt(tl.sum(ys[i] * ys[i], 1) + 1e-6)[:, None]
        tl.store(out_ptr + i * D, y.to(tl.float16))


@triton.jit
def _store_values(
    out_ptr, unit_ptr, source, channel, C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    ys = _rows(source, channel, C, D, K, L, ASM)
    top = tl.abs(ys[0])
    for i in tl.static_range(1, L // 8):
        top = tl.maximum(top, tl.abs(ys[i]))
    # At most 16 units, so that a memory of thousands of values fits, and a thousandth has all its bits.
    unit = tl.maximum(tl.max(tl.max(top, 1), 0), 1e-30) / 16
    tl.store(unit_ptr, unit)
    out_ptr += tl.arange(0, 8)[:, None] * (L // 8 * D) + tl.arange(0, D)[None, :]
    for i in tl.static_range(L // 8):
        tl.store(out_ptr + i * D, (ys[i] * (1 / unit)).to(tl.float16))


@triton.jit
def _rows(source, first_channel, C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, L: tl.constexpr, ASM: tl.constexpr):
    """silu of the convolution of a chunk's rows: L / 8 tensors [8, D], the i-th of rows i, L / 8 + i, 2 L / 8 + i, ...

    So each input is loaded once and stays in registers for K rows.
    """
    mixed_ptr, conv_ptr, ring_ptr, first, rows, before, stride_mixed = source
    R: tl.constexpr = L // 8
    channel = (first_channel + tl.arange(0, D))[None, :]
    row = first + tl.arange(0, 8)[:, None] * R
    xs = ()
    for i in tl.static_range(1 - K, 0):
        at = row + i
        x = tl.load(mixed_ptr + at.to(tl.int64) * stride_mixed + channel, mask=(at >= 0) & (at < rows), other=0.0)
        x = x.to(tl.float32)
        if first == 0 and before > 0:
            past = ring_ptr + (before + at + K) % K * C + channel
            x += tl.load(past, mask=(at < 0) & (before + at >= 0), other=0.0).to(tl.float32)
        xs = xs + (x,)  # noqa: RUF005
    ys = ()
    for i in tl.static_range(R):
        at = row + i
        x = tl.load(mixed_ptr + at.to(tl.int64) * stride_mixed + channel, mask=at < rows, other=0.0)
        xs = xs + (x.to(tl.float32),)  # noqa: RUF005
        y = tl.zeros((8, D), tl.float32)
        for tap in tl.static_range(K):
            y += xs[i + tap] * tl.load(conv_ptr + channel * K + tap).to(tl.float32)
        ys = ys + (silu(y, ASM),)  # noqa: RUF005
    return ys


@triton.jit
def silu(x, ASM: tl.constexpr):
    """In assembly, since exp and division care for denormals: 4040 instead of 5592 instructions of `convolve`."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
            " rcp.approx.ftz.f32 t, t; mul.f32 $0, $1, t; }",
            "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return x / (1 + tl.exp(-x))


def compile_cases() -> list[CompileCase]:
    signature = dict.fromkeys(("mixed_ptr", "conv_ptr", "ring_ptr"), "*bf16") | {"stride_mixed": "i32"}
    signature |= dict.fromkeys(("slots_ptr", "starts_ptr", "lengths_ptr", "chunks_ptr"), "*i32")
    signature |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp16") | {"units_ptr": "*fp32"}
    sizes = {"HK": 16, "HV": 32, "DK": 128, "DV": 128, "K": 4, "L": CHUNK, "ASM": True}
    cases = pdl_cases("convolve", convolve, signature, {"num_warps": 4}, **sizes)
    return [replace(case, divisible=("stride_mixed",)) for case in cases]
