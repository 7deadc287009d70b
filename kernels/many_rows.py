"""Routed experts for many rows (prefill, big batches): tensor cores, weights decoded from fragments in registers.

    y[t] = sum_k weights[t, k] * down_e(act(gate_e(x[t]), up_e(x[t]))),  e = expert_ids[t, k]

Four launches: `arrange` (x in the order of the fragments' columns, and a table of tiles), gate and up with the
activation, down, and the weighted sum. A tile is up to BN pairs of one expert; the weights are the first operand, so
that a warp decodes what it loaded, and the rows are the second, through shared memory.

Letters: T rows, K experts of a row (TOP in kernels), S = T K pairs, H hidden, I inner, E experts.
"""

from itertools import pairwise
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.activation import activate, activate_tl
from moe_nvfp4.kernels.compiling import ARCHITECTURES, CompileCase
from moe_nvfp4.kernels.fragment_mma import pairs_of
from moe_nvfp4.kernels.fragments import FragmentTensor, from_fragments
from moe_nvfp4.kernels.many_rows_wgmma import down_wgmma, gate_up_wgmma
from moe_nvfp4.kernels.sizes import capability, cdiv, next_power_of_2
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases

_TABLE_TILES: Final = 16  # tiles of one program of `arrange`
_ARRANGE_BLOCKS: Final = 64  # blocks of 64 columns of one program of `arrange`


def routed_experts_many(
    x_TH: Tensor,
    gate: FragmentTensor | None,
    up: FragmentTensor,
    down: FragmentTensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    order_S: Tensor,
    offsets: Tensor,
    activation: str = "silu",
    portable: bool = False,
    among: int | None = None,
) -> Tensor:
    """bfloat16 [T, H]. `portable` asks for the plain kernels where faster ones exist. `among`: over how many experts
    the pairs are spread, those with id -1 too; default: those that are here.

    order_S [T K]: every index of a pair (row, k) in the flattened [T, K], grouped by expert. offsets [E + 1]: the
    pairs of expert e are order_S[offsets[e]:offsets[e + 1]]; the other pairs, those with id -1, may lie before
    offsets[0] or after offsets[E], and count zero. Both int32 or int64; the host does not read them.
    """
    num_rows, hidden = x_TH.shape
    top, num_experts = expert_ids_TK.shape[1], up.words.shape[0]
    y_TH = x_TH.new_empty(num_rows, hidden)
    if num_rows == 0:
        return y_TH
    pairs = num_rows * top
    wgmma = not portable and x_TH.is_cuda and capability(x_TH.device)[0] == 9
    bn, warps = _tile_shape(pairs / (among or num_experts), wgmma)
    max_tiles = pairs // bn + min(num_experts, pairs)
    hidden_tiles, inner_tiles = up.words.shape[-4], down.words.shape[-4]
    x_arranged = x_TH.new_empty(num_rows, 64 * hidden_tiles)
    table = offsets.new_empty(3, max_tiles, dtype=torch.int32)
    blocks = cdiv(num_rows * hidden_tiles, _ARRANGE_BLOCKS)
    dependent = launch_options(x_TH)
    arrange[(cdiv(max_tiles, _TABLE_TILES) + blocks,)](
        x_TH.contiguous(), x_arranged, offsets, table, num_rows, hidden, num_experts, max_tiles,
        TILES=hidden_tiles, EXPERTS=next_power_of_2(num_experts), BN=bn, COUNT=_TABLE_TILES,
        BLOCKS=_ARRANGE_BLOCKS, **dependent,
    )  # fmt: skip
    h_SI = x_TH.new_empty(pairs, 64 * inner_tiles)
    y_SH = x_TH.new_empty(pairs, hidden)
    strips, halves = up.words.shape[-5], 1 if gate is not None else 2
    source = gate if gate is not None else up
    first, second = (gate_up_wgmma, down_wgmma) if wgmma else (gate_up_plain, down_plain)
    # Triton's interpreter has no bfloat16 dot.
    extra = dependent if wgmma else {"FP32": not x_TH.is_cuda}
    first[(cdiv(64 * inner_tiles, 16 * warps * halves), max_tiles)](
        x_arranged, *_parts(source), *_parts(up), order_S, table, h_SI, max_tiles, TOP=top, STRIPS=strips,
        TILES=hidden_tiles, COLUMNS=64 * inner_tiles, GATED=gate is not None, KIND=activation, W=warps, BN=bn,
        num_warps=warps, **extra,
    )  # fmt: skip
    second[(cdiv(hidden, 32 * warps), max_tiles)](
        h_SI, *_parts(down), order_S, table, y_SH, max_tiles, STRIPS=down.words.shape[-5], TILES=inner_tiles,
        COLUMNS=hidden, W=warps, BN=bn, num_warps=warps, **extra,
    )  # fmt: skip
    block = min(1024, next_power_of_2(hidden))
    weighted_sum[(num_rows, cdiv(hidden, block))](
        y_SH, expert_ids_TK.contiguous(), weights_TK.contiguous(), y_TH, hidden, TOP=top, BLOCK=block, **dependent
    )
    return y_TH


def routed_experts_many_torch(
    x_TH: Tensor,
    gate: FragmentTensor | None,
    up: FragmentTensor,
    down: FragmentTensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    order_S: Tensor,
    offsets: Tensor,
    activation: str = "silu",
) -> Tensor:
    """The torch twin: sums in float32; activations and each pair's output are rounded to the dtype of x."""
    top, hidden = expert_ids_TK.shape[1], x_TH.shape[1]
    y_SH = torch.zeros(x_TH.shape[0] * top, hidden, dtype=torch.float32, device=x_TH.device)
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin == end:
            continue
        pairs = order_S[begin:end].long()
        rows = x_TH[pairs // top].float()
        inner = rows @ _expert(up, expert, hidden).T
        inner = activate(activation, None if gate is None else rows @ _expert(gate, expert, hidden).T, inner)
        inner = torch.nn.functional.pad(inner, (0, down.shape[-1] - inner.shape[-1])).to(x_TH.dtype).float()
        y_SH[pairs] = (inner @ _expert(down, expert, down.shape[-1])[:hidden].T).to(x_TH.dtype).float()
    return (y_SH.view(*expert_ids_TK.shape, hidden) * weights_TK[..., None]).sum(1).to(x_TH.dtype)


def _expert(weight: FragmentTensor, expert: int, columns: int) -> Tensor:
    return from_fragments(FragmentTensor(*(part[expert] for part in weight))).dequantize()[:, :columns]


def _parts(weight: FragmentTensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight.words, pairs_of(weight), weight.global_scale


def _tile_shape(mean_rows: float, wgmma: bool) -> tuple[int, int]:
    """Pairs of a tile and warps of a program, from the mean number of pairs of an expert.

    H200, us a layer at means 8 / 32 / 64 / 128 / 256 (Qwen3.6 at 256, 1024, 4096 rows; Gemma 4 at 1024, 4096):
    32 pairs 182 / 263 / 397 / 745 / 1325, 64 pairs 210 / 267 / 328 / 634 / 1080, 128 pairs 327 / 349 / 394 / 587 / 911.
    Choices that lost were timed with an earlier loop. Eight warps and 128 pairs: 628 and 1013 at means of 128 and 256.
    """
    if not wgmma:
        return (16, 4) if mean_rows <= 16 else (32, 4) if mean_rows <= 48 else (64, 4)
    return (32, 4) if mean_rows <= 40 else (64, 4) if mean_rows <= 80 else (128, 4)


@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def arrange(
    x_ptr, arranged_ptr, offsets_ptr, table_ptr, num_rows, hidden, num_experts, max_tiles,
    TILES: tl.constexpr, EXPERTS: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """First programs: (expert or -1, first pair, pairs) of COUNT tiles each. The others: x in fragment order."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    programs = tl.cdiv(max_tiles, COUNT)
    if tl.program_id(0) < programs:
        e = tl.arange(0, EXPERTS)
        begin = tl.load(offsets_ptr + e, mask=e < num_experts, other=0).to(tl.int32)
        end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0).to(tl.int32)
        last = tl.cumsum((end - begin + BN - 1) // BN, 0)  # one past the expert's last tile
        i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
        before = last[None, :] <= i[:, None]
        expert = tl.sum(before.to(tl.int32), 1)
        first = tl.max(tl.where(before, last[None, :], 0), 1)
        live = expert < num_experts
        start = tl.load(offsets_ptr + expert, mask=live, other=0).to(tl.int32) + (i - first) * BN
        stop = tl.load(offsets_ptr + expert + 1, mask=live, other=0).to(tl.int32)
        mask = i < max_tiles
        tl.store(table_ptr + i, tl.where(live, expert, -1), mask=mask)
        tl.store(table_ptr + max_tiles + i, start, mask=mask)
        tl.store(table_ptr + 2 * max_tiles + i, tl.minimum(stop - start, BN), mask=mask)
    else:
        block = (tl.program_id(0) - programs).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        within = tl.arange(0, 64)
        column = (block % TILES * 64)[:, None] + within[None, :]
        inside = (block // TILES < num_rows)[:, None]
        x = tl.load(x_ptr + (block // TILES * hidden)[:, None] + column, mask=inside & (column < hidden), other=0.0)
        x = tl.permute(tl.reshape(x, (BLOCKS, 4, 8, 2)), (0, 2, 1, 3))  # c, (j, i2), i0
        tl.store(arranged_ptr + (block * 64)[:, None] + within[None, :], tl.reshape(x, (BLOCKS, 64)), mask=inside)


@triton.jit
def weighted_sum(
    y_pairs, ids_ptr, weights_ptr, y_ptr, hidden, TOP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """y[t] = sum over k, in order, of weights[t, k] * y_pairs[t, k]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP):
        live = tl.load(ids_ptr + row * TOP + k) >= 0
        weight = tl.load(weights_ptr + row * TOP + k).to(tl.float32)
        y = tl.load(y_pairs + (row * TOP + k) * hidden + column, mask=live & (column < hidden), other=0.0)
        total += tl.where(live, weight, 0.0) * y.to(tl.float32)
    tl.store(y_ptr + row * hidden + column, total.to(y_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def _halves(pair, scale):
    """Two bfloat16 of an int32, scaled by 2^-126, times a float32 scale; last dimension: low, high."""
    low = (pair << 16).to(tl.float32, bitcast=True) * scale
    high = (pair & -65536).to(tl.float32, bitcast=True) * scale
    return tl.join(low.to(tl.bfloat16), high.to(tl.bfloat16))


@triton.jit
def _operand_tl(words_ptr, scales_ptr, strip, tile, STRIPS: tl.constexpr, TILES: tl.constexpr, W: tl.constexpr):
    """Weights times 2^-8 of W strips and one tile of columns, in fragment order: bf16 [16 W, 64]."""
    s = tl.minimum(strip + tl.arange(0, W), STRIPS - 1)
    lane = tl.arange(0, 32)
    at = (s * TILES + tile)[:, None] * 32 + lane[None, :]
    word = tl.load(words_ptr + at[:, :, None] * 4 + tl.arange(0, 4)[None, None, :])
    pair = tl.load(scales_ptr + at).to(tl.int32)
    # 235 = 127 - 10 + 118: the exponent's bias of a float32, the one of the scales, and 2^118.
    upper = (((pair & 0xFF) << 20) + (235 << 23)).to(tl.float32, bitcast=True)[:, :, None]
    lower = (((pair << 12) & 0x0FF00000) + (235 << 23)).to(tl.float32, bitcast=True)[:, :, None]
    m0 = word & -2118090304  # 0x81C081C0
    m1 = (word << 3) & -2118090304
    m2 = ((word << 6) & 0x01C001C0) | ((word << 2) & -2147450880)  # 0x80008000
    m3 = ((word >> 3) & 0x01C001C0) | ((word << 1) & -2147450880)
    rows = tl.join(_halves(m0, upper), _halves(m1, lower))  # s, (r, c), j, i0, i1
    other = tl.join(_halves(m2, upper), _halves(m3, lower))
    a = tl.reshape(tl.join(rows, other), (W, 8, 4, 4, 2, 2, 2))  # s, r, c, j, i0, i1, i2
    return tl.reshape(tl.permute(a, (0, 5, 1, 3, 6, 2, 4)), (16 * W, 64))  # s, i1, r, j, i2, c, i0


@triton.jit
def _products_tl(
    p_w, p_s, p_strip, q_w, q_s, q_strip, x_ptr, rows,
    STRIPS: tl.constexpr, TILES: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """[16 W, BN] of two sets of W strips with the same rows of x."""
    k = tl.arange(0, 64)
    p = tl.zeros((16 * W, BN), tl.float32)
    q = tl.zeros((16 * W, BN), tl.float32)
    for tile in range(TILES):
        x = tl.load(x_ptr + (rows * (TILES * 64))[None, :] + tile * 64 + k[:, None])
        a = _operand_tl(p_w, p_s, p_strip, tile, STRIPS, TILES, W)
        b = _operand_tl(q_w, q_s, q_strip, tile, STRIPS, TILES, W)
        if FP32:
            x, a, b = x.to(tl.float32), a.to(tl.float32), b.to(tl.float32)
        p = tl.dot(a, x, p)
        q = tl.dot(b, x, q)
    return p, q


@triton.jit
def _store_h_tl(
    h, strip, h_ptr, begin, count, STRIPS: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr, BN: tl.constexpr
):
    m = strip * 16 + tl.arange(0, 16 * W)
    n = tl.arange(0, BN)
    h = tl.where((m < STRIPS * 16)[:, None], h, 0.0)
    to = m // 64 * 64 + (m // 2 % 8) * 8 + m // 16 % 4 * 2 + m % 2
    mask = (n < count)[None, :] & (m < COLUMNS)[:, None]
    tl.store(h_ptr + (begin + n).to(tl.int64)[None, :] * COLUMNS + to[:, None], h.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["max_tiles"])
def gate_up_plain(
    x_ptr, gate_w, gate_s, gate_g, up_w, up_s, up_g, order_ptr, table_ptr, h_ptr, max_tiles,
    TOP: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
    KIND: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """h[first pair + n, columns in fragment order] of one tile and a block of 16 W rows, or 32 W without a gate."""
    tile = tl.program_id(1)
    expert = tl.load(table_ptr + tile).to(tl.int64)
    if expert >= 0:
        begin = tl.load(table_ptr + max_tiles + tile)
        count = tl.load(table_ptr + 2 * max_tiles + tile)
        n = tl.minimum(tl.arange(0, BN), count - 1)
        rows = tl.load(order_ptr + begin + n).to(tl.int64) // TOP
        base = expert * (STRIPS * TILES * 32)
        p_strip = tl.program_id(0) * (W if GATED else 2 * W)
        q_strip = p_strip if GATED else p_strip + W
        p, q = _products_tl(
            gate_w + base * 4, gate_s + base, p_strip, up_w + base * 4, up_s + base, q_strip, x_ptr, rows,
            STRIPS, TILES, W, BN, FP32,
        )  # fmt: skip
        p *= tl.load(gate_g + expert) * 256.0
        q *= tl.load(up_g + expert) * 256.0
        if GATED:
            _store_h_tl(activate_tl(p, q, KIND), p_strip, h_ptr, begin, count, STRIPS, COLUMNS, W, BN)
        else:
            _store_h_tl(activate_tl(p, p, KIND), p_strip, h_ptr, begin, count, STRIPS, COLUMNS, W, BN)
            _store_h_tl(activate_tl(q, q, KIND), q_strip, h_ptr, begin, count, STRIPS, COLUMNS, W, BN)


@triton.jit(do_not_specialize=["max_tiles"])
def down_plain(
    h_ptr, down_w, down_s, down_g, order_ptr, table_ptr, y_ptr, max_tiles,
    STRIPS: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    """y[pair] of one tile and a block of 32 W columns."""
    tile = tl.program_id(1)
    expert = tl.load(table_ptr + tile).to(tl.int64)
    if expert >= 0:
        begin = tl.load(table_ptr + max_tiles + tile)
        count = tl.load(table_ptr + 2 * max_tiles + tile)
        n = tl.arange(0, BN)
        rows = (begin + tl.minimum(n, count - 1)).to(tl.int64)
        base = expert * (STRIPS * TILES * 32)
        w, s = down_w + base * 4, down_s + base
        strip = tl.program_id(0) * (2 * W)
        p, q = _products_tl(w, s, strip, w, s, strip + W, h_ptr, rows, STRIPS, TILES, W, BN, FP32)
        scale = tl.load(down_g + expert) * 256.0
        to = y_ptr + tl.load(order_ptr + rows).to(tl.int64)[None, :] * COLUMNS
        m = (strip * 16 + tl.arange(0, 16 * W))[:, None]
        live = (n < count)[None, :]
        tl.store(to + m, (p * scale).to(tl.bfloat16), mask=live & (m < COLUMNS))
        tl.store(to + m + 16 * W, (q * scale).to(tl.bfloat16), mask=live & (m + 16 * W < COLUMNS))


def compile_cases() -> list[CompileCase]:
    weight = {"{}_w": "*i32", "{}_s": "*i16", "{}_g": "*fp32"}
    common = {"order_ptr": "*i32", "table_ptr": "*i32", "max_tiles": "i32"}
    gate_up = {key.format(name): kind for name in ("gate", "up") for key, kind in weight.items()}
    gate_up |= {"x_ptr": "*bf16", "h_ptr": "*bf16", **common}
    down = {key.format("down"): kind for key, kind in weight.items()} | {"h_ptr": "*bf16", "y_ptr": "*bf16", **common}
    cases = []
    for name, hidden, inner, top, kind, plain_tiles, wgmma_tiles in (
        ("qwen3.6", 2048, 512, 8, "silu", (16,), (128,)),
        ("gemma-4", 2816, 704, 8, "gelu_tanh", (64,), (32, 64)),
        ("nemotron-3", 2688, 1856, 6, "relu2", (32,), (128,)),
    ):
        for bn, wgmma in (*((bn, False) for bn in plain_tiles), *((bn, True) for bn in wgmma_tiles)):
            first: dict[str, Any] = {"TOP": top, "STRIPS": inner // 16, "TILES": hidden // 64, "COLUMNS": inner}
            first |= {"GATED": kind != "relu2", "KIND": kind, "W": 4, "BN": bn}
            second: dict[str, Any] = {"STRIPS": hidden // 16, "TILES": inner // 64, "COLUMNS": hidden, "W": 4, "BN": bn}
            functions = (gate_up_wgmma, down_wgmma) if wgmma else (gate_up_plain, down_plain)
            extra = {"PDL": True} if wgmma else {"FP32": False}
            for function, signature, constexprs in zip(functions, (gate_up, down), (first, second), strict=True):
                case = CompileCase(
                    name=f"{function.__name__} {name} {bn}",
                    function=function,
                    signature=signature,
                    constexprs=constexprs | extra,
                    options={"num_warps": 4, **({"launch_pdl": True} if wgmma else {})},
                    architectures=(90,) if wgmma else ARCHITECTURES,
                    allowed_spill=8 if bn in (16, 128) else 0,  # a register or two
                )
                cases.append(case)
    sizes = {"num_rows": "i32", "hidden": "i32", "num_experts": "i32", "max_tiles": "i32"}
    pointers = {"x_ptr": "*bf16", "arranged_ptr": "*bf16", "offsets_ptr": "*i32", "table_ptr": "*i32"}
    table = {"TILES": 32, "EXPERTS": 256, "BN": 64, "COUNT": _TABLE_TILES, "BLOCKS": _ARRANGE_BLOCKS}
    cases += pdl_cases("arrange", arrange, pointers | sizes, {}, **table)
    pointers = {"y_pairs": "*bf16", "ids_ptr": "*i32", "weights_ptr": "*fp32", "y_ptr": "*bf16", "hidden": "i32"}
    return cases + pdl_cases("weighted_sum", weighted_sum, pointers, {}, TOP=8, BLOCK=1024)
