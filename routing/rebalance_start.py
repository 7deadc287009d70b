"""Where the search of `rebalance` begins: an assignment made from nothing, and one that keeps much of what is there."""

import heapq

import numpy as np

from moe_nvfp4.routing.placement import Slots
from moe_nvfp4.routing.rebalance_search import LayerTask, held_by_rank

FAR = 1e300  # no load is as large; full ranks are beyond it


def pack(task: LayerTask, largest: float, goal: float | None = None) -> Slots:
    """Copies until no share is above `largest` or slots are full; then one after the other, the largest share first.

    Each goes to a rank that holds it now and that it does not load beyond `goal`, else, or without a goal, to the rank
    that is then least loaded. A copy for which no rank has room is left out.
    """
    loads_E, room_R, speeds_R = task.loads_E, task.room_R, task.speeds_R
    away_RE = np.where(held_by_rank(task.now, len(loads_E)), 0.0, np.inf)
    heap = [(-load, expert, 1) for expert, load in enumerate(loads_E.tolist())]
    heapq.heapify(heap)
    for _ in range(int(room_R.sum()) - len(loads_E)):
        share, expert, copies = heap[0]
        if -share <= largest or copies == len(room_R):
            break
        heapq.heapreplace(heap, (share * copies / (copies + 1), expert, copies + 1))
    load_R, free_R = task.base_R.copy(), room_R.copy()
    slots: list[list[int]] = [[] for _ in room_R]
    closed = np.where(free_R > 0, 0.0, np.inf)
    for negative, expert, copies in sorted(heap):
        held = np.zeros(len(room_R))
        for _ in range(copies):
            after_R = (load_R - negative) / speeds_R + closed + held
            rank = int(after_R.argmin())
            if goal is not None:
                home = int((after_R + away_RE[:, expert]).argmin())
                rank = home if after_R[home] + away_RE[home, expert] <= min(goal, FAR) else rank
            if free_R[rank] == 0 or held[rank]:
                break
            load_R[rank] -= negative
            held[rank] = np.inf
            free_R[rank] -= 1
            if free_R[rank] == 0:
                closed[rank] = np.inf
            slots[rank].append(expert)
    return tuple(map(tuple, slots))


def relabelled(task: LayerTask, slots: Slots) -> Slots:
    """The same sets of experts on ranks of the same kind, so that much of what a rank holds remains."""
    kinds = list(zip(task.room_R.tolist(), task.speeds_R.tolist(), task.base_R.tolist(), strict=True))
    homes: dict[int, list[int]] = {}
    for rank, held in enumerate(task.now):
        for expert in held:
            homes.setdefault(expert, []).append(rank)
    common: dict[tuple[int, int], int] = {}
    for source, held in enumerate(slots):
        for expert in held:
            for rank in homes.get(expert, ()):
                if kinds[rank] == kinds[source]:
                    common[source, rank] = common.get((source, rank), 0) + 1
    rank_of: dict[int, int] = {}  # by source
    for source, rank in sorted(common, key=lambda pair: (-common[pair], pair)):
        if source not in rank_of and rank not in rank_of.values():
            rank_of[source] = rank
    free = sorted(set(range(len(slots))) - set(rank_of.values()))
    for source in range(len(slots)):
        if source not in rank_of:
            rank_of[source] = next(rank for rank in free if kinds[rank] == kinds[source])
            free.remove(rank_of[source])
    found: list[tuple[int, ...]] = [()] * len(slots)
    for source, rank in rank_of.items():
        found[rank] = slots[source]
    return tuple(found)
