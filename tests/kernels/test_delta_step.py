"""One row of each sequence: the fused launch against the definition in float64, on a GPU; Gluon has no interpreter."""

import pytest
import torch
from delta_cases import DECODES, EPS, QWEN, SMALL, check, layer, reference

from moe_nvfp4.kernels.delta_net import DeltaInputs, DeltaState, Heads, delta_net_kernels
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.rows import Rows

DTYPES = [torch.float32, torch.bfloat16]


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE["float32" if dtype == torch.float32 else "bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [SMALL, QWEN, Heads(16, 64, 128, 128)])
def test_gpu(heads: Heads, dtype: torch.dtype) -> None:
    check(heads, DECODES, dtype, tolerance(dtype), "cuda")


@pytest.mark.gpu
def test_many_tokens_in_a_graph() -> None:
    """From an empty slot to position 12; positions and inputs change under one captured graph."""
    heads, count = Heads(4, 8, 128, 128), 12
    pieces = [(1, 0, count)]
    case = layer(heads, pieces, torch.float32, "cuda")
    expected, after = reference(case, pieces)
    rows = Rows.of([(1, 0, 1)], "cuda")
    inputs = DeltaInputs(*(x[:1].clone() for x in case.inputs))
    spare = DeltaState(*(x.clone() for x in case.state))
    delta_net_kernels(inputs, case.weights, spare, rows, EPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = delta_net_kernels(inputs, case.weights, case.state, rows, EPS)
    for position in range(count):
        for target, source in zip(inputs, case.inputs, strict=True):
            target.copy_(source[position : position + 1])
        rows.lengths.fill_(position + 1)
        graph.replay()
        assert relative_error(out[0].cpu(), expected[position]) < TOLERANCE["float32"]
    assert relative_error(case.state.recurrent[1].cpu(), after.recurrent[1]) < TOLERANCE["float32"]
