"""Routed experts for a handful of rows, a program for each pair of row and expert: reading weights is all there is.

A strip is 16 rows of weights. The warps of a program share its tiles of K and meet in shared memory at its end. A
program walks through several strips, and the tiles of the next are on their way to registers while these are decoded.
Of the eight columns of a tensor-core product only the first has a row: products are not what time goes to.
"""

import torch
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.activation import activate_gl
from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.dense_rows import adjacent, halves, load_x, multiply, pair_layout
from moe_nvfp4.kernels.fragment_mma import pairs_of
from moe_nvfp4.kernels.fragments import COLUMNS, ROWS, FragmentTensor
from moe_nvfp4.kernels.sizes import capability, cdiv, processors

WARPS = 8


def routed_experts_pairs(
    x_TH: torch.Tensor,
    gate: FragmentTensor | None,
    up: FragmentTensor,
    down: FragmentTensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """y[t] = sum_k weights[t, k] down_e(act(gate_e x[t], up_e x[t])) in bfloat16; ids of -1 are left out.

    Every weight is read once for each row that needs it. A row's result does not depend on the other rows. The twin
    is `routed_experts`. The inner activations are rounded to bfloat16 with the row's weight and down's global scale.
    """
    (rows, hidden), top = x_TH.shape, expert_ids_TK.shape[1]
    inner = up.shape[-2]
    h = x_TH.new_empty(rows * top, inner)
    y = torch.empty_like(x_TH)
    dependent = capability(x_TH.device) >= (9, 0)
    multiprocessors = processors(x_TH.device)
    first = gate or up
    strips, tiles = inner // ROWS, hidden // COLUMNS
    span, depth = gate_up_shape(strips, tiles, rows * top, multiprocessors, gate is not None)
    gate_up_pairs[(cdiv(strips, span), rows * top)](
        x_TH.view(torch.int64), *_parts(first), *_parts(up), down.global_scale, expert_ids_TK, weights_TK, h, span,
        TOP=top, TILES=tiles, STRIPS=strips, DEPTH=depth, GATED=gate is not None, KIND=activation, PDL=dependent,
        num_warps=WARPS, launch_pdl=dependent,
    )  # fmt: skip
    strips, tiles = hidden // ROWS, inner // COLUMNS
    span, depth = down_shape(strips, top, tiles, rows, multiprocessors)
    down_pairs[(cdiv(strips, span), rows)](
        h.view(torch.int64), *_parts(down)[:2], expert_ids_TK, y, span,
        TOP=top, TILES=tiles, STRIPS=strips, DEPTH=depth, PDL=dependent, num_warps=WARPS, launch_pdl=dependent,
    )  # fmt: skip
    return y


def _parts(weight: FragmentTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return weight.words.view(torch.int64), pairs_of(weight), weight.global_scale


def gate_up_shape(strips: int, tiles: int, pairs: int, processors: int, gated: bool) -> tuple[int, int]:
    """Strips of a program, and its tiles in flight, of gate and up each.

    By registers a multiprocessor holds three programs with three tiles in flight, four with two; that is better where
    it leaves a multiprocessor fewer strips in all. H200, us of both launches for 1, 2, 4 and 8 rows of Qwen3.6: 8.6,
    13.2, 20.2 and 34.4; with three programs always 9.0, 13.1, 20.7 and 36.0, with four 9.4, 14.8, 20.7 and 34.7.
    """
    steps = -(-tiles // WARPS)
    if not gated:
        return _span(strips, pairs, 3 * processors)[0], min(6, steps)
    three, four = _span(strips, pairs, 3 * processors), _span(strips, pairs, 4 * processors)
    if steps <= 4 and -(-four[1] // processors) * four[0] < -(-three[1] // processors) * three[0]:
        return four[0], min(3 if four[1] <= 3 * processors else 2, steps)
    return three[0], min(3, steps)


def down_shape(strips: int, top: int, tiles: int, rows: int, processors: int) -> tuple[int, int]:
    """Strips of a program, and its tiles in flight: for one row nearly all, since it waits for memory but once.

    Registers are for four programs with four tiles of whole experts, three with eight; experts that warps share
    differently take more (72 with four tiles, 122 with eight).
    """
    steps = steps_of(top, tiles)[1]
    if rows == 1:
        return _span(strips, rows, 3 * processors)[0], min(11 if top % WARPS == 0 else 8, steps)
    if top % WARPS > 0:
        return _span(strips, rows, 3 * processors)[0], min(4, steps)
    short = steps <= 8
    return _span(strips, rows, (4 if short else 3) * processors)[0], min(4 if short else 8, steps)


def _span(strips: int, times: int, programs: int) -> tuple[int, int]:
    """Strips of a program when all are to run at once, and how many programs that makes."""
    span = -(-strips // max(1, min(strips, programs // times)))
    return span, -(-strips // span) * times


@gluon.jit
def load_tile(w_ptr, s_ptr, at, live, W: gl.constexpr):
    """A lane's four words and two scales; `at` counts the pairs of scales."""
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, pair_layout(W))))[None, None, :]
    whole = live[:, :, None] & (half >= 0)
    low, high = halves(gl.load(adjacent(w_ptr, at.to(gl.int64) * 2, W), mask=whole, other=0), W)
    return low, high, gl.load(s_ptr + at, mask=live, other=0).to(gl.int32)


@gluon.jit
def first_column(acc, W: gl.constexpr):
    """Accumulators [W, 32] to [W, 64]: of rows r and r + 8 for lane (r, c), of which c = 0 counts."""
    return gl.reshape(gl.join(acc[0], acc[2]), (W, 64))


@gluon.jit
def sum_warps(values, W: gl.constexpr, EACH: gl.constexpr):
    """[W, n] -> [n], each thread a few whole columns."""
    ONE: gl.constexpr = gl.BlockedLayout([W, EACH], [1, 32], [1, W], [1, 0])
    return gl.sum(gl.convert_layout(values, ONE), 0)


@gluon.jit(do_not_specialize=["span"])
def gate_up_pairs(
    x_ptr, gate_w, gate_s, gate_g, up_w, up_s, up_g, down_g, ids_ptr, weights_ptr, h_ptr, span,
    TOP: gl.constexpr, TILES: gl.constexpr, STRIPS: gl.constexpr, DEPTH: gl.constexpr, GATED: gl.constexpr,
    KIND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """h[p, 16 strip ..] of one pair and `span` strips, with the factors of p that `down` needs."""
    W: gl.constexpr = 8
    STEPS: gl.constexpr = (TILES + W - 1) // W
    LANES: gl.constexpr = gl.SliceLayout(2, pair_layout(W))
    warp = gl.arange(0, W, gl.SliceLayout(1, LANES))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :]
    pair = gl.program_id(1)
    begin = gl.program_id(0) * span
    end = gl.minimum(begin + span, STRIPS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = gl.load(ids_ptr + pair)
    if expert >= 0:
        x = x_ptr + (pair // TOP).to(gl.int64) * (TILES * 16)
        base = (expert.to(gl.int64) * STRIPS + begin) * (TILES * 32) + warp * 32 + lane
        ups, gates = (), ()
        for i in gl.static_range(DEPTH):
            live = (i * W + warp < TILES) & (lane >= 0)
            at = base + i * (W * 32)
            ups = ups + (load_tile(up_w, up_s, at, live, W),)  # noqa: RUF005
            if GATED:
                gates = gates + (load_tile(gate_w, gate_s, at, live, W),)  # noqa: RUF005
        share = 256.0 * gl.load(weights_ptr + pair) * gl.load(down_g + expert)
        up_scale = 256.0 * gl.load(up_g + expert)
        gate_scale = 256.0 * gl.load(gate_g + expert)
        for strip in range(begin, end):
            up = (gl.zeros((W, 32), gl.float32, LANES),) * 4
            gate = (gl.zeros((W, 32), gl.float32, LANES),) * 4
            next_strip = gl.where(strip + 1 < end, TILES * 32, 0)
            all_ups, all_gates = ups, gates
            for i in gl.static_range(STEPS):
                row = load_x(x, i * W + warp, lane, 1, "nvfp4", TILES, 1, W)
                up = multiply(all_ups[i], row, up, "nvfp4", 1)
                if GATED:
                    gate = multiply(all_gates[i], row, gate, "nvfp4", 1)
                live = ((i + DEPTH) % STEPS * W + warp < TILES) & (lane >= 0)
                at = base + (i + DEPTH) % STEPS * (W * 32)
                if i + DEPTH >= STEPS:
                    at += next_strip
                all_ups = all_ups + (load_tile(up_w, up_s, at, live, W),)  # noqa: RUF005
                if GATED:
                    all_gates = all_gates + (load_tile(gate_w, gate_s, at, live, W),)  # noqa: RUF005
            ups, gates = (), ()
            for i in gl.static_range(DEPTH):
                ups = ups + (all_ups[STEPS + i],)  # noqa: RUF005
                if GATED:
                    gates = gates + (all_gates[STEPS + i],)  # noqa: RUF005
            base += next_strip
            if GATED:
                both = gl.reshape(gl.join(first_column(gate, W), first_column(up, W)), (W, 128))
                gate_n, up_n = gl.split(gl.reshape(sum_warps(both, W, 2), (64, 2)))
            else:
                up_n = sum_warps(first_column(up, W), W, 1)
                gate_n = up_n
            h = activate_gl(gate_n * gate_scale, up_n * up_scale, KIND) * share
            n = gl.arange(0, 64, h.type.layout)
            to = h_ptr + (pair.to(gl.int64) * STRIPS + strip) * 16 + n // 8 + n % 2 * 8
            gl.store(to, h.to(gl.bfloat16), mask=n % 8 < 2)


@constexpr_function
def steps_of(top, tiles):
    """(tiles of a warp for each expert, in all). With 0 for each, a warp has one slice of all experts' tiles in a row:
    eight warps would share those of one expert badly, as 11 tiles of Gemma-4."""
    each = (tiles + WARPS - 1) // WARPS
    aligned = top % WARPS > 0 and 20 * tiles >= 17 * WARPS * each
    return (each, each * top) if aligned else (0, (top * tiles + WARPS - 1) // WARPS)


@gluon.jit
def experts_of(ids_ptr, row, begin, warp, lane, TOP: gl.constexpr, TILES: gl.constexpr, STRIPS: gl.constexpr):
    """Of each expert that a warp meets: where its tiles lie, whether it is here, and the step at which it begins."""
    EACH: gl.constexpr = steps_of(TOP, TILES)[0]
    STEPS: gl.constexpr = steps_of(TOP, TILES)[1]
    MOST: gl.constexpr = TOP if EACH > 0 else (TOP // 8 if TOP % 8 == 0 else (STEPS - 2) // TILES + 2)
    experts = ()
    for m in gl.static_range(MOST):
        # 2^31 pairs of scales would belong to 32 GB of weights.
        if EACH > 0:
            expert = gl.load(ids_ptr + row * TOP + m)
            base = (gl.maximum(expert, 0) * STRIPS + begin) * (TILES * 32) + warp * 32 + lane
            experts = experts + ((base, (expert >= 0) & (lane >= 0), 0),)  # noqa: RUF005
        else:
            k = warp * STEPS // TILES + m
            start = k * TILES - warp * STEPS
            expert = gl.load(ids_ptr + row * TOP + k, mask=k < TOP, other=-1)
            base = (gl.maximum(expert, 0) * STRIPS + begin) * (TILES * 32) - start * 32 + lane
            experts = experts + ((base, (expert >= 0) & (lane >= 0), start),)  # noqa: RUF005
    return experts


@gluon.jit
def locate(experts, step: gl.constexpr, warp, TOP: gl.constexpr, TILES: gl.constexpr):
    """Where a warp's tile of this step lies, whether it is there, and its place in the row of h."""
    EACH: gl.constexpr = steps_of(TOP, TILES)[0]
    STEPS: gl.constexpr = steps_of(TOP, TILES)[1]
    if EACH > 0:
        base, live = experts[step // EACH][0], experts[step // EACH][1]
        tile = step % EACH * 8 + warp
        if TILES % 8 > 0:
            live = live & (tile < TILES)
        return base + step % EACH * (8 * 32), live, step // EACH * TILES + tile
    else:
        base, live = experts[0][0], experts[0][1]
        for m in gl.static_range(1, len(experts)):
            base = gl.where(step >= experts[m][2], experts[m][0], base)
            live = gl.where(step >= experts[m][2], experts[m][1], live)
        return base + step * 32, live, warp * STEPS + step


@gluon.jit(do_not_specialize=["span"])
def down_pairs(
    h_ptr, down_w, down_s, ids_ptr, y_ptr, span,
    TOP: gl.constexpr, TILES: gl.constexpr, STRIPS: gl.constexpr, DEPTH: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """y[t, 16 strip ..] of one row and `span` strips: the experts' tiles one after the other are one long K."""
    W: gl.constexpr = 8
    STEPS: gl.constexpr = steps_of(TOP, TILES)[1]
    LANES: gl.constexpr = gl.SliceLayout(2, pair_layout(W))
    warp = gl.arange(0, W, gl.SliceLayout(1, LANES))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :]
    row = gl.program_id(1)
    begin = gl.program_id(0) * span
    end = gl.minimum(begin + span, STRIPS)
    experts = experts_of(ids_ptr, row, begin, warp, lane, TOP, TILES, STRIPS)
    ring = ()
    for i in gl.static_range(DEPTH):
        at, live, _ = locate(experts, i, warp, TOP, TILES)
        ring = ring + (load_tile(down_w, down_s, at, live, W),)  # noqa: RUF005
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    h = h_ptr + row.to(gl.int64) * (TOP * TILES * 16)
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, pair_layout(W))))[None, None, :]
    for strip in range(begin, end):
        acc = (gl.zeros((W, 32), gl.float32, LANES),) * 4
        this_strip = (strip - begin) * (TILES * 32)
        next_strip = this_strip + gl.where(strip + 1 < end, TILES * 32, 0)
        whole = ring
        for i in gl.static_range(STEPS):
            _, live, tile = locate(experts, i, warp, TOP, TILES)
            first_row = (live & (lane < 4))[:, :, None] & (half >= 0)  # of an expert that is not here there is no h
            at = tile * 16 + lane * 4
            x = halves(gl.load(adjacent(h, at, W), mask=first_row, other=0), W)
            x = x + halves(gl.load(adjacent(h, at + 2, W), mask=first_row, other=0), W)
            acc = multiply(whole[i], x, acc, "nvfp4", 1)
            at, live, _ = locate(experts, (i + DEPTH) % STEPS, warp, TOP, TILES)
            at += next_strip if i + DEPTH >= STEPS else this_strip
            whole = whole + (load_tile(down_w, down_s, at, live, W),)  # noqa: RUF005
        ring = ()
        for i in gl.static_range(DEPTH):
            ring = ring + (whole[STEPS + i],)  # noqa: RUF005
        y = sum_warps(first_column(acc, W), W, 1)
        n = gl.arange(0, 64, y.type.layout)
        to = y_ptr + (row.to(gl.int64) * STRIPS + strip) * 16 + n // 8 + n % 2 * 8
        gl.store(to, y.to(gl.bfloat16), mask=n % 8 < 2)


def compile_cases() -> list[CompileCase]:
    weight = {"{}_w": "*i64", "{}_s": "*i16"}
    gate_up = {"x_ptr": "*i64"} | {key.format(name): kind for name in ("gate", "up") for key, kind in weight.items()}
    gate_up |= {"gate_g": "*fp32", "up_g": "*fp32", "down_g": "*fp32", "weights_ptr": "*fp32"}
    gate_up |= {"ids_ptr": "*i32", "h_ptr": "*bf16", "span": "i32"}
    down = {"h_ptr": "*i64"} | {key.format("down"): kind for key, kind in weight.items()}
    down |= {"ids_ptr": "*i32", "y_ptr": "*bf16", "span": "i32"}
    cases = []
    for name, hidden, inner, top, kind in (
        ("qwen3.6", 2048, 512, 8, "silu"),
        ("gemma-4", 2816, 704, 8, "gelu_tanh"),
        ("nemotron-3", 2688, 1856, 6, "relu2"),
        ("qwen3.6, shared", 2048, 512, 9, "silu"),
        ("9 of gemma-4", 2816, 704, 9, "gelu_tanh"),
    ):
        for pdl in (False, True):
            tiles, strips = hidden // 64, inner // 16
            first = {"TILES": tiles, "STRIPS": strips, "GATED": kind != "relu2", "KIND": kind}
            first |= {"DEPTH": gate_up_shape(strips, tiles, top, 132, kind != "relu2")[1]}
            tiles, strips = inner // 64, hidden // 16
            second = {"TILES": tiles, "STRIPS": strips, "DEPTH": down_shape(strips, top, tiles, 1, 132)[1]}
            for function, signature, constexprs in ((gate_up_pairs, gate_up, first), (down_pairs, down, second)):
                case = CompileCase(
                    name=f"{function.__name__} {name}{' dependent' if pdl else ''}",
                    function=function,
                    signature=signature,
                    constexprs={"TOP": top, "PDL": pdl, **constexprs},
                    options={"num_warps": WARPS, **({"launch_pdl": True} if pdl else {})},
                    architectures=(90, 100, 120) if pdl else (80, 86, 89, 90, 100, 120),
                )
                cases.append(case)
    return cases
