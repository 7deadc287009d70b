"""A residual branch, its norm and the projections of it: the twin and the kernel against float64."""

from typing import Any

import pytest
import torch
from test_dense import on, weight_of
from torch import Tensor

from moe_nvfp4.kernels.compiling import SHARED_LIMIT
from moe_nvfp4.kernels.dense_rows import DenseWeight, Tiling
from moe_nvfp4.kernels.norm_linear import norm_linear, norm_linear_twin, tilings_for
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.kernels.residual_norms import Norm

LIMIT = 1e-2
STACKS = [
    [("fp8", 272), ("bf16", 64)],
    [("fp8 rows", 48)],
    [("bf16", 20)],
    [("nvfp4", 96), ("fp8", 33)],
    [("bf16", 16), ("nvfp4", 512)],
]
Known = tuple[DenseWeight, Tensor]  # a weight and its values


def norms(hidden: int, device: str = "cpu") -> list[Norm]:
    weight = torch.randn(hidden, device=device)
    return [Norm(weight.bfloat16() * 0.3, 1e-6, offset=True), Norm(weight, 1e-2), Norm(None, 1e-5)]


def check(rows: int, hidden: int, norm: Norm, known: list[Known], branch: bool, **options: Any) -> None:
    device = known[0][1].device
    x = torch.randn(rows, hidden, device=device).bfloat16()
    y = (3 * torch.randn(rows, hidden, device=device)).bfloat16() if branch else None
    exact = x.double() + (0 if y is None else y.double())
    normed = exact / (exact.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        normed = normed * (norm.weight.double() + norm.offset)
    before = x.clone()
    changed, outputs = norm_linear(x, y, norm, [weight for weight, _ in known], **options)
    assert torch.equal(x, before)
    assert (changed is x) == (not branch)
    assert relative_error(changed, exact) < LIMIT
    for output, (weight, values) in zip(outputs, known, strict=True):
        assert (output.dtype, output.shape) == (torch.bfloat16, (rows, weight.shape[0]))
        assert relative_error(output, normed @ values.T) < LIMIT


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("branch", [False, True])
def test_twin(stack: list[tuple[str, int]], branch: bool) -> None:
    known = [weight_of(kind, n, 128) for kind, n in stack if n % 16 == 0 or kind != "nvfp4"]
    for norm in norms(128):
        for rows in (1, 3):
            check(rows, 128, norm, known, branch)


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("sizes", [(12288, 64), (16, 8192), (1024,), (64, 64)])
def test_tilings(sizes: tuple[int, ...], rows: int) -> None:
    """All weights of a launch have the same warps, and shared memory is enough for the smallest GPUs."""
    weights = [torch.empty(n, 2048, dtype=torch.bfloat16, device="meta") for n in sizes]
    found = tilings_for(weights, rows)
    assert len(found) == len(sizes)
    assert len({tiling.warps for tiling in found}) == 1
    shared = max(1024 * tiling.warps * tiling.span * tiling.depth for tiling in found)
    assert shared + 2 * rows * 2048 < min(SHARED_LIMIT.values())


@pytest.mark.gpu
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("hidden", [192, 2048, 2688])
def test_on_gpu(stack: list[tuple[str, int]], hidden: int) -> None:
    known = [(on("cuda", weight), values.cuda()) for weight, values in (weight_of(k, n, hidden) for k, n in stack)]
    for norm in norms(hidden, "cuda"):
        for rows in (1, 2, 3, 7, 8, 9, 40):
            for branch in (True, False):
                check(rows, hidden, norm, known, branch)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [Tiling(8, 1, 4, 1), Tiling(4, 2, 2, 1), Tiling(16, 1, 1, 1), Tiling(4, 3, 5, 1)])
def test_each_tiling(tiling: Tiling) -> None:
    known = [
        (on("cuda", weight), values.cuda())
        for weight, values in (weight_of("fp8", 80, 2048), weight_of("bf16", 48, 2048))
    ]
    for rows in (1, 5):
        check(rows, 2048, norms(2048, "cuda")[0], known, True, tilings=[tiling, Tiling(tiling.warps, 1, 3, 1)])


@pytest.mark.gpu
def test_repeatable_and_captured() -> None:
    hidden, norm = 2048, norms(2048, "cuda")[0]
    weights = [on("cuda", weight_of(kind, n, hidden)[0]) for kind, n in (("fp8", 1024), ("bf16", 64))]
    for rows in (1, 8):
        x, y = torch.randn(2, rows, hidden, device="cuda").bfloat16()
        first_x, first = norm_linear(x, y, norm, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step_x, _ = norm_linear(x, y, norm, weights)
            again_x, again = norm_linear(step_x, y, norm, weights)
        graph.replay()
        wanted_x, wanted = norm_linear(first_x, y, norm, weights)
        assert torch.equal(wanted_x, again_x)
        assert all(map(torch.equal, wanted, again))
        assert all(
            relative_error(a, b) < LIMIT for a, b in zip(first, norm_linear_twin(x, y, norm, weights)[1], strict=True)
        )
