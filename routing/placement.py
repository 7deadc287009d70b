"""`Placement`: which rank computes which expert, and in which slot of its buffers. Pure data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Slots = tuple[tuple[int, ...], ...]  # rank -> logical experts, in slot order


@dataclass(frozen=True)
class Placement:
    """`slots[layer][rank]` lists the logical experts of that rank. An expert may have replicas."""

    num_experts: int
    slots: Mapping[int, Slots]

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", {layer: tuple(map(tuple, s)) for layer, s in self.slots.items()})
        ranks = {len(slots) for slots in self.slots.values()}
        if len(ranks) > 1:
            raise ValueError(f"Placement: layers disagree on the number of ranks: {sorted(ranks)}")
        for layer, slots in self.slots.items():
            placed = {expert for experts in slots for expert in experts}
            if strangers := sorted(e for e in placed if not 0 <= e < self.num_experts):
                raise ValueError(
                    f"Placement: layer {layer} places experts {strangers[:8]}; expected 0 to {self.num_experts - 1}"
                )
            if absent := sorted(set(range(self.num_experts)) - placed):
                raise ValueError(f"Placement: layer {layer} places experts {absent[:8]} nowhere")
            for rank, experts in enumerate(slots):
                if len(set(experts)) != len(experts):
                    raise ValueError(f"Placement: layer {layer}, rank {rank} holds an expert twice")

    @classmethod
    def even(cls, layers: Iterable[int], num_experts: int, num_ranks: int = 1) -> "Placement":
        """Consecutive experts on each rank, sizes differing by one at most."""
        if not 1 <= num_ranks <= max(num_experts, 1):
            raise ValueError(f"Placement: {num_ranks} ranks for {num_experts} experts; expected 1 to {num_experts}")
        bounds = [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]
        slots = tuple(tuple(range(a, b)) for a, b in pairwise(bounds))
        return cls(num_experts, dict.fromkeys(layers, slots))

    @property
    def num_ranks(self) -> int:
        return max((len(slots) for slots in self.slots.values()), default=1)

    def local(self, layer: int, rank: int) -> Sequence[int]:
        """Logical experts in the slots of one rank."""
        return self.slots[layer][rank]

    def slot_table(self, layer: int, rank: int) -> list[int]:
        """Slot of each logical expert on this rank, -1 where another rank has it.

        Of an expert's replicas only the first rank's counts, so that shares add up to the whole.
        """
        table = [-1] * self.num_experts
        earlier = {expert for experts in self.slots[layer][:rank] for expert in experts}
        for slot, expert in enumerate(self.slots[layer][rank]):
            if expert not in earlier:
                table[expert] = slot
        return table
