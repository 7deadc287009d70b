"""The one place that sorts: rows grouped by the expert that computes them."""

from typing import NamedTuple

import torch


class Permutation(NamedTuple):
    """Pairs (row, k) in expert order. S pairs are computed here; the others had the id -1."""

    rows_S: torch.Tensor  # row of each pair
    order_S: torch.Tensor  # index of each pair in the flattened [T, K]
    offsets: torch.Tensor  # [E + 1]: pairs of expert e are offsets[e] to offsets[e + 1]


def permutation(expert_ids_TK: torch.Tensor, num_experts: int) -> Permutation:
    """Stable: pairs of one expert keep their order, so sums do not depend on the sort."""
    flat = expert_ids_TK.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)
    skipped = int(counts[0])
    order_S = order[skipped:]
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(counts[1:], 0, out=offsets[1:])
    return Permutation(order_S // expert_ids_TK.shape[1], order_S, offsets)
