"""A branch into the residual stream, the norm that follows, and the projections of it, in one launch for few rows.

    x' = x + y;  output_i[m, n] = rsqrt(mean(x'[m]^2) + eps) * sum_k (x'[m, k] g[k]) w_i[n, k]

The factor of a row leaves the sum, so that a program needs no other: each reads x and y, 8 KB a row that stay in L2,
writes bfloat16(x' g) to its shared memory as operands for tensor cores, and multiplies its strips as `dense_rows.py`
does; sums of squares are taken beside it and meet at the end. Program 0 also writes x'. Weights of two kinds are two
ranges of programs. On sm_90 and later weights arrive while the predecessor still runs.

Letters: T rows, H hidden (columns of the weights), N rows of a weight; R is T up to a power of two, W warps.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels import dense_rows
from moe_nvfp4.kernels.compiling import ARCHITECTURES, SHARED_LIMIT, CompileCase
from moe_nvfp4.kernels.dense_rows import (
    TILE_COLUMNS,
    Kind,
    Tiling,
    block_of,
    finish_step,
    fits,
    halves,
    kind_of,
    load_scale,
    multiply,
    pair_layout,
    parts_of,
    start_step,
    tiling_for,
)
from moe_nvfp4.kernels.linear import Invariant, Projection, Stacked, linear
from moe_nvfp4.kernels.nvfp4 import NVFP4Tensor
from moe_nvfp4.kernels.residual_norms import Norm, residual_norms
from moe_nvfp4.kernels.sizes import cdiv, next_power_of_2
from moe_nvfp4.kernels.sort_pairs import launch_options

MAX_ROWS: Final = 8
MAX_WEIGHTS: Final = 2
# What every program reads and keeps again: 8 rows of 2048 still gain, 18.1 µs against 18.7 for the first line below.
_MAX_OPERAND_BYTES: Final = 33 << 10
_MAX_STRIPS: Final = 2048  # nvfp4 248320 x 2048: 76.0 µs, two launches 75.4


def norm_linear(
    x_TH: Tensor,
    y_TH: Tensor | None,
    norm: Norm,
    weights: Sequence[Projection],
    tilings: Sequence[Tiling] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """x' and a [T, N] for each weight. Without y, x' is x itself. The kernel before it on the stream must not
    write weights. Tilings have one number of warps.

    On one H200, one row, µs, after an FP8 product of 4096 columns (3.6 of it) and against separate launches: fp8 12288
    and bf16 64 x 2048 12.6 (16.7), at 4 rows 13.6 (17.4), fp8 9216 x 2048 10.9 (13.7), fp8 10240 x 4096 22.3 (23.7),
    bf16 8192 x 2816 17.4 (20.8). Weights in registers, without the copies' barriers, are slower: 15.6.
    """
    kernels = [w for w in weights if not isinstance(w, Stacked | NVFP4Tensor | Invariant)]
    if len(kernels) < len(weights) or not _one_launch(x_TH, y_TH, norm, kernels):
        return norm_linear_twin(x_TH, y_TH, norm, weights)
    num_rows, hidden = x_TH.shape
    changed_TH = x_TH if y_TH is None else torch.empty_like(x_TH)
    outputs = [x_TH.new_empty(num_rows, weight.shape[0]) for weight in kernels]
    tilings = tilings or tilings_for(kernels, num_rows)
    pointers, sizes, programs = [], [], []
    for i in (0, len(kernels) - 1):
        *parts, step = parts_of(kernels[i])
        pointers += [*parts, outputs[i]]
        sizes += [kernels[i].shape[0], step]
        programs.append(cdiv(cdiv(kernels[i].shape[0], 16), tilings[i].span))
    both = len(kernels) == MAX_WEIGHTS
    norm_linear_kernel[(programs[0] + both * programs[1],)](
        x_TH, x_TH if y_TH is None else y_TH, x_TH if norm.weight is None else norm.weight, changed_TH,
        *pointers, num_rows, *sizes, programs[1],
        **_constants(hidden, num_rows, [kind_of(weight) for weight in kernels], tilings),
        EPS=norm.eps, NORM=0 if norm.weight is None else 1 + norm.offset, BRANCH=y_TH is not None,
        num_warps=tilings[0].warps, **launch_options(x_TH),
    )  # fmt: skip
    return changed_TH, outputs


def norm_linear_twin(
    x_TH: Tensor, y_TH: Tensor | None, norm: Norm, weights: Sequence[Projection]
) -> tuple[Tensor, list[Tensor]]:
    """Two launches and more, for any number of rows, and on a CPU the torch twin."""
    changed_TH, (normed_TH,) = residual_norms(x_TH, [] if y_TH is None else [(y_TH, None)], [norm])
    return changed_TH, [linear(normed_TH, weight) for weight in weights]


def tilings_for(weights: Sequence[dense_rows.DenseWeight], rows: int) -> list[Tiling]:
    """That of the largest weight; the other one has its warps. Steps ahead as far as shared memory goes."""
    sizes = [weight.shape[0] for weight in weights]
    return _tilings(weights[0].shape[1], [kind_of(weight) for weight in weights], sizes, rows)


def _tilings(hidden: int, kinds: Sequence[Kind], sizes: Sequence[int], rows: int) -> list[Tiling]:
    largest = list(sizes).index(max(sizes))
    main = _tiling_of(kinds[largest], cdiv(max(sizes), 16), hidden // TILE_COLUMNS[kinds[largest]], rows)
    tilings = [main if i == largest else Tiling(main.warps, 1, 4, 1) for i in range(len(kinds))]
    free = min(SHARED_LIMIT.values()) - 1024 - _operand_bytes(hidden, rows, main.warps)
    steps = [
        free // (512 * (1 if kind == "nvfp4" else 2) * tiling.warps * tiling.span)
        for kind, tiling in zip(kinds, tilings, strict=True)
    ]
    return [tiling._replace(depth=max(1, min(tiling.depth, step))) for tiling, step in zip(tilings, steps, strict=True)]


def _tiling_of(kind: Kind, strips: int, tiles: int, rows: int) -> Tiling:
    """Where one H200 was faster than with the tiling of dense_rows, after a product of 4096 columns, µs of both."""
    if (
        kind == "fp8" and rows == 1 and strips >= 600 and tiles <= 32
    ):  # 12288 and 64 x 2048: 12.6; Tiling(8, 2, 2): 13.2
        return Tiling(4, 2, 4, 1)
    if kind == "bf16" and rows == 1 and 400 <= strips < 600:  # 8192 x 2816: 17.4; Tiling(8, 1, 2): 19.4
        return Tiling(8, 1, 8, 1)
    return tiling_for(kind, strips, tiles, 1)


def _operand_bytes(hidden: int, rows: int, warps: int) -> int:
    """Shared memory of x' g, and four bytes a row and warp."""
    constants = _padded(hidden, rows, warps)
    return constants["R"] * (2 * constants["BH"]) + 32 * warps


def _padded(hidden: int, rows: int, warps: int) -> dict[str, int]:
    return {"BH": max(next_power_of_2(hidden), 64 * warps), "R": next_power_of_2(rows)}


def _one_launch(x_TH: Tensor, y_TH: Tensor | None, norm: Norm, weights: Sequence[dense_rows.DenseWeight]) -> bool:
    tensors = [part for part in (x_TH, y_TH, norm.weight) if part is not None]
    return (
        x_TH.is_cuda
        and 0 < len(x_TH) <= MAX_ROWS
        and 0 < len(weights) <= MAX_WEIGHTS
        and _operand_bytes(x_TH.shape[1], len(x_TH), 16) <= _MAX_OPERAND_BYTES
        and all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in tensors)
        and all(part.dtype == torch.bfloat16 for part in tensors[: 1 + (y_TH is not None)])
        and all(fits(x_TH, w) and w.shape[1] == x_TH.shape[1] and w.shape[0] <= 16 * _MAX_STRIPS for w in weights)
    )


def _constants(hidden: int, rows: int, kinds: Sequence[str], tilings: Sequence[Tiling]) -> dict[str, Any]:
    warps, (first, second) = tilings[0].warps, (tilings[0], tilings[-1])
    return {
        "H": hidden, **_padded(hidden, rows, warps), "W": warps, "COUNT": len(kinds),
        "KIND0": kinds[0], "SPAN0": first.span, "DEPTH0": first.depth,
        "KIND1": kinds[-1], "SPAN1": second.span, "DEPTH1": second.depth,
    }  # fmt: skip


@gluon.jit
def load_norm(g_ptr, h, H: gl.constexpr, NORM: gl.constexpr):
    """As it lies in memory, so that it takes few registers."""
    if NORM == 0:
        return 1.0
    else:
        return gl.load(g_ptr + h, mask=h < H, other=0.0)


@gluon.jit
def make_operands(
    x_ptr, y_ptr, g, out_ptr, squares, M, h, H: gl.constexpr, BH: gl.constexpr, R: gl.constexpr, W: gl.constexpr,
    TILE: gl.constexpr, NORM: gl.constexpr, BRANCH: gl.constexpr,
):  # fmt: skip
    """Write x' (program 0) and, of each warp, sums of squares; return bfloat16(x' g) in shared memory, int64 [step and
    half of a tile, W, R, 4 c, 2]."""
    L: gl.constexpr = x_layout(BH, W)
    STEPS: gl.constexpr = BH // (W * TILE)
    HALVES: gl.constexpr = TILE // 32
    m = gl.arange(0, R, gl.SliceLayout(1, L))[:, None]
    at, live = m * H + h, (m < M) & (h < H)
    x = gl.load(x_ptr + at, mask=live, other=0.0).to(gl.float32)
    if BRANCH:
        x += gl.load(y_ptr + at, mask=live, other=0.0).to(gl.float32)
        gl.store(out_ptr + at, x.to(gl.bfloat16), mask=live & (gl.program_id(0) == 0))
    each: gl.constexpr = L.size_per_thread[1]
    own = gl.sum(gl.sum(gl.reshape(x * x, (R, BH // (32 * W * each), W, 32, each)), 4), 1)
    squares.slice(0, R, dim=0).store(gl.sum(own, 2))
    if NORM == 1:
        x *= g.to(gl.float32)
    elif NORM == 2:
        x *= 1 + g.to(gl.float32)
    x = gl.permute(gl.reshape(x.to(gl.bfloat16), (R, STEPS, W, 4, HALVES, 8)), (1, 4, 2, 0, 3, 5))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    INNER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    shared = gl.allocate_shared_memory(gl.bfloat16, (STEPS * HALVES, W, R, 4, 8), FLAT)
    shared.store(gl.reshape(x, (STEPS * HALVES, W, R, 4, 8)))
    return shared._reinterpret(gl.int64, (STEPS * HALVES, W, R, 4, 2), INNER)


@constexpr_function
def x_layout(BH, W):
    """Of [R, BH]: a thread has up to 16 adjacent bytes."""
    return gl.BlockedLayout([1, min(8, BH // (32 * W))], [1, 32], [1, W], [1, 0])


@constexpr_function
def row_layout(R, W):
    """Of [W, 8 / R, R, 4, 2]: that of `pair_layout`, lanes apart."""
    return gl.BlockedLayout([1, 1, 1, 1, 2], [1, 8 // R, R, 4, 1], [W, 1, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.jit
def read_operands(shared, STEP: gl.constexpr, R: gl.constexpr, W: gl.constexpr, HALVES: gl.constexpr):
    """Operands of a step; row m of x is also that of rows m + R and so on, whose products nobody reads."""
    ROWS: gl.constexpr = row_layout(R, W)
    out = ()
    for i in gl.static_range(HALVES):
        pairs = gl.expand_dims(shared.index(STEP * HALVES + i).load(gl.SliceLayout(1, ROWS)), 1)
        pairs, _ = gl.broadcast(pairs, gl.zeros((W, 8 // R, R, 4, 2), gl.int64, ROWS))
        out = out + halves(gl.convert_layout(gl.reshape(pairs, (W, 32, 2)), pair_layout(W), assert_trivial=True), W)
    return out


@gluon.jit
def project(
    pid, x_ptr, y_ptr, n_ptr, x_out_ptr, w_ptr, s_ptr, g_ptr, out_ptr, M, N, scale_step,
    H: gl.constexpr, BH: gl.constexpr, R: gl.constexpr, W: gl.constexpr, KIND: gl.constexpr, SPAN: gl.constexpr,
    DEPTH: gl.constexpr, EPS: gl.constexpr, NORM: gl.constexpr, BRANCH: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`SPAN` strips of one weight, as dense_rows_kernel."""
    LANES: gl.constexpr = gl.SliceLayout(2, pair_layout(W))
    TILE: gl.constexpr = 32 if KIND == "bf16" else 64
    TILES: gl.constexpr = H // TILE
    STEPS: gl.constexpr = (TILES + W - 1) // W
    AHEAD: gl.constexpr = DEPTH if DEPTH < STEPS else STEPS
    ONE: gl.constexpr = gl.BlockedLayout([W, 1], [1, 32], [1, W], [1, 0])
    warp = gl.arange(0, W, gl.SliceLayout(1, LANES))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :]
    strip = pid * SPAN
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    ring = ()
    for _ in gl.static_range(AHEAD * SPAN * (1 if KIND == "nvfp4" else 2)):
        ring = ring + (gl.allocate_shared_memory(gl.int64, (W, 32, 2), FLAT),)  # noqa: RUF005
    squares = gl.allocate_shared_memory(gl.float32, (8, W), gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    # First whatever does not depend on the kernel before this one.
    pairs = ()
    for i in gl.static_range(AHEAD):
        pairs = pairs + start_step(ring, w_ptr, s_ptr, N, strip, warp, lane, i, KIND, TILES, W, SPAN, AHEAD)
    scales = ()
    for s in gl.static_range(SPAN):
        scales = scales + (load_scale(g_ptr, N, scale_step, strip + s, KIND, ONE, 1),)  # noqa: RUF005
    h = gl.arange(0, BH, gl.SliceLayout(0, x_layout(BH, W)))[None, :]
    norm = load_norm(n_ptr, h, H, NORM)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    xs = make_operands(x_ptr, y_ptr, norm, x_out_ptr, squares, M, h, H, BH, R, W, TILE, NORM, BRANCH)
    accs = ((gl.zeros((W, 32), gl.float32, LANES),) * 4,) * SPAN
    for i in gl.static_range(STEPS):
        x = read_operands(xs, i, R, W, TILE // 32)
        async_copy.wait_group((i + AHEAD if i + AHEAD < STEPS else STEPS) - (i + 1))
        sums = ()
        for s in gl.static_range(SPAN):
            tiles = finish_step(ring, pairs[i * SPAN + s], i, s, KIND, W, SPAN, AHEAD)
            sums = sums + (multiply(tiles, x, accs[s], KIND, 1),)  # noqa: RUF005
        accs = sums
        if i + AHEAD < STEPS:
            pairs = pairs + start_step(ring, w_ptr, s_ptr, N, strip, warp, lane, i + AHEAD, KIND, TILES, W, SPAN, AHEAD)
    # Of [8 m, 16 n, W]: the elements of y that a thread has, and all that it adds up.
    APART: gl.constexpr = gl.BlockedLayout([1, 1, W], [2, 16, 1], [W, 1, 1], [2, 1, 0])
    total = gl.sum(squares.load(gl.SliceLayout(1, APART)), 1)  # rows from R on are not read
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, APART))
    factor = gl.convert_layout(gl.rsqrt(total / H + EPS), ROW, assert_trivial=True)[:, None]
    for s in gl.static_range(SPAN):
        y = gl.sum(gl.convert_layout(block_of(accs[s], 1, W), ONE), 0) * scales[s]
        both = gl.convert_layout(gl.reshape(y, (8, 16)), gl.SliceLayout(2, APART), assert_trivial=True) * factor
        m = gl.arange(0, 8, ROW)[:, None]
        n = (strip + s) * 16 + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, APART)))[None, :]
        gl.store(out_ptr + m.to(gl.int64) * N + n, both.to(gl.bfloat16), mask=(m < M) & (n < N))


@gluon.jit(do_not_specialize=["M", "programs"])
def norm_linear_kernel(
    x_ptr, y_ptr, n_ptr, x_out_ptr, w0_ptr, s0_ptr, g0_ptr, out0_ptr, w1_ptr, s1_ptr, g1_ptr, out1_ptr,
    M, N0, step0, N1, step1, programs, H: gl.constexpr, BH: gl.constexpr, R: gl.constexpr, W: gl.constexpr,
    KIND0: gl.constexpr, SPAN0: gl.constexpr, DEPTH0: gl.constexpr, KIND1: gl.constexpr, SPAN1: gl.constexpr,
    DEPTH1: gl.constexpr, COUNT: gl.constexpr, EPS: gl.constexpr, NORM: gl.constexpr, BRANCH: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The second weight's programs come first: it is the small one, and a program of it takes as long."""
    pid = gl.program_id(0)
    if COUNT == 1:
        project(
            pid, x_ptr, y_ptr, n_ptr, x_out_ptr, w0_ptr, s0_ptr, g0_ptr, out0_ptr, M, N0, step0,
            H, BH, R, W, KIND0, SPAN0, DEPTH0, EPS, NORM, BRANCH, PDL,
        )  # fmt: skip
    elif pid < programs:
        project(
            pid, x_ptr, y_ptr, n_ptr, x_out_ptr, w1_ptr, s1_ptr, g1_ptr, out1_ptr, M, N1, step1,
            H, BH, R, W, KIND1, SPAN1, DEPTH1, EPS, NORM, BRANCH, PDL,
        )  # fmt: skip
    else:
        project(
            pid - programs, x_ptr, y_ptr, n_ptr, x_out_ptr, w0_ptr, s0_ptr, g0_ptr, out0_ptr, M, N0, step0,
            H, BH, R, W, KIND0, SPAN0, DEPTH0, EPS, NORM, BRANCH, PDL,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n_ptr": "*bf16", "x_out_ptr": "*bf16"}
    pointers |= {f"{name}{i}_ptr": kind for i in (0, 1) for name, kind in (("w", "*i64"), ("out", "*bf16"))}
    integers = dict.fromkeys(("M", "N0", "step0", "N1", "step1", "programs"), "i32")
    parts: dict[Kind, tuple[str, str]] = {
        "nvfp4": ("*i16", "*fp32"),
        "fp8": ("*u8", "*fp32"),
        "bf16": ("*bf16", "*bf16"),
    }
    shapes: tuple[tuple[int, tuple[Kind, ...], tuple[int, ...]], ...] = (
        (2048, ("fp8", "bf16"), (12288, 64)),
        (2048, ("fp8",), (9216,)),
        (2816, ("bf16",), (8192,)),
        (2688, ("nvfp4", "fp8"), (4096, 512)),
    )
    cases = []
    for hidden, kinds, sizes in shapes:
        scales = {f"{n}{i}_ptr": parts[kinds[min(i, len(kinds) - 1)]][j] for i in (0, 1) for j, n in enumerate("sg")}
        for rows in (1, 4) if hidden > 2048 else (1, 4, 8):
            tilings = _tilings(hidden, kinds, sizes, rows)
            for dependent in (False, True):
                constants = _constants(hidden, rows, kinds, tilings)
                cases.append(
                    CompileCase(
                        name=f"norm_linear {' '.join(kinds)} {hidden}, {rows} rows, {dependent}",
                        function=norm_linear_kernel,
                        signature={**pointers, **scales, **integers},
                        constexprs={**constants, "EPS": 1e-6, "NORM": 2, "BRANCH": True, "PDL": dependent},
                        options={"num_warps": tilings[0].warps, "launch_pdl": dependent},
                        architectures=(90, 100, 120) if dependent else ARCHITECTURES,
                    )
                )
    return cases
