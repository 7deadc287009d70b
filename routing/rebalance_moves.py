"""From one placement to another while rows are served: what each rank copies and reads, and when a slot is free for it.

Layer by layer: a rank first reads into slots that hold nothing yet, while the layer is served as before. What goes into
slots in use waits in memory beside them. Then, between two steps and on all ranks: copies in their order, the waiting
reads, and the layer is served by the new placement.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_nvfp4.routing.placement import Placement


class Copy(NamedTuple):
    """Of an expert that stays on its rank, in another slot."""

    rank: int
    source: int
    target: int


class Read(NamedTuple):
    rank: int
    expert: int
    slot: int
    slot_is_free: bool  # nothing that is served lies there now


class LayerMoves(NamedTuple):
    layer: int
    copies: tuple[Copy, ...]
    reads: tuple[Read, ...]

    @property
    def waiting(self) -> int:
        """Experts that the rank with most must hold beside its slots until the layer changes."""
        ranks = [read.rank for read in self.reads if not read.slot_is_free]
        return max(map(ranks.count, set(ranks)), default=0)


def plan_moves(old: Placement, new: Placement, gains: Mapping[int, float] | None = None) -> tuple[LayerMoves, ...]:
    """Layers that change. With `gains` those first that gain most for each expert read."""
    if (old.num_experts, old.num_ranks, set(old.slots)) != (new.num_experts, new.num_ranks, set(new.slots)):
        raise ValueError(
            f"plan_moves: {old.num_experts} experts, {old.num_ranks} ranks and {len(old.slots)} layers become "
            f"{new.num_experts}, {new.num_ranks} and {len(new.slots)}; expected the same layers, experts and ranks"
        )
    plans = []
    for layer, slots in new.slots.items():
        parts = [_rank_moves(rank, old.slots[layer][rank], held) for rank, held in enumerate(slots)]
        copies = tuple(copy for part, _ in parts for copy in part)
        reads = tuple(read for _, part in parts for read in part)
        if copies or reads:
            plans.append(LayerMoves(layer, copies, reads))
    if gains is not None:
        plans.sort(key=lambda plan: -gains[plan.layer] / max(len(plan.reads), 1))
    return tuple(plans)


def _rank_moves(rank: int, old: Sequence[int], new: Sequence[int]) -> tuple[list[Copy], list[Read]]:
    """A copy comes when no other still needs what lies in its target. Where copies go in circles, one is read."""
    slot_of = {expert: slot for slot, expert in enumerate(old)}
    to_copy = {slot_of[e]: slot for slot, e in enumerate(new) if e in slot_of and slot_of[e] != slot}
    to_read = {slot: e for slot, e in enumerate(new) if e not in slot_of}
    copies: list[Copy] = []
    while to_copy:
        source = next((source for source, target in to_copy.items() if target not in to_copy), None)
        if source is None:
            target = to_copy.pop(next(iter(to_copy)))
            to_read[target] = new[target]
        else:
            copies.append(Copy(rank, source, to_copy.pop(source)))
    return copies, [Read(rank, expert, slot, slot >= len(old)) for slot, expert in sorted(to_read.items())]
