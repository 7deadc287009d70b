"""Local search for `rebalance`: the copies of one layer's experts on ranks, improved one change at a time.

R: ranks, S: slots of the rank with most, E: experts; H: experts of the rank with most load; C: ranks that may help it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_nvfp4.routing.placement import Slots

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What one more expert to read must be worth, as a share of the goal. At 0 half as many more experts move.
MOVE_PRICE = 0.01
# The ranks with least load that are tried first. The others are, where none of these helps.
HELPERS = 12


class LayerTask(NamedTuple):
    """What is to be placed, and where."""

    loads_E: Floats
    now: Slots  # where the experts are
    room_R: Ints  # slots
    speeds_R: Floats
    base_R: Floats  # load that stays


class Candidates(NamedTuple):
    """For each change: the most load of the ranks that it touches, and how many experts more it makes ranks read."""

    peak: Floats
    reads: Ints


class LayerSearch:
    """An expert's load is split evenly over its copies. An empty slot holds expert E, a slot that is none, E + 1."""

    def __init__(self, task: LayerTask, slots: Slots):
        experts, room_R = len(task.loads_E), task.room_R
        self.empty, self.none = experts, experts + 1
        self.loads_E = np.append(task.loads_E, (0.0, -np.inf))  # what trades with no slot gets an infinite load
        self.speeds_R = task.speeds_R
        self.slots_RS = np.full((len(room_R), int(room_R.max())), self.none)
        for rank, held in enumerate(slots):
            self.slots_RS[rank, : room_R[rank]] = self.empty
            self.slots_RS[rank, : len(held)] = held
        self.held_RE = held_by_rank(slots, experts)
        self.before_RE = held_by_rank(task.now, experts)
        self.before_RE[:, experts:] = True  # nothing to read
        self.new_RS = ~np.take_along_axis(self.before_RE, self.slots_RS, axis=1)
        self.moved = int(self.new_RS.sum())
        self.copies_E = np.maximum(self.held_RE.sum(axis=0), 1)
        self.share_E = self.loads_E / self.copies_E
        self.load_R = task.base_R + self.held_RE[:, :experts] @ self.share_E[:experts]

    @property
    def peak(self) -> float:
        return float((self.load_R / self.speeds_R).max())

    def slots(self) -> Slots:
        return tuple(tuple(int(e) for e in held if e < self.empty) for held in self.slots_RS)

    def improve(self, goal: float, max_moves: float) -> None:
        """Change after change, each of which lightens the rank with most load, until it reaches the goal."""
        for _ in range(4 * self.slots_RS.size):  # every change is progress; this only bounds the time
            times_R = self.load_R / self.speeds_R
            order = np.argsort(times_R, kind="stable")
            heaviest, helpers = int(order[-1]), order[:-1]
            if times_R[heaviest] <= goal:
                return
            few = len(helpers) > HELPERS and self._step(heaviest, helpers[:HELPERS], goal, max_moves)
            if not (few or self._step(heaviest, helpers, goal, max_moves)):
                return

    def refill(self, goal: float, max_moves: float) -> None:
        """Slots that were in use get copies that do no harm, where there are such; best of what the rank had."""
        harmless = max(goal, self.peak)
        had_R, has_R = (held_RE[:, : self.empty].sum(axis=1) for held_RE in (self.before_RE, self.held_RE))
        for rank in np.repeat(np.arange(len(had_R)), np.maximum(had_R - has_R, 0)).tolist():
            absent = np.flatnonzero(~self.held_RE[rank, : self.empty])
            share = self.loads_E[absent] / (self.copies_E[absent] + 1)
            fits = (self.load_R[rank] + share) / self.speeds_R[rank] <= harmless
            fits &= self.before_RE[rank, absent] | (self.moved < max_moves)
            absent, share = absent[fits], share[fits]
            if absent.size and (self.slots_RS[rank] == self.empty).any():
                chosen = np.lexsort((share, ~self.before_RE[rank, absent]))[0]
                self._put(rank, self._slot_of(rank, self.empty), int(absent[chosen]))

    def _step(self, rank: int, helpers_C: Ints, goal: float, max_moves: float) -> bool:
        """The cheapest change that makes no rank as loaded as this one is, if there is one."""
        limit = self.load_R[rank] / self.speeds_R[rank] * (1 - 1e-9)
        held_H = self.slots_RS[rank][self.slots_RS[rank] < self.empty]
        slots_CS = self.slots_RS[helpers_C]
        there_HC = self.held_RE[helpers_C][:, held_H].T
        new_HC1 = ~self.before_RE[helpers_C][:, held_H].T[:, :, None]
        reads_HCS = new_HC1.astype(np.int64) - self.new_RS[helpers_C]
        refuge = self._refuge()
        best, chosen = np.inf, None
        kinds = (
            (self._trade, self._trades(rank, held_H, helpers_C, slots_CS)),
            (self._replicate, self._replicas(rank, held_H, helpers_C, slots_CS, refuge)),
        )
        for kind, (peak_HCS, more_reads) in kinds:
            peak_HCS[there_HC] = np.inf
            reads = reads_HCS + more_reads
            price = np.maximum(peak_HCS, goal) + goal * MOVE_PRICE * reads + 1e-6 * peak_HCS
            price[(peak_HCS >= limit) | (self.moved + reads > max_moves)] = np.inf
            index = int(price.argmin())
            if price.flat[index] < best:
                best, chosen = price.flat[index], (kind, np.unravel_index(index, price.shape))
        if chosen is None:
            return self._drop(rank, held_H, limit)
        change, (which, helper, slot) = chosen
        change(rank, int(held_H[which]), int(helpers_C[helper]), int(slot), refuge)
        return True

    def _trade(self, rank: int, expert: int, helper: int, slot: int, refuge: int | None) -> None:
        self._put(rank, self._slot_of(rank, expert), int(self.slots_RS[helper, slot]))
        self._put(helper, slot, expert)

    def _replicate(self, rank: int, expert: int, helper: int, slot: int, refuge: int | None) -> None:
        replaced = int(self.slots_RS[helper, slot])
        if replaced < self.empty and self.copies_E[replaced] == 1:
            assert refuge is not None
            self._put(refuge, self._slot_of(refuge, self.empty), replaced)
        self._put(helper, slot, expert)

    def _drop(self, rank: int, held_H: Ints, limit: float) -> bool:
        """One copy of `rank` fewer, where the other copies' ranks can take its rows."""
        others_H = self.copies_E[held_H] - 1
        more_H = self.loads_E[held_H] / np.maximum(others_H, 1) - self.share_E[held_H]
        others_RH = self.held_RE[:, held_H].copy()
        others_RH[rank] = False
        peak_H = np.where(others_RH, (self.load_R[:, None] + more_H) / self.speeds_R[:, None], 0.0).max(axis=0)
        peak_H[(others_H == 0) | (self.share_E[held_H] <= 0)] = np.inf
        which = int(peak_H.argmin())
        if peak_H[which] >= limit:
            return False
        self._put(rank, self._slot_of(rank, int(held_H[which])), self.empty)
        return True

    def _slot_of(self, rank: int, expert: int) -> int:
        return int((self.slots_RS[rank] == expert).argmax())

    def _put(self, rank: int, slot: int, expert: int) -> None:
        old = int(self.slots_RS[rank, slot])
        self.slots_RS[rank, slot] = expert
        is_new = not self.before_RE[rank, expert]
        self.moved += int(is_new) - int(self.new_RS[rank, slot])
        self.new_RS[rank, slot] = is_new
        for changed, is_held in ((old, False), (expert, True)):
            if changed < self.empty:
                self.load_R[self.held_RE[:, changed]] -= self.share_E[changed]
                self.held_RE[rank, changed] = is_held
                self.copies_E[changed] = max(int(self.held_RE[:, changed].sum()), 1)
                self.share_E[changed] = self.loads_E[changed] / self.copies_E[changed]
                self.load_R[self.held_RE[:, changed]] += self.share_E[changed]

    def _refuge(self) -> int | None:
        """The rank with least load that has an empty slot."""
        has_room_R = (self.slots_RS == self.empty).any(axis=1)
        return int(np.where(has_room_R, self.load_R / self.speeds_R, np.inf).argmin()) if has_room_R.any() else None

    def _trades(self, rank: int, held_H: Ints, helpers_C: Ints, slots_CS: Ints) -> Candidates:
        """An expert of `rank` against what a helper's slot holds, which may be nothing."""
        delta = self.share_E[held_H][:, None, None] - self.share_E[slots_CS]
        here = (self.load_R[rank] - delta) / self.speeds_R[rank]
        peak = np.maximum(here, (self.load_R[helpers_C, None] + delta) / self.speeds_R[helpers_C, None])
        peak[:, self.held_RE[rank][slots_CS]] = np.inf
        leaves_H = ~self.before_RE[rank][held_H]
        return Candidates(peak, ~self.before_RE[rank][slots_CS] - leaves_H[:, None, None].astype(np.int64))

    def _replicas(self, rank: int, held_H: Ints, helpers_C: Ints, slots_CS: Ints, refuge: int | None) -> Candidates:
        """One copy more of an expert of `rank`, in an empty slot, or in place of an expert.

        That has other copies, or finds refuge on a rank that has room.
        """
        share_H = self.loads_E[held_H] / (self.copies_E[held_H] + 1)
        here_H = (self.load_R[rank] - self.share_E[held_H] + share_H) / self.speeds_R[rank]
        delta = share_H[:, None, None] - self.share_E[slots_CS]
        there = (self.load_R[helpers_C, None] + delta) / self.speeds_R[helpers_C, None]
        elsewhere_E, reads_E = self._without(np.unique(slots_CS), refuge)
        elsewhere_CS = elsewhere_E[slots_CS]
        if refuge is not None:
            elsewhere_CS[(helpers_C == refuge)[:, None] & (slots_CS < self.empty)] = np.inf
        return Candidates(np.maximum(np.maximum(there, here_H[:, None, None]), elsewhere_CS), reads_E[slots_CS])

    def _without(self, experts: Ints, refuge: int | None) -> tuple[Floats, Ints]:
        """Most load of the ranks that take over an expert's rows when one copy goes; and the experts read for it."""
        peaks_E, reads_E = np.full(self.none + 1, np.inf), np.zeros(self.none + 1, dtype=np.int64)
        peaks_E[self.empty] = 0.0
        experts = experts[experts < self.empty]
        several = experts[self.copies_E[experts] > 1]
        more = self.loads_E[several] / (self.copies_E[several] - 1) - self.share_E[several]
        loads = (self.load_R[:, None] + more) / self.speeds_R[:, None]
        peaks_E[several] = np.where(self.held_RE[:, several], loads, 0.0).max(axis=0)
        if refuge is not None:
            sole = experts[self.copies_E[experts] == 1]
            peaks_E[sole] = (self.load_R[refuge] + self.share_E[sole]) / self.speeds_R[refuge]
            reads_E[sole] = ~self.before_RE[refuge, sole]
        return peaks_E, reads_E


def held_by_rank(slots: Slots, experts: int) -> Bools:
    """With columns for the two that stand for no expert."""
    held_RE = np.zeros((len(slots), experts + 2), dtype=bool)
    for rank, held in enumerate(slots):
        held_RE[rank, list(held)] = True
    return held_RE
