"""Sorting pairs: exact against the twin, the twin against a plain loop."""

from itertools import accumulate

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted

from moe_nvfp4.kernels.sort_pairs import sort_pairs, sort_pairs_twin

# rows, choices, experts, and the part of the ids that are -1
CASES = [
    (1, 8, 256, 0.0),
    (1, 1, 1, 0.0),
    (3, 22, 512, 0.3),
    (7, 4, 5, 0.5),
    (40, 8, 128, 0.0),
    (5, 8, 60, 1.0),
    (300, 2, 16, 0.1),
    (1500, 2, 16, 0.1),
]
LARGE = [(2049, 2, 16, 0.1), (1024, 8, 256, 0.0), (4096, 8, 256, 0.0), (4099, 8, 128, 0.2), (5000, 22, 512, 0.1)]


def random_ids(rows: int, choices: int, experts: int, absent: float) -> torch.Tensor:
    ids = torch.randint(experts, (rows, choices), dtype=torch.int32)
    return torch.where(torch.rand(rows, choices) < absent, -1, ids)


def check(ids: torch.Tensor, experts: int, run: int) -> None:
    pairs, expected = sort_pairs(ids, experts, run), sort_pairs_twin(ids, experts, run)
    assert pairs.run == run
    for name, actual, wanted in zip(pairs._fields[:3], pairs[:3], expected[:3], strict=True):
        assert actual.dtype == torch.int32, name
        assert torch.equal(actual, wanted), name


@pytest.mark.parametrize("rows, choices, experts, absent", [*CASES, *LARGE])
def test_twin(rows: int, choices: int, experts: int, absent: float) -> None:
    ids = random_ids(rows, choices, experts, absent)
    pairs, wanted = sort_pairs_twin(ids, experts), [[] for _ in range(experts)]
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert >= 0:
            wanted[expert].append(pair)
    order = [pair for group in wanted for pair in group]
    valid = len(order)
    assert pairs.order[:valid].tolist() == order
    assert pairs.offsets.tolist() == [0, *accumulate(map(len, wanted))]
    assert (ids.flatten()[pairs.order[valid:].long()] == -1).all()
    assert pairs.runs.shape == (3, ids.numel() // 8 + min(experts, ids.numel()))
    listed = []
    for expert, begin, count in pairs.runs.T.tolist():
        if expert < 0:
            assert (begin, count) == (0, 0)
        else:
            assert 0 < count <= 8 and begin == len(listed)
            listed += order[begin : begin + count]
            assert set(order[begin : begin + count]) <= set(wanted[expert])
    assert listed == order


def test_no_rows() -> None:
    pairs = sort_pairs(torch.empty(0, 8, dtype=torch.int32), 4)
    assert pairs.order.shape == (0,) and pairs.runs.shape == (3, 0)
    assert pairs.offsets.tolist() == [0] * 5


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("rows, choices, experts, absent", [*CASES, *LARGE[:1]])
def test_interpreted(rows: int, choices: int, experts: int, absent: float) -> None:
    check(random_ids(rows, choices, experts, absent), experts, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, choices, experts, absent", [*CASES, *LARGE])
def test_gpu(rows: int, choices: int, experts: int, absent: float) -> None:
    for run in (8, 128):
        check(random_ids(rows, choices, experts, absent).cuda(), experts, run)
