"""Pairs in expert order, exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_nvfp4.routing.permutation import permutation


def restated(ids: list[list[int]], experts: int) -> tuple[list[int], list[int], list[int]]:
    width = len(ids[0]) if ids else 1
    flat = [expert for row in ids for expert in row]
    order = [pair for expert in range(experts) for pair, e in enumerate(flat) if e == expert]
    counts = [sum(e < expert for e in flat if e >= 0) for expert in range(experts + 1)]
    return [pair // width for pair in order], order, counts


def check(ids: list[list[int]], experts: int) -> None:
    tensor = torch.tensor(ids, dtype=torch.int64)
    found = permutation(tensor, experts)
    assert tuple(part.tolist() for part in found) == restated(ids, experts)
    assert all(part.dtype == torch.int64 for part in found)


@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_random(experts: int, width: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(-1, experts - 1), min_size=width, max_size=width)
    check(data.draw(st.lists(row, min_size=1, max_size=12)), experts)


@pytest.mark.parametrize(
    ("ids", "experts"),
    [
        ([[-1, -1], [-1, -1]], 3),
        ([[2, 2], [2, 2], [2, 2]], 4),
        ([[0]], 1),
        ([[3], [1], [3], [1]], 5),
    ],
)
def test_corners(ids: list[list[int]], experts: int) -> None:
    check(ids, experts)


def test_no_rows() -> None:
    rows, order, offsets = permutation(torch.empty(0, 2, dtype=torch.int64), 3)
    assert rows.numel() == order.numel() == 0
    assert offsets.tolist() == [0, 0, 0, 0]


def test_stable_with_many_rows() -> None:
    """Long enough for a sort that is stable only by accident to give itself away."""
    ids = torch.randint(-1, 4, (5000, 3))
    _, order, offsets = permutation(ids, 4)
    flat = ids.flatten()
    for expert, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        part = order[begin:end]
        assert flat[part].eq(expert).all()
        assert part.diff().gt(0).all()
    assert offsets[-1] == flat.ge(0).sum()
