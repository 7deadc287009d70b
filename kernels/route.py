"""Routing: the experts of each row and their weights, in two launches: the router's product, and the choice.

Nothing synchronises with the host, and all sums have a fixed order. Of equal scores the lower expert id wins. On
sm_90 and later a program may start while its predecessor in the stream still runs: it then loads the router's
weights first (few rows) and waits before it touches anything else.

Letters: T rows, H hidden, E experts, K choices of a row, S shares of H summed apart.
"""

from typing import Any, Final, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.sizes import cdiv, next_power_of_2
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases, use_twin

Scoring = Literal["softmax", "sigmoid"]

SUM_EPSILON: Final = 1e-20
# Up to here a warp for each expert, beyond tensor cores: 1.7 and 2.0 against 2.5 us at one and two rows of Gemma-4
# on an H200, 3.3 against 2.5 at four.
FEW_ROWS: Final = 2
_INVARIANT_ROWS: Final = 64  # whose tiles, in eight shares of H, take any number of rows where bits must not differ


class Routes(NamedTuple):
    expert_ids_TK: Tensor  # int32, best first
    weights_TK: Tensor  # float32


class _Rule(NamedTuple):
    k: int
    scoring: Scoring
    normalise: bool
    correction_bias: Tensor | None
    scale: float
    shared: bool


def route(
    x_TH: Tensor,
    router_EH: Tensor,
    k: int,
    *,
    scoring: Scoring = "softmax",
    normalise: bool,
    correction_bias: Tensor | None = None,
    scale: float = 1.0,
    shared: bool = False,
    batch_invariant: bool = False,
) -> Routes:
    """The k best experts of each row of x under the router (bfloat16 or float32), and their weights.

    Scores are softmax or sigmoid of the float32 product. `correction_bias` (float32 [E]) is added to them for the
    choice only. `normalise` divides the weights by their sum + 1e-20; `scale` multiplies them last. `shared`: the
    router has one row more, the gate of an expert that every row takes: id E, last, weight sigmoid of its logit.
    `batch_invariant`: the bits of a row's scores do not depend on the number of rows.
    """
    rule = _Rule(k, scoring, normalise, correction_bias, scale, shared)
    if use_twin(x_TH) or x_TH.dtype != torch.bfloat16:
        return choose_twin(logits_twin(x_TH, router_EH), rule)
    return _choose(_logits(x_TH, router_EH, batch_invariant), rule)


def logits_twin(x_TH: Tensor, router_EH: Tensor) -> Tensor:
    return x_TH.float() @ router_EH.float().T


def choose_twin(logits_TL: Tensor, rule: _Rule) -> Routes:
    """Without a bias the choice is by logits, which order the experts as their scores do, without its roundings."""
    logits_TE = logits_TL[:, : logits_TL.shape[1] - rule.shared]
    scores_TE = logits_TE.softmax(dim=-1) if rule.scoring == "softmax" else logits_TE.sigmoid()
    by_TE = logits_TE if rule.correction_bias is None else scores_TE + rule.correction_bias
    expert_ids_TK = by_TE.sort(dim=-1, descending=True, stable=True).indices[:, : rule.k]
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if rule.normalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + SUM_EPSILON)
    weights_TK = weights_TK * rule.scale
    if rule.shared:
        expert_ids_TK = F.pad(expert_ids_TK, (0, 1), value=logits_TE.shape[1])
        weights_TK = torch.cat((weights_TK, logits_TL[:, -1:].sigmoid()), dim=-1)
    return Routes(expert_ids_TK.int(), weights_TK)


def _logits(x_TH: Tensor, router_EH: Tensor, batch_invariant: bool) -> Tensor:
    (num_rows, hidden), num_experts = x_TH.shape, router_EH.shape[0]
    x_TH, router_EH = x_TH.contiguous(), router_EH.contiguous()
    if num_rows <= FEW_ROWS and not batch_invariant:
        shares_STE = x_TH.new_empty(1, num_rows, num_experts, dtype=torch.float32)
        logits_few[(num_experts,)](
            x_TH, router_EH, shares_STE, num_rows, num_experts, H=hidden, BH=next_power_of_2(hidden),
            num_warps=1, **launch_options(x_TH),
        )  # fmt: skip
        return shares_STE
    tiled_rows = _INVARIANT_ROWS if batch_invariant else num_rows
    bt, be, bk, shares, warps, stages = logits_tiles(tiled_rows, num_experts, hidden, router_EH.dtype)
    shares_STE = x_TH.new_empty(shares, num_rows, num_experts, dtype=torch.float32)
    logits_tile[(cdiv(num_rows, bt), cdiv(num_experts, be), shares)](
        x_TH, router_EH, shares_STE, num_rows, num_experts, H=hidden, STEPS=cdiv(hidden, bk * shares), S=shares,
        BT=bt, BE=be, BK=bk, BF16=x_TH.is_cuda, num_warps=warps, num_stages=stages, **launch_options(x_TH),
    )  # fmt: skip
    return shares_STE


def logits_tiles(
    num_rows: int, num_experts: int, hidden: int, dtype: torch.dtype
) -> tuple[int, int, int, int, int, int]:
    """BT, BE, BK, S, warps and stages: tiles that grow with the rows, and shares of H for about 128 programs."""
    if num_rows <= 128:
        bt, be, bk, warps, stages = 16, 64, 128, 4, 3
    elif dtype == torch.float32:
        bt, be, bk, warps, stages = 64, 64, 64, 8, 4  # three products; four warps spill
    elif num_rows < 1024:
        bt, be, bk, warps, stages = 64, 64, 64, 4, 4
    else:
        bt, be, bk, warps, stages = (64 if num_rows < 4096 else 128), 128, 64, 8, 4
    programs = cdiv(num_rows, bt) * cdiv(num_experts, be)
    shares = max(1, min(8, 128 // programs, hidden // 256))
    return bt, be, bk, shares, warps, stages


def _choose(shares_STL: Tensor, rule: _Rule) -> Routes:
    shares, num_rows, num_logits = shares_STL.shape
    num_experts, taken = num_logits - rule.shared, rule.k + rule.shared
    routes = Routes(
        shares_STL.new_empty(num_rows, taken, dtype=torch.int32),
        shares_STL.new_empty(num_rows, taken, dtype=torch.float32),
    )
    bias = rule.correction_bias
    choose_rows[(num_rows,)](
        shares_STL, shares_STL if bias is None else bias, *routes, num_rows, rule.scale,
        E=num_experts, EP=next_power_of_2(num_experts), K=rule.k, KP=next_power_of_2(rule.k), S=shares,
        SIGMOID=rule.scoring == "sigmoid", BIAS=bias is not None, NORMALISE=rule.normalise, SHARED=rule.shared,
        num_warps=1, **launch_options(shares_STL),
    )  # fmt: skip
    return routes


@triton.jit(do_not_specialize=["T"])  # one kernel for any number of rows
def logits_few(
    x_ptr, w_ptr, out_ptr, T, num_experts, H: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A warp for each expert: its row of the router stays in registers, and its sums need no barrier."""
    expert = tl.program_id(0)
    h = tl.arange(0, BH)
    w = tl.load(w_ptr + expert * H + h, mask=h < H, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for t in range(T):
        x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0)
        tl.store(out_ptr + t * num_experts + expert, tl.sum(x.to(tl.float32) * w.to(tl.float32)))


@triton.jit(do_not_specialize=["T"])  # one kernel for any number of rows
def logits_tile(
    x_ptr, w_ptr, out_ptr, T, num_experts, H: tl.constexpr, STEPS: tl.constexpr, S: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BF16: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One share of H. A float32 router is split in three bfloat16 terms, which together hold its 24 bits."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    first = tl.program_id(2) * (STEPS * BK)
    k = tl.arange(0, BK)
    EVEN: tl.constexpr = H == S * STEPS * BK  # the last share may reach beyond H, or lie there whole
    x_at = x_ptr + t.to(tl.int64)[None, :] * H + (first + k)[:, None]
    w_at = w_ptr + e[:, None] * H + (first + k)[None, :]
    live_t, live_e = (t < T)[None, :], (e < num_experts)[:, None]
    acc = tl.zeros((BE, BT), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for step in range(STEPS):
        mask_x, mask_w = live_t, live_e
        if not EVEN:
            mask_x &= (first + step * BK + k < H)[:, None]
            mask_w &= (first + step * BK + k < H)[None, :]
        x = tl.load(x_at + step * BK, mask=mask_x, other=0.0)
        w = tl.load(w_at + step * BK, mask=mask_w, other=0.0)
        if not BF16:
            acc += tl.dot(w.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        elif w.dtype == tl.float32:
            hi = w.to(tl.bfloat16)
            rest = w - hi.to(tl.float32)
            mid = rest.to(tl.bfloat16)
            lo = (rest - mid.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(lo, x, acc)
            acc = tl.dot(mid, x, acc)
            acc = tl.dot(hi, x, acc)
        else:
            acc = tl.dot(w, x, acc)
    out_at = tl.program_id(2).to(tl.int64) * T * num_experts + t.to(tl.int64)[None, :] * num_experts + e[:, None]
    tl.store(out_ptr + out_at, acc, mask=live_t & live_e)


@triton.jit(do_not_specialize=["T"])  # one kernel for any number of rows
def choose_rows(
    shares_ptr, bias_ptr, ids_ptr, weights_ptr, T, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISE: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The choice of one row, by one warp, so that no step needs a barrier."""
    LINE: tl.constexpr = E + SHARED
    TAKEN: tl.constexpr = K + SHARED
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EP)
    k = tl.arange(0, KP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    logit = tl.zeros((EP,), tl.float32)
    for share in tl.static_range(S):
        logit += tl.load(shares_ptr + (share * T + t) * LINE + e, mask=e < E, other=0.0)
    top = tl.max(tl.where(e < E, logit, float("-inf")), 0)
    total = 1.0
    if not SIGMOID:
        total = tl.sum(tl.where(e < E, tl.exp(logit - top), 0.0), 0)
    by = logit
    if BIAS:
        by = _score(logit, top, total, SIGMOID) + tl.load(bias_ptr + e, mask=e < E, other=0.0)
    # As integers of the same order, so that a maximum over a warp is one instruction; -0.0 equals 0.0.
    bits = tl.where(by == 0.0, 0.0, by).to(tl.int32, bitcast=True)
    LOWEST: tl.constexpr = -(1 << 31)
    keys = tl.where(e < E, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
    ids = tl.zeros((KP,), tl.int32)
    for choice in tl.static_range(K):
        best = tl.max(keys, 0)
        expert = tl.min(tl.where(keys == best, e, EP), 0)
        keys = tl.where(e == expert, LOWEST, keys)
        ids = tl.where(k == choice, expert, ids)
    chosen = tl.zeros((KP,), tl.float32)
    for share in tl.static_range(S):
        chosen += tl.load(shares_ptr + (share * T + t) * LINE + ids, mask=k < K, other=0.0)
    weights = tl.where(k < K, _score(chosen, top, total, SIGMOID), 0.0)
    if NORMALISE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(ids_ptr + t * TAKEN + k, ids, mask=k < K)
    tl.store(weights_ptr + t * TAKEN + k, weights * scale, mask=k < K)
    if SHARED:
        gate = 0.0
        for share in tl.static_range(S):
            gate += tl.load(shares_ptr + (share * T + t) * LINE + E)
        tl.store(ids_ptr + t * TAKEN + K, E)
        tl.store(weights_ptr + t * TAKEN + K, 1 / (1 + tl.exp(-gate)))


@triton.jit
def _score(logit, top, total, SIGMOID: tl.constexpr):
    if SIGMOID:
        return 1 / (1 + tl.exp(-logit))
    else:
        return tl.exp(logit - top) / total


def compile_cases() -> list[CompileCase]:
    sizes = {"T": "i32", "num_experts": "i32"}
    plain = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*fp32"} | sizes
    exact = plain | {"w_ptr": "*fp32"}
    choose = {"shares_ptr": "*fp32", "bias_ptr": "*fp32", "ids_ptr": "*i32", "weights_ptr": "*fp32"}
    choose |= {"T": "i32", "scale": "fp32"}
    small: dict[str, Any] = {
        "E": 256,
        "EP": 256,
        "K": 8,
        "KP": 8,
        "SIGMOID": False,
        "BIAS": False,
        "NORMALISE": True,
        "SHARED": True,
    }
    large: dict[str, Any] = {
        "E": 512,
        "EP": 512,
        "K": 22,
        "KP": 32,
        "SIGMOID": True,
        "BIAS": True,
        "NORMALISE": True,
        "SHARED": False,
    }
    cases = pdl_cases("logits_few", logits_few, plain, {"num_warps": 1}, H=2816, BH=4096)
    cases += pdl_cases("logits_few float32", logits_few, exact, {"num_warps": 1}, H=2688, BH=4096)
    for rows, signature in ((64, plain), (512, plain), (1024, plain), (4096, plain), (64, exact), (4096, exact)):
        bt, be, bk, shares, warps, stages = logits_tiles(
            rows, 256, 2048, torch.float32 if signature is exact else torch.bfloat16
        )
        name = f"logits_tile {rows}{' float32' * (signature is exact)}"
        tile = {"H": 2048, "STEPS": 2048 // (bk * shares), "S": shares, "BT": bt, "BE": be, "BK": bk, "BF16": True}
        cases += pdl_cases(name, logits_tile, signature, {"num_warps": warps, "num_stages": stages}, **tile)
    cases += pdl_cases("choose_rows", choose_rows, choose, {"num_warps": 1}, **small, S=1)
    cases += pdl_cases("choose_rows sigmoid", choose_rows, choose, {"num_warps": 1}, **large, S=1)
    return cases
