# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
"""Pairs (row, choice) grouped by expert: one launch up to 4096 pairs, two beyond.

Letters: T rows, K choices of a row, N = T K pairs, E experts.
"""

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import ARCHITECTURES, CompileCase

ONE_LAUNCH_PAIRS: Final = 4096
_BLOCK: Final = 256  # pairs compared with each other at a time
_MAX_BLOCKS: Final = 128  # of pairs; each program of the scatter reads the counts of all


class SortedPairs(NamedTuple):
    order: Tensor  # int32 [T K]: indices row K + k, stable by expert, pairs with id -1 last
    offsets: Tensor  # int32 [E + 1]: pairs of expert e are order[offsets[e]:offsets[e + 1]]
    active: Tensor  # int32 [min(E, T K)]: experts that have pairs, ascending, then -1


def sort_pairs(expert_ids_TK: Tensor, num_experts: int) -> SortedPairs:
    """Ids are int32, -1 or 0 to E - 1; a row may name an expert twice."""
    if use_twin(expert_ids_TK):
        return sort_pairs_twin(expert_ids_TK, num_experts)
    num_pairs = expert_ids_TK.numel()
    ids = expert_ids_TK.contiguous()
    pairs = empty_pairs(ids, num_pairs, num_experts)
    options = launch_options(ids)
    if num_pairs <= ONE_LAUNCH_PAIRS:
        block = _rank_block(num_pairs)
        rank_pairs[(triton.cdiv(num_pairs, block) + 1,)](
            ids, *pairs, num_pairs, pairs.active.numel(),
            E=num_experts, EP=triton.next_power_of_2(num_experts), BI=block, BJ=128, num_warps=4, **options,
        )  # fmt: skip
        return pairs
    chunks = triton.cdiv(num_pairs, _BLOCK * _MAX_BLOCKS)
    blocks = triton.cdiv(num_pairs, _BLOCK * chunks)
    bins = triton.next_power_of_2(num_experts + 1)
    counts, ranks = ids.new_empty(blocks, bins), ids.new_empty(num_pairs)
    count_pairs[(blocks,)](
        ids, counts, ranks, num_pairs, chunks, E=num_experts, BINS=bins, B=_BLOCK, BJ=32, num_warps=8, **options
    )  # fmt: skip
    scatter_pairs[(blocks,)](
        ids, counts, ranks, *pairs, num_pairs, chunks, blocks, pairs.active.numel(),
        E=num_experts, BINS=bins, B=_BLOCK, BB=16, num_warps=8, **options,
    )  # fmt: skip
    return pairs


def sort_pairs_twin(expert_ids_TK: Tensor, num_experts: int) -> SortedPairs:
    flat = expert_ids_TK.flatten().long()
    keys = torch.where(flat < 0, num_experts, flat)
    experts = torch.arange(num_experts, device=keys.device)
    counts = (keys[:, None] == experts).sum(dim=0)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(dim=0)))
    active = torch.where(counts > 0, experts, num_experts).sort().values[: min(num_experts, keys.numel())]
    active = torch.where(active == num_experts, -1, active)
    return SortedPairs(keys.argsort(stable=True).int(), offsets.int(), active.int())


def empty_pairs(like: Tensor, num_pairs: int, num_experts: int) -> SortedPairs:
    return SortedPairs(
        like.new_empty(num_pairs), like.new_empty(num_experts + 1), like.new_empty(min(num_experts, num_pairs))
    )


def use_twin(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or not (tensor.is_cuda or triton.knobs.runtime.interpret)


def launch_options(tensor: Tensor) -> dict[str, Any]:
    """With PDL a program may start while the kernel before it still runs; it waits before it touches its data."""
    pdl = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _rank_block(num_pairs: int) -> int:
    return 32 if num_pairs <= 2048 else 64


@triton.jit
def store_summary(counts, offsets_ptr, active_ptr, active_size, E: tl.constexpr, EP: tl.constexpr):
    """Offsets and active experts from the counts [EP]; returns where each expert's pairs start."""
    e = tl.arange(0, EP)
    ends = tl.cumsum(counts, 0)
    tl.store(offsets_ptr + e + 1, ends, mask=e < E)
    tl.store(offsets_ptr + e, tl.zeros((EP,), tl.int32), mask=e == 0)
    has = ((counts > 0) & (e < E)).to(tl.int32)
    slot = tl.cumsum(has, 0) - has
    tl.store(active_ptr + slot, e, mask=has > 0)
    tl.store(active_ptr + e, tl.full((EP,), -1, tl.int32), mask=(e >= tl.sum(has)) & (e < active_size))
    return ends - counts


@triton.jit
def rank_pairs(
    ids_ptr, order_ptr, offsets_ptr, active_ptr, N, active_size,
    E: tl.constexpr, EP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A pair's place is the number of pairs with smaller (expert, index). The last program counts the experts."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    j = tl.arange(0, BJ)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        counts = tl.zeros((EP,), tl.int32)
        for begin in range(0, N, BJ):
            ids = tl.load(ids_ptr + begin + j, mask=begin + j < N, other=-1)
            counts += tl.histogram(tl.maximum(ids, 0), EP, mask=ids >= 0)
        store_summary(counts, offsets_ptr, active_ptr, active_size, E, EP)
    else:
        i = tl.program_id(0) * BI + tl.arange(0, BI)
        own = tl.load(ids_ptr + i, mask=i < N, other=-1)
        key = tl.where(own < 0, E, own) * N + i
        smaller = tl.zeros((BI, BJ), tl.int32)
        for begin in range(0, N, BJ):
            ids = tl.load(ids_ptr + begin + j, mask=begin + j < N, other=-1)
            keys = tl.where(begin + j < N, tl.where(ids < 0, E, ids) * N + begin + j, (E + 1) * N)
            smaller += (keys[None, :] < key[:, None]).to(tl.int32)
        tl.store(order_ptr + tl.sum(smaller, 1), i, mask=i < N)


@triton.jit
def count_pairs(
    ids_ptr, counts_ptr, ranks_ptr, N, chunks,
    E: tl.constexpr, BINS: tl.constexpr, B: tl.constexpr, BJ: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of `chunks` times B pairs: how many each expert has, and each pair's rank among those of its expert."""
    block = tl.program_id(0)
    b = tl.arange(0, B)
    counts = tl.zeros((BINS,), tl.int32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for chunk in range(chunks):
        i = (block * chunks + chunk) * B + b
        ids = tl.load(ids_ptr + i, mask=i < N, other=-1)
        key = tl.where(ids < 0, E, ids)
        earlier = tl.zeros((B, BJ), tl.int32)
        for part in range(0, B, BJ):
            j = part + tl.arange(0, BJ)
            at = (block * chunks + chunk) * B + j
            other = tl.load(ids_ptr + at, mask=at < N, other=-1)
            same = tl.where(other < 0, E, other)[None, :] == key[:, None]
            earlier += (same & (j[None, :] < b[:, None])).to(tl.int32)
        tl.store(ranks_ptr + i, tl.sum(earlier, 1) + tl.gather(counts, key, 0), mask=i < N)
        counts += tl.histogram(key, BINS, mask=i < N)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit
def scatter_pairs(
    ids_ptr, counts_ptr, ranks_ptr, order_ptr, offsets_ptr, active_ptr, N, chunks, blocks, active_size,
    E: tl.constexpr, BINS: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A pair's place: pairs of smaller experts, of its expert in earlier blocks, and in its block before it."""
    block = tl.program_id(0)
    e = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, blocks, BB):
        row = first + tl.arange(0, BB)
        counts = tl.load(counts_ptr + row[:, None] * BINS + e[None, :], mask=(row < blocks)[:, None], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((row < block)[:, None], counts, 0), 0)
    if block == 0:
        store_summary(total, offsets_ptr, active_ptr, active_size, E, BINS)
    base = tl.cumsum(total, 0) - total + before
    for chunk in range(chunks):
        i = (block * chunks + chunk) * B + tl.arange(0, B)
        ids = tl.load(ids_ptr + i, mask=i < N, other=-1)
        rank = tl.load(ranks_ptr + i, mask=i < N, other=0)
        tl.store(order_ptr + tl.gather(base, tl.where(ids < 0, E, ids), 0) + rank, i, mask=i < N)


def compile_cases() -> list[CompileCase]:
    pairs = dict.fromkeys(("order_ptr", "offsets_ptr", "active_ptr"), "*i32") | {"active_size": "i32", "N": "i32"}
    ids = {"ids_ptr": "*i32"}
    block = {"ids_ptr": "*i32", "counts_ptr": "*i32", "ranks_ptr": "*i32", "chunks": "i32"}
    return [
        *pdl_cases("rank_pairs", rank_pairs, ids | pairs, {"num_warps": 4}, E=256, EP=256, BI=32, BJ=128),
        *pdl_cases("count_pairs", count_pairs, block | {"N": "i32"}, {"num_warps": 8}, E=512, BINS=1024, B=_BLOCK, BJ=32),
        *pdl_cases(
            "scatter_pairs", scatter_pairs, block | pairs | {"blocks": "i32"}, {"num_warps": 8},
            E=512, BINS=1024, B=_BLOCK, BB=16,
        ),
    ]  # fmt: skip


def pdl_cases(
    name: str, function: Any, signature: dict[str, str], options: dict[str, int], **constexprs: Any
) -> list[CompileCase]:
    """As `launch_options` has it: dependent launch from sm_90 on."""
    return [
        CompileCase(
            name=name,
            function=function,
            signature=signature,
            constexprs={**constexprs, "PDL": pdl},
            options={**options, **({"launch_pdl": True} if pdl else {})},
            architectures=tuple(a for a in ARCHITECTURES if (a >= 90) == pdl),
        )
        for pdl in (False, True)
    ]
