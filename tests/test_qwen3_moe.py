"""Qwen3-MoE against transformers, from checkpoints in every format it comes in."""

import json
from pathlib import Path

import model_checks as checks
import pytest
import torch
from model_checks import Edit, Tensors, nothing, tiny_model, unlike_gate_and_up, without_optional_scales

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.runner import MoERunner

NVIDIA, REDHAT = "nvidia/Qwen3-30B-A3B-NVFP4", "RedHatAI/Qwen3-30B-A3B-NVFP4"


def attention_to_fp8(per_channel: bool, scale_dtype: torch.dtype = torch.float32) -> Edit:
    def edit(config: dict, tensors: Tensors) -> None:
        (names,) = ([n for n in tensors if ".self_attn." in n and n.endswith("_proj.weight")],)
        for name in names:
            module = name.removesuffix(".weight")
            rows, columns = tensors[name].shape[0], 2 * tensors[name].shape[1]
            for leaf in ("weight_scale", "weight_scale_2", "input_scale"):
                tensors.pop(f"{module}.{leaf}")
            tensors[name] = (torch.randn(rows, columns) * 50).to(torch.float8_e4m3fn)
            shape = (rows, 1) if per_channel else ()
            scale = (torch.rand(shape) + 0.5) / 50 / columns**0.5
            tensors[f"{module}.weight_scale"] = scale.to(scale_dtype)

    return edit


def first_layer_dense(config: dict, tensors: Tensors) -> None:
    config["mlp_only_layers"], config["intermediate_size"] = [0], 48
    hidden = config["hidden_size"]
    for name in [n for n in tensors if n.startswith("model.layers.0.mlp.")]:
        del tensors[name]
    for projection, shape in (("gate", (48, hidden)), ("up", (48, hidden)), ("down", (hidden, 48))):
        weight = torch.randn(shape) / shape[1] ** 0.5
        tensors[f"model.layers.0.mlp.{projection}_proj.weight"] = weight.bfloat16()


def tied(config: dict, tensors: Tensors) -> None:
    config["tie_word_embeddings"] = True
    del tensors["lm_head.weight"]


def old_spellings(config: dict, tensors: Tensors) -> None:
    config["num_local_experts"] = config.pop("num_experts")
    config["torch_dtype"] = "bfloat16"
    config.pop("dtype", None)
    config.pop("rope_parameters", None)
    config["rope_theta"], config["rope_scaling"] = 1e4, None


def new_spellings(config: dict, tensors: Tensors) -> None:
    config["dtype"] = config.pop("torch_dtype", "bfloat16")
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta", 1e6)}


def quarter_weights(config: dict, tensors: Tensors) -> None:
    config["norm_topk_prob"] = False


VARIANTS: dict[str, tuple[str, Edit]] = {
    "modelopt": (NVIDIA, nothing),
    "compressed-tensors": (REDHAT, nothing),
    "fp8 attention per tensor": (NVIDIA, attention_to_fp8(per_channel=False)),
    "fp8 attention per channel": (NVIDIA, attention_to_fp8(per_channel=True)),
    "fp8 attention, bf16 scales": (NVIDIA, attention_to_fp8(per_channel=True, scale_dtype=torch.bfloat16)),
    "a dense layer": (NVIDIA, first_layer_dense),
    "tied head": (NVIDIA, tied),
    "old config spellings": (NVIDIA, old_spellings),
    "new config spellings": (NVIDIA, new_spellings),
    "gate and up tenfold apart": (NVIDIA, unlike_gate_and_up),
    "no input or KV scales": (NVIDIA, without_optional_scales),
    "weights not normalised": (REDHAT, quarter_weights),
}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, edit = VARIANTS[request.param]
    return tiny_model(name, tmp_path_factory.mktemp("model") / "model", edit)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(NVIDIA, tmp_path_factory.mktemp("plain") / "model", seed=5)


def test_float32_logits_equal_transformers(folder: Path) -> None:
    checks.check_against_transformers(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope type 'yarn'"),
        ("hidden_act", "gelu", "hidden_act"),
        ("attention_bias", True, "attention_bias"),
        ("rms_norm_eps", -1, "rms_norm_eps"),
        ("num_experts_per_tok", 99, "num_experts_per_tok"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("vocab_size", "512", "vocab_size"),
        ("num_hidden_layers", 3, "missing"),
        ("num_experts", 7, "nothing uses"),
        ("moe_intermediate_size", 64, "config.json implies"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(
    plain: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in plain.iterdir():
        (copy / path.name).symlink_to(path)
    config = json.loads((plain / "config.json").read_text()) | {field: value}
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        MoERunner.prepare(copy, device="cpu", verbose=False)


@pytest.mark.gpu
def test_gpu_logits_equal_cpu(folder: Path) -> None:
    with (
        MoERunner.from_pretrained(folder, device="cpu", dtype="float32", verbose=False) as cpu,
        MoERunner.from_pretrained(folder, device="cuda", dtype="float32", verbose=False) as gpu,
    ):
        ids = checks.token_ids(cpu)
        assert relative_error(gpu.logits(ids), cpu.logits(ids)) < 1e-4
