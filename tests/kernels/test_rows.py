"""The description of a step's rows."""

import pytest
import torch

from moe_nvfp4.kernels.rows import Rows


def test_of() -> None:
    rows = Rows.of([(4, 9, 1), (0, 0, 1), (2, 3, 2), (1, 0, 3)])
    assert rows.positions.tolist() == [9, 0, 3, 4, 0, 1, 2]
    assert rows.row_slots.tolist() == [4, 0, 2, 2, 1, 1, 1]
    assert rows.slots.tolist() == [4, 0, 2, 1]
    assert rows.starts.tolist() == [0, 1, 2, 4, 7]
    assert rows.lengths.tolist() == [10, 1, 5, 3]
    assert rows.lines.tolist() == [-1] * 4
    assert (rows.decodes, rows.longest) == (2, 3)
    assert {x.dtype for x in rows if isinstance(x, torch.Tensor)} == {torch.int32}


def test_prefills() -> None:
    rows = Rows.of([(4, 9, 1), (2, 3, 2), (1, 0, 3)], lines=[-1, 7, -1]).prefills()
    assert (rows.slots.tolist(), rows.lengths.tolist(), rows.starts.tolist()) == ([2, 1], [5, 3], [1, 3, 6])
    assert (rows.decodes, rows.longest, rows.lines.tolist()) == (0, 3, [7, -1])


def test_one_row_first() -> None:
    with pytest.raises(AssertionError, match="one row come first"):
        Rows.of([(0, 0, 2), (1, 5, 1)])


def test_none() -> None:
    rows = Rows.of([])
    assert (rows.starts.tolist(), rows.decodes, rows.longest, rows.positions.numel()) == ([0], 0, 0, 0)
