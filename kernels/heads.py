"""From a projection to attention: heads of q, k and v normed, rotated, k and v stored in their pages, in one launch.

A program is one warp and takes some heads of a row, which share cosines and sines; no sum needs a barrier.
Rotation is NeoX style: i and i + R/2 of a head turn by position * inv_freq[i]; what lies beyond R passes through.

On sm_90 and later a program looks up weights, angles and its place in the pages while the predecessor still runs, which
takes 0.1 to 0.3 us off a step's layer: so what launches just before, and what launches before that without waiting for
it, must not write rows and page table. The projections that q, k and v come from do not.

Letters: T rows, N heads of q, G heads of k and of v, D numbers of a head, R rotated numbers of it.
"""

from dataclasses import replace
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.paged_kv import PagedKV, store_twin
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.kernels.sizes import cdiv, next_power_of_2
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases, use_twin

# An H200 starts 0.8 programs a nanosecond, so that beyond a few hundred each takes several heads: 4096 rows of 32 heads
# of 256 take 159 us with one head a program, 41 with four, 37 with eight; the bytes alone would take 30.
_PROGRAMS: Final = 512
_NUMBERS: Final = 2048  # of a program, at most
_INVARIANT_HEADS: Final = 4  # of a program, where the order of a head's sum must not depend on the number of rows


def norm_rope_store(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    kv: PagedKV,
    rows: Rows,
    inv_freq: Tensor,
    eps: float,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    offset: bool = False,
    norm_v: bool = False,
) -> Tensor:
    """q [T, N, D], normed and rotated. k, the same, and v, normed without weight or as it is, go to the pages.

    Norms are RMS over D times the weight [D], or 1 + weight with `offset`; without a weight there is none. q, k and v
    may be views of one projection, and v the same memory as k. inv_freq is float32 [R/2]. All in float32, rounded once.
    """
    if use_twin(q_TND) or q_TND.dtype != torch.bfloat16:
        return norm_rope_store_twin(
            q_TND, k_TGD, v_TGD, kv, rows, inv_freq, eps, q_norm, k_norm, offset=offset, norm_v=norm_v
        )
    (num_rows, heads, dim), kv_heads = q_TND.shape, k_TGD.shape[1]
    assert 0 < 2 * inv_freq.numel() <= dim, (inv_freq.numel(), dim)
    assert q_TND.stride(2) == k_TGD.stride(2) == v_TGD.stride(2) == 1, "the numbers of a head are adjacent"
    assert kv.keys.is_contiguous() and kv.values.is_contiguous() and kv.table.stride(1) == 1, "pages are contiguous"
    out_TND = q_TND.new_empty(num_rows, heads, dim)
    every = num_rows * (heads + 2 * kv_heads)
    bh = head_block(_INVARIANT_HEADS * _PROGRAMS if kv.batch_invariant else every, dim)
    q_blocks, kv_blocks = cdiv(heads, bh), cdiv(kv_heads, bh)
    some = next((weight for weight in (q_norm, k_norm) if weight is not None), q_TND)
    norm_rotate_store[(num_rows, q_blocks + 2 * kv_blocks)](
        q_TND, k_TGD, v_TGD, out_TND, kv.keys, kv.values,
        some if q_norm is None else q_norm, some if k_norm is None else k_norm, inv_freq,
        rows.positions, rows.row_slots, kv.table, 1 / kv.k_scale, 1 / kv.v_scale,
        q_TND.stride(0), q_TND.stride(1), k_TGD.stride(0), k_TGD.stride(1), v_TGD.stride(0), v_TGD.stride(1),
        kv.table.stride(0), q_blocks, kv_blocks, N=heads, G=kv_heads, D=dim, HALF=inv_freq.numel(), PAGE=kv.page,
        BH=bh, BD=next_power_of_2(dim), EPS=eps,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None, V_NORM=norm_v, OFFSET=float(offset),
        FUSED=q_TND.is_cuda, num_warps=1, **launch_options(q_TND),
    )  # fmt: skip
    return out_TND


def norm_rope_store_twin(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    kv: PagedKV,
    rows: Rows,
    inv_freq: Tensor,
    eps: float,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    offset: bool = False,
    norm_v: bool = False,
) -> Tensor:
    angles = rows.positions[:, None, None].float() * inv_freq.float()
    cos, sin, half = angles.cos(), angles.sin(), inv_freq.numel()

    def normed(x_THD: Tensor, weight: Tensor | None) -> Tensor:
        scaled = x_THD * torch.rsqrt(x_THD.square().mean(-1, keepdim=True) + eps)
        return scaled if weight is None else scaled * (weight.float() + offset)

    def rotated(x_THD: Tensor) -> Tensor:
        first, second, rest = x_THD.split((half, half, x_THD.shape[-1] - 2 * half), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_TND, k_TGD, v_TGD))
    q = rotated(q if q_norm is None else normed(q, q_norm))
    k = rotated(k if k_norm is None else normed(k, k_norm))
    store_twin(kv, rows.positions, rows.row_slots, k, normed(v, None) if norm_v else v)
    return q.to(q_TND.dtype)


def head_block(heads: int, dim: int) -> int:
    """Heads of a program, a power of two, from the heads of all rows."""
    wanted: int = next_power_of_2(cdiv(heads, _PROGRAMS))
    most: int = _NUMBERS // next_power_of_2(dim)
    return max(1, min(wanted, most))


@triton.jit
def norm_rotate_store(
    q_ptr, k_ptr, v_ptr, out_ptr, keys_ptr, values_ptr, q_norm_ptr, k_norm_ptr, freq_ptr,
    positions_ptr, slots_ptr, table_ptr, k_inverse, v_inverse,
    q_row, q_head, k_row, k_head, v_row, v_head, table_row, q_blocks, kv_blocks,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, EPS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, V_NORM: tl.constexpr, OFFSET: tl.constexpr,
    FUSED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First the blocks of heads of q, then of k, then of v, which is not rotated."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_q, is_v = block < q_blocks, block >= q_blocks + kv_blocks
    weighted = (is_q & Q_NORM) | (((block >= q_blocks) & (block < q_blocks + kv_blocks)) & K_NORM)
    first = tl.where(is_q, block, tl.where(is_v, block - q_blocks - kv_blocks, block - q_blocks)) * BH
    head = (first + tl.arange(0, BH))[:, None]
    d = tl.arange(0, BD)
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    live = head < tl.where(is_q, N, G)
    turns = live & ((d < 2 * HALF) & ~is_v)[None, :]
    live = live & (d < D)[None, :]
    source = tl.where(is_q, q_ptr + row * q_row, tl.where(is_v, v_ptr + row * v_row, k_ptr + row * k_row))
    source += head * tl.where(is_q, q_head, tl.where(is_v, v_head, k_head))
    position, slot = tl.load(positions_ptr + row), tl.load(slots_ptr + row).to(tl.int64)
    weight_ptr = tl.where(is_q, q_norm_ptr, k_norm_ptr)
    weight = tl.load(weight_ptr + d, mask=weighted & (d < D), other=1 - OFFSET).to(tl.float32) + OFFSET
    w_partner = tl.load(weight_ptr + partner, mask=weighted & (d < 2 * HALF), other=1 - OFFSET).to(tl.float32) + OFFSET
    freq = tl.load(freq_ptr + tl.minimum(d, partner), mask=(d < 2 * HALF) & ~is_v, other=0.0)
    page = tl.load(table_ptr + slot * table_row + position // PAGE).to(tl.int64)
    cos, sin = cos_sin(position.to(tl.float32) * freq, FUSED)
    cos, sin = cos * weight, tl.where(d < HALF, -sin, sin) * w_partner
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    x = tl.load(source + d[None, :], mask=live, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    scale = tl.where(weighted | (is_v & V_NORM), tl.rsqrt(tl.sum(x * x, 1) / D + EPS), 1.0)[:, None]
    x = (x * cos[None, :] + other * sin[None, :]) * scale
    if is_q:
        tl.store(out_ptr + (row * N + head) * D + d[None, :], x.to(tl.bfloat16), mask=live)
    else:
        at = ((page * PAGE + position % PAGE) * G + head) * D + d[None, :]
        pages_ptr = tl.where(is_v, values_ptr, keys_ptr)
        if pages_ptr.dtype.element_ty == tl.uint8:
            bits = encode_e4m3_tl(x * tl.where(is_v, v_inverse, k_inverse))
            tl.store(pages_ptr + at, bits, mask=live)
        else:
            tl.store(pages_ptr + at, x.to(pages_ptr.dtype.element_ty), mask=live)


@triton.jit
def cos_sin(angle, FUSED: tl.constexpr):
    """Within 1e-7, for angles up to 2^18. The compiler's own take local memory for a case that is not reached here."""
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    if FUSED:
        # pi / 2 in three parts of 24 bits: the first difference is exact, the others are small.
        r = tl.fma(quarters, -1.5707963705062866, angle)
        r = tl.fma(quarters, 4.371138828673793e-08, r)
        r = tl.fma(quarters, 1.7151245100058819e-15, r)
    else:  # the interpreter rounds between product and sum
        r = (angle.to(tl.float64) - quarters.to(tl.float64) * 1.5707963267948966).to(tl.float32)
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = quarters.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    turned_cos, turned_sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return (
        tl.where((quadrant == 1) | (quadrant == 2), -turned_cos, turned_cos),
        tl.where(quadrant >= 2, -turned_sin, turned_sin),
    )


@triton.jit
def encode_e4m3_tl(x):
    """nvfp4.encode_e4m3: nearest, ties to even, saturating at 448; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    kept = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 a sum with 2^14, whose last bit is 2^-9, rounds as wanted.
    small = (kept.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(kept < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


def compile_cases() -> list[CompileCase]:
    plain = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "keys_ptr", "values_ptr", "q_norm_ptr", "k_norm_ptr")
    strides = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")
    signature = dict.fromkeys(plain, "*bf16") | dict.fromkeys(("positions_ptr", "slots_ptr", "table_ptr"), "*i32")
    signature |= {"freq_ptr": "*fp32", "k_inverse": "fp32", "v_inverse": "fp32"}
    signature |= dict.fromkeys((*strides, "table_row", "q_blocks", "kv_blocks"), "i32")
    cases = []
    for name, heads, kv_heads, dim, half in (
        ("Qwen3.5", 16, 2, 256, 32), ("Gemma sliding", 16, 8, 256, 128), ("Gemma global", 16, 2, 512, 256),
        ("Qwen3", 32, 4, 128, 64),
    ):  # fmt: skip
        for count, pages in ((1, "*bf16"), (1 << 20, "*u8"), (1 << 20, "*bf16")):
            bh = head_block(count, dim)
            types = signature | {"keys_ptr": pages, "values_ptr": pages}
            cases += [
                replace(case, divisible=strides)
                for case in pdl_cases(
                    f"{name} {pages[1:]} {bh}", norm_rotate_store, types, {"num_warps": 1},
                    N=heads, G=kv_heads, D=dim, HALF=half, PAGE=64, BH=bh, BD=dim, EPS=1e-6,
                    Q_NORM=True, K_NORM=True, V_NORM="Gemma" in name, OFFSET=0.0, FUSED=True,
                )
            ]  # fmt: skip
    return cases
