"""Steps with prompts as CUDA graphs, one for each of some numbers of rows.

Launched one by one, the 900 kernels of such a step of Qwen3.6 take the host 62 ms, however few the rows; on that
machine, an H200, 256 rows are computed in 12 and 4,096 in 56. A graph serves steps of any sequences: it has room for
so many answers and so many prompts, each of any length, and sequences that a step lacks have no rows. Rows that fill it
up are a prompt too, in the cache's spare slot, so that every row is one that was computed. Without graphs the same
launches follow each other, so that both ways give the same bits.

In a group all ranks take a graph of as many rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from moe_nvfp4.batch import Batch, Piece, in_order
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.kernels.rows import Rows, pack, row_lists, upload
from moe_nvfp4.models import Model
from moe_nvfp4.routing.dispatch import StepRows

Captured = TypeVar("Captured")


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


def most_prompts(rows: int) -> int:
    """That a step has room for. What one lacks in prompts it costs in programs that leave at once."""
    return max(16, rows // 64)


class GraphPool:
    """Memory and stream of graphs that run one after the other."""

    def __init__(self, device: torch.device):
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(self, compute: Callable[[], Captured]) -> tuple[torch.cuda.CUDAGraph, Captured]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            # Not by `torch.cuda.graph`, which empties the allocator's cache. Another runner of this process may be at
            # work in its own thread.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                given = compute()
            finally:
                graph.capture_end()
        return graph, given


class PromptBuffers:
    """Where steps of R rows find their inputs, the same memory for every step. `pool`: for a graph; None: there is
    none."""

    def __init__(
        self, rows: int, cache: SequenceCache, device: torch.device, pool: GraphPool | None, step: StepRows | None
    ):
        self.rows, self.step, self._cache, self._pool = rows, step, cache, pool
        self._answers, self._prompts = min(rows, cache.slots), most_prompts(rows)
        whole, places = pack(self._lists([]))
        self._flat = whole.to(device)
        token_ids, *described = (self._flat[place] for place in places)
        self._batch = Batch(token_ids, Rows.over(described, self._answers, in_graph=True), token_ids[:0], step)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden = token_ids  # of the graph
        self._has_run = False

    def fill(self, pieces: Sequence[Piece]) -> Batch:
        """Overwrites the inputs, in the order of the stream."""
        order, ends = in_order(pieces)
        whole, _ = pack(self._lists([pieces[index] for index in order]))
        self._flat.copy_(whole.pin_memory() if self._flat.is_cuda else whole, non_blocking=True)
        (last_rows,) = upload([ends], self._flat.device)
        return replace(self._batch, last_rows=last_rows)

    def forward(self, model: Model) -> Tensor:
        """Hidden states [R, H], to be used before the next step."""
        if self._graph is None and (self._pool is None or not self._has_run):
            self._has_run = True
            return model.forward(self._batch, self._cache)
        if self._graph is None:  # the second time: what is not needed again is not worth it
            assert self._pool is not None
            self._graph, captured = self._pool.capture(lambda: model.forward(self._batch, self._cache))
            self._hidden = alias(captured)
        self._graph.replay()
        return self._hidden

    def _lists(self, ordered: Sequence[Piece]) -> list[list[int]]:
        """Token ids, and the tensors of Rows."""
        answers = sum(len(piece.token_ids) == 1 for piece in ordered)
        filling = self._filling(self.rows - sum(len(piece.token_ids) for piece in ordered))
        prompts = [*ordered[answers:], *filling]
        nobody = Piece(self._cache.spare_slot, 0, ())
        every = [
            *ordered[:answers], *[nobody] * (self._answers - answers),
            *prompts, *[nobody] * (self._prompts - len(prompts)),
        ]  # fmt: skip
        ids = [token for piece in every for token in piece.token_ids]
        described = [(piece.slot, piece.start, len(piece.token_ids)) for piece in every]
        return [ids, *row_lists(described, self._answers, [piece.line for piece in every])]

    def _filling(self, rows: int) -> list[Piece]:
        most = self._cache.most_rows
        return [Piece(self._cache.spare_slot, 0, [0] * min(most, rows - first)) for first in range(0, rows, most)]


class PromptBuffersBySize:
    """Of each number of rows, made when a step first needs them. `lines`: as in StepBuffers.new."""

    def __init__(
        self, sizes: Sequence[int], cache: SequenceCache, device: torch.device, *, graphs: bool, lines: int | None
    ):
        self.sizes, self._cache, self._device, self._lines = list(sizes), cache, device, lines
        self._pool = GraphPool(device) if graphs else None
        self._buffers: dict[int, PromptBuffers] = {}

    def of(self, rows: Sequence[int], prompts: Sequence[int]) -> PromptBuffers | None:
        """The smallest that have room for so many rows and prompts of each rank; None if there are none."""
        for size in self.sizes:
            if all(self._fits(size, *pair) for pair in zip(rows, prompts, strict=True)):
                if size not in self._buffers:
                    step = StepRows.new(size, self._lines, self._device)
                    self._buffers[size] = PromptBuffers(size, self._cache, self._device, self._pool, step)
                return self._buffers[size]
        return None

    def _fits(self, size: int, rows: int, prompts: int) -> bool:
        fillers = -(-(size - rows) // self._cache.most_rows)
        return rows <= size and prompts + fillers <= most_prompts(size)


def alias(x: Tensor) -> Tensor:
    """The same memory, which this does not keep: graphs own theirs together."""
    assert x.is_contiguous() and x.dtype == torch.bfloat16
    return torch.as_tensor(_Memory(x), device=x.device).view(torch.bfloat16).view(x.shape)


class _Memory:
    def __init__(self, x: Tensor):
        self.__cuda_array_interface__ = {
            "shape": (x.numel(),), "typestr": "<i2", "data": (x.data_ptr(), False), "version": 3,
        }  # fmt: skip
