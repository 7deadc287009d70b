"""Layouts against transformers' models, every spelling of a config, and configs that must be refused."""

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.layouts import Layout, layout
from moe_nvfp4.published import published

QWEN3, QWEN3_5 = "nvidia/Qwen3-30B-A3B-NVFP4", "nvidia/Qwen3.6-35B-A3B-NVFP4"
GEMMA4, NEMOTRON = "nvidia/Gemma-4-26B-A4B-NVFP4", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4"
DENSE_GEMMA4 = "nvidia/Gemma-4-31B-IT-NVFP4"
KINDS = [QWEN3, QWEN3_5, GEMMA4, NEMOTRON, DENSE_GEMMA4]


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """Published config with changes to its text part; None removes a field."""
    config = copy.deepcopy(dict(published(name).config))
    text = config.get("text_config", config)
    for field, value in changes.items():
        text[field] = value
    return config


def flat(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    return {**config["text_config"], "model_type": model_type}


def fused_shapes(plan: Layout) -> dict[str, tuple[int, ...]]:
    """As transformers holds a model in memory: experts of a layer in one tensor per projection."""
    shapes = {name: p.shape for name, p in (plan.parameters | plan.ignored).items()}
    for block in plan.experts:
        projections = dict(block.projections)
        if "gate_proj" in projections:
            rows, columns = projections.pop("gate_proj")
            del projections["up_proj"]
            shapes[f"{block.prefix}gate_up_proj"] = (block.count, 2 * rows, columns)
        for name, shape in projections.items():
            shapes[f"{block.prefix}{name}"] = (block.count, *shape)
    return shapes


@cache
def transformers_shapes(name: str, text_only: bool) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(config as transformers saves it, state dict shapes) of a tiny model."""
    transformers = pytest.importorskip("transformers")
    config = dict(published(name).scaled(tiny=True).config)
    config.pop("quantization_config", None)
    config.pop("auto_map", None)
    if text_only:
        config = flat(config, config["text_config"]["model_type"])
    parsed = transformers.AutoConfig.for_model(**config)
    has_tower = "vision_config" in config
    auto = transformers.AutoModelForImageTextToText if has_tower else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(parsed)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if parsed.get_text_config().tie_word_embeddings:
        del shapes["lm_head.weight"]
    return json.loads(parsed.to_json_string(use_diff=False)), shapes


@pytest.mark.parametrize(
    "name, text_only",
    [(name, False) for name in KINDS] + [(QWEN3_5, True), (GEMMA4, True)],
)
def test_layout_matches_transformers(name: str, text_only: bool) -> None:
    saved, expected = transformers_shapes(name, text_only)
    for config in (saved, published(name).scaled(tiny=True).config):
        if text_only and "text_config" in config:
            config = flat(config, saved["model_type"])
        shapes = {key.replace("backbone.", "model."): shape for key, shape in fused_shapes(layout(config)).items()}
        assert shapes == expected


def test_cache_geometry() -> None:
    qwen = published(QWEN3).layout.cache
    assert (qwen.kv_elements_per_token, qwen.window, qwen.state_bytes) == (48 * 2 * 4 * 128, 0, 0)
    hybrid = published(QWEN3_5).layout.cache
    assert hybrid.kv_elements_per_token == 10 * 2 * 2 * 256
    assert hybrid.state_bytes == 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    gemma = published(GEMMA4).layout.cache
    assert gemma.kv_elements_per_token == 5 * 2 * 2 * 512
    assert (gemma.window, gemma.window_kv_elements_per_token) == (1024, 25 * 2 * 8 * 256)
    nemotron = published(NEMOTRON).layout.cache
    assert nemotron.kv_elements_per_token == 6 * 2 * 2 * 128
    assert nemotron.state_bytes == 23 * (64 * 64 * 128 * 4 + 3 * 6144 * 2)


def test_layers_without_experts() -> None:
    config = config_of(QWEN3, mlp_only_layers=[0, 5], decoder_sparse_step=2, num_hidden_layers=6)
    plan = layout(config)
    assert [block.layer for block in plan.experts] == [1, 3]
    assert plan.parameters["model.layers.5.mlp.down_proj.weight"].shape == (2048, 6144)
    assert "model.layers.5.mlp.gate.weight" not in plan.parameters


@pytest.mark.parametrize("name", [QWEN3_5, GEMMA4])
def test_layer_types_can_be_derived(name: str) -> None:
    assert layout(config_of(name, layer_types=None)) == published(name).layout


def test_last_gemma_layer_is_full() -> None:
    plan = layout(config_of(GEMMA4, layer_types=None, num_hidden_layers=8))
    widths = [plan.parameters[f"model.language_model.layers.{i}.self_attn.q_norm.weight"] for i in (6, 7)]
    assert [width.shape for width in widths] == [(256,), (512,)]


@pytest.mark.parametrize("name", [QWEN3, QWEN3_5])
def test_expert_count_spellings(name: str) -> None:
    text = published(name).config.get("text_config", published(name).config)
    config = config_of(name, num_experts=None, num_local_experts=text["num_experts"])
    assert layout(config) == published(name).layout


def test_nemotron_layer_spellings() -> None:
    words = {"M": "mamba", "E": "moe", "*": "attention"}
    pattern = published(NEMOTRON).config["hybrid_override_pattern"]
    config = config_of(NEMOTRON, hybrid_override_pattern=None, layers_block_type=[words[c] for c in pattern])
    assert layout(config) == published(NEMOTRON).layout
    assert layout(config | {"num_hidden_layers": None}) == published(NEMOTRON).layout


def test_latent_experts() -> None:
    plan = layout(config_of(NEMOTRON, moe_latent_size=1024))
    assert plan.experts[0].projections == {"up_proj": (1856, 1024), "down_proj": (1024, 1856)}
    assert plan.parameters["backbone.layers.1.mixer.fc1_latent_proj.weight"].shape == (1024, 2688)


@pytest.mark.parametrize(
    "name, embedding",
    [
        (QWEN3, "model.embed_tokens"),
        (QWEN3_5, "model.language_model.embed_tokens"),
        (NEMOTRON, "backbone.embeddings"),
    ],
)
def test_tied_embeddings(name: str, embedding: str) -> None:
    untied = published(name).layout
    tied = layout(dict(published(name).config) | {"tie_word_embeddings": True})
    assert untied.parameters.keys() - tied.parameters.keys() == {"lm_head.weight"}
    assert tied.parameters[f"{embedding}.weight"].values == "linear"


def test_unified_gemma_is_text_only() -> None:
    plan = layout(dict(published(GEMMA4).config) | {"model_type": "gemma4_unified"})
    assert plan.parameters == published(GEMMA4).layout.parameters
    assert not plan.ignored


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": 7}, {"model_type": ["x"]}, [], None])
def test_unknown_architecture(config: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: .*expected"):
        layout(config)


def test_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'llama'; expected one of qwen3_moe, .*nemotron_h\. Use"):
        layout({"model_type": "llama"})


BAD_NUMBERS = [None, -1, 0, 1.5, 2.0, True, "64", 2**31, 10**400, float("nan"), [64], {}]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=[str(value)[:8] for value in BAD_NUMBERS])
@pytest.mark.parametrize("name", [QWEN3, QWEN3_5, GEMMA4, NEMOTRON])
@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_bad_numbers_are_refused(name: str, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: (text_config\.)?{field}: got .+; expected an int"):
        layout(config_of(name, **{field: value}))


@pytest.mark.parametrize(
    "name, field, value",
    [
        (QWEN3, "num_hidden_layers", 1025),
        (QWEN3, "num_experts", 4097),
        (QWEN3, "num_experts_per_tok", 129),
        (QWEN3, "num_key_value_heads", 5),
        (QWEN3, "attention_bias", True),
        (QWEN3, "mlp_only_layers", [48]),
        (QWEN3, "mlp_only_layers", "all"),
        (QWEN3, "tie_word_embeddings", "no"),
        (QWEN3_5, "num_experts", 10**9),
        (QWEN3_5, "layer_types", ["linear_attention"] * 2000),
        (QWEN3_5, "layer_types", ["full_attention", None] * 20),
        (QWEN3_5, "layer_types", 40),
        (QWEN3_5, "num_hidden_layers", 41),
        (QWEN3_5, "linear_num_key_heads", 7),
        (QWEN3_5, "mtp_num_hidden_layers", -1),
        (GEMMA4, "num_experts", None),
        (GEMMA4, "sliding_window", -5),
        (GEMMA4, "num_kv_shared_layers", 10),
        (GEMMA4, "layer_types", [["full_attention"]] * 30),
        (NEMOTRON, "hybrid_override_pattern", "MEM-"),
        (NEMOTRON, "hybrid_override_pattern", "M" * 5000),
        (NEMOTRON, "num_hidden_layers", 51),
        (NEMOTRON, "n_routed_experts", 2**40),
        (NEMOTRON, "n_groups", 3),
    ],
)
def test_absurd_fields_are_refused(name: str, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: (text_config\.)?{field}: got .+; expected "):
        layout(config_of(name, **{field: value}))


@pytest.mark.parametrize("name", [QWEN3_5, GEMMA4])
@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_sections_must_be_objects(name: str, section: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{section}: got .*; expected an object"):
        layout(dict(published(name).config) | {section: [1, 2]})


JUNK = [None, True, -1, 0, 2.5, 2**70, "x", "M" * 9, [], [None], [[]], [2**70], {}, {"0": 1}]


@pytest.mark.parametrize("name", KINDS)
def test_any_junk_is_taken_or_refused_cleanly(name: str) -> None:
    """Every field of every section, replaced by every kind of junk."""
    config = dict(published(name).scaled(tiny=True).config)
    config.pop("quantization_config", None)
    for section in ("", "text_config", "vision_config"):
        fields = config.get(section, {}) if section else config
        for field in [*fields, "per_layer_config", "num_local_experts", "moe_latent_size"]:
            for junk in JUNK:
                changed = {**fields, field: junk}
                with suppress(CheckpointError):
                    layout({**config, section: changed} if section else changed)
