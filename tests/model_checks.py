"""What every model must hold, on tiny checkpoints: equal to transformers, incremental equal to whole, rows apart."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from reference import read_tensors, reference_logits, reference_model
from safetensors.torch import save_file

from moe_nvfp4 import published_tiny
from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.cache import CacheSettings, SequenceCache
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams
from moe_nvfp4.synthesize import synthesize

LENGTH = 90  # beyond the tiny windows, and beyond the 64 rows of a chunk of a delta net
Tensors = dict[str, torch.Tensor]
Edit = Callable[[dict, Tensors], None]


# Sizes in place of the awkward ones of tiny checkpoints: the smallest that every kernel takes.
KERNEL_SIZES = {
    "qwen3_moe": {"head_dim": 64},
    "qwen3_5_moe": {
        "head_dim": 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "shared_expert_intermediate_size": 64,
    },
    "gemma4": {"head_dim": 64, "global_head_dim": 128, "sliding_window": 40, "intermediate_size": 128},
}
KERNEL_SIZES = {
    kind: {"hidden_size": 256, "moe_intermediate_size": 64, "num_experts": 16, **sizes}
    for kind, sizes in KERNEL_SIZES.items()
}


def nothing(config: dict, tensors: Tensors) -> None: ...


def tiny_model(name: str, out: Path, edit: Edit = nothing, seed: int = 3, *, for_kernels: bool = False) -> Path:
    """A synthetic checkpoint in one file, changed by `edit`; `for_kernels`: of sizes that every kernel takes."""
    torch.manual_seed(1)
    sizes = {kind: text | KERNEL_SIZES.get(kind, {}) for kind, text in published_tiny._TEXT.items()}
    with patch.object(published_tiny, "_TEXT", sizes if for_kernels else published_tiny._TEXT):
        synthesize(name, out, tiny=True, seed=seed)
    config, tensors = json.loads((out / "config.json").read_text()), read_tensors(out)
    edit(config, tensors)
    (out / "config.json").write_text(json.dumps(config))
    for path in out.glob("model*.safetensors*"):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


def without_optional_scales(config: dict, tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith((".input_scale", ".input_global_scale", ".k_scale", ".v_scale"))]:
        del tensors[name]


def unlike_gate_and_up(config: dict, tensors: Tensors) -> None:
    """Global scales of a pair ten times apart, in either dialect."""
    for name in tensors:
        if name.endswith(("up_proj.weight_scale_2", "down_proj.weight_global_scale")):
            tensors[name] = tensors[name] * 10
        elif name.endswith(("down_proj.weight_scale_2", "up_proj.weight_global_scale")):
            tensors[name] = tensors[name] / 10


def every_expert_chosen(config: dict, tensors: Tensors) -> None:
    """So rounding cannot swap the last expert chosen with the first left out, which moves so small a model far."""
    text = config.get("text_config", config)
    name = "top_k_experts" if "top_k_experts" in text else "num_experts_per_tok"
    text[name] = text["num_experts"]


def runner_of(folder: Path, **settings: object) -> MoERunner:
    settings = {"device": "cpu", "dtype": "float32", "verbose": False, **settings}
    return MoERunner.from_pretrained(folder, **settings)


def cache_settings(runner: MoERunner, slots: int) -> CacheSettings:
    return replace(runner.cache.settings, slots=slots)


def token_ids(runner: MoERunner, length: int = LENGTH, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(runner.prompts.vocab_size, (length,), generator=generator).tolist()


def check_against_transformers(folder: Path) -> None:
    with runner_of(folder) as runner:
        ids = token_ids(runner)
        expected, actual = reference_logits(reference_model(folder), ids), runner.logits(ids)
        assert expected.std() > 0.3, "logits without spread would hide errors"
        assert relative_error(actual, expected) < 1e-4
        assert max(relative_error(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-4


def check_incremental(folder: Path, chunk: int) -> None:
    with runner_of(folder) as runner:
        ids = token_ids(runner)
        whole = runner.logits(ids)
        runner.prefill_chunk = chunk
        assert relative_error(runner.logits(ids), whole) < 1e-5


def check_rows_apart(folder: Path) -> None:
    """Two sequences in unequal chunks, so that prefill runs beside prefill, and then beside decode."""
    with runner_of(folder) as runner:
        first, second = token_ids(runner, 30, 1), token_ids(runner, 71, 2)
        alone = runner.logits(first), runner.logits(second)
        cache = SequenceCache(runner.config.cache_spec, cache_settings(runner, slots=2), runner.device)
        slots = 1, 0
        steps = [
            [Piece(slots[0], 0, first[:20])],
            [Piece(slots[1], 0, second[:69]), Piece(slots[0], 20, first[20:28])],
            [Piece(slots[0], 28, first[28:29]), Piece(slots[1], 69, second[69:70])],
            [Piece(slots[1], 70, second[70:]), Piece(slots[0], 29, first[29:])],
        ]
        with torch.inference_mode():
            for pieces in steps:
                batch = Batch.of(pieces, runner.device)
                together = runner.model.logits(runner.model.forward(batch, cache)[batch.last_rows])
        for row, expected in zip(together, reversed(alone), strict=True):
            assert relative_error(row, expected[-1]) < 1e-5


def check_bfloat16(folder: Path, device: str) -> None:
    """`folder` chooses all experts: in so small a model one near tie decided otherwise moves a row by a half."""
    with runner_of(folder) as wide, runner_of(folder, device=device, dtype="bfloat16") as narrow:
        ids = token_ids(wide)
        assert relative_error(narrow.logits(ids), wide.logits(ids)) < 2e-2


def check_greedy_tokens(folder: Path, device: str, steps: int = 64) -> None:
    """bfloat16 follows float32 for as long as the margin of the best token exceeds bfloat16's error of it."""
    with runner_of(folder) as wide, runner_of(folder, device=device, dtype="bfloat16") as narrow:
        prompt = token_ids(wide, 20)
        answer = list(narrow.generate(prompt, SamplingParams(max_new_tokens=steps, ignore_eos=True)).token_ids)
        exact, rounded = wide.logits(prompt + answer), narrow.logits(prompt + answer)
        agreed = 0
        for place, token in enumerate(answer, start=len(prompt) - 1):
            noise = 2 * (rounded[place] - exact[place]).abs().max()
            best = exact[place].topk(2)
            if best.values[0] - best.values[1] > noise:
                assert token == best.indices[0]
                agreed += 1
        assert agreed > steps // 4, "margins are too small for this test to mean anything"


def check_fp8_cache(folder: Path, device: str = "cpu") -> None:
    """E4M3 keys and values: three bits of mantissa, so a few percent."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    with runner_of(folder) as exact, runner_of(folder, device=device, dtype=dtype, kv_dtype="fp8") as rounded:
        ids = token_ids(exact)
        assert rounded.plan.cache < exact.plan.cache
        error = relative_error(rounded.logits(ids), exact.logits(ids))
        assert 1e-4 < error < 0.1


def check_graph_equals_eager(folder: Path) -> None:
    prompts = [[5, 6, 7], list(range(3, 60)), [9]]
    params = [SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=t, seed=7) for t in (0.0, 0.8, 0.0)]
    answers = []
    for cuda_graphs in (True, False):
        with runner_of(folder, device="cuda", dtype="bfloat16", cuda_graphs=cuda_graphs, max_batch_size=4) as runner:
            assert runner.stepper.has_graphs == cuda_graphs
            answers.append([result.token_ids for result in runner.generate(prompts, params)])
    assert answers[0] == answers[1]
