"""What an engine says of itself, after each thing that can happen to a request."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_checks import runner_of, tiny_model

from moe_nvfp4.errors import QueueFullError, RequestError
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("nvidia/Qwen3-30B-A3B-NVFP4", tmp_path_factory.mktemp("stats") / "model")


@pytest.fixture
def runner(folder: Path) -> Iterator[MoERunner]:
    with runner_of(folder, max_batch_size=2, max_seq_len=512, max_waiting=0) as runner:
        yield runner


def params(count: int, **more: float) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **more)  # type: ignore[arg-type]


def test_of_answers(runner: MoERunner) -> None:
    idle = runner.engine.stats()
    assert (idle.running, idle.waiting, idle.slots, idle.free_slots) == (0, 0, 2, 2)
    assert idle.free_pages == idle.pages and idle.counters.last_token is None
    prompt, before = list(range(100)), time.monotonic()
    for _ in range(2):
        runner.generate(prompt, params(5))
    runner.engine.call(lambda: None)
    counters = runner.engine.stats().counters
    assert (counters.requests, counters.answered, counters.failed, counters.cancelled) == (2, 2, 0, 0)
    assert (counters.prompt_tokens, counters.generated_tokens, counters.reused_tokens) == (200, 10, 64)
    assert (counters.mixed_steps, counters.decode_steps) == (2, 8)
    assert (counters.prompt_rows, counters.decode_rows) == (136, 8)
    assert counters.last_token is not None and before < counters.last_token < time.monotonic()
    assert 0 < counters.busy_seconds <= time.monotonic() - before + 0.1
    assert 0 < counters.decode_seconds < counters.busy_seconds
    assert counters.decode_bytes == pytest.approx(2 * sum(runner.step_bytes.total([100 + n]) for n in range(1, 5)))
    assert idle.counters.requests == 0, "a look is a copy"


def test_of_one_that_runs_is_cancelled_fails_or_is_refused(runner: MoERunner) -> None:
    streams = [runner.stream([1, 2], params(400)) for _ in range(2)]
    for stream in streams:
        next(stream)
    running = runner.engine.stats()
    assert (running.running, running.free_slots) == (2, 0) and running.free_pages < running.pages
    with pytest.raises(QueueFullError):
        runner.generate([1], params(1))
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    runner.engine.call(lambda: None)
    with pytest.raises(RequestError):
        runner.generate([1], params(400, timeout=0.01))
    counters = runner.engine.stats().counters
    assert (counters.refused, counters.cancelled, counters.failed, counters.answered) == (1, 2, 1, 0)
    assert runner.engine.stats().free_slots == 2


def test_of_preemption(folder: Path) -> None:
    with runner_of(folder, max_batch_size=2, max_seq_len=512, prefix_reuse=False) as runner:
        (pool,) = runner.engine.scheduler.memory.pools
        runner.engine.call(lambda: [pool.take() for _ in range(pool.count - 3)])
        runner.generate([[1] * 60, [2] * 60], params(70))
        runner.engine.call(lambda: None)
        counters = runner.engine.stats().counters
        assert counters.preemptions >= 1 and counters.prompt_tokens == 120
        assert counters.prompt_rows > 120, "tokens that are computed again"
