"""Routed experts: from rows and their experts to the weighted sum of the experts' outputs.

    y[t] = sum_k weights[t, k] * down_e(act(gate_e(x[t])) * up_e(x[t])),  e = expert_ids[t, k]

Without a gate projection: down_e(act(up_e(x[t]))). Letters: T rows, K experts of a row, H hidden, E experts.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch.nn import functional as F

from moe_nvfp4.kernels.nvfp4 import NVFP4Tensor

Activation = Literal["silu", "gelu_tanh", "relu2"]

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def routed_experts(
    x_TH: torch.Tensor,
    gate: NVFP4Tensor | None,
    up: NVFP4Tensor,
    down: NVFP4Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    order_S: torch.Tensor,
    offsets: torch.Tensor,
    activation: Activation = "silu",
) -> torch.Tensor:
    """The torch twin. `order_S` and `offsets` group the pairs of (row, k) by expert; other pairs count zero.

    All arithmetic is float32, whatever the dtype of x, and the output has the dtype of x. A row's result does
    not depend on the other rows, but for rounding where the matrix library picks another kernel for their number.
    """
    num_choices = expert_ids_TK.shape[1]
    act = ACTIVATIONS[activation]
    pairs = torch.zeros(x_TH.shape[0] * num_choices, x_TH.shape[1], dtype=torch.float32, device=x_TH.device)
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        index_S = order_S[begin:end]
        rows = x_TH[index_S // num_choices].float()
        inner = F.linear(rows, _expert(up, expert))
        inner = act(inner) if gate is None else act(F.linear(rows, _expert(gate, expert))) * inner
        pairs[index_S] = F.linear(inner, _expert(down, expert))
    weighted = pairs.view(*expert_ids_TK.shape, x_TH.shape[1]) * weights_TK[..., None].float()
    return weighted.sum(dim=1).to(x_TH.dtype)


def _expert(block: NVFP4Tensor, expert: int) -> torch.Tensor:
    return NVFP4Tensor(*(part[expert] for part in block)).dequantize()
