"""The next token of each row of logits, in two launches: the peak of every block of logits, and a program for each row
that chooses.

Greedy rows need the blocks' peaks and one block. Rows that are drawn also have each block's sum of weights, where a
token's weight is exp((logit - peak) / temperature). top_k and top_p keep the largest logits, so each is a threshold
(kernels/sample_threshold.py) and a number of tokens equal to it that stay, lowest ids first. Nothing synchronises with
the host. The sums of a row have a fixed order, whatever the batch.

Letters: B rows, V tokens, b blocks of a row, n tokens of a block.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.sample_threshold import find_threshold, key_of, list_blocks, load_listed, value_of, weights_of
from moe_nvfp4.kernels.sizes import cdiv, next_power_of_2
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases, use_twin

MAX_TOKENS: Final = 262144  # the largest V; a program holds the peaks of all blocks
# On an H200 with 248320 float32 logits, a row alone takes 31.0 us with top_k 20 and top_p 0.8, 21.2 with top_p 0.9;
# with blocks of 64, 128 of them in registers, 39.9 and 27.8; with 16 warps 34.3 and 23.1.
_BLOCK: Final = 128
_IN_REGISTERS: Final = 64  # blocks
_WARPS: Final = 8
_SHIFT: Final = {torch.float32: 0, torch.bfloat16: 16}  # bits that are the same in all logits
_FEW: Final = 16  # rows
# Blocks a program, and warps: 16 rows of bfloat16 take 5.1 us with these, 7.2 with (8, 4); 256 take 41 and, with
# (16, 8), 47.
_SUMMARY_FEW: Final = (16, 8)
_SUMMARY_MANY: Final = (32, 4)


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
    blocks = cdiv(vocabulary, _BLOCK)
    summary = logits_BV.new_empty(2, num_rows, blocks, dtype=torch.float32)
    scratch = logits_BV.new_empty(num_rows, 3, blocks, dtype=torch.int32)
    sampled = Sampled(
        logits_BV.new_empty(num_rows, dtype=torch.int32), logits_BV.new_empty(num_rows, dtype=torch.float32)
    )
    options = launch_options(logits_BV)
    tile, warps = _SUMMARY_FEW if num_rows <= _FEW else _SUMMARY_MANY
    summarise_blocks[(cdiv(blocks, tile), num_rows)](
        logits_BV, rows.temperature, *summary, vocabulary, blocks, N=_BLOCK, TILE=tile, num_warps=warps, **options
    )
    choose_tokens[(num_rows,)](
        logits_BV, *summary, *rows, scratch, *sampled, vocabulary, blocks,
        N=_BLOCK, BP=next_power_of_2(blocks), HELD=_IN_REGISTERS,
        SHIFT=_SHIFT[logits_BV.dtype], num_warps=_WARPS, **options,
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


def logprobs(logits_BV: Tensor, token_ids_B: Tensor, k: int, *, batch_invariant: bool = False) -> Logprobs:
    """log_softmax of the logits as given: of the chosen tokens, and the k largest. No synchronisation.
    `batch_invariant`: sums row by row, since torch adds up in an order that depends on the number of rows."""
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    parts = logits_BV.split(1) if batch_invariant else [logits_BV]
    total_B1 = torch.cat([part.logsumexp(dim=1, keepdim=True) for part in parts])
    chosen_B = (logits_BV.gather(1, token_ids_B[:, None].long()) - total_B1).squeeze(1)
    k = min(k, logits_BV.shape[1])
    if k == 0:
        return Logprobs(chosen_B, token_ids_B.new_empty(len(chosen_B), 0, dtype=torch.int64), total_B1[:, :0])
    # topk does not say which of several equal values it keeps; its k-th value is certain.
    least_B1 = logits_BV.topk(k, dim=1).values[:, -1:]
    above_BV, equal_BV = logits_BV > least_B1, logits_BV == least_B1
    places_B1 = k - above_BV.sum(dim=1, keepdim=True)
    kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(dim=1, dtype=torch.int32) <= places_B1))
    from_end_V = torch.arange(logits_BV.shape[1], 0, -1, dtype=torch.int32, device=logits_BV.device)
    ids_BK = logits_BV.shape[1] - (from_end_V * kept_BV).topk(k, dim=1).values.long()
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
        weights = weights_of(x, tl.where(top == float("-inf"), 0.0, top)[:, None], _scale(temperature))
        tl.store(sums_ptr + row * blocks + b, tl.sum(weights, 1), mask=b < blocks)


@triton.jit
def choose_tokens(
    logits_ptr, tops_ptr, sums_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, scratch_ptr,
    token_ptr, peaks_ptr, V, blocks, N: tl.constexpr, BP: tl.constexpr, HELD: tl.constexpr, SHIFT: tl.constexpr,
    PDL: tl.constexpr,
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
            N, BP, HELD, SHIFT,
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
    N: tl.constexpr, BP: tl.constexpr, HELD: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Kept are tokens above the threshold, and of those equal to it the first `ties`."""
    b = tl.arange(0, BP)
    top_keys = tl.where(tops == float("-inf"), -(1 << 31), key_of(tops, SHIFT))
    # Lighter tokens than 2^-120 of the peak count as excluded, so that no weight is a denormal.
    floor = key_of(tl.maximum(peak - 120.0 / scale, -3.4e38), SHIFT)
    mass = tl.where(top_keys >= floor, sums * weights_of(tops, peak, scale), 0.0)
    total = tl.sum(mass, 0)
    threshold, ties = floor - 1, 0
    filtered = min_p > 0
    if (top_k > 0) & (top_k < V):
        threshold, ties, total = find_threshold(
            logits_ptr, top_keys, mass, peak, scale, top_k.to(tl.float32), 0.0, threshold, ties, scratch_ptr, V, blocks,
            N, BP, HELD, SHIFT, True,
        )  # fmt: skip
        filtered = True
    if top_p < 1:
        threshold, ties, total = find_threshold(
            logits_ptr, top_keys, mass, peak, scale, top_p * total, total - top_p * total, threshold, ties,
            scratch_ptr, V, blocks, N, BP, HELD, SHIFT, False,
        )  # fmt: skip
        filtered = True
    least = value_of(threshold, SHIFT)
    tie_weight = weights_of(least, peak, scale)
    equal = tl.zeros((BP,), tl.int32)
    if filtered:
        ties = tl.where(tie_weight >= min_p, ties, 0)
        active = top_keys > threshold - (ties > 0).to(tl.int32)
        count = list_blocks(scratch_ptr, active, b)
        for first in tl.range(0, count, HELD, num_stages=3):
            at, x = load_listed(logits_ptr, scratch_ptr, first, count, V, HELD, N)
            weight = weights_of(x, peak, scale)
            above = tl.where((x > least) & (weight >= min_p), weight, 0.0)
            listed = first + tl.arange(0, HELD) < count
            tl.store(scratch_ptr + blocks + at, tl.sum(above, 1).to(tl.int32, bitcast=True), mask=listed)
            tl.store(scratch_ptr + 2 * blocks + at, tl.sum((x == least).to(tl.int32), 1), mask=listed)
        tl.debug_barrier()
        mass = tl.load(scratch_ptr + blocks + b, mask=active, other=0).to(tl.float32, bitcast=True)
        equal = tl.load(scratch_ptr + 2 * blocks + b, mask=active, other=0)
    left = tl.maximum(ties - (tl.cumsum(equal, 0) - equal), 0)  # of the ties, before this block
    mass += tl.minimum(left, equal).to(tl.float32) * tie_weight
    block, target = _first_above(mass, b, tl.cumsum(mass, 0), uniform)
    ids = block * N + tl.arange(0, N)
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    weight = weights_of(x, peak, scale)
    same = (x == least).to(tl.int32)
    tie = (same > 0) & (tl.cumsum(same, 0) <= tl.sum(tl.where(b == block, left, 0), 0))
    kept = tl.where(((x > least) | tie) & (weight >= min_p), weight, 0.0)
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
def _scale(temperature):
    return 1.4426950408889634 / tl.minimum(tl.maximum(temperature, 2.0**-100), 2.0**100)


def compile_cases() -> list[CompileCase]:
    floats = ("temperature_ptr", "tops_ptr", "sums_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr", "peaks_ptr")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("top_k_ptr", "scratch_ptr", "token_ptr"), "*i32")
    types |= {"V": "i32", "blocks": "i32"}
    cases = []
    for name, dtype, shift in (("", "*fp32", 0), (" bfloat16", "*bf16", 16)):
        choose = types | {"logits_ptr": dtype}
        summary = {key: choose[key] for key in ("logits_ptr", "temperature_ptr", "tops_ptr", "sums_ptr", "V", "blocks")}
        for tile, warps in (_SUMMARY_FEW, _SUMMARY_MANY):
            cases += pdl_cases(
                f"summarise_blocks {tile}{name}", summarise_blocks, summary, {"num_warps": warps}, N=_BLOCK, TILE=tile
            )
        shape = {"N": _BLOCK, "BP": MAX_TOKENS // _BLOCK, "HELD": _IN_REGISTERS, "SHIFT": shift}
        cases += pdl_cases(f"choose_tokens{name}", choose_tokens, choose, {"num_warps": _WARPS}, **shape)
    return cases
