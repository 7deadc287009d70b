"""Rotary embedding against complex multiplication in Python."""

import cmath

import pytest
import torch

from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.rope import rope, rope_table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [2, 16, 32])
def test_pairs_rotate(dim: int, dtype: str) -> None:
    kind = getattr(torch, dtype)
    positions, frequencies = torch.tensor([0, 1, 7, 300]), 100.0 ** (-torch.arange(dim // 2) / dim * 2)
    x = torch.randn(4, 3, dim).to(kind)
    found = rope(x, *rope_table(positions, frequencies, kind))
    wanted = torch.empty(4, 3, dim, dtype=torch.float64)
    for t, position in enumerate(positions.tolist()):
        for head in range(3):
            for i, frequency in enumerate(frequencies.tolist()):
                pair = complex(x[t, head, i].item(), x[t, head, i + dim // 2].item())
                turned = pair * cmath.exp(1j * position * frequency)
                wanted[t, head, i], wanted[t, head, i + dim // 2] = turned.real, turned.imag
    assert (found.dtype, found.shape) == (kind, x.shape)
    assert relative_error(found, wanted) < TOLERANCE[dtype]
    assert torch.equal(found[0], x[0])  # position 0 is the identity


def test_zero_frequencies_pass_through() -> None:
    x, frequencies = torch.randn(2, 1, 8), torch.tensor([1.0, 0.5, 0.0, 0.0])
    found = rope(x, *rope_table(torch.tensor([3, 9]), frequencies, torch.float32))
    assert torch.equal(found[..., [2, 3, 6, 7]], x[..., [2, 3, 6, 7]])


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16)
    frequencies = 100.0 ** (-torch.arange(8) / 8)

    def score(m: int, n: int) -> float:
        tables = [rope_table(torch.tensor([position]), frequencies, torch.float32) for position in (m, n)]
        return float((rope(q, *tables[0]) * rope(k, *tables[1])).sum())

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-3)
