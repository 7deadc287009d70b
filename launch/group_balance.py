"""Experts of a group move to where their rows are shared out evenly, while requests are served.

Layer by layer: every rank reads what comes to it, beside what it serves from; then all of them change the layer's
placement at the same turn. A group that is built again begins with an even placement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from moe_nvfp4.errors import EngineError
from moe_nvfp4.launch.group_workers import Workers
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.routing.rebalance import rank_loads, rebalance
from moe_nvfp4.routing.rebalance_moves import plan_moves


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """`before` and `after`: rows of the slowest rank over the mean, of the rows counted since the last time, summed
    over layers; 1 is best."""

    rows: int
    layers: int  # that changed
    reads: int  # experts that ranks have read
    before: float
    after: float


def rebalance_workers(workers: Workers, loads: Mapping[int, Sequence[int]], max_moves: int | None) -> Rebalanced:
    """`loads`: rows of each expert, by layer. `max_moves`: experts of a layer that ranks may read."""
    try:
        present, everywhere = ray.get(workers.leader.placement.remote())
        placed = rebalance(loads, present, everywhere=everywhere, max_moves=max_moves)
        moves = plan_moves(present, placed)
        for one in moves:
            ray.get([actor.stage.options(concurrency_group="experts").remote(placed, one) for actor in workers.actors])
            ray.get(workers.leader.call_everywhere.remote("replace_layer", {"layer": one.layer}))
    except RayError as error:
        raise EngineError(f"rebalance: a rank has failed, and the group will be built again: {error}") from error
    return Rebalanced(
        rows=sum(map(sum, loads.values())),
        layers=len(moves),
        reads=sum(len(one.reads) for one in moves),
        before=_skew(loads, present),
        after=_skew(loads, placed),
    )


def _skew(loads: Mapping[int, Sequence[int]], placement: Placement) -> float:
    of_layers: list[Any] = [rank_loads(loads[layer], slots) for layer, slots in placement.slots.items()]
    mean = sum(map(sum, of_layers)) / placement.num_ranks
    return sum(map(max, of_layers)) / mean if mean else 1.0
