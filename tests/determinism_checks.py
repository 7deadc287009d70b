"""What determinism mode promises, on tiny checkpoints: a request alone and among others, compared to the last bit."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model_checks import runner_of

from moe_nvfp4.engine.cost import StepCost
from moe_nvfp4.generation import Completion
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

SETTINGS = {"deterministic": True, "max_seq_len": 1024}
# Of a machine on which prompts beside answers have hardly any time.
SLOW_PROMPTS = StepCost(
    fixed=1,
    experts=1,
    left_out=0.5,
    decode_row=0.1,
    prompt_row=1,
    decode_context=0,
    prompt_context=0,
    least_prompt_rows=1,
)


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    params: SamplingParams


Answered = tuple[tuple[int, ...], tuple[tuple[float, tuple[tuple[int, float], ...]], ...]]


def requests(count: int, seed: int = 0, *, lengths: Sequence[int], new: Sequence[int]) -> list[Request]:
    """Greedy and drawn ones with penalties and biases, some with a beginning in common, each with log-probabilities."""
    rng = random.Random(seed)
    head = [rng.randrange(400) for _ in range(max(lengths))]
    made = []
    for index in range(count):
        length = lengths[index % len(lengths)]
        shared = rng.choice((0, length, length * 4 // 5))
        prompt = head[:shared] + [rng.randrange(400) for _ in range(length - shared)]
        params = SamplingParams(
            max_new_tokens=rng.choice(new),
            ignore_eos=True,
            temperature=rng.choice((0.0, 0.0, 0.9)),
            top_p=rng.choice((1.0, 0.9)),
            seed=index,
            logprobs=rng.choice((0, 3)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.3)),
            logit_bias=rng.choice(((), ((7, 2.5),))),
            priority=rng.randrange(2),
        )
        made.append(Request(tuple(prompt), params))
    return made


def answered(completion: Completion) -> Answered:
    assert completion.logprobs is not None
    return completion.token_ids, tuple((one.logprob, one.top) for one in completion.logprobs)


def ask(runner: MoERunner, asked: Sequence[Request]) -> list[Answered]:
    results = runner.generate([list(one.prompt) for one in asked], [one.params for one in asked])
    return [answered(result.completions[0]) for result in results]


def ask_in_threads(runner: MoERunner, asked: Sequence[Request]) -> list[Answered]:
    """In an order of arrival that nobody knows."""
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: ask(runner, [one]), asked))
    return [answer for (answer,) in found]


def require_same(found: Sequence[Answered], expected: Sequence[Answered], what: str) -> None:
    """Tokens and every float; says where the first difference is."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        for place, (a, b) in enumerate(zip(zip(*one, strict=True), zip(*other, strict=True), strict=True)):
            assert a == b, f"{what}: request {index}, token {place}: {a} instead of {b}"


def alone(folder: Path, asked: Sequence[Request], **settings: Any) -> list[Answered]:
    """Each in a fresh state of a runner that never runs two at once and reuses nothing."""
    with runner_of(folder, **{**SETTINGS, "max_batch_size": 1, "prefix_reuse": False, **settings}) as runner:
        return [ask(runner, [one])[0] for one in asked]


def check_among_others(folder: Path, expected: list[Answered], asked: list[Request], **settings: Any) -> None:
    """All at once; in the other order, with hardly any time for prompts; from threads, with hardly any room."""
    with runner_of(folder, **{**SETTINGS, "max_batch_size": 6, **settings}) as runner:
        scheduler = runner.engine.scheduler
        usual = scheduler.limits
        require_same(ask(runner, asked), expected, "together")
        scheduler.limits = replace(usual, cost=SLOW_PROMPTS, stretch=1.0)
        require_same(ask(runner, asked[::-1])[::-1], expected, "in the other order")
        scheduler.limits = replace(usual, step_rows=1)
        require_same(ask_in_threads(runner, asked), expected, "from threads")


def check_without_pages(folder: Path, expected: list[Answered], asked: list[Request], **settings: Any) -> None:
    """So few pages that answers give theirs up and are computed again."""
    with runner_of(folder, **{**SETTINGS, "max_batch_size": 6, **settings}) as runner:
        preempted = runner.engine.call(lambda: squeeze(runner, asked))
        require_same(ask(runner, asked), expected, "with few pages")
        assert preempted() > 0, "this check is about preemption"


def squeeze(runner: MoERunner, asked: Sequence[Request]) -> Callable[[], int]:
    """Leaves pages for the longest request and one page more; gives how often somebody gave pages up."""
    scheduler = runner.engine.scheduler
    longest = max(len(one.prompt) + one.params.max_new_tokens for one in asked)
    needed = scheduler.memory.pages_for(longest, scheduler.limits.chunk)
    for pool, least in zip(scheduler.memory.pools, needed, strict=True):
        while pool.available > least + 1:
            pool.take()
    leave, count, lock = scheduler._preempt, [0], threading.Lock()

    def counting(*arguments: Any) -> Any:
        with lock:
            count[0] += 1
        return leave(*arguments)

    scheduler._preempt = counting  # type: ignore[method-assign]
    return lambda: count[0]
