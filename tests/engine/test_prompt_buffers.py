"""Steps with prompts whose inputs lie in the same memory every time, with room for more sequences than there are."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from model_checks import cache_settings, every_expert_chosen, runner_of, tiny_model, token_ids

from moe_nvfp4 import expert_loads
from moe_nvfp4.batch import Piece
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.engine.prompt_buffers import PromptBuffers, PromptBuffersBySize, most_prompts, row_buckets
from moe_nvfp4.engine.step_buffers import DecodeRow
from moe_nvfp4.engine.stepper import Stepper
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import Sampler, SamplingParams

NAMES = ["nvidia/Qwen3.6-35B-A3B-NVFP4", "nvidia/Gemma-4-26B-A4B-NVFP4", "nvidia/Qwen3-30B-A3B-NVFP4"]
GREEDY = SamplingParams(max_new_tokens=1)
SLOTS = 12


@pytest.fixture(scope="module", params=NAMES)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MoERunner]:
    folder = tiny_model(request.param, tmp_path_factory.mktemp("prompts") / "model")
    with runner_of(folder, max_batch_size=SLOTS, max_seq_len=256) as runner:
        yield runner


@pytest.fixture(scope="module", params=NAMES)
def gpu_runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MoERunner]:
    folder = tiny_model(
        request.param, tmp_path_factory.mktemp("prompts") / "model", every_expert_chosen, 5, for_kernels=True
    )
    with runner_of(folder, device="cuda", dtype="bfloat16", max_batch_size=SLOTS, max_seq_len=256) as runner:
        yield runner


def stepper_of(runner: MoERunner, *, fill_rows: int, graphs: bool = False, count_rows: bool = False) -> Stepper:
    cache = SequenceCache(runner.config.cache_spec, cache_settings(runner, slots=SLOTS), runner.device, snapshots=1)
    for kv in cache.kv.values():
        kv.keys.zero_()
        kv.values.zero_()
    return Stepper(
        runner.model,
        cache,
        runner.device,
        buckets=[SLOTS],
        graphs=graphs,
        verbose=False,
        fill_rows=fill_rows,
        count_rows=count_rows,
    )


def steps(runner: MoERunner) -> list[list[Piece]]:
    """Prompts alone, of one token too, in several chunks, beside answers, many at once, and continued."""

    def ids(count: int, seed: int) -> list[int]:
        return token_ids(runner, count, seed)

    long = ids(200, 1)
    return [
        [Piece(0, 0, ids(20, 2))],
        [Piece(1, 0, long[:90]), Piece(0, 20, ())],
        [Piece(0, 21, ()), Piece(1, 90, long[90:170]), Piece(2, 0, ids(1, 3))],
        [Piece(slot, 0, ids(3 + slot, slot)) for slot in range(3, 11)] + [Piece(2, 1, ()), Piece(0, 22, ())],
        [Piece(1, 170, long[170:]), *(Piece(slot, 3 + slot, ()) for slot in range(3, 11)), Piece(11, 0, ids(64, 4))],
    ]  # fmt: skip


def run(stepper: Stepper, runner: MoERunner) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens of the steps, then of decode steps of all sequences; and the peaks of their logits. What sequences go on
    with is given, so that one token chosen otherwise does not change all that follow."""
    tokens, peaks = [], []
    given = torch.tensor(token_ids(runner, SLOTS + 1, 9), dtype=torch.int32)
    for pieces in steps(runner):
        ids, tops = stepper.mixed(pieces, [Sampler(GREEDY)] * len(pieces)).wait()
        stepper.last_tokens.copy_(given)
        tokens.append(ids)
        peaks += tops
    lengths = {0: 23, 1: 200, 2: 2, **{slot: 4 + slot for slot in range(3, 11)}, 11: 64}
    for more in range(6):
        rows = [DecodeRow(slot, length + more, GREEDY) for slot, length in lengths.items()]
        ids, tops = stepper.decode(rows).wait()
        stepper.last_tokens.copy_(given)
        tokens.append(ids)
        peaks += tops
    return tokens, torch.tensor(peaks)


def buffers_of(stepper: Stepper, pieces: list[Piece]) -> PromptBuffers | None:
    return stepper._batch([piece if piece.token_ids else piece._replace(token_ids=(0,)) for piece in pieces], None)[1]


@pytest.mark.parametrize("most", [1, 32, 33, 100, 512, 4096, 4608])
def test_no_step_is_filled_up_by_much(most: int) -> None:
    sizes = row_buckets(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max(most, 32) and len(sizes) <= 25
    for rows in range(1, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < 32 or size - rows < size / 5


def test_room_for_more_changes_nothing(runner: MoERunner) -> None:
    """Neither rows that fill up nor sequences that are not there, nor what an earlier step left in the buffers."""
    plain, (_, peaks) = stepper_of(runner, fill_rows=0), run(stepper_of(runner, fill_rows=0), runner)
    roomy = stepper_of(runner, fill_rows=256)
    assert plain.sizes == [] and roomy.sizes[:3] == [32, 64, 96]
    assert all(buffers_of(roomy, pieces) is not None for pieces in steps(runner))
    tokens, actual = run(roomy, runner)
    assert tokens == run(plain, runner)[0]
    assert relative_error(actual, peaks) < 1e-5


def test_padding_touches_only_the_spare_slot(runner: MoERunner) -> None:
    stepper = stepper_of(runner, fill_rows=64)
    stepper.last_tokens.fill_(7)
    stepper.mixed([Piece(2, 0, token_ids(runner, 33))], [None])
    assert stepper.last_tokens.tolist() == [7] * (SLOTS + 1)
    for kv in stepper.cache.kv.values():
        others = kv.table[[slot for slot in range(SLOTS) if slot != 2]].unique().long()
        assert not kv.keys[others].any() and not kv.values[others].any() and kv.keys[kv.table[2, :2].long()].any()


def test_rows_that_count(runner: MoERunner) -> None:
    stepper = stepper_of(runner, fill_rows=64, count_rows=True)
    pieces = [Piece(2, 0, token_ids(runner, 33)), Piece(0, 0, [5])]
    batch, buffers = stepper._batch(pieces, None)
    assert buffers is not None and batch.step is not None
    assert (batch.step.padded, batch.step.live_G.tolist(), batch.last_rows.tolist()) == (64, [34], [33, 0])


def test_a_line_for_states_is_found_at_its_piece(runner: MoERunner) -> None:
    stepper = stepper_of(runner, fill_rows=256)
    batch, _ = stepper._batch([Piece(4, 0, [1] * 100, line=13), Piece(0, 0, [5])], None)
    lines = batch.rows.prefills().lines.tolist()
    assert lines[0] == 13 and set(lines[1:]) == {-1} and set(batch.rows.lines[: batch.rows.decodes].tolist()) == {-1}


def test_many_prompts_take_a_larger_size_or_none(runner: MoERunner) -> None:
    cache = SequenceCache(runner.config.cache_spec, cache_settings(runner, slots=SLOTS), runner.device)
    by_size = PromptBuffersBySize([64, 512, 2048], cache, runner.device, graphs=False, lines=None)

    def size(*prompts: int) -> int | None:
        buffers = by_size.of([2 * count for count in prompts], prompts)
        return None if buffers is None else buffers.rows

    assert [most_prompts(rows) for rows in (64, 512, 2048)] == [16, 16, 32]
    # What fills up is a prompt too, or eight where a sequence has at most 256 rows.
    assert [size(prompts) for prompts in (0, 1, 15, 16, 24, 25)] == [64, 64, 64, 2048, 2048, None]
    assert size(1, 16) == size(16, 0) == 2048, "the ranks of a group take the same"


def test_fillers_are_no_longer_than_a_sequence(runner: MoERunner) -> None:
    settings = replace(cache_settings(runner, slots=SLOTS), max_seq_len=16)
    cache = SequenceCache(runner.config.cache_spec, settings, runner.device)
    by_size = PromptBuffersBySize([32, 64], cache, runner.device, graphs=False, lines=None)
    buffers = by_size.of([33], [2])
    assert buffers is not None and buffers.rows == 64
    rows = buffers.fill([Piece(0, 0, [1] * 16), Piece(1, 0, [1] * 17)]).rows
    assert int(rows.positions.max()) == 16 and rows.prefills().lengths.tolist() == [16, 17, 16, 15, *[0] * 12]


@pytest.mark.gpu
def test_on_a_gpu(gpu_runner: MoERunner) -> None:
    gpu_runner.engine.call(partial(_check_on_gpu, gpu_runner))


def _check_on_gpu(runner: MoERunner) -> None:
    """Graphs give the bits of launches one by one, at once and again; without room rows differ by rounding alone."""
    _, exact = run(stepper_of(runner, fill_rows=0), runner)
    tokens, peaks = run(stepper_of(runner, fill_rows=256), runner)
    assert relative_error(peaks, exact) < 2e-2
    stepper = stepper_of(runner, fill_rows=256, graphs=True)
    for _ in range(3):  # launches, capture, the graph
        again, same = run(stepper, runner)
        assert again == tokens and torch.equal(same, peaks)
    for pieces in steps(runner):
        buffers = buffers_of(stepper, pieces)
        assert buffers is not None and buffers._graph is not None


@pytest.mark.gpu
def test_rows_of_steps_that_capture_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_loads, "READ_EVERY", 0.0)
    folder = tiny_model("nvidia/Qwen3-30B-A3B-NVFP4", tmp_path / "model")
    settings = {"device": "cuda", "dtype": "bfloat16", "count_experts": True, "prefix_reuse": False}
    with runner_of(folder, **settings) as runner:
        assert runner.expert_loads is not None
        for count in (1, 2, 3):  # the second captures, the third finds its graph
            runner.generate(list(range(40)), SamplingParams(max_new_tokens=3, ignore_eos=True))
            computed = count * (40 + 2) * runner.config.experts_per_token
            assert {sum(rows) for rows in runner.expert_loads.rows().values()} == {computed}
