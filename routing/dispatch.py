"""A `Dispatcher` brings rows to the ranks that hold their experts, and the results back.

Two verbs and an opaque handle. With one rank it is the same code with nothing to send.
"""

from typing import Any, Protocol

import torch

from moe_nvfp4.kernels.route import Routes
from moe_nvfp4.routing.placement import Placement


class Dispatcher(Protocol):
    def dispatch(self, layer: int, x_TH: torch.Tensor, routes: Routes) -> tuple[torch.Tensor, Routes, Any]:
        """Rows to compute here, their routes in terms of this rank's slots, and a handle for `combine`."""

    def combine(self, y_TH: torch.Tensor, handle: Any) -> torch.Tensor:
        """The finished rows of this rank from every rank's share."""


class LocalDispatcher:
    """All experts are here: logical ids become slots. Where they are equal there is nothing to launch."""

    def __init__(self, placement: Placement, device: torch.device):
        tables = {layer: placement.slot_table(layer, 0) for layer in placement.slots}
        self._slots = {
            layer: torch.tensor([*table, -1], dtype=torch.int32, device=device)  # the id -1 stays -1
            for layer, table in tables.items()
            if table != list(range(len(table)))
        }

    def dispatch(self, layer: int, x_TH: torch.Tensor, routes: Routes) -> tuple[torch.Tensor, Routes, None]:
        if layer in self._slots:
            routes = Routes(self._slots[layer][routes.expert_ids_TK], routes.weights_TK)
        return x_TH, routes, None

    def combine(self, y_TH: torch.Tensor, handle: None) -> torch.Tensor:
        return y_TH
