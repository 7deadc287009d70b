"""Routed experts: from rows and their experts to the weighted sum of the experts' outputs.

    y[t] = sum_k weights[t, k] * down_e(act(gate_e x[t], up_e x[t])),  e = expert_ids[t, k]

The one place that chooses a kernel. Letters: T rows, K experts of a row, H hidden, E experts.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch.nn import functional as F

from moe_nvfp4.kernels.activation import activate
from moe_nvfp4.kernels.few_rows import routed_experts_pairs
from moe_nvfp4.kernels.fragments import FragmentTensor, from_fragments
from moe_nvfp4.kernels.grouped_rows import routed_experts_grouped, run_for
from moe_nvfp4.kernels.many_rows import routed_experts_many
from moe_nvfp4.kernels.nvfp4 import NVFP4Tensor
from moe_nvfp4.kernels.sort_pairs import sort_pairs, sort_pairs_twin

ExpertWeight = NVFP4Tensor | FragmentTensor

# Pairs to an expert up to which each has programs of its own: below that rows seldom share experts. One H200, us:
# Qwen3.6, 8 rows (0.25) 34.4 against 35.6 and 3 of sorting; Gemma-4, 4 rows (0.25) 36 against 41 and sorting, 8 rows
# 66 against 55 and sorting.
MOST_PAIRS_APART = 0.25
# Pairs to an expert up to which runs of 8 or 16 keep up with tiles of rows: Qwen3.6, 256 rows (8) 148 against 179;
# Gemma-4, 128 rows (8) 148 against 169, 256 rows (16) 202 against 178.
MOST_PAIRS_GROUPED = 11
# Numbers of a projection that the twin decodes at once, 16 MB: of small experts each would take twenty calls of torch.
_DECODED_AT_ONCE = 1 << 22


def routed_experts(
    x_TH: torch.Tensor,
    gate: ExpertWeight | None,
    up: ExpertWeight,
    down: ExpertWeight,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: str = "silu",
    among: int | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Ids of -1 are left out. Tensor-core kernels take fragments and bfloat16 on a GPU; else it is the twin.

    `among`: of how many experts these are a part (default: all). Pairs of the others have id -1: where these are few,
    most have, and an expert has as many pairs as one of all. `batch_invariant`: one kernel for any number of rows, so
    that a row's bits do not depend on it; runs of 8 and of 16 sum alike.
    """
    fast = x_TH.is_cuda and x_TH.dtype == torch.bfloat16 and x_TH.shape[0] > 0
    if not (fast and isinstance(up, FragmentTensor) and isinstance(down, FragmentTensor)):
        return routed_experts_twin(x_TH, gate, up, down, expert_ids_TK, weights_TK, activation)
    assert gate is None or isinstance(gate, FragmentTensor)
    ids = expert_ids_TK.int()
    experts = up.words.shape[0]
    among = among or experts
    kernel = "grouped" if batch_invariant else choose_kernel(x_TH.shape[0], ids.numel(), among)
    if kernel == "pairs":
        return routed_experts_pairs(x_TH, gate, up, down, ids, weights_TK, activation)
    if kernel == "many":
        pairs = sort_pairs(ids, experts, ids.numel())  # tiles of rows are cut from the offsets
        return routed_experts_many(
            x_TH, gate, up, down, ids, weights_TK, pairs.order, pairs.offsets, activation, among=among
        )
    pairs = sort_pairs(ids, experts, run_for(ids.numel(), among))
    return routed_experts_grouped(x_TH, gate, up, down, ids, weights_TK, pairs, activation)


def choose_kernel(rows: int, pairs: int, experts: int) -> Literal["pairs", "grouped", "many"]:
    """`experts`: those that the pairs are spread over."""
    if rows == 1 or pairs <= MOST_PAIRS_APART * experts:
        return "pairs"
    return "many" if pairs > MOST_PAIRS_GROUPED * experts else "grouped"


def routed_experts_twin(
    x_TH: torch.Tensor,
    gate: ExpertWeight | None,
    up: ExpertWeight,
    down: ExpertWeight,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """All arithmetic is float32, whatever the dtype of x, and the output has the dtype of x.

    A row's result does not depend on the other rows, but for rounding where the matrix library picks another kernel
    for their number.
    """
    top, experts = expert_ids_TK.shape[1], up.global_scale.shape[0]
    shares = torch.zeros(x_TH.shape[0] * top, x_TH.shape[1], dtype=torch.float32, device=x_TH.device)
    order, offsets, *_ = sort_pairs_twin(expert_ids_TK.int(), experts)
    spans = list(pairwise(offsets.tolist()))
    wanted = [expert for expert, (begin, end) in enumerate(spans) if begin < end]
    together = max(1, _DECODED_AT_ONCE // (up.shape[-2] * up.shape[-1]))
    for first in range(0, len(wanted), together):
        some = wanted[first : first + together]
        ups, downs = _plain(up, some), _plain(down, some)
        gates = None if gate is None else _plain(gate, some)
        for place, expert in enumerate(some):
            index_S = order[slice(*spans[expert])].long()
            rows = x_TH[index_S // top].float()
            through = None if gates is None else F.linear(rows, gates[place])
            h = activate(activation, through, F.linear(rows, ups[place]))
            shares[index_S] = F.linear(h, downs[place])
    weighted = shares.view(*expert_ids_TK.shape, x_TH.shape[1]) * weights_TK[..., None].float()
    return weighted.sum(dim=1).to(x_TH.dtype)


def _plain(block: ExpertWeight, experts: list[int]) -> torch.Tensor:
    if isinstance(block, FragmentTensor):
        return from_fragments(FragmentTensor(*(part[experts] for part in block))).dequantize()
    return NVFP4Tensor(*(part[experts] for part in block)).dequantize()
