"""Routing: the experts of each row and their weights. For few rows one launch, else the router's product and a choice.

Few rows: a warp multiplies a row by one row of the router and hands the product over in a word of memory, which is -1
while there is none; a last warp for each row waits for its words, sets them back to -1 and chooses. A word is its own
flag: nothing is fenced or counted. Warps that wait come last, when all others have their place on the GPU.

Nothing synchronises with the host, and all sums have a fixed order. Of equal scores the lower expert id wins. On
sm_90 and later a program may start while its predecessor in the stream still runs: it then loads the router's
weights first (few rows) and waits before it touches anything else.

Letters: T rows, H hidden, E experts, L logits of a row (E, and one of a shared expert), K choices of a row, S shares
of H summed apart.
"""

import itertools
from typing import Any, Final, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases, use_twin

Scoring = Literal["softmax", "sigmoid"]

SUM_EPSILON: Final = 1e-20
# Between a projection and the experts of Qwen3.6 on an H200 one launch takes 2.8, 2.5, 3.0 and 3.1 us at 1, 2, 4 and 8
# rows, two take 3.1, 3.9, 4.3 and 4.2; of Gemma-4 at one row 2.9 against 2.7. Two and four rows of x to a program were
# slower (3.6 and 3.1 at 4 and 8). More rows were not measured.
FEW_ROWS: Final = 8
# Streams that may route few rows in one launch, and words of each: 1 MB in all.
_STREAMS: Final = 32
_WORDS: Final = 8192


class Routes(NamedTuple):
    expert_ids_TK: Tensor  # int32, best first
    weights_TK: Tensor  # float32


class _Rule(NamedTuple):
    """How scores become a choice; `route` says what each means."""

    k: int
    normalise: bool
    scoring: Scoring = "softmax"
    correction_bias: Tensor | None = None
    scale: float = 1.0
    shared: bool = False


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
) -> Routes:
    """The k best experts of each row of x under the router (bfloat16 or float32), and their weights.

    Scores are softmax or sigmoid of the float32 product. `correction_bias` (float32 [E]) is added to them for the
    choice only. `normalise` divides the weights by their sum + 1e-20; `scale` multiplies them last. `shared`: the
    router has one row more, the gate of an expert that every row takes: id E, last, weight sigmoid of its logit.
    """
    rule = _Rule(k, normalise, scoring, correction_bias, scale, shared)
    if use_twin(x_TH) or x_TH.dtype != torch.bfloat16:
        return choose_twin(logits_twin(x_TH, router_EH), rule)
    words = _words_for(x_TH, router_EH)
    if words is None:
        return _choose(_logits(x_TH, router_EH), rule)
    (num_rows, hidden), num_logits = x_TH.shape, router_EH.shape[0]
    routes = _empty_routes(x_TH, rule)
    x_TH, router_EH = x_TH.contiguous(), router_EH.contiguous()
    route_few[((num_logits + 1) * num_rows,)](
        x_TH, router_EH, words, *_pointers(rule, words, routes), num_rows, rule.scale,
        H=hidden, BH=triton.next_power_of_2(hidden), **_constants(rule, num_logits),
        num_warps=_few_warps(hidden), **launch_options(x_TH),
    )  # fmt: skip
    return routes


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


_places: dict[torch.device, tuple[Tensor, dict[int, int], "itertools.count[int]"]] = {}


def _words_for(x_TH: Tensor, router_EH: Tensor) -> Tensor | None:
    """Where few rows hand over their products, all -1 between launches: a place for each stream, since launches of one
    stream follow each other. Graphs captured on one stream must not be replayed on several at once.

    None where there are many rows, more streams than places, or no places yet while a graph is captured.
    """
    if x_TH.shape[0] > FEW_ROWS or x_TH.shape[0] * router_EH.shape[0] > _WORDS:
        return None
    device = x_TH.device
    if device not in _places:
        if x_TH.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        places = torch.full((_STREAMS, _WORDS), -1, dtype=torch.int32, device=device)
        if x_TH.is_cuda:
            torch.cuda.current_stream(device).synchronize()  # other streams use it too; once in a process
        _places.setdefault(device, (places, {}, itertools.count()))
    places, of_stream, count = _places[device]
    stream = torch.cuda.current_stream(device).cuda_stream if x_TH.is_cuda else 0
    if stream not in of_stream:
        of_stream.setdefault(stream, next(count))
    place = of_stream[stream]
    return places[place] if place < _STREAMS else None


def _few_warps(hidden: int) -> int:
    """One, whose sums and choice need no barrier, as long as its registers suffice."""
    columns: int = triton.next_power_of_2(hidden)
    return max(1, columns // 4096)


def _empty_routes(x_TH: Tensor, rule: _Rule) -> Routes:
    shape = x_TH.shape[0], rule.k + rule.shared
    return Routes(x_TH.new_empty(shape, dtype=torch.int32), x_TH.new_empty(shape, dtype=torch.float32))


def _pointers(rule: _Rule, other: Tensor, routes: Routes) -> tuple[Tensor, Tensor, Tensor]:
    return other if rule.correction_bias is None else rule.correction_bias, *routes


def _constants(rule: _Rule, num_logits: int) -> dict[str, Any]:
    num_experts = num_logits - rule.shared
    return {
        "E": num_experts,
        "EP": triton.next_power_of_2(num_experts),
        "K": rule.k,
        "KP": triton.next_power_of_2(rule.k),
        "SIGMOID": rule.scoring == "sigmoid",
        "BIAS": rule.correction_bias is not None,
        "NORMALISE": rule.normalise,
        "SHARED": rule.shared,
    }


def _logits(x_TH: Tensor, router_EH: Tensor) -> Tensor:
    (num_rows, hidden), num_experts = x_TH.shape, router_EH.shape[0]
    x_TH, router_EH = x_TH.contiguous(), router_EH.contiguous()
    bt, be, bk, shares, warps, stages = logits_tiles(num_rows, num_experts, hidden, router_EH.dtype)
    shares_STE = x_TH.new_empty(shares, num_rows, num_experts, dtype=torch.float32)
    logits_tile[(triton.cdiv(num_rows, bt), triton.cdiv(num_experts, be), shares)](
        x_TH, router_EH, shares_STE, num_rows, num_experts, H=hidden, STEPS=triton.cdiv(hidden, bk * shares),
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
    programs = triton.cdiv(num_rows, bt) * triton.cdiv(num_experts, be)
    shares = max(1, min(8, 128 // programs, hidden // 256))
    return bt, be, bk, shares, warps, stages


def _choose(shares_STL: Tensor, rule: _Rule) -> Routes:
    shares, num_rows, num_logits = shares_STL.shape
    routes = _empty_routes(shares_STL[0], rule)
    choose_rows[(num_rows,)](
        shares_STL, *_pointers(rule, shares_STL, routes), num_rows, rule.scale,
        S=shares, **_constants(rule, num_logits), num_warps=1, **launch_options(shares_STL),
    )  # fmt: skip
    return routes


@triton.jit
def route_few(
    x_ptr, w_ptr, words_ptr, bias_ptr, ids_ptr, weights_ptr, T, scale,
    H: tl.constexpr, BH: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISE: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each logit, then one for each row's choice."""
    L: tl.constexpr = E + SHARED
    program = tl.program_id(0)
    if program < T * L:
        t, e, h = program // L, program % L, tl.arange(0, BH)
        w = tl.load(w_ptr + e * H + h, mask=h < H, other=0.0)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0)
        product = tl.sum(x.to(tl.float32) * w.to(tl.float32))
        # Of the bit patterns of NaN -1 is one.
        word = tl.where(product == product, product.to(tl.int32, bitcast=True), 0x7FC00000)
        tl.atomic_xchg(words_ptr + program, word, sem="relaxed")
    else:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        _choose_handed_over(
            words_ptr, bias_ptr, ids_ptr, weights_ptr, program - T * L, scale,
            E, EP, K, KP, SIGMOID, BIAS, NORMALISE, SHARED,
        )  # fmt: skip


@triton.jit
def _choose_handed_over(
    words_ptr, bias_ptr, ids_ptr, weights_ptr, t, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Waits for the words of row t. Should they never come it gives up after about a second: better than to hang."""
    EMPTY: tl.constexpr = -1
    e = tl.arange(0, EP)
    words_ptr += t * (E + SHARED)
    words = tl.full((EP,), EMPTY, tl.int32)
    gate_word = EMPTY
    missing = 1
    tries = 0
    while (missing > 0) & (tries < (1 << 20)):
        words = tl.load(words_ptr + e, mask=e < E, other=0, volatile=True)
        empty = words == EMPTY
        if SHARED:
            gate_word = tl.load(words_ptr + E, volatile=True)
            empty |= gate_word == EMPTY  # before the maximum, so that all threads go round the loop as often
        missing = tl.max(empty.to(tl.int32), 0)
        tries += 1
    tl.store(words_ptr + e, tl.full((EP,), EMPTY, tl.int32), mask=e < E)
    gate = 0.0
    if SHARED:
        tl.store(words_ptr + E, EMPTY)
        gate = gate_word.to(tl.float32, bitcast=True)
    _choose_row(
        words.to(tl.float32, bitcast=True), gate, bias_ptr, ids_ptr, weights_ptr, t, scale,
        E, EP, K, KP, SIGMOID, BIAS, NORMALISE, SHARED,
    )  # fmt: skip


@triton.jit
def logits_tile(
    x_ptr, w_ptr, out_ptr, T, num_experts, H: tl.constexpr, STEPS: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BF16: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One share of H. A float32 router is split in three bfloat16 terms, which together hold its 24 bits."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    first = tl.program_id(2) * (STEPS * BK)
    k = tl.arange(0, BK)
    EVEN: tl.constexpr = H % (STEPS * BK) == 0
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


@triton.jit
def choose_rows(
    shares_ptr, bias_ptr, ids_ptr, weights_ptr, T, scale, S: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISE: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The choice of one row, by one warp, so that no step needs a barrier."""
    L: tl.constexpr = E + SHARED
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    logit = tl.zeros((EP,), tl.float32)
    gate = 0.0
    for share in tl.static_range(S):
        logit += tl.load(shares_ptr + (share * T + t) * L + e, mask=e < E, other=0.0)
        if SHARED:
            gate += tl.load(shares_ptr + (share * T + t) * L + E)
    _choose_row(logit, gate, bias_ptr, ids_ptr, weights_ptr, t, scale, E, EP, K, KP, SIGMOID, BIAS, NORMALISE, SHARED)


@triton.jit
def _choose_row(
    logit, gate, bias_ptr, ids_ptr, weights_ptr, t, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Integers of the scores' order, since a maximum of integers over a warp is one instruction."""
    LOWEST: tl.constexpr = -(1 << 31)
    TAKEN: tl.constexpr = K + SHARED
    e = tl.arange(0, EP)
    k = tl.arange(0, KP)
    own = tl.where(e < E, _ordered(logit), LOWEST)
    top = _from_ordered(tl.max(own, 0))
    total = 1.0
    # A sum that the weights' own sum cancels, unless a bias may choose experts of next to no score.
    if not SIGMOID and (BIAS or not NORMALISE):
        total = tl.sum(tl.where(e < E, tl.exp(logit - top), 0.0), 0)
    keys = own
    if BIAS:
        by = _score(logit, top, total, SIGMOID) + tl.load(bias_ptr + e, mask=e < E, other=0.0)
        keys = tl.where(e < E, _ordered(by), LOWEST)
    ids = tl.zeros((KP,), tl.int32)
    chosen = tl.zeros((KP,), tl.int32)
    for choice in tl.static_range(K):
        best = tl.max(keys, 0)
        expert = tl.min(tl.where(keys == best, e, EP - 1), 0)
        if BIAS:
            best = tl.max(tl.where(e == expert, own, LOWEST), 0)
        keys = tl.where(e == expert, LOWEST, keys)
        ids = tl.where(k == choice, expert, ids)
        chosen = tl.where(k == choice, best, chosen)
    weights = tl.where(k < K, _score(_from_ordered(chosen), top, total, SIGMOID), 0.0)
    if NORMALISE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(ids_ptr + t * TAKEN + k, ids, mask=k < K)
    tl.store(weights_ptr + t * TAKEN + k, weights * scale, mask=k < K)
    if SHARED:
        tl.store(ids_ptr + t * TAKEN + K, E)
        tl.store(weights_ptr + t * TAKEN + K, 1 / (1 + tl.exp(-gate)))


@triton.jit
def _ordered(x):
    """-0.0 equals 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _score(logit, top, total, SIGMOID: tl.constexpr):
    if SIGMOID:
        return 1 / (1 + tl.exp(-logit))
    else:
        return tl.exp(logit - top) / total


_CHOICES: Final[dict[str, dict[str, Any]]] = {
    "": _constants(_Rule(8, True, shared=True), 257),
    " sigmoid": _constants(_Rule(22, True, "sigmoid", torch.empty(0)), 512),
}


def compile_cases() -> list[CompileCase]:
    sizes = {"T": "i32", "num_experts": "i32"}
    plain = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*fp32"} | sizes
    exact = plain | {"w_ptr": "*fp32"}
    choice = {"bias_ptr": "*fp32", "ids_ptr": "*i32", "weights_ptr": "*fp32", "T": "i32", "scale": "fp32"}
    few = {"x_ptr": "*bf16", "w_ptr": "*bf16", "words_ptr": "*i32"} | choice
    cases = []
    for hidden, rule, router in ((2048, "", "*bf16"), (2688, " sigmoid", "*fp32"), (7168, "", "*bf16")):
        shape = {"H": hidden, "BH": triton.next_power_of_2(hidden), **_CHOICES[rule]}
        options = {"num_warps": _few_warps(hidden)}
        cases += pdl_cases(f"route_few {hidden}{rule}", route_few, few | {"w_ptr": router}, options, **shape)
    for rows, signature in ((64, plain), (512, plain), (1024, plain), (4096, plain), (64, exact), (4096, exact)):
        bt, be, bk, shares, warps, stages = logits_tiles(
            rows, 256, 2048, torch.float32 if signature is exact else torch.bfloat16
        )
        name = f"logits_tile {rows}{' float32' * (signature is exact)}"
        tile = {"H": 2048, "STEPS": 2048 // (bk * shares), "BT": bt, "BE": be, "BK": bk, "BF16": True}
        cases += pdl_cases(name, logits_tile, signature, {"num_warps": warps, "num_stages": stages}, **tile)
    for rule, constants in _CHOICES.items():
        signature = {"shares_ptr": "*fp32"} | choice
        cases += pdl_cases(f"choose_rows{rule}", choose_rows, signature, {"num_warps": 1}, **constants, S=1)
    return cases
