"""Dense linears of 17 to 256 rows on sm_90, y[m, n] = sum_k x[m, k] w[n, k]: wgmma with weights as first operand.

A program multiplies 16 W R rows of the weight with T rows of x. Both arrive by cp.async, some stages of one or two
tiles of 64 columns ahead. A lane decodes its part of the weight to registers and multiplies it from there. Rows of x
are copied once more within shared memory, to the order in which a lane's adjacent bytes become operands: that of
`fragments.py`, which suits FP8 as well (16 adjacent bytes of rows r and r + 8). Where the weight has few rows its
columns are shared between programs, and a second launch adds their sums, float32, in a fixed order.

What is left to gain, one H200, fp8 12288 x 2048, 64 rows, 16.0 us where the bytes need 7.7: copies, decoding and
products overlap badly. A variant that took 17.3 took 10.9 without decoding and products, and 12.3 without copies.
Tried, and not faster: one product always in flight, 17.4; products of 16 columns between the decoding of the next,
18.6; x in operand order from a launch before, 17.4; weights and x loaded ahead to registers, 16.9.

Letters: M rows of x; N rows and K columns of the weight; W warps, each with R strips of 16 rows, S = W R; SUB tiles a
stage.
"""

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import SHARED_LIMIT, CompileCase
from moe_nvfp4.kernels.fragment_mma import arranged, only_dim, operand, pairs_of, word_layout
from moe_nvfp4.kernels.fragments import FragmentTensor
from moe_nvfp4.kernels.nvfp4 import FP8Tensor

MAX_ROWS: Final = 256
_SUM_BLOCK: Final = 1024
_PROGRAMS: Final = 132  # multiprocessors of an H100 or H200


class Tiling(NamedTuple):
    """How a program works: `repeats` strips a warp, `columns` rows of x, stages of `tiles` tiles, `depth` of them in
    shared memory; `split` programs share the columns of the weight."""

    warps: int
    repeats: int
    columns: int
    tiles: int
    depth: int
    split: int


@gluon.jit
def decode_fp8(low, high):
    """Four E4M3 bytes of rows r and r + 8 as bf16: e[4 i2 + 2 i1 + i0]."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t, u, z, a, b, c, d;
        mov.b32 u, 0x7B807B80; mov.b32 z, 0x80008000;
        prmt.b32 a, $8, 0, 0x1404; shr.u32 t, a, 4; and.b32 t, t, 0x07F007F0; lop3.b32 a, a, z, t, 0xEA;
        prmt.b32 b, $9, 0, 0x1404; shr.u32 t, b, 4; and.b32 t, t, 0x07F007F0; lop3.b32 b, b, z, t, 0xEA;
        prmt.b32 c, $8, 0, 0x3424; shr.u32 t, c, 4; and.b32 t, t, 0x07F007F0; lop3.b32 c, c, z, t, 0xEA;
        prmt.b32 d, $9, 0, 0x3424; shr.u32 t, d, 4; and.b32 t, t, 0x07F007F0; lop3.b32 d, d, z, t, 0xEA;
        fma.rn.bf16x2 a, a, u, z; fma.rn.bf16x2 b, b, u, z; fma.rn.bf16x2 c, c, u, z; fma.rn.bf16x2 d, d, u, z;
        mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
        }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [low, high],
        dtype=(gl.bfloat16,) * 8,
        is_pure=True,
        pack=1,
    )


@constexpr_function
def pair_layout(W):
    """Of scales [S, 1, 8, 4]: two adjacent pairs a lane, the least that can be copied."""
    return gl.BlockedLayout([1, 1, 1, 2], [2, 1, 8, 2], [W, 1, 1, 1], [3, 2, 1, 0])


@constexpr_function
def copy_layout(W):
    """Of rows of x [T, 64]: sixteen bytes a lane."""
    return gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])


@constexpr_function
def x_layout(W):
    """Of rows of x [T, 64]: what a lane of the operand needs, so that they can be stored as matrices of 8 x 8."""
    return gl.BlockedLayout([1, 16], [8, 4], [W, 1], [1, 0])


@constexpr_function
def flat(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank - 1, -1, -1)))


@gluon.jit
def tile_of(stage, k, TILES: gl.constexpr, SUB: gl.constexpr):
    """The k-th tile of a stage; the last one again past it."""
    if TILES % SUB == 0:
        return stage * SUB + k
    else:
        return gl.minimum(stage * SUB + k, TILES - 1)


@gluon.jit
def word_offsets(N, first, KIND: gl.constexpr, TILES: gl.constexpr, W: gl.constexpr, S: gl.constexpr, C: gl.constexpr):
    """Which tile of a stage, and where a lane's words [C S, 1, 8, 4, 4] of the first lie; rows stop at the last."""
    L: gl.constexpr = word_layout(W, 1)
    s = gl.arange(0, C * S, only_dim(L, 5, 0))[:, None, None, None, None]
    r = gl.arange(0, 8, only_dim(L, 5, 2))[None, None, :, None, None]
    c = gl.arange(0, 4, only_dim(L, 5, 3))[None, None, None, :, None]
    j = gl.arange(0, 4, only_dim(L, 5, 4))[None, None, None, None, :]
    if KIND == "nvfp4":
        return s // S, gl.minimum(s % S, (N - 1 - first) // 16) * (TILES * 128) + r * 16 + (c * 4 + j)
    else:
        row = s % S * 16 + s // S % 2 * 8 + r
        return s // (2 * S), gl.minimum(row, N - 1 - first) * (TILES * 16) + (c * 4 + j)


@gluon.jit
def pair_offsets(N, first, TILES: gl.constexpr, W: gl.constexpr, S: gl.constexpr, SUB: gl.constexpr):
    """Likewise of scales [SUB S, 1, 8, 4]."""
    P: gl.constexpr = pair_layout(W)
    s = gl.arange(0, SUB * S, only_dim(P, 4, 0))[:, None, None, None]
    r = gl.arange(0, 8, only_dim(P, 4, 2))[None, None, :, None]
    c = gl.arange(0, 4, only_dim(P, 4, 3))[None, None, None, :]
    return s // S, gl.minimum(s % S, (N - 1 - first) // 16) * (TILES * 32) + (r * 4 + c)


@gluon.jit
def copy_words(
    words, pairs, slot, w_ptr, s_ptr, word_at, pair_at, stage, end,
    KIND: gl.constexpr, TILES: gl.constexpr, SUB: gl.constexpr,
):  # fmt: skip
    """Start the copies of a stage of the weight, if it is before `end`."""
    live = stage < end
    STEP: gl.constexpr = 128 if KIND == "nvfp4" else 16
    at = word_at[1] + tile_of(stage, word_at[0], TILES, SUB) * STEP
    async_copy.async_copy_global_to_shared(words.index(slot), w_ptr + at, mask=live)
    if KIND == "nvfp4":
        at = pair_at[1] + tile_of(stage, pair_at[0], TILES, SUB) * 32
        async_copy.async_copy_global_to_shared(pairs.index(slot), s_ptr + at, mask=live)


@gluon.jit
def copy_x(raw, slot, x_ptr, x_at, stage, end, TILES: gl.constexpr, SUB: gl.constexpr):
    at = x_at[1] + tile_of(stage, x_at[0], TILES, SUB) * 64
    async_copy.async_copy_global_to_shared(raw.index(slot), x_ptr + at, mask=stage < end)


@gluon.jit
def read_words(words, pairs, slot, KIND: gl.constexpr, W: gl.constexpr, S: gl.constexpr, SUB: gl.constexpr):
    L: gl.constexpr = word_layout(W, 1)
    words = words.index(slot)
    out = ()
    for i in gl.static_range(SUB):
        if KIND == "nvfp4":
            pair = pairs.index(slot).slice(i * S, S).load(gl.SliceLayout(4, L))
            out = out + ((words.slice(i * S, S).load(L), pair),)  # noqa: RUF005
        else:
            low, high = words.slice(2 * i * S, S).load(L), words.slice((2 * i + 1) * S, S).load(L)
            out = out + ((low, high),)  # noqa: RUF005
    return out


@gluon.jit
def decode_words(words, KIND: gl.constexpr, S: gl.constexpr, A: gl.constexpr):
    if KIND == "nvfp4":
        return operand(words[0], words[1], S, 1, A)
    else:
        return arranged(decode_fp8(words[0], words[1]), S, 1, A)


@gluon.jit
def arrange_x(to, raw, stage, T: gl.constexpr, TILES: gl.constexpr, W: gl.constexpr, SUB: gl.constexpr):
    """Rows of x in the order of the operand's k; zero past the last tile."""
    x = raw.load(x_layout(W))
    if TILES % SUB != 0:
        k = gl.arange(0, SUB * T, gl.SliceLayout(1, x_layout(W))) // T
        x = gl.where((stage * SUB + k < TILES)[:, None], x, 0.0)
    x = gl.permute(gl.reshape(x, (SUB * T, 4, 4, 2, 2)), (0, 2, 3, 1, 4))  # t, j, i2, c, i0
    to.store(gl.reshape(x, (SUB * T, 64)))


@constexpr_function
def store_layout(W, S):
    """Of [16 S, T]: eight adjacent rows a lane."""
    along = min(32, 2 * S)
    return gl.BlockedLayout([8, 1], [along, 32 // along], [1, W], [0, 1])


@gluon.jit(do_not_specialize=["M"])
def dense_tiles_kernel(
    x_ptr, w_ptr, s_ptr, g_ptr, y_ptr, M, N, scale_step,
    K: gl.constexpr, KIND: gl.constexpr, W: gl.constexpr, R: gl.constexpr, T: gl.constexpr, SUB: gl.constexpr,
    DEPTH: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = W * R
    TILES: gl.constexpr = K // 64
    STAGES: gl.constexpr = (TILES + SUB - 1) // SUB
    SHARE: gl.constexpr = (STAGES + SPLIT - 1) // SPLIT
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, T, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    COPIES: gl.constexpr = SUB if KIND == "nvfp4" else 2 * SUB
    first_m = gl.program_id(0) * T
    first_n = gl.program_id(1) * (16 * S)
    first = gl.program_id(2) * SHARE
    end = gl.minimum(first + SHARE, STAGES)
    words = gl.allocate_shared_memory(gl.int32, [DEPTH, COPIES * S, 1, 8, 4, 4], flat(5))
    w_ptr += first_n.to(gl.int64) * (TILES * (8 if KIND == "nvfp4" else 16))
    word_at = word_offsets(N, first_n, KIND, TILES, W, S, COPIES)
    if KIND == "nvfp4":
        pairs = gl.allocate_shared_memory(gl.int16, [DEPTH, SUB * S, 1, 8, 4], flat(4))
        s_ptr += first_n.to(gl.int64) * (TILES * 2)
        pair_at = pair_offsets(N, first_n, TILES, W, S, SUB)
    else:
        pairs, pair_at = words, word_at
    for i in gl.static_range(DEPTH - 1):
        copy_words(words, pairs, i, w_ptr, s_ptr, word_at, pair_at, first + i, end, KIND, TILES, SUB)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    raw = gl.allocate_shared_memory(gl.bfloat16, [DEPTH, SUB * T, 64], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    xs = gl.allocate_shared_memory(gl.bfloat16, [2, SUB * T, 64], gl.NVMMASharedLayout(128, 16, 2))
    X: gl.constexpr = copy_layout(W)
    t = gl.arange(0, SUB * T, gl.SliceLayout(1, X))[:, None]
    x_ptr += first_m.to(gl.int64) * K
    x_at = (t // T, gl.minimum(t % T, M - 1 - first_m) * K + gl.arange(0, 64, gl.SliceLayout(0, X))[None, :])
    for i in gl.static_range(DEPTH - 1):
        copy_x(raw, i, x_ptr, x_at, first + i, end, TILES, SUB)
        async_copy.commit_group()
    async_copy.wait_group(DEPTH - 2)
    current = read_words(words, pairs, 0, KIND, W, S, SUB)
    arrange_x(xs.index(0), raw.index(0), first, T, TILES, W, SUB)
    a = decode_words(current[0], KIND, S, A)
    acc = warpgroup_mma_init(gl.zeros((16 * S, T), gl.float32, MMA))
    for stage in range(first, end):
        turn = stage - first
        fence_async_shared()
        # Copies before products: the barrier that they need also makes the arranged x visible.
        into = (turn + DEPTH - 1) % DEPTH
        copy_words(words, pairs, into, w_ptr, s_ptr, word_at, pair_at, stage + DEPTH - 1, end, KIND, TILES, SUB)
        copy_x(raw, into, x_ptr, x_at, stage + DEPTH - 1, end, TILES, SUB)
        async_copy.commit_group()
        for k in gl.static_range(SUB):
            acc = warpgroup_mma(a, xs.index(turn % 2).slice(k * T, T).permute((1, 0)), acc, is_async=True)
            if k < SUB - 1:
                a_next = decode_words(current[k + 1], KIND, S, A)
            else:
                async_copy.wait_group(DEPTH - 2)
                slot = (turn + 1) % DEPTH
                current = read_words(words, pairs, slot, KIND, W, S, SUB)
                arrange_x(xs.index((turn + 1) % 2), raw.index(slot), stage + 1, T, TILES, W, SUB)
                a_next = decode_words(current[0], KIND, S, A)
            acc, a, a_next = warpgroup_mma_wait(0, deps=(acc, a, a_next))
            acc = warpgroup_mma_init(acc)
            a = a_next
    async_copy.wait_group(0)
    y = warpgroup_mma_wait(0, deps=(acc,))
    own = first_n + gl.arange(0, 16 * S, gl.SliceLayout(1, MMA))
    if KIND == "nvfp4":
        scale = 256.0 * gl.load(g_ptr + own // 16 * scale_step, mask=own < N, other=0.0)  # operands are 2^-8 them
    else:
        scale = gl.load(g_ptr + own * scale_step, mask=own < N, other=0.0)
    L: gl.constexpr = store_layout(W, S)
    y = gl.convert_layout((y * scale[:, None]).to(y_ptr.dtype.element_ty), L)
    m = first_m + gl.arange(0, T, gl.SliceLayout(0, L))[None, :]
    n = first_n + gl.arange(0, 16 * S, gl.SliceLayout(1, L))[:, None]
    y_ptr += gl.program_id(2).to(gl.int64) * M * N
    gl.store(y_ptr + m.to(gl.int64) * N + n, y, mask=(m < M) & (n < N))


@triton.jit
def add_shares_kernel(shares_ptr, y_ptr, total, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        y += tl.load(shares_ptr + s * tl.cast(total, tl.int64) + at, mask=at < total, other=0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < total)


def dense_tiles(
    x_MK: Tensor,
    weight: FP8Tensor | FragmentTensor,
    *,
    dependent: bool = False,
    tiling: Tiling | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The launcher; its twin is `dense_linear_torch` in dense.py. K is a multiple of 64."""
    (rows, columns), num_out = x_MK.shape, weight.shape[0]
    fragments = isinstance(weight, FragmentTensor)
    tiling = tiling or tiling_for(fragments, num_out, columns, rows)
    y_MN = torch.empty(rows, num_out, dtype=out_dtype, device=x_MK.device)
    shares = y_MN if tiling.split == 1 else y_MN.new_empty(tiling.split, rows, num_out, dtype=torch.float32)
    parts: tuple[Tensor, Tensor, Tensor]
    if isinstance(weight, FragmentTensor):
        parts = weight.words, pairs_of(weight), weight.global_scale
    else:
        parts = weight.values.view(torch.int32), weight.values, weight.scale
    grid = (-(-rows // tiling.columns), -(-num_out // (16 * tiling.warps * tiling.repeats)), tiling.split)
    dense_tiles_kernel[grid](
        x_MK, *parts, shares, rows, num_out, min(parts[2].ndim, 1),
        **_constexprs(tiling, columns, fragments), PDL=dependent, num_warps=tiling.warps, launch_pdl=dependent,
    )  # fmt: skip
    if tiling.split > 1:
        add_shares_kernel[(triton.cdiv(y_MN.numel(), _SUM_BLOCK),)](
            shares, y_MN, y_MN.numel(), SPLIT=tiling.split, BLOCK=_SUM_BLOCK, PDL=dependent, launch_pdl=dependent
        )
    return y_MN


def _constexprs(tiling: Tiling, columns: int, fragments: bool) -> dict[str, Any]:
    return {
        "K": columns, "KIND": "nvfp4" if fragments else "fp8", "W": tiling.warps, "R": tiling.repeats,
        "T": tiling.columns, "SUB": tiling.tiles, "DEPTH": tiling.depth, "SPLIT": tiling.split,
    }  # fmt: skip


def tiling_for(fragments: bool, num_out: int, columns: int, rows: int) -> Tiling:
    """Best of about ten on one H200, with dependent launch; numbers are us.

    Programs of 128 rows of the weight fill the GPU where it has about 100 times as many; else columns are shared.
    """
    wide, narrow = -(-num_out // 128), -(-num_out // 64)  # programs, with two warpgroups or one
    huge = wide > 8 * _PROGRAMS  # nvfp4 248320 x 2048 at 32, 64, 128, 256 rows: 112, 148, 265, 508
    if rows <= 32:  # fp8 2048 x 4096: 7.1, 12288 x 2048: 12.5; nvfp4 8192 x 2816: 10.1, of 64 rows 15.5
        first = Tiling(8, 1, 32, 2, 3, 1) if fragments else Tiling(4, 1, 32, 2, 4, 1)
        return _shared(first, wide if fragments else narrow, columns)
    if rows <= 64:
        if huge:  # Tiling(8, 1, 64, 2, 3, 1): 174
            return Tiling(4, 2, 64, 1, 4, 1)
        if fragments or wide > _PROGRAMS // 2:  # fp8 12288 x 2048: 16.0; nvfp4 8192 x 2816: 13.6
            return _shared(Tiling(8, 1, 64, 2, 3, 1), wide, columns)
        return _shared(Tiling(4, 1, 64, 1, 4, 1), narrow, columns)  # fp8 2048 x 4096: 9.2, of 128 rows 10.0
    if rows <= 128:
        if huge:  # Tiling(8, 1, 128, 2, 3, 1): 312
            return Tiling(8, 1, 128, 1, 3, 1)
        if wide >= _PROGRAMS // 3:  # fp8 12288 x 2048: 24.4; nvfp4 8192 x 2816: 22.5
            return _shared(Tiling(8, 1, 128, 2, 3, 1), wide, columns)
        if fragments:  # nvfp4 2816 x 2112: 10.3, of 128 columns 13.6
            return _shared(Tiling(8, 1, 64, 2, 3, 1), 2 * wide, columns)
        return _shared(Tiling(4, 1, 64, 1, 4, 1), 2 * narrow, columns)  # fp8 2048 x 4096: 13.8, of 128 columns 15.2
    if huge:  # Tiling(8, 1, 256, 1, 3, 1): 529
        return Tiling(8, 2, 128, 1, 4, 1)
    if fragments:  # nvfp4 8192 x 2816: 27.8, of 256 columns 38.6
        return Tiling(8, 1, 128, 2, 3, 1)
    return Tiling(8, 1, 256, 1, 3, 1)  # fp8 12288 x 2048: 38.6, of 128 columns 39.6


def _shared(tiling: Tiling, programs: int, columns: int) -> Tiling:
    """Columns shared between as many programs as fill the GPU once, with about three stages each or more."""
    stages = -(-columns // (64 * tiling.tiles))
    split = max(1, min(_PROGRAMS // programs, -(-stages // 3)))
    return tiling._replace(split=-(-stages // -(-stages // split)))


def shared_bytes(tiling: Tiling, fragments: bool) -> int:
    x = 128 * tiling.columns
    weight = 16 * tiling.warps * tiling.repeats * (36 if fragments else 64)
    return tiling.tiles * (tiling.depth * (weight + x) + 2 * x)


def spreads(tiling: Tiling, fragments: bool, num_out: int, rows: int) -> bool:
    """Whether no multiprocessor idles while another has two programs, as may happen to dependent launches.

    nvfp4 at 64 rows with Tiling(8, 1, 64, 2, 3, .), us: 2816 x 2112 8.3 with 132 programs and 13.3 with 110;
    5120 x 2048 13.8 with 120.
    """
    programs = -(-rows // tiling.columns) * -(-num_out // (16 * tiling.warps * tiling.repeats)) * tiling.split
    return programs >= 0.95 * _PROGRAMS or 2 * shared_bytes(tiling, fragments) > SHARED_LIMIT[90]


def compile_cases() -> list[CompileCase]:
    common = {"x_ptr": "*bf16", "w_ptr": "*i32", "g_ptr": "*fp32", "M": "i32", "N": "i32", "scale_step": "i32"}
    cases = []
    for fragments, num_out, columns, many in (
        (False, 12288, 2048, (32, 64, 128, 256)), (False, 2048, 4096, (64,)),
        (True, 248320, 2048, (32, 64, 128, 256)), (True, 2816, 2112, (32, 128)), (True, 8192, 2816, (64, 128)),
    ):  # fmt: skip
        for rows in many:
            tiling = tiling_for(fragments, num_out, columns, rows)
            cases.append(
                CompileCase(
                    name=f"dense_tiles {'nvfp4' if fragments else 'fp8'} {num_out} x {columns}, {rows} rows",
                    function=dense_tiles_kernel,
                    signature=common | {"s_ptr": "*i16" if fragments else "*u8"}
                    | {"y_ptr": "*bf16" if tiling.split == 1 else "*fp32"},
                    constexprs=_constexprs(tiling, columns, fragments) | {"PDL": True},
                    options={"num_warps": tiling.warps, "launch_pdl": True},
                    architectures=(90,),
                )
            )  # fmt: skip
    signature = {"shares_ptr": "*fp32", "y_ptr": "*bf16", "total": "i32"}
    constexprs = {"SPLIT": 4, "BLOCK": _SUM_BLOCK, "PDL": True}
    added = CompileCase(
        name="add_shares", function=add_shares_kernel, signature=signature, constexprs=constexprs,
        options={"launch_pdl": True}, architectures=(90,),
    )  # fmt: skip
    return [*cases, added]
