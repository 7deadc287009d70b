"""Placement is checked data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_nvfp4.routing.placement import Placement


@given(st.integers(1, 40), st.data())
def test_even(experts: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, experts))
    placement = Placement.even([0, 3], experts, ranks)
    assert placement.num_ranks == ranks
    for layer in (0, 3):
        held = [placement.local(layer, rank) for rank in range(ranks)]
        assert [expert for part in held for expert in part] == list(range(experts))
        assert max(map(len, held)) - min(map(len, held)) <= 1


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Two layers of six experts, every one of them on some rank; ranks may have none."""
    count = draw(st.integers(1, 4))
    layers = {}
    for layer in (1, 4):
        held = [draw(st.permutations(sorted(draw(st.sets(st.integers(0, 5)))))) for _ in range(count)]
        for expert in set(range(6)).difference(*held):
            held[draw(st.integers(0, count - 1))].append(expert)
        layers[layer] = tuple(map(tuple, held))
    return Placement(6, layers)


@given(placements())
def test_tables_give_each_row_of_an_expert_to_one_rank(placement: Placement) -> None:
    tables = [placement.table(4, rank) for rank in range(placement.num_ranks)]
    for expert, holders in enumerate(placement.holders(4)):
        for rank, (slots, replicas, turn) in enumerate(tables):
            assert replicas[expert] == len(holders)
            assert (slots[expert] >= 0) == (turn[expert] >= 0) == (rank in holders)
            if rank in holders:
                assert placement.local(4, rank)[slots[expert]] == expert
        turns = sorted(turn[expert] for _, _, turn in tables if turn[expert] >= 0)
        assert turns == list(range(len(holders)))


@given(placements(), st.integers(0, 7))
def test_replicas_fill_spare_slots(placement: Placement, count: int) -> None:
    more = placement.with_replicas(count)
    for layer, ranks in placement.slots.items():
        for held, longer in zip(ranks, more.slots[layer], strict=True):
            assert longer[: len(held)] == held
            assert len(longer) == min(6, len(held) + count)


def test_experts_everywhere() -> None:
    placement = Placement.even([0], 7, 3, everywhere=[6])
    assert placement.slots[0] == ((0, 1, 6), (2, 3, 6), (4, 5, 6))
    assert placement.table(0, 1) == [[-1, -1, 0, 1, -1, -1, 2], [1] * 6 + [3], [-1, -1, 0, 0, -1, -1, 1]]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({0: ((0, 1), (2,))}, r"layer 0 places experts \[3\] nowhere"),
        ({0: ((0, 1, 2, 3, 4),)}, r"places experts \[4\]; expected 0 to 3"),
        ({0: ((-1, 0, 1, 2, 3),)}, r"places experts \[-1\]"),
        ({0: ((0, 1, 2, 3, 3),)}, "rank 0 holds an expert twice"),
        ({0: ((0, 1, 2, 3),), 1: ((0, 1), (2, 3))}, r"disagree on the number of ranks: \[1, 2\]"),
        ({0: ()}, "nowhere"),
    ],
)
def test_what_is_refused(slots: dict[int, tuple[tuple[int, ...], ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(4, slots)


@pytest.mark.parametrize("ranks", [0, -1, 5])
def test_ranks_without_experts_are_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{ranks} ranks for 4 experts"):
        Placement.even([0], 4, ranks)


def test_no_experts_at_all() -> None:
    placement = Placement.even([], 0)
    assert placement.num_ranks == 1 and not placement.slots


def test_frozen_and_detached() -> None:
    given_slots = {0: [[0, 1], [1]]}
    placement = Placement(2, given_slots)  # type: ignore[arg-type]
    given_slots[0][0].append(7)
    assert placement.slots == {0: ((0, 1), (1,))}
    with pytest.raises(AttributeError):
        placement.num_experts = 3  # type: ignore[misc]
