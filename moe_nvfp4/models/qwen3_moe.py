"""Qwen3 MoE: Qwen3-30B-A3B, Qwen3-Coder-30B-A3B, Qwen3-235B-A22B.

Letters: T rows, H hidden, N heads, G key-value heads, D head size, E experts, K experts of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moe_nvfp4.batch import Batch
from moe_nvfp4.dense_weights import DenseWeights
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.expert_buffers import ExpertBuffers, LayerExperts
from moe_nvfp4.kernels.attention import attention
from moe_nvfp4.kernels.linear import DenseWeight, embedding, linear
from moe_nvfp4.kernels.rmsnorm import rmsnorm
from moe_nvfp4.kernels.rope import rope, rope_table
from moe_nvfp4.kernels.routed_experts import routed_experts
from moe_nvfp4.kv_cache import KVCache
from moe_nvfp4.layouts import Config
from moe_nvfp4.layouts.fields import Fields
from moe_nvfp4.layouts.qwen3_moe import dense_layers
from moe_nvfp4.routing.dispatch import Dispatcher
from moe_nvfp4.routing.topk import softmax_topk


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

    def workspace_bytes(self, rows: int, max_batch_size: int, max_seq_len: int, itemsize: int) -> int:
        """Of one forward pass: the largest of its stages, each counted with its inputs and float32 copies."""
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention_bytes = rows * 4 * heads * itemsize + 2 * self.num_heads * rows * max_seq_len * 4
        pairs = rows * self.experts_per_token
        experts = pairs * (2 * self.hidden_size + 3 * self.intermediate_size) * 4
        decoded = 3 * self.hidden_size * self.intermediate_size * 4 + 4096 * self.hidden_size * (4 + itemsize)
        logits = 4 * max_batch_size * self.vocab_size * 4
        return rows * 6 * self.hidden_size * itemsize + decoded + max(attention_bytes, experts, logits)


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
        rope_theta=_rope_theta(fields),
        context_length=fields.integer("max_position_embeddings", default=32768),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _rope_theta(fields: Fields) -> float:
    """transformers 5 writes rope_parameters; 4.x files have rope_theta and rope_scaling."""
    rope_fields = fields.section("rope_parameters") or fields
    scaling = fields.section("rope_scaling") or rope_fields
    if (kind := scaling.text("rope_type", "type", default="default")) != "default":
        raise CheckpointError(
            f"config.json: rope type {kind!r:.40}: not supported; expected 'default'. "
            "Without the entry the model runs within its trained context."
        )
    return rope_fields.number("rope_theta", 10_000.0)


@dataclass(frozen=True, slots=True)
class Attention:
    q: DenseWeight
    k: DenseWeight
    v: DenseWeight
    o: DenseWeight
    q_norm: torch.Tensor
    k_norm: torch.Tensor

    def forward(
        self,
        x_TH: torch.Tensor,
        layer: int,
        batch: Batch,
        cache: KVCache,
        cos: torch.Tensor,
        sin: torch.Tensor,
        config: Qwen3MoeConfig,
    ) -> torch.Tensor:
        rows, dim = x_TH.shape[0], config.head_dim
        q_TND = rope(rmsnorm(linear(x_TH, self.q).view(rows, -1, dim), self.q_norm, config.eps), cos, sin)
        k_TGD = rope(rmsnorm(linear(x_TH, self.k).view(rows, -1, dim), self.k_norm, config.eps), cos, sin)
        cache.append(layer, batch, k_TGD, linear(x_TH, self.v).view(rows, -1, dim))
        out_TND = torch.cat([attention(q_TND[s.begin : s.end], *cache.read(layer, s), dim**-0.5) for s in batch.spans])
        return linear(out_TND.reshape(rows, -1), self.o)


@dataclass(frozen=True, slots=True)
class DenseMLP:
    gate: DenseWeight
    up: DenseWeight
    down: DenseWeight

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return linear(F.silu(linear(x_TH, self.gate)) * linear(x_TH, self.up), self.down)


@dataclass(frozen=True, slots=True)
class MoE:
    layer: int
    router: DenseWeight
    experts: LayerExperts
    dispatcher: Dispatcher
    experts_per_token: int
    normalise: bool

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        routes = softmax_topk(linear(x_TH, self.router), self.experts_per_token, normalise=self.normalise)
        rows_TH, (ids_TK, weights_TK), handle = self.dispatcher.dispatch(self.layer, x_TH, routes)
        y_TH = routed_experts(rows_TH, *self.experts.projections, ids_TK, weights_TK)
        return self.dispatcher.combine(y_TH, handle)


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: torch.Tensor
    attention: Attention
    mlp_norm: torch.Tensor
    mlp: MoE | DenseMLP


@dataclass(frozen=True, slots=True)
class Qwen3Moe:
    config: Qwen3MoeConfig
    embed: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: DenseWeight
    inv_freq: torch.Tensor
    dtype: torch.dtype

    def new_cache(self, slots: int, max_seq_len: int, *, device: torch.device, dtype: torch.dtype) -> KVCache:
        c = self.config
        return KVCache(c.num_layers, slots, max_seq_len, c.num_kv_heads, c.head_dim, device=device, dtype=dtype)

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        x_TH = embedding(batch.token_ids, self.embed, self.dtype)
        cos, sin = rope_table(batch.positions, self.inv_freq, self.dtype)
        for index, layer in enumerate(self.layers):
            normed = rmsnorm(x_TH, layer.attention_norm, self.config.eps)
            x_TH = x_TH + layer.attention.forward(normed, index, batch, cache, cos, sin, self.config)
            x_TH = x_TH + layer.mlp.forward(rmsnorm(x_TH, layer.mlp_norm, self.config.eps))
        return rmsnorm(x_TH, self.norm, self.config.eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.head).float()


def build(
    config: Qwen3MoeConfig, weights: DenseWeights, experts: ExpertBuffers, dispatcher: Dispatcher, dtype: torch.dtype
) -> Qwen3Moe:
    """Puts weights in their places; names are those of the published files without the prefix `model.`"""
    embed = _plain(weights, "embed_tokens.weight")
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return Qwen3Moe(
        config=config,
        embed=embed,
        layers=tuple(_layer(config, weights, experts, dispatcher, index) for index in range(config.num_layers)),
        norm=_plain(weights, "norm.weight"),
        head=embed if config.tied else weights["lm_head.weight"],
        inv_freq=(config.rope_theta**-exponents).to(embed.device),
        dtype=dtype,
    )


def _layer(
    config: Qwen3MoeConfig, weights: DenseWeights, experts: ExpertBuffers, dispatcher: Dispatcher, index: int
) -> Layer:
    at, mlp = f"layers.{index}.self_attn.", f"layers.{index}.mlp."
    return Layer(
        attention_norm=_plain(weights, f"layers.{index}.input_layernorm.weight"),
        attention=Attention(
            q=weights[at + "q_proj.weight"],
            k=weights[at + "k_proj.weight"],
            v=weights[at + "v_proj.weight"],
            o=weights[at + "o_proj.weight"],
            q_norm=_plain(weights, at + "q_norm.weight"),
            k_norm=_plain(weights, at + "k_norm.weight"),
        ),
        mlp_norm=_plain(weights, f"layers.{index}.post_attention_layernorm.weight"),
        mlp=DenseMLP(*(weights[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down")))
        if index in config.dense_layers
        else MoE(
            index,
            weights[mlp + "gate.weight"],
            experts.layers[index],
            dispatcher,
            config.experts_per_token,
            config.normalise_weights,
        ),
    )


def _plain(weights: Mapping[str, DenseWeight], name: str) -> torch.Tensor:
    weight = weights[name]
    assert isinstance(weight, torch.Tensor), name
    return weight
