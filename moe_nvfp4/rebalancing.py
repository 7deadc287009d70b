"""Experts move between ranks while requests are served: read beside the buffers, then swapped in between two steps.

Buffers and tables keep their addresses, so captured graphs go on. All ranks of a group replace a layer's placement at
the same turn. With counted rows (`MoERunner.expert_loads`) and routing/rebalance.py:

    rebalancing = Rebalancing(prepared, experts)
    for moves in rebalancing.moves(placement):
        staged = rebalancing.read(moves)                # in any thread
        rebalancing.replace(placement, moves, staged)   # between steps, on all ranks
"""

import torch

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.errors import RequestError
from moe_nvfp4.expert_buffers import ExpertBuffers, LayerExperts, load_experts
from moe_nvfp4.preparation import Preparation
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.routing.rebalance_moves import LayerMoves, Read, plan_moves


class Rebalancing:
    """Of one rank. `read` takes memory for the experts of a layer that come to the rank; `replace` lets go of it."""

    def __init__(self, prepared: Preparation, experts: ExpertBuffers):
        self._folder, self._found, self._fast = prepared.folder, prepared.found, prepared.fast
        self._device, self._experts = prepared.device, experts
        self._slots = prepared.placement.slots  # as many as each rank has, for good

    def moves(self, placement: Placement) -> tuple[LayerMoves, ...]:
        """Layers that change, the same at all ranks. Raises where a rank has too few slots."""
        plans = plan_moves(self._experts.placement, placement)
        for layer, ranks in placement.slots.items():
            for rank, held in enumerate(ranks):
                if len(held) > (room := len(self._slots[layer][rank])):
                    raise RequestError(
                        f"placement: layer {layer} gives rank {rank} {len(held)} experts, and it has {room} slots; "
                        "load with more spare_experts, or place fewer"
                    )
        return plans

    def read(self, moves: LayerMoves) -> LayerExperts | None:
        """The experts that this rank must have for the layer, from the files; None if it needs none."""
        reads = self._reads(moves)
        if not reads:
            return None
        wanted = {moves.layer: [read.expert for read in reads]}
        with Checkpoint.open(self._folder) as checkpoint:
            loaded = load_experts(
                checkpoint, self._found, wanted, device=self._device, fragments=self._fast, progress=False
            )
        return loaded[moves.layer]

    def replace(self, placement: Placement, moves: LayerMoves, staged: LayerExperts | None) -> None:
        """From the next step on the layer is served by `placement`."""
        layer, experts = moves.layer, self._experts
        for copy in moves.copies:
            if copy.rank == experts.rank:
                for block in filter(None, experts.layers[layer].projections):
                    for part in block:
                        part[copy.target].copy_(part[copy.source])
        if staged is not None:
            self._put(layer, self._reads(moves), staged)
        experts.tables.replace(placement, layer)
        if self._device.type == "cuda":
            # A kernel may fetch weights before the one ahead of it in the stream has ended.
            torch.cuda.current_stream(self._device).synchronize()

    def _put(self, layer: int, reads: list[Read], staged: LayerExperts) -> None:
        slots = torch.tensor([read.slot for read in reads], device=self._device)
        for target, source in zip(self._experts.layers[layer].projections, staged.projections, strict=True):
            if target is not None and source is not None:
                for part, new in zip(target, source, strict=True):
                    part.index_copy_(0, slots, new)
        if (scale_E := self._experts.down_scales.get(layer)) is not None:
            arrived = torch.tensor([read.expert for read in reads], device=self._device)
            scaled = staged.down.global_scale * scale_E[arrived]
            self._experts.layers[layer].down.global_scale.index_copy_(0, slots, scaled)

    def _reads(self, moves: LayerMoves) -> list[Read]:
        return [read for read in moves.reads if read.rank == self._experts.rank]
