"""`moe-nvfp4 bench balance`: how evenly `rebalance` loads ranks on skewed and changing loads. Simulated; needs no GPU.

The balance is the mean over the largest load of a rank, each summed over the layers: the part of the ranks' time that
is work. Loads are drawn: a token takes `top` different experts, so none has more than 1 / top of the rows.
"""

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_nvfp4.routing.placement import Placement, Slots
from moe_nvfp4.routing.rebalance import lower_bound, rank_loads, rebalance
from moe_nvfp4.routing.rebalance_moves import plan_moves

Loads = NDArray[np.float64]  # [layers, experts]


class Model(NamedTuple):
    layers: int
    experts: int
    top: int


MODELS: Final = {
    "qwen3-235b": Model(94, 128, 8),
    "qwen3.5-397b": Model(60, 512, 10),
    "qwen3.6-35b": Model(40, 256, 8),
}
TRACES: Final = ("uniform", "zipf 0.4", "zipf 0.8", "zipf 1.2", "drifting", "domains")
WINDOWS: Final = 3
TOKENS: Final = 50_000  # in a window


def popularity(experts: int, exponent: float, top: int) -> NDArray[np.float64]:
    """Shares of the rows, the most popular expert first."""
    shares: NDArray[np.float64] = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    shares /= shares.sum()
    while shares.max() > (1 + 1e-9) / top:
        full = shares >= (1 - 1e-9) / top
        shares[full] = 1 / top
        shares[~full] *= (1 - full.sum() / top) / shares[~full].sum()
    return shares


def zipf_loads(layers: int, experts: int, exponent: float, *, top: int = 8, seed: int = 0) -> Loads:
    return next(windows(f"zipf {exponent}", Model(layers, experts, top), seed))


def windows(trace: str, model: Model, seed: int = 0) -> Iterator[Loads]:
    """Counted rows, window after window. Each layer has its own popular experts.

    drifting: zipf 0.8, and a fifth of the experts exchange their popularity after each window. domains: four, each
    zipf 0.8 with its own popular experts; one after the other makes 70 % of the tokens.
    """
    random = np.random.default_rng(seed)
    kind, _, exponent = trace.partition(" ")
    shares = popularity(model.experts, float(exponent or {"uniform": 0.0}.get(kind, 0.8)), model.top)
    domains = 4 if kind == "domains" else 1
    shares_DLE = np.array([[random.permutation(shares) for _ in range(model.layers)] for _ in range(domains)])
    window = 0
    while True:
        mix = np.full(domains, 0.1)
        mix[window % domains] = 1 - 0.1 * (domains - 1)
        shares_LE = np.einsum("d,dle->le", mix, shares_DLE)
        rows = TOKENS * model.top
        yield np.array([random.multinomial(rows, line / line.sum()) for line in shares_LE], dtype=np.float64)
        if kind == "drifting":
            for line in shares_DLE[0]:
                changed = random.choice(model.experts, model.experts // 5, replace=False)
                line[changed] = line[random.permutation(changed)]
        window += 1


def plain_greedy(loads_E: Loads, slots: int, ranks: int) -> Slots:
    """All slots filled with copies of what has the largest share, then the largest share first to the rank with least
    load that has room, even if it has a copy already."""
    heap = [(-float(load), expert, 1) for expert, load in enumerate(loads_E)]
    heapq.heapify(heap)
    for _ in range(slots * ranks - len(heap)):
        share, expert, copies = heap[0]
        heapq.heapreplace(heap, (share * copies / (copies + 1), expert, copies + 1))
    open_ranks = [(0.0, rank) for rank in range(ranks)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    for share, expert, copies in sorted(heap):
        for _ in range(copies):
            load, rank = heapq.heappop(open_ranks)
            held[rank].append(expert)
            if len(held[rank]) < slots:
                heapq.heappush(open_ranks, (load - share, rank))
    return tuple(map(tuple, held))


@dataclass
class Peaks:
    """Largest loads, summed over the layers of all windows."""

    mean: float = 0.0
    even: float = 0.0
    last: float = 0.0
    greedy: float = 0.0
    after: float = 0.0
    best: float = 0.0

    def balances(self) -> dict[str, float]:
        names = ("even", "last", "greedy", "after", "best")
        return {name: round(self.mean / getattr(self, name), 4) for name in names}


def run_trace(trace: str, model: Model, ranks: int, spare: int, seed: int = 0) -> dict[str, Any]:
    """`last` is the placement that the window before was balanced for, so what is to be expected while serving."""
    even = Placement.even(range(model.layers), model.experts, ranks)
    room = [-(-model.experts // ranks) + spare] * ranks
    first, later = Peaks(), Peaks()
    placement, reads, greedy_reads, seconds = even, [], [], []
    greedy = dict(even.slots)
    for window, loads_LE in zip(range(WINDOWS), windows(trace, model, seed), strict=False):
        start = time.perf_counter()
        found = rebalance(dict(enumerate(loads_LE)), placement, slots_per_rank=room)
        seconds.append(time.perf_counter() - start)
        reads.append(sum(len(moves.reads) for moves in plan_moves(placement, found)))
        peaks = later if window else first
        before, greedy = (
            greedy,
            {layer: plain_greedy(loads_E, room[0], ranks) for layer, loads_E in enumerate(loads_LE)},
        )
        greedy_reads.append(sum(_reads(before[layer], greedy[layer]) for layer in greedy))
        for layer, loads_E in enumerate(loads_LE):
            peaks.mean += float(loads_E.sum()) / ranks
            peaks.even += max(rank_loads(loads_E, even.slots[layer]))
            peaks.last += max(rank_loads(loads_E, placement.slots[layer]))
            peaks.after += max(rank_loads(loads_E, found.slots[layer]))
            peaks.greedy += max(rank_loads(loads_E, greedy[layer]))
            peaks.best += lower_bound(loads_E, room)
        placement = found
    return {
        "trace": trace,
        "ranks": ranks,
        "slots_per_rank": room[0],
        "first_window": first.balances(),
        "later_windows": later.balances(),
        "reads_per_layer": [round(count / model.layers, 1) for count in reads],
        "greedy_reads_per_layer": [round(count / model.layers, 1) for count in greedy_reads],
        "seconds": [round(one, 2) for one in seconds],
    }


def _reads(old: Slots, new: Slots) -> int:
    return sum(len(set(held) - set(had)) for held, had in zip(new, old, strict=True))


def bench_balance(
    name: str, ranks: Sequence[int], spares: Sequence[int], traces: Sequence[str], report: Callable[[str], None]
) -> list[dict[str, Any]]:
    model = MODELS[name]
    report(f"{name}: {model.layers} layers of {model.experts} experts, top {model.top}; balance = mean / largest load")
    report("greedy: plain copies and largest first. best: the lower bound. last: placed for the window before")
    report("reads: experts that ranks read for a layer, at first and later, then those of greedy later")
    results = []
    for count in ranks:
        for spare in spares:
            report(
                f"\n{f'{count} ranks, {-(-model.experts // count)} + {spare} slots':<26}{'even':>7}{'greedy':>8}"
                f"{'after':>7}{'best':>7}{'last':>7}{'reads':>22}{'seconds':>9}"
            )
            for trace in traces:
                figures = run_trace(trace, model, count, spare)
                results.append({"model": name, **figures})
                now, later = figures["first_window"], figures["later_windows"]
                line = f"{now['even']:>7.3f}{now['greedy']:>8.3f}{now['after']:>7.3f}{now['best']:>7.3f}"
                ours, greedy = figures["reads_per_layer"], figures["greedy_reads_per_layer"]
                moved = f"{ours[0]:.1f} {np.mean(ours[1:]):.1f} {np.mean(greedy[1:]):.1f}"
                report(f"{trace:<26}{line}{later['last']:>7.3f}{moved:>22}{max(figures['seconds']):>9.2f}")
    return results
