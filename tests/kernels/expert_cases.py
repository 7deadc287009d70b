"""Weights, routes and the float64 reference that the tests of all routed-experts kernels share."""

from dataclasses import dataclass

import torch

from moe_nvfp4.kernels.activation import UNGATED, activate
from moe_nvfp4.kernels.fragments import FragmentTensor, to_fragments
from moe_nvfp4.kernels.nvfp4 import NVFP4Tensor


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `spread` is the exponent range of the block scales."""

    experts: int
    top: int
    hidden: int
    inner: int
    rows: int
    activation: str = "silu"
    routing: str = "uniform"  # or "one": every row on expert 0 first; "holes": a third of the ids is -1
    scales: str = "even"  # or "extreme": subnormal and the largest E4M3 values
    outliers: bool = False

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


CASES = [
    Case(16, 8, 256, 128, 1),
    Case(256, 8, 2048, 512, 4),  # Qwen3.6
    Case(128, 8, 2816, 704, 5, "gelu_tanh"),  # Gemma-4: 11 and 44 tiles
    Case(16, 6, 2688, 1856, 3, "relu2"),  # Nemotron-3: 29 and 42 tiles
    Case(16, 8, 2048, 768, 9),  # Qwen3-30B
    Case(8, 4, 4096, 1536, 2),  # Qwen3-235B
    Case(32, 22, 1024, 512, 7),
    Case(8, 1, 128, 64, 12),
    Case(1, 1, 128, 64, 3),
    Case(8, 2, 256, 128, 40, routing="one"),
    Case(12, 9, 512, 512, 6),  # more experts than a program of `down` has warps: whole experts one by one,
    Case(12, 9, 512, 704, 5, routing="holes"),  # or slices that begin within one
    Case(32, 5, 320, 192, 21),  # strips that are no multiple of warps
    Case(8, 3, 256, 128, 17, routing="holes"),
    Case(8, 2, 256, 192, 6, "swiglu_clamped"),
    Case(8, 4, 512, 256, 8, scales="extreme"),
    Case(8, 4, 512, 256, 8, outliers=True),
]


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    gate: NVFP4Tensor | None
    up: NVFP4Tensor
    down: NVFP4Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def fragments(self) -> tuple[FragmentTensor | None, FragmentTensor, FragmentTensor]:
        gate = None if self.gate is None else to_fragments(self.gate)
        return gate, to_fragments(self.up), to_fragments(self.down)


def make(case: Case, device: str, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    gated = case.activation not in UNGATED
    x = torch.randn(case.rows, case.hidden, generator=generator, device=device)
    if case.outliers:
        x[:, ::97] *= 300
    scores = torch.rand(case.rows, case.experts, generator=generator, device=device)
    if case.routing == "one":
        scores[:, 0] = 2
    ids = scores.topk(case.top).indices.int()
    if case.routing == "holes":
        ids[torch.rand(ids.shape, generator=generator, device=device) < 0.33] = -1
    return Inputs(
        x.bfloat16(),
        _weight(case, case.inner, case.hidden, 1.0, generator, device) if gated else None,
        _weight(case, case.inner, case.hidden, 10.0, generator, device),  # gate and up tenfold apart
        _weight(case, case.hidden, case.inner, 0.3, generator, device),
        ids,
        torch.rand(ids.shape, generator=generator, device=device),
    )


def _weight(case: Case, n: int, k: int, size: float, generator: torch.Generator, device: str) -> NVFP4Tensor:
    def bytes_(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator, device=device)

    scales = bytes_(0x30, 0x40, case.experts, n, k // 16)
    if case.scales == "extreme":
        scales = torch.where(
            bytes_(0, 2, *scales.shape) == 0, bytes_(0, 8, *scales.shape), bytes_(0x78, 0x7F, *scales.shape)
        )
    spread = torch.rand(case.experts, generator=generator, device=device) + 0.5
    mean = 300.0 if case.scales == "extreme" else 1.0
    return NVFP4Tensor(bytes_(0, 256, case.experts, n, k // 2), scales, size * spread / (3 * mean * k**0.5))


def reference(inputs: Inputs, activation: str) -> torch.Tensor:
    """float64, expert by expert, from the format's definition."""
    out = torch.zeros(inputs.x.shape, dtype=torch.float64, device=inputs.x.device)
    for expert in inputs.ids.unique().tolist():
        if expert < 0:
            continue
        row, k = (inputs.ids == expert).nonzero(as_tuple=True)
        x = inputs.x[row].double()
        gate, up, down = (None if w is None else _plain(w, expert) for w in (inputs.gate, inputs.up, inputs.down))
        assert up is not None
        assert down is not None
        h = activate(activation, None if gate is None else x @ gate.T, x @ up.T)
        out.index_add_(0, row, inputs.weights[row, k].double()[:, None] * (h @ down.T))
    return out


def _plain(weight: NVFP4Tensor, expert: int) -> torch.Tensor:
    one = NVFP4Tensor(weight.codes[expert], weight.block_scales[expert], weight.global_scale[expert])
    return one.dequantize().double()
