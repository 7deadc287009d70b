"""Gemma 4 against transformers: window and full attention, values that are keys, experts beside a dense MLP."""

from pathlib import Path

import model_checks as checks
import pytest
import torch
from model_checks import Edit, Tensors, nothing, tiny_model, unlike_gate_and_up, without_optional_scales

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.runner import MoERunner

NVIDIA, REDHAT = "nvidia/Gemma-4-26B-A4B-NVFP4", "RedHatAI/gemma-4-26B-A4B-it-NVFP4"


def text_only(config: dict, tensors: Tensors) -> None:
    """Gemma4ForCausalLM: neither config nor names are nested."""
    text = config.pop("text_config")
    config.clear()
    config.update(text, model_type="gemma4_text", architectures=["Gemma4ForCausalLM"])
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not name.startswith(("model.vision_tower.", "model.embed_vision.")):
            tensors[name.replace("model.language_model.", "model.")] = tensor


def values_of_their_own(config: dict, tensors: Tensors) -> None:
    """Full layers with v_proj."""
    text = config["text_config"]
    text["attention_k_eq_v"] = False
    for index, kind in enumerate(text["layer_types"]):
        at = f"model.language_model.layers.{index}.self_attn."
        if kind == "full_attention":
            # Without k = v, full layers have the key-value heads of the others.
            rows = text["num_key_value_heads"] * text["global_head_dim"]
            for name in ("k_proj", "v_proj"):
                tensors[f"{at}{name}.weight"] = (
                    torch.randn(rows, text["hidden_size"]) / text["hidden_size"] ** 0.5
                ).bfloat16()


def without_softcap(config: dict, tensors: Tensors) -> None:
    config["text_config"]["final_logit_softcapping"] = None


VARIANTS: dict[str, tuple[str, Edit]] = {
    "modelopt": (NVIDIA, nothing),
    "compressed-tensors": (REDHAT, nothing),
    "dense, modelopt": ("nvidia/Gemma-4-31B-IT-NVFP4", nothing),
    "dense, compressed-tensors": ("RedHatAI/gemma-4-31B-it-NVFP4", nothing),
    "text only": (NVIDIA, text_only),
    "values of their own": (NVIDIA, values_of_their_own),
    "no softcap": (NVIDIA, without_softcap),
    "gate and up tenfold apart": (NVIDIA, unlike_gate_and_up),
    "no input scales": (NVIDIA, without_optional_scales),
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


@pytest.mark.parametrize("chunk", [1, 100])
def test_a_ring_of_pages_holds_the_window(plain: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence many times as long as its ring, against one whose pages are all kept."""
    monkeypatch.setattr("moe_nvfp4.preparation.STEP_ROWS", 100)
    monkeypatch.setattr("moe_nvfp4.preparation.Preparation._chunk", lambda self: 100)
    with checks.runner_of(plain, max_seq_len=512) as ring:
        windowed = [kv for layer, kv in ring.cache.kv.items() if not ring.config.full_attention[layer]]
        assert windowed[0].table[0].unique().numel() < windowed[0].table.shape[1]
        ids = checks.token_ids(ring, 400)
        ring.prefill_chunk = chunk
        actual = ring.logits(ids)
    monkeypatch.setattr("moe_nvfp4.cache.AttentionSpec.pages", lambda self, settings: -(-settings.max_seq_len // 64))
    with checks.runner_of(plain, max_seq_len=512) as whole:
        whole.prefill_chunk = 100
        assert checks.relative_error(actual, whole.logits(ids)) < 1e-5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_activation", "silu", "hidden_activation"),
        ("num_kv_shared_layers", 2, "num_kv_shared_layers"),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ("final_logit_softcapping", -1, "final_logit_softcapping"),
        ("sliding_window", 0, "sliding_window"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    def edit(config: dict, tensors: Tensors) -> None:
        config["text_config"][field] = value

    with pytest.raises(CheckpointError, match=message):
        MoERunner.prepare(tiny_model(NVIDIA, tmp_path / "model", edit), device="cpu", verbose=False)
