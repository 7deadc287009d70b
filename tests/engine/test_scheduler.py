"""The scheduler over random traces, against a device that knows what every place ought to hold."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scheduler_model import Server
from scheduler_traces import COST, PAGE, Trace, play, scheduler, sequence, traces

from moe_nvfp4.engine.scheduler import Limits, QueueFull, Scheduler
from moe_nvfp4.engine.sequence_memory import PageGroup, SequenceMemory

random_traces = traces(
    6, chunk=st.integers(1, 24), sizes=st.sampled_from([(), (4, 8, 16, 40), (7, 11)]), rest=st.integers(0, 3)
)


@example(Trace("states", 6, 1, True, 1, {"slots": 1, "step_rows": 1, "chunk": 1}, 0))  # chunks shorter than a page
@given(random_traces)
def test_random_traces(trace: Trace) -> None:
    play(trace, requests=25)


def test_steps_fill_up_to_their_sizes() -> None:
    """While there are prompts enough."""
    server = Server(
        scheduler(cost=COST, stretch=9.0, step_rows=40, chunk=40, pages=400, sizes=(8, 16, 24, 40)), depth=1
    )
    for ident in range(4):
        server.add(sequence(ident, 200, 6))
    totals = []
    while server.scheduler.waiting or server.scheduler.running:
        step = server.scheduler.plan()
        assert step is not None
        totals.append(sum(rows.count for rows in step.rows))
        for rows in step.rows:
            if rows.samples:
                server.scheduler.took(rows, 1)
                if len(rows.sequence.tokens) >= rows.sequence.prompt_length + 6:
                    server.scheduler.finish(rows.sequence)
    assert sum(total in (8, 16, 24, 40) for total in totals) > 0.8 * len(totals), totals


def test_prompts_share_a_step() -> None:
    """After one with prompts a few steps are for answers alone: when there are answers, and few rows of prompts."""
    s = scheduler(cost=replace(COST, least_prompt_rows=10), stretch=99.0, rest=2, slots=8)

    def step() -> list[int]:
        planned = s.plan()
        assert planned is not None
        for rows in planned.rows:
            if rows.samples:
                s.took(rows, 1)
        return [rows.sequence.ident for rows in planned.rows if not rows.decodes]

    s.add(sequence(0, 3, 50))
    assert step() == [0]
    s.add(sequence(1, 3, 50))
    assert step() == [] == step()
    s.add(sequence(2, 3, 50))
    assert step() == [1, 2]
    s.add(sequence(3, 3, 50))
    assert step() == []
    s.add(sequence(4, 8, 50))
    assert step() == [3, 4], "they fill a step"
    assert step() == []
    s.add(sequence(7, 20, 50))
    assert step() == [7] == step(), "one that has begun goes on"
    s.add(sequence(5, 3, 50))
    for running in list(s.running):
        s.finish(running)
    assert step() == [5], "nobody answers"
    assert [step() for _ in range(4)] == [[]] * 4
    s.add(sequence(6, 3, 50))
    assert step() == [6], "the last prompt is long ago"


def test_the_trace_reaches_what_it_is_for() -> None:
    """Without preemption, reuse or snapshots the test above would say little."""
    limits = {"slots": 4, "step_rows": 24, "chunk": 16}
    preempted = reused = 0
    for seed in range(8):
        server = play(Trace("states", 34, 5, True, 2, limits, seed), requests=30)
        preempted += sum(s.preemptions for s in server.sequences)
        reused += sum(s.reused for s in server.sequences)
    assert preempted > 5 and reused > 300


def test_one_token_left_of_a_prompt_is_no_decode_row() -> None:
    """A decode step takes the token that the slot has given last; here that is another sequence's."""
    s = scheduler(chunk=8)
    s.add(sequence(0, 9))
    first, second = s.plan(), s.plan()
    assert first is not None and second is not None
    assert [(r.start, r.count, r.samples) for r in second.rows] == [(8, 1, True)]
    assert not second.decodes_only
    third = s.plan()
    assert third is not None and third.decodes_only


def test_a_snapshot_is_found_only_after_its_step() -> None:
    """It is written by the step, and restored before one. One with the same prompt waits for it."""
    s = scheduler("states", step_rows=64, chunk=32)
    prompt = [5] * 24
    s.add(sequence(0, prompt))
    s.add(sequence(1, prompt))
    first = s.plan()
    assert first is not None and [(r.sequence.ident, r.start, r.count) for r in first.rows] == [(0, 0, 24)]
    line = first.rows[0].inner_snapshot
    second = s.plan()
    assert second is not None
    assert [(r.sequence.ident, r.start, r.restore) for r in second.rows] == [(0, 24, None), (1, 20, line)]


@pytest.mark.parametrize("prompt", [21, 23, 24])
def test_a_prompt_that_fits_a_step_takes_one(prompt: int) -> None:
    """And leaves its states before its last page: the same prompt goes on from there."""
    s = scheduler("states", step_rows=64, chunk=32)
    server = Server(s, depth=1, vocabulary=10**6)
    server.add(sequence(0, [5] * prompt, 1))
    step = s.plan()
    assert step is not None and s.plan() is None
    (rows,) = step.rows
    assert (rows.start, rows.count, rows.samples) == (0, prompt, True) and rows.inner_snapshot is not None
    s.took(rows, *server.device.run(step))
    s.finish(rows.sequence)
    server.add(sequence(1, [5] * prompt, 1))
    server.finish()
    assert server.sequences[1].reused == 20


def test_a_piece_that_begins_within_a_page_ends_where_its_states_are_wanted() -> None:
    """No kernel comes by the states there."""
    s = scheduler("states", step_rows=64, chunk=3)
    s.add(sequence(0, [5] * 26))
    found = []
    for _ in range(5):
        step = s.plan()
        assert step is not None
        found += [(rows.start, rows.count, rows.snapshot is not None) for rows in step.rows]
        assert step.rows[0].inner_snapshot is None
        if len(found) == 3:
            s.limits = replace(s.limits, chunk=32)
    assert found == [(0, 3, False), (3, 1, False), (4, 3, False), (7, 17, True), (24, 2, False)]


def test_states_of_a_shared_beginning_are_kept_from_the_second_prompt_on() -> None:
    """No chunk ends there by itself: the second one finds the pages without the states, and stops to keep them."""
    server = Server(scheduler("states", pages=60, step_rows=64, chunk=64), depth=1)
    system = [3] * 24
    for ident in range(3):
        server.add(sequence(ident, [*system, *[4 + ident] * 12], 1))
        server.finish()
    assert [s.reused for s in server.sequences] == [0, 0, 24]
    server.check_answers(set())


@pytest.mark.parametrize("depth", [1, 2])
def test_the_next_turn_of_a_conversation_goes_on_from_the_end_of_the_answer(depth: int) -> None:
    server = Server(scheduler("states", pages=200, snapshots=4, step_rows=64, chunk=64), depth, vocabulary=10**6)
    server.add(sequence(0, [5] * 18, 40))
    server.add(sequence(1, [6] * 18, 40))  # at the same time: each keeps its own line
    server.finish()
    for ident in (0, 1):
        conversation = server.sequences[ident].tokens
        assert len(conversation) == 58
        server.add(sequence(2 + ident, [*conversation, 9, 9], 2))
        server.finish()
    # The last token is not computed, so the last page that is whole ends before it.
    assert [s.reused for s in server.sequences[2:]] == [56, 56]
    server.check_answers(set())


def test_one_line_is_enough_for_one_conversation() -> None:
    server = Server(scheduler("states", pages=60, snapshots=1, step_rows=64, chunk=64), 2, vocabulary=10**6)
    server.add(sequence(0, [5] * 18, 20))
    server.finish()
    server.add(sequence(1, [*server.sequences[0].tokens, 9], 20))
    server.finish()
    assert server.sequences[1].reused == 36
    server.check_answers(set())


def test_answers_take_half_of_the_lines_at_most() -> None:
    s = scheduler("states", pages=400, snapshots=4, slots=4, step_rows=64, chunk=64)
    server = Server(s, 2, vocabulary=10**6)
    for ident in range(4):
        server.add(sequence(ident, [5 + ident] * 18, 40))
    while s.running or s.waiting:
        server.turn()
        assert sum(one.memory is not None and one.memory.line is not None for one in s.running) <= 2
    server.finish()
    assert s.memory.snapshots is not None and s.memory.snapshots.held == 0
    s.memory.check()


def test_a_long_prompt_takes_one_line_of_snapshots_in_passing() -> None:
    s = scheduler("states", pages=200, snapshots=3, step_rows=64, chunk=16)
    server = Server(s, depth=1)
    for ident, prompt in enumerate(([7] * 20, [8] * 160, [7] * 20)):
        server.add(sequence(ident, prompt, 1))
        server.finish()
    assert server.sequences[2].reused == 16


def test_decode_rows_come_before_prompts() -> None:
    s = scheduler(pages=100, step_rows=6, chunk=6)
    server = Server(s, depth=1)
    for ident in range(3):
        server.add(sequence(ident, 1, 30))
    server.turn()
    server.add(sequence(3, 60, 1))
    step = s.plan()
    assert step is not None and [r.count for r in step.rows] == [1, 1, 1, 3]


def test_prompts_beside_answers_are_cut_to_the_time_they_may_take() -> None:
    s = scheduler(cost=COST, stretch=3.0, step_rows=100, chunk=100, pages=200)
    server = Server(s, 1)
    server.add(sequence(0, 3, 40))
    server.turn()
    server.add(sequence(1, 60, 40))
    server.add(sequence(2, 60, 40))
    chunks = []
    while s.waiting or not all(one.answering for one in s.running):
        before = {one.ident: one.computed for one in server.sequences}
        assert server.turn()
        answering = sum(one.computed - before[one.ident] == 1 for one in server.sequences)
        prompts = [one for one in server.sequences if one.computed - before[one.ident] > 1]
        taken = sum(COST.prompt(before[one.ident], one.computed - before[one.ident]) for one in prompts)
        assert taken <= 2 * COST.decodes(answering, 0)
        chunks += [one.computed - before[one.ident] for one in prompts]
    assert len(chunks) > 30 and max(chunks) <= 6
    server.finish()
    server.check_answers(set())


def test_more_slots_than_rows() -> None:
    server = Server(scheduler(pages=100, slots=6, step_rows=2, chunk=4), depth=2)
    for ident in range(12):
        server.add(sequence(ident, 9, 9))
    server.finish()
    server.check_answers(set())


def test_pages_go_to_who_comes_first() -> None:
    """A prompt of high priority takes pages from an answer of low priority, although answers are certain of rows."""
    s = scheduler(pages=12, reuse=False, chunk=8, step_rows=10)
    low = [sequence(i, 15, 30, priority=1) for i in range(2)]
    server = Server(s, depth=1)
    for one in low:
        server.add(one)
    for _ in range(6):
        server.turn()
    high = sequence(2, 14, 20)
    server.add(high)
    server.finish()
    assert high.preemptions == 0 and low[0].preemptions <= low[1].preemptions and low[1].preemptions > 0
    server.check_answers(set())


def test_equal_priorities_are_served_in_the_order_of_arrival() -> None:
    """A long prompt first in the queue holds up the short ones behind it, and is not overtaken for ever."""
    s = scheduler(pages=20, reuse=False)
    server = Server(s, depth=1)
    server.add(sequence(0, 30, 40))
    server.turn()
    server.add(sequence(1, 50, 2))
    for ident in range(2, 30):
        server.add(sequence(ident, 3, 2))
    started: list[int] = []
    while server.turn():
        started += [q.ident for q in server.sequences if q.computed and q.ident not in started]
    assert started == sorted(started)
    server.check_answers(set())


def test_who_cannot_fit_is_refused_and_who_outgrows_the_pages_ends() -> None:
    s = scheduler(pages=6)
    assert s.fits(24) and not s.fits(25)
    alone = sequence(0, 23, 50)
    server = Server(s, depth=2)
    server.add(alone)
    server.finish(turns=100)
    assert len(server.answers[0]) == 1 and alone.preemptions == 0
    with pytest.raises(AssertionError, match="for ever"):
        s.add(sequence(1, 24))


def test_windows_do_not_bound_a_sequence_that_fits_them() -> None:
    memory = SequenceMemory([PageGroup(100), PageGroup(8, 9)], PAGE)
    assert Scheduler(memory, Limits(slots=1, step_rows=16, chunk=16, max_waiting=1)).fits(400)
    assert not Scheduler(memory, Limits(slots=1, step_rows=32, chunk=32, max_waiting=1)).fits(400)


def test_the_queue_is_bounded() -> None:
    s = scheduler(slots=1, max_waiting=2, pages=6)
    for ident in range(3):
        s.add(sequence(ident, 8))
    with pytest.raises(QueueFull):
        s.add(sequence(3, 8))
    s.finish(s.waiting[1])
    s.add(sequence(3, 8))


def test_a_prompt_is_admitted_only_beside_what_is_promised_to_others() -> None:
    """Else two long prompts would take pages from each other, and compute what they had again."""
    server = Server(scheduler(pages=20, reuse=False, chunk=8), depth=1)
    for ident in range(2):
        server.add(sequence(ident, 60, 2))
    server.turn()
    assert len(server.scheduler.running) == 1 and server.scheduler.memory.pools[0].available == 18
    server.finish()
    assert all(one.preemptions == 0 for one in server.sequences)
    server.check_answers(set())


def test_deadlines() -> None:
    s = scheduler()
    wanted = [sequence(i, 4, deadline=d) for i, d in enumerate((5.0, None, 2.0, 9.0))]
    for one in wanted:
        s.add(one)
    s.plan()
    assert s.late(1.0) == []
    assert s.late(5.0) == [wanted[2], wanted[0]]
    for one in s.late(5.0):
        s.finish(one)
    assert s.late(8.0) == [] and s.late(9.0) == [wanted[3]]


def test_a_lent_slot_is_nobodys() -> None:
    s = scheduler(slots=2, pages=8)
    slot, memory = s.lend()
    assert s.memory.grow(memory, 0, 20)
    server = Server(s, depth=1)
    server.add(sequence(0, 16, 4))
    assert not server.turn(), "there are three pages, and five are needed"
    s.give_back(slot, memory)
    server.finish()
    server.check_answers(set())


def test_the_last_token_of_a_preempted_answer_is_kept() -> None:
    """It gave its pages up while its tokens were on their way, and has nothing to compute again."""
    s = scheduler(pages=8, reuse=False)
    first, last = sequence(0, 13, 8), sequence(1, 12, 4)
    server = Server(s, depth=3, vocabulary=10_007)
    server.add(first)
    server.add(last)
    server.finish()
    server.check_answers(set())
