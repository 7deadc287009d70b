"""The description of a step's rows."""

from itertools import accumulate

import pytest
import torch

from moe_nvfp4.kernels.rows import Rows, chunk_places, pack, row_lists


def test_of() -> None:
    rows = Rows.of([(4, 9, 1), (0, 0, 1), (2, 3, 2), (1, 0, 3)])
    assert rows.positions.tolist() == [9, 0, 3, 4, 0, 1, 2]
    assert rows.row_slots.tolist() == [4, 0, 2, 2, 1, 1, 1]
    assert rows.slots.tolist() == [4, 0, 2, 1]
    assert rows.starts.tolist() == [0, 1, 2, 4, 7]
    assert rows.lengths.tolist() == [10, 1, 5, 3]
    assert rows.lines.tolist() == [-1] * 4
    assert rows.decodes == 2
    assert {x.dtype for x in rows if isinstance(x, torch.Tensor)} == {torch.int32}


def test_prefills() -> None:
    rows = Rows.of([(4, 9, 1), (2, 3, 2), (1, 0, 3)], lines=[-1, 7, -1]).prefills()
    assert (rows.slots.tolist(), rows.lengths.tolist(), rows.starts.tolist()) == ([2, 1], [5, 3], [1, 3, 6])
    assert (rows.decodes, rows.lines.tolist()) == (0, [7, -1])


def test_one_row_first() -> None:
    with pytest.raises(AssertionError, match="one row come first"):
        Rows.of([(0, 0, 2), (1, 5, 1)])


def test_none() -> None:
    rows = Rows.of([])
    assert (rows.starts.tolist(), rows.decodes, rows.positions.numel()) == ([0], 0, 0)


def test_chunks_have_places_of_their_own() -> None:
    """Beside one row of another kind: 64 rows are one chunk, 65 two, and a sequence without rows has none."""
    counts = [64, 0, 65, 1, 200, 3]
    starts = [1, *accumulate(counts, initial=1)][1:]
    places = chunk_places(starts)
    assert len(places) == starts[-1] // 64 + len(counts)
    for sequence, count in enumerate(counts):
        first, chunks = starts[sequence] // 64 + sequence, -(-count // 64)
        assert places[first : first + chunks] == [sequence] * chunks and places.count(sequence) == chunks
    assert Rows.of([(9, 5, 1), (0, 0, 65), (1, 0, 3)]).chunks.tolist() == [0, 0, 1]


def test_room_that_no_sequence_takes() -> None:
    lists = row_lists([(4, 9, 1), (8, 0, 0), (2, 3, 2), (8, 0, 0)], decodes=2)
    assert lists == [[9, 3, 4], [4, 2, 2], [4, 8, 2, 8], [0, 1, 1, 3, 3], [10, 0, 5, 0], [-1] * 4, [0, -1]]


def test_packed_lists_begin_where_kernels_want_them() -> None:
    whole, places = pack([[1, 2, 3], [], [4], [5, 6]])
    assert [whole[place].tolist() for place in places] == [[1, 2, 3], [], [4], [5, 6]]
    assert all(place.start % 4 == 0 for place in places)
