"""Routing: choices exact where the product is, weights against float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted

from moe_nvfp4.kernels.nvfp4 import TOLERANCE, relative_error
from moe_nvfp4.kernels.route import FEW_ROWS, Routes, route

# rows, experts, hidden, choices
SMALL = [(1, 256, 128, 8), (FEW_ROWS, 60, 96, 4), (FEW_ROWS + 1, 128, 640, 8), (3, 512, 64, 22), (2, 20, 130, 3)]
SMALL += [(4, 32, 2688, 6)]  # eight shares of the columns, of which seven hold all
LARGE = [
    (1, 256, 2048, 8),
    (3, 128, 2816, 8),
    (5, 256, 2048, 8),
    (8, 256, 7168, 8),
    (17, 256, 2048, 8),
    (64, 512, 2688, 22),
    (257, 128, 2816, 8),
]
LARGE += [(1024, 256, 2048, 8), (4097, 128, 2816, 8)]
RULES: list[dict[str, Any]] = [
    {"scoring": "softmax", "normalise": True},
    {"scoring": "softmax", "normalise": False},
    {"scoring": "sigmoid", "normalise": True, "scale": 2.5, "correction_bias": True},
    {"scoring": "softmax", "normalise": True, "correction_bias": True},
    {"scoring": "softmax", "normalise": True, "shared": True},
]


def inputs(rows: int, experts: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Small integers over powers of two: every order of summation gives the same float32, and there are many ties."""
    x = torch.randint(-2, 3, (rows, hidden)).to(torch.bfloat16)
    router = torch.randint(-3, 4, (experts, hidden)).to(dtype) / 64
    return x.to(device), router.to(device)


def reference(x: torch.Tensor, router: torch.Tensor, k: int, rule: dict[str, Any]) -> Routes:
    """By the definition, in float64."""
    logits = x.double() @ router.double().T
    gate = logits[:, -1:].sigmoid()
    logits = logits[:, :-1] if rule.get("shared") else logits
    scores = logits.softmax(dim=-1) if rule["scoring"] == "softmax" else logits.sigmoid()
    by = logits if rule.get("correction_bias") is None else scores + rule["correction_bias"].double()
    ids = by.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, ids)
    if rule["normalise"]:
        weights /= weights.sum(dim=-1, keepdim=True)
    weights = weights * rule.get("scale", 1.0)
    if rule.get("shared"):
        ids = torch.cat((ids, torch.full_like(ids[:, :1], logits.shape[1])), dim=1)
        weights = torch.cat((weights, gate), dim=1)
    return Routes(ids.int(), weights)


def check(rows: int, experts: int, hidden: int, k: int, rule: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    x, router = inputs(rows, experts + bool(rule.get("shared")), hidden, dtype, device)
    if rule.get("correction_bias"):
        # Distinct multiples of 1/2, apart by far more than a rounding of the scores, which lie within (0, 1).
        rule = {**rule, "correction_bias": (torch.randperm(experts) * 2.0).to(device)}
    expected = reference(x, router, k, rule)
    actual = route(x, router, k, **rule)
    assert actual.expert_ids_TK.dtype == torch.int32
    assert torch.equal(actual.expert_ids_TK, expected.expert_ids_TK)
    assert relative_error(actual.weights_TK, expected.weights_TK) < TOLERANCE["float32"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows, experts, hidden, k", [*SMALL, LARGE[2]])
def test_twin(rows: int, experts: int, hidden: int, k: int, rule: dict[str, Any]) -> None:
    check(rows, experts, hidden, k, rule, torch.float32, "cpu")


def test_twin_is_the_router_of_transformers() -> None:
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

    config = SimpleNamespace(num_experts_per_tok=8, num_experts=64, hidden_size=32)
    router = Qwen3_5MoeTopKRouter(config)
    router.weight.data = torch.randn(64, 32)
    x = torch.randn(20, 32)
    _, weights, ids = router(x)
    actual = route(x, router.weight.data, 8, normalise=True)
    assert torch.equal(actual.expert_ids_TK, ids.int())
    assert relative_error(actual.weights_TK, weights) < TOLERANCE["float32"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows, experts, hidden, k", SMALL)
def test_interpreted(rows: int, experts: int, hidden: int, k: int, rule: dict[str, Any]) -> None:
    check(rows, experts, hidden, k, rule, torch.bfloat16, "cpu")


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("rows", [FEW_ROWS, FEW_ROWS + 1])
def test_interpreted_float32_router(rows: int) -> None:
    check(rows, 500, 48, 3, RULES[0], torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows, experts, hidden, k", [*SMALL, *LARGE])
def test_gpu(rows: int, experts: int, hidden: int, k: int, rule: dict[str, Any], dtype: torch.dtype) -> None:
    check(rows, experts, hidden, k, rule, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 40, 3000])
def test_float32_router_keeps_its_bits(rows: int) -> None:
    x, router = torch.randn(rows, 2048).bfloat16().cuda(), torch.randn(64, 2048).cuda() / 45
    every = route(x, router, 64, scoring="sigmoid", normalise=False)
    logits = (x.double() @ router.double().T).gather(1, every.expert_ids_TK.long())
    assert relative_error(every.weights_TK.double().logit(), logits) < TOLERANCE["float32"]
