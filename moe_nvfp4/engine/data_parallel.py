"""Many ranks with sequences of their own, scheduled as one. Every rank holds the same schedulers, one for each rank's
slots and pages, and gives them the same orders, so all know every step as a whole without a word about it.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_nvfp4.cache import PAGE
from moe_nvfp4.determinism import Determinism
from moe_nvfp4.engine.cost import USUAL
from moe_nvfp4.engine.prompt_buffers import row_buckets
from moe_nvfp4.engine.scheduler import REST, Limits, QueueFull, Rows, Scheduler, Sequence, Step
from moe_nvfp4.engine.sequence_memory import Memory, PageGroup, SequenceMemory

if TYPE_CHECKING:
    from moe_nvfp4.preparation import Preparation


@dataclass(frozen=True)
class GroupStep(Step):
    """Rows of all ranks; slots, pages and snapshots are those of the row's rank."""

    ranks: tuple[int, ...]  # of each of `rows`


class DataParallelScheduler:
    """What `Scheduler` is to one rank. A sequence stays with the rank that had least to do when it came."""

    def __init__(self, schedulers: Seq[Scheduler], rank: int):
        """`rank`: this process's; a slot that is lent is its own."""
        self.schedulers, self.rank = list(schedulers), rank
        limits = schedulers[0].limits
        size = len(schedulers)
        self._limits = replace(limits, slots=size * limits.slots, step_rows=size * limits.step_rows)
        for scheduler in schedulers:  # the queue is one, wherever its sequences wait
            scheduler.limits = replace(scheduler.limits, max_waiting=self._limits.slots + limits.max_waiting)
        self._rank_of: dict[Sequence, int] = {}
        self._lent: dict[int, list[tuple[int, Memory]]] = {}

    @property
    def limits(self) -> Limits:
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        for scheduler in self.schedulers:
            scheduler.limits = replace(scheduler.limits, chunk=limits.chunk)

    @property
    def memory(self) -> SequenceMemory:
        """This rank's."""
        return self.schedulers[self.rank].memory

    @property
    def waiting(self) -> list[Sequence]:
        return [sequence for scheduler in self.schedulers for sequence in scheduler.waiting]

    @property
    def running(self) -> list[Sequence]:
        return [sequence for scheduler in self.schedulers for sequence in scheduler.running]

    @property
    def free_slots(self) -> int:
        return sum(scheduler.free_slots for scheduler in self.schedulers)

    def add(self, sequence: Sequence) -> None:
        unfinished = len(self._rank_of)
        if unfinished >= self.limits.slots + self.limits.max_waiting:
            raise QueueFull(f"{unfinished} requests run and wait already")
        rank = min(range(len(self.schedulers)), key=self._load)
        self.schedulers[rank].add(sequence)
        self._rank_of[sequence] = rank

    def _load(self, rank: int) -> tuple[int, int]:
        """Sequences, then tokens to compute."""
        scheduler = self.schedulers[rank]
        unfinished = [*scheduler.running, *scheduler.waiting]
        return len(unfinished), sum(sequence.length - sequence.computed for sequence in unfinished)

    def fits(self, length: int) -> bool:
        return self.schedulers[0].fits(length)

    def finish(self, sequence: Sequence) -> None:
        if (rank := self._rank_of.pop(sequence, None)) is not None:
            self.schedulers[rank].finish(sequence)

    def lend(self) -> tuple[int, Memory]:
        """A slot of every rank; each steps by itself in its own, all at the same time."""
        if not all(scheduler.free_slots for scheduler in self.schedulers):
            raise QueueFull("all slots of a rank are in use")
        lent = [scheduler.lend() for scheduler in self.schedulers]
        slot, memory = lent[self.rank]
        self._lent[slot] = lent
        return slot, memory

    def give_back(self, slot: int, memory: Memory) -> None:
        for scheduler, (its_slot, its_memory) in zip(self.schedulers, self._lent.pop(slot), strict=True):
            scheduler.give_back(its_slot, its_memory)

    def late(self, now: float) -> list[Sequence]:
        return [sequence for scheduler in self.schedulers for sequence in scheduler.late(now)]

    def plan(self) -> GroupStep | None:
        rows: list[Rows] = []
        ranks: list[int] = []
        begins = any(scheduler.wants_prompts() for scheduler in self.schedulers)  # those of all ranks share steps
        for rank, scheduler in enumerate(self.schedulers):
            if (step := scheduler.plan(begins)) is not None:
                rows += step.rows
                ranks += [rank] * len(step.rows)
        step = GroupStep(tuple(rows), tuple(ranks))
        if not step.decodes_only:
            for scheduler in self.schedulers:
                scheduler.rested = 0
        return step if rows else None

    def took(self, rows: Rows, token: int) -> None:
        # Of an answer that is over nothing is known any more.
        rank = self._rank_of.get(rows.sequence, self.rank)
        self.schedulers[rank].took(rows, token)


def scheduler_of(prepared: "Preparation") -> Scheduler | DataParallelScheduler:
    """For what was prepared: one scheduler, or one for each rank with sequences of its own."""
    plan, spec, ranks = prepared.plan, prepared.config.cache_spec, prepared.ranks
    groups = [PageGroup(pages, part.window) for pages, part in zip(plan.pages, spec.attention, strict=True)]
    limits = Limits(
        slots=plan.max_batch_size,
        step_rows=prepared.step_rows,
        chunk=prepared.cache_settings.chunk,
        max_waiting=prepared.settings.max_waiting,
        cost=USUAL if prepared.fast else None,
        stretch=prepared.settings.stretch,
        rest=REST if prepared.fast else 0,
        sizes=tuple(row_buckets(prepared.fill_rows)),
        whole_chunks=prepared.determinism is not Determinism.OFF,
    )
    stride = limits.chunk if limits.whole_chunks else None

    def one() -> Scheduler:
        snapshots = plan.snapshots if spec.delta else None
        memory = SequenceMemory(groups, PAGE, snapshots, reuse=prepared.settings.prefix_reuse, stride=stride)
        return Scheduler(memory, limits)

    return DataParallelScheduler([one() for _ in range(ranks.size)], ranks.rank) if ranks.splits_rows else one()
