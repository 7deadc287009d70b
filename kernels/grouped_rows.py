"""Routed experts for up to some hundred rows: an expert's weights are read once for eight or sixteen of its rows.

A warp has a strip of sixteen weight rows and walks along K; the columns of its products are rows of activations,
which the program shares in shared memory. The next tiles of weights are on their way to registers while these are
decoded: no barrier stands between the weights and the tensor cores. A program is one run of pairs (`sort_pairs`), so
that an expert with many pairs is as many programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.activation import activate_gl
from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.dense_rows import adjacent, halves, multiply, pair_layout
from moe_nvfp4.kernels.fragment_mma import pairs_of
from moe_nvfp4.kernels.fragments import COLUMNS, ROWS, FragmentTensor
from moe_nvfp4.kernels.sizes import capability, cdiv
from moe_nvfp4.kernels.sort_pairs import SortedPairs

COMBINE_BLOCK = 512
MOST_FOR_EIGHT = 6  # pairs of an expert in the mean


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

    `pairs` are the sorted ids, in runs of 8 or 16. Shares of a row are kept apart in float32 and summed in the
    order of k. A row's result does not depend on the other rows. The twin is `routed_experts`.
    """
    (rows, hidden), top, inner = x_TH.shape, weights_TK.shape[1], up.shape[-2]
    h = x_TH.new_empty(rows * top, inner)
    shares = torch.empty(rows * top, hidden, dtype=torch.float32, device=x_TH.device)
    y = torch.empty_like(x_TH)
    dependent = capability(x_TH.device) >= (9, 0)
    first, groups, runs = gate or up, pairs.run // 8, pairs.runs.shape[1]
    strips, tiles = inner // ROWS, hidden // COLUMNS
    warps, depth = gate_up_shape(tiles, groups)
    gate_up_grouped[(cdiv(strips, warps), runs)](
        x_TH.view(torch.int64), *_parts(first), *_parts(up), pairs.runs, pairs.order, h, runs,
        TOP=top, TILES=tiles, STRIPS=strips, GROUPS=groups, W=warps, UNROLL=unroll(tiles, depth), DEPTH=depth,
        GATED=gate is not None, KIND=activation, PDL=dependent, num_warps=warps, launch_pdl=dependent,
    )  # fmt: skip
    strips, tiles = hidden // ROWS, inner // COLUMNS
    warps, depth, span = down_shape(groups)
    down_grouped[(cdiv(strips, warps * span), runs)](
        h.view(torch.int64), *_parts(down), pairs.runs, pairs.order, weights_TK, shares, runs,
        TILES=tiles, STRIPS=strips, GROUPS=groups, SPAN=span, W=warps, UNROLL=unroll(tiles, depth), DEPTH=depth,
        PDL=dependent, num_warps=warps, launch_pdl=dependent,
    )  # fmt: skip
    combine[(cdiv(hidden, COMBINE_BLOCK), rows)](
        shares, expert_ids_TK, y, hidden, TOP=top, BLOCK=COMBINE_BLOCK, PDL=dependent, launch_pdl=dependent
    )
    return y


def run_for(num_pairs: int, num_experts: int) -> int:
    """Pairs of a run: with more than eight, few experts take two programs that decode the same weights."""
    return 8 if num_pairs <= MOST_FOR_EIGHT * num_experts else 16


def _parts(weight: FragmentTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return weight.words.view(torch.int64), pairs_of(weight), weight.global_scale


def gate_up_shape(tiles: int, groups: int) -> tuple[int, int]:
    """Warps that share the activations, and tiles of gate and of up in flight: what a multiprocessor has room for.

    H200, us of all launches for 16, 32 and 64 rows: Qwen3.6 (32 tiles) 59, 84, 110 with (4, 8) and 61, 88, 110 with
    (8, 4); Gemma-4 (44 tiles) 84, 111, 124 and 84, 108, 118. Sixteen pairs, 256 rows of Qwen3.6: 153 with (8, 2), 157
    with (8, 4), 161 with (4, 4).
    """
    if groups > 1:
        return 8, 2
    return (4, 8) if tiles <= 32 else (8, 4)


def down_shape(groups: int) -> tuple[int, int, int]:
    """Warps, tiles in flight, and blocks of strips that a warp walks through, as the activations are fetched once.

    8, 32 and 64 rows of Qwen3.6 take 35, 84 and 110 us with two blocks, 41, 86 and 110 with four.
    """
    return (8, 2, 2) if groups > 1 else (4, 4, 2)


def unroll(tiles: int, depth: int) -> int:
    """Tiles in the body of the loop: the least divisor that is not smaller than the tiles in flight."""
    return next((n for n in range(max(depth, 4), tiles) if tiles % n == 0), tiles)


barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in triton 3.7


@constexpr_function
def column_layout(groups, warps):
    """Of a tile of activations [8 GROUPS, 16] int64: lane (r, c) holds four adjacent ones of rows r + 8 g."""
    registers = [[0, 1], [0, 2]] + [[8 << bit, 0] for bit in range(groups.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (warps.bit_length() - 1), [], [8 * groups, 16])


@constexpr_function
def copy_layout(warps):
    """Of the same tile: sixteen bytes a lane, eight lanes a row."""
    return gl.BlockedLayout([1, 2], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def copy_rows(smem, ptr, rows, TILES: gl.constexpr, W: gl.constexpr):
    """Whole rows of activations to shared memory, one tile of K after the other; zero where `rows` is below zero."""
    k = gl.arange(0, 16, gl.SliceLayout(0, copy_layout(W)))
    at = ptr + gl.maximum(rows, 0).to(gl.int64)[:, None] * (TILES * 16) + k[None, :]
    live = (rows >= 0)[:, None] & (k >= 0)[None, :]
    for tile in range(TILES):
        async_copy.async_copy_global_to_shared(smem.index(tile), at + tile * 16, mask=live)
    async_copy.commit_group()


@gluon.jit
def read_tile(smem, GROUPS: gl.constexpr, W: gl.constexpr):
    """The second operands of a tile, of each lane: four int64 for each eight rows."""
    LANES: gl.constexpr = gl.SliceLayout(2, pair_layout(W))
    x = gl.reshape(smem.load(column_layout(GROUPS, W)), (GROUPS, 8, 4, 2, 2))
    low, high = gl.split(gl.permute(x, (1, 2, 0, 4, 3)))
    e0, e1 = gl.split(low)
    e2, e3 = gl.split(high)
    out = ()
    for part in gl.static_range(4):
        out = out + split_groups((e0, e1, e2, e3)[part], GROUPS)
    ordered = ()
    for g in gl.static_range(GROUPS):
        for part in gl.static_range(4):
            one = gl.reshape(out[part * GROUPS + g], (1, 32))
            ordered = ordered + (gl.convert_layout(one, LANES, assert_trivial=True),)  # noqa: RUF005
    return ordered


@gluon.jit
def split_groups(x, GROUPS: gl.constexpr):
    """[8, 4, GROUPS] to GROUPS of [8, 4]."""
    if GROUPS == 1:
        return (gl.reshape(x, (8, 4)),)
    else:
        return gl.split(x)


@gluon.jit
def load_tile(w_ptr, s_ptr, at, W: gl.constexpr):
    """A lane's four words and two scales; `at` counts the pairs of scales."""
    low, high = halves(gl.load(adjacent(w_ptr, at * 2, W)), W)
    return low, high, gl.load(s_ptr + at).to(gl.int32)


@gluon.jit
def matrix(acc, GROUPS: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr):
    """Accumulators [W, 32], four for each eight columns, as a matrix [16 W, 8 GROUPS]."""
    if GROUPS == 1:
        x = gl.join(gl.join(acc[0], acc[2]), gl.join(acc[1], acc[3]))  # w, lane, i1, i0
        x = gl.reshape(x, (W, 8, 4, 2, 2, 1))
    else:
        low = gl.join(gl.join(acc[0], acc[2]), gl.join(acc[1], acc[3]))
        high = gl.join(gl.join(acc[4], acc[6]), gl.join(acc[5], acc[7]))
        x = gl.reshape(gl.join(low, high), (W, 8, 4, 2, 2, 2))  # w, r, c, i1, i0, g
    x = gl.reshape(gl.permute(x, (0, 3, 1, 5, 2, 4)), (16 * W, 8 * GROUPS))  # w, i1, r, g, c, i0
    return gl.convert_layout(x, MMA, assert_trivial=True)


@gluon.jit(do_not_specialize=["runs"])
def gate_up_grouped(
    x_ptr, gate_w, gate_s, gate_g, up_w, up_s, up_g, runs_ptr, order_ptr, h_ptr, runs,
    TOP: gl.constexpr, TILES: gl.constexpr, STRIPS: gl.constexpr, GROUPS: gl.constexpr, W: gl.constexpr,
    UNROLL: gl.constexpr, DEPTH: gl.constexpr, GATED: gl.constexpr, KIND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """h[pair, 16 W block ..] of a run of pairs of one expert: a warp has a strip, a column is a row."""
    N: gl.constexpr = 8 * GROUPS
    AHEAD: gl.constexpr = DEPTH if DEPTH < UNROLL else UNROLL
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    LANES: gl.constexpr = gl.SliceLayout(2, pair_layout(W))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    run = gl.program_id(1)
    expert = gl.load(runs_ptr + run)
    if expert >= 0:
        begin, count = gl.load(runs_ptr + runs + run), gl.load(runs_ptr + 2 * runs + run)
        strip = gl.program_id(0) * W
        warp = gl.arange(0, W, gl.SliceLayout(1, LANES))[:, None]
        lane = gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :]
        at = (expert.to(gl.int64) * STRIPS + gl.minimum(strip + warp, STRIPS - 1)) * (TILES * 32) + lane
        ups, gates = (), ()
        for i in gl.static_range(AHEAD):
            ups = ups + (load_tile(up_w, up_s, at + i * 32, W),)  # noqa: RUF005
            if GATED:
                gates = gates + (load_tile(gate_w, gate_s, at + i * 32, W),)  # noqa: RUF005
        n = gl.arange(0, N, gl.SliceLayout(1, copy_layout(W)))
        rows = gl.load(order_ptr + begin + n, mask=n < count, other=-TOP) // TOP
        smem = gl.allocate_shared_memory(gl.int64, [TILES, N, 16], gl.SwizzledSharedLayout(2, 1, 8, [1, 0]))
        copy_rows(smem, x_ptr, rows, TILES, W)
        n = gl.arange(0, N, gl.SliceLayout(0, MMA))
        pair = gl.load(order_ptr + begin + n, mask=n < count, other=0)
        up_scale = 256.0 * gl.load(up_g + expert)
        gate_scale = 256.0 * gl.load(gate_g + expert)
        async_copy.wait_group(0)
        barrier()
        up = (gl.zeros((W, 32), gl.float32, LANES),) * (4 * GROUPS)
        gate = (gl.zeros((W, 32), gl.float32, LANES),) * (4 * GROUPS)
        for chunk in range(0, TILES, UNROLL):
            after = gl.minimum(chunk + UNROLL, TILES - UNROLL) * 32
            all_ups, all_gates = ups, gates
            for i in gl.static_range(UNROLL):
                x = read_tile(smem.index(chunk + i), GROUPS, W)
                up = multiply(all_ups[i], x, up, "nvfp4", GROUPS)
                if GATED:
                    gate = multiply(all_gates[i], x, gate, "nvfp4", GROUPS)
                if i + AHEAD < UNROLL:
                    here = at + (chunk + i + AHEAD) * 32
                else:
                    here = at + after + (i + AHEAD - UNROLL) * 32
                all_ups = all_ups + (load_tile(up_w, up_s, here, W),)  # noqa: RUF005
                if GATED:
                    all_gates = all_gates + (load_tile(gate_w, gate_s, here, W),)  # noqa: RUF005
            ups, gates = (), ()
            for i in gl.static_range(AHEAD):
                ups = ups + (all_ups[UNROLL + i],)  # noqa: RUF005
                if GATED:
                    gates = gates + (all_gates[UNROLL + i],)  # noqa: RUF005
        up_n = matrix(up, GROUPS, W, MMA) * up_scale
        gate_n = up_n
        if GATED:
            gate_n = matrix(gate, GROUPS, W, MMA) * gate_scale
        h = activate_gl(gate_n, up_n, KIND)
        row = strip * 16 + gl.arange(0, 16 * W, gl.SliceLayout(1, MMA))
        to = pair[None, :].to(gl.int64) * (STRIPS * 16) + row[:, None]
        gl.store(h_ptr + to, h.to(gl.bfloat16), mask=(n < count)[None, :] & (row < STRIPS * 16)[:, None])


@gluon.jit(do_not_specialize=["runs"])
def down_grouped(
    h_ptr, down_w, down_s, down_g, runs_ptr, order_ptr, weights_ptr, out_ptr, runs,
    TILES: gl.constexpr, STRIPS: gl.constexpr, GROUPS: gl.constexpr, SPAN: gl.constexpr, W: gl.constexpr,
    UNROLL: gl.constexpr, DEPTH: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out[pair, 16 W SPAN block ..], the weighted share of each pair of a run."""
    N: gl.constexpr = 8 * GROUPS
    AHEAD: gl.constexpr = DEPTH if DEPTH < UNROLL else UNROLL
    CHUNKS: gl.constexpr = TILES // UNROLL
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    LANES: gl.constexpr = gl.SliceLayout(2, pair_layout(W))
    run = gl.program_id(1)
    expert = gl.load(runs_ptr + run)
    if expert >= 0:
        begin, count = gl.load(runs_ptr + runs + run), gl.load(runs_ptr + 2 * runs + run)
        strip = gl.program_id(0) * (W * SPAN)
        warp = gl.arange(0, W, gl.SliceLayout(1, LANES))[:, None]
        lane = gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :]
        base = expert.to(gl.int64) * (STRIPS * TILES * 32) + lane
        at = base + gl.minimum(strip + warp, STRIPS - 1) * (TILES * 32)
        ring = ()
        for i in gl.static_range(AHEAD):
            ring = ring + (load_tile(down_w, down_s, at + i * 32, W),)  # noqa: RUF005
        n = gl.arange(0, N, gl.SliceLayout(1, copy_layout(W)))
        rows = gl.load(order_ptr + begin + n, mask=n < count, other=-1)
        n = gl.arange(0, N, gl.SliceLayout(0, MMA))
        pair = gl.load(order_ptr + begin + n, mask=n < count, other=0)
        share = gl.load(weights_ptr + pair, mask=n < count, other=0.0) * (256.0 * gl.load(down_g + expert))
        smem = gl.allocate_shared_memory(gl.int64, [TILES, N, 16], gl.SwizzledSharedLayout(2, 1, 8, [1, 0]))
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        copy_rows(smem, h_ptr, rows, TILES, W)
        async_copy.wait_group(0)
        barrier()
        for block in range(SPAN):
            acc = (gl.zeros((W, 32), gl.float32, LANES),) * (4 * GROUPS)
            following = gl.minimum(strip + gl.minimum(block + 1, SPAN - 1) * W + warp, STRIPS - 1) * (TILES * 32)
            for chunk in range(CHUNKS):
                after = gl.where(chunk == CHUNKS - 1, base + following, at + (chunk + 1) * (UNROLL * 32))
                whole = ring
                for i in gl.static_range(UNROLL):
                    x = read_tile(smem.index(chunk * UNROLL + i), GROUPS, W)
                    acc = multiply(whole[i], x, acc, "nvfp4", GROUPS)
                    if i + AHEAD < UNROLL:
                        here = at + (chunk * UNROLL + i + AHEAD) * 32
                    else:
                        here = after + (i + AHEAD - UNROLL) * 32
                    whole = whole + (load_tile(down_w, down_s, here, W),)  # noqa: RUF005
                ring = ()
                for i in gl.static_range(AHEAD):
                    ring = ring + (whole[UNROLL + i],)  # noqa: RUF005
            at = base + following
            row = (strip + block * W) * 16 + gl.arange(0, 16 * W, gl.SliceLayout(1, MMA))
            to = pair[None, :].to(gl.int64) * (STRIPS * 16) + row[:, None]
            value = matrix(acc, GROUPS, W, MMA) * share[None, :]
            gl.store(out_ptr + to, value, mask=(n < count)[None, :] & (row < STRIPS * 16)[:, None])


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
    common = {"runs_ptr": "*i32", "order_ptr": "*i32", "runs": "i32"}
    gate_up = {"x_ptr": "*i64", "h_ptr": "*bf16"} | common
    for name in ("gate", "up"):
        gate_up |= {f"{name}_w": "*i64", f"{name}_s": "*i16", f"{name}_g": "*fp32"}
    down = {"h_ptr": "*i64", "down_w": "*i64", "down_s": "*i16", "down_g": "*fp32", **common}
    down |= {"weights_ptr": "*fp32", "out_ptr": "*fp32"}
    cases = []
    for pdl in (False, True):
        architectures = (90, 100, 120) if pdl else (80, 86, 89, 90, 100, 120)
        dependent = {"launch_pdl": True} if pdl else {}
        for name, hidden, inner, top, kind, groups in (
            ("qwen3.6", 2048, 512, 8, "silu", 1),
            ("gemma-4", 2816, 704, 8, "gelu_tanh", 1),
            ("nemotron-3", 2688, 1856, 6, "relu2", 1),
            ("qwen3.6, 16", 2048, 512, 8, "silu", 2),
        ):
            tiles, common_ = hidden // 64, {"PDL": pdl, "GROUPS": groups}
            warps, depth = gate_up_shape(tiles, groups)
            first: dict[str, Any] = {"TILES": tiles, "STRIPS": inner // 16, "TOP": top, "W": warps, "DEPTH": depth}
            first |= {"UNROLL": unroll(tiles, depth), "GATED": kind != "relu2", "KIND": kind} | common_
            tiles = inner // 64
            warps, depth, span = down_shape(groups)
            second: dict[str, Any] = {"TILES": tiles, "STRIPS": hidden // 16, "W": warps, "DEPTH": depth, "SPAN": span}
            second |= {"UNROLL": unroll(tiles, depth)} | common_
            for function, signature, constexprs in ((gate_up_grouped, gate_up, first), (down_grouped, down, second)):
                case = CompileCase(
                    name=f"{function.__name__} {name}{' dependent' if pdl else ''}",
                    function=function,
                    signature=signature,
                    constexprs=constexprs,
                    options={"num_warps": constexprs["W"], **dependent},
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
