"""The convolution of prompts: float16 heads against a convolution in float64."""

import pytest
import torch
from delta_cases import PREFILLS, SMALL, TAPS, Layer, layer
from interpreted import INTERPRETED, run_interpreted
from torch.nn import functional as F

from moe_nvfp4.kernels.delta_conv import delta_conv
from moe_nvfp4.kernels.delta_state import Heads
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.kernels.rows import CHUNK, Rows


def reference(case: Layer, row: int, piece: tuple[int, int, int]) -> torch.Tensor:
    """[rows, C] of the sequence that begins at `row`."""
    slot, before, count = piece
    past = [
        case.state.conv[slot, p % TAPS] if p >= 0 else 0 * case.inputs.mixed_TC[0] for p in range(before - 3, before)
    ]
    padded = torch.cat((torch.stack(past), case.inputs.mixed_TC[row : row + count])).double().T
    return F.silu(F.conv1d(padded[None], case.weights.conv.double()[:, None], groups=len(padded))[0].T)


def check(heads: Heads, dtype: torch.dtype, device: str, scale: float = 1.0) -> None:
    case = layer(heads, PREFILLS, dtype, device, scale)
    chunks = delta_conv(case.inputs.mixed_TC, case.weights.conv, case.state, Rows.of(PREFILLS, device))
    row = 0
    for index, piece in enumerate(PREFILLS):
        y, count = reference(case, row, piece), piece[2]
        places = slice(row // CHUNK + index, row // CHUNK + index + -(-count // CHUNK))
        for head in range(2 * heads.HK):
            expected = F.normalize(y[:, head * heads.DK : (head + 1) * heads.DK], dim=1)
            actual = (chunks.q if head < heads.HK else chunks.k)[places, head % heads.HK]
            assert actual.isfinite().all()
            assert relative_error(actual.flatten(0, 1)[:count], expected) < 5e-4
        for head in range(heads.HV):
            at = 2 * heads.HK * heads.DK + head * heads.DV
            actual = chunks.v[places, head].double() * chunks.units[places, head, None, None]
            assert actual.isfinite().all() and chunks.v[places, head].abs().max() <= 16.01
            assert relative_error(actual.flatten(0, 1)[:count], y[:, at : at + heads.DV]) < 5e-4
        row += count


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernel_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("heads", [SMALL, Heads(2, 2, 16, 32)])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e6), (torch.bfloat16, 1.0)])
def test_interpreted(heads: Heads, dtype: torch.dtype, scale: float) -> None:
    check(heads, dtype, "cpu", scale)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [SMALL, Heads(2, 2, 16, 32), Heads(2, 4, 128, 128), Heads(1, 3, 256, 64)])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e6), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-6)])
def test_gpu(heads: Heads, dtype: torch.dtype, scale: float) -> None:
    check(heads, dtype, "cuda", scale)
