"""A `Dispatcher` brings rows to the ranks that hold their experts, and the results back.

Two verbs and an opaque handle. With one rank it is the same code with nothing to send.

    LocalDispatcher      all experts are here
    AllReduceDispatcher  every rank has all rows: each computes its experts' share of them, and the shares are added up
    GatherDispatcher     every rank has rows of its own: all ranks get all rows, compute their experts' share of them,
                         and of the added shares each gets its own rows back

Letters: T rows of this rank, H hidden, K experts of a row, G ranks that bring rows, P rows that each of them brings.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from moe_nvfp4.kernels.place_routes import place_routes
from moe_nvfp4.kernels.route import Routes
from moe_nvfp4.routing.collectives import Collectives
from moe_nvfp4.routing.tables import PlacementTables


class StepRows(NamedTuple):
    """Which rows of a step count, where ranks work together or rows are counted."""

    padded: int  # P
    live_G: torch.Tensor  # int32: the first so many of each rank's rows; the others are padding

    @classmethod
    def new(cls, padded: int, ranks: int | None, device: torch.device) -> "StepRows | None":
        """To be filled in. `ranks`: how many bring rows of their own; None: nobody asks which count."""
        return None if ranks is None else cls(padded, torch.zeros(ranks, dtype=torch.int32, device=device))


class Dispatcher(Protocol):
    def dispatch(
        self, layer: int, x_TH: torch.Tensor, routes: Routes, step: StepRows | None
    ) -> tuple[torch.Tensor, Routes, Any]:
        """Rows to compute here, their routes in terms of this rank's slots, and a handle for `combine`. Without `step`
        every rank brings as many rows as this one, and all count."""

    def combine(self, y_TH: torch.Tensor, handle: Any) -> torch.Tensor:
        """The finished rows of this rank from every rank's share, which may be overwritten."""


class LocalDispatcher:
    """Logical ids become slots. Where they are equal, and rows are not counted, there is nothing to launch."""

    def __init__(self, tables: PlacementTables):
        assert tables.placement.num_ranks == 1, "experts of other ranks would be left out"
        self._tables = tables
        self._as_they_are = {
            layer
            for layer, (experts,) in tables.placement.slots.items()
            if list(experts) == list(range(len(experts))) and tables.counts(layer) is None
        }

    def dispatch(
        self, layer: int, x_TH: torch.Tensor, routes: Routes, step: StepRows | None = None
    ) -> tuple[torch.Tensor, Routes, None]:
        return x_TH, routes if layer in self._as_they_are else _placed(self._tables, layer, routes, step), None

    def combine(self, y_TH: torch.Tensor, handle: None) -> torch.Tensor:
        return y_TH


class AllReduceDispatcher:
    """Nothing travels but the sum: the least for few rows, and no rank waits to know where rows go."""

    def __init__(self, tables: PlacementTables, collectives: Collectives):
        self._tables, self._collectives = tables, collectives

    def dispatch(
        self, layer: int, x_TH: torch.Tensor, routes: Routes, step: StepRows | None
    ) -> tuple[torch.Tensor, Routes, None]:
        return x_TH, _placed(self._tables, layer, routes, step), None

    def combine(self, y_TH: torch.Tensor, handle: None) -> torch.Tensor:
        return self._collectives.all_reduce(y_TH)


def _placed(tables: PlacementTables, layer: int, routes: Routes, step: StepRows | None) -> Routes:
    """Of rows that all ranks have."""
    live_G = None if step is None else step.live_G
    ids_TK = place_routes(routes.expert_ids_TK[None], tables[layer], live_G, tables.counts(layer))
    return Routes(ids_TK, routes.weights_TK)


class GatherDispatcher:
    """Rows of all ranks, filled up to the same number on each."""

    def __init__(self, tables: PlacementTables, collectives: Collectives):
        self._tables, self._collectives = tables, collectives

    def dispatch(
        self, layer: int, x_TH: torch.Tensor, routes: Routes, step: StepRows | None
    ) -> tuple[torch.Tensor, Routes, int]:
        rows, padded = x_TH.shape[0], x_TH.shape[0] if step is None else step.padded
        group, missing = self._collectives, padded - x_TH.shape[0]
        sent_2TK = torch.stack((routes.expert_ids_TK, routes.weights_TK.view(torch.int32)))
        if missing:
            x_TH, sent_2TK = F.pad(x_TH, (0, 0, 0, missing)), F.pad(sent_2TK, (0, 0, 0, missing))
        x_TH = group.all_gather(x_TH)
        got_G2PK = group.all_gather(sent_2TK[None])
        live_G = None if step is None else step.live_G
        ids_TK = place_routes(got_G2PK[:, 0], self._tables[layer], live_G, self._tables.counts(layer))
        weights_TK = got_G2PK[:, 1].reshape(ids_TK.shape).view(torch.float32)
        return x_TH, Routes(ids_TK, weights_TK), rows

    def combine(self, y_TH: torch.Tensor, handle: int) -> torch.Tensor:
        return self._collectives.reduce_scatter(y_TH)[:handle]
