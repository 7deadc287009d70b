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
    def even(
        cls, layers: Iterable[int], num_experts: int, num_ranks: int = 1, *, everywhere: Iterable[int] = ()
    ) -> "Placement":
        """Consecutive experts on each rank, sizes differing by one at most; those of `everywhere` on all ranks."""
        if not 1 <= num_ranks <= max(num_experts, 1):
            raise ValueError(f"Placement: {num_ranks} ranks for {num_experts} experts; expected 1 to {num_experts}")
        common = tuple(sorted(set(everywhere)))
        apart = [expert for expert in range(num_experts) if expert not in common]
        bounds = [len(apart) * rank // num_ranks for rank in range(num_ranks + 1)]
        slots = tuple((*apart[a:b], *common) for a, b in pairwise(bounds))
        return cls(num_experts, dict.fromkeys(layers, slots))

    def with_replicas(self, count: int) -> "Placement":
        """So many more experts on each rank, those that an even placement has on
        the next rank first."""

        def extended(rank: int, experts: tuple[int, ...]) -> tuple[int, ...]:
            first = self.num_experts * (rank + 1) // self.num_ranks
            others = [(first + e) % self.num_experts for e in range(self.num_experts)]
            return (*experts, *[e for e in others if e not in set(experts)][:count])

        slots = {layer: tuple(extended(*one) for one in enumerate(ranks)) for layer, ranks in self.slots.items()}
        return Placement(self.num_experts, slots)

    @property
    def num_ranks(self) -> int:
        return max((len(slots) for slots in self.slots.values()), default=1)

    def local(self, layer: int, rank: int) -> Sequence[int]:
        """Logical experts in the slots of one rank."""
        return self.slots[layer][rank]

    def holders(self, layer: int) -> list[list[int]]:
        """The ranks that hold each logical expert."""
        ranks: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.slots[layer]):
            for expert in experts:
                ranks[expert].append(rank)
        return ranks

    def table(self, layer: int, rank: int) -> list[list[int]]:
        """Three lines over the logical experts, as kernels/place_routes.py reads them: the slot on this rank or -1,
        the number of replicas, and which of them this rank's is, or -1."""
        holders, here = self.holders(layer), {e: slot for slot, e in enumerate(self.slots[layer][rank])}
        return [
            [here.get(expert, -1) for expert in range(self.num_experts)],
            [len(ranks) for ranks in holders],
            [ranks.index(rank) if rank in ranks else -1 for ranks in holders],
        ]
