"""Whole chunks: every token is computed in the same piece of its sequence, after the same pieces, whatever else runs.

The device of these tests knows in which piece each place of a page was computed, and of states after which.
"""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_model import Server
from scheduler_traces import COST, GROUPS, Trace, play, scheduler, sequence, traces

CHUNK = 16
whole_traces = traces(16, chunk=st.sampled_from((4, 8, 16, 24)), whole_chunks=st.just(True))


@settings(max_examples=40)
@given(whole_traces)
def test_random_traces(trace: Trace) -> None:
    play(trace, requests=25)


@pytest.mark.parametrize("kind", sorted(GROUPS))
def test_the_trace_reaches_what_it_is_for(kind: str) -> None:
    limits = {"slots": 4, "step_rows": 24, "chunk": 16, "whole_chunks": True}
    preempted = reused = 0
    for seed in range(6):
        server = play(Trace(kind, 34, 5, True, 2, limits, seed), requests=30)
        preempted += sum(s.preemptions for s in server.sequences)
        reused += sum(s.reused for s in server.sequences)
    assert preempted > 3 and reused > 100


def whole(kind: str = "full", **limits: Any) -> Server:
    chosen = {"chunk": CHUNK, "step_rows": 64, "whole_chunks": True} | limits
    return Server(scheduler(kind, pages=60, **chosen), depth=1, vocabulary=10**6)  # answers that do not end early


def pieces(server: Server, ident: int) -> list[tuple[int, int]]:
    """Those of one sequence, to the end."""
    found: list[tuple[int, int]] = []
    run = server.device.run

    def watched(step: Any) -> Any:
        found.extend((rows.start, rows.count) for rows in step.rows if rows.sequence.ident == ident)
        return run(step)

    server.device.run = watched  # type: ignore[method-assign]
    server.finish()
    return found


def test_a_chunk_that_has_no_room_waits_whole() -> None:
    """Beside answers the time is over before a chunk is; it is not cut, and the next one waits for the next step."""
    server = whole(cost=COST, stretch=1.0)
    server.add(sequence(0, 3, 30))
    server.turn()
    server.add(sequence(1, 40, 2))
    server.add(sequence(2, 40, 2))
    step = server.scheduler.plan()
    assert step is not None and [(r.sequence.ident, r.count) for r in step.rows] == [(0, 1), (1, CHUNK)]


def test_others_go_on_after_whole_chunks_only() -> None:
    server = whole()
    for ident, (length, reused) in enumerate(((40, 0), (40, 32), (33, 32), (32, 16), (31, 16))):
        server.add(sequence(ident, [5] * length, 3))
        server.finish()
        assert server.sequences[-1].reused == reused


def test_nobody_goes_on_from_an_answer() -> None:
    """Its tokens were computed one by one, and in a prompt they are not."""
    server = whole()
    server.add(sequence(0, [5] * 20, 30))
    server.finish()
    conversation = server.sequences[0].tokens
    server.add(sequence(1, [*conversation, 9, 9], 2))
    assert pieces(server, 1)[0] == (16, 16) and server.sequences[1].reused == 16


@pytest.mark.parametrize("prompt", [15, 16, 17, 33])
def test_an_answer_is_computed_again_row_by_row(prompt: int) -> None:
    server = whole(slots=2)
    server.add(sequence(0, [5] * prompt, 12))
    for _ in range(3 + prompt // CHUNK):
        server.turn()
    again = server.sequences[0]
    known = again.length - prompt
    assert known > 1 and again.answering
    server.scheduler._preempt(again)
    last = (prompt - 1) // CHUNK * CHUNK
    expected = [(last, prompt - last), *((prompt + row, 1) for row in range(11))]
    assert pieces(server, 0)[-len(expected) :] == expected


def test_rows_that_are_computed_again_do_not_hold_up_prompts() -> None:
    server = whole(cost=COST, stretch=1.0)
    server.add(sequence(0, 3, 30))
    for _ in range(8):
        server.turn()
    server.scheduler._preempt(server.sequences[0])
    server.turn()
    server.add(sequence(1, 40, 2))
    step = server.scheduler.plan()
    assert step is not None and [(r.count, r.recomputes) for r in step.rows] == [(1, True), (CHUNK, False)]


def test_pages_of_another_prompt_are_not_taken_for_those_of_an_answer() -> None:
    """A prompt may be just what an answer has become: its pages hold the same tokens, and other bits."""
    server = whole(slots=2)
    server.add(sequence(0, [5] * 10, 40))
    for _ in range(30):
        server.turn()
    text = list(server.sequences[0].tokens)
    assert len(text) > 2 * CHUNK
    server.add(sequence(1, text, 1))
    server.turn()
    server.scheduler._preempt(server.sequences[0])
    assert pieces(server, 0)[0] == (0, 10)


def test_prompts_of_all_lengths_come_to_an_end_beside_others() -> None:
    """Few rows beside many answers: there is always one whole chunk more."""
    rng = random.Random(1)
    server = Server(scheduler(pages=400, slots=8, step_rows=1, chunk=CHUNK, whole_chunks=True), depth=2)
    for ident in range(40):
        server.add(sequence(ident, rng.randrange(1, 90), rng.randrange(1, 30)))
    server.finish()
    server.check_answers(set())
