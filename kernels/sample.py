"""The next token of each row of logits, in two launches: the peak of every block of 64 logits, and a program for each
row that chooses.

Greedy rows need the blocks' peaks and one block. Rows that are drawn also have each block's sum of weights, where a
token's weight is exp((logit - peak) / temperature). top_k and top_p keep the largest logits, so each is a threshold and
a number of tokens equal to it that stay, lowest ids first. The threshold is found by bisection over float bit patterns:
blocks' peaks and sums bound it from below, and the few blocks that reach the bound are read once into registers. When
too many reach it, passes over those blocks compare with three thresholds at a time. Nothing is sorted, and nothing
synchronises with the host. The sums of a row have a fixed order, whatever the batch.

Letters: B rows, V tokens, b blocks of a row, n tokens of a block.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases, use_twin

MAX_TOKENS: Final = 262144  # the largest V; a program holds the peaks of all blocks
_BLOCK: Final = 64
_IN_REGISTERS: Final = 128  # blocks
_WARPS: Final = 8


class SamplingRows(NamedTuple):
    """What each row asks for, on the device."""

    temperature: Tensor  # float32 [B]; 0 is greedy, others are taken into 2^-100 to 2^100
    top_k: Tensor  # int32 [B]; 0 is off
    top_p: Tensor  # float32 [B]; 1 is off
    min_p: Tensor  # float32 [B]; 0 is off
    uniform: Tensor  # float32 [B] in [0, 1): the row's random number

    @classmethod
    def views(cls, packed: Tensor) -> "SamplingRows":
        """The five lines of one float32 [5, B], which one copy fills; top_k holds the bits of integers."""
        temperature, top_k, top_p, min_p, uniform = packed.unbind(0)
        return cls(temperature, top_k.view(torch.int32), top_p, min_p, uniform)


class Sampled(NamedTuple):
    token_ids: Tensor  # int32 [B]; of a row whose peak is not finite any valid id
    peaks: Tensor  # float32 [B]: the largest logit, NaN if any is; the host looks when it reads the tokens


def sample(logits_BV: Tensor, rows: SamplingRows) -> Sampled:
    """Logits are float32 or bfloat16. Filters run in the order temperature, top_k, top_p, min_p, each on what the one
    before it left. The draw is by inverse CDF in ascending token id; a greedy row takes the lowest id of equal peaks.
    """
    if use_twin(logits_BV):
        return sample_twin(logits_BV, rows)
    (num_rows, vocabulary), logits_BV = logits_BV.shape, logits_BV.contiguous()
    assert vocabulary <= MAX_TOKENS, f"expected at most {MAX_TOKENS} logits a row, got {vocabulary}"
    blocks = triton.cdiv(vocabulary, _BLOCK)
    summary = logits_BV.new_empty(2, num_rows, blocks, dtype=torch.float32)
    scratch = logits_BV.new_empty(num_rows, 3, blocks, dtype=torch.int32)
    sampled = Sampled(
        logits_BV.new_empty(num_rows, dtype=torch.int32), logits_BV.new_empty(num_rows, dtype=torch.float32)
    )
    options = launch_options(logits_BV)
    tile = 32 if num_rows <= 16 else 64
    summarise_blocks[(triton.cdiv(blocks, tile), num_rows)](
        logits_BV, rows.temperature, *summary, vocabulary, blocks, N=_BLOCK, TILE=tile, num_warps=4, **options
    )
    choose_tokens[(num_rows,)](
        logits_BV, *summary, *rows, scratch, *sampled, vocabulary, blocks,
        N=_BLOCK, BP=triton.next_power_of_2(blocks), HELD=_IN_REGISTERS, num_warps=_WARPS, **options,
    )  # fmt: skip
    return sampled


def sample_twin(logits_BV: Tensor, rows: SamplingRows) -> Sampled:
    """In float64."""
    if logits_BV.numel() == 0:
        return Sampled(logits_BV.new_empty(0, dtype=torch.int32), logits_BV.new_empty(0, dtype=torch.float32))
    peaks, token_ids = logits_BV.max(dim=1)  # documented to return the first of equal maxima, and NaN if any
    for row in ((rows.temperature > 0) & peaks.isfinite()).nonzero().flatten():
        token_ids[row] = _draw_twin(logits_BV[row].double() - peaks[row].double(), *(field[row] for field in rows))
    return Sampled(token_ids.int(), peaks.float())


def _draw_twin(
    shifted_V: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """`shifted_V`: logits minus their maximum, so that no temperature can overflow them."""
    weights = (shifted_V / temperature.double().clamp(2.0**-100, 2.0**100)).exp()
    ids = torch.arange(len(weights), device=weights.device)
    if top_k > 0 or top_p < 1:
        # Ranked by logits: a high temperature rounds different ones to the same weight.
        ids = shifted_V.sort(descending=True, stable=True).indices[: int(top_k) or None]
    if top_p < 1:
        mass = weights[ids].cumsum(0)
        ids = ids[: int((mass < top_p.double() * mass[-1]).sum()) + 1]
    ids = ids[weights[ids] >= min_p.double()].sort().values  # the largest weight is 1
    cdf = weights[ids].cumsum(0)
    # right=True steps over tokens of weight 0. The product can round up to the total, past the end; the second search
    # is the last token with any weight.
    position = torch.searchsorted(cdf, cdf[-1] * uniform.double(), right=True)
    return ids[torch.minimum(position, torch.searchsorted(cdf, cdf[-1]))]


class Logprobs(NamedTuple):
    chosen_B: Tensor  # float32
    ids_BK: Tensor  # int64, likeliest first, the lowest id first among equals
    values_BK: Tensor  # float32


def logprobs(logits_BV: Tensor, token_ids_B: Tensor, k: int) -> Logprobs:
    """log_softmax of the logits as given: of the chosen tokens, and the k largest. No synchronisation."""
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    total_B1 = logits_BV.logsumexp(dim=1, keepdim=True)
    chosen_B = (logits_BV.gather(1, token_ids_B[:, None].long()) - total_B1).squeeze(1)
    k = min(k, logits_BV.shape[1])
    if k == 0:
        return Logprobs(chosen_B, token_ids_B.new_empty(len(chosen_B), 0, dtype=torch.int64), total_B1[:, :0])
    # topk does not say which of several equal values it keeps; its k-th value is certain.
    least_B1 = logits_BV.topk(k, dim=1).values[:, -1:]
    above_BV, equal_BV = logits_BV > least_B1, logits_BV == least_B1
    places_B1 = k - above_BV.sum(dim=1, keepdim=True)
    kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(dim=1) <= places_B1))
    ids_BK = torch.arange(logits_BV.shape[1], 0, -1, device=logits_BV.device).expand_as(kept_BV)
    ids_BK = logits_BV.shape[1] - (ids_BK * kept_BV).topk(k, dim=1).values
    values_BK, order_BK = logits_BV.gather(1, ids_BK).sort(dim=1, descending=True, stable=True)
    return Logprobs(chosen_B, ids_BK.gather(1, order_BK), values_BK - total_B1)


@triton.jit
def summarise_blocks(
    logits_ptr, temperature_ptr, tops_ptr, sums_ptr, V, blocks, N: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Each block's peak, NaN if any logit is; and of a row that is drawn its weights' sum, the peak's being 1."""
    row = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * TILE + tl.arange(0, TILE)
    ids = b[:, None] * N + tl.arange(0, N)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = tl.load(temperature_ptr + row)
    x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    bad = tl.max((x != x).to(tl.int32), 1) > 0
    tl.store(tops_ptr + row * blocks + b, tl.where(bad, float("nan"), top), mask=b < blocks)
    if temperature > 0:
        weights = _weights(x, tl.where(top == float("-inf"), 0.0, top)[:, None], _scale(temperature))
        tl.store(sums_ptr + row * blocks + b, tl.sum(weights, 1), mask=b < blocks)


@triton.jit
def choose_tokens(
    logits_ptr, tops_ptr, sums_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, scratch_ptr,
    token_ptr, peaks_ptr, V, blocks, N: tl.constexpr, BP: tl.constexpr, HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BP)
    logits_ptr += row * V
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = tl.load(temperature_ptr + row)
    tops = tl.load(tops_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    bad = tl.max((tops != tops).to(tl.int32), 0) > 0
    peak = tl.where(bad, float("nan"), tl.max(tops, 0))
    tl.store(peaks_ptr + row, peak)
    if (temperature > 0) & (peak - peak == 0.0):
        sums = tl.load(sums_ptr + row * blocks + b, mask=b < blocks, other=0.0)
        token = _draw(
            logits_ptr, tops, sums, peak, _scale(temperature), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row),
            tl.load(min_p_ptr + row), tl.load(uniform_ptr + row), scratch_ptr + row * 3 * blocks, V, blocks,
            N, BP, HELD,
        )  # fmt: skip
        tl.store(token_ptr + row, token)
    else:
        block = tl.min(tl.where(tops == peak, b, BP), 0)
        ids = tl.where(block == BP, 0, block) * N + tl.arange(0, N)
        x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        token = tl.min(tl.where(x == peak, ids, V), 0)
        tl.store(token_ptr + row, tl.where(token == V, 0, token))


@triton.jit
def _draw(
    logits_ptr, tops, sums, peak, scale, top_k, top_p, min_p, uniform, scratch_ptr, V, blocks,
    N: tl.constexpr, BP: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Kept are tokens above the threshold, and of those equal to it the first `ties`."""
    b = tl.arange(0, BP)
    top_keys = tl.where(tops == float("-inf"), -(1 << 31), _key(tops))
    # Lighter tokens than 2^-120 of the peak count as excluded, so that no weight is a denormal.
    floor = _key(tl.maximum(peak - 120.0 / scale, -3.4e38))
    mass = tl.where(top_keys >= floor, sums * _weights(tops, peak, scale), 0.0)
    total = tl.sum(mass, 0)
    threshold, ties = floor - 1, 0
    filtered = min_p > 0
    if (top_k > 0) & (top_k < V):
        threshold, ties, total = _threshold(
            logits_ptr, top_keys, mass, peak, scale, top_k.to(tl.float32), 0.0, threshold, ties, scratch_ptr, V, blocks,
            N, BP, HELD, True,
        )  # fmt: skip
        filtered = True
    if top_p < 1:
        threshold, ties, total = _threshold(
            logits_ptr, top_keys, mass, peak, scale, top_p * total, total - top_p * total, threshold, ties,
            scratch_ptr, V, blocks, N, BP, HELD, False,
        )  # fmt: skip
        filtered = True
    tie_weight = _weights(_value(threshold), peak, scale)
    equal = tl.zeros((BP,), tl.int32)
    if filtered:
        ties = tl.where(tie_weight >= min_p, ties, 0)
        active = top_keys > threshold - (ties > 0).to(tl.int32)
        count = _list(scratch_ptr, active, b)
        for first in range(0, count, 32):
            at, x = _listed(logits_ptr, scratch_ptr, first, count, V, 32, N)
            key, weight = _key(x), _weights(x, peak, scale)
            above = tl.where((key > threshold) & (weight >= min_p), weight, 0.0)
            listed = first + tl.arange(0, 32) < count
            tl.store(scratch_ptr + blocks + at, tl.sum(above, 1).to(tl.int32, bitcast=True), mask=listed)
            tl.store(scratch_ptr + 2 * blocks + at, tl.sum((key == threshold).to(tl.int32), 1), mask=listed)
        tl.debug_barrier()
        mass = tl.load(scratch_ptr + blocks + b, mask=active, other=0).to(tl.float32, bitcast=True)
        equal = tl.load(scratch_ptr + 2 * blocks + b, mask=active, other=0)
    left = tl.maximum(ties - (tl.cumsum(equal, 0) - equal), 0)  # of the ties, before this block
    mass += tl.minimum(left, equal).to(tl.float32) * tie_weight
    block, target = _first_above(mass, b, tl.cumsum(mass, 0), uniform)
    ids = block * N + tl.arange(0, N)
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    key, weight = _key(x), _weights(x, peak, scale)
    same = (key == threshold).to(tl.int32)
    tie = (same > 0) & (tl.cumsum(same, 0) <= tl.sum(tl.where(b == block, left, 0), 0))
    kept = tl.where(((key > threshold) | tie) & (weight >= min_p), weight, 0.0)
    hit = (kept > 0) & (tl.cumsum(kept, 0) > target)
    token = tl.min(tl.where(hit, ids, V), 0)
    last = tl.max(tl.where(kept > 0, ids, 0), 0)
    return tl.where(token == V, last, token)


@triton.jit
def _first_above(mass, b, cdf, uniform):
    """The block in which the CDF passes `uniform`, or the last with any mass; and how far into it."""
    target = tl.max(cdf, 0) * uniform
    block = tl.min(tl.where((mass > 0) & (cdf > target), b, 1 << 30), 0)
    block = tl.where(block == 1 << 30, tl.max(tl.where(mass > 0, b, 0), 0), block)
    return block, target - tl.sum(tl.where(b == block, cdf - mass, 0.0), 0)


@triton.jit
def _threshold(
    logits_ptr, top_keys, mass, peak, scale, target, tail, low, ties, scratch_ptr, V, blocks,
    N: tl.constexpr, BP: tl.constexpr, HELD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The largest key such that tokens from it up reach `target`, in number or in mass; how many equal to it are
    needed; and the mass of all these. With mass, tokens below it may weigh at most `tail`.

    `low` and `ties` are what a filter before this left. The bracket: tokens from `low` up reach the target, and those
    from `high` up, which number `count` and weigh `weight`, do not.
    """
    b = tl.arange(0, BP)
    old_low, old_ties = low, ties
    low = tl.where(ties > 0, low, low + 1)
    high = _key(peak) + 1
    count, weight = 0.0, 0.0
    # Bounds from blocks: as many tokens as blocks reach the peak of each; what lies below a key in a block weighs no
    # more than the block, nor than N times the key's weight.
    above, step = high, 0
    active = top_keys >= low
    number = tl.sum(active.to(tl.int32), 0)
    while (number > HELD) & (low + 1 < above) & (step < 16):
        middle = _between(low, above, 0.5)
        if COUNT:
            below = tl.sum((top_keys >= middle).to(tl.float32), 0) >= target
        else:
            below = tl.sum(tl.minimum(mass, N * _weights(_value(middle), peak, scale)), 0) <= tail * 0.9999
        low, above = tl.where(below, middle, low), tl.where(below, above, middle)
        active = top_keys >= low
        number = tl.sum(active.to(tl.int32), 0)
        step += 1
    number = _list(scratch_ptr, active, b)
    step = 0
    while (number > HELD) & (low + 1 < high):
        first, second, third = _quarters(low, high, step)
        n1, n2, n3, w1, w2, w3 = _pass(
            logits_ptr, scratch_ptr, number, low, first, second, third, high, peak, scale, V, blocks, N, HELD // 4
        )  # fmt: skip
        n1, n2, n3, w1, w2, w3 = n1 + count, n2 + count, n3 + count, w1 + weight, w2 + weight, w3 + weight
        if COUNT:
            up1, up2, up3 = n1 >= target, n2 >= target, n3 >= target
        else:
            up1, up2, up3 = w1 >= target, w2 >= target, w3 >= target
        low = tl.where(up3, third, tl.where(up2, second, tl.where(up1, first, low)))
        high = tl.where(up3, high, tl.where(up2, third, tl.where(up1, second, first)))
        count = tl.where(up3, count, tl.where(up2, n3, tl.where(up1, n2, n1)))
        weight = tl.where(up3, weight, tl.where(up2, w3, tl.where(up1, w2, w1)))
        active &= tl.load(scratch_ptr + blocks + b, mask=active, other=0) > 0
        number = _list(scratch_ptr, active, b)
        step += 1
    if low + 1 < high:
        _, x = _listed(logits_ptr, scratch_ptr, 0, number, V, HELD, N)
        key = _key(x)
        inside = key < high
        if COUNT:
            worth, reached = tl.where(inside, 1.0, 0.0), count
        else:
            worth, reached = tl.where(inside, _weights(x, peak, scale), 0.0), weight
        while low + 1 < high:
            middle = (low & high) + ((low ^ high) >> 1)
            below = reached + tl.sum(tl.where(key >= middle, worth, 0.0)) >= target
            low, high = tl.where(below, middle, low), tl.where(below, high, middle)
        outside = inside & (key >= high)
        count += tl.sum(outside.to(tl.float32))
        weight += tl.sum(tl.where(outside, _weights(_value(key), peak, scale), 0.0))
    tie_weight = _weights(_value(low), peak, scale)
    if COUNT:
        ties = (target - count).to(tl.int32)
    else:
        ties = tl.minimum(tl.maximum(tl.ceil((target - weight) / tie_weight), 1.0), V).to(tl.int32)
        ties = tl.where(low == old_low, tl.minimum(ties, old_ties), ties)
    return low, ties, weight + ties * tie_weight


@triton.jit
def _pass(
    logits_ptr, scratch_ptr, number, low, first, second, third, high, peak, scale, V, blocks,
    N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of the listed blocks: number and weight of tokens from each threshold up to `high`, and which blocks have tokens
    in the bracket."""
    packed = tl.zeros((TILE, N), tl.int32)  # three numbers of 10 bits: tiles are fewer than 1024
    w1, w2, w3 = tl.zeros((TILE, N), tl.float32), tl.zeros((TILE, N), tl.float32), tl.zeros((TILE, N), tl.float32)
    for start in range(0, number, TILE):
        at, x = _listed(logits_ptr, scratch_ptr, start, number, V, TILE, N)
        key, weight = _key(x), _weights(x, peak, scale)
        inside = key < high
        weight = tl.where(inside, weight, 0.0)
        packed += tl.where(inside & (key >= first), 1, 0)
        packed += tl.where(inside & (key >= second), 1 << 10, 0)
        packed += tl.where(inside & (key >= third), 1 << 20, 0)
        w1 += tl.where(key >= first, weight, 0.0)
        w2 += tl.where(key >= second, weight, 0.0)
        w3 += tl.where(key >= third, weight, 0.0)
        has = tl.max((inside & (key >= low)).to(tl.int32), 1)
        tl.store(scratch_ptr + blocks + at, has, mask=start + tl.arange(0, TILE) < number)
    tl.debug_barrier()
    n1, n2, n3 = tl.sum(packed & 1023), tl.sum((packed >> 10) & 1023), tl.sum(packed >> 20)
    return n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32), tl.sum(w1), tl.sum(w2), tl.sum(w3)


@triton.jit
def _list(list_ptr, active, b):
    """Writes the active blocks in ascending order; how many they are."""
    rank = tl.cumsum(active.to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(list_ptr + rank - 1, b, mask=active)
    tl.debug_barrier()
    return tl.max(rank, 0)


@triton.jit
def _listed(logits_ptr, list_ptr, start, number, V, TILE: tl.constexpr, N: tl.constexpr):
    """Blocks of the list, their logits, -inf past the end."""
    place = start + tl.arange(0, TILE)
    at = tl.load(list_ptr + place, mask=place < number, other=0)
    ids = at[:, None] * N + tl.arange(0, N)[None, :]
    live = (place < number)[:, None] & (ids < V)
    return at, tl.load(logits_ptr + ids, mask=live, other=float("-inf")).to(tl.float32)


@triton.jit
def _quarters(low, high, step):
    """Three keys between two: by value while the bracket is wide, then by key, which ends for any values."""
    if step < 8:
        first, second, third = _between(low, high, 0.25), _between(low, high, 0.5), _between(low, high, 0.75)
    else:
        second = (low & high) + ((low ^ high) >> 1)
        first = tl.maximum((low & second) + ((low ^ second) >> 1), low + 1)
        third = (second & high) + ((second ^ high) >> 1)
    return first, second, third


@triton.jit
def _between(low, high, share):
    key = _key(_value(low) * (1 - share) + _value(high) * share)
    return tl.minimum(tl.maximum(key, low + 1), high - 1)


@triton.jit
def _key(x):
    """Integers in the order of floats; -0.0 equals 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scale(temperature):
    return 1.4426950408889634 / tl.minimum(tl.maximum(temperature, 2.0**-100), 2.0**100)


@triton.jit
def _weights(x, peak, scale):
    return tl.exp2((x - peak) * scale)


def compile_cases() -> list[CompileCase]:
    floats = ("temperature_ptr", "tops_ptr", "sums_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr", "peaks_ptr")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("top_k_ptr", "scratch_ptr", "token_ptr"), "*i32")
    types |= {"V": "i32", "blocks": "i32"}
    cases = []
    for name, dtype in (("", "*fp32"), (" bfloat16", "*bf16")):
        choose = types | {"logits_ptr": dtype}
        summary = {key: choose[key] for key in ("logits_ptr", "temperature_ptr", "tops_ptr", "sums_ptr", "V", "blocks")}
        for tile in (32, 64):
            cases += pdl_cases(
                f"summarise_blocks {tile}{name}", summarise_blocks, summary, {"num_warps": 4}, N=_BLOCK, TILE=tile
            )
        cases += pdl_cases(
            f"choose_tokens{name}", choose_tokens, choose, {"num_warps": _WARPS}, N=_BLOCK, BP=4096, HELD=_IN_REGISTERS
        )
    return cases
