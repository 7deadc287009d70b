"""Shapes of public checkpoints, and random weights, rows and routings in them, made on the GPU."""

from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from moe_nvfp4.kernels.dense_rows import DenseWeight, Kind
from moe_nvfp4.kernels.fragments import COLUMNS, ROWS, FragmentTensor
from moe_nvfp4.kernels.nvfp4 import FP8Tensor

Popularity = Literal["uniform", "zipf", "one", "shared"]


@dataclass(frozen=True, slots=True)
class Shape:
    experts: int
    top: int
    hidden: int
    inner: int
    activation: str = "silu"
    gated: bool = True
    dense: dict[str, tuple[Kind, int, int]] = field(default_factory=dict)  # name: format, N, K

    @property
    def projections(self) -> int:
        return 3 if self.gated else 2


SHAPES: Final = {
    "qwen3.6": Shape(
        256, 8, 2048, 512,
        dense={
            "gdn in": ("fp8", 12288, 2048), "attention out": ("fp8", 2048, 4096), "shared down": ("nvfp4", 2048, 512),
            "lm_head": ("nvfp4", 248320, 2048),
        },
    ),
    "gemma-4": Shape(
        128, 8, 2816, 704, "gelu_tanh",
        dense={"attention qkv": ("bf16", 8192, 2816), "mlp down": ("bf16", 2816, 2112)},
    ),
    "qwen3-30b": Shape(128, 8, 2048, 768, dense={"attention qkv": ("nvfp4", 5120, 2048)}),
    "nemotron-3-nano": Shape(128, 6, 2688, 1856, "relu2", gated=False),
    "deepseek-v3": Shape(256, 8, 7168, 2048, dense={"q_b": ("nvfp4", 24576, 1536)}),
}  # fmt: skip


class Experts(NamedTuple):
    gate: FragmentTensor | None
    up: FragmentTensor
    down: FragmentTensor

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)


class Routing(NamedTuple):
    expert_ids_TK: Tensor
    weights_TK: Tensor


def random_fragments(*shape: int) -> FragmentTensor:
    """All bit patterns of codes; scales of about 0.2 to 0.7, global scales of about 0.01."""
    *batch, rows, columns = shape
    lanes = (*batch, rows // ROWS, columns // COLUMNS, 8, 4)
    words = torch.empty(*lanes, 4, dtype=torch.int32, device="cuda").random_(-(1 << 31), (1 << 31) - 1)
    scales = torch.randint(0x48, 0x58, (*lanes, 2), dtype=torch.uint8, device="cuda")
    return FragmentTensor(words, scales, 0.005 + 0.01 * torch.rand(batch, device="cuda"))


def random_experts(shape: Shape) -> Experts:
    up = (shape.experts, shape.inner, shape.hidden)
    gate = random_fragments(*up) if shape.gated else None
    return Experts(gate, random_fragments(*up), random_fragments(shape.experts, shape.hidden, shape.inner))


def random_dense(kind: Kind, rows: int, columns: int) -> DenseWeight:
    if kind == "nvfp4":
        return random_fragments(rows, columns)
    if kind == "bf16":
        return torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") / 50
    signs = torch.randint(0, 2, (rows, columns), dtype=torch.uint8, device="cuda") << 7
    values = signs | torch.randint(0x28, 0x40, (rows, columns), dtype=torch.uint8, device="cuda")
    return FP8Tensor(values, 0.005 + 0.01 * torch.rand(rows, device="cuda"))


def routed_shape(shape: Shape, popularity: Popularity) -> Shape:
    """With a shared expert as one more expert, which the router does not know."""
    return replace(shape, experts=shape.experts + 1, top=shape.top + 1) if popularity == "shared" else shape


def random_routing(tokens: int, shape: Shape, popularity: Popularity) -> Routing:
    """Distinct experts for each row: equally likely, by 1 / rank in a random order, or the same for all rows.

    "shared" is uniform but for the last expert, which every row has.
    """
    chance = torch.zeros(shape.experts, device="cuda")
    if popularity == "zipf":
        chance = -torch.arange(1, shape.experts + 1, device="cuda").log()[torch.randperm(shape.experts, device="cuda")]
    if popularity == "shared":
        chance[-1] = 100.0
    noise = torch.rand(1 if popularity == "one" else tokens, shape.experts, device="cuda")
    ids = (chance - (-noise.log()).log()).topk(shape.top).indices.int().expand(tokens, -1)
    return Routing(ids.contiguous(), torch.rand(tokens, shape.top, device="cuda").softmax(dim=-1))
