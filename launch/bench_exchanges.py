"""What the ranks of a group exchange in a decode step, counted as it happens, and how long each exchange takes alone.

Alone no rank waits for another that has more experts to compute: what a step spends on communication beyond these
times is imbalance.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch

from moe_nvfp4.engine.step_buffers import DecodeRow
from moe_nvfp4.engine.stepper import Stepper, WholeStep
from moe_nvfp4.launch.bench_timing import graph_time
from moe_nvfp4.routing.collectives import Collectives
from moe_nvfp4.runner import MoERunner

REPEATS: Final = 20


class Exchange(NamedTuple):
    operation: str  # a method of Collectives
    shape: tuple[int, ...]  # of what a rank gives
    dtype: torch.dtype

    def nbytes(self, size: int) -> int:
        """Of the whole tensor, that is added up, taken apart or put together."""
        given = math.prod(self.shape) * self.dtype.itemsize
        return given * size if self.operation == "all_gather" else given

    def __str__(self) -> str:
        return f"{self.operation} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


class CountedCollectives:
    """`seen`: how often each exchange was launched. What a graph replays is not launched."""

    def __init__(self, collectives: Collectives):
        self._collectives = collectives
        self.seen: Counter[Exchange] = Counter()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._counted("all_reduce", x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._counted("all_gather", x)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self._counted("reduce_scatter", x)

    def _counted(self, operation: str, x: torch.Tensor) -> torch.Tensor:
        self.seen[Exchange(operation, tuple(x.shape), x.dtype)] += 1
        result: torch.Tensor = getattr(self._collectives, operation)(x)
        return result


def exchanges_of_a_step(
    runner: MoERunner, counted: CountedCollectives, rows: Sequence[DecodeRow], whole: WholeStep | None
) -> Counter[Exchange]:
    """All ranks take one step more, launch by launch."""
    stepper = runner.stepper
    eager = Stepper(
        stepper.model,
        stepper.cache,
        stepper.device,
        buckets=stepper.buckets,
        graphs=False,
        verbose=False,
        ranks=stepper.ranks,
    )
    counted.seen.clear()
    eager.decode(rows, whole=whole).wait()
    return counted.seen.copy()


def time_exchanges(
    seen: Counter[Exchange], collectives: Collectives, device: torch.device, *, size: int, layers: int, step: float
) -> list[dict[str, Any]]:
    """All ranks call it, with the same `seen`. `step`: milliseconds of a decode step, for the shares of it."""
    figures = []
    for exchange, count in seen.items():
        x = torch.zeros(exchange.shape, dtype=exchange.dtype, device=device)
        alone = _microseconds(partial(getattr(collectives, exchange.operation), x), device)
        figures.append(
            {
                "exchange": str(exchange),
                "bytes": exchange.nbytes(size),
                "a_step": count,
                "bytes_a_layer": exchange.nbytes(size) * count / layers,
                "bytes_a_step": exchange.nbytes(size) * count,
                "microseconds": alone,
                "share": alone * count / 1e3 / step,
            }
        )
    return figures


def exchange_table(figures: Sequence[dict[str, Any]]) -> str:
    lines = [f"  {'exchange':<38}{'KB':>9}{'a step':>8}{'KB a layer':>12}{'us alone':>10}{'of a step':>11}"]
    for one in figures:
        lines.append(
            f"  {one['exchange']:<38}{one['bytes'] / 1e3:>9.1f}{one['a_step']:>8}{one['bytes_a_layer'] / 1e3:>12.1f}"
            f"{one['microseconds']:>10.1f}{one['share']:>11.1%}"
        )
    megabytes, share = sum(one["bytes_a_step"] for one in figures) / 1e6, sum(one["share"] for one in figures)
    return "\n".join([*lines, f"  all exchanges of a step: {megabytes:.2f} MB, {share:.1%} of its time"])


def _microseconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        return graph_time([call] * REPEATS).median
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)
