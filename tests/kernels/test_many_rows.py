"""Routed experts for many rows against float64, on the CPU in Triton's interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_nvfp4.kernels.activation import activate
from moe_nvfp4.kernels.fragments import FragmentTensor, to_fragments
from moe_nvfp4.kernels.many_rows import routed_experts_many, routed_experts_many_torch
from moe_nvfp4.kernels.nvfp4 import dequantize, quantize, relative_error

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-2
# The interpreter cuts float32 to bfloat16 instead of rounding: twice the error, in each of three places.
INTERPRETER_LIMIT = 2e-2

Case = tuple[int, int, int, int, int, str]  # rows, choices, experts, hidden, inner, activation

SMALL: dict[str, Case] = {
    "few": (5, 2, 4, 64, 32, "silu"),
    "several tiles of an expert": (40, 1, 2, 64, 64, "swiglu_clamped"),
    "rows that fill no block": (9, 3, 3, 128, 80, "gelu_tanh"),
    "without a gate": (20, 2, 3, 128, 144, "relu2"),
    "hidden that fills no tile": (6, 2, 3, 80, 48, "silu"),
}
LARGE: dict[str, Case] = {
    "wide tiles": (600, 8, 16, 512, 704, "silu"),
    "eleven tiles": (100, 8, 16, 512, 704, "gelu_tanh"),
    "top 22 without a gate": (64, 22, 40, 256, 1856, "relu2"),
    "top 1": (300, 1, 8, 256, 768, "swiglu_clamped"),
    "one expert": (70, 1, 1, 192, 1024, "silu"),
    "narrow tiles": (16, 8, 16, 2816, 704, "gelu_tanh"),
    "many": (1500, 4, 16, 256, 1536, "silu"),
}


def grouped(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = ids.flatten()
    order = torch.argsort(torch.where(flat < 0, experts, flat), stable=True).int()
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=ids.device)
    offsets[1:] = torch.cumsum(torch.bincount(flat[flat >= 0], minlength=experts), 0)
    return order, offsets


class Example:
    """Random weights, rows and routes of a case, and what they should give, in float64."""

    def __init__(self, case: Case, ids: torch.Tensor | None = None, device: str = "cpu") -> None:
        rows, top, experts, hidden, inner, self.activation = case
        if ids is None:
            ids = torch.stack([torch.randperm(experts)[:top] for _ in range(rows)])
        self.device, self.ids = device, ids
        self.x = torch.randn(len(ids), hidden).bfloat16()
        self.weights = torch.rand(ids.shape)
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        self.blocks = {}
        for name, shape in shapes.items():
            spread = torch.logspace(-0.5, 0.5, experts)[torch.randperm(experts)]
            self.blocks[name] = quantize(torch.randn(experts, *shape) * spread[:, None, None] / shape[1] ** 0.5)
        if self.activation == "relu2":
            del self.blocks["gate"]

    def arguments(self) -> tuple:
        def put(x: torch.Tensor) -> torch.Tensor:
            return x.to(self.device)

        gate, up, down = (
            FragmentTensor(*map(put, to_fragments(self.blocks[name]))) if name in self.blocks else None
            for name in ("gate", "up", "down")
        )
        order, offsets = grouped(self.ids, len(self.blocks["up"].codes))
        x, ids, weights, order, offsets = map(put, (self.x, self.ids.int(), self.weights, order, offsets))
        return x, gate, up, down, ids, weights, order, offsets, self.activation

    def wanted(self) -> torch.Tensor:
        plain = {name: dequantize(block).double() for name, block in self.blocks.items()}
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        for expert in range(len(plain["up"])):
            t, k = torch.nonzero(self.ids == expert, as_tuple=True)
            rows = self.x[t].double()
            gate = rows @ plain["gate"][expert].T if "gate" in plain else None
            inner = activate(self.activation, gate, rows @ plain["up"][expert].T)
            out.index_add_(0, t, (inner @ plain["down"][expert].T) * self.weights[t, k, None])
        return out


def special_routes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    unequal = torch.zeros(60, 2, dtype=torch.long)
    unequal[::20, 1] = 3
    return {
        "some elsewhere": torch.randint(-1, 4, (12, 3), generator=generator),
        "nothing here": torch.full((3, 2), -1),
        "one expert takes all": torch.full((30, 1), 2),
        "very unequal": unequal,
    }


@pytest.mark.parametrize("case", SMALL)
def test_twin(case: str) -> None:
    example = Example(SMALL[case])
    assert relative_error(routed_experts_many_torch(*example.arguments()), example.wanted()) < LIMIT


@pytest.mark.parametrize("routes", special_routes())
def test_twin_routes(routes: str) -> None:
    example = Example((0, 0, 4, 64, 64, "silu"), special_routes()[routes])
    found = routed_experts_many_torch(*example.arguments())
    assert relative_error(found, example.wanted()) < LIMIT
    assert found[(example.ids < 0).all(1)].eq(0).all()


def interpreted() -> None:
    """Run by test_in_the_interpreter in a process of its own: the variable must be set before triton is imported."""
    torch.manual_seed(0)
    examples = {name: Example(case) for name, case in SMALL.items()}
    for name, ids in special_routes().items():
        examples[name] = Example((0, 0, 4, 64, 64, "silu"), ids)
    for name, example in examples.items():
        found = routed_experts_many(*example.arguments())
        error = relative_error(found, example.wanted())
        assert error < INTERPRETER_LIMIT, (name, error)
        assert found[(example.ids < 0).all(1)].eq(0).all(), name


def test_in_the_interpreter() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_rows() -> None:
    example = Example((0, 2, 4, 64, 64, "silu"), torch.empty(0, 2, dtype=torch.long))
    assert routed_experts_many(*example.arguments()).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("case", SMALL | LARGE)
def test_kernels(case: str, portable: bool) -> None:
    example = Example((SMALL | LARGE)[case], device="cuda")
    arguments = example.arguments()
    found = routed_experts_many(*arguments, portable=portable)
    assert relative_error(found.cpu(), example.wanted()) < LIMIT
    assert torch.equal(found, routed_experts_many(*arguments, portable=portable))


@pytest.mark.gpu
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("routes", special_routes())
def test_kernels_routes(routes: str, portable: bool) -> None:
    example = Example((0, 0, 4, 64, 64, "silu"), special_routes()[routes], device="cuda")
    found = routed_experts_many(*example.arguments(), portable=portable).cpu()
    assert relative_error(found, example.wanted()) < LIMIT
    assert found[(example.ids < 0).all(1)].eq(0).all()


@pytest.mark.gpu
def test_captured() -> None:
    example = Example((64, 4, 8, 128, 128, "silu"), device="cuda")
    arguments = example.arguments()
    eager = routed_experts_many(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = routed_experts_many(*arguments)
    graph.replay()
    assert torch.equal(captured, eager)


if __name__ == "__main__":
    interpreted()
