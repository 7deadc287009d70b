"""Routed experts: from rows and their experts to the weighted sum of the experts' outputs.

    y[t] = sum_k weights[t, k] * down_e(act(gate_e x[t], up_e x[t])),  e = expert_ids[t, k]

The one place that chooses a kernel. Letters: T rows, K experts of a row, H hidden, E experts.
"""

from itertools import pairwise

import torch
from torch.nn import functional as F

from moe_nvfp4.kernels.activation import activate
from moe_nvfp4.kernels.few_rows import routed_experts_pairs
from moe_nvfp4.kernels.fragments import FragmentTensor, from_fragments
from moe_nvfp4.kernels.grouped_rows import routed_experts_grouped
from moe_nvfp4.kernels.many_rows import routed_experts_many
from moe_nvfp4.kernels.nvfp4 import NVFP4Tensor
from moe_nvfp4.kernels.sort_pairs import sort_pairs, sort_pairs_twin

ExpertWeight = NVFP4Tensor | FragmentTensor

# One H200, layers of Qwen3.6 and Gemma-4: a program for each pair wins up to four rows (24 us against 26, 42 against
# 45), grouping from six on, where rows begin to share experts.
MOST_ROWS_BY_PAIRS = 4
# Pairs per expert up to which eight rows at a time keep up with tiles of rows: at eight, 192 us against 183 (Qwen3.6,
# 256 rows) and 330 against 182 (Gemma-4); at four and below grouping reads each weight once and is ahead.
MOST_PAIRS_GROUPED = 6


def routed_experts(
    x_TH: torch.Tensor,
    gate: ExpertWeight | None,
    up: ExpertWeight,
    down: ExpertWeight,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """Ids of -1 are left out. Tensor-core kernels take fragments and bfloat16 on a GPU; else it is the twin."""
    fast = x_TH.is_cuda and x_TH.dtype == torch.bfloat16 and x_TH.shape[0] > 0
    if not (fast and isinstance(up, FragmentTensor) and isinstance(down, FragmentTensor)):
        return routed_experts_twin(x_TH, gate, up, down, expert_ids_TK, weights_TK, activation)
    assert gate is None or isinstance(gate, FragmentTensor)
    ids = expert_ids_TK.int()
    if x_TH.shape[0] <= MOST_ROWS_BY_PAIRS:
        return routed_experts_pairs(x_TH, gate, up, down, ids, weights_TK, activation)
    experts = up.words.shape[0]
    pairs = sort_pairs(ids, experts)
    if ids.numel() > MOST_PAIRS_GROUPED * experts:
        return routed_experts_many(x_TH, gate, up, down, ids, weights_TK, pairs.order, pairs.offsets, activation)
    return routed_experts_grouped(x_TH, gate, up, down, ids, weights_TK, pairs, activation)


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
    order, offsets, _ = sort_pairs_twin(expert_ids_TK.int(), experts)
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin == end:
            continue
        index_S = order[begin:end].long()
        rows = x_TH[index_S // top].float()
        through = None if gate is None else F.linear(rows, _plain(gate, expert))
        h = activate(activation, through, F.linear(rows, _plain(up, expert)))
        shares[index_S] = F.linear(h, _plain(down, expert))
    weighted = shares.view(*expert_ids_TK.shape, x_TH.shape[1]) * weights_TK[..., None].float()
    return weighted.sum(dim=1).to(x_TH.dtype)


def _plain(block: ExpertWeight, expert: int) -> torch.Tensor:
    if isinstance(block, FragmentTensor):
        return from_fragments(FragmentTensor(*(part[expert] for part in block))).dequantize()
    return NVFP4Tensor(*(part[expert] for part in block)).dequantize()
