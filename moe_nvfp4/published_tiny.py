"""Scaled-down configs of published checkpoints: fewer layers, or everything small.

A tiny config keeps every layer kind and every name of the real one. Its sizes are chosen to be awkward:
a 48 wide expert, as 704 and 1856 are in real models, fewer KV heads than heads, a window below any prompt.
"""

import copy
from typing import Any

from moe_nvfp4.errors import RequestError
from moe_nvfp4.layouts.base import Config

DEFAULT_VOCABULARY = 512

_COMMON = {
    "hidden_size": 64,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
}
_TEXT: dict[str, dict[str, Any]] = {
    "qwen3_moe": _COMMON | {"head_dim": 32, "intermediate_size": 96, "num_experts": 8},
    "qwen3_5_moe": _COMMON
    | {
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "num_experts": 8,
        "shared_expert_intermediate_size": 48,
    },
    "gemma4": _COMMON
    | {
        "global_head_dim": 32,
        "head_dim": 16,
        "intermediate_size": 96,
        "num_experts": 8,
        "num_global_key_value_heads": 1,
        "sliding_window": 8,
        "top_k_experts": 2,
    },
    "nemotron_h": _COMMON
    | {
        "chunk_size": 16,
        "head_dim": 16,
        "intermediate_size": 48,
        "mamba_head_dim": 8,
        "mamba_num_heads": 8,
        "moe_shared_expert_intermediate_size": 80,
        "n_groups": 2,
        "n_routed_experts": 8,
        "ssm_state_size": 16,
    },
}
_VISION: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 64,
        "patch_size": 4,
    },
    "gemma4": {
        "global_head_dim": 16,
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "patch_size": 4,
        "position_embedding_size": 16,
    },
}
# The first layers of the real pattern that contain every kind of layer.
_LAYERS = {"qwen3_moe": 2, "qwen3_5_moe": 4, "gemma4": 6, "nemotron_h": 7}


def scaled_config(config: Config, layers: int | None, tiny: bool, vocab_size: int | None) -> dict[str, Any]:
    """A config with the first `layers` layers; with `tiny`, of small sizes, and of few layers by default."""
    scaled = copy.deepcopy(dict(config))
    text = scaled.get("text_config", scaled)
    if vocab_size is not None and not tiny:
        raise RequestError(
            f"vocab_size: got {vocab_size} for a full-size model; only a tiny one can change it. "
            "Pass tiny as well, or leave vocab_size out."
        )
    available = text["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= available:
        raise RequestError(f"layers: got {layers}; expected 1 to {available}, the layers of the published model.")
    if tiny:
        layers = layers or _LAYERS[config["model_type"]]
        vocabulary = DEFAULT_VOCABULARY if vocab_size is None else vocab_size
        if vocabulary < 16:
            raise RequestError(f"vocab_size: got {vocabulary}; expected at least 16, to hold special tokens.")
        _shrink(scaled, text, vocabulary)
    if layers is not None:
        _cut(text, layers)
    return scaled


def _cut(text: dict[str, Any], layers: int) -> None:
    text["num_hidden_layers"] = layers
    if "max_window_layers" in text:
        text["max_window_layers"] = layers
    for name in ("layer_types", "hybrid_override_pattern"):
        if name in text:
            text[name] = text[name][:layers]
    if text["model_type"] == "gemma4_text":
        text["layer_types"][-1] = "full_attention"  # readers take the last layer for one, whatever is said


def _shrink(config: dict[str, Any], text: dict[str, Any], vocabulary: int) -> None:
    model_type = config["model_type"]
    # Only what the published config sets: a dense model has no experts to count, and keeps none.
    text |= {name: value for name, value in _TEXT[model_type].items() if text.get(name) is not None}
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if name in text:
            text[name] = vocabulary
    if "mrope_section" in text.get("rope_parameters", {}):
        text["rope_parameters"]["mrope_section"] = [2, 1, 1]  # a quarter of 32 dims are 4 pairs
    if "vision_config" in config:
        config["vision_config"] |= _VISION[model_type]
    _move_special_tokens(config, vocabulary)


def _move_special_tokens(config: dict[str, Any], vocabulary: int) -> None:
    """Give special tokens that fall outside a smaller vocabulary its last ids, the same id everywhere."""
    moved: dict[int, int] = {}

    def inside(value: Any) -> Any:
        if isinstance(value, list):
            return [inside(entry) for entry in value]
        if not isinstance(value, int) or value < vocabulary:
            return value
        return moved.setdefault(value, vocabulary - 1 - len(moved))

    for section in (config, config.get("text_config", {})):
        for name in sorted(section):
            if name.endswith(("_token_id", "_token_index")):
                section[name] = inside(section[name])
