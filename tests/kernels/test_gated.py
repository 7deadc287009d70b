"""Gated activations and gated shares against float64, and the kernels against that too."""

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted
from torch.nn import functional as F

from moe_nvfp4.kernels.gated import _MANY_ROWS, add_gated_share, gated
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error

KINDS = ["silu", "gelu_tanh"]
SMALL = [(1, 48), (1, 512), (3, 2112), (5, 7), (_MANY_ROWS, 24), (_MANY_ROWS + 3, 270)]  # rows, width
LARGE = [(1, 2048), (17, 2112), (257, 512), (4099, 2816)]


def reference(x: torch.Tensor, kind: str) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up


def check_gated(rows: int, width: int, kind: str, dtype: torch.dtype, device: str) -> None:
    """Of a view whose rows lie apart by an odd number."""
    x = (2 * torch.randn(rows, 2 * width + 3)).to(dtype).to(device)[:, 2:-1]
    found = gated(x, kind)
    assert (found.shape, found.dtype, found.is_contiguous()) == ((rows, width), dtype, True)
    assert relative_error(found, reference(x, kind)) < TOLERANCE[str(dtype).split(".")[1]]


def check_share(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    y = torch.randn(rows, width).to(dtype).to(device)
    joined = (3 * torch.randn(rows, width + 1)).to(dtype).to(device)
    shared, gate = joined[:, :width], joined[:, width:]
    found = add_gated_share(y, shared, gate)
    expected = y.double() + gate.double().sigmoid() * shared.double()
    assert (found.shape, found.dtype) == ((rows, width), dtype)
    assert relative_error(found, expected) < TOLERANCE[str(dtype).split(".")[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, width", [*SMALL, (0, 32)])
def test_twin(rows: int, width: int, kind: str, dtype: torch.dtype) -> None:
    check_gated(rows, width, kind, dtype, "cpu")
    check_share(rows, width, dtype, "cpu")


def test_infinite_gates() -> None:
    gate = torch.tensor([[-torch.inf], [torch.inf]])
    found = add_gated_share(torch.ones(2, 3), torch.full((2, 3), 2.0), gate)
    assert found.tolist() == [[1.0] * 3, [3.0] * 3]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, width", SMALL)
def test_interpreted(rows: int, width: int, kind: str) -> None:
    check_gated(rows, width, kind, torch.bfloat16, "cpu")
    check_share(rows, width, torch.bfloat16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, width", [*SMALL, *LARGE])
def test_gpu(rows: int, width: int, kind: str) -> None:
    check_gated(rows, width, kind, torch.bfloat16, "cuda")
    check_share(rows, width, torch.bfloat16, "cuda")
