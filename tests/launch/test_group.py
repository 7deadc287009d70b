"""Ranks in actors of a real cluster answer as one rank does, whatever happens to them."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs the extra ray")

from model_checks import runner_of, tiny_model  # noqa: E402

import moe_nvfp4  # noqa: E402
from moe_nvfp4 import AsyncMoERunner, SamplingParams  # noqa: E402
from moe_nvfp4.errors import CheckpointError, EngineError, MemoryPlanError, RequestError  # noqa: E402
from moe_nvfp4.generation import Generation  # noqa: E402
from moe_nvfp4.launch import group_engine  # noqa: E402
from moe_nvfp4.launch.group import GroupRunner  # noqa: E402
from moe_nvfp4.launch.group_workers import GroupSettings, WorkerFailed  # noqa: E402
from moe_nvfp4.synthesize import synthesize  # noqa: E402

DEMO = Path(moe_nvfp4.__file__).parent / "demo"
SIZES: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 512, "verbose": False}
TEN = SamplingParams(max_new_tokens=10, ignore_eos=True)
PROMPTS = [[1, 2, 3], list(range(70)), [9], [5, 6], list(range(40, 110)), [8]]
PARAMS = [
    SamplingParams(max_new_tokens=60, ignore_eos=True),
    SamplingParams(max_new_tokens=50, ignore_eos=True, temperature=0.9, seed=5, n=2),
    SamplingParams(max_new_tokens=60, ignore_eos=True, temperature=0.7, seed=6, logprobs=2),
    SamplingParams(max_new_tokens=60, ignore_eos=True, frequency_penalty=0.6, presence_penalty=0.3),
    SamplingParams(max_new_tokens=60, ignore_eos=True, logit_bias={7: 2.0}, priority=1),
    SamplingParams(max_new_tokens=60, temperature=1.0, seed=8),
]


def open_group(model: Path, size: int, **settings: Any) -> GroupRunner:
    ranks = GroupSettings(gpus=size, device="cpu", **{"hang_seconds": 8.0, "placement_seconds": 120.0, **settings})
    return GroupRunner(model, ranks, **SIZES, spare_experts=1, count_experts=True)


def told(results: list[Generation]) -> list[Any]:
    """All that a client sees, but times."""
    return [
        [(one.text, one.token_ids, one.finish_reason, rounded(one.logprobs)) for one in result.completions]
        for result in results
    ]


def rounded(logprobs: Any) -> Any:
    """Sums over ranks are rounded otherwise than on one."""
    return logprobs and [(p.token_id, round(p.logprob, 3), [token for token, _ in p.top]) for p in logprobs]


@pytest.mark.parametrize(
    ("name", "attention", "size"),
    [
        ("nvidia/Qwen3-30B-A3B-NVFP4", "replicated", 4),
        ("nvidia/Gemma-4-26B-A4B-NVFP4", "tensor", 2),
    ],
)
def test_ranks_answer_as_one(cluster: Any, tmp_path: Path, name: str, attention: Any, size: int) -> None:
    model = tiny_model(name, tmp_path / "model")
    with runner_of(model, **SIZES) as alone:
        expected = told(alone.generate(PROMPTS, PARAMS))
    with open_group(model, size, attention=attention) as group:
        assert told(group.generate(PROMPTS, PARAMS)) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("group") / "model"
    synthesize("nvidia/Qwen3.6-35B-A3B-NVFP4", out, tiny=True, seed=2, tokenizer=DEMO, vocab_size=1024)
    return out


@pytest.fixture(scope="module")
def group(cluster: Any, model: Path) -> Iterator[GroupRunner]:
    """Data-parallel attention, in which every rank has answers of its own to lose."""
    with open_group(model, 2, attention="data") as group:
        yield group


@pytest.fixture(scope="module")
def params(model: Path) -> list[SamplingParams]:
    """One stops at a string that its answer has in the middle, and one follows a pattern."""
    pytest.importorskip("xgrammar", reason="needs the extra grammar")
    with runner_of(model, **SIZES) as alone:
        text = alone.generate(PROMPTS[4], PARAMS[4]).text
    middle = text[len(text) // 2 :][:3]
    return [*PARAMS[:4], replace(PARAMS[4], stop=(middle,)), replace(PARAMS[5], regex="[a-f ]{90}")]


@pytest.fixture(scope="module")
def expected(model: Path, params: list[SamplingParams]) -> list[Any]:
    with runner_of(model, **SIZES) as alone:
        return told(alone.generate(PROMPTS, params))


def kill(group: GroupRunner, rank: int) -> None:
    os.kill(group.engine.workers.where[rank].pid, signal.SIGKILL)


def freeze(group: GroupRunner, rank: int) -> None:
    os.kill(group.engine.workers.where[rank].pid, signal.SIGSTOP)


def break_step(group: GroupRunner, rank: int) -> None:
    def break_it(worker: Any) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("expert 7 is on fire")

        worker.runner.stepper.decode = broken

    ray.get(group.engine.workers.actors[rank].__ray_call__.remote(break_it))


@pytest.mark.parametrize(
    ("fault", "rank", "named"), [(kill, 1, "died"), (break_step, 0, "expert 7 is on fire"), (freeze, 1, "hangs")]
)
def test_answers_go_on_when_a_rank_fails(
    group: GroupRunner,
    params: list[SamplingParams],
    expected: list[Any],
    fault: Callable[[GroupRunner, int], None],
    rank: int,
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    group.engine._verbose = True
    recoveries = len(group.engine.recoveries)
    done: dict[tuple[int, int], Any] = {}
    streamed: dict[tuple[int, int], list[Any]] = {}
    for count, increment in enumerate(group.stream(PROMPTS, params)):
        key = increment.prompt, increment.choice
        streamed.setdefault(key, []).append(increment)
        if increment.completion is not None:
            done[key] = increment.completion
        if count == 40:
            fault(group, rank)
    results = [
        Generation((), tuple(done[index, choice] for choice in range(one.n))) for index, one in enumerate(params)
    ]
    assert told(results) == expected
    for key, increments in streamed.items():
        assert "".join(one.text for one in increments) == done[key].text
        assert tuple(token for one in increments for token in one.token_ids) == done[key].token_ids
    assert len(group.engine.recoveries) == recoveries + 1
    assert f"rank {rank} of 2" in (said := capsys.readouterr().err) and named in said


def test_experts_move_while_answers_come(group: GroupRunner, params: list[SamplingParams], expected: list[Any]) -> None:
    moved = []
    done: dict[tuple[int, int], Any] = {}
    for count, increment in enumerate(group.stream(PROMPTS, params)):
        if increment.completion is not None:
            done[increment.prompt, increment.choice] = increment.completion
        if count in (40, 200):
            moved.append(group.rebalance())
    assert told([Generation((), tuple(done[i, c] for c in range(one.n))) for i, one in enumerate(params)]) == expected
    assert moved[0].layers and moved[0].reads and moved[0].rows
    assert 1 <= moved[0].after < moved[0].before


def test_clients_that_leave_are_late_or_ask_nonsense(group: GroupRunner) -> None:
    long = SamplingParams(max_new_tokens=400, ignore_eos=True)
    stream = group.stream([1, 2], long)
    next(stream)
    stream.close()
    with pytest.raises(RequestError, match="deadline"):
        group.generate([1, 2], SamplingParams(max_new_tokens=400, ignore_eos=True, timeout=0.2))
    with pytest.raises(RequestError, match="expected ids"):
        group.generate([1 << 30], TEN)

    async def tasks() -> list[Any]:
        runner = AsyncMoERunner(group)
        return await asyncio.gather(*(runner.generate(prompt, TEN) for prompt in PROMPTS))

    together = [result.token_ids for result in asyncio.run(tasks())]
    assert together == [group.generate(prompt, TEN).token_ids for prompt in PROMPTS]

    def unfinished(worker: Any) -> int:
        return worker.runner.engine.call(lambda: len(worker.runner.engine._open)) + len(worker._answers)

    assert ray.get(group.engine.workers.leader.__ray_call__.remote(unfinished)) == 0
    assert not group.engine._open
    deadline = time.monotonic() + 30
    while not (stats := group.engine.stats()).counters.cancelled or stats.running or stats.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert stats.counters.answered >= 2 * len(PROMPTS) and stats.slots == group.engine.slots


def test_a_bad_checkpoint_is_an_error_at_once(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        open_group(tmp_path / "nowhere", 1)


def test_a_cluster_without_room_says_so(cluster: Any, model: Path) -> None:
    with pytest.raises(EngineError, match=r"no room in this Ray cluster for 9 ranks"):
        open_group(model, 9, placement_seconds=0.5)


def test_what_fails_again_and_again_is_given_up(cluster: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_engine, "FAILURES_AT_MOST", 2)
    monkeypatch.setattr(group_engine, "FAILURES_OF_A_REQUEST", 1)
    with open_group(model, 1) as group:
        long = SamplingParams(max_new_tokens=400, ignore_eos=True)
        stream = group.stream([1, 2], long)
        next(stream)
        kill(group, 0)
        with pytest.raises(EngineError, match=r"failed 1 times while it computed this; the last: rank 0 of 1 .*died"):
            list(stream)
        assert len(group.generate([1, 2], TEN).token_ids) == 10  # what others ask goes on
        stream = group.stream([1, 2], long)
        next(stream)
        kill(group, 0)
        with pytest.raises(EngineError, match=r"2 failures within 300 s; the last: rank 0 of 1"):
            list(stream)
        with pytest.raises(EngineError, match="the group stopped: 2 failures"):
            group.generate([1, 2], TEN)


@pytest.mark.parametrize("error", [WorkerFailed("the GPU is still taken"), MemoryPlanError("no room beside it")])
def test_starts_that_fail_are_no_fault_of_requests(
    cluster: Any, model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(group_engine, "FAILURES_OF_A_REQUEST", 2)
    monkeypatch.setattr(group_engine, "RELEASE_SECONDS", 0.1)
    long = SamplingParams(max_new_tokens=60, ignore_eos=True)
    with open_group(model, 1) as group:
        expected, start = group.generate([1, 2], long).token_ids, group.engine._start
        failures = [error, error]

        def start_at_last(*arguments: Any, **settings: Any) -> Any:
            if failures:
                raise failures.pop()
            return start(*arguments, **settings)

        monkeypatch.setattr(group.engine, "_start", start_at_last)
        tokens: list[int] = []
        for count, increment in enumerate(group.stream([1, 2], long)):
            tokens += increment.token_ids
            if count == 5:
                kill(group, 0)
        assert tuple(tokens) == expected and not failures


def test_a_lost_node_leaves_the_others(cluster: Any, model: Path) -> None:
    """Two ranks on two nodes; with one node gone there is room for one rank, and its answers go on there."""
    psutil = pytest.importorskip("psutil")
    long = SamplingParams(max_new_tokens=80, ignore_eos=True, temperature=0.9, seed=5)
    with runner_of(model, **SIZES) as alone:
        expected = alone.generate(PROMPTS[1], long).token_ids
    node = cluster.add_node()
    deadline = time.monotonic() + 60
    while len([one for one in ray.nodes() if one["Alive"]]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with open_group(model, 2, strategy="STRICT_SPREAD") as group:
        first, second = group.engine.workers.where
        assert first.node != second.node
        tokens: list[int] = []
        for increment in group.stream(PROMPTS[1], long):
            tokens += increment.token_ids
            if len(tokens) == 20:
                for process in psutil.Process(node.pid).children(recursive=True):
                    process.kill()
        assert tuple(tokens) == expected
        assert group.engine.workers.size == 1
