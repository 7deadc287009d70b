"""Routed experts, grouped by expert: against float64, bitwise repeatable, rows independent."""

import pytest
import torch
from expert_cases import CASES, Case, make, reference

from moe_nvfp4.kernels.grouped_rows import routed_experts_grouped
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.kernels.sort_pairs import sort_pairs_twin

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("run", [8, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, run: int) -> None:
    inputs = make(case, "cuda")
    weights = inputs.fragments()
    grouped = sort_pairs_twin(inputs.ids, case.experts, run)
    actual = routed_experts_grouped(inputs.x, *weights, inputs.ids, inputs.weights, grouped, case.activation)
    assert relative_error(actual, reference(inputs, case.activation)) < 1e-2
    again = routed_experts_grouped(inputs.x, *weights, inputs.ids, inputs.weights, grouped, case.activation)
    assert torch.equal(actual, again)


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case(32, 4, 512, 256, 8)
    inputs = make(case, "cuda")
    weights = inputs.fragments()
    together = routed_experts_grouped(inputs.x, *weights, inputs.ids, inputs.weights, sort_pairs_twin(inputs.ids, 32))
    for row in (slice(2, 3), slice(1, 5), slice(7, 8)):
        ids = inputs.ids[row]
        alone = routed_experts_grouped(inputs.x[row], *weights, ids, inputs.weights[row], sort_pairs_twin(ids, 32))
        assert torch.equal(alone, together[row])


def test_captured_in_a_graph() -> None:
    case = Case(32, 4, 512, 256, 12)
    inputs = make(case, "cuda")
    weights, grouped = inputs.fragments(), sort_pairs_twin(inputs.ids, 32)
    routed_experts_grouped(inputs.x, *weights, inputs.ids, inputs.weights, grouped)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = routed_experts_grouped(inputs.x, *weights, inputs.ids, inputs.weights, grouped)
    other = make(case, "cuda", seed=5)
    for target, source in ((inputs.x, other.x), (inputs.ids, other.ids), (inputs.weights, other.weights)):
        target.copy_(source)
    for target, source in zip(grouped[:3], sort_pairs_twin(other.ids, 32)[:3], strict=True):
        target.copy_(source)
    graph.replay()
    assert relative_error(captured, reference(inputs, "silu")) < 1e-2
