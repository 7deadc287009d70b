"""Where decode steps of one batch size find their inputs and leave their outputs, the same memory for every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.kernels.sample import Sampled, SamplingRows
from moe_nvfp4.routing.dispatch import StepRows
from moe_nvfp4.sampling import SamplingParams

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


def buckets_up_to(max_rows: int) -> list[int]:
    """The largest batch gets a bucket of its own size."""
    return [*(size for size in BUCKETS if size < max_rows), max_rows]


class DecodeRow(NamedTuple):
    """The next token of a sequence: the one it got last goes to `position` of its slot."""

    slot: int
    position: int
    params: SamplingParams


@dataclass(slots=True)
class StepBuffers:
    """Inputs and outputs of the decode steps of one bucket. All inputs lie in one tensor and travel in one copy; a step
    leaves there the inputs of the next one, if the same sequences go on."""

    flat: torch.Tensor  # int32 [fields, rows]
    rows: Rows
    sampling: SamplingRows
    step: StepRows | None = None
    next_rows: list[DecodeRow] | None = None  # for which the inputs are there already
    live: tuple[int, ...] = ()  # rows of each rank, likewise
    graph: torch.cuda.CUDAGraph | None = None
    sampled: Sampled | None = None  # [lines, rows]: of each rank that has sequences of its own, else of this one
    logits: torch.Tensor | None = None

    FIELDS = ("position", "length", "slot", "live", "top_k", "temperature", "top_p", "min_p", "uniform")
    FIRST_FLOAT = 5

    @classmethod
    def new(cls, rows: int, device: torch.device, lines: int | None = None) -> "StepBuffers":
        """`lines`: how many ranks bring rows of their own, where the steps are to say which rows count."""
        flat = torch.zeros(len(cls.FIELDS), -(-rows // 4) * 4, dtype=torch.int32, device=device)
        position, length, slot, _, top_k = (line[:rows] for line in flat[: cls.FIRST_FLOAT])
        temperature, top_p, min_p, uniform = (line[:rows] for line in flat[cls.FIRST_FLOAT :].view(torch.float32))
        every = torch.arange(rows + 1, dtype=torch.int32, device=device)
        none = torch.full_like(slot, -1)
        return cls(
            flat,
            Rows(position, slot, slot, every, length, none, none[:0], decodes=rows),
            SamplingRows(temperature, top_k, top_p, min_p, uniform),
            StepRows.new(rows, lines, device),
        )

    def fill(self, rows: Sequence[DecodeRow], spare_slot: int) -> None:
        """Overwrites the inputs, in the order of the stream."""
        width = self.flat.shape[1]
        padding = width - len(rows)
        ints = [
            [row.position for row in rows] + [0] * padding,
            [row.position + 1 for row in rows] + [1] * padding,
            [row.slot for row in rows] + [spare_slot] * padding,
            [1] * len(rows) + [0] * padding,
            [min(row.params.top_k, 2**31 - 1) for row in rows] + [0] * padding,
        ]
        floats = [
            [row.params.temperature for row in rows] + [0.0] * padding,
            [row.params.top_p for row in rows] + [1.0] * padding,
            [row.params.min_p for row in rows] + [0.0] * padding,
            [0.0] * width,
        ]
        values = torch.cat((torch.tensor(ints, dtype=torch.int32), torch.tensor(floats).view(torch.int32)))
        self._copy(self.flat, values)

    def set_live(self, live: tuple[int, ...]) -> None:
        if self.step is not None and self.live != live:
            self._copy(self.step.live_G, torch.tensor(live, dtype=torch.int32))
            self.live = live

    def set_uniforms(self, uniforms: Sequence[float]) -> None:
        self._copy(self.sampling.uniform[: len(uniforms)], torch.tensor(uniforms))

    def _copy(self, target: torch.Tensor, values: torch.Tensor) -> None:
        target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
