"""Qwen3-MoE against transformers, from checkpoints in every format it comes in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import read_tensors, reference_logits, reference_model
from safetensors.torch import save_file

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.synthesize import synthesize

NVIDIA, REDHAT = "nvidia/Qwen3-30B-A3B-NVFP4", "RedHatAI/Qwen3-30B-A3B-NVFP4"
LENGTH = 90
Tensors = dict[str, torch.Tensor]
Edit = Callable[[dict, Tensors], None]


def rewrite(folder: Path, edit: Edit) -> None:
    """Changes config and tensors of a single-file checkpoint in place."""
    config = json.loads((folder / "config.json").read_text())
    tensors = read_tensors(folder)
    edit(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


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


def unlike_gate_and_up(config: dict, tensors: Tensors) -> None:
    for name in tensors:
        if "up_proj.weight_scale_2" in name:
            tensors[name] *= 10
        elif "down_proj.weight_scale_2" in name:
            tensors[name] /= 10


def without_optional_scales(config: dict, tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith((".input_scale", ".k_scale", ".v_scale"))]:
        del tensors[name]


def quarter_weights(config: dict, tensors: Tensors) -> None:
    config["norm_topk_prob"] = False


def every_expert_chosen(config: dict, tensors: Tensors) -> None:
    config["num_experts_per_tok"] = config["num_experts"]


def nothing(config: dict, tensors: Tensors) -> None: ...


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
    torch.manual_seed(1)
    out = tmp_path_factory.mktemp("model") / "model"
    synthesize(name, out, tiny=True, seed=3)
    rewrite(out, edit)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "model"
    synthesize(NVIDIA, out, tiny=True, seed=5)
    return out


@pytest.fixture(scope="module", params=[NVIDIA, REDHAT])
def smooth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experts of a row are chosen: rounding cannot swap the last chosen with the first left out.

    With two of eight, one swap moves a row of so small a model by a half, and all rows that attend to it.
    """
    out = tmp_path_factory.mktemp("smooth") / "model"
    synthesize(request.param, out, tiny=True, seed=5)
    rewrite(out, every_expert_chosen)
    return out


def token_ids(runner: MoERunner, length: int = LENGTH, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(runner.prompts.vocab_size, (length,), generator=generator).tolist()


def test_float32_logits_equal_transformers(folder: Path) -> None:
    with MoERunner.from_pretrained(folder, device="cpu", dtype="float32", verbose=False) as runner:
        ids = token_ids(runner)
        expected = reference_logits(reference_model(folder), ids)
        actual = runner.logits(ids)
        assert expected.std() > 0.3, "logits without spread would hide errors"
        assert relative_error(actual, expected) < 1e-4
        worst_row = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
        assert worst_row < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_incremental_equals_prefill(plain: Path, chunk: int) -> None:
    with MoERunner.from_pretrained(plain, device="cpu", dtype="float32", verbose=False) as runner:
        ids = token_ids(runner)
        whole = runner.logits(ids)
        runner.prefill_chunk = chunk
        assert relative_error(runner.logits(ids), whole) < 1e-5


def test_sequences_of_a_batch_do_not_touch_each_other(plain: Path) -> None:
    with MoERunner.from_pretrained(plain, device="cpu", dtype="float32", verbose=False) as runner:
        first, second = token_ids(runner, 30, 1), token_ids(runner, 41, 2)
        alone = runner.logits(first), runner.logits(second)
        slots = runner.cache.acquire(), runner.cache.acquire()
        with torch.inference_mode():
            # Unequal chunks, so that the rows of the two interleave: prefill beside prefill, then beside decode.
            runner.model.forward(Batch.of([Piece(slots[0], 0, first[:20])], runner.device), runner.cache)
            pieces = [Piece(slots[1], 0, second[:40]), Piece(slots[0], 20, first[20:29])]
            runner.model.forward(Batch.of(pieces, runner.device), runner.cache)
            batch = Batch.of([Piece(slots[0], 29, first[29:]), Piece(slots[1], 40, second[40:])], runner.device)
            together = runner.model.logits(runner.model.forward(batch, runner.cache))
        for row, expected in zip(together, alone, strict=True):
            assert relative_error(row, expected[-1]) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_stays_close_to_float32(smooth: Path, device: str) -> None:
    with (
        MoERunner.from_pretrained(smooth, device="cpu", dtype="float32", verbose=False) as wide,
        MoERunner.from_pretrained(smooth, device=device, dtype="bfloat16", verbose=False) as narrow,
    ):
        ids = token_ids(wide)
        assert relative_error(narrow.logits(ids), wide.logits(ids)) < 2e-2


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
        ids = token_ids(cpu)
        assert relative_error(gpu.logits(ids), cpu.logits(ids)) < 1e-4
