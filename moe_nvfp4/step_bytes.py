"""The bytes that a step of next tokens must move, by kind: a floor, with every weight read once and nothing read twice.

Divided by the rate at which the memory is read, it is the least time that the step could take.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_nvfp4.cache import CacheSettings, CacheSpec
from moe_nvfp4.dense_weights import dense_bytes
from moe_nvfp4.expert_buffers import expert_bytes
from moe_nvfp4.kernels.delta_state import bytes_per_token
from moe_nvfp4.models import ModelConfig
from moe_nvfp4.survey import Survey


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Of a model on one device."""

    weights: dict[str, float]  # of every step
    expert_blocks: tuple[tuple[int, int], ...]  # of each layer: bytes of an expert; experts that take every row
    routed_experts: int
    experts_per_token: int
    spec: CacheSpec
    settings: CacheSettings

    @classmethod
    def of(cls, found: Survey, config: ModelConfig, dtype: torch.dtype, settings: CacheSettings) -> "StepBytes":
        weights = dict.fromkeys(("attention and mixers", "dense MLP", "router", "head"), 0.0)
        has_head = "lm_head.weight" in found.dense
        for name, source in found.dense.items():
            nbytes = dense_bytes(source, dtype)
            if name == "embed_tokens.weight":
                weights["head"] += 0 if has_head else nbytes
            elif name == "lm_head.weight":
                weights["head"] += nbytes
            elif "_attn." in name:
                weights["attention and mixers"] += nbytes
            elif "router." in name or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
                weights["router"] += nbytes
            else:
                weights["dense MLP"] += nbytes
        blocks = tuple((expert_bytes(block), block.count - config.num_experts) for block in found.layout.experts)
        return cls(weights, blocks, config.num_experts, config.experts_per_token, config.cache_spec, settings)

    def by_kind(self, lengths: Sequence[int]) -> dict[str, float]:
        """`lengths`: tokens of each sequence, the new one included. Of experts the expected number of distinct ones
        under uniform routing."""
        share = 1 - (1 - self.experts_per_token / self.routed_experts) ** len(lengths) if self.routed_experts else 0.0
        distinct = self.routed_experts * share
        experts = sum(nbytes * (distinct + always) for nbytes, always in self.expert_blocks)
        return {"experts": experts, **self.weights, "cache": self._cache(lengths)}

    def total(self, lengths: Sequence[int]) -> float:
        return sum(self.by_kind(lengths).values())

    def _cache(self, lengths: Sequence[int]) -> float:
        moved = 0.0
        for attention in self.spec.attention:
            window = attention.window
            kept = sum(min(length, window) for length in lengths) if window else sum(lengths)
            token = 2 * attention.kv_heads * attention.head_dim * self.settings.kv_dtype.itemsize
            moved += len(attention.layers) * kept * token
        if delta := self.spec.delta:
            moved += len(lengths) * len(delta.layers) * bytes_per_token(delta.heads, len(lengths))
        return moved
