"""Models that run. A new one is a file here, its layout, and a line in `_MODULES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, Self

import torch

from moe_nvfp4.batch import Batch
from moe_nvfp4.cache import CacheSpec, SequenceCache
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.expert_buffers import ExpertBuffers
from moe_nvfp4.kernels.linear import DenseWeight, Invariant, Projection, Summed
from moe_nvfp4.layouts import Config
from moe_nvfp4.routing.dispatch import Dispatcher

_MODULES = {
    "qwen3_moe": "qwen3_moe",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
}


class Model(Protocol):
    """What a runner needs of a model; it may be built without a process group and without a GPU."""

    @property
    def num_layers(self) -> int: ...

    def forward(self, batch: Batch, cache: SequenceCache) -> torch.Tensor:
        """Final hidden states [T, H] of the new tokens; what later tokens need of them goes to the cache."""

    def run_layers(
        self, x_TH: torch.Tensor, layers: range, batch: Batch, cache: SequenceCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after some adjacent layers, and the same through the norm that follows them."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocabulary] of some rows."""


class ModelConfig(Protocol):
    """What a runner and the memory plan need of a model's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def cache_spec(self) -> CacheSpec: ...

    def workspace_bytes(self, rows: int, itemsize: int) -> int:
        """Scratch of one forward pass of `rows` new tokens on a GPU, beyond weights and cache."""

    def shared_experts(self) -> Mapping[int, Mapping[str, str]]:
        """Experts that every row takes, by layer: projection -> name of its dense weight.

        Where all of them have the format and the shape of routed ones, they are loaded as one expert more.
        """

    def sharded(self, ranks: int) -> Self:
        """Of one of so many ranks that share the heads; raises where the heads cannot be shared out like that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a model is built from."""

    weights: dict[str, DenseWeight]  # each is taken once, so that no copy of a stacked one stays behind
    experts: ExpertBuffers
    dispatcher: Dispatcher
    dtype: torch.dtype
    fast: bool  # bfloat16 on a GPU: stack weights that share their input
    batch_invariant: bool = False  # ask kernels for rows whose bits do not depend on the other rows
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None  # where each rank has some of the heads

    def take(self, name: str) -> DenseWeight | Invariant:
        return self.projection(self.weights.pop(name))

    def projection(self, weight: DenseWeight) -> DenseWeight | Invariant:
        """A weight as `linear` is to take it."""
        return Invariant(weight) if self.batch_invariant else weight

    def from_heads(self, name: str) -> Projection | Summed:
        """A projection that takes what heads give."""
        weight = self.take(name)
        return weight if self.sum_over_ranks is None else Summed(weight, self.sum_over_ranks)

    def plain(self, name: str) -> torch.Tensor:
        weight = self.weights.pop(name)
        assert isinstance(weight, torch.Tensor), name
        return weight


def model_config(config: Config) -> ModelConfig:
    """The typed config of a model that runs; raises before anything is read for one that does not."""
    typed: ModelConfig = _module(config).config_of(config)
    return typed


def build_model(config: Config, typed: ModelConfig, parts: Parts) -> Model:
    """`typed`: what `model_config` gives for the config, or what of it one rank has."""
    model: Model = _module(config).build(typed, parts)
    assert not parts.weights, f"weights that the model did not take: {sorted(parts.weights)[:5]}"
    return model


def _module(config: Config) -> Any:
    model_type = str(config.get("model_type"))
    if model_type not in _MODULES:
        raise CheckpointError(
            f"config.json: model_type {model_type!r}: this version runs {', '.join(_MODULES)}. "
            "`moe-nvfp4 inspect` works for this checkpoint; generation does not yet."
        )
    return import_module(f"moe_nvfp4.models.{_MODULES[model_type]}")
