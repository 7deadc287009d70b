"""Activations: the twin against the formulas, the two kernels against the twin."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_nvfp4.kernels.activation import KINDS, activate, activate_gl, activate_tl

POINTS = [-30.0, -8.0, -1.5, -0.1, 0.0, 0.3, 1.0, 6.9, 7.5, 30.0]
SIZE = 128  # one thread each of four warps


def formula(kind: str, gate: float, up: float) -> float:
    if kind == "silu":
        return gate / (1 + math.exp(-gate)) * up
    if kind == "gelu_tanh":
        return 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if kind == "relu2":
        return max(up, 0.0) ** 2
    gate, up = min(gate, 7.0), min(max(up, -7.0), 7.0)
    return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)


@triton.jit
def run_tl(gate_ptr, up_ptr, out_ptr, KIND: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, activate_tl(tl.load(gate_ptr + i), tl.load(up_ptr + i), KIND))


@gluon.jit
def run_gl(gate_ptr, up_ptr, out_ptr, KIND: gl.constexpr):
    i = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out_ptr + i, activate_gl(gl.load(gate_ptr + i), gl.load(up_ptr + i), KIND))


def grid(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.cartesian_prod(torch.tensor(POINTS), torch.tensor(POINTS)).to(device)
    pairs = torch.cat((pairs, torch.randn(SIZE - len(pairs), 2, device=device)))
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_is_the_formula(kind: str) -> None:
    gate, up = grid()
    expected = torch.tensor([formula(kind, g, u) for g, u in zip(gate.tolist(), up.tolist(), strict=True)])
    torch.testing.assert_close(activate(kind, gate, up), expected, rtol=2e-5, atol=1e-6)


def check(kernel: object, kind: str, device: str) -> None:
    gate, up = grid(device)
    out = torch.full_like(gate, math.nan)
    kernel[(1,)](gate, up, out, KIND=kind)  # type: ignore[index]
    torch.testing.assert_close(out, activate(kind, gate, up), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [run_tl, run_gl])
def test_kernels_equal_the_twin(kernel: object, kind: str) -> None:
    check(kernel, kind, "cuda")


def test_the_triton_one_in_the_interpreter() -> None:
    code = "from test_activation import *\nfor kind in KINDS: check(run_tl, kind, 'cpu')"
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
