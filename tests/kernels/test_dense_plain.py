"""The plain Triton products and decodings, in Triton's interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_nvfp4.kernels.dense_plain import decode_rows, decode_rows_torch, dense_plain
from moe_nvfp4.kernels.fragments import to_fragments
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, encode_e4m3, quantize, relative_error

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-2


def weights(rows: int, columns: int, device: str = "cpu") -> dict[str, tuple]:
    """Each kind of weight with its values in float64; FP8 has every bit pattern but NaN."""
    plain = torch.randn(rows, columns) / columns**0.5
    bits = torch.randint(0, 256, (rows, columns)).to(torch.uint8)
    bits[bits % 128 == 127] = 0
    found = {
        "nvfp4": quantize(plain),
        "fp8": FP8Tensor(encode_e4m3(plain * 100), torch.tensor(0.01)),
        "fp8 rows": FP8Tensor(bits, torch.rand(rows) + 0.1),
        "bf16": plain.bfloat16(),
    }
    out = {}
    for name, weight in found.items():
        values = weight.double() if name == "bf16" else weight.dequantize().double()
        weight = to_fragments(weight) if name == "nvfp4" else weight
        out[name] = (weight.to(device) if name == "bf16" else type(weight)(*(p.to(device) for p in weight)), values)
    return out


def check(rows: int, n: int, k: int, device: str, limit: float) -> None:
    for name, (weight, values) in weights(n, k, device).items():
        x = torch.randn(rows, k).bfloat16()
        assert relative_error(dense_plain(x.to(device), weight).cpu(), x.double() @ values.T) < limit, name
        if name != "bf16":
            start, stop = (16, n) if n > 16 else (0, n)
            decoded = decode_rows(weight, start, stop)
            twin = decode_rows_torch(weight, start, stop)
            assert decoded.shape == twin.shape == (stop - start, k)
            assert relative_error(decoded.cpu(), values[start:stop]) < limit, name
            if device == "cuda":
                assert torch.equal(decoded, twin), name


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "fp8 rows"])
def test_twin(name: str) -> None:
    weight, values = weights(48, 128)[name]
    for start, stop in ((0, 48), (16, 48), (32, 40)):
        assert torch.equal(decode_rows_torch(weight, start, stop), values[start:stop].float().bfloat16())


def test_in_the_interpreter() -> None:
    # The interpreter cuts float32 to bfloat16 instead of rounding it.
    code = "from test_dense_plain import *\nfor shape in ((3, 48, 128), (70, 16, 64)): check(*shape, 'cpu', 2e-2)"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 64), (5, 2112, 2816), (16, 2816, 2112), (100, 272, 2688)])
def test_on_gpu(rows: int, n: int, k: int) -> None:
    check(rows, n, k, "cuda", LIMIT)
