"""A `Dispatcher` brings rows to the ranks that hold their experts, and the results back.

Two verbs and an opaque handle. With one rank it is the same code with nothing to send.
"""

from typing import Any, Protocol

import torch

from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.routing.topk import Routes


class Dispatcher(Protocol):
    def dispatch(self, layer: int, x_TH: torch.Tensor, routes: Routes) -> tuple[torch.Tensor, Routes, Any]:
        """Rows to compute here, their routes in terms of this rank's slots, and a handle for `combine`."""

    def combine(self, y_TH: torch.Tensor, handle: Any) -> torch.Tensor:
        """The finished rows of this rank from every rank's share."""


class LocalDispatcher:
    """All experts are here: logical ids become slots."""

    def __init__(self, placement: Placement, device: torch.device):
        self._slots = {
            layer: torch.tensor([*placement.slot_table(layer, 0), -1], device=device)  # the id -1 stays -1
            for layer in placement.slots
        }

    def dispatch(self, layer: int, x_TH: torch.Tensor, routes: Routes) -> tuple[torch.Tensor, Routes, None]:
        return x_TH, Routes(self._slots[layer][routes.expert_ids_TK], routes.weights_TK), None

    def combine(self, y_TH: torch.Tensor, handle: None) -> torch.Tensor:
        return y_TH
