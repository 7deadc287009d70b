"""Pages: what is stored comes back, through tables of any order, and kernels read E4M3 bits exactly."""

import pytest
import torch
import triton
import triton.language as tl
from interpreted import INTERPRETED, run_interpreted

from moe_nvfp4.kernels.nvfp4 import decode_e4m3, encode_e4m3
from moe_nvfp4.kernels.paged_kv import PagedKV, gather_twin, operand, store_twin
from moe_nvfp4.kernels.rows import Rows


@pytest.mark.parametrize("fp8", [False, True])
def test_stored_and_gathered(fp8: bool) -> None:
    dtype = torch.uint8 if fp8 else torch.float32
    kv = PagedKV(
        torch.zeros(6, 16, 2, 8, dtype=dtype),
        torch.zeros(6, 16, 2, 8, dtype=dtype),
        torch.tensor([[3, 1, 0], [5, 2, 4]], dtype=torch.int32),
        k_scale=0.5,
        v_scale=2.0,
    )
    rows = Rows.of([(1, 0, 35), (0, 0, 20)])
    k, v = torch.randn(55, 2, 8), torch.randn(55, 2, 8)
    store_twin(kv, rows.positions, rows.row_slots, k, v)
    if fp8:
        k, v = decode_e4m3(encode_e4m3(k / 0.5)) * 0.5, decode_e4m3(encode_e4m3(v / 2)) * 2
    for slot, first, length, begin in ((1, 0, 35, 0), (1, 17, 35, 17), (0, 3, 20, 38)):
        keys, values = gather_twin(kv, slot, first, length, torch.float32)
        assert torch.equal(keys, k[begin : begin + length - first])
        assert torch.equal(values, v[begin : begin + length - first])


def test_ring() -> None:
    """A table that repeats two pages keeps the last positions."""
    kv = PagedKV(torch.zeros(2, 16, 1, 4), torch.zeros(2, 16, 1, 4), torch.tensor([[1, 0, 1, 0]], dtype=torch.int32))
    k = torch.randn(50, 1, 4)
    for position in range(50):
        rows = Rows.of([(0, position, 1)])
        store_twin(kv, rows.positions, rows.row_slots, k[position : position + 1], k[position : position + 1])
    assert torch.equal(gather_twin(kv, 0, 20, 50, torch.float32)[0], k[20:50])


@triton.jit
def decode_kernel(bits_ptr, out_ptr, KIND: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, operand(tl.load(bits_ptr + i), KIND).to(tl.float32))


def check_every_value(device: str, kind: tl.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, device=device)
    decode_kernel[(1,)](bits, out, KIND=kind)
    finite = bits & 0x7F != 0x7F
    assert torch.equal(out[finite], decode_e4m3(bits)[finite])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted() -> None:
    check_every_value("cpu", tl.float32)


@pytest.mark.gpu
def test_gpu() -> None:
    check_every_value("cuda", tl.float32)
    check_every_value("cuda", tl.bfloat16)
