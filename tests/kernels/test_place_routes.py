"""Placing routes: exact against the twin, the twin against a plain loop over rows and choices."""

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted

from moe_nvfp4.kernels.place_routes import place_routes, place_routes_twin
from moe_nvfp4.routing.placement import Placement

SLOTS = ((0, 1, 5, 7), (2, 3, 7, 1), (4, 7, 6, 1))  # 1 and 7 are on several ranks
CASES = [(1, 1, 1), (1, 5, 2), (3, 1, 9), (3, 37, 4)]  # ranks that bring rows, rows of each, choices


def inputs(groups: int, rows: int, choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with a gap between ranks, as they come out of an exchange, and how many rows of each rank count."""
    ids = torch.randint(-1, 8, (groups, 2, rows, choices), dtype=torch.int32)
    return ids[:, 0], torch.randint(rows + 1, (groups,), dtype=torch.int32)


def table(rank: int) -> torch.Tensor:
    return torch.tensor(Placement(8, {0: SLOTS}).table(0, rank), dtype=torch.int32)


@pytest.mark.parametrize("groups, rows, choices", CASES)
def test_each_pair_is_computed_once(groups: int, rows: int, choices: int) -> None:
    ids, live = inputs(groups, rows, choices)
    counts = torch.zeros(8, dtype=torch.int64)
    placed = [place_routes(ids, table(rank), live, counts if rank == 0 else None) for rank in range(3)]
    wanted = [0] * 8
    for t, (g, j) in enumerate((g, j) for g in range(groups) for j in range(rows)):
        for k in range(choices):
            expert = int(ids[g, j, k])
            computed = [(rank, int(slots[t, k])) for rank, slots in enumerate(placed) if slots[t, k] >= 0]
            if expert < 0 or j >= live[g]:
                assert not computed
                continue
            wanted[expert] += 1
            ((rank, slot),) = computed
            assert SLOTS[rank][slot] == expert
            holders = [rank for rank, held in enumerate(SLOTS) if expert in held]
            assert rank == holders[(g + j) % len(holders)]
    assert counts.tolist() == wanted


def test_without_a_limit_all_rows_count() -> None:
    ids, _ = inputs(2, 6, 3)
    everything = torch.full((2,), 6, dtype=torch.int32)
    for rank in range(3):
        assert torch.equal(place_routes(ids, table(rank)), place_routes(ids, table(rank), everything))


def test_no_rows() -> None:
    assert place_routes(torch.empty(1, 0, 8, dtype=torch.int32), table(0)).shape == (0, 8)


def check(groups: int, rows: int, choices: int, device: str) -> None:
    ids, live = inputs(groups, rows, choices)
    ids = ids[:, None].expand(-1, 2, -1, -1).contiguous().to(device)[:, 0]
    for limit in (None, live.to(device)):
        counts, wanted = (torch.zeros(8, dtype=torch.int64, device=device) for _ in range(2))
        expected = place_routes_twin(ids, table(1).to(device), limit, wanted)
        assert torch.equal(place_routes(ids, table(1).to(device), limit, counts), expected)
        assert torch.equal(counts, wanted)
        assert torch.equal(place_routes(ids, table(1).to(device), limit), expected)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernel_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("groups, rows, choices", CASES)
def test_interpreted(groups: int, rows: int, choices: int) -> None:
    check(groups, rows, choices, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("groups, rows, choices", [*CASES, (1, 4096, 9), (8, 512, 8)])
def test_gpu(groups: int, rows: int, choices: int) -> None:
    check(groups, rows, choices, "cuda")
