"""Which tokens of which sequences the next step computes. Pure Python: no torch, no clock, no threads.

Sequences join and leave at every step. A step has a budget of rows: the next token of every sequence that has begun
to answer is certain of its row, and chunks of prompts share the others, in the order of priority and arrival, as long
as those who answer need not wait too long for them. When pages run out, the sequence that is last in that order gives
its pages back and waits; its tokens are computed again later. So no step fails, and no sequence is lost. A step may be
planned before the tokens of the one before it are known.

Who comes first in the order is never held up by those after him: pages are granted in the order, and nobody overtakes
the first one that waits, even if he waits for room for a long prompt while a short one would fit. That costs some
throughput and keeps the promise that everybody is served. A higher priority is served first and gives way last; it
does not push out those who run already, and an endless stream of it starves what is below it.
"""

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from moe_nvfp4.engine import chunks
from moe_nvfp4.engine.chunks import SNAPSHOT_PAGES
from moe_nvfp4.engine.cost import PromptBudget, StepCost
from moe_nvfp4.engine.sequence_memory import Memory, SequenceMemory, TableChange

# How much longer a step of answers may take for the prompts beside it. With 2.25 the 99th percentile between tokens is
# 3.4 times the median on the adversarial trace of `bench schedule`, and 5.6 uncut.
STRETCH: Final = 2.25
# Steps after one with prompts in which none begins beside answers, so that those that come meanwhile share one. On an
# H200 48 chats a second, more than it can serve, get 10,966 tok/s so, and 10,489 with prompts in every step.
REST: Final = 4


def _order(sequence: "Sequence") -> tuple[int, int]:
    return sequence.order


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    slots: int  # sequences at once
    step_rows: int  # rows of a step, see `most_rows`
    chunk: int  # rows of one prompt in a step
    max_waiting: int
    cost: StepCost | None = None  # by which prompts beside answers are cut; None: not at all
    stretch: float = STRETCH
    rest: int = 0  # steps after one with prompts in which none begins, unless enough wait to fill one
    sizes: tuple[int, ...] = ()  # rows up to which a step is filled up; none: it takes as many as it has
    whole_chunks: bool = False  # pieces depend on their sequence alone: see chunks.py

    @property
    def most_rows(self) -> int:
        """Of a step: at least one for each slot, and beside them a chunk that may not be cut."""
        return max(self.step_rows, self.slots + (self.chunk if self.whole_chunks else 0))


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making. `tokens` are the prompt and what has been sampled since, as far as it is known."""

    ident: int
    tokens: list[int]
    max_new_tokens: int
    max_length: int  # lowered when it is added, if there are too few pages for it
    priority: int = 0  # smaller is sooner
    deadline: float | None = None
    prompt_length: int = field(init=False)
    slot: int = -1  # -1: waiting, or done
    memory: Memory | None = None
    keys: list[bytes] = field(default_factory=list)  # of its pages, as far as they are known
    computed: int = 0  # tokens whose keys and values are, or are about to be, in the cache
    shared: int = 0  # leading tokens that others had too; worth a snapshot
    in_flight: int = 0  # sampled tokens that the host has not seen
    reused: int = 0  # tokens of the prompt that were not computed
    preemptions: int = 0
    done: bool = False
    stepwise: bool = False  # its next token can be chosen only when the host has seen the last one
    answering: bool = False  # it has got a token in the slot it has now, and each of its rows is the next token

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def length(self) -> int:
        """With the tokens that are on their way."""
        return len(self.tokens) + self.in_flight

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.ident

    def ends_at(self, length: int) -> bool:
        """Whether no further token may follow so many."""
        return length - self.prompt_length >= self.max_new_tokens or length >= self.max_length


@dataclass(slots=True, eq=False)  # to build a frozen one takes three times as long, and there is one for each token
class Rows:
    """Tokens `start` to `start + count` of a sequence. `samples`: the last of them gives a new token."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    continues: bool = False  # one token, the one that this slot has given last
    recomputes: bool = False  # one token of an answer, known, that is to be a decode row as it was the first time
    restore: int | None = None  # copy the states of this snapshot to the slot first
    snapshot: int | None = None  # copy the slot's states to this line afterwards
    inner_snapshot: int | None = None  # the step itself leaves the states before the last page of its rows in this line
    changes: tuple[TableChange, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether it is a token of an answer, mostly the one that its slot has given last."""
        return self.continues or self.recomputes


@dataclass(frozen=True)
class Step:
    rows: tuple[Rows, ...]  # in the order of priority and arrival

    @cached_property
    def decodes_only(self) -> bool:
        return all(rows.decodes for rows in self.rows)


class QueueFull(Exception):
    """As many requests run and wait as may, or all slots are taken."""


class Scheduler:
    def __init__(self, memory: SequenceMemory, limits: Limits):
        self.memory, self.limits = memory, limits
        self.waiting: list[Sequence] = []  # in order
        self.running: list[Sequence] = []  # in order
        self._free_slots = list(range(limits.slots))[::-1]
        self.rested = limits.rest  # steps since the last one with prompts, of this rank or of another
        self._lent: dict[int, Memory] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; those that are done go when they are on top

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def add(self, sequence: Sequence) -> None:
        """Its length must fit. An answer that would outgrow all pages ends by length before."""
        if len(self.waiting) + len(self.running) >= self.limits.slots + self.limits.max_waiting:
            raise QueueFull(f"{len(self.running)} requests run and {len(self.waiting)} wait already")
        assert self.fits(sequence.prompt_length + 1), "such a sequence would wait for ever"
        longest = self.memory.longest(self.limits.chunk)
        if longest is not None:
            sequence.max_length = min(sequence.max_length, longest)
        insort(self.waiting, sequence, key=_order)
        if sequence.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.deadline, sequence.ident, sequence))

    def fits(self, length: int) -> bool:
        """Whether a sequence of this length can run at all, alone."""
        longest = self.memory.longest(self.limits.chunk)
        return longest is None or length <= longest

    def finish(self, sequence: Sequence) -> None:
        """The answer is complete, cancelled or late: its slot and pages are free from the next step on."""
        if sequence.done:
            return
        sequence.done = True
        if sequence.slot >= 0:
            self._leave(sequence)
            return
        place = bisect_left(self.waiting, sequence.order, key=_order)
        if place < len(self.waiting) and self.waiting[place] is sequence:
            del self.waiting[place]

    def lend(self) -> tuple[int, Memory]:
        """A slot for somebody who steps by himself, between steps; its memory grows through `self.memory.grow`."""
        if not self._free_slots:
            raise QueueFull(f"all {self.limits.slots} slots are in use")
        slot = self._free_slots.pop()
        self._lent[slot] = memory = self.memory.empty()
        return slot, memory

    def give_back(self, slot: int, memory: Memory) -> None:
        assert self._lent.pop(slot, None) is memory, f"slot {slot} was not lent with this memory"
        self.memory.end(memory)
        self._free_slots.append(slot)

    def late(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed, until they are finished."""
        heap = self._deadlines
        while heap and heap[0][2].done:
            heapq.heappop(heap)
        if not heap or heap[0][0] > now:
            return []
        return [sequence for deadline, _, sequence in sorted(heap) if deadline <= now and not sequence.done]

    def plan(self, begins: bool | None = None) -> Step | None:
        """The next step, or None when there is nothing to compute now. What it gives is to be launched. `begins`:
        whether prompts may begin, if others have a say in it."""
        planned: list[Rows] = []
        limits, ready, answers, context = self.limits, [], 0, 0
        for sequence in self.running:
            length, computed = sequence.length, sequence.computed
            if length == computed or sequence.ends_at(length):
                continue
            if one_row := length - computed == 1 or chunks.is_recomputed(sequence, computed, limits):
                answers += 1
                context += computed
            if not (sequence.stepwise and sequence.in_flight):  # it waits for its last token to arrive
                ready.append((sequence, one_row))
        # Those that hold a slot and do not answer yet leave at least one row to prompts.
        budget = PromptBudget(limits.most_rows - answers, limits.cost, limits.sizes, answers)
        budget.beside(answers, context, limits.stretch)
        begins = self.wants_prompts() if begins is None else begins
        for sequence, one_row in ready:
            if sequence.slot < 0:  # it has given its place up to one before it
                continue
            if one_row:
                if self._grow(sequence, 1):
                    planned.append(self._next_row(sequence) if sequence.answering else self._rows(sequence, 1))
            elif (count := chunks.next_rows(sequence, budget, limits, self.memory)) and self._grow(sequence, count):
                planned.append(rows := self._rows(sequence, count))
                budget.spend(rows.start, rows.count)
        while begins and (first := self._admit(budget)) is not None:
            restore = self._begin(first)
            count = chunks.first_rows(first, budget, limits, self.memory)
            if not self._grow(first, count):
                raise AssertionError("it was admitted because there is room")
            rows = self._rows(first, count, restore)
            planned.append(rows)
            budget.spend(rows.start, rows.count)
        self.memory.publish()
        step = Step(tuple(planned))
        self.rested = self.rested + 1 if step.decodes_only else 0
        for rows in planned:
            if rows.samples:
                rows.sequence.in_flight += 1
                rows.sequence.answering = True
        return step if planned else None

    def wants_prompts(self) -> bool:
        """Whether the next step is one for prompts: one is under way, or some wait and nobody answers, the last ones
        were long ago, or they fill a step."""
        if not all(sequence.answering for sequence in self.running):
            return True
        if self.waiting and (not self.running or self.rested >= self.limits.rest):
            return True
        waiting, cost = self.waiting[: len(self._free_slots)], self.limits.cost
        enough = 0 if cost is None else cost.least_prompt_rows
        return bool(waiting) and sum(sequence.length for sequence in waiting) >= enough

    def took(self, rows: Rows, token: int) -> None:
        """The token that a row gave has arrived. Of an answer that is over, and of one that gave its pages up and
        will compute the token's place again, it is kept all the same."""
        sequence = rows.sequence
        assert rows.samples and sequence.in_flight > 0, f"sequence {sequence.ident} expects no token"
        sequence.in_flight -= 1
        sequence.tokens.append(token)
        # A page is complete, or the states that an answer left at its end are there.
        if sequence.memory is not None and len(sequence.tokens) % self.memory.page <= 1:
            self.memory.offer(sequence.memory, sequence.tokens, chunks.findable(sequence, self.limits))

    def _next_row(self, sequence: Sequence) -> Rows:
        """Of an answer: the token that its slot has given last."""
        memory, start, line = sequence.memory, sequence.computed, None
        assert memory is not None
        sequence.computed = end = start + 1
        if not end % self.memory.page:
            self.memory.offer(memory, sequence.tokens, chunks.findable(sequence, self.limits))
            if end >= SNAPSHOT_PAGES * self.memory.page and not self.limits.whole_chunks:
                line = self.memory.snapshot_answer(memory, end)
        changes = tuple(memory.take_changes()) if memory.changes else ()
        return Rows(sequence, start, 1, True, True, snapshot=line, changes=changes)

    def _rows(self, sequence: Sequence, count: int, restore: int | None = None) -> Rows:
        memory, limits = sequence.memory, self.limits
        assert memory is not None
        start, sequence.computed = sequence.computed, sequence.computed + count
        snapshot, end, page = None, sequence.computed, self.memory.page
        place = chunks.inner_snapshot(sequence, start, end, limits, page)
        inner = self.memory.snapshot(memory, sequence.tokens, place) if place else None
        if chunks.wants_snapshot(sequence, end, limits, page):
            passing = end not in chunks.stops(sequence, limits, page)
            snapshot = self.memory.snapshot(memory, sequence.tokens, end, passing=passing)
        self.memory.offer(memory, sequence.tokens, chunks.findable(sequence, limits))
        changes, recomputes = tuple(memory.take_changes()), chunks.is_recomputed(sequence, start, limits)
        samples = end == sequence.length
        return Rows(sequence, start, count, samples, False, recomputes, restore, snapshot, inner, changes)

    def _begin(self, sequence: Sequence) -> int | None:
        """Looked up as late as possible: what came before in this very step may be reused."""
        searchable = chunks.searchable(sequence, self.limits)
        memory, reused, restore, matched = self.memory.begin(sequence.tokens, sequence.keys, searchable)
        sequence.memory, sequence.computed, sequence.shared = memory, reused, matched
        if not sequence.preemptions:
            sequence.reused = reused
        return restore

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Makes room for the next rows of a sequence, at the cost of those after it, none of which is planned yet.
        False: it is the last one, and lost its own place."""
        if count == 1 and sequence.computed % self.memory.page:
            return True  # on a page that it has
        while sequence.slot >= 0:
            assert sequence.memory is not None
            if self.memory.grow(sequence.memory, sequence.computed, sequence.computed + count):
                return True
            self._preempt(self.running[-1])
        return False

    def _admit(self, budget: PromptBudget) -> Sequence | None:
        """The first waiting sequence, if the step has room for it, and there are a slot and, beside what runs, pages
        for its tokens."""
        if not self.waiting or not self._free_slots:
            return None
        first, limits = self.waiting[0], self.limits
        if first.in_flight or not chunks.may_begin(first, budget, limits):
            return None
        searchable = chunks.searchable(first, limits)
        if not self.memory.has_room(first.tokens, first.keys, limits.chunk, self._reserved(), searchable):
            return None
        if self.memory.better_soon(first.tokens, first.keys, searchable):
            return None
        del self.waiting[0]
        first.slot = self._free_slots.pop()
        insort(self.running, first, key=_order)
        return first

    def _reserved(self) -> list[int]:
        """Pages that prompts which run already have still to take."""
        reserved = [0] * len(self.memory.pools)
        for sequence in self.running:
            memory = sequence.memory
            if sequence.answering or memory is None:
                continue
            needed = self.memory.pages_for(sequence.length + 1, self.limits.chunk)
            for group, table in enumerate(memory.tables):
                reserved[group] += max(0, needed[group] - len(table) + memory.dropped[group])
        return reserved

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.preemptions += 1
        insort(self.waiting, sequence, key=_order)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.memory is not None
        del self.running[bisect_left(self.running, sequence.order, key=_order)]
        self.memory.end(sequence.memory)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.memory, sequence.computed, sequence.answering = -1, None, 0, False
