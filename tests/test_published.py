"""Manifests and configs of the published checkpoints, against recorded digests and an independent source."""

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moe_nvfp4.errors import RequestError
from moe_nvfp4.layouts import layout
from moe_nvfp4.layouts.base import TensorSpec
from moe_nvfp4.published import ITEM_BYTES, Published, published, published_names

NAMES = published_names()
CHECKOUT = Path(__file__).resolve().parent.parent
INDEPENDENT = CHECKOUT.parent / "shared" / "checkpoints"
DIGESTS = json.loads((Path(__file__).parent / "data" / "manifest_digests.json").read_text())

Manifest = dict[str, TensorSpec]
model = cache(published)


def total_bytes(manifest: Manifest) -> int:
    return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in manifest.values())


def digest(manifest: Manifest) -> dict[str, Any]:
    lines = sorted(f"{name} {dtype} {list(shape)}\n" for name, (dtype, shape) in manifest.items())
    return {
        "tensors": len(manifest),
        "bytes": total_bytes(manifest),
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def unordered(value: Any) -> Any:
    """JSON content with lists as sorted sets."""
    if isinstance(value, dict):
        return {key: unordered(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return sorted((unordered(entry) for entry in value), key=repr)
    return value


@pytest.fixture(scope="module")
def independent() -> Iterator[Any]:
    """The manifest tool that was written apart from this package, where it stands beside the checkout."""
    if not (INDEPENDENT / "manifest.py").is_file():
        pytest.skip(f"{INDEPENDENT} is absent")
    before = sys.modules.keys() | set()
    sys.path.insert(0, str(INDEPENDENT))
    try:
        yield importlib.import_module("manifest")
    finally:
        sys.path.remove(str(INDEPENDENT))
        for name in {"manifest", "architectures"} - before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module", params=NAMES)
def full(request: pytest.FixtureRequest) -> tuple[str, Manifest]:
    return request.param, model(request.param).manifest()


def test_every_checkpoint_has_a_digest() -> None:
    assert set(DIGESTS) == set(NAMES)


def test_manifest_digest(full: tuple[str, Manifest]) -> None:
    name, manifest = full
    assert digest(manifest) == DIGESTS[name]
    assert model(name).total_bytes() == DIGESTS[name]["bytes"]


def test_manifest_equals_the_independent_one(full: tuple[str, Manifest], independent: Any) -> None:
    name, manifest = full
    expected = independent.checkpoint_manifest(name)
    assert manifest.keys() == expected.keys()
    differing = [key for key, spec in manifest.items() if tuple(spec) != tuple(expected[key])]
    assert not differing


def test_names_are_the_independent_ones(independent: Any) -> None:
    assert set(NAMES) == set(independent.CHECKPOINTS)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("nvidia/")])
def test_configs_equal_the_published_ones(name: str, independent: Any) -> None:
    stem = independent.CHECKPOINTS[name].config
    config = json.loads((independent.CONFIG_DIR / f"{stem}_config.json").read_text())
    assert unordered(model(name).config) == unordered(config)
    path = independent.CONFIG_DIR / f"{stem}_hf_quant_config.json"
    if path.exists():
        assert unordered(model(name).hf_quant_config) == unordered(json.loads(path.read_text()))


def test_qwen3_30b_excludes_gates_and_head() -> None:
    quantization = model("nvidia/Qwen3-30B-A3B-NVFP4").hf_quant_config["quantization"]  # type: ignore[index]
    gates = {f"model.layers.{index}.mlp.gate" for index in range(48)}
    assert set(quantization["exclude_modules"]) == gates | {"lm_head"}
    assert "quantization_config" not in model("nvidia/Qwen3-30B-A3B-NVFP4").config


def test_mixed_precision_lists_291_modules() -> None:
    section = model("nvidia/Qwen3.6-35B-A3B-NVFP4").config["quantization_config"]
    assert len(section["quantized_layers"]) == 291
    assert [len(group["targets"]) for group in section["config_groups"].values()] == [130, 161]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("RedHatAI/")])
def test_compressed_tensors_sections(name: str) -> None:
    source = model(name)
    section = source.config["quantization_config"]
    assert source.hf_quant_config is None
    assert (section["quant_method"], section["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    ignored = set(section["ignore"])
    assert "lm_head" in ignored
    assert not any(entry.startswith("re:") for entry in ignored)
    # What is packed is not ignored, and every Linear that stays plain is.
    for tensor in source.scaled(layers=4).manifest():
        module, _, kind = tensor.rpartition(".")
        assert (kind == "weight_packed") <= (module not in ignored), tensor
    linears = {n.removesuffix(".weight") for n, p in source.layout.parameters.items() if p.linear}
    plain = {f"{module}.weight" for module in linears} & source.manifest().keys()
    assert {name.removesuffix(".weight") for name in plain} <= ignored


def test_expanded_ignore_lists_hold_containers() -> None:
    ignored = model("RedHatAI/Qwen3.6-35B-A3B-NVFP4").config["quantization_config"]["ignore"]
    assert "model.language_model.layers.0.linear_attn" in ignored
    assert "model.language_model.layers.3.linear_attn" not in ignored


def kinds(source: Published) -> set[str]:
    """Tensor names with layer and expert numbers blanked out."""
    return {".".join("#" if part.isdigit() else part for part in name.split(".")) for name in source.manifest()}


@pytest.mark.parametrize("name", NAMES)
def test_tiny_has_every_kind_of_tensor(name: str) -> None:
    tiny = model(name).scaled(tiny=True)
    assert kinds(tiny) == kinds(model(name).scaled(layers=7))
    assert tiny.total_bytes() < 2_000_000
    text = tiny.config.get("text_config", tiny.config)
    assert (text["vocab_size"], text["hidden_size"]) == (512, 64)
    assert all(block.count == 8 for block in tiny.layout.experts)
    assert bool(tiny.layout.mtp) == bool(model(name).layout.mtp)
    assert layout(tiny.config) == tiny.layout


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tiny", [False, True])
def test_scaled_manifest_equals_the_independent_one(name: str, tiny: bool, independent: Any) -> None:
    source = model(name).scaled(layers=6, tiny=tiny)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    expected = independent.checkpoint_manifest(name, config)
    assert {key: tuple(spec) for key, spec in source.manifest().items()} == {
        key: tuple(spec) for key, spec in expected.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_tiny_special_tokens_are_in_the_vocabulary(name: str) -> None:
    config = model(name).scaled(tiny=True, vocab_size=100).config
    for section in (config, config.get("text_config", {})):
        for key, value in section.items():
            if key.endswith(("_token_id", "_token_index")) and value is not None:
                assert max(value if isinstance(value, list) else [value]) < 100, key


@pytest.mark.parametrize("name", NAMES)
def test_first_layers(name: str) -> None:
    small, whole = model(name).scaled(layers=6).layout, model(name).layout
    assert small.parameters.items() <= whole.parameters.items()
    assert small.experts == tuple(block for block in whole.experts if block.layer < 6)


def test_scaling_everything_changes_nothing() -> None:
    source = model("nvidia/Gemma-4-26B-A4B-NVFP4")
    assert source.scaled(layers=30) == source.scaled() == source


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": 0}, r"layers: got 0; expected 1 to 48"),
        ({"layers": 49}, r"layers: got 49; expected 1 to 48"),
        ({"vocab_size": 300}, r"vocab_size: .*tiny"),
        ({"tiny": True, "vocab_size": 3}, r"vocab_size: got 3; expected at least 16"),
    ],
)
def test_bad_scalings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model("nvidia/Qwen3-30B-A3B-NVFP4").scaled(**arguments)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'nvidia/Qwen9'.*nvidia/Qwen3\.6-35B-A3B-NVFP4"):
        published("nvidia/Qwen9")
