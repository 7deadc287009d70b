"""Steps: buffers that carry themselves on, tokens that stay on the device, padding that touches nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_checks import cache_settings, runner_of, tiny_model, token_ids

from moe_nvfp4.batch import Piece
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.engine.step_buffers import DecodeRow, StepBuffers, buckets_up_to
from moe_nvfp4.engine.stepper import Stepper
from moe_nvfp4.errors import RequestError
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import Sampler, SamplingParams

NAMES = ["nvidia/Qwen3.6-35B-A3B-NVFP4", "nvidia/Gemma-4-26B-A4B-NVFP4"]
GREEDY = SamplingParams(max_new_tokens=1)


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("stepper") / "model")


@pytest.fixture
def runner(folder: Path) -> Iterator[MoERunner]:
    with runner_of(folder, max_batch_size=4, max_seq_len=256) as runner:
        yield runner


def stepper_of(runner: MoERunner) -> Stepper:
    """With a cache of its own, whose slots have fixed pages."""
    cache = SequenceCache(runner.config.cache_spec, cache_settings(runner, slots=4), runner.device)
    for kv in cache.kv.values():
        kv.keys.zero_()
    return Stepper(runner.model, cache, runner.device, buckets=[4], graphs=False, verbose=False)


def prefill(stepper: Stepper, prompts: list[list[int]]) -> list[DecodeRow]:
    pieces = [Piece(slot, 0, prompt) for slot, prompt in enumerate(prompts)]
    stepper.mixed(pieces, [Sampler(GREEDY)] * len(prompts))
    return [DecodeRow(slot, len(prompt), GREEDY) for slot, prompt in enumerate(prompts)]


def later(rows: list[DecodeRow], steps: int) -> list[DecodeRow]:
    return [row._replace(position=row.position + steps) for row in rows]


def test_steps_follow_each_other_without_the_host(runner: MoERunner) -> None:
    stepper = stepper_of(runner)
    prompts = [token_ids(runner, 12, 1), token_ids(runner, 30, 2)]
    rows = prefill(stepper, prompts)
    first = stepper.last_tokens[:2].tolist()
    steps = [first, *(stepper.decode(later(rows, step)).wait()[0] for step in range(9))]
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for step in steps:
            assert step[index] == int(runner.logits(ids)[-1].argmax())
            ids.append(step[index])


def test_a_mixed_step_goes_on_from_tokens_on_the_device(runner: MoERunner) -> None:
    stepper = stepper_of(runner)
    prompts = [token_ids(runner, 12, 1), token_ids(runner, 30, 2)]
    (row,) = prefill(stepper, prompts[:1])
    pieces = [Piece(1, 0, prompts[1]), Piece(0, row.position, ())]
    tokens, _ = stepper.mixed(pieces, [Sampler(GREEDY), Sampler(GREEDY)]).wait()
    first = int(runner.logits(prompts[0])[-1].argmax())
    assert tokens[1] == int(runner.logits([*prompts[0], first])[-1].argmax())
    assert tokens[0] == int(runner.logits(prompts[1])[-1].argmax())


def test_an_unfinished_prompt_leaves_the_last_token_alone(runner: MoERunner) -> None:
    stepper = stepper_of(runner)
    stepper.last_tokens.fill_(7)
    prompt = token_ids(runner, 30)
    stepper.mixed([Piece(2, 0, prompt[:20])], [None])
    assert stepper.last_tokens.tolist() == [7] * 5
    stepper.mixed([Piece(2, 20, prompt[20:])], [Sampler(GREEDY)])
    assert stepper.last_tokens[2] == int(runner.logits(prompt)[-1].argmax())


def test_padding_rows_touch_only_the_spare_slot(runner: MoERunner) -> None:
    """A batch of two in a bucket of four, as on a GPU."""
    prompts = [token_ids(runner, 20, seed) for seed in (1, 2)]
    narrow, padded = stepper_of(runner), stepper_of(runner)
    rows = prefill(narrow, prompts)
    alone = [narrow.decode(later(rows, step)).wait()[0] for step in range(70)]
    buffers = StepBuffers.new(4, padded.device)
    buffers.fill(prefill(padded, prompts), padded.cache.spare_slot)
    with torch.inference_mode():
        for step in range(70):  # beyond a page of the spare slot
            padded._run(buffers)
            assert buffers.sampled is not None
            assert buffers.sampled.token_ids[0, :2].tolist() == alone[step]
    assert buffers.rows.lengths.tolist() == [91, 91, 1, 1]
    for kv in padded.cache.kv.values():
        assert not kv.keys[kv.table[2:4].unique().long()].any()


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
