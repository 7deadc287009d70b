"""Models that run. A new one is a file here, its layout, and a line in `_MODULES`."""

from importlib import import_module
from typing import Any, Protocol

import torch

from moe_nvfp4.batch import Batch
from moe_nvfp4.dense_weights import DenseWeights
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.expert_buffers import ExpertBuffers
from moe_nvfp4.kv_cache import KVCache
from moe_nvfp4.layouts import Config
from moe_nvfp4.routing.dispatch import Dispatcher

_MODULES = {"qwen3_moe": "qwen3_moe"}


class Model(Protocol):
    """What a runner needs of a model; it may be built without a process group and without a GPU."""

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Final hidden states [T, H] of the new tokens; their keys and values go to the cache."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, vocabulary] of some rows."""

    def new_cache(self, slots: int, max_seq_len: int, *, device: torch.device, dtype: torch.dtype) -> KVCache: ...


class ModelConfig(Protocol):
    """What a runner and the memory plan need of a model's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...

    def workspace_bytes(self, rows: int, max_batch_size: int, max_seq_len: int, itemsize: int) -> int:
        """Scratch of one forward pass of `rows` new tokens, beyond weights and cache."""


def model_config(config: Config) -> ModelConfig:
    """The typed config of a model that runs; raises before anything is read for one that does not."""
    typed: ModelConfig = _module(config).config_of(config)
    return typed


def build_model(
    config: Config, weights: DenseWeights, experts: ExpertBuffers, dispatcher: Dispatcher, dtype: torch.dtype
) -> Model:
    module = _module(config)
    model: Model = module.build(module.config_of(config), weights, experts, dispatcher, dtype)
    return model


def _module(config: Config) -> Any:
    model_type = str(config.get("model_type"))
    if model_type not in _MODULES:
        raise CheckpointError(
            f"config.json: model_type {model_type!r}: this version runs {', '.join(_MODULES)}. "
            "`moe-nvfp4 inspect` works for this checkpoint; generation does not yet."
        )
    return import_module(f"moe_nvfp4.models.{_MODULES[model_type]}")
