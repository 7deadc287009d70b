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


def every_expert_chosen(config: dict, tensors: Tensors) -> None:
    config["text_config"]["top_k_experts"] = config["text_config"]["num_experts"]


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


@pytest.fixture(scope="module", params=[NVIDIA, REDHAT])
def smooth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("smooth") / "model", every_expert_chosen, seed=5)


@pytest.fixture(scope="module", params=[NVIDIA, REDHAT])
def shaped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shaped") / "model"
    return tiny_model(request.param, out, every_expert_chosen, seed=5, for_kernels=True)


def test_float32_logits_equal_transformers(folder: Path) -> None:
    checks.check_against_transformers(folder)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_incremental_equals_prefill(plain: Path, chunk: int) -> None:
    checks.check_incremental(plain, chunk)


def test_sequences_of_a_batch_do_not_touch_each_other(plain: Path) -> None:
    checks.check_rows_apart(plain)


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


def test_bfloat16_stays_close_to_float32(smooth: Path) -> None:
    checks.check_bfloat16(smooth, "cpu")


def test_greedy_tokens_follow_float32(smooth: Path) -> None:
    checks.check_greedy_tokens(smooth, "cpu")


def test_fp8_keys_and_values(smooth: Path) -> None:
    checks.check_fp8_cache(smooth)


@pytest.mark.gpu
def test_kernels_stay_close_to_float32(shaped: Path) -> None:
    checks.check_bfloat16(shaped, "cuda")


@pytest.mark.gpu
def test_greedy_tokens_of_the_kernels_follow_float32(shaped: Path) -> None:
    checks.check_greedy_tokens(shaped, "cuda")


@pytest.mark.gpu
def test_kernels_on_fp8_keys_and_values(shaped: Path) -> None:
    checks.check_fp8_cache(shaped, "cuda")


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_eager_steps(shaped: Path) -> None:
    checks.check_graph_equals_eager(shaped)


@pytest.mark.gpu
def test_sizes_that_no_kernel_takes_run_all_the_same(smooth: Path) -> None:
    checks.check_bfloat16(smooth, "cuda")


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
