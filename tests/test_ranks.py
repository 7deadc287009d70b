"""Two and four ranks give what one gives: three architectures, three ways to share attention out, any placement."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_checks import tiny_model
from ranks import RankPool, answers_of

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models are slower with more
    expected = {key: answers_of(folder, None, PROMPTS, GREEDY) for key, folder in folders.items()}
    torch.set_num_threads(threads)
    return expected


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
