"""The kernels that a loaded model uses against their float32 twins, on the model's own weights.

Two kinds of check. Experts: random rows through the routed experts of some layers, for numbers of rows that reach each
kernel. Layers: one layer of each kind as a whole, with the same input in both. Near ties between experts may be chosen
either way, which moves a row by far more than rounding does; so rows are compared one by one, and the median reported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.cache import CacheSettings, SequenceCache
from moe_nvfp4.kernels.nvfp4 import relative_error
from moe_nvfp4.kernels.routed_experts import routed_experts, routed_experts_twin
from moe_nvfp4.runner import MoERunner

EXPERT_ROWS = (1, 4, 16, 256)
LAYER_ROWS = 96
DECODED_ROWS = 4  # of them, one by one
LIMIT = 2e-2  # relative error of bfloat16 activations


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= LIMIT  # False for NaN

    def __str__(self) -> str:
        return (
            f"{self.name:<44} relative error {self.error:.1e}  {'ok' if self.passed else f'above {LIMIT:.0e}: WRONG'}"
        )


def self_test(runner: MoERunner, report: Callable[[str], None]) -> bool:
    with torch.inference_mode():
        checks = []
        for check in (*_expert_checks(runner), *_layer_checks(runner)):
            report(str(check))
            checks.append(check)
    return all(check.passed for check in checks)


def _expert_checks(runner: MoERunner) -> Iterator[Check]:
    layers = sorted(runner.experts.layers)
    generator = torch.Generator(runner.device).manual_seed(0)
    for layer in dict.fromkeys((layers[0], layers[-1])) if layers else ():
        gate, up, down = runner.experts.layers[layer].projections
        for rows in EXPERT_ROWS:
            x = torch.randn(rows, up.shape[-1], generator=generator, device=runner.device).to(runner.dtype)
            scores = torch.rand(rows, up.shape[0], generator=generator, device=runner.device)
            weights, ids = scores.topk(runner.config.experts_per_token)
            sampled = torch.arange(0, rows, max(1, rows // 8), device=runner.device)
            actual = routed_experts(x, gate, up, down, ids.int(), weights, runner.config.activation)[sampled]
            expected = routed_experts_twin(
                x[sampled].float(), gate, up, down, ids[sampled].int(), weights[sampled], runner.config.activation
            )
            yield Check(f"experts of layer {layer}, {rows} rows", relative_error(actual, expected))


def _layer_checks(runner: MoERunner) -> Iterator[Check]:
    spec = runner.config.cache_spec
    kinds = [(f"attention, {s.head_dim} a head{', window' * bool(s.window)}", s.layers[0]) for s in spec.attention]
    kinds += [("gated delta net", spec.delta.layers[0])] if spec.delta and spec.delta.layers else []
    for name, layer in kinds:
        narrow, wide = (_through_layer(runner, layer, dtype) for dtype in (runner.dtype, torch.float32))
        errors = [relative_error(row, expected) for row, expected in zip(narrow, wide, strict=True)]
        yield Check(f"layer {layer} ({name}), prefill", _median(errors[:-DECODED_ROWS]))
        yield Check(f"layer {layer} ({name}), decode", _median(errors[-DECODED_ROWS:]))


def _through_layer(runner: MoERunner, layer: int, dtype: torch.dtype) -> torch.Tensor:
    """What the layer adds to its input: a prompt in one piece, then some rows one by one."""
    settings = runner.cache.settings
    small = CacheSettings(
        slots=1,
        max_seq_len=LAYER_ROWS,
        chunk=LAYER_ROWS,
        dtype=dtype,
        fp8=settings.fp8,
        scales=settings.scales,
    )
    cache = SequenceCache(runner.config.cache_spec, small, runner.device)
    generator = torch.Generator(runner.device).manual_seed(1)
    # Small beside what the layer adds, so that rounding the sum is rounding the layer's share.
    x = torch.randn(LAYER_ROWS, runner.config.hidden_size, generator=generator, device=runner.device) / 64
    x = x.to(runner.dtype).to(dtype)
    first = LAYER_ROWS - DECODED_ROWS
    out = []
    for start, end in ((0, first), *((row, row + 1) for row in range(first, LAYER_ROWS))):
        batch = Batch.of([Piece(0, start, [0] * (end - start))], runner.device)
        out.append(runner.model.run_layers(x[start:end], range(layer, layer + 1), batch, cache)[0].float())
    return torch.cat(out) - x.float()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if all(v == v for v in values) else float("nan")
