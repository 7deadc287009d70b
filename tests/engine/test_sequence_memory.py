"""What a sequence holds and can reuse, one rule at a time. Random traces of it are in test_scheduler.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_nvfp4.engine.sequence_memory import Memory, PageGroup, SequenceMemory

PAGE = 4


def computed(memory: SequenceMemory, tokens: list[int], *, snapshots: tuple[int, ...] = ()) -> Memory:
    """A sequence that has computed all its tokens."""
    one = memory.begin(tokens).memory
    assert memory.grow(one, 0, len(tokens))
    for position in snapshots:
        memory.snapshot(one, tokens, position)
    memory.publish()
    memory.offer(one, tokens, len(tokens))
    return one


@pytest.mark.parametrize("length, reused", [(4, 0), (5, 4), (8, 4), (9, 8), (40, 12)])
def test_whole_pages_are_reused_and_one_token_is_left(length: int, reused: int) -> None:
    memory = SequenceMemory([PageGroup(32)], PAGE)
    first = computed(memory, list(range(15)))
    second = memory.begin(list(range(length)))
    assert second.reused == second.matched == reused
    assert second.memory.tables[0] == first.tables[0][: reused // PAGE]
    assert [c.page for c in second.memory.changes] == second.memory.tables[0]


def test_a_page_depends_on_everything_before_it() -> None:
    memory = SequenceMemory([PageGroup(32)], PAGE)
    computed(memory, [*range(8), 1])
    assert memory.begin([9, *range(1, 8), 1, 1]).reused == 0
    assert memory.begin([*range(4), 9, *range(5, 8), 1, 1]).reused == 4


def test_of_a_prefix_the_end_is_forgotten_first() -> None:
    memory = SequenceMemory([PageGroup(5)], PAGE)
    tokens = list(range(20))
    memory.end(computed(memory, tokens))
    assert memory.grow(memory.empty(), 0, 8)
    assert memory.begin([*tokens, 1]).reused == 12


def test_tokens_that_are_not_known_yet_are_not_offered() -> None:
    memory = SequenceMemory([PageGroup(32)], PAGE)
    tokens = list(range(7))
    one = memory.begin(tokens).memory
    memory.grow(one, 0, 8)
    memory.offer(one, tokens, 8)
    assert memory.begin([*range(8), 0]).reused == 4
    memory.offer(one, list(range(8)), 8)
    assert memory.begin([*range(8), 0]).reused == 8


def test_nothing_is_reused_when_it_is_off() -> None:
    for memory in (SequenceMemory([PageGroup(32)], PAGE, reuse=False), SequenceMemory([PageGroup(32)], PAGE, 0)):
        one = computed(memory, list(range(9)), snapshots=(8,))
        assert memory.begin(list(range(9)))[1:] == (0, None, 0)
        memory.end(one)
        assert memory.pools[0].held == 0


def test_growth_takes_all_or_nothing() -> None:
    memory = SequenceMemory([PageGroup(9), PageGroup(2)], PAGE)
    one = memory.empty()
    assert memory.grow(one, 0, 8) and not memory.grow(one, 8, 9)
    assert [pool.held for pool in memory.pools] == [2, 2] and len(one.take_changes()) == 4
    assert one.take_changes() == []


@given(st.integers(1, 30), st.lists(st.integers(1, 13), max_size=30))
def test_windows_hold_what_the_next_rows_see(window: int, counts: list[int]) -> None:
    memory = SequenceMemory([PageGroup(999), PageGroup(99, window)], PAGE)
    one, start = memory.empty(), 0
    for count in counts:
        assert memory.grow(one, start, start + count)
        seen = {row // PAGE for row in range(max(0, start - window + 1), start + count)}
        assert {index for index, page in enumerate(one.tables[1]) if page >= 0} == seen
        assert len(seen) <= memory.pages_for(start + count, 13)[1]
        start += count
    memory.end(one)
    memory.check()
    assert [pool.held for pool in memory.pools] == [0, 0]


def test_a_window_needs_only_its_own_pages() -> None:
    memory = SequenceMemory([PageGroup(32), PageGroup(8, 6)], PAGE)
    tokens = list(range(32))
    one = memory.begin(tokens).memory
    for start in range(0, 32, PAGE):
        memory.grow(one, start, start + PAGE)
        memory.offer(one, tokens, start + PAGE)
    held = one.tables[1][-3:]
    for _ in range(5):  # all but the three that it still holds
        memory.pools[1].take()
    second = memory.begin([*tokens, 1])
    assert second.reused == second.matched == 32
    assert second.memory.tables[1] == [-1] * 6 + held[1:]
    third = memory.begin(tokens[:28])
    assert (third.reused, third.matched) == (0, 24), "row 24 sees from 19 on, and page 4 is gone"


def test_states_are_needed_at_just_that_place() -> None:
    memory = SequenceMemory([PageGroup(64)], PAGE, 4)
    tokens = list(range(30))
    computed(memory, tokens, snapshots=(8, 20))
    beginnings = [memory.begin(tokens[:length]) for length in (8, 9, 20, 21, 30)]
    assert [(b.reused, b.matched) for b in beginnings] == [(0, 4), (8, 8), (8, 16), (20, 20), (20, 28)]
    lines = [b.snapshot for b in beginnings]
    assert lines[0] is None and lines[1] == lines[2] != lines[3] == lines[4]


def test_snapshots_go_least_recently_used_first_and_once_each() -> None:
    memory = SequenceMemory([PageGroup(64)], PAGE, 2)
    prompts = [[n] * 9 for n in range(3)]
    held = [computed(memory, prompts[n], snapshots=(8, 8)) for n in (0, 1)]
    assert memory.snapshot(held[0], prompts[0], 8) is None, "it is there already"
    assert memory.snapshot(held[0], prompts[0], 7) is None and memory.snapshot(held[0], prompts[0], 0) is None
    assert memory.begin(prompts[0]).reused == 8
    computed(memory, prompts[2], snapshots=(8,))
    assert [memory.begin(prompt).reused for prompt in prompts] == [8, 0, 8]


def test_a_step_never_gives_one_line_twice() -> None:
    memory = SequenceMemory([PageGroup(64)], PAGE, 2)
    lines = []
    for number in range(3):
        one = memory.empty()
        lines.append(memory.snapshot(one, [number] * 9, 8))
    assert None not in lines[:2] and lines[0] != lines[1] and lines[2] is None
    memory.publish()
    memory.check()


def test_room_counts_pages_that_are_shared_with_who_runs_once() -> None:
    memory = SequenceMemory([PageGroup(8)], PAGE)
    tokens = list(range(20))
    one = computed(memory, tokens)
    assert memory.has_room(tokens, [], 16, [0]) and not memory.has_room(tokens, [], 16, [2])
    assert not memory.has_room([9, *tokens[1:]], [], 16, [0])
    memory.end(one)
    assert memory.has_room(tokens, [], 16, [2]), "a page that nobody holds is taken from what is available"
    assert not memory.has_room(tokens, [], 16, [3])
