"""The decode step: buffers that carry themselves on, padding that touches nothing, buckets."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_checks import runner_of, tiny_model, token_ids

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.decoding import Decoder, DecodeRow, StepBuffers, buckets_up_to
from moe_nvfp4.errors import RequestError
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

NAMES = ["nvidia/Qwen3.6-35B-A3B-NVFP4", "nvidia/Gemma-4-26B-A4B-NVFP4"]
GREEDY = SamplingParams(max_new_tokens=1)


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("decoding") / "model")


@pytest.fixture
def runner(folder: Path) -> Iterator[MoERunner]:
    with runner_of(folder, max_batch_size=4) as runner:
        yield runner


def prefilled(runner: MoERunner, prompt: list[int]) -> DecodeRow:
    slot = runner.cache.acquire()
    with torch.inference_mode():
        batch = Batch.of([Piece(slot, 0, prompt)], runner.device)
        logits = runner.model.logits(runner.model.forward(batch, runner.cache)[-1:])
    return DecodeRow(slot, len(prompt), int(logits.argmax()), GREEDY)


def test_steps_follow_each_other_without_the_host(runner: MoERunner) -> None:
    prompts = [token_ids(runner, 12, 1), token_ids(runner, 30, 2)]
    rows = [prefilled(runner, prompt) for prompt in prompts]
    runner.decoder.start(rows, "test")
    steps = [runner.decoder.step().wait()[0] for _ in range(9)]
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids = [*prompt, row.token_id]
        for step in steps:
            assert step[index] == int(runner_argmax(runner, ids))
            ids.append(step[index])


def runner_argmax(runner: MoERunner, ids: list[int]) -> torch.Tensor:
    return runner.logits(ids)[-1].argmax()


def test_padding_rows_touch_only_the_spare_slot(runner: MoERunner) -> None:
    """A batch of two in a bucket of four, as on a GPU."""
    decoder = Decoder(runner.model, runner.cache, torch.device("cpu"), buckets=[4], graphs=False, verbose=False)
    for kv in runner.cache.kv.values():
        kv.keys.zero_()
    rows = [prefilled(runner, token_ids(runner, 20, seed)) for seed in (1, 2)]
    runner.decoder.start(rows, "test")
    alone = [runner.decoder.step().wait()[0] for _ in range(70)]
    for row in rows:
        runner.cache.release(row.slot)
    rows = [prefilled(runner, token_ids(runner, 20, seed)) for seed in (1, 2)]
    other = runner.cache.acquire()
    buffers = StepBuffers.new(4, torch.device("cpu"))
    buffers.fill(rows, runner.cache.spare_slot)
    with torch.inference_mode():
        for _ in range(70):  # beyond a page of the spare slot
            decoder._run(buffers)
    assert buffers.batch.token_ids[:2].tolist() == alone[-1]
    assert buffers.batch.rows.lengths.tolist() == [91, 91, 1, 1]
    for kv in runner.cache.kv.values():
        assert not kv.keys[kv.table[other].unique().long()].any()


def test_buckets_reach_up_to_the_largest_batch() -> None:
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(5) == [1, 2, 4, 5]
    assert buckets_up_to(8) == [1, 2, 4, 8]
    assert buckets_up_to(4096)[-2:] == [512, 4096]


def test_chosen_buckets_are_checked(folder: Path) -> None:
    with pytest.raises(RequestError, match="up to max_batch_size, 4"):
        MoERunner.prepare(folder, device="cpu", max_batch_size=4, buckets=[1, 2], verbose=False)
    prepared = MoERunner.prepare(folder, device="cpu", max_batch_size=4, buckets=[4, 1, 4], verbose=False)
    assert prepared.buckets == [1, 4]
    prepared.close()


def test_a_bad_kv_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="kv_dtype: got 'int4'"):
        MoERunner.prepare(folder, device="cpu", kv_dtype="int4", verbose=False)
