"""`moe-nvfp4 bench serve-offline`: many requests of varied lengths at once, through the engine, as fast as it goes.

All requests are there from the start. Lengths are drawn log-uniformly between their bounds, tokens at random; half
of the requests with `shared` begin with the same tokens, so that reuse of prefixes shows.
"""

import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from moe_nvfp4.errors import RequestError
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Trace:
    requests: int = 1000
    prompt: tuple[int, int] = (128, 4096)  # tokens, shortest and longest
    answer: tuple[int, int] = (16, 512)
    shared: int = 0  # leading tokens that half of the prompts have in common
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        generator = random.Random(self.seed)
        return [(_between(generator, *self.prompt), _between(generator, *self.answer)) for _ in range(self.requests)]

    def check(self) -> None:
        for name, (low, high) in (("prompt", self.prompt), ("answer", self.answer)):
            if not 1 <= low <= high:
                raise RequestError(f"--{name}: got {low},{high}; expected a shortest and a longest length, from 1")
        if self.requests < 1:
            raise RequestError(f"--requests: got {self.requests}; expected at least 1")


def bench_serve_offline(runner: MoERunner, trace: Trace, report: Callable[[str], None]) -> dict[str, Any]:
    prompts, params = _requests(runner, trace)
    arrivals: dict[int, list[float]] = defaultdict(list)
    reused = 0
    began = time.perf_counter()
    for increment in runner.stream(prompts, params):
        arrivals[increment.prompt].append(time.perf_counter() - began)
        if increment.completion is not None:
            reused += increment.completion.timing.reused_tokens
    seconds = time.perf_counter() - began
    gaps = [1e3 * (after - before) for times in arrivals.values() for before, after in pairwise(times)]
    tokens_in, tokens_out = sum(map(len, prompts)), sum(map(len, arrivals.values()))
    between = quantiles(gaps)
    report(
        f"{trace.requests:,} requests, {tokens_in:,} tokens in, {tokens_out:,} out, {seconds:.2f} s\n"
        f"  output            {tokens_out / seconds:>12,.0f} tok/s\n"
        f"  input and output  {(tokens_in + tokens_out) / seconds:>12,.0f} tok/s\n"
        f"  prompt tokens reused {reused / tokens_in:>9.1%}\n"
        f"  ms between tokens: median {between['p50']:.2f}, p90 {between['p90']:.2f}, p99 {between['p99']:.2f}, "
        f"longest {between['max']:.2f}"
    )
    return {
        "trace": asdict(trace),
        "seconds": seconds,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "output_tokens_per_second": tokens_out / seconds,
        "reused_tokens": reused,
        "milliseconds_between_tokens": between,
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Of no values all are 0."""
    ordered = sorted(values) or [0.0]

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"p50": statistics.median(ordered), "p90": at(0.9), "p99": at(0.99), "max": ordered[-1]}


def _requests(runner: MoERunner, trace: Trace) -> tuple[list[list[int]], list[SamplingParams]]:
    generator = random.Random(trace.seed + 1)
    known = runner.prompts.vocab_size * 3 // 4  # the last ids of a vocabulary are special
    head = [generator.randrange(known) for _ in range(trace.shared)]
    prompts, params = [], []
    for index, (length, answer) in enumerate(trace.lengths()):
        ids = [generator.randrange(known) for _ in range(length)]
        prompts.append((head + ids)[:length] if index % 2 else ids)
        params.append(SamplingParams(max_new_tokens=answer, ignore_eos=True))
    return prompts, params


def _between(generator: random.Random, low: int, high: int) -> int:
    return round(math.exp(generator.uniform(math.log(low), math.log(high))))
