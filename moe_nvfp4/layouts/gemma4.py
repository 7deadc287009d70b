"""Gemma 4: sliding and full attention of different widths, a dense MLP and, in the MoE, experts beside it."""

from dataclasses import dataclass

from moe_nvfp4.layouts.base import CacheGeometry, Config, ExpertBlock, Layout, Parameter
from moe_nvfp4.layouts.fields import MAX_LAYERS, Fields
from moe_nvfp4.layouts.parts import (
    Parameters,
    attention,
    embeddings,
    gated_mlp,
    layer_types,
    linears,
    norms,
    text_fields,
    tied,
)

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_EXPERT_NORMS = (
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
    "pre_feedforward_layernorm_2",
)


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """Heads of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    has_v: bool

    @property
    def kv_elements(self) -> int:
        # Without v_proj, K and V come from one projection but differ after their norms, so both are cached.
        return 2 * self.kv_heads * self.head_dim


def layout(config: Config) -> Layout:
    fields, text, prefix = text_fields(config)
    # Per-layer inputs, shared KV and wide MLPs are features of the small edge models.
    text.require_unset("attention_bias", "hidden_size_per_layer_input", "num_kv_shared_layers", "use_double_wide_mlp")
    hidden = text.integer("hidden_size")
    kinds = layer_kinds(text)
    has_experts = text.flag("enable_moe_block", False)
    vocabulary = (text.integer("vocab_size"), hidden)

    heads = [layer_heads(text, index, kind == "full_attention") for index, kind in enumerate(kinds)]
    parameters: Parameters = {}
    blocks: list[ExpertBlock] = []
    parameters |= embeddings(f"{prefix}embed_tokens.weight", vocabulary, tied=tied(fields, text, True))
    for index in range(len(kinds)):
        layer = f"{prefix}layers.{index}."
        parameters |= norms(layer, hidden, *_NORMS)
        parameters |= _attention(layer, hidden, heads[index])
        parameters |= linears(layer + "mlp.", gated_mlp(hidden, text.integer("intermediate_size")))
        parameters[layer + "layer_scalar"] = Parameter((1,), values="scalar")
        if has_experts:
            block = _experts(index, layer, hidden, text)
            blocks.append(block)
            parameters |= norms(layer, hidden, *_EXPERT_NORMS) | _router(layer, hidden, block.count)
    parameters |= norms(prefix, hidden, "norm")

    elements = {"full_attention": 0, "sliding_attention": 0}
    for kind, shape in zip(kinds, heads, strict=True):
        elements[kind] += shape.kv_elements
    cache = CacheGeometry(
        kv_elements_per_token=elements["full_attention"],
        window=text.integer("sliding_window") if elements["sliding_attention"] else 0,
        window_kv_elements_per_token=elements["sliding_attention"],
    )
    # gemma4_unified has no tower; what embeds its images is under other names, ignored by prefix.
    vision = fields.section("vision_config") if config["model_type"] == "gemma4" else None
    ignored = _vision(vision, hidden) if vision else {}
    return Layout(config["model_type"], parameters, tuple(blocks), cache, ignored=ignored)


def layer_kinds(text: Fields) -> tuple[str, ...]:
    interval = text.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    kinds = layer_types(text, ("sliding_attention", "full_attention"), interval)
    return (*kinds[:-1], "full_attention")  # the last layer always is, as in transformers


def layer_heads(text: Fields, index: int, full: bool) -> AttentionHeads:
    """Full layers have heads of their own, in global_* fields or, as transformers saves, layer by layer."""
    heads, kv_heads = text.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim, k_is_v = text.integer("head_dim"), full and text.flag("attention_k_eq_v", False)
    if layers := text.section("per_layer_config"):
        if layer := layers.section(str(index)):
            head_dim = layer.integer("head_dim", default=head_dim)
            kv_heads = layer.integer("num_key_value_heads", default=kv_heads)
            if heads % kv_heads:
                raise layer.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    elif full:
        head_dim = text.integer("global_head_dim", default=512)
        if k_is_v and text.has("num_global_key_value_heads"):
            heads, kv_heads = text.head_counts("num_attention_heads", "num_global_key_value_heads")
    return AttentionHeads(heads, kv_heads, head_dim, has_v=not k_is_v)


def _attention(layer: str, hidden: int, kind: AttentionHeads) -> Parameters:
    rows = kind.heads * kind.head_dim
    shapes = attention(hidden, rows, kind.kv_heads * kind.head_dim, rows)
    if not kind.has_v:
        del shapes["v_proj"]
    head_norms = norms(layer + "self_attn.", kind.head_dim, "q_norm", "k_norm", values="unscaled_norm")
    return linears(layer + "self_attn.", shapes) | head_norms


def _experts(index: int, layer: str, hidden: int, text: Fields) -> ExpertBlock:
    count = text.expert_count("num_experts", "num_local_experts")
    text.check_top_k("top_k_experts", count)
    return ExpertBlock(index, layer + "experts.", count, gated_mlp(hidden, text.integer("moe_intermediate_size")))


def _router(layer: str, hidden: int, experts: int) -> Parameters:
    return {
        **linears(layer + "router.", {"proj": (experts, hidden)}),
        layer + "router.scale": Parameter((hidden,), values="scalar"),
        layer + "router.per_expert_scale": Parameter((experts,), values="scalar"),
    }


def _vision(vision: Fields, text_hidden: int) -> Parameters:
    tower, size = "model.vision_tower.", vision.integer("hidden_size")
    head_dim, patch = vision.integer("head_dim"), vision.integer("patch_size")
    rows, positions = (
        vision.integer("num_attention_heads") * head_dim,
        vision.integer("position_embedding_size"),
    )
    parameters = linears("model.embed_vision.", {"embedding_projection": (text_hidden, size)})
    parameters |= linears(tower, {"patch_embedder.input_proj": (size, 3 * patch**2)})
    parameters[tower + "patch_embedder.position_embedding_table"] = Parameter((2, positions, size))
    if vision.flag("standardize", False):
        parameters[tower + "std_bias"] = Parameter((size,), values="bias")
        parameters[tower + "std_scale"] = Parameter((size,), values="scalar")
    mlp = gated_mlp(size, vision.integer("intermediate_size"))
    shapes = {f"self_attn.{name}.linear": shape for name, shape in attention(size, rows, rows, rows).items()}
    shapes |= {f"mlp.{name}.linear": shape for name, shape in mlp.items()}
    for index in range(vision.integer("num_hidden_layers", high=MAX_LAYERS)):
        layer = f"{tower}encoder.layers.{index}."
        parameters |= norms(layer, size, *_NORMS) | linears(layer, shapes)
        parameters |= norms(layer + "self_attn.", head_dim, "q_norm", "k_norm")
    return parameters
