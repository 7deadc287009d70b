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


@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=5))
def test_slot_tables_cover_each_expert_once(ranks: list[set[int]]) -> None:
    slots = tuple(tuple(sorted(held, reverse=True)) for held in ranks)
    if set().union(*ranks) != set(range(6)):
        with pytest.raises(ValueError, match="nowhere"):
            Placement(6, {0: slots})
        return
    placement = Placement(6, {0: slots})
    tables = [placement.slot_table(0, rank) for rank in range(len(slots))]
    for expert in range(6):
        owners = [rank for rank, table in enumerate(tables) if table[expert] >= 0]
        assert owners == [min(rank for rank, held in enumerate(ranks) if expert in held)]
        assert slots[owners[0]][tables[owners[0]][expert]] == expert


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
