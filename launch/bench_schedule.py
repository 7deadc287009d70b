"""The scheduler against a clock that is a model: `moe-nvfp4 bench schedule`. No GPU and no torch.

A decode step takes what one H200 took for Qwen3.6-35B-A3B (benchmarks/results/decode-qwen3.6-35b-h200.json). Prompts
add what engine/cost.py says, all experts are read, and each row takes its time; beside answers there is something more
for each such step (`bench steps`). As in the engine's loop a step is planned before the tokens of the one before it
have arrived.
"""

import heapq
import math
import time
from bisect import bisect
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from typing import Any, Final

from moe_nvfp4.engine.cost import USUAL
from moe_nvfp4.engine.invariants import check
from moe_nvfp4.engine.scheduler import STRETCH, QueueFull, Rows, Scheduler, Step
from moe_nvfp4.engine.scheduler import Sequence as Answer
from moe_nvfp4.launch.schedule_traces import Request, scene

TRACES: Final = ("bursty", "long-tailed", "adversarial")
DECODE_MS: Final = (
    (1, 1.52),
    (2, 1.77),
    (4, 2.25),
    (8, 3.06),
    (16, 4.06),
    (32, 5.81),
    (64, 7.86),
    (128, 11.6),
    (256, 16.6),
)
MIXED_MS: Final = 3.0  # 128 answers take 11.6 ms, with a prompt of 128 tokens 15.7, of 384 19.2, of 896 24.5
DEPTH: Final = 2  # steps in flight
QUANTILES: Final = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)
RESOLUTION: Final = 100  # bins of a distribution for each factor of e: 1 %


class Distribution:
    """Times in milliseconds, in bins of 1 %."""

    def __init__(self) -> None:
        self.bins: Counter[int] = Counter()
        self.max = 0.0

    def add(self, milliseconds: float) -> None:
        self.bins[round(math.log(max(milliseconds, 1e-3)) * RESOLUTION)] += 1
        self.max = max(self.max, milliseconds)

    def quantiles(self, levels: Sequence[float]) -> list[float]:
        if not self.bins:
            return [0.0] * len(levels)
        bins = sorted(self.bins)
        below = list(accumulate(self.bins[b] for b in bins))
        found = [bins[min(bisect(below, level * below[-1]), len(bins) - 1)] for level in levels]
        return [min(self.max, round(math.exp(b / RESOLUTION), 3)) for b in found]

    def figures(self) -> dict[str, Any]:
        p50, p90, p99 = self.quantiles((0.5, 0.9, 0.99))
        curve = [list(point) for point in zip(QUANTILES, self.quantiles(QUANTILES), strict=True)]
        return {"p50": p50, "p90": p90, "p99": p99, "max": round(self.max, 3), "curve": curve}


def step_seconds(step: Step) -> float:
    decodes = [part for part in step.rows if part.continues]
    prompts = [part for part in step.rows if not part.continues]
    milliseconds = _decode_ms(len(decodes)) + USUAL.decode_context * sum(part.start for part in decodes)
    if prompts:
        more = USUAL.untouched(len(decodes)) + sum(USUAL.prompt(part.start, part.count) for part in prompts)
        milliseconds += more + (MIXED_MS if decodes else 0.0)
    return milliseconds / 1e3


def _decode_ms(rows: int) -> float:
    if rows == 0:
        return USUAL.fixed
    place = min(bisect(DECODE_MS, (rows, math.inf)), len(DECODE_MS) - 1)
    (below, low), (above, high) = DECODE_MS[place - 1], DECODE_MS[place]
    return low + (high - low) * (min(rows, above) - below) / (above - below)


@dataclass(slots=True)
class Client:
    """What one request has seen so far."""

    request: Request
    answer: Answer
    tokens: int = 0
    next_row: int = 0
    last_token: float = 0.0
    preemptions: int = 0


@dataclass(slots=True)
class Simulation:
    """One trace. `every`: steps from one check of everything to the next; the cheap checks are made at every step."""

    name: str
    count: int
    every: int = 64
    seed: int = 0
    stretch: float = STRETCH
    now: float = 0.0
    gpu_free: float = 0.0
    steps: int = 0
    host_seconds: float = 0.0
    first_token: Distribution = field(default_factory=Distribution)
    between_tokens: Distribution = field(default_factory=Distribution)
    ended: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)
    clients: dict[int, Client] = field(default_factory=dict)
    leaving: list[tuple[float, int]] = field(default_factory=list)
    flights: deque[tuple[float, Step]] = field(default_factory=deque)

    def run(self) -> dict[str, Any]:
        stage = scene(self.name, self.count, self.seed)
        scheduler = Scheduler(stage.memory, replace(stage.limits, stretch=self.stretch))
        coming = next(stage.requests, None)
        while coming is not None or self.clients or self.flights:
            while coming is not None and coming.arrival <= self.now:
                self._arrive(scheduler, coming)
                coming = next(stage.requests, None)
            self._leave(scheduler)
            began = time.thread_time()
            step = scheduler.plan()
            self.host_seconds += time.thread_time() - began
            if step is not None:
                self._launch(scheduler, step)
            if self.flights and (step is None or len(self.flights) >= DEPTH):
                self._land(scheduler)
            elif step is None:
                assert not self.clients, "requests wait, and nothing happens any more"
                if coming is not None:
                    self.now = max(self.now, coming.arrival)
        check(scheduler)
        assert all(pool.held == 0 for pool in stage.memory.pools), "a page leaked"
        assert sum(self.ended.values()) == self.count, "a request was lost"
        return self._figures()

    def _arrive(self, scheduler: Scheduler, request: Request) -> None:
        answer = Answer(
            request.ident, request.prompt, request.max_new_tokens, 1 << 20, request.priority, request.deadline
        )
        if not scheduler.fits(answer.prompt_length + 1):
            self.ended["too long"] += 1
            return
        try:
            scheduler.add(answer)
        except QueueFull:
            self.ended["refused"] += 1
            return
        self.clients[request.ident] = Client(request, answer)
        if request.cancelled is not None:
            heapq.heappush(self.leaving, (request.cancelled, request.ident))

    def _leave(self, scheduler: Scheduler) -> None:
        for answer in scheduler.late(self.now):
            self._end(scheduler, self.clients[answer.ident], "late")
        while self.leaving and self.leaving[0][0] <= self.now:
            client = self.clients.get(heapq.heappop(self.leaving)[1])
            if client is not None:
                self._end(scheduler, client, "cancelled")

    def _end(self, scheduler: Scheduler, client: Client, how: str) -> None:
        answer = client.answer
        scheduler.finish(answer)
        del self.clients[answer.ident]
        self.ended[how] += 1
        self.totals.update(preemptions=answer.preemptions, reused=answer.reused, prompt=answer.prompt_length)

    def _launch(self, scheduler: Scheduler, step: Step) -> None:
        self.gpu_free = max(self.now, self.gpu_free) + step_seconds(step)
        self.flights.append((self.gpu_free, step))
        self.steps += 1
        self.totals["rows"] += sum(rows.count for rows in step.rows)
        assert len({rows.sequence.slot for rows in step.rows}) == len(step.rows), "two sequences in one slot"
        for rows in step.rows:
            self._follow(self.clients[rows.sequence.ident], rows)
        if self.steps % self.every == 0:
            check(scheduler, [client.answer for client in self.clients.values()])

    def _follow(self, client: Client, rows: Rows) -> None:
        """No token is left out: rows follow those before them, but for a beginning that was reused or given up."""
        if client.preemptions != rows.sequence.preemptions:
            client.preemptions, client.next_row = rows.sequence.preemptions, 0
        assert rows.start == client.next_row or (client.next_row == 0 and rows.start % 64 == 0), "tokens left out"
        client.next_row = rows.start + rows.count

    def _land(self, scheduler: Scheduler) -> None:
        end, step = self.flights.popleft()
        self.now = max(self.now, end)
        for rows in step.rows:
            if not rows.samples:
                continue
            answer = rows.sequence
            scheduler.took(rows, (answer.ident * 7919 + len(answer.tokens)) % 150_001)
            client = self.clients.get(answer.ident)
            if client is None:
                continue  # a token for nobody: the answer was over when the step was planned, and nobody knew
            if client.tokens:
                self.between_tokens.add(1e3 * (self.now - client.last_token))
            else:
                self.first_token.add(1e3 * (self.now - client.request.arrival))
            client.tokens, client.last_token = client.tokens + 1, self.now
            self.totals["tokens"] += 1
            if client.tokens >= client.request.new_tokens or (answer.ends_at(answer.length) and not answer.in_flight):
                assert len(answer.tokens) == answer.prompt_length + client.tokens, "a token was lost, or came twice"
                self._end(scheduler, client, "answered")

    def _figures(self) -> dict[str, Any]:
        totals = self.totals
        return {
            "trace": self.name,
            "requests": self.count,
            "ended": dict(self.ended),
            "seconds": round(self.now, 3),
            "steps": self.steps,
            "rows": totals["rows"],
            "tokens_per_second": round(totals["tokens"] / self.now, 1),
            "preemptions": totals["preemptions"],
            "prompt_tokens": totals["prompt"],
            "reused_tokens": totals["reused"],
            "first_token_ms": self.first_token.figures(),
            "between_tokens_ms": self.between_tokens.figures(),
            "host_microseconds_per_step": round(1e6 * self.host_seconds / self.steps, 1),
        }


def bench_schedule(traces: Sequence[str], count: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """`count` requests in all, in equal parts; each trace twice, the second time with prompts that are not cut for the
    sake of those who answer."""
    results = []
    report(f"{'trace':<12} {'ms':<24}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>11}")
    for index, name in enumerate(traces):
        part = count * (index + 1) // len(traces) - count * index // len(traces)
        results.append(figures := Simulation(name, part).run())
        uncut = figures["uncut"] = Simulation(name, part, stretch=math.inf).run()
        for which, kind in product(("", "uncut"), ("first_token", "between_tokens")):
            times = (uncut if which else figures)[f"{kind}_ms"]
            label = f"{kind.replace('_', ' ')}{which and ', ' + which}"
            line = "".join(f"{times[level]:>10,.1f}" for level in ("p50", "p90", "p99"))
            first = not which and kind == "first_token"
            report(f"{name if first else '':<12} {label:<24}{line}{times['max']:>11,.1f}")
        reuse = 100 * figures["reused_tokens"] / max(1, figures["prompt_tokens"])
        ended = ", ".join(f"{number:,} {how}" for how, number in sorted(figures["ended"].items()))
        report(f"{'':<12} {ended}; {figures['preemptions']:,} preemptions, {reuse:.0f} % of prompts reused,")
        report(
            f"{'':<12} {figures['steps']:,} steps; {figures['tokens_per_second']:,.0f} tok/s, uncut "
            f"{uncut['tokens_per_second']:,.0f};"
        )
        report(f"{'':<12} planning took {figures['host_microseconds_per_step']:.0f} µs a step here")
    return results
