"""How the published NVFP4 checkpoints are quantised, and the config sections that say so.

The files spell their lists out, layer by layer or module by module; here they are templates, which expand
for a layout of any size.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any, Literal

from moe_nvfp4.layouts.base import Layout

Algorithm = Literal["", "NVFP4", "FP8"]  # "" stays plain
FP8, W4A16 = "FP8", "W4A16_NVFP4"

_LAYER = re.compile(r"(?P<layer>.*\blayers\.\d+)\.(?P<inner>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """`exclude` holds templates of fnmatch globs (ModelOpt) or the recipe's ignore list (compressed-tensors).

    In a template, {layer} stands for every layer that has the module, {before_attention} for every layer
    right before one with a q_proj.
    """

    base: str  # file stem in published_configs/
    dialect: Literal["modelopt", "compressed-tensors"]
    exclude: tuple[str, ...]
    quantized: Mapping[str, str] = field(default_factory=dict)  # template -> algorithm, in mixed precision
    producer: str = ""  # ModelOpt version in hf_quant_config.json
    config_producer: str = ""  # the same in config.json; exports of 2025 have no section there
    kv_scales: bool = False
    mtp: bool = True


_QWEN3_5 = (
    "lm_head",
    "{layer}.linear_attn*",
    "{layer}.self_attn*",
    "{layer}.mlp.shared_expert*",
    "{layer}.mlp.shared_expert_gate",
    "model.visual*",
    "mtp.layers.0*",
)
_CT_QWEN3_6 = (
    *("re:.*lm_head", "re:visual.*", "re:model.visual.*", "re:.*mlp.gate$"),
    *("re:.*embed_tokens$", "re:.*shared_expert_gate$", "re:.*linear_attn.*"),
)
_CT_GEMMA4 = ("lm_head", "re:.*embed.*", "re:.*router", "re:.*vision_tower.*")

RECIPES: Mapping[str, Recipe] = {
    "nvidia/Qwen3.6-35B-A3B-NVFP4": Recipe(
        base="Qwen3.6-35B-A3B",
        dialect="modelopt",
        exclude=("mtp.layers.0*", "mtp*"),
        quantized={
            **{f"{{layer}}.linear_attn.{name}": FP8 for name in ("in_proj_qkv", "in_proj_z", "out_proj")},
            **{f"{{layer}}.self_attn.{name}_proj": FP8 for name in "qkvo"},
            "{layer}.mlp.experts": W4A16,
            **{f"{{layer}}.mlp.shared_expert.{name}_proj": W4A16 for name in ("gate", "up", "down")},
            "lm_head": W4A16,
        },
        producer="0.44.0",
        config_producer="0.37.0",
    ),
    "nvidia/Gemma-4-26B-A4B-NVFP4": Recipe(
        base="Gemma-4-26B-A4B",
        dialect="modelopt",
        exclude=(
            *("lm_head", "model.embed_vision*", "model.vision_tower*"),
            *("{layer}.mlp*", "{layer}.router*", "{layer}.self_attn*"),
        ),
        producer="0.43.0rc2.dev91+gc79ebc014",
        config_producer="0.43.0rc2.dev91+gc79ebc014",
    ),
    "nvidia/Qwen3-30B-A3B-NVFP4": Recipe(
        base="Qwen3-30B-A3B",
        dialect="modelopt",
        exclude=("lm_head", "{layer}.mlp.gate"),
        producer="0.33.0",  # not on record; that of the 235B
        kv_scales=True,
    ),
    "nvidia/Qwen3-235B-A22B-NVFP4": Recipe(
        base="Qwen3-235B-A22B",
        dialect="modelopt",
        exclude=("lm_head", "{layer}.mlp.gate"),
        producer="0.33.0",
        kv_scales=True,
    ),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": Recipe(
        base="NVIDIA-Nemotron-3-Nano-30B-A3B",
        dialect="modelopt",
        exclude=(
            *("lm_head", "{before_attention}.mixer.in_proj", "{before_attention}.mixer.out_proj"),
            *(f"{{layer}}.mixer.{name}_proj" for name in "qkvo"),
            "{layer}.mixer.conv1d",
        ),
        producer="0.29.0",
    ),
    "nvidia/Gemma-4-31B-IT-NVFP4": Recipe(
        base="Gemma-4-31B-IT",
        dialect="modelopt",
        exclude=("lm_head", "model.embed_vision*", "model.vision_tower*", "{layer}.self_attn*"),
        producer="0.37.0",
        config_producer="0.37.0",
    ),
    "nvidia/Qwen3.5-122B-A10B-NVFP4": Recipe(
        base="Qwen3.5-122B-A10B",
        dialect="modelopt",
        exclude=(*_QWEN3_5, "mtp*"),
        producer="0.0.1.dev752+gbd4fc3a65.d20260504",
        config_producer="0.0.1.dev752+gbd4fc3a65.d20260504",
    ),
    "nvidia/Qwen3.5-397B-A17B-NVFP4": Recipe(
        base="Qwen3.5-397B-A17B",
        dialect="modelopt",
        exclude=(*_QWEN3_5, "*.mlp.shared_expert.*"),
        producer="0.0.1.dev538+g26cad678d",
        config_producer="0.0.1.dev538+g26cad678d",
    ),
    "RedHatAI/Qwen3.6-35B-A3B-NVFP4": Recipe(
        base="Qwen3.6-35B-A3B", dialect="compressed-tensors", exclude=_CT_QWEN3_6, mtp=False
    ),
    "RedHatAI/gemma-4-26B-A4B-it-NVFP4": Recipe(
        base="Gemma-4-26B-A4B", dialect="compressed-tensors", exclude=_CT_GEMMA4
    ),
    "RedHatAI/Qwen3-30B-A3B-NVFP4": Recipe(
        base="Qwen3-30B-A3B", dialect="compressed-tensors", exclude=("lm_head", "re:.*mlp.gate$")
    ),
    "RedHatAI/gemma-4-31B-it-NVFP4": Recipe(base="Gemma-4-31B-IT", dialect="compressed-tensors", exclude=_CT_GEMMA4),
}


def hf_quant_config(recipe: Recipe, layout: Layout) -> dict[str, Any] | None:
    """The content of hf_quant_config.json, which only ModelOpt writes."""
    if recipe.dialect != "modelopt":
        return None
    algorithm = "MIXED_PRECISION" if recipe.quantized else "NVFP4"
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}
    if recipe.quantized:
        quantization["quantized_layers"] = _quantized_layers(recipe, layout)
    else:
        quantization["group_size"] = 16
    quantization["exclude_modules"] = _expand(recipe.exclude, layout)
    return {"producer": {"name": "modelopt", "version": recipe.producer}, "quantization": quantization}


def quantization_config(recipe: Recipe, layout: Layout) -> dict[str, Any] | None:
    """The section of that name in config.json."""
    if recipe.dialect == "compressed-tensors":
        return _compressed_tensors_config(_matching_modules(recipe.exclude, layout))
    if not recipe.config_producer:
        return None
    section: dict[str, Any] = {}
    if recipe.quantized:
        layers = _quantized_layers(recipe, layout)
        fp8 = sorted(name for name, entry in layers.items() if entry["quant_algo"] == FP8)
        groups = [_modelopt_group(8, fp8), _modelopt_group(4, sorted(layers.keys() - set(fp8)))]
        section["config_groups"] = {f"group_{index}": group for index, group in enumerate(groups)}
        section["quantized_layers"] = layers
        section["quant_algo"] = "MIXED_PRECISION"
    else:
        section["config_groups"] = {"group_0": _modelopt_group(4, ["Linear"])}
        section["quant_algo"] = "NVFP4"
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    section["ignore"] = _expand(recipe.exclude, layout)
    section["producer"] = {"name": "modelopt", "version": recipe.config_producer}
    section["quant_method"] = "modelopt"
    return section


def algorithms(recipe: Recipe, layout: Layout) -> Callable[[str], Algorithm]:
    """Function from the module name of an nn.Linear to its format."""
    if recipe.dialect == "compressed-tensors":
        ignored = set(_matching_modules(recipe.exclude, layout))
        return lambda module: "" if module in ignored else "NVFP4"
    excluded = _expand(recipe.exclude, layout)
    names = {pattern for pattern in excluded if "*" not in pattern}
    globs = re.compile("|".join(translate(pattern) for pattern in excluded if "*" in pattern) or "(?!)")
    layers = _quantized_layers(recipe, layout) if recipe.quantized else None

    def algorithm(module: str) -> Algorithm:
        if module in names or globs.match(module):
            return ""
        if layers is None:
            return "NVFP4"
        while module and module not in layers:  # experts are listed by their container
            module = module.rpartition(".")[0]
        if not module:
            return ""
        return "FP8" if layers[module]["quant_algo"] == FP8 else "NVFP4"

    return algorithm


def _quantized_layers(recipe: Recipe, layout: Layout) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    for template, algorithm in recipe.quantized.items():
        group = {} if algorithm == FP8 else {"group_size": 16}
        for module in _expand([template], layout):
            layers[module] = {"quant_algo": algorithm} | group
    return layers


def _expand(templates: Iterable[str], layout: Layout) -> list[str]:
    members = _members_by_layer(layout)
    layers = list(members)
    expanded = []
    for template in templates:
        placeholder, _, inner = template.partition("}.")
        if not inner:
            expanded.append(template)
            continue
        for layer, following in zip(layers, [*layers[1:], ""], strict=True):
            if inner.rstrip("*") not in members[layer]:
                continue
            if placeholder == "{layer" or "mixer.q_proj" in members.get(following, ()):
                expanded.append(f"{layer}.{inner}")
    return expanded


def _members_by_layer(layout: Layout) -> dict[str, set[str]]:
    """Layer name -> names below it, of modules and of all their ancestors."""
    members: dict[str, set[str]] = {}
    names = [*layout.parameters, *(block.prefix for block in layout.experts)]
    for name in names:
        if match := _LAYER.fullmatch(name):
            members.setdefault(match["layer"], set()).update(_ancestors(match["inner"]))
    return members


def _ancestors(name: str) -> Iterator[str]:
    """a.b.c -> a.b, a"""
    while name := name.rpartition(".")[0]:
        yield name


def _matching_modules(ignore: tuple[str, ...], layout: Layout) -> list[str]:
    """The stored form of an ignore list: the name of every module, containers included, that it matches."""
    modules: set[str] = {"lm_head"}  # a module even where its weight is tied
    for name in (*layout.parameters, *layout.ignored):
        modules.update(_ancestors(name))
    for block in layout.experts:
        modules.update(module for _, _, module in block.names())
    exact = {entry for entry in ignore if not entry.startswith("re:")}
    patterns = [entry.removeprefix("re:") for entry in ignore if entry.startswith("re:")]
    matches = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or "(?!)").match
    return sorted(module for module in modules if module in exact or matches(module))


def _modelopt_group(bits: int, targets: list[str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"dynamic": False, "num_bits": bits, "type": "float"}
    if bits == 4:
        numbers["group_size"] = 16
    return {"input_activations": dict(numbers), "weights": dict(numbers), "targets": targets}


def _compressed_tensors_config(ignore: list[str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 16,
        "num_bits": 4,
        "observer_kwargs": {},
        "scale_dtype": "float8_e4m3fn",
        "strategy": "tensor_group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }
    group = {
        "format": "nvfp4-pack-quantized",
        "input_activations": numbers | {"dynamic": "local", "observer": "static_minmax"},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": numbers | {"observer": "memoryless_minmax"},
    }
    return {
        "config_groups": {"group_0": group},
        "format": "nvfp4-pack-quantized",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
