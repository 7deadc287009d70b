"""Several rows of each sequence: the chunked launches against the definition in float64, long ones against the twin."""

import pytest
import torch
from delta_cases import EPS, PREFILLS, QWEN, SMALL, STEPS, check, check_lines, layer
from interpreted import INTERPRETED, run_interpreted

from moe_nvfp4.kernels.delta_net import DeltaInputs, delta_net_kernels, delta_net_twin
from moe_nvfp4.kernels.delta_state import Heads
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.rows import Rows

DTYPES = [torch.float32, torch.bfloat16]
# float16 operands; what rounding the output to bfloat16 adds is in the other.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: TOLERANCE["bfloat16"]}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("step", "heads", "dtype"),
    [
        *((step, SMALL, dtype) for step in ("mixed", "decode") for dtype in DTYPES),
        ("mixed", Heads(1, 1, 16, 32), torch.bfloat16),
    ],
)
def test_interpreted(step: str, heads: Heads, dtype: torch.dtype) -> None:
    check(heads, STEPS[step], dtype, TOLERANCES[dtype])


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_interpreted_scales(scale: float) -> None:
    check(SMALL, PREFILLS[:2], torch.float32, 2e-3, scale=scale)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted_lines() -> None:
    check_lines(SMALL, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [SMALL, QWEN])
def test_lines_gpu(heads: Heads, dtype: torch.dtype) -> None:
    check_lines(heads, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [SMALL, Heads(2, 8, 128, 128), Heads(2, 4, 64, 64)])
@pytest.mark.parametrize("step", ["prefill", "mixed"])
def test_gpu(step: str, heads: Heads, dtype: torch.dtype) -> None:
    check(heads, STEPS[step], dtype, TOLERANCES[dtype], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scales_gpu(scale: float) -> None:
    check(Heads(2, 4, 128, 128), PREFILLS, torch.float32, 2e-3, "cuda", scale)


@pytest.mark.gpu
def test_long_prompts() -> None:
    """Against the twin in float64, at the size of a layer of Qwen3.6, continued in a second step."""
    steps = [[(2, 0, 1500), (0, 0, 2048), (1, 0, 37)], [(2, 1500, 63), (0, 2048, 700), (1, 37, 200)]]
    cases = [layer(QWEN, pieces, torch.float32, "cuda") for pieces in steps]
    state = cases[0].state
    weights = cases[0].weights
    exact = state._replace(conv=state.conv.double(), recurrent=state.recurrent.double(), written=state.written.clone())
    for pieces, case in zip(steps, cases, strict=True):
        inputs, rows = DeltaInputs(*(x.double() for x in case.inputs)), Rows.of(pieces, "cuda")
        expected = delta_net_twin(inputs, weights, exact, rows, EPS)
        actual = delta_net_kernels(DeltaInputs(*case.inputs), weights, state, rows, EPS)
        assert relative_error(actual, expected) < TOLERANCES[torch.float32]
        assert relative_error(state.recurrent, exact.recurrent) < TOLERANCES[torch.float32]
