"""Routed experts against loops over rows and choices in float64."""

import math

import pytest
import torch
from expert_cases import Case, make

from moe_nvfp4.kernels.nvfp4 import TOLERANCE, NVFP4Tensor, dequantize, quantize, relative_error
from moe_nvfp4.kernels.routed_experts import choose_kernel, routed_experts, routed_experts_twin

HIDDEN, INNER, EXPERTS = 64, 48, 6


def blocks(count: int = EXPERTS, inner: int = INNER) -> list[NVFP4Tensor]:
    """gate, up, down; every expert has global scales of its own, up to ten times apart."""
    made = []
    for shape in ((inner, HIDDEN), (inner, HIDDEN), (HIDDEN, inner)):
        spread = torch.logspace(-0.5, 0.5, count)[torch.randperm(count)]
        made.append(quantize(torch.randn(count, *shape) * spread[:, None, None] / shape[1] ** 0.5))
    return made


def activate(value: float, kind: str) -> float:
    if kind == "silu":
        return value / (1 + math.exp(-value))
    if kind == "relu2":
        return max(value, 0.0) ** 2
    return 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def restated(
    x: torch.Tensor, gate: NVFP4Tensor | None, up: NVFP4Tensor, down: NVFP4Tensor, ids: torch.Tensor,
    weights: torch.Tensor, activation: str,
) -> torch.Tensor:  # fmt: skip
    plain = [None if block is None else dequantize(block).double() for block in (gate, up, down)]
    out = torch.zeros(x.shape[0], HIDDEN, dtype=torch.float64)
    for t, row in enumerate(ids.tolist()):
        for k, expert in enumerate(row):
            if expert < 0:
                continue
            inner = plain[1][expert] @ x[t].double()  # type: ignore[index]
            through = inner if plain[0] is None else plain[0][expert] @ x[t].double()
            acted = torch.tensor([activate(v, activation) for v in through.tolist()], dtype=torch.float64)
            inner = acted if plain[0] is None else acted * inner
            out[t] += weights[t, k].double() * (plain[2][expert] @ inner)  # type: ignore[index]
    return out


def run(x: torch.Tensor, parts: list, ids: torch.Tensor, weights: torch.Tensor, activation: str) -> torch.Tensor:
    return routed_experts(x, *parts, ids, weights, activation)


ROUTES = {
    "random": torch.randint(0, EXPERTS, (9, 2), generator=torch.Generator().manual_seed(0)),
    "some elsewhere": torch.tensor([[0, -1], [-1, -1], [5, 2], [-1, 3]]),
    "one expert takes all": torch.full((7, 1), 4),
    "top-1, one row": torch.tensor([[2]]),
    "the same expert twice": torch.tensor([[1, 1], [1, 0]]),
    "nothing here": torch.full((3, 2), -1),
    "many choices": torch.stack([torch.arange(EXPERTS)] * 3),
}


@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu_tanh", True), ("relu2", False)])
@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_loops(routes: str, gated: bool, activation: str, dtype: str) -> None:
    ids = ROUTES[routes]
    gate, up, down = blocks()
    parts = [gate if gated else None, up, down]
    x, weights = torch.randn(len(ids), HIDDEN).to(getattr(torch, dtype)), torch.rand(ids.shape)
    found = run(x, parts, ids, weights, activation)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert not found.isnan().any()
    assert relative_error(found, restated(x, *parts, ids, weights, activation)) < TOLERANCE[dtype]
    assert found[(ids < 0).all(1)].eq(0).all()


def test_no_rows() -> None:
    ids = torch.empty(0, 2, dtype=torch.int64)
    assert run(torch.empty(0, HIDDEN), blocks(), ids, torch.empty(0, 2), "silu").shape == (0, HIDDEN)


def test_rows_do_not_mix() -> None:
    """A row of NaN stays alone, and a row gets the same answer in any company."""
    parts, ids, weights = blocks(), torch.randint(0, EXPERTS, (12, 3)), torch.rand(12, 3)
    x = torch.randn(12, HIDDEN)
    clean = run(x, parts, ids, weights, "silu")
    for row in range(12):
        alone = run(x[row : row + 1], parts, ids[row : row + 1], weights[row : row + 1], "silu")
        assert relative_error(alone[0], clean[row]) < TOLERANCE["float32"]
    x[5] = float("nan")
    spoiled = run(x, parts, ids, weights, "silu")
    others = [row for row in range(12) if row != 5]
    assert spoiled[5].isnan().all()
    assert torch.equal(spoiled[others], clean[others])


def test_global_scales_of_gate_and_up_stay_apart() -> None:
    gate, up, down = blocks()
    up = up._replace(global_scale=gate.global_scale / 10)
    ids, weights, x = torch.tensor([[0, 1]]), torch.rand(1, 2), torch.randn(1, HIDDEN)
    right = run(x, [gate, up, down], ids, weights, "silu")
    merged = torch.maximum(gate.global_scale, up.global_scale)
    wrong = run(x, [gate._replace(global_scale=merged), up._replace(global_scale=merged), down], ids, weights, "silu")
    assert relative_error(wrong, right) > 10 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    ("rows", "kernel"), [(1, "pairs"), (8, "pairs"), (9, "grouped"), (352, "grouped"), (353, "many")]
)
def test_choice_of_a_kernel(rows: int, kernel: str) -> None:
    """256 experts, of which a row takes 8."""
    assert choose_kernel(rows, 8 * rows, 256) == kernel


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 33, 65, 200, 700])
def test_a_part_of_the_experts(rows: int) -> None:
    """Four of sixteen, as on one of four ranks: whichever kernel a hint leads to, it gives the same."""
    inputs = make(Case(16, 4, 256, 128, rows), "cuda")
    here = inputs.ids < 4
    ids = torch.where(here, inputs.ids, -1)
    parts = [type(one)(*(part[:4].contiguous() for part in one)) for one in (inputs.gate, inputs.up, inputs.down)]
    weights = [type(one)(*(part[:4].contiguous() for part in one)) for one in inputs.fragments()]
    twin = routed_experts_twin(inputs.x, *parts, ids, inputs.weights)
    for among in (None, 16):
        assert relative_error(routed_experts(inputs.x, *weights, ids, inputs.weights, among=among), twin) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 5, 33, 200])
@pytest.mark.parametrize("routing", ["uniform", "holes"])
def test_every_choice_agrees_with_the_twin(rows: int, routing: str) -> None:
    case = Case(16, 4, 256, 128, rows, routing=routing)
    inputs = make(case, "cuda")
    weights = inputs.fragments()
    chosen = routed_experts(inputs.x, *weights, inputs.ids, inputs.weights)
    twin = routed_experts_twin(inputs.x, inputs.gate, inputs.up, inputs.down, inputs.ids, inputs.weights)
    assert relative_error(chosen, twin) < 1e-2
    assert relative_error(routed_experts_twin(inputs.x, *weights, inputs.ids, inputs.weights), twin) < 1e-5
