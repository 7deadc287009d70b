"""With one rank nothing travels; ids become slots."""

import pytest
import torch

from moe_nvfp4.kernels.route import Routes
from moe_nvfp4.routing.dispatch import LocalDispatcher, StepRows
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.routing.tables import PlacementTables


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
@pytest.mark.parametrize("count", [False, True])
def test_ids_become_slots(order: tuple[int, ...], count: bool) -> None:
    tables = PlacementTables(Placement(4, {5: (order,)}), 0, torch.device("cpu"), count=count)
    dispatcher = LocalDispatcher(tables)
    ids, weights, x = torch.tensor([[3, 0], [1, -1], [-1, -1]]).int(), torch.rand(3, 2), torch.randn(3, 8)
    rows, routes, handle = dispatcher.dispatch(5, x, Routes(ids, weights))
    slots = {expert: slot for slot, expert in enumerate(order)} | {-1: -1}
    assert routes.expert_ids_TK.tolist() == [[slots[e] for e in row] for row in ids.tolist()]
    assert routes.weights_TK is weights
    assert rows is x
    assert dispatcher.combine(x, handle) is x
    assert tables.all_counts() == ({5: [1, 1, 0, 1]} if count else {})
    filled_up = StepRows(3, torch.tensor([1], dtype=torch.int32))
    dispatcher.dispatch(5, x, Routes(ids, weights), filled_up)
    assert tables.all_counts() == ({5: [2, 1, 0, 2]} if count else {})
