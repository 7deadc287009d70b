"""The decode step of a whole model, sampling included: one function, run as it is or as a CUDA graph.

A step reads its inputs from buffers that stay in place and leaves there the inputs of the next one, so steps follow
each other without the host. There is a graph for each bucket of batch sizes; rows that fill a bucket up are padding,
which reads and writes the cache's spare slot.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_nvfp4.batch import Batch
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.kernels.sample import Logprobs, SamplingRows, logprobs, sample
from moe_nvfp4.models import Model
from moe_nvfp4.sampling import SamplingParams

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


class DecodeRow(NamedTuple):
    """A sequence at the start of a run of steps: its last token, and where that token goes in the cache."""

    slot: int
    position: int
    token_id: int
    params: SamplingParams


class StepResult(NamedTuple):
    """One step's tokens on their way to the host."""

    token_ids: torch.Tensor
    peaks: torch.Tensor  # of the logits
    logprobs: Logprobs | None
    arrived: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[float]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.token_ids.tolist(), self.peaks.tolist()


@dataclass(slots=True)
class StepBuffers:
    """Inputs and outputs of the steps of one bucket. All inputs lie in one tensor, so they travel in one copy."""

    flat: torch.Tensor  # int32 [fields, rows]
    batch: Batch
    sampling: SamplingRows
    graph: torch.cuda.CUDAGraph | None = None
    token_ids: torch.Tensor | None = None
    peaks: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    FIELDS = ("token", "position", "length", "slot", "live", "top_k", "temperature", "top_p", "min_p", "uniform")
    FIRST_FLOAT = 6

    @classmethod
    def new(cls, rows: int, device: torch.device) -> "StepBuffers":
        flat = torch.zeros(len(cls.FIELDS), -(-rows // 4) * 4, dtype=torch.int32, device=device)
        token, position, length, slot, _, top_k = (line[:rows] for line in flat[: cls.FIRST_FLOAT])
        temperature, top_p, min_p, uniform = (line[:rows] for line in flat[cls.FIRST_FLOAT :].view(torch.float32))
        every = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return cls(
            flat,
            Batch(token, Rows(position, slot, slot, every, length, decodes=rows, longest=1), every[:rows]),
            SamplingRows(temperature, top_k, top_p, min_p, uniform),
        )

    def fill(self, rows: Sequence[DecodeRow], spare_slot: int) -> None:
        """Overwrites the inputs, in the order of the stream."""
        width = self.flat.shape[1]
        padding = width - len(rows)
        ints = [
            [row.token_id for row in rows] + [0] * padding,
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
        self._copy(
            self.flat, torch.cat((torch.tensor(ints, dtype=torch.int32), torch.tensor(floats).view(torch.int32)))
        )

    def set_uniforms(self, uniforms: Sequence[float]) -> None:
        self._copy(self.sampling.uniform[: len(uniforms)], torch.tensor(uniforms))

    def _copy(self, target: torch.Tensor, values: torch.Tensor) -> None:
        target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


def buckets_up_to(max_rows: int) -> list[int]:
    """The largest batch gets a bucket of its own size."""
    return [*(size for size in BUCKETS if size < max_rows), max_rows]


class Decoder:
    """Runs steps of batches that are filled up to one of `buckets`. `graphs`: captures them when it is built."""

    def __init__(
        self,
        model: Model,
        cache: SequenceCache,
        device: torch.device,
        *,
        buckets: Sequence[int],
        graphs: bool,
        verbose: bool,
    ):
        self.model, self.cache, self.device, self.buckets = model, cache, device, sorted(buckets)
        self.owner: object = None  # whoever started the current run
        self._buffers: dict[int, StepBuffers] = {}
        self._current: StepBuffers | None = None
        self._rows: list[DecodeRow] = []
        self.capture_seconds = 0.0
        if graphs:
            self._capture_all(verbose)

    @property
    def has_graphs(self) -> bool:
        return any(buffers.graph is not None for buffers in self._buffers.values())

    @torch.inference_mode()
    def start(self, rows: Sequence[DecodeRow], owner: object) -> None:
        """Begins a run of steps; who calls it must have seen that no other run is going on, or end that one."""
        self.owner, self._rows = owner, list(rows)
        size = self._bucket(len(rows)) if self.device.type == "cuda" else len(rows)
        if size not in self._buffers:
            self._buffers[size] = StepBuffers.new(size, self.device)
        self._current = self._buffers[size]
        self._current.fill(rows, self.cache.spare_slot)

    @torch.inference_mode()
    def step(self, uniforms: Sequence[float] | None = None, top_logprobs: int | None = None) -> StepResult:
        """Launches one step and returns at once. `uniforms`: the random number of each row; none for greedy rows."""
        buffers = self._current
        assert buffers is not None, "start comes first"
        if uniforms is not None:
            buffers.set_uniforms(uniforms)
        if buffers.graph is not None:
            buffers.graph.replay()
        else:
            self._run(buffers)
        count = len(self._rows)
        assert buffers.token_ids is not None and buffers.peaks is not None and buffers.logits is not None
        token_ids, peaks = buffers.token_ids[:count], buffers.peaks[:count]
        tops = None if top_logprobs is None else logprobs(buffers.logits[:count], token_ids, top_logprobs)
        return in_flight(token_ids, peaks, tops)

    def _run(self, buffers: StepBuffers) -> None:
        hidden = self.model.forward(buffers.batch, self.cache)
        buffers.logits = self.model.logits(hidden)
        buffers.token_ids, buffers.peaks = sample(buffers.logits, buffers.sampling)
        buffers.batch.token_ids.copy_(buffers.token_ids)
        positions_and_lengths, live = buffers.flat[1:3], buffers.flat[4]
        positions_and_lengths.add_(live)

    def _bucket(self, rows: int) -> int:
        return next((size for size in self.buckets if size >= rows), rows)

    @torch.inference_mode()
    def _capture_all(self, verbose: bool) -> None:
        began, pool = time.perf_counter(), torch.cuda.graph_pool_handle()
        for size in reversed(self.buckets):  # the largest first: the others fit in its memory
            buffers = self._buffers[size] = StepBuffers.new(size, self.device)
            buffers.fill([], self.cache.spare_slot)
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self._run(buffers)  # compiles what is not compiled yet
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._run(buffers)
            buffers.graph = graph
            if verbose:
                seconds = time.perf_counter() - began
                print(f"\rdecode graphs: batch {size:<5} {seconds:6.1f} s", end="", file=sys.stderr, flush=True)
        self.capture_seconds = time.perf_counter() - began
        if verbose:
            sizes = ", ".join(map(str, self.buckets))
            print(f"\rdecode graphs for batches of {sizes}: {self.capture_seconds:.1f} s", file=sys.stderr)


def in_flight(token_ids: torch.Tensor, peaks: torch.Tensor, tops: Logprobs | None) -> StepResult:
    """Copies of a step's results that the next step does not overwrite, on their way to the host."""
    if not token_ids.is_cuda:
        return StepResult(token_ids.clone(), peaks.clone(), tops, None)

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    host = None if tops is None else Logprobs(*map(to_host, tops))
    result = to_host(token_ids), to_host(peaks)
    arrived = torch.cuda.Event()
    arrived.record()
    return StepResult(*result, host, arrived)
