"""Gemma 4, text only: the 26B-A4B with experts beside a dense MLP, and the dense 31B and 12B.

Window and full attention differ in head size and in key-value heads; in full layers values may be the keys before
their norm. Letters: T rows, H hidden, N heads, G key-value heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moe_nvfp4.batch import Batch
from moe_nvfp4.cache import AttentionSpec, CacheSpec, SequenceCache
from moe_nvfp4.kernels.heads import norm_rope_store
from moe_nvfp4.kernels.linear import Projection, Summed, embedding, linear, stack
from moe_nvfp4.kernels.paged_attention import paged_attention
from moe_nvfp4.kernels.paged_kv import PagedKV
from moe_nvfp4.kernels.residual_norms import Norm, residual_norms
from moe_nvfp4.kernels.route import route
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.layouts import Config
from moe_nvfp4.layouts.gemma4 import AttentionHeads, layer_heads, layer_kinds
from moe_nvfp4.layouts.parts import text_fields, tied
from moe_nvfp4.models import Parts
from moe_nvfp4.models.beside import Beside
from moe_nvfp4.models.moe import GatedMLP, RoutedExperts, workspace_bytes
from moe_nvfp4.models.rope import frequencies, proportional_frequencies, rope_settings_of_kind
from moe_nvfp4.routing.dispatch import StepRows
from moe_nvfp4.sharding import heads_of_rank, kv_heads_of_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma4Config:
    vocab_size: int
    hidden_size: int
    heads: tuple[AttentionHeads, ...]  # of each layer
    full_attention: tuple[bool, ...]
    window: int
    dense_size: int
    num_experts: int  # 0 in the dense models
    experts_per_token: int
    expert_size: int
    eps: float
    window_theta: float
    full_theta: float
    full_share: float  # of a full layer's head that rotates
    softcap: float | None
    context_length: int
    tied: bool

    @property
    def activation(self) -> str:
        return "gelu_tanh"

    @property
    def cache_spec(self) -> CacheSpec:
        groups: dict[tuple[int, int, int], list[int]] = {}
        for index, heads in enumerate(self.heads):
            window = 0 if self.full_attention[index] else self.window
            groups.setdefault((heads.kv_heads, heads.head_dim, window), []).append(index)
        return CacheSpec(tuple(AttentionSpec(tuple(layers), *shape) for shape, layers in groups.items()))

    def workspace_bytes(self, rows: int, itemsize: int) -> int:
        widest = max((2 * heads.heads + 2 * heads.kv_heads) * heads.head_dim for heads in self.heads)
        return workspace_bytes(
            rows,
            itemsize,
            hidden=3 * self.hidden_size,
            widest=max(widest, 3 * self.dense_size),
            pairs=self.experts_per_token,
            inner=self.expert_size,
        )

    def shared_experts(self) -> Mapping[int, Mapping[str, str]]:
        return {}

    def sharded(self, ranks: int) -> "Gemma4Config":
        heads = tuple(
            replace(h, heads=heads_of_rank(h.heads, ranks), kv_heads=kv_heads_of_rank(h.kv_heads, ranks))
            for h in self.heads
        )
        return replace(self, heads=heads)


def config_of(config: Config) -> Gemma4Config:
    fields, text, _ = text_fields(config)
    if text.text("hidden_activation", default="gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise text.error("hidden_activation", "gelu_pytorch_tanh")
    kinds = layer_kinds(text)
    window_theta, _ = rope_settings_of_kind(text, "sliding_attention", "default", 10_000.0)
    full_theta, share = rope_settings_of_kind(text, "full_attention", "proportional", 1_000_000.0)
    has_experts = text.flag("enable_moe_block", False)
    return Gemma4Config(
        vocab_size=text.integer("vocab_size"),
        hidden_size=text.integer("hidden_size"),
        heads=tuple(layer_heads(text, index, kind == "full_attention") for index, kind in enumerate(kinds)),
        full_attention=tuple(kind == "full_attention" for kind in kinds),
        window=text.integer("sliding_window", default=1024),
        dense_size=text.integer("intermediate_size"),
        num_experts=text.expert_count("num_experts", "num_local_experts") if has_experts else 0,
        experts_per_token=text.integer("top_k_experts") if has_experts else 0,
        expert_size=text.integer("moe_intermediate_size") if has_experts else 0,
        eps=text.number("rms_norm_eps", 1e-6),
        window_theta=window_theta,
        full_theta=full_theta,
        full_share=share,
        softcap=text.number("final_logit_softcapping") if text.has("final_logit_softcapping") else None,
        context_length=text.integer("max_position_embeddings", default=131072),
        tied=tied(fields, text, True),
    )


@dataclass(frozen=True, slots=True)
class Attention:
    heads: AttentionHeads
    window: int  # 0: full attention
    qkv: Projection  # without v where values are the keys
    o: Projection | Summed
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    inv_freq: torch.Tensor
    eps: float

    def forward(self, qkv: torch.Tensor, kv: PagedKV, rows: Rows) -> torch.Tensor:
        kinds, shape = 2 if self.heads.has_v else 1, self.heads
        qkv_TND = qkv.view(-1, shape.heads + kinds * shape.kv_heads, shape.head_dim)
        q_TND, k_TGD, *v = qkv_TND.split((shape.heads, *[shape.kv_heads] * kinds), dim=1)
        v_TGD = v[0] if v else k_TGD
        q_TND = norm_rope_store(
            q_TND, k_TGD, v_TGD, kv, rows, self.inv_freq, self.eps, self.q_norm, self.k_norm, norm_v=True
        )
        return paged_attention(q_TND, kv, rows, 1.0, window=self.window).flatten(1)


@dataclass(frozen=True, slots=True)
class MoE:
    router_norm: Norm
    router: torch.Tensor
    norm: Norm
    routed: RoutedExperts
    experts_per_token: int
    post_norm: Norm
    post_dense_norm: Norm
    beside: Beside

    def forward(self, routed_TH: torch.Tensor, x_TH: torch.Tensor, step: StepRows | None) -> torch.Tensor:
        invariant = self.routed.batch_invariant
        routes = route(routed_TH, self.router, self.experts_per_token, normalise=True, batch_invariant=invariant)
        return self.routed.forward(x_TH, routes, step)


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    mlp_norm: Norm
    mlp: GatedMLP
    moe: MoE | None
    post_mlp_norm: Norm
    scalar: torch.Tensor

    def after_attention(
        self, x_TH: torch.Tensor, heads_TV: torch.Tensor, next_norm: Norm, step: StepRows | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        branch = [(linear(heads_TV, self.attention.o), self.post_attention_norm)]
        if self.moe is None:
            x_TH, (normed_TH,) = residual_norms(x_TH, branch, [self.mlp_norm])
            branch = [(self.mlp.forward(normed_TH), self.post_mlp_norm)]
            x_TH, (normed_TH,) = residual_norms(x_TH, branch, [next_norm], scalar=self.scalar)
            return x_TH, normed_TH
        moe = self.moe
        outputs = [self.mlp_norm, moe.router_norm, moe.norm]
        x_TH, (normed_TH, for_router_TH, for_experts_TH) = residual_norms(x_TH, branch, outputs)
        dense_TH, routed_TH = moe.beside.run(
            len(x_TH),
            lambda: self.mlp.forward(normed_TH),
            lambda: moe.forward(for_router_TH, for_experts_TH, step),
        )
        branches = [(dense_TH, moe.post_dense_norm), (routed_TH, moe.post_norm)]
        x_TH, (normed_TH,) = residual_norms(x_TH, branches, [next_norm], after=self.post_mlp_norm, scalar=self.scalar)
        return x_TH, normed_TH


@dataclass(frozen=True, slots=True)
class Gemma4:
    config: Gemma4Config
    embed: torch.Tensor
    embed_scale: torch.Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Projection
    dtype: torch.dtype

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def forward(self, batch: Batch, cache: SequenceCache) -> torch.Tensor:
        x_TH = embedding(batch.token_ids, self.embed, self.dtype) * self.embed_scale
        return self.run_layers(x_TH, range(self.num_layers), batch, cache)[1]

    def run_layers(
        self, x_TH: torch.Tensor, layers: range, batch: Batch, cache: SequenceCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TH, (normed_TH,) = residual_norms(x_TH, [], [self._norm_before(layers.start)])
        for index in layers:
            layer = self.layers[index]
            heads_TV = layer.attention.forward(linear(normed_TH, layer.attention.qkv), cache.kv[index], batch.rows)
            x_TH, normed_TH = layer.after_attention(x_TH, heads_TV, self._norm_before(index + 1), batch.step)
        return x_TH, normed_TH

    def _norm_before(self, index: int) -> Norm:
        return self.layers[index].input_norm if index < self.num_layers else self.norm

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = linear(hidden, self.head)
        cap = self.config.softcap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)


def build(config: Gemma4Config, parts: Parts) -> Gemma4:
    """Puts weights in their places; names are those of the published files without their prefixes."""
    embed = parts.plain("embed_tokens.weight")
    beside = Beside(embed.device)
    return Gemma4(
        config=config,
        embed=embed,
        embed_scale=torch.tensor(config.hidden_size**0.5, dtype=parts.dtype, device=embed.device),
        layers=tuple(_layer(config, parts, index, beside) for index in range(len(config.heads))),
        norm=Norm(parts.plain("norm.weight"), config.eps),
        head=parts.projection(embed) if config.tied else parts.take("lm_head.weight"),
        dtype=parts.dtype,
    )


def _layer(config: Gemma4Config, parts: Parts, index: int, beside: Beside) -> Layer:
    layer = f"layers.{index}."

    def norm(name: str) -> Norm:
        return Norm(parts.plain(f"{layer}{name}.weight"), config.eps)

    return Layer(
        input_norm=norm("input_layernorm"),
        attention=_attention(config, parts, index),
        post_attention_norm=norm("post_attention_layernorm"),
        mlp_norm=norm("pre_feedforward_layernorm"),
        mlp=GatedMLP.of(parts, layer + "mlp.", config.activation),
        moe=MoE(
            router_norm=Norm(parts.plain(layer + "router.scale").float() * config.hidden_size**-0.5, config.eps),
            router=parts.plain(layer + "router.proj.weight"),
            norm=norm("pre_feedforward_layernorm_2"),
            routed=_routed(parts, index, parts.plain(layer + "router.per_expert_scale"), config.activation),
            experts_per_token=config.experts_per_token,
            post_norm=norm("post_feedforward_layernorm_2"),
            post_dense_norm=norm("post_feedforward_layernorm_1"),
            beside=beside,
        )
        if config.num_experts
        else None,
        post_mlp_norm=norm("post_feedforward_layernorm"),
        scalar=parts.plain(layer + "layer_scalar"),
    )


def _attention(config: Gemma4Config, parts: Parts, index: int) -> Attention:
    at, heads, full = f"layers.{index}.self_attn.", config.heads[index], config.full_attention[index]
    inv_freq = (
        proportional_frequencies(config.full_theta, heads.head_dim, config.full_share)
        if full
        else frequencies(config.window_theta, heads.head_dim)
    )
    q_norm = parts.plain(at + "q_norm.weight")
    return Attention(
        heads=heads,
        window=0 if full else config.window,
        qkv=stack(
            [parts.take(f"{at}{name}_proj.weight") for name in ("qkv" if heads.has_v else "qk")], fast=parts.fast
        ),
        o=parts.from_heads(at + "o_proj.weight"),
        q_norm=q_norm,
        k_norm=parts.plain(at + "k_norm.weight"),
        inv_freq=inv_freq.to(q_norm.device),
        eps=config.eps,
    )


def _routed(parts: Parts, index: int, expert_scale: torch.Tensor, activation: str) -> RoutedExperts:
    parts.experts.scale_down(index, expert_scale)
    return RoutedExperts.of(parts, index, activation)
