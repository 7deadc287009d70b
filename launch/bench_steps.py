"""`moe-nvfp4 bench steps`: steps of prompts beside answers, the time to launch one, and the time it takes in all.

Where launching takes longer than computing, the host bounds how fast prompts are read.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch

from moe_nvfp4.batch import Piece
from moe_nvfp4.engine.lease import Lease
from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.bench_model import GREEDY, random_ids
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import Sampler

CONTEXT: Final = 256  # tokens that each answer has before the step
PROMPT: Final = 512  # most rows of one prompt, which every model takes in one step
RUNS: Final = 5


@dataclass(frozen=True, slots=True)
class StepTimes:
    rows: int
    answers: int  # rows of them that are next tokens
    launch: float  # milliseconds of the host, median
    milliseconds: float  # in all, median
    low: float
    high: float

    def line(self) -> str:
        return (
            f"{self.rows:>6} rows, {self.answers:>4} of answers{self.launch:>9.2f} ms to launch"
            f"{self.milliseconds:>9.2f} ms ({self.low:.2f} to {self.high:.2f})"
            f"{1e3 * self.rows / self.milliseconds:>10,.0f} rows/s"
        )


def sequences(rows: Sequence[int], answers: Sequence[int]) -> int:
    """At once, of all steps."""
    return max(answers) + -(-max(rows) // PROMPT)


def places() -> int:
    """Of a sequence."""
    return max(PROMPT, CONTEXT + 1) + 1


def bench_steps(
    runner: MoERunner, rows: Sequence[int], answers: Sequence[int], report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Each number of rows with each smaller number of answers."""
    if max(rows) > runner.step_rows:
        raise RequestError(f"--rows: got {max(rows)}; a step of this model has at most {runner.step_rows}")
    leases = [Lease.of(runner.engine) for _ in range(sequences(rows, answers))]
    results = []
    try:
        for total in rows:
            for count in (count for count in answers if count < total):
                times = runner.engine.call(partial(_time, runner, leases, total, count))
                report(times.line())
                results.append(asdict(times))
    finally:
        for lease in leases:
            lease.give_back()
    return results


def _time(runner: MoERunner, leases: Sequence[Lease], rows: int, answers: int) -> StepTimes:
    pieces = _pieces(runner, leases, rows, answers)
    launches, wholes = [], []
    for run in range(RUNS + 2):
        samplers = [Sampler(GREEDY) for _ in pieces]
        _wait(runner.device)
        began = time.perf_counter()
        result = runner.stepper.mixed(pieces, samplers)
        launched = time.perf_counter()
        result.wait()
        _wait(runner.device)
        if run >= 2:  # the first ones compile and capture
            launches.append(1e3 * (launched - began))
            wholes.append(1e3 * (time.perf_counter() - began))
    return StepTimes(rows, answers, statistics.median(launches), statistics.median(wholes), min(wholes), max(wholes))


def _pieces(runner: MoERunner, leases: Sequence[Lease], rows: int, answers: int) -> list[Piece]:
    pieces, left = [], rows - answers
    for lease in leases[:answers]:
        lease.room(CONTEXT, CONTEXT + 1)
        pieces.append(Piece(lease.slot, CONTEXT, [1]))
    for lease in leases[answers:]:
        if count := min(left, PROMPT):
            lease.room(0, count)
            pieces.append(Piece(lease.slot, 0, random_ids(runner, count, lease.slot)))
        left -= count
    return pieces


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
