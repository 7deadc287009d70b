"""The wgmma kernel for up to 256 rows: every tiling gives the product, on a GPU; tilings fit, without one."""

import pytest
import torch

from moe_nvfp4.kernels.compiling import SHARED_LIMIT, compile_case
from moe_nvfp4.kernels.dense import dense_linear_torch
from moe_nvfp4.kernels.dense_tiles import (
    MAX_ROWS,
    Tiling,
    compile_cases,
    dense_tiles,
    shared_bytes,
    spreads,
    tiling_for,
)
from moe_nvfp4.kernels.fragments import FragmentTensor, to_fragments
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, quantize, relative_error

LIMIT = 5e-3
TILINGS = (
    Tiling(4, 1, 32, 2, 4, 1), Tiling(8, 1, 32, 2, 3, 3), Tiling(4, 2, 64, 1, 4, 1), Tiling(8, 1, 64, 2, 3, 2),
    Tiling(4, 1, 64, 1, 4, 4), Tiling(8, 1, 128, 2, 3, 1), Tiling(8, 2, 128, 1, 4, 1), Tiling(8, 1, 256, 1, 3, 2),
)  # fmt: skip


def weights(n: int, k: int) -> dict[str, FP8Tensor | FragmentTensor]:
    """On the CPU; FP8 has every bit pattern but NaN, and a scale for each row; NVFP4 one for all."""
    bits = torch.randint(0, 256, (n, k)).to(torch.uint8)
    bits[bits % 128 == 127] = 0
    return {"nvfp4": to_fragments(quantize(torch.randn(n, k) / k**0.5)), "fp8": FP8Tensor(bits, torch.rand(n) + 0.1)}


@pytest.mark.parametrize("fragments", [False, True])
def test_tilings_fit(fragments: bool) -> None:
    for num_out in (1, 64, 512, 2048, 4096, 8192, 9216, 12288, 24576, 248320):
        for columns in (64, 512, 704, 2048, 2112, 2816, 4096, 8192):
            for rows in (17, 32, 33, 64, 65, 128, 129, MAX_ROWS):
                t = tiling_for(fragments, num_out, columns, rows)
                assert shared_bytes(t, fragments) <= SHARED_LIMIT[90], (num_out, columns, rows)
                assert 8 * t.warps <= t.tiles * t.columns  # no lane of x_layout repeats another
                stages = -(-columns // (64 * t.tiles))
                assert (t.split - 1) * -(-stages // t.split) < stages  # every program has a stage


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_uses_wgmma(name: str) -> None:
    case = next(case for case in compile_cases() if name in case.name and "64 rows" in case.name)
    kernel = compile_case(case, 90)
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n64k16" in ptx
    assert "mma.sync" not in ptx
    fragments, (num_out, columns) = name == "nvfp4", (248320, 2048) if name == "nvfp4" else (12288, 2048)
    assert kernel.metadata.shared == shared_bytes(tiling_for(fragments, num_out, columns, 64), fragments)


def test_spreads() -> None:
    assert spreads(Tiling(8, 1, 64, 2, 3, 6), True, 2816, 64)  # 132 programs
    assert not spreads(Tiling(8, 1, 64, 2, 3, 5), True, 2816, 64)  # 110, and two fit a multiprocessor
    assert spreads(Tiling(8, 1, 64, 2, 3, 1), False, 9216, 64)  # 72, but only one fits


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_tilings(kind: str, tiling: Tiling) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is of sm_90")
    for n, k in ((48, 192), (272, 2112)):
        weight = weights(n, k)[kind]
        weight = type(weight)(*(part.cuda() for part in weight))
        for rows in (1, 17, 64, 100, 256):
            x = torch.randn(rows, k, device="cuda").bfloat16()
            wanted = dense_linear_torch(x, weight, torch.float32)
            for dependent, dtype in ((False, torch.bfloat16), (True, torch.float32)):
                y = dense_tiles(x, weight, dependent=dependent, tiling=tiling, out_dtype=dtype)
                assert y.dtype == dtype
                assert relative_error(y, wanted) < LIMIT, (n, k, rows, dependent)
