"""The tensor-core kernel for few rows: every tiling gives the product, on a GPU."""

import pytest
import torch

from moe_nvfp4.kernels.compiling import SHARED_LIMIT
from moe_nvfp4.kernels.dense import dense_linear_torch
from moe_nvfp4.kernels.dense_rows import Tiling, dense_rows, fits, tiling_for
from moe_nvfp4.kernels.fragments import to_fragments
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, quantize, relative_error

LIMIT = 5e-3


def weights(n: int, k: int) -> dict[str, tuple]:
    """On the CPU; FP8 has every bit pattern but NaN, and a scale for each row."""
    plain = torch.randn(n, k) / k**0.5
    bits = torch.randint(0, 256, (n, k)).to(torch.uint8)
    bits[bits % 128 == 127] = 0
    return {
        "nvfp4": to_fragments(quantize(plain)),
        "fp8": FP8Tensor(bits, torch.rand(n) + 0.1),
        "bf16": plain.bfloat16(),
    }


@pytest.mark.parametrize("kind", ["nvfp4", "fp8", "bf16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_shared_memory(kind: str, groups: int) -> None:
    for strips in (1, 32, 140, 160, 400, 512, 4096, 16384):
        for tiles in (1, 33, 64, 256):
            tiling = tiling_for(kind, strips, tiles, groups)
            copies = 1 if kind == "nvfp4" else 2
            assert 512 * copies * tiling.warps * tiling.span * tiling.depth <= min(SHARED_LIMIT.values())


def test_fits() -> None:
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    assert fits(x, torch.zeros(3, 64, dtype=torch.bfloat16))
    assert not fits(x[:, :48], torch.zeros(3, 48, dtype=torch.bfloat16))
    assert not fits(torch.zeros(1, 65, dtype=torch.bfloat16)[:, 1:], torch.zeros(3, 64, dtype=torch.bfloat16))
    assert not fits(x.float(), torch.zeros(3, 64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nvfp4", "fp8", "bf16"])
@pytest.mark.parametrize(
    "tiling", [Tiling(8, 1, 4, 4), Tiling(4, 2, 2, 2), Tiling(16, 1, 1, 1), Tiling(1, 3, 5, 2), Tiling(2, 4, 2, 1)]
)
@pytest.mark.parametrize("rows", [1, 8, 12, 40])
def test_tilings(kind: str, tiling: Tiling, rows: int) -> None:
    for n, k in ((48, 192), (112, 2112)):
        weight = weights(n, k)[kind]
        weight = weight.cuda() if kind == "bf16" else type(weight)(*(part.cuda() for part in weight))
        x = torch.randn(rows, k, device="cuda").bfloat16()
        for dependent in (False, True):
            y = dense_rows(x, weight, dependent=dependent, tiling=tiling)
            assert relative_error(y, dense_linear_torch(x, weight)) < LIMIT, (n, k, dependent)
