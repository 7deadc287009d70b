"""Two and four ranks give what one gives: three architectures, three ways to share attention out, any placement."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from model_checks import tiny_model
from ranks import RankPool, answers_of, one_thread, tokens_without_a_plan

from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.sampling import SamplingParams

NAMES = {
    "qwen3": "nvidia/Qwen3-30B-A3B-NVFP4",
    "qwen3.6": "nvidia/Qwen3.6-35B-A3B-NVFP4",
    "gemma": "RedHatAI/gemma-4-26B-A4B-it-NVFP4",
}
MODES = ["replicated", "tensor", "data"]
GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
PROMPTS = [[(7 * i + j * j) % 500 for j in range(length)] for i, length in enumerate((33, 3, 18, 50, 1, 21))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ranks")
    return {key: tiny_model(name, root / key) for key, name in NAMES.items()}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, tuple]:
    return one_thread(lambda: {key: answers_of(folder, None, PROMPTS, GREEDY) for key, folder in folders.items()})


@pytest.fixture(scope="module", params=[2, 4])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(request.param, tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("model", NAMES)
def test_equal_to_one_rank(pool: RankPool, folders: dict, alone: dict, model: str, attention: str) -> None:
    tokens, _, logits = alone[model]
    results = pool.run(answers_of, folders[model], attention, PROMPTS, GREEDY)
    for theirs, _, their_logits in results:
        assert theirs == tokens
        assert relative_error(their_logits, logits) < 1e-5
        if attention != "data":
            assert torch.equal(their_logits, results[0][2]), "ranks would not sample the same tokens"


@pytest.mark.parametrize("attention", MODES)
def test_steps_that_are_filled_up(pool: RankPool, folders: dict, alone: dict, attention: str) -> None:
    """To numbers of rows that have graphs, where ranks have different numbers of their own too."""
    for theirs, *_ in pool.run(answers_of, folders["qwen3.6"], attention, PROMPTS, GREEDY, fill_rows=64):
        assert theirs == alone["qwen3.6"][0]


@pytest.mark.parametrize("attention", MODES)
def test_steps_that_are_alike_need_no_plan(pool: RankPool, folders: dict, attention: str) -> None:
    """As in benchmarks, and where somebody steps by himself."""
    expected = one_thread(lambda: tokens_without_a_plan(folders["qwen3.6"], None, PROMPTS[0]))
    assert len(expected) == 4
    assert pool.run(tokens_without_a_plan, folders["qwen3.6"], attention, PROMPTS[0]) == [expected] * pool.size


def test_sampling_is_the_same_too(pool: RankPool, folders: dict) -> None:
    """Seeds, penalties, biases and logprobs, of sequences of all ranks in one step."""
    base = SamplingParams(max_new_tokens=6, ignore_eos=True)
    params = [
        replace(base, temperature=0.9, seed=3),
        replace(base, logprobs=2),
        replace(base, repetition_penalty=1.3, frequency_penalty=0.4),
        replace(base, temperature=1.1, top_k=40, seed=5, logprobs=0),
        replace(base, logit_bias={7: 9.0}, max_new_tokens=3),
        replace(base, temperature=0.7, top_p=0.8, seed=8),
    ]
    tokens, logprobs, _ = one_thread(lambda: answers_of(folders["qwen3"], None, PROMPTS, params))
    assert len(logprobs[1]) == 6 and len(logprobs[1][0].top) == 2
    for attention in ("replicated", "data") if pool.size == 2 else ("data",):
        for theirs, their_logprobs, _ in pool.run(answers_of, folders["qwen3"], attention, PROMPTS, params):
            assert theirs == tokens
            for mine, other in zip(chain(*logprobs), chain(*their_logprobs), strict=True):
                assert mine.token_id == other.token_id
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [token for token, _ in mine.top] == [token for token, _ in other.top]


@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("model", NAMES)
def test_on_two_gpus(folders: dict, tmp_path: Path, model: str) -> None:
    """In float32, launch by launch, what one GPU gives. In bfloat16, from graphs, what it gives nearly: where routing
    is close, another expert is taken, and what follows that row differs."""
    pool = RankPool(2, tmp_path, "cuda")
    try:
        for dtype in ("float32", "bfloat16"):
            tokens, _, logits = answers_of(folders[model], None, PROMPTS, GREEDY, device="cuda", dtype=dtype)
            for attention in MODES:
                results = pool.run(answers_of, folders[model], attention, PROMPTS, GREEDY, dtype=dtype)
                for theirs, _, their_logits in results:
                    assert theirs == results[0][0]
                    if dtype == "float32":
                        assert theirs == tokens
                        assert relative_error(their_logits, logits) < 1e-4
                    errors = (their_logits - logits).norm(dim=-1) / logits.norm(dim=-1)
                    assert errors.quantile(0.25) < 2e-2 and errors.median() < 5e-2, (attention, errors)
                    if attention != "data":
                        assert torch.equal(their_logits, results[0][2]), "ranks would not sample the same tokens"
    finally:
        pool.close()
