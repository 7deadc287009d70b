"""Where this rank's experts lie, on the device, and how many rows every expert took.

Kernels read the tables at every step, so a placement can be replaced between steps while captured graphs go on.
"""

import torch

from moe_nvfp4.routing.placement import Placement


class PlacementTables:
    """`tables[layer]` is what kernels/place_routes.py reads."""

    def __init__(self, placement: Placement, rank: int, device: torch.device, *, count: bool = False):
        """`count`: keep the number of rows of each logical expert; every rank of a group counts the same."""
        self.placement, self.rank, self.device = placement, rank, device
        self._layers = sorted(placement.slots)
        self._tables = {layer: self._table(layer).to(device) for layer in self._layers}
        shape = (len(self._layers), placement.num_experts)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device) if count else None
        lines = dict(zip(self._layers, self._counts, strict=True)) if self._counts is not None else {}
        self._lines: dict[int, torch.Tensor] = lines

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._tables[layer]

    def counts(self, layer: int) -> torch.Tensor | None:
        """int64 [E] to be added to, or None."""
        return self._lines.get(layer)

    def all_counts(self) -> dict[int, list[int]]:
        """Rows of each logical expert, by layer, since the start. Waits for the device."""
        return {} if self._counts is None else dict(zip(self._layers, self._counts.tolist(), strict=True))

    def forget_counts(self) -> None:
        if self._counts is not None:
            self._counts.zero_()

    def replace(self, placement: Placement, layer: int) -> None:
        """From the next step on this layer is placed like that, in the order of the stream."""
        slots = {**self.placement.slots, layer: placement.slots[layer]}
        self.placement = Placement(placement.num_experts, slots)
        table = self._table(layer)
        target = self._tables[layer]
        target.copy_(table.pin_memory() if target.is_cuda else table, non_blocking=True)

    def _table(self, layer: int) -> torch.Tensor:
        return torch.tensor(self.placement.table(layer, self.rank), dtype=torch.int32)
