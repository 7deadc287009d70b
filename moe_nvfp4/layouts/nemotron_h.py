"""Nemotron-H: one mixer per layer, which is Mamba-2, attention, or a mixture of ungated experts."""

from moe_nvfp4.layouts.base import CacheGeometry, Config, ExpertBlock, Layout, Parameter
from moe_nvfp4.layouts.fields import Fields
from moe_nvfp4.layouts.parts import Parameters, attention, biases, embeddings, linears, norms

_LETTERS = {"M": "mamba", "E": "moe", "*": "attention"}
# Of layers_block_type: as published, and as transformers saves them.
_WORDS = {
    **{word: word for word in _LETTERS.values()},
    "linear_attention": "mamba",
    "full_attention": "attention",
}


def layout(config: Config) -> Layout:
    fields = Fields(config)
    fields.require_unset("attention_bias", "mlp_bias", "mamba_proj_bias", "use_bias")
    hidden, kinds = fields.integer("hidden_size"), mixers(fields)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.integer("head_dim")
    shapes = attention(hidden, heads * head_dim, kv_heads * head_dim, heads * head_dim)

    parameters: Parameters = {}
    blocks: list[ExpertBlock] = []
    vocabulary = (fields.integer("vocab_size"), hidden)
    tied = fields.flag("tie_word_embeddings", False)
    parameters |= embeddings("backbone.embeddings.weight", vocabulary, tied=tied)
    for index, kind in enumerate(kinds):
        layer = f"backbone.layers.{index}."
        parameters |= norms(layer, hidden, "norm")
        if kind == "mamba":
            parameters |= _mamba(layer + "mixer.", fields)
        elif kind == "attention":
            parameters |= linears(layer + "mixer.", shapes)
        else:
            block = _experts(index, layer + "mixer.", fields)
            blocks.append(block)
            parameters |= _router_and_shared(layer + "mixer.", block.count, fields)
    parameters |= norms("backbone.", hidden, "norm_f")
    cache = CacheGeometry(
        kv_elements_per_token=2 * kinds.count("attention") * kv_heads * head_dim,
        state_bytes=kinds.count("mamba") * _state_bytes(fields) if "mamba" in kinds else 0,
    )
    return Layout(config["model_type"], parameters, tuple(blocks), cache)


def mixers(fields: Fields) -> tuple[str, ...]:
    """mamba, moe or attention for each layer, from either spelling."""
    if fields.has("hybrid_override_pattern"):
        name = "hybrid_override_pattern"
        kinds = tuple(_LETTERS[letter] for letter in fields.strings(name, _LETTERS))
    else:
        name = "layers_block_type"
        kinds = tuple(_WORDS[word] for word in fields.strings(name, _WORDS))
    if fields.has("num_hidden_layers") and fields.layer_count() != len(kinds):
        raise fields.error("num_hidden_layers", f"{len(kinds)}, the length of {name}")
    return kinds


def _mamba_sizes(fields: Fields) -> tuple[int, int, int]:
    """(heads, inner size, rows of the convolution over x, B and C)."""
    heads, groups = fields.head_counts("mamba_num_heads", "n_groups")
    inner = heads * fields.integer("mamba_head_dim")
    return heads, inner, inner + 2 * groups * fields.integer("ssm_state_size")


def _state_bytes(fields: Fields) -> int:
    _, inner, conv_rows = _mamba_sizes(fields)
    recurrent = 4 * inner * fields.integer("ssm_state_size")  # float32
    return recurrent + 2 * (fields.integer("conv_kernel") - 1) * conv_rows  # BF16


def _mamba(mixer: str, fields: Fields) -> Parameters:
    hidden = fields.integer("hidden_size")
    heads, inner, conv_rows = _mamba_sizes(fields)
    parameters = {
        **linears(mixer, {"in_proj": (inner + conv_rows + heads, hidden), "out_proj": (hidden, inner)}),
        mixer + "conv1d.weight": Parameter((conv_rows, 1, fields.integer("conv_kernel"))),
        mixer + "A_log": Parameter((heads,), values="decay"),
        mixer + "D": Parameter((heads,), values="scalar"),
        mixer + "dt_bias": Parameter((heads,), values="step"),
        **norms(mixer, inner, "norm"),
    }
    if fields.flag("use_conv_bias", True):
        parameters |= biases(mixer, {"conv1d": conv_rows})
    return parameters


def _experts(index: int, mixer: str, fields: Fields) -> ExpertBlock:
    count = fields.expert_count("n_routed_experts", "num_experts", "num_local_experts")
    fields.check_top_k("num_experts_per_tok", count)
    width, inner = _expert_width(fields), fields.integer("moe_intermediate_size")
    shapes = {"up_proj": (inner, width), "down_proj": (width, inner)}
    return ExpertBlock(index, mixer + "experts.", count, shapes)


def _expert_width(fields: Fields) -> int:
    """Experts of the larger models work in a latent space, behind two projections."""
    return fields.integer("moe_latent_size", default=fields.integer("hidden_size"))


def _router_and_shared(mixer: str, experts: int, fields: Fields) -> Parameters:
    hidden, width = fields.integer("hidden_size"), _expert_width(fields)
    shared = fields.integer("moe_shared_expert_intermediate_size")
    latent = {"fc1_latent_proj": (width, hidden), "fc2_latent_proj": (hidden, width)}
    return {
        # F32 in Nemotron-3-Nano; later exports store BF16.
        mixer + "gate.weight": Parameter((experts, hidden), dtype="F32"),
        mixer + "gate.e_score_correction_bias": Parameter((experts,), dtype="F32", values="bias"),
        **linears(mixer + "shared_experts.", {"up_proj": (shared, hidden), "down_proj": (hidden, shared)}),
        **(linears(mixer, latent) if fields.has("moe_latent_size") else {}),
    }
