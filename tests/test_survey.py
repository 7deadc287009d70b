"""Accounting: of every published checkpoint nothing is left over, and of a damaged one everything is named."""

import importlib.util
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import (
    CT_GEMMA4,
    CT_QWEN3,
    GEMMA4,
    MODELOPT_QWEN3,
    NEMOTRON,
    QWEN3_6,
    Specs,
    infos,
    renamed,
    tiny_specs,
    write_sparse,
)

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.layouts import layout
from moe_nvfp4.layouts.base import TensorSpec
from moe_nvfp4.published import published, published_names
from moe_nvfp4.survey import Survey, check_quantization, survey, survey_checkpoint

MANIFESTS = Path(__file__).resolve().parents[2] / "shared/checkpoints/manifest.py"
KINDS = [MODELOPT_QWEN3, CT_QWEN3, QWEN3_6, GEMMA4, CT_GEMMA4, NEMOTRON]
ONE = TensorSpec("F32", ())

# Dense modules and groups of experts (projections of a layer) by format; input scales; ignored tensors.
EXPECTED: dict[str, dict[str, int]] = {
    QWEN3_6: {"fp8": 130, "nvfp4": 121, "expert groups": 120, "ignored": 333 + 19, "kv": 0},
    MODELOPT_QWEN3: {"fp8": 0, "nvfp4": 48 * 4, "expert groups": 48 * 3, "ignored": 0, "kv": 48},
    CT_QWEN3: {"fp8": 0, "nvfp4": 48 * 4, "expert groups": 48 * 3, "ignored": 0, "kv": 0},
    "nvidia/Qwen3-235B-A22B-NVFP4": {"nvfp4": 94 * 4, "expert groups": 94 * 3, "ignored": 0, "kv": 94},
    GEMMA4: {"fp8": 0, "nvfp4": 0, "expert groups": 90, "ignored": 356, "kv": 0},
    # 25 sliding layers with v_proj, 5 without; 3 more of the dense MLP in each
    CT_GEMMA4: {"fp8": 0, "nvfp4": 25 * 4 + 5 * 3 + 30 * 3, "expert groups": 90, "ignored": 356},
    NEMOTRON: {"fp8": 0, "nvfp4": 2 * 17 + 2 * 23, "expert groups": 2 * 23, "ignored": 0, "kv": 0},
    "nvidia/Gemma-4-31B-IT-NVFP4": {"nvfp4": 60 * 3, "expert groups": 0},
    "nvidia/Qwen3.5-122B-A10B-NVFP4": {"fp8": 0, "nvfp4": 0, "expert groups": 48 * 3},
    "nvidia/Qwen3.5-397B-A17B-NVFP4": {"fp8": 0, "nvfp4": 0, "expert groups": 60 * 3},
    "RedHatAI/Qwen3.6-35B-A3B-NVFP4": {"fp8": 0, "nvfp4": 10 * 4 + 40 * 3, "expert groups": 120, "ignored": 333},
}


def load_manifests() -> ModuleType:
    sys.path.insert(0, str(MANIFESTS.parent))  # it imports its neighbour
    try:
        spec = importlib.util.spec_from_file_location("checkpoint_manifests", MANIFESTS)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(MANIFESTS.parent))
    return module


@pytest.fixture(scope="module")
def manifests() -> ModuleType:
    if not MANIFESTS.exists():
        pytest.skip("no folder shared/checkpoints beside the checkout")
    return load_manifests()


def check_full_size(folder: Path, name: str, specs: Specs, config: Any, quantization: Any) -> None:
    write_sparse(folder, specs, config, quantization)
    with Checkpoint.open(folder) as checkpoint:
        assert {n: (i.dtype, i.shape) for n, i in checkpoint.tensors.items()} == specs
        found = survey_checkpoint(checkpoint)
        found.require_complete(name)
    expected = found.layout
    assert len(found.dense) == len(expected.parameters)
    for block in expected.experts:
        for projection, shape in block.projections.items():
            sources = found.experts[block.layer][projection]
            assert len(sources) == block.count
            assert {(s.format, s.shape, s.global_is_divisor) for s in sources} == {
                ("nvfp4", shape, name.startswith("RedHatAI"))
            }
            for expert in (0, 1, block.count - 1):  # in the order of the experts
                assert f".experts.{expert}.{projection}" in sources[expert].name
    formats = Counter(source.format for source in found.dense.values())
    groups = sum(len(projections) for projections in found.experts.values())
    counts = {"fp8": formats["fp8"], "nvfp4": formats["nvfp4"], "expert groups": groups}
    counts |= {"ignored": len(found.ignored), "kv": len(found.kv_scales)}
    assert counts | EXPECTED.get(name, {}) == counts
    used = {info for source in found.sources() for info in source.tensors}
    used |= {info for pair in found.kv_scales.values() for info in pair if info}
    assert len(used) + found.input_scales + len(found.ignored) == len(specs)
    shutil.rmtree(folder)  # headers and index of the largest take 90 MB, and pytest keeps three runs


@pytest.mark.parametrize("name", published_names())
def test_published(tmp_path: Path, name: str) -> None:
    source = published(name)
    check_full_size(tmp_path, name, source.manifest(), source.config, source.hf_quant_config)


@pytest.mark.parametrize("name", published_names())
def test_reference_manifests(tmp_path: Path, manifests: ModuleType, name: str) -> None:
    """The same from manifests that were derived elsewhere. An equal one needs no second reading."""
    source, specs = published(name), manifests.checkpoint_manifest(name)
    if source.manifest() == specs and len(specs) > 200_000:
        return
    ct = manifests.CHECKPOINTS[name].ignore
    quantization = None if ct else {"quantization": dict(manifests.load_quantization(name))}
    config = manifests.load_config(name)
    if ct:  # these configs are of the ModelOpt export
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    check_full_size(tmp_path, name, specs, config, quantization)


def test_every_reference_manifest_is_covered(manifests: ModuleType) -> None:
    assert set(manifests.CHECKPOINTS) == set(published_names())


def found_in(specs: Specs, config: Any) -> Survey:
    return survey(infos(specs), layout(config))


@pytest.mark.parametrize("name", KINDS)
def test_prefixes_and_infixes(name: str) -> None:
    specs, config = tiny_specs(name)
    plain = found_in(specs, config)
    assert not plain.problems
    top = [("model.language_model.", "@."), ("backbone.", "@."), ("model.layers", "@.layers")]
    top += [("model.embed_tokens", "@.embed_tokens"), ("model.norm", "@.norm")]
    bare = renamed(specs, top)
    for prefix in ("model.language_model.", "language_model.model.", "model.", "backbone.", ""):
        for infix in ("", ".mlp", ".moe"):
            experts = [
                (".mlp.experts.", ".experts."),
                ("mixer.experts.", "mixer.@"),
                (".experts.", f"{infix}.experts."),
            ]
            spelled = renamed(bare, [("@.", prefix), *experts, ("mixer.@", "mixer.experts.")])
            again = found_in(spelled, config)
            assert not again.problems
            assert again.dense.keys() == plain.dense.keys()
            assert len(list(again.sources())) == len(list(plain.sources()))


@pytest.mark.parametrize("name", KINDS)
def test_every_missing_weight_is_named(name: str) -> None:
    specs, config = tiny_specs(name)
    names = [n for n in specs if not n.startswith(("model.visual", "model.vision", "model.embed_vision", "mtp."))]
    for gone in names[:: max(1, len(names) // 40)] + names[-1:]:
        fewer = {n: spec for n, spec in specs.items() if n != gone}
        problems = found_in(fewer, config).problems
        module, _, leaf = gone.rpartition(".")
        if leaf in ("input_scale", "input_global_scale", "k_scale", "v_scale"):
            assert not problems, gone
        else:
            assert any(module.split(".", 2)[-1].split("mlp.")[-1] in problem for problem in problems), (gone, problems)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.99.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.99.up_proj.weight",
        "model.layers.0.mlp.experts.99.up_proj.input_scale",
        "model.layers.99.self_attn.k_scale",
        "model.layers.0.self_attn.q_proj.output_scale",
        "model.layers.0.self_attn.extra.weight",
        "something",
        "",
    ],
)
def test_every_extra_tensor_is_named(name: str, extra: str) -> None:
    specs, config = tiny_specs(name)
    found = found_in(specs | {extra: ONE}, config)
    assert [info.name for info in found.unexpected] == [extra]
    assert not found.missing and not found.invalid
    with pytest.raises(CheckpointError, match="1 tensors that nothing uses"):
        found.require_complete("x")


@pytest.mark.parametrize("name", KINDS)
def test_every_wrong_shape_is_named(name: str) -> None:
    specs, config = tiny_specs(name)
    names = [n for n, spec in specs.items() if not n.startswith(("model.v", "model.embed_v", "mtp.")) and spec.shape]
    names = [n for n in names if not n.endswith(("input_scale", "input_global_scale"))]
    for wrong in names[:: max(1, len(names) // 40)]:
        dtype, shape = specs[wrong]
        found = found_in(specs | {wrong: TensorSpec(dtype, (shape[0] + 1, *shape[1:]))}, config)
        assert len(found.invalid) == 1, wrong
        assert not found.unexpected and not found.missing
        with pytest.raises(CheckpointError, match="Nothing was loaded"):
            found.require_complete("x")


def test_a_long_list_of_problems_stays_short() -> None:
    specs, config = tiny_specs(MODELOPT_QWEN3)
    found = found_in({name: TensorSpec("I64", (1,)) for name in specs}, config)
    with pytest.raises(CheckpointError, match=r"and \d+ more") as error:
        found.require_complete("x")
    assert len(str(error.value)) < 4000


def test_nothing_at_all() -> None:
    _, config = tiny_specs(NEMOTRON)
    found = found_in({}, config)
    assert len(found.missing) == len(found.layout.parameters) + sum(
        block.count * len(block.projections) for block in found.layout.experts
    )


KV_SPELLINGS = [
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("kv_scale",),
    ("k_scale",),
]


def attention_modules(specs: Specs) -> Iterator[str]:
    for name in specs:
        module, found, _ = name.partition(".k_proj.weight")
        if found and name.endswith((".weight", ".weight_packed")):
            yield module


@pytest.mark.parametrize("name", [CT_QWEN3, QWEN3_6, GEMMA4, NEMOTRON])
@pytest.mark.parametrize("leaves", KV_SPELLINGS)
@pytest.mark.parametrize("spec", [ONE, TensorSpec("F32", (1,)), TensorSpec("BF16", (1,))])
def test_kv_scales_in_every_spelling(name: str, leaves: tuple[str, ...], spec: TensorSpec) -> None:
    specs, config = tiny_specs(name)
    modules = [m for m in attention_modules(specs) if not m.startswith("mtp.")]
    found = found_in(specs | {f"{module}.{leaf}": spec for module in modules for leaf in leaves}, config)
    assert not found.problems
    assert len(found.kv_scales) == len(modules) > 0
    for key, value in found.kv_scales.values():
        assert key is not None
        assert (value is None) == (leaves == ("k_scale",))


def test_kv_scales_of_the_wrong_shape() -> None:
    specs, config = tiny_specs(MODELOPT_QWEN3)
    bad = {"model.layers.0.self_attn.k_proj.k_scale": TensorSpec("F32", (2,))}
    assert "k_scale: F32 [2]; expected one" in found_in(specs | bad, config).problems[0]


@pytest.mark.parametrize("name", KINDS)
def test_input_scales_are_optional(name: str) -> None:
    specs, config = tiny_specs(name)
    without = {n: spec for n, spec in specs.items() if not n.endswith(("input_scale", "input_global_scale"))}
    found = found_in(without, config)
    assert not found.problems and found.input_scales == 0
    assert found_in(specs, config).input_scales == len(specs) - len(without) > 0
    odd = {n: TensorSpec("BF16", (1,)) if n.endswith("input_scale") else spec for n, spec in specs.items()}
    assert not found_in(odd, config).problems


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("shape", [(), (1,), "N", "N1"])
def test_fp8_scales(dtype: str, shape: Any) -> None:
    specs, config = tiny_specs(QWEN3_6)
    for name, spec in list(specs.items()):
        if name.endswith(".weight") and spec.dtype == "F8_E4M3":
            rows = spec.shape[0]
            real = {"N": (rows,), "N1": (rows, 1)}.get(shape, shape)
            specs[name + "_scale"] = TensorSpec(dtype, real)
    found = found_in(specs, config)
    assert not found.problems
    names = {source.algorithm for source in found.dense.values() if source.format == "fp8"}
    assert names == {"FP8 per channel" if shape in ("N", "N1") else "FP8 per tensor"}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", [QWEN3_6, NEMOTRON])
def test_float_parameters_of_either_width(name: str, dtype: str) -> None:
    specs, config = tiny_specs(name)
    for tensor, spec in specs.items():
        if tensor.endswith(("A_log", "norm.weight", "dt_bias", "gate.weight", "correction_bias")):
            specs[tensor] = TensorSpec(dtype, spec.shape)
    assert not found_in(specs, config).problems


def test_plain_experts_and_mixed_files_are_accounted_for() -> None:
    """Which format is allowed where is for the loader to say."""
    specs, config = tiny_specs(MODELOPT_QWEN3)
    module = "model.layers.0.mlp.experts.0.up_proj"
    shape = (specs[f"{module}.weight"].shape[0], 2 * specs[f"{module}.weight"].shape[1])
    for leaf in ("weight", "weight_scale", "weight_scale_2"):
        del specs[f"{module}.{leaf}"]
    found = found_in(specs | {f"{module}.weight": TensorSpec("BF16", shape)}, config)
    assert not found.problems
    assert found.experts[0]["up_proj"][0].format == "plain"


def test_a_tied_head_that_is_stored_anyway() -> None:
    specs, config = tiny_specs(GEMMA4)
    embedding = specs["model.language_model.embed_tokens.weight"]
    found = found_in(specs | {"lm_head.weight": embedding}, config)
    assert not found.problems
    assert "lm_head.weight" in {info.name for info in found.ignored}
    assert "lm_head.weight" not in found.dense
    untied, untied_config = tiny_specs(MODELOPT_QWEN3)
    del untied["lm_head.weight"]
    assert found_in(untied, untied_config).missing == ("lm_head.weight",)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (MODELOPT_QWEN3, "model.embed_tokens"),
        (QWEN3_6, "model.language_model.layers.0.mlp.gate"),
        (NEMOTRON, "backbone.layers.1.mixer.gate"),
    ],
)
def test_parameters_that_cannot_be_quantised(name: str, tensor: str) -> None:
    specs, config = tiny_specs(name)
    rows, columns = specs.pop(f"{tensor}.weight").shape
    specs[f"{tensor}.weight"] = TensorSpec("U8", (rows, columns // 2))
    specs[f"{tensor}.weight_scale"] = TensorSpec("F8_E4M3", (rows, columns // 16))
    specs[f"{tensor}.weight_scale_2"] = ONE
    problems = found_in(specs, config).problems
    assert len(problems) == 1 and "cannot be quantised" in problems[0]


def test_config_that_contradicts_the_tensors() -> None:
    specs, config = tiny_specs(MODELOPT_QWEN3)
    changes = [("num_experts", 7), ("num_experts", 9), ("num_hidden_layers", 1), ("num_hidden_layers", 3)]
    changes += [("hidden_size", 128), ("vocab_size", 100), ("tie_word_embeddings", True), ("head_dim", 16)]
    for field, value in changes:
        problems = found_in(specs, config | {field: value}).problems
        assert bool(problems) == (field != "tie_word_embeddings"), (field, value)


def test_a_name_twice() -> None:
    specs, config = tiny_specs(MODELOPT_QWEN3)
    with pytest.raises(CheckpointError, match="name the same tensor"):
        found_in(specs | {"layers.0.input_layernorm.weight": ONE}, config)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_algo": "NVFP4_SVD"}, "quant_algo NVFP4_SVD"),
        ({"quant_algo": "NVFP4_AWQ"}, "quant_algo NVFP4_AWQ"),
        ({"quant_algo": "MXFP8"}, "quant_algo MXFP8"),
        ({"quant_algo": "FP8_PB_WO"}, "quant_algo FP8_PB_WO"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}}, "W4A8_AWQ"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
        ({"quantized_layers": {"a": {"quant_algo": "NVFP4", "group_size": 128}}}, "group_size 128"),
        ({"quant_method": "gptq"}, "quant_method gptq"),
        ({"quant_method": "mxfp4"}, "quant_method mxfp4"),
        ({"quant_method": ["awq"]}, "quant_method"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format pack-quantized"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "marlin-24"}}},
            "format marlin-24",
        ),
        ({"quant_algo": "x" * 10_000}, "not supported"),
    ],
)
def test_unsupported_settings(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match="supported are") as error:
        check_quantization(quantization)
    assert message in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "quantization",
    [
        {},
        {"quant_algo": None, "quantized_layers": None, "group_size": None},
        {"quant_algo": "nvfp4", "group_size": 16, "exclude_modules": ["lm_head"]},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
        {"quantized_layers": ["a"]},
        {"quantized_layers": {"a": 3}},
        {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {"g": None}},
        {"quant_method": "compressed-tensors", "config_groups": []},
    ],
)
def test_supported_settings(quantization: dict[str, Any]) -> None:
    check_quantization(quantization)


def test_sums() -> None:
    specs, config = tiny_specs(MODELOPT_QWEN3)
    found = found_in(specs, config)
    scales = [n for n in specs if n.endswith(("input_scale", "k_scale", "v_scale"))]
    total = sum(info.nbytes for info in infos(specs).values())
    assert sum(source.nbytes for source in found.sources()) == total - 4 * len(scales)
    assert sum(math.prod(s.shape) for s in found.experts[0]["up_proj"]) == 8 * 48 * 64
