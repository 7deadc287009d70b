"""Routed experts for a handful of rows, a program for each pair of row and expert: reading weights is all there is.

With one row to an expert, seven of the eight columns of a tensor-core product would be idle. So the columns are eight
slices of K (gate and up) or eight experts (down), one for each warp, and only the diagonal of the result counts.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.activation import activate_gl
from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.fragment_mma import columns, load_columns, load_tiles, operand, pairs_of, warps
from moe_nvfp4.kernels.fragments import COLUMNS, ROWS, FragmentTensor

WARPS = 8
# Weights of `down` fetched before h is there take registers; it pays while a multiprocessor has but one or two
# programs: 10.6 to 9.1 us for one row of Qwen3.6 on an H200, 39 to 42 us the other way for eight.
AHEAD_ROWS, AHEAD_INNER = 2, 1024


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
    is `routed_experts`.
    """
    (rows, hidden), top = x_TH.shape, expert_ids_TK.shape[1]
    inner = up.shape[-2]
    h = x_TH.new_empty(rows * top, inner)
    y = torch.empty_like(x_TH)
    dependent = torch.cuda.get_device_capability(x_TH.device) >= (9, 0)
    first = gate or up
    gate_up_pairs[(inner // ROWS, rows * top)](
        x_TH, first.words, pairs_of(first), first.global_scale, up.words, pairs_of(up), up.global_scale,
        expert_ids_TK, h, TOP=top, TILES=hidden // COLUMNS, STRIPS=inner // ROWS, GATED=gate is not None,
        KIND=activation, PDL=dependent, num_warps=WARPS, launch_pdl=dependent,
    )  # fmt: skip
    down_pairs[(hidden // ROWS, rows)](
        h, down.words, pairs_of(down), down.global_scale, expert_ids_TK, weights_TK, y,
        TOP=top, TILES=inner // COLUMNS, STRIPS=hidden // ROWS, PDL=dependent,
        AHEAD=dependent and rows <= AHEAD_ROWS and inner <= AHEAD_INNER,
        num_warps=WARPS, launch_pdl=dependent,
    )  # fmt: skip
    return y


@gluon.jit
def diagonal(acc, W: gl.constexpr, MMA: gl.constexpr):
    """acc [16 W, 8] -> [16]: the sum over w of row 16 w + n in column w."""
    row = gl.arange(0, 16 * W, gl.SliceLayout(1, MMA))
    column = gl.arange(0, 8, gl.SliceLayout(0, MMA))
    return gl.sum(gl.reshape(gl.sum(gl.where((row[:, None] // 16) == column[None, :], acc, 0.0), 1), (W, 16)), 0)


@gluon.jit
def slice_product(words, pairs, x_ptr, first, W: gl.constexpr, TILES: gl.constexpr, MMA: gl.constexpr):
    """acc [16 W, 8] of one strip, of which only the diagonal counts: warp w sums its slice of K, in column w."""
    SHARE: gl.constexpr = (TILES + W - 1) // W
    acc = gl.zeros((16 * W, 8), gl.float32, MMA)
    for bit in gl.static_range(5):
        if (SHARE >> bit) & 1:
            done = (SHARE & ((1 << bit) - 1)) * W
            slice_ = done + gl.arange(0, 8, columns(W, 1 << bit)) * (1 << bit)
            x = load_columns(x_ptr, slice_ * 64, TILES - slice_, W, 1 << bit, gl.DotOperandLayout(1, MMA, 2))
            tile = done + gl.arange(0, 8, warps(W, 1 << bit)) * (1 << bit)
            some, scales = load_tiles(words + first * 128, pairs + first * 32, tile, TILES - tile, W, 1 << bit)
            acc = mma_v2(operand(some, scales, W, 1 << bit, gl.DotOperandLayout(0, MMA, 2)), x, acc)
    return acc


@gluon.jit
def gate_up_pairs(
    x_ptr, gate_w, gate_s, gate_g, up_w, up_s, up_g, ids_ptr, h_ptr,
    TOP: gl.constexpr, TILES: gl.constexpr, STRIPS: gl.constexpr, GATED: gl.constexpr, KIND: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """h[p, 16 strip ..] of one pair: the columns of the product are eight slices of K, one for each warp."""
    W: gl.constexpr = 8
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    strip, pair = gl.program_id(0), gl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = gl.load(ids_ptr + pair)
    if expert >= 0:
        row = x_ptr + (pair // TOP).to(gl.int64) * (TILES * 64)
        first = (expert.to(gl.int64) * STRIPS + strip) * TILES
        up = slice_product(up_w, up_s, row, first, W, TILES, MMA)
        gate = up
        if GATED:
            gate = slice_product(gate_w, gate_s, row, first, W, TILES, MMA)
        up_n = diagonal(up, W, MMA) * (256.0 * gl.load(up_g + expert))
        gate_n = up_n
        if GATED:
            gate_n = diagonal(gate, W, MMA) * (256.0 * gl.load(gate_g + expert))
        h = activate_gl(gate_n, up_n, KIND)
        n = gl.arange(0, 16, h.type.layout)
        gl.store(h_ptr + (pair.to(gl.int64) * STRIPS + strip) * 16 + n, h.to(gl.bfloat16))


@gluon.jit
def load_down(
    down_w, down_s, ids_ptr, row, strip, group: gl.constexpr, bit: gl.constexpr, TOP: gl.constexpr, TILES: gl.constexpr,
    STRIPS: gl.constexpr,
):  # fmt: skip
    """Some tiles of eight experts of a row, one for each warp."""
    KT: gl.constexpr = 1 << bit
    w = group * 8 + gl.arange(0, 8, warps(8, KT))
    expert = gl.load(ids_ptr + row * TOP + w, mask=w < TOP, other=-1)
    tile = (gl.maximum(expert, 0).to(gl.int64) * STRIPS + strip) * TILES + (TILES & (KT - 1))
    return load_tiles(down_w, down_s, tile, gl.where(expert >= 0, KT, 0), 8, KT)


@gluon.jit
def down_pairs(
    h_ptr, down_w, down_s, down_g, ids_ptr, weights_ptr, y_ptr,
    TOP: gl.constexpr, TILES: gl.constexpr, STRIPS: gl.constexpr, AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """y[t, 16 strip ..]: eight experts of a row at a time, one for each warp and column."""
    W: gl.constexpr = 8
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    strip, row = gl.program_id(0), gl.program_id(1)
    ahead = ()
    for bit in gl.static_range(6):
        if AHEAD and (TILES >> bit) & 1:
            ahead = ahead + (load_down(down_w, down_s, ids_ptr, row, strip, 0, bit, TOP, TILES, STRIPS),)  # noqa: RUF005
        else:
            ahead = ahead + ((0, 0),)  # noqa: RUF005
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = gl.zeros((16 * W, 8), gl.float32, MMA)
    for group in gl.static_range((TOP + 7) // 8):
        acc = gl.zeros((16 * W, 8), gl.float32, MMA)
        for bit in gl.static_range(6):
            if (TILES >> bit) & 1:
                if AHEAD and group == 0:
                    words, pairs = ahead[bit]
                else:
                    words, pairs = load_down(down_w, down_s, ids_ptr, row, strip, group, bit, TOP, TILES, STRIPS)
                n = gl.arange(0, 8, columns(W, 1 << bit)) + group * 8
                expert = gl.load(ids_ptr + row * TOP + n, mask=n < TOP, other=-1)
                live = gl.where(expert >= 0, 1 << bit, 0)
                start = (row * TOP + n).to(gl.int64) * (TILES * 64) + (TILES & ((1 << bit) - 1)) * 64
                acc = mma_v2(
                    operand(words, pairs, W, 1 << bit, A), load_columns(h_ptr, start, live, W, 1 << bit, B), acc
                )
        n = gl.arange(0, 8, gl.SliceLayout(0, MMA)) + group * 8
        expert = gl.load(ids_ptr + row * TOP + n, mask=n < TOP, other=-1)
        share = gl.load(weights_ptr + row * TOP + n, mask=expert >= 0, other=0.0) * 256.0
        share *= gl.load(down_g + gl.maximum(expert, 0))
        total += acc * share[None, :]
    y = diagonal(total, W, MMA)
    n = gl.arange(0, 16, y.type.layout)
    gl.store(y_ptr + (row.to(gl.int64) * STRIPS + strip) * 16 + n, y.to(gl.bfloat16))


def compile_cases() -> list[CompileCase]:
    weight = {"{}_w": "*i32", "{}_s": "*i16", "{}_g": "*fp32"}
    gate_up = {"x_ptr": "*bf16"} | {key.format(name): kind for name in ("gate", "up") for key, kind in weight.items()}
    gate_up |= {"ids_ptr": "*i32", "h_ptr": "*bf16"}
    down = {"h_ptr": "*bf16"} | {key.format("down"): kind for key, kind in weight.items()}
    down |= {"ids_ptr": "*i32", "weights_ptr": "*fp32", "y_ptr": "*bf16"}
    cases = []
    for name, hidden, inner, top, kind in (
        ("qwen3.6", 2048, 512, 8, "silu"),
        ("gemma-4", 2816, 704, 8, "gelu_tanh"),
        ("nemotron-3", 2688, 1856, 6, "relu2"),
    ):
        for pdl in (False, True):
            ahead = pdl and inner <= AHEAD_INNER
            first = {"TILES": hidden // 64, "STRIPS": inner // 16, "GATED": kind != "relu2", "KIND": kind}
            second = {"TILES": inner // 64, "STRIPS": hidden // 16, "AHEAD": ahead}
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
