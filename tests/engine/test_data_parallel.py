"""One scheduler of schedulers: each rank's device holds what it ought to, and all ranks plan the same steps."""

import random
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_model import END, Device
from scheduler_traces import COST

from moe_nvfp4.engine.data_parallel import DataParallelScheduler, GroupStep
from moe_nvfp4.engine.invariants import check
from moe_nvfp4.engine.scheduler import Limits, QueueFull, Scheduler, Sequence, Step
from moe_nvfp4.engine.sequence_memory import PageGroup, SequenceMemory

PAGE = 4
RESTS = replace(COST, least_prompt_rows=10)  # fewer rows of prompts wait for each other


def group(
    size: int, rank: int = 0, *, pages: int = 24, snapshots: int | None = None, **limits: object
) -> DataParallelScheduler:
    chosen = Limits(**{"slots": 3, "step_rows": 24, "chunk": 8, "max_waiting": 64} | limits)  # type: ignore[arg-type]
    schedulers = [Scheduler(SequenceMemory([PageGroup(pages)], PAGE, snapshots), chosen) for _ in range(size)]
    return DataParallelScheduler(schedulers, rank)


def sequence(ident: int, prompt: int | list[int] = 5, new: int = 4) -> Sequence:
    return Sequence(ident, prompt if isinstance(prompt, list) else [1 + ident] * prompt, new, 10_000)


def described(step: GroupStep | None) -> list[tuple[int, int, int, int, int, bool]]:
    if step is None:
        return []
    return [
        (rank, rows.sequence.ident, rows.sequence.slot, rows.start, rows.count, rows.samples)
        for rank, rows in zip(step.ranks, step.rows, strict=True)
    ]


class Group:
    """The loops of all ranks: each has the whole scheduler, and a device of its own."""

    def __init__(self, size: int, depth: int, **settings: Any):
        self.ranks = [group(size, rank, **settings) for rank in range(size)]
        self.devices = [Device(scheduler) for scheduler in self.ranks[0].schedulers]
        for device in self.devices[1:]:
            device.prefixes = self.devices[0].prefixes
        self.depth, self.flights = depth, deque[tuple[list[GroupStep], list[int | None]]]()
        self.answers: dict[int, list[int]] = {}

    def add(self, ident: int, prompt: list[int], new: int) -> None:
        self.answers[ident] = []
        for rank in self.ranks:
            rank.add(sequence(ident, list(prompt), new))

    def turn(self) -> bool:
        steps = [rank.plan() for rank in self.ranks]
        assert all(described(step) == described(steps[0]) for step in steps), "ranks disagree"
        for rank in self.ranks:
            for scheduler in rank.schedulers:
                check(scheduler)
        if steps[0] is not None:
            self.flights.append(([step for step in steps if step is not None], self.run(steps[0])))
        if self.flights and (steps[0] is None or len(self.flights) >= self.depth):
            self.land()
            return True
        return steps[0] is not None

    def run(self, step: GroupStep) -> list[int | None]:
        tokens: list[int | None] = []
        for rank, device in enumerate(self.devices):
            own = tuple(rows for rows, owner in zip(step.rows, step.ranks, strict=True) if owner == rank)
            if own and step.decodes_only:
                tokens += device.run(Step(own))
            elif own:
                tokens += device.run(OneOfMixed(own))
        return tokens

    def land(self) -> None:
        steps, tokens = self.flights.popleft()
        for rank, step in zip(self.ranks, steps, strict=True):
            for rows, token in zip(step.rows, tokens, strict=True):
                if token is None:
                    continue
                rank.took(rows, token)
                if rows.sequence.done:
                    continue
                answer = self.answers[rows.sequence.ident]
                if rank is self.ranks[0]:
                    answer.append(token)
                if token == END or len(answer) >= rows.sequence.max_new_tokens:
                    rank.finish(rows.sequence)


class OneOfMixed(Step):
    """A rank's part of a step in which another rank has a prompt."""

    @property
    def decodes_only(self) -> bool:
        return False


def test_prompts_of_all_ranks_share_steps() -> None:
    ranks = group(2, rest=2, cost=RESTS, slots=8)

    def step() -> list[tuple[int, int]]:
        planned = ranks.plan()
        assert planned is not None
        for rows in planned.rows:
            if rows.samples:
                ranks.took(rows, 1)
        return [(rank, rows.sequence.ident) for rank, rows in zip(planned.ranks, planned.rows, strict=True)
                if not rows.decodes]  # fmt: skip

    for ident in (0, 1):
        ranks.add(sequence(ident, 3, 90))
    assert step() == [(0, 0), (1, 1)]
    ranks.add(sequence(2, 3, 90))
    assert step() == []
    ranks.add(sequence(3, 3, 90))
    assert step() == []
    assert step() == [(0, 2), (1, 3)]
    ranks.add(sequence(4, 12, 90))
    assert step() == [(0, 4)], "it fills a step"
    ranks.add(sequence(5, 3, 90))
    assert step() == [(0, 4), (1, 5)], "beside its second piece"
    ranks.add(sequence(6, 3, 90))
    assert [step() for _ in range(3)] == [[], [], [(0, 6)]], "a step with a prompt was one of all ranks"


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(8, 40), st.sampled_from([None, 3]), st.integers(0, 3),
    st.integers(0, 2**32),
)  # fmt: skip
def test_random_traces(size: int, depth: int, pages: int, snapshots: int | None, rest: int, seed: int) -> None:
    rng, ranks = random.Random(seed), Group(size, depth, pages=pages, snapshots=snapshots, rest=rest, cost=RESTS)
    prompts = {}
    for ident in range(20):
        start = [rng.randrange(3)] * rng.choice([0, 4, 9])
        prompts[ident] = start + [rng.randrange(1, 97) for _ in range(rng.randint(1, 12))], rng.randint(1, 9)
        ranks.add(ident, *prompts[ident])
        for _ in range(rng.randrange(3)):
            ranks.turn()
    for _ in range(5000):
        if not ranks.turn():
            break
    assert not ranks.ranks[0].running and not ranks.ranks[0].waiting
    for ident, (prompt, new) in prompts.items():
        assert ranks.answers[ident] == ranks.devices[0].prefixes.answer(prompt, new, 10_000)


def test_a_sequence_goes_where_least_is_to_do() -> None:
    scheduler = group(3)
    sequences = [sequence(i, length) for i, length in enumerate((9, 2, 5, 1, 1, 1))]
    for one in sequences:
        scheduler.add(one)
    assert [[s.ident for s in one.waiting] for one in scheduler.schedulers] == [[0, 5], [1, 3], [2, 4]]
    scheduler.finish(sequences[0])
    scheduler.finish(sequences[5])
    scheduler.add(sequence(6))
    assert [s.ident for s in scheduler.schedulers[0].waiting] == [6]


def test_the_queue_is_one() -> None:
    scheduler = group(2, slots=2, max_waiting=3)
    assert scheduler.limits.slots == 4 and scheduler.free_slots == 4
    for ident in range(7):
        scheduler.add(sequence(ident))
    with pytest.raises(QueueFull, match="7 requests run and wait"):
        scheduler.add(sequence(7))


def test_a_lent_slot_is_lent_at_every_rank() -> None:
    first, second = group(2, 0), group(2, 1)
    for scheduler in (first, second):
        slot, memory = scheduler.lend()
        assert scheduler.free_slots == 4
        assert scheduler.memory.grow(memory, 0, 5) and scheduler.memory is scheduler.schedulers[scheduler.rank].memory
        scheduler.give_back(slot, memory)
        assert scheduler.free_slots == 6


def test_the_chunk_can_be_changed() -> None:
    scheduler = group(2)
    scheduler.limits = replace(scheduler.limits, chunk=3)
    scheduler.add(sequence(0, 7))
    step = scheduler.plan()
    assert step is not None and [rows.count for rows in step.rows] == [3] and scheduler.limits.slots == 6
