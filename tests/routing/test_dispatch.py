"""With one rank nothing travels; ids become slots."""

import pytest
import torch

from moe_nvfp4.kernels.route import Routes
from moe_nvfp4.routing.dispatch import LocalDispatcher
from moe_nvfp4.routing.placement import Placement


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_ids_become_slots(order: tuple[int, ...]) -> None:
    dispatcher = LocalDispatcher(Placement(4, {5: (order,)}), torch.device("cpu"))
    ids, weights, x = torch.tensor([[3, 0], [1, -1], [-1, -1]]), torch.rand(3, 2), torch.randn(3, 8)
    rows, routes, handle = dispatcher.dispatch(5, x, Routes(ids, weights))
    slots = {expert: slot for slot, expert in enumerate(order)} | {-1: -1}
    assert routes.expert_ids_TK.tolist() == [[slots[e] for e in row] for row in ids.tolist()]
    assert routes.weights_TK is weights
    assert rows is x
    assert dispatcher.combine(x, handle) is x
