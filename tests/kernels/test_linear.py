"""Linear layers with weights of every format, against float64 sums over values decoded here."""

import pytest
import torch

from moe_nvfp4.kernels import linear as linear_module
from moe_nvfp4.kernels.linear import DenseWeight, embedding, linear
from moe_nvfp4.kernels.nvfp4 import TOLERANCE, FP8Tensor, NVFP4Tensor, quantize, relative_error

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def e4m3(bits: int) -> float:
    sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -value if sign else value


def decoded(weight: DenseWeight) -> torch.Tensor:
    """[N, K] in float64, from the definition of the formats."""
    if isinstance(weight, NVFP4Tensor):
        rows = []
        for codes, scales in zip(weight.codes.tolist(), weight.block_scales.tolist(), strict=True):
            nibbles = [nibble for byte in codes for nibble in (byte & 15, byte >> 4)]
            rows.append([E2M1[nibble] * e4m3(scales[k // 16]) for k, nibble in enumerate(nibbles)])
        return torch.tensor(rows, dtype=torch.float64) * weight.global_scale.double()
    if isinstance(weight, FP8Tensor):
        values = torch.tensor([[e4m3(bits) for bits in row] for row in weight.values.tolist()], dtype=torch.float64)
        return values * (weight.scale.double()[:, None] if weight.scale.ndim else weight.scale.double())
    return weight.double()


def weight_of(kind: str, rows: int, columns: int) -> DenseWeight:
    plain = torch.randn(rows, columns) / columns**0.5
    if kind == "nvfp4":
        return quantize(plain)
    if kind.startswith("fp8"):
        values = (plain * 64).to(torch.float8_e4m3fn).view(torch.uint8)
        return FP8Tensor(values, torch.rand(rows) + 0.5 if kind == "fp8 rows" else torch.tensor(1 / 64))
    return plain.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[kind])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "fp8 rows", "nvfp4"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 7, 48), (5, 33, 64), (40, 1, 16)])
def test_linear(monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str, rows: int, n: int, k: int) -> None:
    weight, x = weight_of(kind, n, k), torch.randn(rows, k).to(getattr(torch, dtype))
    wanted = x.double() @ decoded(weight).T
    whole = linear(x, weight)
    assert (whole.dtype, whole.shape) == (x.dtype, (rows, n))
    assert relative_error(whole, wanted) < TOLERANCE[dtype]
    monkeypatch.setattr(linear_module, "_ROWS", 4)  # in blocks of rows, the last one short
    assert relative_error(linear(x, weight), wanted) < TOLERANCE[dtype]


def test_rows_do_not_mix() -> None:
    weight, x = weight_of("nvfp4", 24, 48), torch.randn(4, 48)
    clean = linear(x, weight)
    x[2] = float("nan")
    spoiled = linear(x, weight)
    assert spoiled[2].isnan().all()
    assert relative_error(spoiled[[0, 1, 3]], clean[[0, 1, 3]]) < TOLERANCE["float32"]


def test_embedding() -> None:
    table, ids = torch.randn(10, 4).bfloat16(), torch.tensor([3, 3, 0, 9])
    rows = embedding(ids, table, torch.float32)
    assert rows.dtype == torch.float32
    assert rows.tolist() == [table[i].tolist() for i in ids.tolist()]
