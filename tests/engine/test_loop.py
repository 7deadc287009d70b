"""The engine as its callers see it: many at once answer as each alone, whatever else happens."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checks import runner_of, tiny_model

from moe_nvfp4 import AsyncMoERunner
from moe_nvfp4.engine.invariants import check
from moe_nvfp4.engine.orders import Call, Close
from moe_nvfp4.errors import EngineError, QueueFullError, RequestError
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

NAMES = ["nvidia/Qwen3-30B-A3B-NVFP4", "nvidia/Qwen3.6-35B-A3B-NVFP4", "nvidia/Gemma-4-26B-A4B-NVFP4"]
TEN = SamplingParams(max_new_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("loop") / "model")


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(NAMES[1], tmp_path_factory.mktemp("loop") / "model")


def prompts(count: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Of 1 to 200 tokens; the first `shared` of them are the same in all."""
    generator = random.Random(seed)
    head = [generator.randrange(400) for _ in range(shared)]
    return [
        head + [generator.randrange(400) for _ in range(generator.choice((1, 5, 64, 65, 90)))] for _ in range(count)
    ]


def params(count: int, seed: int = 0) -> list[SamplingParams]:
    generator = random.Random(seed)
    return [
        SamplingParams(
            max_new_tokens=generator.randrange(1, 16),
            ignore_eos=True,
            temperature=generator.choice((0.0, 0.9)),
            seed=index,
            priority=generator.randrange(2),
            repetition_penalty=generator.choice((1.0, 1.0, 1.4)),
            frequency_penalty=generator.choice((0.0, 0.0, 0.7)),
            logit_bias=generator.choice(((), ((7, 2.5), (9, -100.0)))),
        )
        for index in range(count)
    ]


def settled(runner: MoERunner) -> None:
    """Nothing is left of any request."""
    runner.engine.call(lambda: None)
    assert runner.engine.free_slots == runner.plan.max_batch_size
    check(runner.engine.scheduler)
    assert all(pool.held == 0 for pool in runner.engine.scheduler.memory.pools)


def squeeze(runner: MoERunner, sequences: float) -> None:
    """Leaves pages for so many sequences of full length, by lending the others out for good."""
    for pool in runner.engine.scheduler.memory.pools:
        for _ in range(pool.count - int(pool.count / runner.plan.full_sequences * sequences)):
            pool.take()


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[..., list[tuple[int, ...]]]:
    """Answers one by one, without reuse."""
    known: dict[Any, tuple[int, ...]] = {}

    def answers(some_prompts: list[list[int]], some_params: list[SamplingParams]) -> list[tuple[int, ...]]:
        with runner_of(folder, max_batch_size=1, max_seq_len=512, prefix_reuse=False) as runner:
            for prompt, one in zip(some_prompts, some_params, strict=True):
                if (tuple(prompt), one) not in known:
                    known[tuple(prompt), one] = runner.generate(prompt, one).token_ids
        return [known[tuple(prompt), one] for prompt, one in zip(some_prompts, some_params, strict=True)]

    return answers


@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_together_as_alone(folder: Path, alone: Any, prefix_reuse: bool) -> None:
    asked, wanted = prompts(10, shared=130), params(10)
    with runner_of(folder, max_batch_size=6, max_seq_len=512, prefix_reuse=prefix_reuse) as runner:
        results = runner.generate(asked, wanted)
        assert [result.token_ids for result in results] == alone(asked, wanted)
        reused = sum(result.timing.reused_tokens for result in results)
        if runner.config.cache_spec.delta is None or not prefix_reuse:  # snapshots begin at 256 tokens
            assert (reused > 0) == prefix_reuse
        settled(runner)


@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_pages_that_run_out_cost_time_and_nothing_else(folder: Path, alone: Any, prefix_reuse: bool) -> None:
    """Sequences give their pages up, and are computed again from all tokens they had."""
    asked = [prompt[-60:] for prompt in prompts(4, seed=1, shared=60)]
    wanted = [SamplingParams(max_new_tokens=70, ignore_eos=True, temperature=t, seed=1) for t in (0.0, 0.8) * 2]
    with runner_of(folder, max_batch_size=6, max_seq_len=512, prefix_reuse=prefix_reuse) as runner:
        runner.engine.call(lambda: squeeze(runner, 1.0))
        preempted = count_preemptions(runner)
        results = runner.generate(asked, wanted)
        assert [result.token_ids for result in results] == alone(asked, wanted)
        assert preempted(), "this test is about preemption"


def count_preemptions(runner: MoERunner) -> Callable[[], int]:
    scheduler, counts = runner.engine.scheduler, [0]
    leave = scheduler._preempt

    def counting(*arguments: Any) -> Any:
        counts[0] += 1
        return leave(*arguments)

    scheduler._preempt = counting  # type: ignore[method-assign]
    return lambda: counts[0]


def test_a_second_turn_computes_only_what_is_new(folder: Path) -> None:
    with runner_of(folder, max_batch_size=2, max_seq_len=900) as runner:
        first = prompts(1, shared=400)[0]
        answer = runner.generate(first, TEN)
        assert runner.engine.stats().counters.mixed_steps == 1, "the step itself keeps states before the last page"
        again = runner.generate(first, TEN)
        assert again.token_ids == answer.token_ids
        assert again.timing.reused_tokens == (len(first) - 1) // 64 * 64
        turn = [*first, *answer.token_ids, 5, 6, 7]
        second = runner.generate(turn, TEN)
        assert second.timing.reused_tokens >= 320
        no_media = ((510, -100.0), (511, -100.0))
        long = runner.generate(first, replace(TEN, max_new_tokens=150, logit_bias=no_media))
        third = runner.generate([*first, *long.token_ids, 5], TEN)
        assert third.timing.reused_tokens >= len(first) + 149 - 64, "the answer is part of what is reused"
        settled(runner)
    with runner_of(folder, max_batch_size=2, max_seq_len=900, prefix_reuse=False) as plain:
        assert plain.generate(turn, TEN).token_ids == second.token_ids
        assert plain.generate(turn, TEN).timing.reused_tokens == 0


def test_many_threads(folder: Path, alone: Any) -> None:
    asked, wanted = prompts(8), params(8)
    expected = alone(asked, wanted)
    with runner_of(folder, max_batch_size=4, max_seq_len=512) as runner:
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(runner.generate, asked, wanted))
        assert [result.token_ids for result in results] == expected
        settled(runner)


def test_cancelled_requests_leave_nothing_and_change_nothing(folder: Path, alone: Any) -> None:
    asked, wanted = prompts(9), params(9)
    expected = alone(asked, wanted)
    generator = random.Random(3)
    with runner_of(folder, max_batch_size=4, max_seq_len=512) as runner:

        def some(index: int) -> tuple[int, ...]:
            tokens: tuple[int, ...] = ()
            limit = generator.choice((0, 1, 3, 1000))
            stream = runner.stream(asked[index], wanted[index])
            for increment in stream:
                tokens += increment.token_ids
                if len(tokens) > limit:
                    break
            stream.close()
            return tokens

        with ThreadPoolExecutor(6) as pool:
            for tokens, whole in zip(pool.map(some, range(9)), expected, strict=True):
                assert tokens == whole[: len(tokens)]
        settled(runner)


def test_a_full_queue_refuses(one_folder: Path) -> None:
    with runner_of(one_folder, max_batch_size=1, max_waiting=1) as runner:
        long = SamplingParams(max_new_tokens=2000, ignore_eos=True)
        streams = [runner.stream([1, 2], long) for _ in range(2)]
        threads = [threading.Thread(target=next, args=(streams[0],))]
        threads[0].start()
        threads[0].join()
        waiting = threading.Thread(target=lambda: next(streams[1], None))
        waiting.start()
        while runner.engine.call(lambda: len(runner.engine.scheduler.waiting)) < 1:
            pass
        with pytest.raises(QueueFullError, match="2 requests are running or waiting"):
            runner.generate([1], TEN)
        streams[0].close()
        waiting.join(timeout=60)
        streams[1].close()
        assert len(runner.generate([1], TEN).token_ids) == 10


def test_a_late_answer_fails_and_frees_its_place(one_folder: Path) -> None:
    with runner_of(one_folder, max_batch_size=1) as runner:
        late = SamplingParams(max_new_tokens=4000, ignore_eos=True, timeout=0.3)
        with pytest.raises(RequestError, match="deadline"):
            runner.generate([1, 2], late)
        settled(runner)
        assert len(runner.generate([1, 2], TEN).token_ids) == 10


def test_one_broken_row_fails_alone(one_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runner_of(one_folder, max_batch_size=2) as runner:
        expected = runner.generate([1, 2], TEN).token_ids
        embed = runner.model.embed
        monkeypatch.setattr(runner.model.embed, "data", embed.index_fill(0, torch.tensor([9]), torch.nan))
        with pytest.raises(FloatingPointError, match="NaN"):
            runner.generate([9, 9], TEN)
        if 9 not in expected:
            assert runner.generate([1, 2], TEN).token_ids == expected
        settled(runner)


def test_a_broken_step_ends_everything_with_its_reason(one_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runner_of(one_folder) as runner:

        def broken(*arguments: object) -> None:
            raise RuntimeError("device lost")

        monkeypatch.setattr(runner.stepper, "decode", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            runner.generate([1, 2], TEN)
        with pytest.raises(EngineError, match=r"the engine stopped: device lost.*Load the model again"):
            runner.generate([1, 2], TEN)
        with pytest.raises(EngineError, match="device lost"):
            runner.logits([1, 2])


def test_closing_ends_what_is_running(one_folder: Path) -> None:
    runner = runner_of(one_folder)
    stream = runner.stream([1, 2], SamplingParams(max_new_tokens=4000, ignore_eos=True))
    next(stream)
    runner.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        runner.generate([1, 2], TEN)
    runner.close()
    assert not runner.engine._thread.is_alive()


def test_a_request_that_comes_while_the_engine_ends_gets_an_error(one_folder: Path) -> None:
    """Its order lies behind the one to close: it must not wait for an answer that nobody gives."""
    runner = runner_of(one_folder)
    (answer,) = runner.answers(runner.prompts.encode([1, 2], TEN))
    arrived: list[Any] = []
    blocked = threading.Event()
    runner.engine._orders.put(Call(None, function=lambda: blocked.wait(timeout=30)))
    runner.engine._orders.put(Close())
    runner.engine.submit(answer, arrived.append)
    blocked.set()
    runner.close()
    assert isinstance(arrived[0], EngineError) and "closed" in str(arrived[0])


def test_priorities_are_served_first(one_folder: Path) -> None:
    with runner_of(one_folder, max_batch_size=1) as runner:
        hold = runner.stream([3, 4], SamplingParams(max_new_tokens=4000, ignore_eos=True))
        next(hold)
        finished: list[int] = []
        done = threading.Event()

        def sink(number: int) -> Callable[[Any], None]:
            def take(item: Any) -> None:
                if item.completion:
                    finished.append(number)
                    if len(finished) == 3:
                        done.set()

            return take

        for number, priority in enumerate((1, 1, 0)):
            one = SamplingParams(max_new_tokens=2, ignore_eos=True, priority=priority)
            (answer,) = runner.answers(runner.prompts.encode([number + 1], one))
            runner.engine.submit(answer, sink(number))
        hold.close()
        assert done.wait(timeout=60)
        assert finished == [2, 0, 1]


@pytest.fixture
def shared_runner(one_folder: Path) -> Iterator[MoERunner]:
    with runner_of(one_folder, max_batch_size=4, max_seq_len=512) as runner:
        yield runner


def test_tasks_of_asyncio(shared_runner: MoERunner) -> None:
    asked, wanted = prompts(8), params(8)
    expected = [shared_runner.generate(prompt, one).token_ids for prompt, one in zip(asked, wanted, strict=True)]

    async def all_at_once() -> list[Any]:
        runner = AsyncMoERunner(shared_runner)
        return await asyncio.gather(*map(runner.generate, asked, wanted))

    assert [result.token_ids for result in asyncio.run(all_at_once())] == expected
    settled(shared_runner)


def test_a_step_wakes_the_event_loop_once(shared_runner: MoERunner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def spared() -> int:
        runner, woken = AsyncMoERunner(shared_runner), 0
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*arguments, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        hundred = SamplingParams(max_new_tokens=100, ignore_eos=True)

        async def one(number: int) -> int:
            return sum([len(increment.token_ids) async for increment in runner.stream([number], hundred)])

        return sum(await asyncio.gather(*map(one, range(4)))) - woken

    assert asyncio.run(spared()) > 200, "of 400 tokens in about 100 steps"


def test_a_cancelled_task_frees_what_it_holds(shared_runner: MoERunner) -> None:
    async def cancelled() -> int:
        runner = AsyncMoERunner(shared_runner)
        long = SamplingParams(max_new_tokens=400, ignore_eos=True)
        task = asyncio.create_task(runner.generate([[1], [2], [3]], long))
        stream = runner.stream([4], long)
        async for _ in stream:
            break
        task.cancel()
        await stream.aclose()
        with pytest.raises(asyncio.CancelledError):
            await task
        return shared_runner.engine.call(lambda: shared_runner.engine.free_slots)

    assert asyncio.run(cancelled()) == 4
    settled(shared_runner)


def test_async_errors_are_raised_where_they_belong(shared_runner: MoERunner) -> None:
    async def bad() -> None:
        runner = AsyncMoERunner(shared_runner)
        with pytest.raises(RequestError, match="empty"):
            await runner.generate([[]])
        with pytest.raises(RequestError, match="empty"):
            runner.stream([[]])

    asyncio.run(bad())
