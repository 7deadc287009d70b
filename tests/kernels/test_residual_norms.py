"""Residual additions and norms: the twin against transformers' layers and float64, the kernel against float64."""

from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted

from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.residual_norms import Norm, residual_norms

# Kinds of norms: "w" weight, "o" one plus weight, "f" weight in float32, "-" no weight, "" no norm.
RECIPES: dict[str, dict[str, Any]] = {
    "norms only": {"branches": [], "outputs": ["w"]},
    "three norms": {"branches": [], "outputs": ["o", "-", "f"]},
    "scalar only": {"branches": [], "outputs": [], "scalar": True},
    "Qwen": {"branches": [""], "outputs": ["o"]},
    "last": {"branches": [""], "outputs": []},
    "two bare": {"branches": ["", ""], "outputs": ["w", "w"]},
    "mixed": {"branches": ["", "w"], "outputs": ["w"], "after": "-"},
    "Gemma attention": {"branches": ["w"], "outputs": ["w", "w", "f"]},
    "Gemma experts": {"branches": ["w", "w"], "outputs": ["w"], "after": "w", "scalar": True},
}
SMALL = [(1, 64), (3, 96), (2, 2816), (1, 7)]  # rows, hidden
LARGE = [(1, 2048), (5, 2816), (33, 4096), (7, 5376), (511, 3072), (4099, 2048)]


def norm(kind: str, hidden: int, dtype: torch.dtype, device: str) -> Norm | None:
    eps = {"o": 1e-6, "-": 1e-5}.get(kind, 1e-3)
    if not kind:
        return None
    if kind == "-":
        return Norm(None, eps)
    weight = (torch.randn(hidden) * 0.3 + (kind != "o")).to(torch.float32 if kind == "f" else dtype)
    return Norm(weight.to(device), eps, kind == "o")


def expected_norm(x: torch.Tensor, rule: Norm | None) -> torch.Tensor:
    if rule is None:
        return x
    x = x / (x.square().mean(-1, keepdim=True) + rule.eps).sqrt()
    return x if rule.weight is None else x * (rule.weight.double() + rule.offset)


def check(rows: int, hidden: int, recipe: str, dtype: torch.dtype, device: str) -> None:
    wanted = RECIPES[recipe]
    x = torch.randn(rows, hidden).to(dtype).to(device)
    branches = [
        ((torch.randn(rows, hidden) * 3**i).to(dtype).to(device), norm(kind, hidden, dtype, device))
        for i, kind in enumerate(wanted["branches"])
    ]
    outputs = [found for kind in wanted["outputs"] if (found := norm(kind, hidden, dtype, device))]
    after = norm(wanted.get("after", ""), hidden, dtype, device)
    scalar = torch.tensor([0.0625 * 11]).to(dtype).to(device) if wanted.get("scalar") else None
    before = x.clone()
    found, normed = residual_norms(x, branches, outputs, after=after, scalar=scalar)

    exact = x.double()
    if branches:
        exact = exact + expected_norm(sum(expected_norm(y.double(), n) for y, n in branches), after)  # type: ignore
    if scalar is not None:
        exact = exact * scalar.double()
    tolerance = TOLERANCE[str(dtype).split(".")[1]]
    assert torch.equal(x, before)
    assert (found.dtype, found.shape, len(normed)) == (dtype, x.shape, len(outputs))
    assert relative_error(found, exact) < tolerance
    for actual, rule in zip(normed, outputs, strict=True):
        assert (actual.dtype, actual.shape) == (dtype, x.shape)
        assert relative_error(actual, expected_norm(exact, rule)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_twin(recipe: str, dtype: torch.dtype) -> None:
    for rows, hidden in [*SMALL, (0, 16)]:
        check(rows, hidden, recipe, dtype, "cpu")
    x = torch.randn(2, 8, dtype=dtype)
    assert residual_norms(x, [], [])[0] is x


def test_norms_of_transformers() -> None:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    x, weight = torch.randn(5, 96), torch.randn(96)
    layers = (Qwen3MoeRMSNorm(96, 1e-6), Qwen3_5MoeRMSNorm(96, 1e-6), Gemma4RMSNorm(96, 1e-6))
    for layer in layers:
        layer.weight.data = weight
    rules = [Norm(weight, 1e-6), Norm(weight, 1e-6, offset=True), Norm(weight, 1e-6)]
    _, found = residual_norms(x, [], rules)
    for actual, layer in zip(found, layers, strict=True):
        torch.testing.assert_close(actual, layer(x), rtol=1e-5, atol=1e-6)
    bare = residual_norms(x, [], [Norm(None, 1e-6)])[1][0]
    torch.testing.assert_close(bare, Gemma4RMSNorm(96, 1e-6, with_scale=False)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows, hidden", SMALL)
def test_interpreted(rows: int, hidden: int, recipe: str) -> None:
    check(rows, hidden, recipe, torch.bfloat16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_gpu(recipe: str) -> None:
    for rows, hidden in [*SMALL, *LARGE]:
        check(rows, hidden, recipe, torch.bfloat16, "cuda")


def check_unrounded(device: str) -> None:
    """The norm sees x' before it is rounded: 1 + 2^-9 is 1 in x', but not in the norm."""
    x, y = torch.ones(1, 16).bfloat16(), torch.zeros(1, 16).bfloat16()
    y[0, :8] = 2.0**-9
    weight = torch.full((16,), 0.752).to(device)
    found, (normed,) = residual_norms(x.to(device), [(y.to(device), None)], [Norm(weight, 0.0)])
    assert torch.equal(found.cpu(), x)
    assert normed.tolist() == [[0.75390625] * 8 + [0.75] * 8]


def test_twin_norms_the_unrounded_sum() -> None:
    check_unrounded("cpu")


@pytest.mark.gpu
def test_gpu_norms_the_unrounded_sum() -> None:
    check_unrounded("cuda")
