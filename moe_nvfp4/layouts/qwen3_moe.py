"""Qwen3 MoE: attention in every layer, routed experts in most or all."""

from moe_nvfp4.layouts.base import CacheGeometry, Config, ExpertBlock, Layout, Parameter
from moe_nvfp4.layouts.fields import Fields
from moe_nvfp4.layouts.parts import Parameters, attention, embeddings, gated_mlp, linears, norms


def layout(config: Config) -> Layout:
    fields = Fields(config)
    fields.require_unset("attention_bias", "use_sliding_window")
    hidden, layers = fields.integer("hidden_size"), fields.layer_count()
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.integer("head_dim", default=max(hidden // heads, 1))
    experts = fields.expert_count("num_experts", "num_local_experts")
    fields.check_top_k("num_experts_per_tok", experts)
    projections = gated_mlp(hidden, fields.integer("moe_intermediate_size"))
    dense = dense_layers(fields, layers)

    parameters: Parameters = {}
    blocks: list[ExpertBlock] = []
    vocabulary = (fields.integer("vocab_size"), hidden)
    tied = fields.flag("tie_word_embeddings", False)
    parameters |= embeddings("model.embed_tokens.weight", vocabulary, tied=tied)
    for index in range(layers):
        layer = f"model.layers.{index}."
        parameters |= norms(layer, hidden, "input_layernorm", "post_attention_layernorm")
        shapes = attention(hidden, heads * head_dim, kv_heads * head_dim, heads * head_dim)
        parameters |= linears(layer + "self_attn.", shapes)
        parameters |= norms(layer + "self_attn.", head_dim, "q_norm", "k_norm")
        if index in dense:
            parameters |= linears(layer + "mlp.", gated_mlp(hidden, fields.integer("intermediate_size")))
        else:
            parameters[layer + "mlp.gate.weight"] = Parameter((experts, hidden), linear=True)
            blocks.append(ExpertBlock(index, layer + "mlp.experts.", experts, projections))
    parameters |= norms("model.", hidden, "norm")
    cache = CacheGeometry(kv_elements_per_token=2 * layers * kv_heads * head_dim)
    return Layout(config["model_type"], parameters, tuple(blocks), cache)


def dense_layers(fields: Fields, layers: int) -> frozenset[int]:
    """Layers with an ordinary MLP in place of experts."""
    step = fields.integer("decoder_sparse_step", default=1)
    skipped = frozenset(index for index in range(layers) if (index + 1) % step)
    return skipped | fields.indices("mlp_only_layers", layers)
