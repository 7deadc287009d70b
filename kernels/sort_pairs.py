"""Pairs (row, choice) grouped by expert. Up to 4096 pairs a program for each expert looks at all ids; beyond, blocks of
pairs are counted, and a second launch adds the counts up and writes the order.

Counts are not specialised, here and wherever they depend on the rows of a step: a kernel would be compiled once more
for numbers that divide by 16, or are 1, while requests wait.

A run is some adjacent pairs of one expert: a program of a kernel that reads weights. An expert with many pairs is many
runs, so that none takes long.

Letters: T rows, K choices of a row, N = T K pairs, E experts, R at most so many runs.
"""

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import ARCHITECTURES, CompileCase
from moe_nvfp4.kernels.sizes import INTERPRETED, capability, cdiv, next_power_of_2

# Pairs of one launch, and warps for them: on an H200 2.2 us for 1024 pairs of 256 experts, 2.8 for 2048, 8.3 for 8192;
# two launches take 8.1 for 8192 and 13.8 for 32768.
_ONE_LAUNCH: Final = ((128, 1), (512, 2), (1024, 4), (2048, 4), (4096, 8))
_BLOCK: Final = 128  # pairs compared with each other at once; 256 spill
_MAX_BLOCKS: Final = 128  # of which each program of the second launch reads the counts


class SortedPairs(NamedTuple):
    order: Tensor  # int32 [T K]: indices row K + k, stable by expert, pairs with id -1 last
    offsets: Tensor  # int32 [E + 1]: pairs of expert e are order[offsets[e]:offsets[e + 1]]
    runs: Tensor  # int32 [3, R]: expert, first index into `order`, and number of pairs of each run; then -1, 0, 0
    run: int  # most pairs of a run


def sort_pairs(expert_ids_TK: Tensor, num_experts: int, run: int = 8) -> SortedPairs:
    """Ids are int32, -1 or 0 to E - 1; a row may name an expert twice."""
    if use_twin(expert_ids_TK):
        return sort_pairs_twin(expert_ids_TK, num_experts, run)
    ids, num_pairs = expert_ids_TK.contiguous(), expert_ids_TK.numel()
    num_runs = most_runs(num_pairs, num_experts, run)
    pairs = SortedPairs(ids.new_empty(num_pairs), ids.new_empty(num_experts + 1), ids.new_empty(3, num_runs), run)
    padded, options = next_power_of_2(num_experts), launch_options(ids)
    for block, warps in _ONE_LAUNCH:
        if num_pairs <= block:
            group_pairs[(num_experts + 2,)](
                ids, *pairs[:3], num_pairs, num_runs, run, E=num_experts, EP=padded, BN=block,
                num_warps=warps, **options,
            )  # fmt: skip
            return pairs
    chunks = cdiv(num_pairs, _BLOCK * _MAX_BLOCKS)
    blocks = cdiv(num_pairs, _BLOCK * chunks)
    counts, ranks = ids.new_empty(blocks, padded), ids.new_empty(num_pairs)
    count_pairs[(blocks,)](
        ids, counts, ranks, num_pairs, chunks, E=num_experts, EP=padded, B=_BLOCK, num_warps=4, **options
    )
    scatter_pairs[(blocks,)](
        ids, counts, ranks, *pairs[:3], num_pairs, chunks, blocks, num_runs, run,
        E=num_experts, EP=padded, B=_BLOCK, BB=_count_rows(padded), num_warps=8, **options,
    )  # fmt: skip
    return pairs


def sort_pairs_twin(expert_ids_TK: Tensor, num_experts: int, run: int = 8) -> SortedPairs:
    flat = expert_ids_TK.flatten().long()
    keys = torch.where(flat < 0, num_experts, flat)
    experts = torch.arange(num_experts, device=keys.device)
    counts = (keys[:, None] == experts).sum(dim=0)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(dim=0)))
    runs = torch.zeros(3, most_runs(keys.numel(), num_experts, run), dtype=torch.int32, device=keys.device)
    runs[0] = -1
    expert = experts.repeat_interleave((counts + run - 1) // run)
    nth = torch.arange(len(expert), device=keys.device) - torch.searchsorted(expert, expert)
    listed = torch.stack((expert, offsets[expert] + nth * run, (counts[expert] - nth * run).clamp(max=run)))
    runs[:, : len(expert)] = listed.int()
    return SortedPairs(keys.argsort(stable=True).int(), offsets.int(), runs, run)


def most_runs(num_pairs: int, num_experts: int, run: int) -> int:
    return num_pairs // run + min(num_experts, num_pairs)


def use_twin(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or not (tensor.is_cuda or INTERPRETED)


def launch_options(tensor: Tensor) -> dict[str, Any]:
    """With PDL a program may start while the kernel before it still runs; it waits before it touches its data."""
    pdl = tensor.is_cuda and capability(tensor.device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _count_rows(padded: int) -> int:
    """Blocks whose counts a program adds up at a time: 64 registers a thread."""
    return max(1, 16384 // padded)


@triton.jit(do_not_specialize=["N", "num_runs"])
def group_pairs(
    ids_ptr, order_ptr, offsets_ptr, runs_ptr, N, num_runs, run,
    E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program 0 counts the experts, 1 + e places the pairs of expert e, and 1 + E those with id -1."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.arange(0, BN)
    ids = tl.load(ids_ptr + n, mask=n < N, other=-1)
    if tl.program_id(0) == 0:
        counts = tl.histogram(tl.maximum(ids, 0), EP, mask=ids >= 0)
        _store_summary(counts, offsets_ptr, runs_ptr, num_runs, run, E, EP)
    else:
        expert = tl.program_id(0) - 1
        keys = tl.where(n < N, tl.where(ids < 0, E, ids), E + 1)
        mine = (keys == expert).to(tl.int32)
        start = tl.sum((keys < expert).to(tl.int32))
        tl.store(order_ptr + start + tl.cumsum(mine, 0) - mine, n, mask=mine > 0)


@triton.jit
def _store_summary(counts, offsets_ptr, runs_ptr, num_runs, run, E: tl.constexpr, EP: tl.constexpr):
    e = tl.arange(0, EP)
    ends = tl.cumsum(counts, 0)
    tl.store(offsets_ptr + e + 1, ends, mask=e < E)
    tl.store(offsets_ptr + e, tl.zeros((EP,), tl.int32), mask=e == 0)
    mine = (counts + run - 1) // run
    last = tl.cumsum(mine, 0)
    to, begins = runs_ptr + last - mine, ends - counts
    for nth in range(tl.max(mine)):
        live = nth < mine
        tl.store(to + nth, e, mask=live)
        tl.store(to + num_runs + nth, begins + nth * run, mask=live)
        tl.store(to + 2 * num_runs + nth, tl.minimum(counts - nth * run, run), mask=live)
    used = tl.sum(mine)
    for first in range(used, num_runs, EP):
        live = first + e < num_runs
        tl.store(runs_ptr + first + e, tl.full((EP,), -1, tl.int32), mask=live)
        tl.store(runs_ptr + num_runs + first + e, tl.zeros((EP,), tl.int32), mask=live)
        tl.store(runs_ptr + 2 * num_runs + first + e, tl.zeros((EP,), tl.int32), mask=live)


@triton.jit(do_not_specialize=["N", "chunks"])
def count_pairs(
    ids_ptr, counts_ptr, ranks_ptr, N, chunks,
    E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of `chunks` times B pairs: how many each expert has, and each pair's rank among those of its expert."""
    first = tl.program_id(0) * chunks * B
    b = tl.arange(0, B)
    counts = tl.zeros((EP,), tl.int32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for chunk in range(chunks):
        i = first + chunk * B + b
        ids = tl.load(ids_ptr + i, mask=i < N, other=-1)
        earlier = (ids[None, :] == ids[:, None]) & (b[None, :] < b[:, None])
        absent = chunk * B - tl.sum(counts)
        before = tl.where(ids < 0, absent, tl.gather(counts, tl.maximum(ids, 0), 0))
        tl.store(ranks_ptr + i, tl.sum(earlier.to(tl.int32), 1) + before, mask=i < N)
        counts += tl.histogram(tl.maximum(ids, 0), EP, mask=ids >= 0)
    tl.store(counts_ptr + tl.program_id(0) * EP + tl.arange(0, EP), counts)


@triton.jit(do_not_specialize=["N", "chunks", "blocks", "num_runs"])
def scatter_pairs(
    ids_ptr, counts_ptr, ranks_ptr, order_ptr, offsets_ptr, runs_ptr, N, chunks, blocks, num_runs, run,
    E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A pair's place: pairs of smaller experts, of its expert in earlier blocks, and in its block before it."""
    block = tl.program_id(0)
    e = tl.arange(0, EP)
    total = tl.zeros((EP,), tl.int32)
    earlier = tl.zeros((EP,), tl.int32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, blocks, BB):
        row = first + tl.arange(0, BB)
        counts = tl.load(counts_ptr + row[:, None] * EP + e[None, :], mask=(row < blocks)[:, None], other=0)
        total += tl.sum(counts, 0)
        earlier += tl.sum(tl.where((row < block)[:, None], counts, 0), 0)
    if block == 0:
        _store_summary(total, offsets_ptr, runs_ptr, num_runs, run, E, EP)
    start = block * chunks * B
    absent = tl.sum(total) + start - tl.sum(earlier)
    base = tl.cumsum(total, 0) - total + earlier
    for chunk in range(chunks):
        i = start + chunk * B + tl.arange(0, B)
        ids = tl.load(ids_ptr + i, mask=i < N, other=-1)
        rank = tl.load(ranks_ptr + i, mask=i < N, other=0)
        place = tl.where(ids < 0, absent, tl.gather(base, tl.maximum(ids, 0), 0)) + rank
        tl.store(order_ptr + place, i, mask=i < N)


def compile_cases() -> list[CompileCase]:
    pairs = dict.fromkeys(("ids_ptr", "order_ptr", "offsets_ptr", "runs_ptr"), "*i32")
    pairs |= {"N": "i32", "num_runs": "i32", "run": "i32"}
    work = dict.fromkeys(("ids_ptr", "counts_ptr", "ranks_ptr"), "*i32") | {"N": "i32", "chunks": "i32"}
    cases = []
    for block, warps in _ONE_LAUNCH:
        shape = {"E": 256, "EP": 256, "BN": block}
        cases += pdl_cases(f"group_pairs {block}", group_pairs, pairs, {"num_warps": warps}, **shape)
    large = {"E": 512, "EP": 512, "B": _BLOCK}
    cases += pdl_cases("count_pairs", count_pairs, work, {"num_warps": 4}, **large)
    return cases + pdl_cases(
        "scatter_pairs", scatter_pairs, pairs | work | {"blocks": "i32"}, {"num_warps": 8}, **large, BB=_count_rows(512)
    )


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
