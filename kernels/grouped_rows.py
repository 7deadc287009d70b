"""Routed experts for up to some hundred rows: an expert's weights are read once for eight of its rows.

A warp has a strip of sixteen weight rows and walks along K; the eight columns of its products are rows of activations,
which the program shares. The next tiles are on their way to registers while these are decoded: no shared memory and no
barrier stands between the weights and the tensor cores.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.activation import activate_gl
from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.fragment_mma import column_layout, only_dim, operand, pairs_of, word_layout
from moe_nvfp4.kernels.fragments import COLUMNS, ROWS, FragmentTensor
from moe_nvfp4.kernels.sort_pairs import SortedPairs


def routed_experts_grouped(
    x_TH: torch.Tensor,
    gate: FragmentTensor | None,
    up: FragmentTensor,
    down: FragmentTensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    pairs: SortedPairs,
    activation: str = "silu",
) -> torch.Tensor:
    """y[t] = sum_k weights[t, k] down_e(act(gate_e x[t], up_e x[t])) in bfloat16; ids of -1 are left out.

    `pairs` are the sorted ids. Shares of a row are kept apart in float32 and summed in the order of k. A
    row's result does not depend on the other rows. The twin is `routed_experts`.
    """
    (rows, hidden), top, inner = x_TH.shape, weights_TK.shape[1], up.shape[-2]
    h = x_TH.new_empty(rows * top, inner)
    shares = torch.empty(rows * top, hidden, dtype=torch.float32, device=x_TH.device)
    y = torch.empty_like(x_TH)
    dependent = torch.cuda.get_device_capability(x_TH.device) >= (9, 0)
    first, experts = gate or up, pairs.active.numel()
    listed = pairs.active, pairs.order, pairs.offsets
    warps, tiles = _warps(inner // ROWS), _tiles_of_a_step(hidden)
    gate_up_grouped[(inner // ROWS // warps, experts)](
        x_TH, first.words, pairs_of(first), first.global_scale, up.words, pairs_of(up), up.global_scale, *listed, h,
        TOP=top, TILES=hidden // COLUMNS, STRIPS=inner // ROWS, W=warps, KT=tiles, GATED=gate is not None,
        KIND=activation, PDL=dependent, num_warps=warps, launch_pdl=dependent,
    )  # fmt: skip
    warps, tiles = _warps(hidden // ROWS), _tiles_of_a_step(inner)
    span = _span(hidden // ROWS // warps)
    down_grouped[(hidden // ROWS // warps // span, experts)](
        h, down.words, pairs_of(down), down.global_scale, *listed, weights_TK, shares,
        TILES=inner // COLUMNS, STRIPS=hidden // ROWS, SPAN=span, W=warps, KT=tiles, PDL=dependent,
        num_warps=warps, launch_pdl=dependent,
    )  # fmt: skip
    combine[(triton.cdiv(hidden, COMBINE_BLOCK), rows)](
        shares, expert_ids_TK, y, hidden, TOP=top, BLOCK=COMBINE_BLOCK, PDL=dependent, launch_pdl=dependent
    )
    return y


COMBINE_BLOCK = 512


def _warps(strips: int) -> int:
    """Four were best or near it for all shapes on an H200, and divide every real one."""
    return next(warps for warps in (4, 2, 1) if strips % warps == 0)


def _tiles_of_a_step(columns: int) -> int:
    """Four tiles of gate and of up are 64 registers of words in flight; with an odd remainder one tile wastes none."""
    return 4 if columns // COLUMNS % 4 == 0 else 1


def _span(blocks: int) -> int:
    """Blocks of down that one program walks through: the activations are fetched once for them."""
    return next(span for span in (4, 2, 1) if blocks % span == 0)


barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in triton 3.7


@gluon.jit
def load_tiles(words, pairs, k0, TILES: gl.constexpr, W: gl.constexpr, KT: gl.constexpr):
    """Words and scale pairs of tiles k0 to k0 + KT of W strips; zero beyond the last tile."""
    L: gl.constexpr = word_layout(W, KT)
    S: gl.constexpr = gl.SliceLayout(4, L)
    w = gl.arange(0, W, only_dim(S, 4, 0))[:, None, None, None]
    kt = gl.arange(0, KT, only_dim(S, 4, 1))[None, :, None, None]
    r = gl.arange(0, 8, only_dim(S, 4, 2))[None, None, :, None]
    c = gl.arange(0, 4, only_dim(S, 4, 3))[None, None, None, :]
    j = gl.arange(0, 4, only_dim(L, 5, 4))[None, None, None, None, :]
    lane = w * (TILES * 32) + kt * 32 + r * 4 + c
    if TILES % KT == 0:
        return gl.load(words + k0 * 128 + gl.expand_dims(lane, 4) * 4 + j), gl.load(pairs + k0 * 32 + lane)
    else:
        live = (k0 + kt < TILES) & (lane >= 0)
        at = gl.expand_dims(lane, 4) * 4 + j
        some = gl.load(words + k0 * 128 + at, mask=gl.expand_dims(live, 4) & (at >= 0), other=0)
        return some, gl.load(pairs + k0 * 32 + lane, mask=live, other=0)


@gluon.jit
def copy_columns(smem, ptr, rows, k0, TILES: gl.constexpr, W: gl.constexpr, KT: gl.constexpr):
    """Columns of eight rows of activations; `rows` is in `columns(W, KT)`, below zero for an empty column."""
    L: gl.constexpr = column_layout(W, KT)
    kt = gl.arange(0, KT, only_dim(L, 4, 1))[None, :, None, None]
    c = gl.arange(0, 4, only_dim(L, 4, 2))[None, None, :, None]
    e = gl.arange(0, 16, only_dim(L, 4, 3))[None, None, None, :]
    rows = rows[:, None, None, None]
    at = gl.maximum(rows, 0).to(gl.int64) * (TILES * 64) + (k0 + kt) * 64 + c * 16 + e
    async_copy.async_copy_global_to_shared(smem, ptr + at, mask=(rows >= 0) & (k0 + kt < TILES) & (at >= 0))


@gluon.jit
def read_columns(smem, KT: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr):
    x = gl.reshape(smem.load(column_layout(W, KT)), (8, KT, 4, 4, 2, 2))
    x = gl.reshape(gl.permute(x, (1, 3, 4, 2, 5, 0)), (64 * KT, 8))  # kt, j, i2, c, i0, n
    return gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def gate_up_grouped(
    x_ptr, gate_w, gate_s, gate_g, up_w, up_s, up_g, active_ptr, order_ptr, offsets_ptr, h_ptr,
    TOP: gl.constexpr, TILES: gl.constexpr, STRIPS: gl.constexpr, W: gl.constexpr, KT: gl.constexpr,
    GATED: gl.constexpr, KIND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """h[pair, 16 W block ..] of the rows of one expert, eight at a time: a warp has a strip, a column is a row."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    CHUNKS: gl.constexpr = (TILES + KT - 1) // KT
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = gl.load(active_ptr + gl.program_id(1))
    if expert >= 0:
        begin, end = gl.load(offsets_ptr + expert), gl.load(offsets_ptr + expert + 1)
        strip = gl.program_id(0) * W
        first = (expert.to(gl.int64) * STRIPS + strip) * TILES
        columns = gl.allocate_shared_memory(
            gl.bfloat16, [CHUNKS, 8, KT, 4, 16], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
        )
        for start in range(begin, end, 8):
            n = start + gl.arange(0, 8, only_dim(column_layout(W, KT), 4, 0))
            rows = gl.load(order_ptr + n, mask=n < end, other=-TOP) // TOP
            for chunk in range(CHUNKS):
                copy_columns(columns.index(chunk), x_ptr, rows, chunk * KT, TILES, W, KT)
            up_words, up_pairs = load_tiles(up_w + first * 128, up_s + first * 32, 0, TILES, W, KT)
            gate_words, gate_pairs = up_words, up_pairs
            if GATED:
                gate_words, gate_pairs = load_tiles(gate_w + first * 128, gate_s + first * 32, 0, TILES, W, KT)
            async_copy.commit_group()
            async_copy.wait_group(0)
            barrier()
            up = gl.zeros((16 * W, 8), gl.float32, MMA)
            gate = gl.zeros((16 * W, 8), gl.float32, MMA)
            for chunk in range(CHUNKS):
                k1 = gl.minimum(chunk + 1, CHUNKS - 1) * KT
                up_words1, up_pairs1 = load_tiles(up_w + first * 128, up_s + first * 32, k1, TILES, W, KT)
                gate_words1, gate_pairs1 = up_words1, up_pairs1
                if GATED:
                    gate_words1, gate_pairs1 = load_tiles(gate_w + first * 128, gate_s + first * 32, k1, TILES, W, KT)
                x = read_columns(columns.index(chunk), KT, W, MMA)
                up = mma_v2(operand(up_words, up_pairs, W, KT, A), x, up)
                if GATED:
                    gate = mma_v2(operand(gate_words, gate_pairs, W, KT, A), x, gate)
                up_words, up_pairs, gate_words, gate_pairs = up_words1, up_pairs1, gate_words1, gate_pairs1
            up = up * (256.0 * gl.load(up_g + expert))
            if GATED:
                gate = gate * (256.0 * gl.load(gate_g + expert))
            h = activate_gl(gate, up, KIND)
            n = start + gl.arange(0, 8, gl.SliceLayout(0, MMA))
            pair = gl.load(order_ptr + n, mask=n < end, other=0)
            row = strip * 16 + gl.arange(0, 16 * W, gl.SliceLayout(1, MMA))
            at = pair[None, :].to(gl.int64) * (STRIPS * 16) + row[:, None]
            gl.store(h_ptr + at, h.to(gl.bfloat16), mask=(n < end)[None, :] & (row >= 0)[:, None])
            barrier()


@gluon.jit
def down_grouped(
    h_ptr, down_w, down_s, down_g, active_ptr, order_ptr, offsets_ptr, weights_ptr, out_ptr,
    TILES: gl.constexpr, STRIPS: gl.constexpr, SPAN: gl.constexpr, W: gl.constexpr, KT: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """out[pair, 16 W SPAN block ..], the weighted share of each pair."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    CHUNKS: gl.constexpr = (TILES + KT - 1) // KT
    expert = gl.load(active_ptr + gl.program_id(1))
    if expert >= 0:
        begin, end = gl.load(offsets_ptr + expert), gl.load(offsets_ptr + expert + 1)
        strip = gl.program_id(0) * (W * SPAN)
        first = (expert.to(gl.int64) * STRIPS + strip) * TILES
        columns = gl.allocate_shared_memory(
            gl.bfloat16, [CHUNKS, 8, KT, 4, 16], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
        )
        scale = 256.0 * gl.load(down_g + expert)
        for start in range(begin, end, 8):
            n = start + gl.arange(0, 8, only_dim(column_layout(W, KT), 4, 0))
            rows = gl.load(order_ptr + n, mask=n < end, other=-1)
            words, pairs = load_tiles(down_w + first * 128, down_s + first * 32, 0, TILES, W, KT)
            if PDL:
                gdc_wait()
                gdc_launch_dependents()
            for chunk in range(CHUNKS):
                copy_columns(columns.index(chunk), h_ptr, rows, chunk * KT, TILES, W, KT)
            n = start + gl.arange(0, 8, gl.SliceLayout(0, MMA))
            pair = gl.load(order_ptr + n, mask=n < end, other=0)
            share = gl.load(weights_ptr + pair, mask=n < end, other=0.0) * scale
            async_copy.commit_group()
            async_copy.wait_group(0)
            barrier()
            for block in range(SPAN):
                acc = gl.zeros((16 * W, 8), gl.float32, MMA)
                for k in gl.static_range(CHUNKS):
                    block1 = gl.minimum(block + (k + 1) // CHUNKS, SPAN - 1)
                    tile = first + block1 * (W * TILES)
                    words1, pairs1 = load_tiles(
                        down_w + tile * 128, down_s + tile * 32, (k + 1) % CHUNKS * KT, TILES, W, KT
                    )
                    x = read_columns(columns.index(k), KT, W, MMA)
                    acc = mma_v2(operand(words, pairs, W, KT, A), x, acc)
                    words, pairs = words1, pairs1
                row = (strip + block * W) * 16 + gl.arange(0, 16 * W, gl.SliceLayout(1, MMA))
                at = pair[None, :].to(gl.int64) * (STRIPS * 16) + row[:, None]
                value = (acc * share[None, :]).to(out_ptr.dtype.element_ty)
                gl.store(out_ptr + at, value, mask=(n < end)[None, :] & (row >= 0)[:, None])
            barrier()


@triton.jit
def combine(shares, ids, y, hidden, TOP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y[t] = the sum of its shares, in order; the shares of an id of -1 were not written."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP):
        mine = (column < hidden) & (tl.load(ids + row * TOP + k) >= 0)
        total += tl.load(shares + (row * TOP + k) * hidden + column, mask=mine, other=0.0)
    tl.store(y + row * hidden + column, total.to(tl.bfloat16), mask=column < hidden)


def compile_cases() -> list[CompileCase]:
    grouped = {"active_ptr": "*i32", "order_ptr": "*i32", "offsets_ptr": "*i32"}
    gate_up = {"x_ptr": "*bf16"}
    for name in ("gate", "up"):
        gate_up |= {f"{name}_w": "*i32", f"{name}_s": "*i16", f"{name}_g": "*fp32"}
    gate_up |= grouped | {"h_ptr": "*bf16"}
    down = {"h_ptr": "*bf16", "down_w": "*i32", "down_s": "*i16", "down_g": "*fp32", **grouped}
    down |= {"weights_ptr": "*fp32", "out_ptr": "*fp32"}
    cases = []
    for pdl in (False, True):
        architectures = (90, 100, 120) if pdl else (80, 86, 89, 90, 100, 120)
        dependent = {"launch_pdl": True} if pdl else {}
        for name, hidden, inner, top, kind in (
            ("qwen3.6", 2048, 512, 8, "silu"),
            ("gemma-4", 2816, 704, 8, "gelu_tanh"),
            ("nemotron-3", 2688, 1856, 6, "relu2"),
        ):
            first: dict[str, Any] = {
                "TILES": hidden // 64,
                "STRIPS": inner // 16,
                "W": 4,
                "KT": _tiles_of_a_step(hidden),
                "TOP": top,
            }
            first |= {"GATED": kind != "relu2", "KIND": kind}
            second = {"TILES": inner // 64, "STRIPS": hidden // 16, "W": 4, "KT": _tiles_of_a_step(inner)}
            second |= {"SPAN": _span(hidden // 64)}
            for function, signature, constexprs in ((gate_up_grouped, gate_up, first), (down_grouped, down, second)):
                case = CompileCase(
                    name=f"{function.__name__} {name}{' dependent' if pdl else ''}",
                    function=function,
                    signature=signature,
                    constexprs={"PDL": pdl, **constexprs},
                    options={"num_warps": 4, **dependent},
                    architectures=architectures,
                )
                cases.append(case)
        case = CompileCase(
            name=f"combine{' dependent' if pdl else ''}",
            function=combine,
            signature={"shares": "*fp32", "ids": "*i32", "y": "*bf16", "hidden": "i32"},
            constexprs={"TOP": 8, "BLOCK": COMBINE_BLOCK, "PDL": pdl},
            options=dependent,
            architectures=architectures,
        )
        cases.append(case)
    return cases
