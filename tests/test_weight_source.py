"""The format of a module follows from its tensors, whatever its exporter calls them."""

import pytest
from tiny import infos

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.layouts.base import TensorSpec
from moe_nvfp4.weight_source import group_by_module, is_ignored, kv_scale, normalise, weight_source

CODES, SCALES, ONE = TensorSpec("U8", (6, 16)), TensorSpec("F8_E4M3", (6, 2)), TensorSpec("F32", ())
FP8, BF16 = TensorSpec("F8_E4M3", (6, 32)), TensorSpec("BF16", (6, 32))
MODELOPT = {"weight": CODES, "weight_scale": SCALES, "weight_scale_2": ONE}
CT = {"weight_packed": CODES, "weight_scale": SCALES, "weight_global_scale": TensorSpec("F32", (1,))}


def source_of(leaves: dict[str, TensorSpec]):
    specs = {f"model.layers.0.m.{leaf}": spec for leaf, spec in leaves.items()}
    return weight_source("layers.0.m", group_by_module(infos(specs))[0]["layers.0.m"])


@pytest.mark.parametrize(("leaves", "divisor"), [(MODELOPT, False), (CT, True)])
def test_nvfp4(leaves: dict[str, TensorSpec], divisor: bool) -> None:
    for extra in ({}, {"input_scale": ONE}, {"input_global_scale": ONE}, {"bias": TensorSpec("BF16", (6,))}):
        source = source_of(leaves | extra)
        assert (source.format, source.algorithm, source.shape) == ("nvfp4", "NVFP4", (6, 32))
        assert source.global_is_divisor == divisor
        assert source.name == "model.layers.0.m"
        assert source.nbytes == 6 * 16 + 6 * 2 + 4
        assert [info.name.rpartition(".")[2] for info in source.tensors] == list(leaves)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_fp8(shape: tuple[int, ...], dtype: str) -> None:
    source = source_of({"weight": FP8, "weight_scale": TensorSpec(dtype, shape), "input_scale": ONE})
    assert (source.format, source.shape) == ("fp8", (6, 32))
    assert source.algorithm == ("FP8 per channel" if 6 in shape else "FP8 per tensor")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_plain(dtype: str) -> None:
    source = source_of({"weight": TensorSpec(dtype, (6, 1, 4))})
    assert (source.format, source.algorithm, source.shape) == ("plain", dtype, (6, 1, 4))


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"bias": ONE}, "no weight among its tensors: bias"),
        (MODELOPT | {"pre_quant_scale": ONE}, "NVFP4_AWQ"),
        (MODELOPT | {"svdquant_lora_a": ONE}, "NVFP4_SVD"),
        (CT | {"weight_zero_point": ONE}, "asymmetric"),
        ({"weight": FP8, "weight_scale_inv": ONE}, "128x128"),
        ({"weight": CODES}, "without weight_scale and weight_scale_2"),
        ({"weight": CODES, "weight_scale": SCALES}, "without weight_scale_2"),
        ({"weight_packed": CODES, "weight_scale": SCALES, "weight_scale_2": ONE}, "without weight_global_scale"),
        (MODELOPT | {"weight_scale": TensorSpec("U8", (6, 2))}, "MXFP4"),
        (MODELOPT | {"weight_scale": TensorSpec("F8_E4M3", (6, 1))}, r"needs \[6, 2.0\]"),
        (MODELOPT | {"weight_scale": TensorSpec("F8_E4M3", (2, 6))}, "needs"),
        (MODELOPT | {"weight_scale": TensorSpec("F8_E4M3", (128, 4))}, "needs"),
        (MODELOPT | {"weight": TensorSpec("U8", (6, 12))}, "needs"),
        (MODELOPT | {"weight_scale_2": TensorSpec("BF16", ())}, "expected one F32 value"),
        (MODELOPT | {"weight_scale_2": TensorSpec("F32", (6,))}, "expected one F32 value"),
        (MODELOPT | {"weight_scale_2": TensorSpec("F32", (0,))}, "expected one F32 value"),
        (CT | {"weight_packed": TensorSpec("I8", (6, 16))}, r"expected U8 \[out, in/2\]"),
        (CT | {"weight_packed": TensorSpec("U8", (6, 16, 1))}, r"expected U8 \[out, in/2\]"),
        ({"weight": FP8}, "without weight_scale"),
        ({"weight": FP8, "weight_scale": TensorSpec("U8", (6, 1))}, "MXFP8"),
        ({"weight": FP8, "weight_scale": TensorSpec("F16", ())}, "F32 or BF16"),
        ({"weight": FP8, "weight_scale": TensorSpec("F32", (32,))}, "128x128"),
        ({"weight": FP8, "weight_scale": TensorSpec("F32", (1, 1, 1, 1))}, "128x128"),
        ({"weight": TensorSpec("F8_E4M3", (6,)), "weight_scale": ONE}, "one scale"),
        ({"weight": BF16, "weight_scale": SCALES}, "BF16 weight with scales"),
        ({"weight": BF16, "weight_scale_2": ONE}, "BF16 weight with scales"),
        ({"weight": TensorSpec("I32", (6, 32))}, "I32 weight without scales"),
        ({"weight": TensorSpec("U8", (6,))}, "U8 weight without scales"),
        ({"weight": TensorSpec("F8_E5M2", (6, 32))}, "F8_E5M2 weight without scales"),
    ],
)
def test_what_cannot_be_decoded(leaves: dict[str, TensorSpec], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        source_of(leaves)


@pytest.mark.parametrize(
    ("name", "normalised"),
    [
        ("model.language_model.layers.3.mlp.gate.weight", "layers.3.mlp.gate.weight"),
        ("language_model.model.layers.3.mlp.gate.weight", "layers.3.mlp.gate.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.layers.3.mlp.gate.weight", "layers.3.mlp.gate.weight"),
        ("backbone.layers.3.mixer.experts.5.up_proj.weight", "layers.3.mixer.experts.5.up_proj.weight"),
        ("layers.3.norm.weight", "layers.3.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.3.mlp.experts.5.up_proj.weight", "layers.3.experts.5.up_proj.weight"),
        ("model.layers.3.moe.experts.5.up_proj.weight", "layers.3.experts.5.up_proj.weight"),
        ("model.layers.3.experts.5.up_proj.weight", "layers.3.experts.5.up_proj.weight"),
        ("model.layers.3.mlp.experts.gate_up_proj", "layers.3.mlp.experts.gate_up_proj"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "layers.3.mlp.shared_experts.up_proj.weight"),
        ("model.visual.blocks.0.weight", "visual.blocks.0.weight"),
    ],
)
def test_normalise(name: str, normalised: str) -> None:
    assert normalise(name) == normalised


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("mtp.fc.weight", True),
        ("model.visual.patch_embed.proj.bias", True),
        ("model.vision_tower.std_bias", True),
        ("model.embed_vision.embedding_projection.weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("model.layers.0.visual.weight", False),
        ("model.mtpx.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_ignored_parts(name: str, ignored: bool) -> None:
    assert is_ignored(normalise(name)) == ignored
    modules, found = group_by_module(infos({name: ONE}))
    assert (len(found), len(modules)) == ((1, 0) if ignored else (0, 1))


def test_two_spellings_of_one_tensor() -> None:
    names = ("model.layers.0.mlp.experts.0.up_proj.weight", "layers.0.moe.experts.0.up_proj.weight")
    with pytest.raises(CheckpointError, match="name the same tensor"):
        group_by_module(infos(dict.fromkeys(names, ONE)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers.0.self_attn.k_proj.k_scale", "layers.0.self_attn.v_proj.v_scale"),
        ("layers.0.self_attn.k_proj.output_scale", "layers.0.self_attn.v_proj.output_scale"),
        ("layers.0.self_attn.k_scale", "layers.0.self_attn.v_scale"),
        ("layers.0.self_attn.attn.k_scale", "layers.0.self_attn.attn.v_scale"),
        ("layers.0.self_attn.qkv_proj.k_scale", "layers.0.self_attn.qkv_proj.v_scale"),
        ("layers.0.self_attn.kv_scale", "layers.0.self_attn.kv_scale"),
        ("layers.0.self_attn.k_scale", None),
    ],
)
def test_kv_scales(key: str, value: str | None) -> None:
    specs = {f"model.{name}": ONE for name in (key, value) if name}
    modules = group_by_module(infos(specs))[0]
    for which, name in (("k", key), ("v", value)):
        found = kv_scale(modules, "layers.0.self_attn", which)
        assert (found.name if found else None) == (f"model.{name}" if name else None)
    assert kv_scale(modules, "layers.1.self_attn", "k") is None
