"""`moe-nvfp4 bench decode` and `bench prefill`: a whole model on one device.

Decode steps follow each other as in a long answer, greedy, each timed between two events. Prompts are random tokens,
and so is what a random checkpoint answers: routing is close to uniform.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch

from moe_nvfp4.batch import Piece
from moe_nvfp4.engine.lease import Lease
from moe_nvfp4.engine.step_buffers import DecodeRow
from moe_nvfp4.engine.stepper import WholeStep
from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.step_explanation import STEPS as EXPLAINED_STEPS
from moe_nvfp4.launch.step_explanation import explain
from moe_nvfp4.parallel import Ranks
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import Sampler, SamplingParams

WARM_UP_STEPS: Final = 8
TIMED_STEPS: Final = 48
GREEDY: Final = SamplingParams(max_new_tokens=1, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class DecodeResult:
    batch: int
    context: int
    milliseconds: float  # a step, median
    low: float
    high: float
    bytes: float  # that a step must read and write, at least

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.batch / self.milliseconds

    def line(self, bytes_per_second: float | None) -> str:
        share = ""
        if bytes_per_second:
            floor = 1e3 * self.bytes / bytes_per_second
            share = f"{self.bytes / 1e9:>8.2f} GB{floor:>8.2f} ms floor{floor / self.milliseconds:>6.0%}"
        return (
            f"batch {self.batch:>4}{self.milliseconds:>9.3f} ms ({self.low:.3f} to {self.high:.3f})"
            f"{self.tokens_per_second:>9.0f} tok/s{share}"
        )


class Shares(NamedTuple):
    """Of a batch the sequences of each rank that has some of its own; one rank's, or all ranks' alike, else."""

    counts: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, batch: int, ranks: Ranks) -> "Shares":
        if not ranks.splits_rows:
            return cls((batch,), 0)
        return cls(tuple(batch // ranks.size + (rank < batch % ranks.size) for rank in range(ranks.size)), ranks.rank)

    @property
    def here(self) -> range:
        """This rank's, among those of the batch."""
        first = sum(self.counts[: self.rank])
        return range(first, first + self.counts[self.rank])

    def part(self, first: int, most: int) -> "Shares":
        """At most so many of each rank, from its `first` on."""
        return Shares(tuple(max(0, min(count - first, most)) for count in self.counts), self.rank)

    def whole(self, tokens: int = 1) -> WholeStep | None:
        """A step with so many tokens of each sequence."""
        if len(self.counts) == 1:
            return None
        places = tuple((rank, index) for rank, count in enumerate(self.counts) for index in range(count))
        prompts = self.counts if tokens > 1 else (0,) * len(self.counts)
        return WholeStep(self.counts, tuple(tokens * count for count in self.counts), prompts, places, False)


def bench_decode(
    runner: MoERunner,
    batches: Sequence[int],
    context: int,
    *,
    bytes_per_second: float | None,
    explained: bool,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    results = []
    for batch in batches:
        with prefilled(runner, Shares((batch,), 0), context) as rows:
            times = runner.engine.call(partial(timed_steps, runner, rows))
            moved = runner.step_bytes.by_kind([context + WARM_UP_STEPS + TIMED_STEPS // 2] * batch)
            result = DecodeResult(batch, context, statistics.median(times), min(times), max(times), sum(moved.values()))
            report(result.line(bytes_per_second))
            results.append(asdict(result) | {"tokens_per_second": result.tokens_per_second, "bytes_by_kind": moved})
            if explained:
                rows = after(rows, WARM_UP_STEPS + TIMED_STEPS)
                report(runner.engine.call(partial(explain, runner, rows, moved, bytes_per_second)))
    return results


def bench_prefill(
    runner: MoERunner, prompts: Sequence[int], length: int, report: Callable[[str], None], runs: int = 3
) -> list[dict[str, Any]]:
    """Seconds from the request to the first token of all prompts, for each number of prompts at once."""
    results = []
    for count in prompts:
        times = []
        for run in range(runs + 1):
            ids = [random_ids(runner, length, seed=1000 * run + index) for index in range(count)]
            began = time.perf_counter()
            runner.generate(ids, GREEDY)
            times.append(time.perf_counter() - began)
        median = statistics.median(times[1:])
        rate = count * length / median
        spread = f"({min(times[1:]) * 1e3:.1f} to {max(times[1:]) * 1e3:.1f})"
        report(f"prefill {count:>3} x {length}{median * 1e3:>10.1f} ms {spread}{rate:>10.0f} tok/s")
        results.append({"prompts": count, "length": length, "seconds": times[1:], "tokens_per_second": rate})
    return results


def places(context: int) -> int:
    """That a sequence needs for its prompt and all steps, timed and explained."""
    if context < 1:
        raise RequestError(f"--context: got {context}; expected at least 1")
    return context + WARM_UP_STEPS + TIMED_STEPS + 2 * EXPLAINED_STEPS + 1


@contextmanager
def prefilled(runner: MoERunner, shares: Shares, context: int) -> Iterator[list[DecodeRow]]:
    """The next rows of sequences with a prompt of `context` tokens, and room for all steps. All ranks call it."""
    leases = [Lease.of(runner.engine) for _ in shares.here]
    try:
        yield runner.engine.call(partial(_prefill, runner, leases, shares, context))
    finally:
        for lease in leases:
            lease.give_back()


def _prefill(runner: MoERunner, leases: Sequence[Lease], shares: Shares, context: int) -> list[DecodeRow]:
    together = max(1, runner.step_rows // len(shares.counts) // context)
    for first in range(0, max(shares.counts), together):
        group, seeds = leases[first : first + together], shares.here[first : first + together]
        samplers, part = [Sampler(GREEDY) for _ in group], shares.part(first, together)
        for start in range(0, context, runner.prefill_chunk):
            end = min(start + runner.prefill_chunk, context)
            for lease in group:
                lease.room(start, end)
            ids = [random_ids(runner, context, seed)[start:end] for seed in seeds]
            pieces = [Piece(lease.slot, start, chunk) for lease, chunk in zip(group, ids, strict=True)]
            runner.stepper.mixed(pieces, samplers, whole=part.whole(end - start)).wait()
    for lease in leases:
        lease.room(context, places(context))
    return [DecodeRow(lease.slot, context, GREEDY) for lease in leases]


def after(rows: Sequence[DecodeRow], steps: int) -> list[DecodeRow]:
    return [row._replace(position=row.position + steps) for row in rows]


def timed_steps(runner: MoERunner, rows: Sequence[DecodeRow], whole: WholeStep | None = None) -> list[float]:
    """Milliseconds of each step. The steps of a group keep its ranks together; those before the timed ones bring them
    there."""
    steps = [after(rows, step) for step in range(WARM_UP_STEPS + TIMED_STEPS)]
    if runner.device.type != "cuda":
        times = []
        for step in steps:
            began = time.perf_counter()
            runner.stepper.decode(step, whole=whole).wait()
            times.append(1e3 * (time.perf_counter() - began))
        return times[WARM_UP_STEPS:]
    for step in steps[:WARM_UP_STEPS]:
        runner.stepper.decode(step, whole=whole)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_STEPS + 1)]
    events[0].record()
    for event, step in zip(events[1:], steps[WARM_UP_STEPS:], strict=True):
        runner.stepper.decode(step, whole=whole)
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def random_ids(runner: MoERunner, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    # The last ids of a vocabulary are special, placeholders for images among them.
    ids: list[int] = torch.randint(runner.prompts.vocab_size * 3 // 4, (length,), generator=generator).tolist()
    return ids
