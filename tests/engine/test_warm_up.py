"""Warming up computes on nobody's place: answers are the same with it."""

from functools import partial
from pathlib import Path

import pytest
from model_checks import tiny_model

from moe_nvfp4.engine.warm_up import spare_pieces, step_sizes, warm_up
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

PROMPTS = [[5, 6, 7, 8], [9, 10, 11] * 9]


@pytest.mark.parametrize("name", ["nvidia/Qwen3.6-35B-A3B-NVFP4", "nvidia/Gemma-4-26B-A4B-NVFP4"])
def test_answers_are_the_same(name: str, tmp_path: Path) -> None:
    folder = tiny_model(name, tmp_path / "model")
    with MoERunner.from_pretrained(folder, device="cpu", max_batch_size=3, max_seq_len=128, verbose=False) as runner:
        before = runner.generate(PROMPTS, SamplingParams(max_new_tokens=8))
        runner.engine.call(partial(warm_up, runner.stepper, 12, False))
        after = runner.generate(PROMPTS, SamplingParams(max_new_tokens=8))
    assert [answer.token_ids for answer in after] == [answer.token_ids for answer in before]


@pytest.mark.parametrize("most", [1, 2, 100, 4096])
def test_every_range_of_sizes_has_one(most: int) -> None:
    sizes = step_sizes([], most)
    assert sizes[0] == most
    assert all(any(size <= rows < 2 * size for size in sizes) for rows in range(min(sizes), most + 1))


@pytest.mark.parametrize("rows", [1, 2, 12, 100])
def test_rows_of_a_step_are_shared_out(rows: int, tmp_path: Path) -> None:
    folder = tiny_model("nvidia/Qwen3.6-35B-A3B-NVFP4", tmp_path / "model")
    with MoERunner.from_pretrained(folder, device="cpu", max_batch_size=3, max_seq_len=32, verbose=False) as runner:
        counts = [len(piece.token_ids) for piece in spare_pieces(runner.cache, rows)]
    assert sum(counts) == rows and max(counts) <= 32
