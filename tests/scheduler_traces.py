"""Schedulers of small sizes, and random traces through them."""

import random
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from scheduler_model import Server

from moe_nvfp4.engine.cost import StepCost
from moe_nvfp4.engine.invariants import check
from moe_nvfp4.engine.scheduler import Limits, Scheduler, Sequence
from moe_nvfp4.engine.sequence_memory import PageGroup, SequenceMemory

PAGE = 4
# A step of one answer takes 2, one more row 1 more: so small that the cut is felt in traces as small.
COST = StepCost(
    fixed=1,
    experts=0,
    left_out=0.5,
    decode_row=1,
    prompt_row=1,
    decode_context=0,
    prompt_context=0.01,
    least_prompt_rows=1,
)
GROUPS = {
    "full": lambda pages: [PageGroup(pages)],
    "window": lambda pages: [PageGroup(pages), PageGroup(max(pages // 2, 10), 9)],
    "states": lambda pages: [PageGroup(pages)],
}


def scheduler(
    kind: str = "full", *, pages: int = 24, snapshots: int = 4, reuse: bool = True, **limits: Any
) -> Scheduler:
    chosen = Limits(**{"slots": 4, "step_rows": 24, "chunk": 16, "max_waiting": 64} | limits)
    stride = chosen.chunk if chosen.whole_chunks else None
    lines = snapshots if kind == "states" else None
    return Scheduler(SequenceMemory(GROUPS[kind](pages), PAGE, lines, reuse=reuse, stride=stride), chosen)


def sequence(ident: int, prompt: int | list[int], new: int = 4, **options: object) -> Sequence:
    tokens = prompt if isinstance(prompt, list) else [1 + ident] * prompt
    return Sequence(ident, list(tokens), new, 10_000, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Trace:
    kind: str
    pages: int
    snapshots: int
    reuse: bool
    depth: int
    limits: dict[str, Any]
    seed: int


def traces(fewest_pages: int, **limits: st.SearchStrategy[Any]) -> st.SearchStrategy[Trace]:
    """Random ones, of all kinds; `limits` beside those that all of them have."""
    usual = {"slots": st.integers(1, 6), "step_rows": st.integers(1, 40), "cost": st.sampled_from([None, COST])}
    return st.builds(
        Trace,
        kind=st.sampled_from(sorted(GROUPS)),
        pages=st.integers(fewest_pages, 60),
        snapshots=st.integers(0, 6),
        reuse=st.booleans() | st.just(True),
        depth=st.integers(1, 3),
        limits=st.fixed_dictionaries(usual | limits),
        seed=st.integers(0, 2**32),
    )


def play(trace: Trace, requests: int) -> Server:
    rng = random.Random(trace.seed)
    s = scheduler(trace.kind, pages=trace.pages, snapshots=trace.snapshots, reuse=trace.reuse, **trace.limits)
    server, cancelled, lent, now = Server(s, trace.depth, rng.choice((7, 97))), set(), [], 0.0
    bases = [[rng.randrange(1, 5) for _ in range(90)] for _ in range(3)]
    arriving = [make(rng, ident, bases) for ident in range(requests)]
    while arriving or s.running or s.waiting or server.flights:
        now += 1
        while arriving and rng.random() < 0.4:
            request = arriving.pop(0)
            if rng.random() < 0.3 and (over := [one for one in server.sequences if one.done]):
                turn = [*rng.choice(over).tokens[:80], 3, 1]  # the next one of a conversation
                request = sequence(request.ident, turn, request.max_new_tokens)
            if s.fits(request.prompt_length + 1):
                request.deadline = now + rng.randrange(1, 60) if rng.random() < 0.2 else None
                server.add(request)
        if server.sequences and rng.random() < 0.06:
            cancel(server, rng.choice(server.sequences), cancelled)
        for late in s.late(now):
            cancel(server, late, cancelled)
        if not lent and s.free_slots and rng.random() < 0.05:
            lent.append(s.lend())
            s.memory.grow(lent[0][1], 0, rng.randrange(1, 30))
        elif lent and rng.random() < 0.3:
            s.give_back(*lent.pop())
        if not server.turn():
            assert lent or not (s.waiting or s.running), "nothing happens any more"
        assert now < 50_000
    while lent:
        s.give_back(*lent.pop())
    check(s, server.sequences)
    assert all(pool.held == 0 for pool in s.memory.pools)
    server.check_answers(cancelled)
    return server


def make(rng: random.Random, ident: int, bases: list[list[int]]) -> Sequence:
    base = rng.choice(bases)[: rng.randrange(1, 80)]
    tail = [rng.randrange(1, 5) for _ in range(rng.choice((0, 0, 1, 5)))]
    return sequence(ident, base + tail, rng.randrange(1, 25), priority=rng.choice((0, 0, 0, 1)))


def cancel(server: Server, victim: Sequence, cancelled: set[int]) -> None:
    if not victim.done:
        cancelled.add(victim.ident)
        server.scheduler.finish(victim)
        assert victim.slot == -1 and victim.memory is None
