"""Qwen3 MoE: Qwen3-30B-A3B, Qwen3-Coder-30B-A3B, Qwen3-235B-A22B.

Letters: T rows, H hidden, N heads, G key-value heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moe_nvfp4.batch import Batch
from moe_nvfp4.cache import AttentionSpec, CacheSpec, SequenceCache
from moe_nvfp4.kernels.heads import norm_rope_store
from moe_nvfp4.kernels.linear import Projection, Summed, embedding, linear, stack
from moe_nvfp4.kernels.norm_linear import norm_linear
from moe_nvfp4.kernels.paged_attention import paged_attention
from moe_nvfp4.kernels.paged_kv import PagedKV
from moe_nvfp4.kernels.residual_norms import Norm, residual_norms
from moe_nvfp4.kernels.route import route
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.layouts import Config
from moe_nvfp4.layouts.fields import Fields
from moe_nvfp4.layouts.qwen3_moe import dense_layers
from moe_nvfp4.models import Parts
from moe_nvfp4.models.moe import GatedMLP, RoutedExperts, workspace_bytes
from moe_nvfp4.models.rope import frequencies, rope_settings
from moe_nvfp4.routing.dispatch import StepRows
from moe_nvfp4.sharding import heads_of_rank, kv_heads_of_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3MoeConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the expert
    num_experts: int
    experts_per_token: int
    normalise_weights: bool
    dense_layers: frozenset[int]
    eps: float
    rope_theta: float
    context_length: int
    tied: bool

    @property
    def activation(self) -> str:
        return "silu"

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec((AttentionSpec(tuple(range(self.num_layers)), self.num_kv_heads, self.head_dim),))

    def workspace_bytes(self, rows: int, itemsize: int) -> int:
        widest = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return workspace_bytes(
            rows,
            itemsize,
            hidden=self.hidden_size,
            widest=widest,
            pairs=self.experts_per_token,
            inner=self.intermediate_size,
        )

    def shared_experts(self) -> Mapping[int, Mapping[str, str]]:
        return {}

    def sharded(self, ranks: int) -> "Qwen3MoeConfig":
        heads, kv_heads = heads_of_rank(self.num_heads, ranks), kv_heads_of_rank(self.num_kv_heads, ranks)
        return replace(self, num_heads=heads, num_kv_heads=kv_heads)


def config_of(config: Config) -> Qwen3MoeConfig:
    fields = Fields(config)
    hidden, (heads, kv_heads) = (
        fields.integer("hidden_size"),
        fields.head_counts("num_attention_heads", "num_key_value_heads"),
    )
    if fields.text("hidden_act", default="silu") != "silu":
        raise fields.error("hidden_act", "silu")
    layers = fields.layer_count()
    return Qwen3MoeConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.integer("head_dim", default=max(hidden // heads, 1)),
        intermediate_size=fields.integer("moe_intermediate_size"),
        num_experts=fields.expert_count("num_experts", "num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        normalise_weights=fields.flag("norm_topk_prob", False),
        dense_layers=dense_layers(fields, layers),
        eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_settings(fields)[0],
        context_length=fields.integer("max_position_embeddings", default=32768),
        tied=fields.flag("tie_word_embeddings", False),
    )


@dataclass(frozen=True, slots=True)
class Attention:
    qkv: Projection
    o: Projection | Summed
    q_norm: torch.Tensor
    k_norm: torch.Tensor

    def forward(
        self, qkv: torch.Tensor, kv: PagedKV, rows: Rows, inv_freq: torch.Tensor, config: Qwen3MoeConfig
    ) -> torch.Tensor:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv_TND = qkv.view(-1, heads + 2 * kv_heads, dim)
        q_TND, k_TGD, v_TGD = qkv_TND.split((heads, kv_heads, kv_heads), dim=1)
        q_TND = norm_rope_store(q_TND, k_TGD, v_TGD, kv, rows, inv_freq, config.eps, self.q_norm, self.k_norm)
        return paged_attention(q_TND, kv, rows, dim**-0.5).flatten(1)


@dataclass(frozen=True, slots=True)
class MoE:
    router: torch.Tensor
    routed: RoutedExperts
    experts_per_token: int
    normalise: bool

    def forward(self, x_TH: torch.Tensor, step: StepRows | None) -> torch.Tensor:
        invariant = self.routed.batch_invariant
        routes = route(x_TH, self.router, self.experts_per_token, normalise=self.normalise, batch_invariant=invariant)
        return self.routed.forward(x_TH, routes, step)


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MoE | GatedMLP


@dataclass(frozen=True, slots=True)
class Qwen3Moe:
    config: Qwen3MoeConfig
    embed: torch.Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Projection
    inv_freq: torch.Tensor
    dtype: torch.dtype

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def forward(self, batch: Batch, cache: SequenceCache) -> torch.Tensor:
        x_TH = embedding(batch.token_ids, self.embed, self.dtype)
        return self.run_layers(x_TH, range(self.num_layers), batch, cache)[1]

    def run_layers(
        self, x_TH: torch.Tensor, layers: range, batch: Batch, cache: SequenceCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TH, (given,) = self._into(layers, layers.start, x_TH)
        for index in layers:
            layer = self.layers[index]
            heads_TV = layer.attention.forward(given, cache.kv[index], batch.rows, self.inv_freq, self.config)
            x_TH, (normed_TH,) = residual_norms(x_TH, [(linear(heads_TV, layer.attention.o), None)], [layer.mlp_norm])
            mlp = layer.mlp
            y_TH = mlp.forward(normed_TH, batch.step) if isinstance(mlp, MoE) else mlp.forward(normed_TH)
            x_TH, (given,) = self._into(layers, index + 1, x_TH, y_TH)
        return x_TH, given

    def _into(
        self, layers: range, index: int, x_TH: torch.Tensor, y_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The residual stream with one branch more, and what a layer's attention takes of it; after the last of
        `layers` the norm that follows."""
        norm = self.layers[index].attention_norm if index < self.num_layers else self.norm
        if index in layers:
            return norm_linear(x_TH, y_TH, norm, [self.layers[index].attention.qkv])
        return residual_norms(x_TH, [] if y_TH is None else [(y_TH, None)], [norm])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.head)


def build(config: Qwen3MoeConfig, parts: Parts) -> Qwen3Moe:
    """Puts weights in their places; names are those of the published files without the prefix `model.`"""
    embed = parts.plain("embed_tokens.weight")
    return Qwen3Moe(
        config=config,
        embed=embed,
        layers=tuple(_layer(config, parts, index) for index in range(config.num_layers)),
        norm=Norm(parts.plain("norm.weight"), config.eps),
        head=parts.projection(embed) if config.tied else parts.take("lm_head.weight"),
        inv_freq=frequencies(config.rope_theta, config.head_dim).to(embed.device),
        dtype=parts.dtype,
    )


def _layer(config: Qwen3MoeConfig, parts: Parts, index: int) -> Layer:
    layer = f"layers.{index}."
    at, mlp = layer + "self_attn.", layer + "mlp."
    return Layer(
        attention_norm=Norm(parts.plain(layer + "input_layernorm.weight"), config.eps),
        attention=Attention(
            qkv=stack([parts.take(f"{at}{name}_proj.weight") for name in "qkv"], fast=parts.fast),
            o=parts.from_heads(at + "o_proj.weight"),
            q_norm=parts.plain(at + "q_norm.weight"),
            k_norm=parts.plain(at + "k_norm.weight"),
        ),
        mlp_norm=Norm(parts.plain(layer + "post_attention_layernorm.weight"), config.eps),
        mlp=GatedMLP.of(parts, mlp, config.activation)
        if index in config.dense_layers
        else MoE(
            parts.plain(mlp + "gate.weight"),
            RoutedExperts.of(parts, index, config.activation),
            config.experts_per_token,
            config.normalise_weights,
        ),
    )
