"""The parts of a step in which every row is for itself, as CUDA graphs: all that lies between attention and delta nets.

Launched one by one, the 1,300 kernels of a step of Qwen3.6 with prompts take the host 62 ms, however few the rows; on
that machine (an H200) 1,024 rows are computed in 25. Most kernels lie between two mixers and depend on nothing but the
number of rows. For some numbers of rows they are captured, one graph for each part of the model, and a step takes the
least number that has room for its rows; those that fill it up are computed too and looked at by nobody. Mixers, which
depend on the sequences, are launched between the graphs. That leaves the host 16 to 23 ms. Small steps lie in one graph
each, see engine/prompt_buffers.py.
Without graphs the same parts run with as many rows, launch by launch, so that both ways give the same bits.

Letters: R rows of the graphs, T rows of a step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_nvfp4.routing.dispatch import StepRows

Captured = TypeVar("Captured")
Rowwise = Callable[..., tuple[Tensor, list[Tensor]]]


def row_buckets(most: int) -> list[int]:
    """Numbers of rows that get graphs: 32 apart up to 256, and then so close that at most a fifth of them fill up."""
    if most < 1:
        return []
    sizes, step = [32], 32
    while sizes[-1] < most:
        if sizes[-1] >= 8 * step:
            step *= 2
        sizes.append(min(sizes[-1] + step, most))
    return sizes


class Part(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # [R, ...], which it reads
    carried: Tensor  # [R, ...]
    given: list[Tensor]


class Shared:
    """What the graphs of all numbers of rows share: steps run one after the other."""

    def __init__(self, rows: int, device: torch.device, graphs: bool):
        self.device, self.graphs, self._rows = device, graphs, rows
        if graphs:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._inputs: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def input_like(self, place: int, x: Tensor, rows: int) -> Tensor:
        """Where a part finds its argument in this place."""
        key = place, x.shape[1:], x.dtype
        if key not in self._inputs:
            self._inputs[key] = x.new_zeros(self._rows, *x.shape[1:])
        return self._inputs[key][:rows]

    def capture(self, compute: Callable[[], Captured]) -> tuple[torch.cuda.CUDAGraph, Captured]:
        """What it gives lies in memory that all graphs share, unless it is kept."""
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            # Not by `torch.cuda.graph`, which empties the allocator's cache: there are hundreds of parts. Another
            # runner of this process may be at work in its own thread.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                given = compute()
            finally:
                graph.capture_end()
        return graph, given


class RowGraphs:
    """Of one number of rows. A part is captured when it runs for the first time. All parts run in every step, in the
    same order."""

    def __init__(self, rows: int, shared: Shared, step: StepRows | None):
        self.rows, self.step, self._shared = rows, step, shared
        self._parts: dict[int, Part] = {}
        self._carried: Tensor | None = None  # of the part that ran or was captured last: the next one reads it there

    @property
    def captures(self) -> bool:
        return self._shared.graphs

    def run(self, part: int, compute: Rowwise, carried: Tensor, *brought: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See Batch.each_row."""
        rows = len(brought[0]) if brought else len(carried)
        arguments = (carried, *brought)
        if not self.captures:
            self._carried, given = compute(*self._filled_up(arguments))
            return self._carried, [x[:rows] for x in given]
        if part not in self._parts:
            self._parts[part] = self._capture(compute, arguments)
        graph, inputs, carried_on, given = self._parts[part]
        _fill(inputs, arguments)
        graph.replay()
        return carried_on, [x[:rows] for x in given]

    def _filled_up(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Carried rows are as many as they must be; what fills others up is zeros, or older rows."""
        places = [
            x if _same(x, self._carried) else self._shared.input_like(place, x, self.rows)
            for place, x in enumerate(arguments)
        ]
        _fill(places, arguments)
        return places

    def _capture(self, compute: Rowwise, arguments: Sequence[Tensor]) -> Part:
        inputs = self._filled_up(arguments)
        self._compile(compute, inputs)
        graph, (carried, given) = self._shared.capture(lambda: compute(*inputs))
        # Parts run in the order in which they were captured. So the next one may take the memory of what only the mixer
        # between reads, and the one after that the memory of the rows carried on.
        self._carried = carried
        return Part(graph, inputs, alias(carried), [alias(x) for x in given])

    def _compile(self, compute: Rowwise, inputs: Sequence[Tensor]) -> None:
        """What is not compiled yet, and loads it, which no capture can. The graph's rows count, and not this run's."""
        if self.step is None:
            compute(*inputs)
            return
        live_G = self.step.live_G.clone()
        self.step.live_G.zero_()
        compute(*inputs)
        self.step.live_G.copy_(live_G)


class RowGraphsBySize:
    """Of each number of rows, made when a step first needs them. `lines`: as in StepBuffers.new."""

    def __init__(self, sizes: Sequence[int], shared: Shared, *, lines: int | None):
        self.sizes, self._shared, self._lines = list(sizes), shared, lines
        self._graphs: dict[int, RowGraphs] = {}

    def of(self, rows: int) -> RowGraphs | None:
        """The smallest that have room; None for more rows than any has."""
        size = next((size for size in self.sizes if size >= rows), None)
        if size is None:
            return None
        if size not in self._graphs:
            step = StepRows.new(size, self._lines, self._shared.device)
            self._graphs[size] = RowGraphs(size, self._shared, step)
        return self._graphs[size]


def _fill(inputs: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
    for place, x in zip(inputs, arguments, strict=True):
        if not _same(x, place):
            place[: len(x)].copy_(x)


def _same(x: Tensor, other: Tensor | None) -> bool:
    return other is not None and x.data_ptr() == other.data_ptr()


def alias(x: Tensor) -> Tensor:
    """The same memory, which this does not keep: graphs own theirs together."""
    assert x.is_contiguous() and x.dtype == torch.bfloat16
    return torch.as_tensor(_Memory(x), device=x.device).view(torch.bfloat16).view(x.shape)


class _Memory:
    def __init__(self, x: Tensor):
        self.__cuda_array_interface__ = {
            "shape": (x.numel(),), "typestr": "<i2", "data": (x.data_ptr(), False), "version": 3,
        }  # fmt: skip
