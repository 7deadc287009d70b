"""Attention of one row a sequence: splits, their sum, and what a captured graph asks for."""

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted
from paged_cases import LARGE, SMALL, Shape, check, pages, rows_of

from moe_nvfp4.kernels import decode_attention
from moe_nvfp4.kernels.decode_attention import num_splits
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.kernels.paged_attention import paged_attention, paged_attention_twin
from moe_nvfp4.kernels.paged_kv import PagedKV
from moe_nvfp4.kernels.rows import Rows

BATCHES = {
    "one": [(0, 1)],
    "long": [(700, 1)],
    "uneven": [(0, 1), (1, 1), (15, 1), (16, 1), (63, 1), (64, 1), (300, 1)],
}


def test_splits() -> None:
    """One program for each multiprocessor at most, one for each sequence and group at least, never more than tiles."""
    assert num_splits(1, 2, 16384, 32, 132) == 66
    assert num_splits(1, 2, 100, 32, 132) == 4
    assert num_splits(256, 2, 16384, 32, 132) == 1
    assert num_splits(1, 1, 10**6, 16, 132) == 128


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SMALL[:4])
def test_interpreted(shape: Shape, batch: str, multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor: few splits, of many tiles. 132: a tile each."""
    monkeypatch.setattr(decode_attention, "device_of", lambda index: (80, multiprocessors))
    check(BATCHES[batch], shape, torch.bfloat16, "cpu", gated=shape[0] == 4)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted_padding() -> None:
    """A padding row reads one position of a spare slot, and changes no other row."""
    kv = pages((16, 2, 32), 3, 50, torch.bfloat16, "cpu")
    kv.keys[kv.table[2].long()], kv.values[kv.table[2].long()] = torch.nan, torch.nan
    q = torch.randn(4, 4, 32).bfloat16()
    rows = Rows.of([(0, 49, 1), (1, 20, 1)])
    padded = Rows.of([(0, 49, 1), (1, 20, 1), (2, 0, 1), (2, 0, 1)])
    assert torch.equal(paged_attention(q[:2], kv, rows, 1.0), paged_attention(q, kv, padded, 1.0)[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", LARGE)
def test_gpu(shape: Shape, fp8: bool) -> None:
    for pieces in (*BATCHES.values(), [(length, 1) for length in range(1000, 3400, 37)]):
        check(pieces, shape, torch.bfloat16, "cuda", fp8=fp8, gated=not fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE[:3])
def test_captured(shape: Shape) -> None:
    """A graph reads lengths, slots and the table anew, and the same input gives the same bits."""
    heads, groups, head, page, window = shape
    kv = pages((page, groups, head), 4, 2048, torch.bfloat16, "cuda")
    q = torch.randn(3, heads, head, device="cuda").bfloat16()
    rows = rows_of([(5, 1), (5, 1), (5, 1)], "cuda")
    paged_attention(q, kv, rows, head**-0.5, window=window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, kv, rows, head**-0.5, window=window)
    for pieces in ([(1, 1), (300, 1), (2047, 1)], [(1500, 1), (0, 1), (64, 1)]):
        for static, new in zip(rows[:5], rows_of(pieces, "cuda")[:5], strict=True):
            static.copy_(new)
        graph.replay()
        first = out.clone()
        assert relative_error(out, paged_attention_twin(q, kv, rows, head**-0.5, window=window)) < 5e-3
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.gpu
def test_far_pages() -> None:
    """Pages beyond 2^31 elements of the keys."""
    shape = (2**31 // (64 * 2 * 256) + 8, 64, 2, 256)
    keys, values = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    keys[-4:].normal_()
    values[-4:].normal_()
    table = torch.arange(shape[0] - 4, shape[0], dtype=torch.int32, device="cuda")[None]
    kv, near = PagedKV(keys, values, table), PagedKV(keys[-4:], values[-4:], table - table[0, 0])
    q = torch.randn(1, 16, 256, device="cuda").bfloat16()
    rows = Rows.of([(0, 200, 1)], "cuda")
    assert torch.equal(paged_attention(q, kv, rows, 0.1), paged_attention(q, near, rows, 0.1))
