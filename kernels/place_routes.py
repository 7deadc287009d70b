"""Routes in terms of one rank's slots: which pairs of row and expert this rank computes, and how many rows each expert
took. One launch; nothing synchronises with the host, and tables are read on the device, so that they may change under a
captured graph.

Rows come from G ranks, P from each; the first live[g] of a rank's rows count, the others are padding. An expert may
have replicas on several ranks. Its rows take turns, so every pair is computed exactly once in the group:

    row t is row j = t % P of rank g = t // P
    slot = slots[e]  if j < live[g] and (g + j) % replicas[e] == turn[e], else -1

The sum g + j spreads the first rows of all ranks as well as the rows of one. Letters: T rows, K choices of a row,
E experts.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.sizes import cdiv
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases, use_twin

_BLOCK: Final = 256  # pairs of a program


def place_routes(
    expert_ids_GPK: Tensor, table_3E: Tensor, live_G: Tensor | None = None, counts_E: Tensor | None = None
) -> Tensor:
    """int32 [T, K]: slots, -1 for what others compute and for padding.

    `expert_ids_GPK`: int32, logical ids; the last two dimensions are contiguous. `table_3E`: int32 lines of slots,
    replicas and turn. Without `live_G` (int32) all rows count. `counts_E` (int64) grows by the rows of each expert.
    """
    groups, rows, choices = expert_ids_GPK.shape
    if use_twin(expert_ids_GPK):
        return place_routes_twin(expert_ids_GPK, table_3E, live_G, counts_E)
    assert expert_ids_GPK[0].is_contiguous() and table_3E.is_contiguous()
    slots_TK = expert_ids_GPK.new_empty(groups * rows, choices)
    place_pairs[(cdiv(slots_TK.numel(), _BLOCK),)](
        expert_ids_GPK, table_3E, table_3E if live_G is None else live_G, table_3E if counts_E is None else counts_E,
        slots_TK, slots_TK.numel(), rows, expert_ids_GPK.stride(0), table_3E.shape[1],
        K=choices, LIVE=live_G is not None, COUNT=counts_E is not None, B=_BLOCK, num_warps=4,
        **launch_options(expert_ids_GPK),
    )  # fmt: skip
    return slots_TK


def place_routes_twin(
    expert_ids_GPK: Tensor, table_3E: Tensor, live_G: Tensor | None = None, counts_E: Tensor | None = None
) -> Tensor:
    groups, rows, choices = expert_ids_GPK.shape
    slots, replicas, turn = table_3E.unbind(0)
    g = torch.arange(groups, device=expert_ids_GPK.device)[:, None, None]
    j = torch.arange(rows, device=expert_ids_GPK.device)[None, :, None]
    ids = expert_ids_GPK.long()
    counted = ids >= 0
    if live_G is not None:
        counted = counted & (j < live_G[:, None, None])
    ids = ids.clamp(min=0)
    if counts_E is not None:
        counts_E.index_add_(0, ids.flatten(), counted.flatten().to(counts_E.dtype))
    mine = counted & ((g + j) % replicas[ids] == turn[ids])
    return torch.where(mine, slots[ids], -1).int().view(groups * rows, choices)


@triton.jit(do_not_specialize=["N", "rows", "group_stride"])  # one kernel for any number of rows
def place_pairs(
    ids_ptr, table_ptr, live_ptr, counts_ptr, out_ptr, N, rows, group_stride, num_experts,
    K: tl.constexpr, LIVE: tl.constexpr, COUNT: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * B + tl.arange(0, B)
    inside = n < N
    t = n // K
    g = t // rows
    j = t % rows
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ids = tl.load(ids_ptr + g.to(tl.int64) * group_stride + j * K + n % K, mask=inside, other=-1)
    counted = ids >= 0
    if LIVE:
        counted &= j < tl.load(live_ptr + g, mask=inside, other=0)
    ids = tl.maximum(ids, 0)
    if COUNT:
        tl.atomic_add(counts_ptr + ids, tl.full((B,), 1, tl.int64), mask=counted, sem="relaxed")
    slots = tl.load(table_ptr + ids, mask=counted, other=-1)
    replicas = tl.load(table_ptr + num_experts + ids, mask=counted, other=1)
    turn = tl.load(table_ptr + 2 * num_experts + ids, mask=counted, other=0)
    tl.store(out_ptr + n, tl.where((g + j) % replicas == turn, slots, -1), mask=inside)


def compile_cases() -> list[CompileCase]:
    pointers = dict.fromkeys(("ids_ptr", "table_ptr", "live_ptr", "out_ptr"), "*i32") | {"counts_ptr": "*i64"}
    signature = pointers | dict.fromkeys(("N", "rows", "group_stride", "num_experts"), "i32")
    cases = pdl_cases("place_pairs", place_pairs, signature, {"num_warps": 4}, K=9, LIVE=True, COUNT=True, B=_BLOCK)
    alone = signature | {"counts_ptr": "*i32"}
    cases += pdl_cases(
        "place_pairs alone", place_pairs, alone, {"num_warps": 4}, K=8, LIVE=False, COUNT=False, B=_BLOCK
    )
    return cases
