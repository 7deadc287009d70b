"""The activations of experts: from gate and up, or from up alone, in float32."""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

KINDS = ("silu", "gelu_tanh", "relu2", "swiglu_clamped")
UNGATED = ("relu2",)
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702  # of gpt-oss


def activate(kind: str, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The torch twin."""
    if kind == "relu2":
        return F.relu(up).square()
    assert gate is not None, kind
    if kind == "silu":
        return F.silu(gate) * up
    if kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    assert kind == "swiglu_clamped", kind
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


@triton.jit
def activate_tl(gate, up, KIND: tl.constexpr):
    if KIND == "silu":
        return gate / (1 + tl.exp(-gate)) * up
    elif KIND == "gelu_tanh":
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # twice sqrt(2 / pi)
        return gate / (1 + tl.exp(-inner)) * up  # (1 + tanh(z)) / 2 = sigmoid(2 z)
    elif KIND == "relu2":
        up = tl.maximum(up, 0.0)
        return up * up
    else:
        gate, up = tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0)
        return gate / (1 + tl.exp(-1.702 * gate)) * (up + 1)


@gluon.jit
def activate_gl(gate, up, KIND: gl.constexpr):
    if KIND == "silu":
        return gate / (1 + gl.exp(-gate)) * up
    elif KIND == "gelu_tanh":
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1 + gl.exp(-inner)) * up
    elif KIND == "relu2":
        up = gl.maximum(up, 0.0)
        return up * up
    else:
        gate, up = gl.minimum(gate, 7.0), gl.minimum(gl.maximum(up, -7.0), 7.0)
        return gate / (1 + gl.exp(-1.702 * gate)) * (up + 1)
