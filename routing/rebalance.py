"""`rebalance`: counted loads of experts to a placement whose ranks are loaded evenly. Pure, on the CPU, deterministic.

The time of a layer is that of its slowest rank, so the largest load counts. The rows of an expert are split evenly
over its copies, by their index. Nodes therefore have no say: rows do not choose a near copy, and ranks that are
balanced make nodes that are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from moe_nvfp4.routing.placement import Placement, Slots
from moe_nvfp4.routing.rebalance_search import Floats, Ints, LayerSearch, LayerTask
from moe_nvfp4.routing.rebalance_start import pack, relabelled

TOLERANCE = 0.02  # at 0.01 it takes twice as long
WORTH = 0.005  # how much better than another a placement must be to read more experts
# Copies are made until shares are at most this part of the goal, from nothing. Fewer copies are fewer reads; with more,
# shares pack better. What is there is kept where it can be, in the end nothing.
LARGEST_SHARES = (0.75, 0.5, 0.0)


def rebalance(
    loads: Mapping[int, ArrayLike],
    present: Placement,
    *,
    everywhere: Iterable[int] = (),
    slots_per_rank: Sequence[int] | None = None,
    speeds: Sequence[float] | None = None,
    max_moves: int | None = None,
    tolerance: float = TOLERANCE,
) -> Placement:
    """`loads[layer]` are the rows that each expert got.

    `everywhere`: experts that stay on all ranks. `slots_per_rank`: room for experts in each layer, 0 for a rank that is
    to have none; default: as many as the rank holds now. `speeds`: rows a second of each rank, in any unit.
    `max_moves`: experts that ranks may read, in each layer, beside those that lose their place. `tolerance`: what is so
    little above the lower bound is good enough.

    What stays on a rank keeps its slot where it can. Slots in use now remain in use, if only by copies
    that do no harm; where any would, they become empty.
    """
    speeds_R = _checked_speeds(speeds, present.num_ranks)
    if max_moves is not None and max_moves < 0:
        raise ValueError(f"rebalance: max_moves is {max_moves}; expected 0 or more")
    if not tolerance >= 0:
        raise ValueError(f"rebalance: tolerance is {tolerance}; expected 0 or more")
    fixed = sorted(set(everywhere))
    others = [expert for expert in range(present.num_experts) if expert not in fixed]
    index = {expert: i for i, expert in enumerate(others)}
    slots: dict[int, Slots] = {}
    for layer, now in present.slots.items():
        loads_E = _checked_loads(loads, layer, present.num_experts)
        room_R = _checked_room(slots_per_rank, now, fixed, len(others))
        common = np.where(room_R > 0, len(fixed), 0)
        base_R = np.where(room_R > 0, loads_E[fixed].sum() / max(1, np.count_nonzero(room_R)), 0.0)
        apart = tuple(tuple(index[e] for e in held if e in index) for held in now)
        task = LayerTask(loads_E[others], apart, room_R - common, speeds_R, base_R)
        found = _balance_layer(task, np.inf if max_moves is None else max_moves, tolerance)
        slots[layer] = tuple(
            _keep_slots([*(others[i] for i in held), *fixed[:count]], old)
            for held, count, old in zip(found, common.tolist(), now, strict=True)
        )
    return Placement(present.num_experts, slots)


def rank_loads(loads_E: ArrayLike, slots: Slots, speeds: Sequence[float] | None = None) -> list[float]:
    """Load of each rank in one layer, divided by its speed."""
    copies: dict[int, int] = {}
    for held in slots:
        for expert in held:
            copies[expert] = copies.get(expert, 0) + 1
    loads = np.asarray(loads_E, dtype=np.float64).tolist()
    speeds = speeds or [1.0] * len(slots)
    return [sum(loads[e] / copies[e] for e in held) / speed for held, speed in zip(slots, speeds, strict=True)]


def lower_bound(loads_E: ArrayLike, slots_per_rank: Sequence[int], speeds: Sequence[float] | None = None) -> float:
    """No placement has a smaller largest load: the mean, and what the largest shares come to with the copies there are.

    With m copies, the slowest of an expert's ranks is at best the m-th fastest. So a largest load T needs a number
    of copies of each expert, and all of them must have slots.
    """
    room_R = np.asarray(slots_per_rank, dtype=np.int64)
    speeds_R = _checked_speeds(speeds, len(room_R))
    return _bound(LayerTask(np.asarray(loads_E, dtype=np.float64), (), room_R, speeds_R, np.zeros(len(room_R))))


def _bound(task: LayerTask) -> float:
    loads_E, used_R = task.loads_E, task.room_R > 0
    room_R, speeds_R, base_R = task.room_R[used_R], task.speeds_R[used_R], task.base_R[used_R]
    bound = float((loads_E.sum() + base_R.sum()) / speeds_R.sum())
    if room_R.sum() == loads_E.size and loads_E.size:  # no slot to spare: the rank with the largest expert is full
        smallest = np.concatenate(((0.0,), np.cumsum(np.sort(loads_E))))
        bound = max(bound, float(((base_R + loads_E.max() + smallest[room_R - 1]) / speeds_R).min()))
    fastest = np.sort(speeds_R)[::-1]
    per_load = np.minimum.accumulate(1 / (np.arange(1, len(fastest) + 1) * fastest))  # of the slowest copy, by copies
    loads = loads_E[loads_E > 0]
    slots = int(room_R.sum()) - (loads_E.size - loads.size)  # an expert without load needs one too

    def enough(peak: float) -> bool:
        copies = 1 + np.searchsorted(-per_load, -peak / loads * (1 + 1e-12))
        return bool((copies <= len(per_load)).all() and copies.sum() <= slots)

    if not loads.size or enough(bound):
        return bound
    low, high = bound, max(bound, float(loads.max() * per_load[0]))
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low


def _balance_layer(task: LayerTask, max_moves: float, tolerance: float) -> Slots:
    """From what is there, by few changes. Where that ends above the goal, also from less and less of it."""
    goal = _bound(task) * (1 + tolerance)
    found: list[LayerSearch] = []
    for start in _starts(task, goal):
        search = LayerSearch(task, start)
        if not found:
            max_moves += search.moved
        if search.moved <= max_moves:
            search.improve(goal, max_moves)
            found.append(search)
            if search.peak <= goal:
                break
    good_enough = max(goal, min(search.peak for search in found) * (1 + WORTH))
    best = min((s for s in found if s.peak <= good_enough), key=lambda s: (s.moved, s.peak))
    best.refill(goal, max_moves)
    return best.slots()


def _starts(task: LayerTask, goal: float) -> Iterator[Slots]:
    fits = all(len(held) <= room for held, room in zip(task.now, task.room_R.tolist(), strict=True))
    yield task.now if fits else pack(task, np.inf, np.inf)
    for part in LARGEST_SHARES:
        yield pack(task, part * goal, goal)
    yield relabelled(task, pack(task, 0.0))


def _keep_slots(held: Sequence[int], old: Sequence[int]) -> tuple[int, ...]:
    """What stays keeps its slot if the rank still has that many; the rest fills the gaps."""
    stay = {expert: slot for slot, expert in enumerate(old) if expert in held and slot < len(held)}
    rest = iter(sorted(set(held) - stay.keys()))
    kept = {slot: expert for expert, slot in stay.items()}
    return tuple(kept[slot] if slot in kept else next(rest) for slot in range(len(held)))


def _checked_loads(loads: Mapping[int, ArrayLike], layer: int, experts: int) -> Floats:
    if layer not in loads:
        raise ValueError(f"rebalance: no loads of layer {layer}; expected them for every layer of the placement")
    loads_E = np.asarray(loads[layer], dtype=np.float64)
    if loads_E.shape != (experts,):
        raise ValueError(f"rebalance: loads of layer {layer} have shape {loads_E.shape}; expected {(experts,)}")
    if not (np.isfinite(loads_E).all() and (loads_E >= 0).all()):
        raise ValueError(f"rebalance: loads of layer {layer} are negative or infinite; expected counts of rows")
    return loads_E


def _checked_speeds(speeds: Sequence[float] | None, ranks: int) -> Floats:
    speeds_R = np.ones(ranks) if speeds is None else np.asarray(speeds, dtype=np.float64)
    if speeds_R.shape != (ranks,) or not (np.isfinite(speeds_R).all() and (speeds_R > 0).all()):
        raise ValueError(f"rebalance: speeds are {speeds!r:.80}; expected a positive number for each of {ranks} ranks")
    return speeds_R


def _checked_room(slots_per_rank: Sequence[int] | None, now: Slots, fixed: Sequence[int], others: int) -> Ints:
    room = [len(held) for held in now] if slots_per_rank is None else list(slots_per_rank)
    if len(room) != len(now) or min(room, default=0) < 0:
        raise ValueError(f"rebalance: slots_per_rank is {room!r:.80}; expected 0 or more for each of {len(now)} ranks")
    if any(0 < slots < len(fixed) for slots in room):
        raise ValueError(f"rebalance: slots_per_rank is {room!r:.80}; {len(fixed)} experts are to be everywhere")
    spare = sum(max(0, slots - len(fixed)) for slots in room)
    if spare < others:
        raise ValueError(f"rebalance: slots_per_rank leaves {spare} slots for {others} experts; give more")
    return np.asarray(room, dtype=np.int64)
