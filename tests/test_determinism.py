"""Determinism mode: the same request gives the same tokens and log-probabilities whatever else runs.

On a CPU, where each sequence is computed by itself; on a GPU through kernels whose rows do not depend on each other,
each of which is tested alone in kernels/test_batch_invariant.py.
"""

from pathlib import Path

import determinism_checks as checks
import pytest
from model_checks import runner_of, tiny_model

from moe_nvfp4.determinism import Determinism, determinism_of
from moe_nvfp4.errors import RequestError
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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_among_others_is_answered_as_alone(folder: Path, dtype: str) -> None:
    asked = checks.requests(9)
    expected = checks.alone(folder, asked, dtype=dtype)
    for reuse in (True, False):
        checks.check_among_others(folder, expected, asked, dtype=dtype, prefix_reuse=reuse)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_answers_that_are_computed_again_stay_the_same(folder: Path, prefix_reuse: bool) -> None:
    asked = [request for seed in (1, 2) for request in checks.requests(5, seed, lengths=(40, 60, 120))]
    expected = checks.alone(folder, asked)
    checks.check_without_pages(folder, expected, asked, prefix_reuse=prefix_reuse)


def test_chunks_as_they_are(folder: Path) -> None:
    """Prompts of more than one chunk of 512, some of them beginning alike."""
    asked = checks.requests(4, seed=3, lengths=(511, 513, 700))
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
    asked = checks.requests(12, lengths=(1, 2, 9, 63, 64, 65, 130, 300))
    expected = checks.alone(shaped, asked, **gpu, cuda_graphs=False)
    with runner_of(shaped, **checks.SETTINGS, **gpu) as runner:
        assert runner.stepper._deterministic and not runner.stepper.apart
    checks.check_among_others(shaped, expected, asked, **gpu, cuda_graphs=cuda_graphs, max_batch_size=12)


@pytest.mark.gpu
@pytest.mark.usefixtures("short_chunks")
def test_kernels_compute_answers_again_alike(shaped: Path) -> None:
    gpu = {"device": "cuda", "dtype": "bfloat16"}
    asked = [request for seed in (1, 2) for request in checks.requests(5, seed, lengths=(40, 60, 120))]
    checks.check_without_pages(shaped, checks.alone(shaped, asked, **gpu), asked, **gpu)


@pytest.mark.gpu
def test_without_kernels_a_gpu_takes_one_sequence_after_the_other(folder: Path) -> None:
    asked = checks.requests(5)
    expected = checks.alone(folder, asked, device="cuda")
    checks.check_among_others(folder, expected, asked, device="cuda")
