"""Attention over pages: the twin against float64 by the definition; both kernels in the interpreter and on a GPU."""

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted
from paged_cases import LARGE, MIXED, SMALL, Shape, check, pages
from transformers.models.gemma4.modeling_gemma4 import eager_attention_forward

from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.paged_attention import paged_attention
from moe_nvfp4.kernels.paged_kv import gather_twin
from moe_nvfp4.kernels.rows import Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [*SMALL, (4, 2, 48, 16, 0)])
def test_twin(shape: Shape, gated: bool, dtype: torch.dtype) -> None:
    check(MIXED, shape, dtype, "cpu", gated=gated)


def test_twin_reads_fp8() -> None:
    check(MIXED, SMALL[0], torch.float32, "cpu", fp8=True)


def test_no_rows() -> None:
    kv = pages((16, 2, 32), 1, 16, torch.float32, "cpu")
    assert paged_attention(torch.zeros(0, 4, 32), kv, Rows.of([]), 1.0).shape == (0, 4, 32)


def test_gemma() -> None:
    """A window layer as transformers computes it: groups, scale 1, i - j < window."""
    rows, kv = Rows.of([(0, 0, 40)]), pages((16, 2, 32), 1, 40, torch.float32, "cpu")
    q = torch.randn(40, 4, 32) / 5
    k, v = (x.transpose(0, 1)[None] for x in gather_twin(kv, 0, 0, 40, torch.float32))
    apart = torch.arange(40)[:, None] - torch.arange(40)
    mask = torch.zeros(40, 40).masked_fill((apart < 0) | (apart >= 12), float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    wanted, _ = eager_attention_forward(module, q.transpose(0, 1)[None], k, v, mask[None, None], scaling=1.0)
    assert relative_error(paged_attention(q, kv, rows, 1.0, window=12), wanted[0]) < TOLERANCE["float32"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", SMALL)
def test_interpreted(shape: Shape, fp8: bool) -> None:
    check(MIXED, shape, torch.bfloat16, "cpu", fp8=fp8, gated=shape[0] == 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(dtype: torch.dtype) -> None:
    for shape in (*SMALL, *LARGE, (4, 2, 48, 16, 0)):
        for fp8 in (False, True):
            check(MIXED, shape, dtype, "cuda", fp8=fp8, gated=fp8)
