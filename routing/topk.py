"""Routers as plain functions: from scores to the experts of each row and their weights.

Shapes: T rows, E experts, K experts of a row.
"""

from typing import NamedTuple

import torch


class Routes(NamedTuple):
    """The experts of each row; `expert_ids` of -1 are computed elsewhere."""

    expert_ids_TK: torch.Tensor  # int64
    weights_TK: torch.Tensor  # float32


def softmax_topk(logits_TE: torch.Tensor, k: int, *, normalise: bool) -> Routes:
    """Softmax in float32 over all experts, then the k largest; `normalise` makes their weights sum to one."""
    scores_TE = torch.softmax(logits_TE.float(), dim=-1)
    weights_TK, expert_ids_TK = torch.topk(scores_TE, k, dim=-1)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routes(expert_ids_TK, weights_TK)
