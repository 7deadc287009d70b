"""Qwen3.5 and Qwen3.6 MoE: gated delta nets, every fourth layer full attention with an output gate, experts in all.

Text only. Letters: T rows, H hidden, N heads, G key-value heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moe_nvfp4.batch import Batch
from moe_nvfp4.cache import AttentionSpec, CacheSpec, DeltaSpec, SequenceCache
from moe_nvfp4.kernels.delta_net import DeltaWeights, delta_net
from moe_nvfp4.kernels.delta_state import DeltaState
from moe_nvfp4.kernels.gated import add_gated_share
from moe_nvfp4.kernels.heads import norm_rope_store
from moe_nvfp4.kernels.linear import Projection, Summed, embedding, linear, stack
from moe_nvfp4.kernels.norm_linear import norm_linear
from moe_nvfp4.kernels.paged_attention import paged_attention
from moe_nvfp4.kernels.paged_kv import PagedKV
from moe_nvfp4.kernels.residual_norms import Norm, residual_norms
from moe_nvfp4.kernels.route import route
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.layouts import Config
from moe_nvfp4.layouts.parts import layer_types, text_fields, tied
from moe_nvfp4.models import Parts
from moe_nvfp4.models.moe import GatedMLP, RoutedExperts, workspace_bytes
from moe_nvfp4.models.rope import frequencies, rope_settings
from moe_nvfp4.routing.dispatch import StepRows
from moe_nvfp4.sharding import delta_of_rank, heads_of_rank, kv_heads_of_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen35MoeConfig:
    vocab_size: int
    hidden_size: int
    full_attention: tuple[bool, ...]  # of each layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    delta: DeltaSpec
    intermediate_size: int  # of the expert
    num_experts: int
    experts_per_token: int
    eps: float
    rope_theta: float
    rotated: int  # leading dimensions of a head that rotate
    context_length: int
    tied: bool

    @property
    def activation(self) -> str:
        return "silu"

    @property
    def cache_spec(self) -> CacheSpec:
        layers = tuple(index for index, full in enumerate(self.full_attention) if full)
        return CacheSpec((AttentionSpec(layers, self.num_kv_heads, self.head_dim),), self.delta)

    def workspace_bytes(self, rows: int, itemsize: int) -> int:
        # Prefill keeps a delta net's convolved rows in float32, and per chunk what the chunks need of each other.
        widest = 3 * (self.delta.channels + self.delta.value_heads * self.delta.value_dim)
        return workspace_bytes(
            rows,
            itemsize,
            hidden=self.hidden_size,
            widest=widest,
            pairs=self.experts_per_token + 1,
            inner=self.intermediate_size,
        )

    def shared_experts(self) -> Mapping[int, Mapping[str, str]]:
        names = ("gate_proj", "up_proj", "down_proj")
        return {
            index: {name: f"layers.{index}.mlp.shared_expert.{name}.weight" for name in names}
            for index in range(len(self.full_attention))
        }

    def sharded(self, ranks: int) -> "Qwen35MoeConfig":
        heads, kv_heads = heads_of_rank(self.num_heads, ranks), kv_heads_of_rank(self.num_kv_heads, ranks)
        return replace(self, num_heads=heads, num_kv_heads=kv_heads, delta=delta_of_rank(self.delta, ranks))


def config_of(config: Config) -> Qwen35MoeConfig:
    fields, text, _ = text_fields(config)
    if text.text("hidden_act", default="silu") != "silu":
        raise text.error("hidden_act", "silu")
    if not text.flag("attn_output_gate", True):
        raise text.error("attn_output_gate", "true")
    interval = text.integer("full_attention_interval", default=4)
    kinds = layer_types(text, ("linear_attention", "full_attention"), interval)
    heads, kv_heads = text.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim, (theta, share) = text.integer("head_dim"), rope_settings(text)
    value_heads, key_heads = text.head_counts("linear_num_value_heads", "linear_num_key_heads")
    key_dim, value_dim = text.integer("linear_key_head_dim"), text.integer("linear_value_head_dim")
    return Qwen35MoeConfig(
        vocab_size=text.integer("vocab_size"),
        hidden_size=text.integer("hidden_size"),
        full_attention=tuple(kind == "full_attention" for kind in kinds),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        delta=DeltaSpec(
            layers=tuple(index for index, kind in enumerate(kinds) if kind == "linear_attention"),
            channels=2 * key_heads * key_dim + value_heads * value_dim,
            kernel=text.integer("linear_conv_kernel_dim"),
            value_heads=value_heads,
            key_dim=key_dim,
            value_dim=value_dim,
        ),
        intermediate_size=text.integer("moe_intermediate_size"),
        num_experts=text.expert_count("num_experts", "num_local_experts"),
        experts_per_token=text.integer("num_experts_per_tok"),
        eps=text.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rotated=int(head_dim * share) // 2 * 2,
        context_length=text.integer("max_position_embeddings", default=32768),
        tied=tied(fields, text, False),
    )


@dataclass(frozen=True, slots=True)
class Attention:
    qkv: Projection  # rows of q: each head's query, then its gate
    out: Projection | Summed
    q_norm: torch.Tensor
    k_norm: torch.Tensor

    @property
    def projections(self) -> list[Projection]:
        return [self.qkv]

    def forward(
        self, projected: list[torch.Tensor], kv: PagedKV, rows: Rows, inv_freq: torch.Tensor, config: Qwen35MoeConfig
    ) -> torch.Tensor:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        (qkv,) = projected
        qkv_TND = qkv.view(-1, 2 * heads + 2 * kv_heads, dim)
        queries, k_TGD, v_TGD = qkv_TND.split((2 * heads, kv_heads, kv_heads), dim=1)
        q_TND, gate_TND = queries[:, 0::2], queries[:, 1::2]
        q_TND = norm_rope_store(
            q_TND, k_TGD, v_TGD, kv, rows, inv_freq, config.eps, self.q_norm, self.k_norm, offset=True
        )
        return paged_attention(q_TND, kv, rows, dim**-0.5, gate_TND=gate_TND).flatten(1)


@dataclass(frozen=True, slots=True)
class DeltaNet:
    qkv_z: Projection
    b_a: Projection
    delta: DeltaWeights
    out: Projection | Summed

    @property
    def projections(self) -> list[Projection]:
        return [self.qkv_z, self.b_a]

    def forward(
        self, projected: list[torch.Tensor], state: DeltaState, rows: Rows, config: Qwen35MoeConfig
    ) -> torch.Tensor:
        channels, heads = config.delta.channels, config.delta.value_heads
        qkv_z, b_a = projected
        return delta_net(
            qkv_z[:, :channels],
            qkv_z[:, channels:],
            b_a[:, :heads],
            b_a[:, heads:],
            self.delta,
            state,
            rows,
            config.eps,
        )


@dataclass(frozen=True, slots=True)
class MoE:
    """The shared expert is either the last of the routed ones or an MLP of its own."""

    router: torch.Tensor  # its last row is the shared expert's gate if that is among the routed ones
    routed: RoutedExperts
    experts_per_token: int
    shared: GatedMLP | None
    shared_gate: Projection | None

    def forward(self, x_TH: torch.Tensor, step: StepRows | None) -> torch.Tensor:
        routes = route(
            x_TH,
            self.router,
            self.experts_per_token,
            normalise=True,
            shared=self.shared is None,
            batch_invariant=self.routed.batch_invariant,
        )
        y_TH = self.routed.forward(x_TH, routes, step)
        if self.shared is None or self.shared_gate is None:
            return y_TH
        return add_gated_share(y_TH, self.shared.forward(x_TH), linear(x_TH, self.shared_gate))


@dataclass(frozen=True, slots=True)
class Layer:
    mixer_norm: Norm
    mixer: Attention | DeltaNet
    mlp_norm: Norm
    moe: MoE


@dataclass(frozen=True, slots=True)
class Qwen35Moe:
    config: Qwen35MoeConfig
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
        x_TH, given = self._into(layers, layers.start, x_TH)
        for index in layers:
            layer, mixer = self.layers[index], self.layers[index].mixer
            if isinstance(mixer, Attention):
                heads_TV = mixer.forward(given, cache.kv[index], batch.rows, self.inv_freq, self.config)
            else:
                heads_TV = mixer.forward(given, cache.states[index], batch.rows, self.config)
            x_TH, (normed_TH,) = residual_norms(x_TH, [(linear(heads_TV, mixer.out), None)], [layer.mlp_norm])
            x_TH, given = self._into(layers, index + 1, x_TH, layer.moe.forward(normed_TH, batch.step))
        return x_TH, given[0]

    def _into(
        self, layers: range, index: int, x_TH: torch.Tensor, y_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The residual stream with one branch more, and what a layer's mixer takes of it; after the last of `layers`
        the norm that follows."""
        norm = self.layers[index].mixer_norm if index < self.num_layers else self.norm
        if index in layers:
            return norm_linear(x_TH, y_TH, norm, self.layers[index].mixer.projections)
        return residual_norms(x_TH, [] if y_TH is None else [(y_TH, None)], [norm])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.head)


def build(config: Qwen35MoeConfig, parts: Parts) -> Qwen35Moe:
    """Puts weights in their places; names are those of the published files without their prefixes."""
    embed = parts.plain("embed_tokens.weight")
    return Qwen35Moe(
        config=config,
        embed=embed,
        layers=tuple(_layer(config, parts, index) for index in range(len(config.full_attention))),
        norm=Norm(parts.plain("norm.weight"), config.eps, offset=True),
        head=parts.projection(embed) if config.tied else parts.take("lm_head.weight"),
        inv_freq=frequencies(config.rope_theta, config.rotated).to(embed.device),
        dtype=parts.dtype,
    )


def _layer(config: Qwen35MoeConfig, parts: Parts, index: int) -> Layer:
    layer = f"layers.{index}."
    attends = config.full_attention[index]
    return Layer(
        mixer_norm=Norm(parts.plain(layer + "input_layernorm.weight"), config.eps, offset=True),
        mixer=_attention(parts, layer + "self_attn.") if attends else _delta_net(parts, layer + "linear_attn."),
        mlp_norm=Norm(parts.plain(layer + "post_attention_layernorm.weight"), config.eps, offset=True),
        moe=_moe(config, parts, index, layer + "mlp."),
    )


def _attention(parts: Parts, at: str) -> Attention:
    return Attention(
        qkv=stack([parts.take(f"{at}{name}_proj.weight") for name in "qkv"], fast=parts.fast),
        out=parts.from_heads(at + "o_proj.weight"),
        q_norm=parts.plain(at + "q_norm.weight"),
        k_norm=parts.plain(at + "k_norm.weight"),
    )


def _delta_net(parts: Parts, at: str) -> DeltaNet:
    return DeltaNet(
        qkv_z=stack([parts.take(f"{at}in_proj_{name}.weight") for name in ("qkv", "z")], fast=parts.fast),
        b_a=stack([parts.take(f"{at}in_proj_{name}.weight") for name in "ba"], fast=parts.fast),
        delta=DeltaWeights(
            conv=parts.plain(at + "conv1d.weight").squeeze(1),
            decay=-parts.plain(at + "A_log").float().exp(),
            step=parts.plain(at + "dt_bias").float(),
            norm=parts.plain(at + "norm.weight"),
        ),
        out=parts.from_heads(at + "out_proj.weight"),
    )


def _moe(config: Qwen35MoeConfig, parts: Parts, index: int, at: str) -> MoE:
    router, gate = parts.plain(at + "gate.weight"), parts.plain(at + "shared_expert_gate.weight")
    routed = RoutedExperts.of(parts, index, config.activation)
    if parts.experts.placement.num_experts > config.num_experts:
        return MoE(torch.cat((router, gate)), routed, config.experts_per_token, None, None)
    shared = GatedMLP.of(parts, at + "shared_expert.", config.activation)
    return MoE(router, routed, config.experts_per_token, shared, parts.projection(gate))
