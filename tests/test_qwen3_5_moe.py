"""Qwen3.5 and Qwen3.6 MoE against transformers, in the published layouts."""

from pathlib import Path

import model_checks as checks
import pytest
import torch
from conftest import poison
from model_checks import Edit, Tensors, nothing, tiny_model, unlike_gate_and_up, without_optional_scales
from reference import dequantised

from moe_nvfp4.errors import CheckpointError, RequestError
from moe_nvfp4.runner import MoERunner

NVIDIA, REDHAT = "nvidia/Qwen3.6-35B-A3B-NVFP4", "RedHatAI/Qwen3.6-35B-A3B-NVFP4"
LARGER = "nvidia/Qwen3.5-122B-A10B-NVFP4"  # shared experts, attention and delta nets in bfloat16


def wide_decay(config: dict, tensors: Tensors) -> None:
    """Qwen3.5 stores A_log and the delta net's norm as F32."""
    for name in tensors:
        if name.endswith((".A_log", ".linear_attn.norm.weight")):
            tensors[name] = tensors[name].float()


def shared_expert_of_another_size(config: dict, tensors: Tensors) -> None:
    """Then it cannot be one of the routed experts."""
    text = config["text_config"]
    hidden, inner = text["hidden_size"], 48
    text["shared_expert_intermediate_size"] = inner
    for name in [n for n in tensors if ".shared_expert." in n]:
        del tensors[name]
    for layer in range(text["num_hidden_layers"]):
        at = f"model.language_model.layers.{layer}.mlp.shared_expert."
        for projection, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            tensors[f"{at}{projection}_proj.weight"] = (torch.randn(shape) / shape[1] ** 0.5).bfloat16()


def without_mtp(config: dict, tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith("mtp.")]:
        del tensors[name]


def text_only(config: dict, tensors: Tensors) -> None:
    """Qwen3_5MoeForCausalLM: neither config nor names are nested."""
    text = config.pop("text_config")
    config.clear()
    config.update(text, model_type="qwen3_5_moe_text", architectures=["Qwen3_5MoeForCausalLM"])
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not name.startswith(("model.visual.", "mtp.")):
            tensors[name.replace("model.language_model.", "model.")] = tensor


VARIANTS: dict[str, tuple[str, Edit]] = {
    "modelopt, mixed FP8 and NVFP4": (NVIDIA, nothing),
    "compressed-tensors": (REDHAT, nothing),
    "routed experts alone in NVFP4": (LARGER, nothing),
    "float32 decay and norm": (NVIDIA, wide_decay),
    "a shared expert of another size": (NVIDIA, shared_expert_of_another_size),
    "gate and up tenfold apart": (NVIDIA, unlike_gate_and_up),
    "compressed-tensors, gate and up tenfold apart": (REDHAT, unlike_gate_and_up),
    "no input scales": (NVIDIA, without_optional_scales),
    "no multi-token prediction": (NVIDIA, without_mtp),
    "text only": (NVIDIA, text_only),
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


def test_the_shared_expert_is_one_of_the_routed_ones_where_it_fits(plain: Path, tmp_path: Path) -> None:
    apart = tiny_model(NVIDIA, tmp_path / "apart", shared_expert_of_another_size)
    with checks.runner_of(plain) as merged, checks.runner_of(apart) as separate:
        assert merged.experts.placement.num_experts == merged.config.num_experts + 1
        assert separate.experts.placement.num_experts == separate.config.num_experts
        assert not any("shared_expert." in name for name in merged.found.dense)


def test_a_slot_is_clean_for_its_next_sequence(plain: Path) -> None:
    """States are never cleared: what a slot's last sequence left must not reach the next, not even NaN."""
    with checks.runner_of(plain, max_batch_size=1) as runner:
        ids = checks.token_ids(runner, 12)
        expected = runner.logits(ids)
        for state in runner.cache.states.values():
            for part in state:
                poison(part)
        assert torch.equal(runner.logits(ids), expected)
        runner.prefill_chunk = 1
        for state in runner.cache.states.values():
            poison(state.recurrent)
        assert runner.logits(ids).isfinite().all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attn_output_gate", False, "attn_output_gate"),
        ("hidden_act", "gelu", "hidden_act"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e7}, "rope type 'yarn'"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 2.0}, "partial_rotary_factor"),
        ("linear_num_key_heads", 3, "linear_num_key_heads"),
        ("linear_conv_kernel_dim", 5, "config.json implies"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    def edit(config: dict, tensors: Tensors) -> None:
        config["text_config"][field] = value

    with pytest.raises(CheckpointError, match=message):
        MoERunner.prepare(tiny_model(NVIDIA, tmp_path / "model", edit), device="cpu", verbose=False)


def test_images_are_refused(plain: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "What is it?"}]
    with checks.runner_of(plain) as runner, pytest.raises(RequestError, match="text only"):
        runner.generate([{"role": "user", "content": content}])
    with checks.runner_of(plain) as runner, pytest.raises(RequestError, match="placeholder for image"):
        runner.generate([1, 2, 511])


def test_the_reference_sees_the_format(plain: Path) -> None:
    """That the checkpoint is mixed, so that the comparison above covers it."""
    from reference import read_tensors

    tensors = read_tensors(plain)
    kinds = {tensor.dtype for name, tensor in tensors.items() if name.endswith("_proj.weight")}
    assert {torch.uint8, torch.float8_e4m3fn} <= kinds
    assert dequantised(tensors)["lm_head.weight"].dtype == torch.float32
