"""Determinism mode: the same request gives the same tokens and log-probabilities whatever else runs.

On a CPU, where each sequence is computed by itself; on a GPU through kernels whose rows do not depend on each other,
each of which is tested alone in kernels/test_batch_invariant.py.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import determinism_checks as checks
import pytest
import torch
from model_checks import every_expert_chosen, runner_of, tiny_model, token_ids

from moe_nvfp4.determinism import Determinism, determinism_of
from moe_nvfp4.errors import RequestError
from moe_nvfp4.kernels.linear import Invariant, Projection, Summed, linear
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.kernels.route import route
from moe_nvfp4.kernels.routed_experts import routed_experts
from moe_nvfp4.launch import cli_generate, cli_serve
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

NAMES = ("nvidia/Qwen3-30B-A3B-NVFP4", "nvidia/Qwen3.6-35B-A3B-NVFP4", "nvidia/Gemma-4-26B-A4B-NVFP4")


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("determinism") / "model")


@pytest.fixture(scope="module", params=NAMES)
def shaped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("shaped") / "model", for_kernels=True)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that prompts of tests have several."""
    monkeypatch.setattr("moe_nvfp4.preparation.CHUNK", 64)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("dtype", "reuses"), [("float32", (True, False)), ("bfloat16", (True,))])
def test_a_request_among_others_is_answered_as_alone(folder: Path, dtype: str, reuses: tuple[bool, ...]) -> None:
    asked = checks.requests(6, lengths=(1, 63, 64, 65, 130, 300), new=(2, 5))
    expected = checks.alone(folder, asked, dtype=dtype)
    for reuse in reuses:
        checks.check_among_others(folder, expected, asked, dtype=dtype, prefix_reuse=reuse)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_answers_that_are_computed_again_stay_the_same(folder: Path, prefix_reuse: bool) -> None:
    asked = checks.requests(4, lengths=(58, 61, 124, 60), new=(10,))
    expected = checks.alone(folder, asked)
    checks.check_without_pages(folder, expected, asked, prefix_reuse=prefix_reuse)


def test_chunks_as_they_are(folder: Path) -> None:
    """Prompts of more than one chunk of 512, some of them beginning alike."""
    asked = checks.requests(3, lengths=(511, 513, 700), new=(2,))
    checks.check_among_others(folder, checks.alone(folder, asked), asked)


@pytest.mark.usefixtures("short_chunks")
def test_prefixes_are_reused_after_whole_chunks(folder: Path) -> None:
    with runner_of(folder, **checks.SETTINGS, max_batch_size=2) as runner:
        prompt, params = list(range(300)), SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=2)
        first, again = (runner.generate(prompt, params) for _ in range(2))
        assert again.timing.reused_tokens == 256
        checks.require_same(
            [checks.answered(again.completions[0])], [checks.answered(first.completions[0])], "with reuse"
        )
        turn = runner.generate([*prompt, *first.token_ids, 5, 6], params)
        assert turn.timing.reused_tokens == 256, "nothing of an answer is reused"


@pytest.mark.parametrize("name", NAMES)
def test_models_ask_kernels_for_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the twins of the kernels: no product is taken with a weight that does not ask."""
    folder = tiny_model(name, tmp_path / "model", every_expert_chosen)
    with runner_of(folder, dtype="bfloat16") as usual:
        ids = token_ids(usual)
        expected = usual.logits(ids)
    monkeypatch.setattr("moe_nvfp4.preparation.determinism_of", lambda *_, **__: Determinism.KERNELS)
    seen: set[str] = set()

    def asked_linear(x_TK: torch.Tensor, weight: Projection | Summed) -> torch.Tensor:
        assert isinstance(weight, Invariant)
        seen.add("linear")
        return linear(x_TK, weight)

    def asks(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*arguments: Any, **options: Any) -> Any:
            assert options["batch_invariant"]
            seen.add(name)
            return function(*arguments, **options)

        return asked

    model = f"moe_nvfp4.models.{json.loads((folder / 'config.json').read_text())['model_type']}"
    for module in (model, "moe_nvfp4.models.moe", "moe_nvfp4.kernels.norm_linear"):
        monkeypatch.setattr(f"{module}.linear", asked_linear)
    monkeypatch.setattr(f"{model}.route", asks("route", route))
    monkeypatch.setattr("moe_nvfp4.models.moe.routed_experts", asks("routed_experts", routed_experts))
    with runner_of(folder, dtype="bfloat16", deterministic=True) as runner:
        assert relative_error(runner.logits(ids), expected) < 2e-2
        assert all(kv.batch_invariant for kv in runner.cache.kv.values())
    assert seen == {"linear", "route", "routed_experts"}


def test_commands_pass_it_on() -> None:
    for add, settings_of in (
        (cli_generate.add_generate, cli_generate.settings_of),
        (cli_serve.add_serve, cli_serve.engine_settings),
    ):
        parser = argparse.ArgumentParser()
        add(parser)
        given = ["--model", "PATH", *(["--prompt", "a"] if add is cli_generate.add_generate else [])]
        assert settings_of(parser.parse_args([*given, "--deterministic"]))["deterministic"]
        assert not settings_of(parser.parse_args(given))["deterministic"]


def test_several_ranks_are_refused() -> None:
    with pytest.raises(RequestError, match="deterministic: got a group of 2 ranks; expected one"):
        determinism_of(True, fast=True, ranks=2)
    assert determinism_of(False, fast=True, ranks=2) is Determinism.OFF
    assert determinism_of(True, fast=True, ranks=1) is Determinism.KERNELS
    assert determinism_of(True, fast=False, ranks=1) is Determinism.APART


def test_chunks_cannot_be_changed(folder: Path) -> None:
    with MoERunner.from_pretrained(folder, device="cpu", deterministic=True, verbose=False) as runner:
        assert runner.prefill_chunk == 512
        with pytest.raises(RequestError, match="prefill_chunk: got 100; with deterministic=True it stays 512"):
            runner.prefill_chunk = 100


@pytest.mark.gpu
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_kernels_answer_a_request_among_others_as_alone(shaped: Path, cuda_graphs: bool) -> None:
    gpu = {"device": "cuda", "dtype": "bfloat16"}
    asked = checks.requests(16, lengths=(1, 2, 9, 63, 64, 65, 130, 300), new=(3, 8, 20))
    expected = checks.alone(shaped, asked, **gpu, cuda_graphs=False)
    with runner_of(shaped, **checks.SETTINGS, **gpu) as runner:
        assert runner.stepper.determinism is Determinism.KERNELS
    checks.check_among_others(shaped, expected, asked, **gpu, cuda_graphs=cuda_graphs, max_batch_size=12)


@pytest.mark.gpu
@pytest.mark.usefixtures("short_chunks")
def test_kernels_compute_answers_again_alike(shaped: Path) -> None:
    gpu = {"device": "cuda", "dtype": "bfloat16"}
    asked = checks.requests(12, lengths=(58, 61, 124, 60), new=(10, 30))
    checks.check_without_pages(shaped, checks.alone(shaped, asked, **gpu), asked, **gpu)


@pytest.mark.gpu
def test_without_kernels_a_gpu_takes_one_sequence_after_the_other(folder: Path) -> None:
    asked = checks.requests(5, lengths=(1, 20, 130), new=(3,))
    expected = checks.alone(folder, asked, device="cuda")
    checks.check_among_others(folder, expected, asked, device="cuda")
