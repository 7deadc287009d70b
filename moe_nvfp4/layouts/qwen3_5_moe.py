"""Qwen3.5 and Qwen3.6 MoE: gated delta nets, every fourth layer full attention, experts in all layers."""

from dataclasses import dataclass

from moe_nvfp4.layouts.base import CacheGeometry, Config, ExpertBlock, Layout, Parameter
from moe_nvfp4.layouts.fields import MAX_LAYERS, Fields
from moe_nvfp4.layouts.parts import (
    Parameters,
    attention,
    biases,
    embeddings,
    gated_mlp,
    layer_types,
    linears,
    norms,
    text_fields,
    tied,
)


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    inner: int
    shared_inner: int
    key_rows: int
    value_heads: int
    value_dim: int
    key_dim: int
    conv_kernel: int

    @property
    def value_rows(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def conv_rows(self) -> int:
        return 2 * self.key_rows + self.value_rows


def layout(config: Config) -> Layout:
    fields, text, prefix = text_fields(config)
    sizes = _sizes(text)
    kinds = layer_types(
        text, ("linear_attention", "full_attention"), text.integer("full_attention_interval", default=4)
    )
    parameters: Parameters = {}
    blocks: list[ExpertBlock] = []
    vocabulary = (sizes.vocabulary, sizes.hidden)
    parameters |= embeddings(f"{prefix}embed_tokens.weight", vocabulary, tied=tied(fields, text, False))
    for index, kind in enumerate(kinds):
        layer = f"{prefix}layers.{index}."
        parameters |= _attention(layer, sizes) if kind == "full_attention" else _delta_net(layer, sizes)
        parameters |= _mlp(layer, sizes)
        projections = gated_mlp(sizes.hidden, sizes.inner)
        blocks.append(ExpertBlock(index, layer + "mlp.experts.", sizes.experts, projections))
    parameters |= norms(prefix, sizes.hidden, "norm", values="offset_norm")
    vision = fields.section("vision_config")
    return Layout(
        config["model_type"],
        parameters,
        tuple(blocks),
        _cache(kinds, sizes),
        ignored=_vision(vision) if vision else {},
        mtp=_mtp(text.integer("mtp_num_hidden_layers", default=0, low=0, high=MAX_LAYERS), sizes),
    )


def _sizes(text: Fields) -> _Sizes:
    text.require_unset("attention_bias", "mlp_only_layers")
    heads, kv_heads = text.head_counts("num_attention_heads", "num_key_value_heads")
    value_heads, key_heads = text.head_counts("linear_num_value_heads", "linear_num_key_heads")
    experts = text.expert_count("num_experts", "num_local_experts")
    text.check_top_k("num_experts_per_tok", experts)
    key_dim = text.integer("linear_key_head_dim")
    return _Sizes(
        hidden=text.integer("hidden_size"),
        vocabulary=text.integer("vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=text.integer("head_dim"),
        experts=experts,
        inner=text.integer("moe_intermediate_size"),
        shared_inner=text.integer("shared_expert_intermediate_size"),
        key_rows=key_heads * key_dim,
        value_heads=value_heads,
        value_dim=text.integer("linear_value_head_dim"),
        key_dim=key_dim,
        conv_kernel=text.integer("linear_conv_kernel_dim"),
    )


def _cache(kinds: tuple[str, ...], sizes: _Sizes) -> CacheGeometry:
    full = kinds.count("full_attention")
    recurrent = 4 * sizes.value_heads * sizes.key_dim * sizes.value_dim  # float32
    convolution = 2 * (sizes.conv_kernel - 1) * sizes.conv_rows  # BF16
    return CacheGeometry(
        kv_elements_per_token=2 * full * sizes.kv_heads * sizes.head_dim,
        state_bytes=(len(kinds) - full) * (recurrent + convolution),
    )


def _attention(layer: str, sizes: _Sizes) -> Parameters:
    rows = sizes.heads * sizes.head_dim
    # q_proj holds query and output gate, head by head.
    shapes = attention(sizes.hidden, 2 * rows, sizes.kv_heads * sizes.head_dim, rows)
    head_norms = norms(layer + "self_attn.", sizes.head_dim, "q_norm", "k_norm", values="offset_norm")
    return linears(layer + "self_attn.", shapes) | head_norms


def _delta_net(layer: str, sizes: _Sizes) -> Parameters:
    mixer, hidden = layer + "linear_attn.", sizes.hidden
    shapes = {
        "in_proj_qkv": (sizes.conv_rows, hidden),
        "in_proj_z": (sizes.value_rows, hidden),
        "in_proj_b": (sizes.value_heads, hidden),
        "in_proj_a": (sizes.value_heads, hidden),
        "out_proj": (hidden, sizes.value_rows),
    }
    return {
        **linears(mixer, shapes),
        mixer + "conv1d.weight": Parameter((sizes.conv_rows, 1, sizes.conv_kernel)),
        mixer + "A_log": Parameter((sizes.value_heads,), values="decay"),
        mixer + "dt_bias": Parameter((sizes.value_heads,), values="step"),
        **norms(mixer, sizes.value_dim, "norm"),  # the one norm here that multiplies by the plain weight
    }


def _mlp(layer: str, sizes: _Sizes) -> Parameters:
    """Layer norms, router and shared expert."""
    hidden = sizes.hidden
    return {
        **norms(layer, hidden, "input_layernorm", "post_attention_layernorm", values="offset_norm"),
        layer + "mlp.gate.weight": Parameter((sizes.experts, hidden)),  # an nn.Parameter, never quantised
        **linears(layer + "mlp.", {"shared_expert_gate": (1, hidden)}),
        **linears(layer + "mlp.shared_expert.", gated_mlp(hidden, sizes.shared_inner)),
    }


def _mtp(layers: int, sizes: _Sizes) -> Parameters:
    """Multi-token prediction: attention layers like those of the model, but with fused experts."""
    if not layers:
        return {}
    hidden, names = sizes.hidden, ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    parameters = linears("mtp.", {"fc": (hidden, 2 * hidden)})
    parameters |= norms("mtp.", hidden, *names, values="offset_norm")
    for index in range(layers):
        layer = f"mtp.layers.{index}."
        parameters |= _attention(layer, sizes) | _mlp(layer, sizes)
        experts = layer + "mlp.experts."
        parameters[experts + "gate_up_proj"] = Parameter((sizes.experts, 2 * sizes.inner, hidden))
        parameters[experts + "down_proj"] = Parameter((sizes.experts, hidden, sizes.inner))
    return parameters


def _vision(vision: Fields) -> Parameters:
    tower, size, inner = "model.visual.", vision.integer("hidden_size"), vision.integer("intermediate_size")
    patch = vision.integer("patch_size")
    kernel = (vision.integer("in_channels", default=3), vision.integer("temporal_patch_size", default=2))
    merged = size * vision.integer("spatial_merge_size", default=2) ** 2
    output = vision.integer("out_hidden_size")
    parameters = {
        tower + "patch_embed.proj.weight": Parameter((size, *kernel, patch, patch)),
        tower + "pos_embed.weight": Parameter((vision.integer("num_position_embeddings"), size)),
        **norms(tower, size, "merger.norm"),
        **linears(tower + "merger.", {"linear_fc1": (merged, merged), "linear_fc2": (output, merged)}),
        **biases(tower, {"patch_embed.proj": size, "merger.norm": size}),
        **biases(tower + "merger.", {"linear_fc1": merged, "linear_fc2": output}),
    }
    shapes = {
        "attn.qkv": (3 * size, size),
        "attn.proj": (size, size),
        "mlp.linear_fc1": (inner, size),
        "mlp.linear_fc2": (size, inner),
    }
    rows = {"norm1": size, "norm2": size} | {name: shape[0] for name, shape in shapes.items()}
    for index in range(vision.integer("depth", high=MAX_LAYERS)):
        block = f"{tower}blocks.{index}."
        parameters |= norms(block, size, "norm1", "norm2") | linears(block, shapes) | biases(block, rows)
    return parameters
