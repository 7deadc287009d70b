"""What one rank knows of its group: its place, how attention is shared out, and how ranks exchange tensors.

    replicated  every rank has all rows and the whole dense part; experts are sharded
    tensor      attention and delta-net heads are sharded too; every rank has all rows
    data        every rank has sequences of its own: their attention, states, logits and tokens; experts see all rows
    auto        tensor where heads can be shared out evenly, else replicated; decided when a model is prepared

Every rank makes the same steps in the same order. Ranks that share rows take the tokens of rank 0, so that a sum
rounded otherwise could never set them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.distributed as dist

from moe_nvfp4.errors import RequestError
from moe_nvfp4.routing.collectives import Collectives, collectives_of, least
from moe_nvfp4.routing.dispatch import AllReduceDispatcher, Dispatcher, GatherDispatcher, LocalDispatcher
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.routing.tables import PlacementTables

AttentionMode = Literal["auto", "replicated", "tensor", "data"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Build with `join` in every process of a group, in the same order everywhere; without one there is `ALONE`."""

    rank: int
    size: int
    attention: AttentionMode
    device: torch.device
    group: dist.ProcessGroup | None
    collectives: Collectives | None

    @classmethod
    def join(
        cls,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str,
        attention: AttentionMode = "auto",
        symmetric: bool = True,
    ) -> "Ranks":
        """All ranks of a process group (default: the whole world) call it. On a GPU its backend is NCCL, on a CPU gloo.
        `symmetric`: exchange what is small through each other's memory where that can be had."""
        if attention not in get_args(AttentionMode):
            raise RequestError(
                f"attention: got {attention!r:.40}; expected one of {', '.join(get_args(AttentionMode))}"
            )
        if not dist.is_initialized():
            raise RequestError("no process group; call torch.distributed.init_process_group in every rank first")
        group, device = group or dist.group.WORLD, torch.device(device)
        assert group is not None
        if group.size() == 1:
            return cls(0, 1, attention, device, None, None)
        collectives = collectives_of(group, device, symmetric=symmetric)
        return cls(group.rank(), group.size(), attention, device, group, collectives)

    @property
    def splits_rows(self) -> bool:
        """Whether every rank has sequences of its own."""
        return self.attention == "data" and self.size > 1

    @property
    def splits_heads(self) -> bool:
        return self.attention == "tensor" and self.size > 1

    def with_attention(self, attention: AttentionMode) -> "Ranks":
        return replace(self, attention=attention)

    def sequences(self, total: int) -> int:
        """Of so many at once, those of one rank."""
        return -(-total // self.size) if self.splits_rows else total

    def dispatcher(self, tables: PlacementTables) -> Dispatcher:
        if self.collectives is None:
            return LocalDispatcher(tables)
        return (GatherDispatcher if self.splits_rows else AllReduceDispatcher)(tables, self.collectives)

    def placement(self, layers: Sequence[int], num_experts: int, *, everywhere: Sequence[int], spare: int) -> Placement:
        """Even, and with `spare` replicas on each rank, of the experts that follow its own: places that a placement
        made from counted loads may use otherwise."""
        if self.size > num_experts - len(everywhere) and num_experts:
            raise RequestError(
                f"{self.size} ranks for {num_experts - len(everywhere)} experts; expected a rank for each at most. "
                "Use fewer GPUs."
            )
        placement = Placement.even(layers, num_experts, self.size if layers else 1, everywhere=everywhere)
        return placement.with_replicas(spare)

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return value if self.group is None else least(value, self.group, self.device)

    def share(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of each [B] of values that float32 holds exactly, what all ranks are to go on with: [1, B] of rank 0, or
        [size, B] of all where rows are split. One sum in which every place but one is zero."""
        if self.collectives is None:
            return [value[None] for value in values]
        lines, mine = (self.size, self.rank) if self.splits_rows else (1, 0)
        whole = torch.zeros(len(values), lines, len(values[0]), dtype=torch.float32, device=values[0].device)
        if self.splits_rows or self.rank == 0:
            for line, value in zip(whole, values, strict=True):
                line[mine].copy_(value)
        whole = self.collectives.all_reduce(whole)
        return [line.to(value.dtype) for line, value in zip(whole, values, strict=True)]

    def gather(self, rows: torch.Tensor, size: int) -> torch.Tensor:
        """Of each rank so many rows, filled up with zeros."""
        missing = rows.new_zeros(size - rows.shape[0], *rows.shape[1:])
        assert self.collectives is not None
        return self.collectives.all_gather(torch.cat((rows, missing)))


ALONE = Ranks(0, 1, "replicated", torch.device("cpu"), None, None)
