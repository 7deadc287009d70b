"""Attention of many rows a sequence: unequal pieces in one launch, windows, and rows that continue a prompt."""

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted
from paged_cases import LARGE, SMALL, Shape, check

PIECES = {
    "one": [(0, 5)],
    "continued": [(130, 90), (61, 2)],
    "unequal": [(0, 2), (0, 129), (3, 17)],
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("shape", SMALL)
def test_interpreted(shape: Shape, pieces: str) -> None:
    check(PIECES[pieces], shape, torch.bfloat16, "cpu", gated=shape[0] == 4)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", LARGE)
def test_gpu(shape: Shape, fp8: bool) -> None:
    for pieces in (*PIECES.values(), [(0, 700), (1900, 300), (100, 41)]):
        check(pieces, shape, torch.bfloat16, "cuda", fp8=fp8, gated=not fp8)
