"""Dense linears of every format against float64: the choice of kernels, the twin, and weights that share x."""

import pytest
import torch
from torch import Tensor

from moe_nvfp4.kernels.dense import concatenate, dense_linear, dense_linear_torch
from moe_nvfp4.kernels.dense_rows import DenseWeight
from moe_nvfp4.kernels.fragments import FragmentTensor, to_fragments
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, encode_e4m3, quantize, relative_error

LIMIT = 1e-2
KINDS = ("nvfp4", "fp8", "fp8 rows", "bf16")


def weight_of(kind: str, rows: int, columns: int) -> tuple[DenseWeight, Tensor]:
    """A random weight and its values in float64."""
    plain = torch.randn(rows, columns) / columns**0.5
    if kind == "nvfp4":
        quantized = quantize(plain)
        return to_fragments(quantized), quantized.dequantize().double()
    if kind.startswith("fp8"):
        scale = torch.rand(rows) / 100 + 0.005 if kind == "fp8 rows" else torch.tensor(0.01)
        values = FP8Tensor(encode_e4m3(plain / scale.reshape(-1, 1)), scale)
        return values, values.dequantize().double()
    return plain.bfloat16(), plain.bfloat16().double()


def on(device: str, weight: DenseWeight) -> DenseWeight:
    if isinstance(weight, Tensor):
        return weight.to(device)
    return type(weight)(*(part.to(device) for part in weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 64), (3, 48, 128), (20, 32, 192)])
def test_twin(kind: str, rows: int, n: int, k: int) -> None:
    weight, values = weight_of(kind, n, k)
    x = torch.randn(rows, k).bfloat16()
    y = dense_linear(x, weight)
    assert (y.dtype, y.shape) == (torch.bfloat16, (rows, n))
    assert relative_error(y, x.double() @ values.T) < LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_concatenate(kind: str) -> None:
    parts = [weight_of(kind, n, 64) for n in (32, 16, 48)]
    x = torch.randn(2, 64).bfloat16()
    together = concatenate([weight for weight, _ in parts])
    assert together.shape == (96, 64)
    assert torch.equal(dense_linear(x, together), torch.cat([dense_linear(x, weight) for weight, _ in parts], dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str) -> None:
    weight, values = weight_of(kind, 48, 128)
    x = torch.randn(3, 128).bfloat16()
    y = dense_linear(x, weight, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert relative_error(y, x.double() @ values.T) < LIMIT
    assert torch.equal(y.bfloat16(), dense_linear(x, weight))


def test_padding() -> None:
    weight, values = weight_of("nvfp4", 20, 48)
    x = torch.randn(2, 48).bfloat16()
    y = dense_linear(x, weight)
    assert y.shape == (2, 32)
    assert relative_error(y[:, :20], x.double() @ values.T) < LIMIT
    assert not y[:, 20:].any()


def test_no_rows() -> None:
    assert dense_linear(torch.zeros(0, 64, dtype=torch.bfloat16), torch.zeros(5, 64).bfloat16()).shape == (0, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(512, 2048), (2112, 2816), (2816, 2112), (32, 2048), (272, 2688), (48, 8192)])
def test_on_gpu(kind: str, n: int, k: int) -> None:
    weight, values = weight_of(kind, n, k)
    weight, values = on("cuda", weight), values.cuda()
    for rows in (1, 7, 8, 9, 16, 17, 33, 64, 65, 300):
        x = torch.randn(rows, k, device="cuda").bfloat16()
        wanted = x.double() @ values.T
        for options in ({}, {"dependent": True}, {"plain": True}):
            assert relative_error(dense_linear(x, weight, **options), wanted) < LIMIT, (rows, options)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_float32_on_gpu(kind: str, rows: int) -> None:
    weight, values = weight_of(kind, 512, 2048)
    x, weight = torch.randn(rows, 2048, device="cuda").bfloat16(), on("cuda", weight)
    wanted = x.double() @ values.cuda().T
    for options in ({"dependent": True}, {"plain": True}):
        y = dense_linear(x, weight, out_dtype=torch.float32, **options)
        assert y.dtype == torch.float32
        assert relative_error(y, wanted) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8", "fp8 rows", "bf16"])
@pytest.mark.parametrize("n", [1, 3, 17, 31])
def test_odd_outputs(kind: str, n: int) -> None:
    weight, values = weight_of(kind, n, 2048)
    for rows in (1, 5, 16, 40, 100):
        x = torch.randn(rows, 2048).bfloat16()
        y = dense_linear(x.cuda(), on("cuda", weight))
        assert relative_error(y.cpu(), x.double() @ values.T) < LIMIT, rows


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_concatenated_on_gpu(kind: str, rows: int) -> None:
    parts = [weight_of(kind, n, 2048) for n in (512, 16, 256)]
    x = torch.randn(rows, 2048).bfloat16()
    y = dense_linear(x.cuda(), on("cuda", concatenate([weight for weight, _ in parts])))
    assert relative_error(y.cpu(), torch.cat([x.double() @ values.T for _, values in parts], dim=1)) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_repeatable_and_captured(kind: str) -> None:
    weight = on("cuda", weight_of(kind, 512, 2048)[0])
    for rows in (1, 16, 100):
        x = torch.randn(rows, 2048, device="cuda").bfloat16()
        first = dense_linear(x, weight, dependent=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            dense_linear(x, weight, dependent=True)
            again = dense_linear(x, weight, dependent=True)
        graph.replay()
        assert torch.equal(first, again)


def test_twin_of_concatenated_fragments() -> None:
    weight, _ = weight_of("nvfp4", 32, 64)
    assert isinstance(weight, FragmentTensor)
    halved = weight._replace(global_scale=weight.global_scale * torch.tensor([1.0, 0.5]))
    x = torch.randn(1, 64).bfloat16()
    whole, y = dense_linear_torch(x, weight), dense_linear_torch(x, halved)
    assert torch.equal(y[:, :16], whole[:, :16])
    assert relative_error(y[:, 16:], whole[:, 16:] / 2) < LIMIT
