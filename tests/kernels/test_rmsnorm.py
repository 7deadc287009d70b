"""RMS norm against a loop in Python floats."""

import math

import pytest
import torch

from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.rmsnorm import rmsnorm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 8), (5, 48), (3, 4, 32)])
def test_rmsnorm(shape: tuple[int, ...], dtype: str) -> None:
    x = (3 * torch.randn(shape)).to(getattr(torch, dtype))
    weight = torch.randn(shape[-1]).to(x.dtype)
    wanted = []
    for row in x.reshape(-1, shape[-1]).tolist():
        scale = 1 / math.sqrt(sum(value * value for value in row) / len(row) + 1e-3)
        wanted.append([value * scale * w for value, w in zip(row, weight.tolist(), strict=True)])
    found = rmsnorm(x, weight, 1e-3)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    expected = torch.tensor(wanted, dtype=torch.float64).view(shape)
    assert relative_error(found, expected) < TOLERANCE[dtype]


def test_small_and_large_rows() -> None:
    """Squares are taken in float32 also for types that would overflow or vanish."""
    weight = torch.ones(4)
    assert torch.allclose(rmsnorm(torch.full((1, 4), 3e4).half(), weight, 1e-6).float(), torch.ones(1, 4), rtol=1e-3)
    assert rmsnorm(torch.zeros(1, 4), weight, 1e-6).eq(0).all()


def test_rounding_before_the_weight() -> None:
    """bfloat16: the normed value is rounded first, the product once more."""
    x, weight = torch.randn(6, 64).bfloat16(), torch.randn(64).bfloat16()
    wide = x.float()
    normed = (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(rmsnorm(x, weight, 1e-6), normed * weight)
