"""The parts of a layer that models share: a dense gated MLP, and routed experts behind a dispatcher.

Letters: T rows, H hidden, I inner, K experts of a row.
"""

from dataclasses import dataclass

import torch

from moe_nvfp4.expert_buffers import LayerExperts
from moe_nvfp4.kernels.gated import gated
from moe_nvfp4.kernels.linear import Projection, linear, stack
from moe_nvfp4.kernels.route import Routes
from moe_nvfp4.kernels.routed_experts import routed_experts
from moe_nvfp4.models import Parts
from moe_nvfp4.routing.dispatch import Dispatcher, StepRows


@dataclass(frozen=True, slots=True)
class GatedMLP:
    gate_up: Projection
    down: Projection
    activation: str

    @classmethod
    def of(cls, parts: Parts, prefix: str, activation: str) -> "GatedMLP":
        gate, up, down = (parts.take(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        return cls(stack([gate, up], fast=parts.fast), down, activation)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return linear(gated(linear(x_TH, self.gate_up), self.activation), self.down)


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    layer: int
    experts: LayerExperts
    dispatcher: Dispatcher
    activation: str
    among: int  # experts of the layer on all ranks, replicas counted
    batch_invariant: bool

    @classmethod
    def of(cls, parts: Parts, layer: int, activation: str) -> "RoutedExperts":
        among = sum(map(len, parts.experts.placement.slots[layer]))
        return cls(layer, parts.experts.layers[layer], parts.dispatcher, activation, among, parts.batch_invariant)

    def forward(self, x_TH: torch.Tensor, routes: Routes, step: StepRows | None) -> torch.Tensor:
        rows_TH, (ids_TK, weights_TK), handle = self.dispatcher.dispatch(self.layer, x_TH, routes, step)
        if self.experts.up.shape[0]:
            y_TH = routed_experts(
                rows_TH,
                *self.experts.projections,
                ids_TK,
                weights_TK,
                self.activation,
                among=self.among,
                batch_invariant=self.batch_invariant,
            )
        else:  # this rank has none of the layer's experts
            y_TH = torch.zeros_like(rows_TH)
        return self.dispatcher.combine(y_TH, handle)


def workspace_bytes(rows: int, itemsize: int, *, hidden: int, widest: int, pairs: int, inner: int) -> int:
    """Of the stages of a layer the largest, with its inputs: `widest` is the longest row of a projection's output,
    `pairs` the experts of a row."""
    dense = rows * (4 * hidden + 3 * widest) * itemsize
    experts = rows * pairs * (4 * hidden + 2 * inner * itemsize) + rows * 2 * hidden * itemsize
    return max(dense, experts)
