"""Routed experts, a program for each pair: against float64, bitwise repeatable, rows independent."""

import pytest
import torch
from expert_cases import CASES, Case, make, reference

from moe_nvfp4.kernels.few_rows import routed_experts_pairs
from moe_nvfp4.kernels.nvfp4 import relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case) -> None:
    inputs = make(case, "cuda")
    weights = inputs.fragments()
    actual = routed_experts_pairs(inputs.x, *weights, inputs.ids, inputs.weights, case.activation)
    assert relative_error(actual, reference(inputs, case.activation)) < 1e-2
    again = routed_experts_pairs(inputs.x, *weights, inputs.ids, inputs.weights, case.activation)
    assert torch.equal(actual, again)


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case(32, 4, 512, 256, 8)
    inputs = make(case, "cuda")
    weights = inputs.fragments()
    together = routed_experts_pairs(inputs.x, *weights, inputs.ids, inputs.weights)
    for row in (slice(2, 3), slice(1, 5), slice(7, 8)):
        alone = routed_experts_pairs(inputs.x[row].contiguous(), *weights, inputs.ids[row], inputs.weights[row])
        assert torch.equal(alone, together[row])


def test_captured_in_a_graph() -> None:
    case = Case(32, 4, 512, 256, 3)
    inputs = make(case, "cuda")
    weights = inputs.fragments()
    routed_experts_pairs(inputs.x, *weights, inputs.ids, inputs.weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = routed_experts_pairs(inputs.x, *weights, inputs.ids, inputs.weights)
    other = make(case, "cuda", seed=5)
    inputs.x.copy_(other.x)
    inputs.ids.copy_(other.ids)
    inputs.weights.copy_(other.weights)
    graph.replay()
    assert relative_error(captured, reference(inputs, "silu")) < 1e-2
