"""Routers against their definition, element by element in Python floats."""

import math

import pytest
import torch

from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.routing.topk import softmax_topk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 3), (128, 8), (5, 5)])
def test_softmax_topk(experts: int, k: int, normalise: bool, dtype: torch.dtype) -> None:
    # Distinct values, so that the order does not depend on how ties are broken.
    logits = torch.stack([torch.randperm(experts) for _ in range(7)]).to(dtype) / 16 - 2
    ids, weights = softmax_topk(logits, k, normalise=normalise)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    for row, row_ids, row_weights in zip(logits.tolist(), ids.tolist(), weights, strict=True):
        total = sum(math.exp(value) for value in row)
        best = sorted(range(experts), key=lambda e: -row[e])[:k]
        assert row_ids == best
        scores = [math.exp(row[e]) / total for e in best]
        wanted = [score / sum(scores) for score in scores] if normalise else scores
        assert relative_error(row_weights, torch.tensor(wanted, dtype=torch.float64)) < TOLERANCE["float32"]


def test_large_logits_stay_finite() -> None:
    ids, weights = softmax_topk(torch.tensor([[-1e4, 1e4, 0.0]]), 2, normalise=True)
    assert ids.tolist()[0][0] == 1
    assert weights.tolist() == [[1.0, 0.0]]


def test_softmax_over_all_experts_comes_first() -> None:
    """Without normalising, weights are shares of all experts: below one in sum."""
    _, weights = softmax_topk(torch.zeros(2, 10), 4, normalise=False)
    assert torch.allclose(weights, torch.full((2, 4), 0.1))


def test_no_rows() -> None:
    ids, weights = softmax_topk(torch.empty(0, 8), 2, normalise=True)
    assert ids.shape == weights.shape == (0, 2)
