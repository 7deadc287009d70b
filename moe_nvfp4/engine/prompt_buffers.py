"""Whole steps with prompts from CUDA graphs, for some numbers of rows.

Even with what lies between mixers in graphs (row_graphs.py), the mixers of a step of Qwen3.6 take the host 10 to 16 ms
to launch, more than an H200 needs to compute a few hundred rows. So small steps lie in one graph each, mixers included.
It has room for so many answers and so many prompts, each of any length; sequences that a step lacks have no rows. Rows
that fill it up are a prompt too, in the cache's spare slot, so that every row is one that was computed.
Without graphs the same launches follow each other, so that both ways give the same bits.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from moe_nvfp4.batch import Batch, Piece, in_order
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.kernels.rows import Rows, pack, row_lists, upload
from moe_nvfp4.models import Model
from moe_nvfp4.routing.dispatch import StepRows
from moe_nvfp4.row_graphs import Shared, alias

MOST_ROWS: Final = 1024  # from there on the GPU takes longer than the host, whose launches it hides


class PromptBuffers:
    """Where steps of R rows find their inputs, the same memory for every step."""

    def __init__(self, rows: int, cache: SequenceCache, shared: Shared, step: StepRows | None):
        self.rows, self.step, self._cache, self._shared = rows, step, cache, shared
        self._answers, self._prompts = min(rows, cache.slots), most_prompts(rows)
        whole, places = pack(self._lists([]))
        self._flat = whole.to(shared.device)
        token_ids, *described = (self._flat[place] for place in places)
        longest = min(rows, cache.settings.chunk)
        self._batch = Batch(token_ids, Rows.over(described, self._answers, longest, in_graph=True), token_ids[:0], step)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden = token_ids  # of the graph

    def fill(self, pieces: Sequence[Piece]) -> Batch:
        """Overwrites the inputs, in the order of the stream."""
        whole, _ = pack(self._lists(pieces))
        self._flat.copy_(whole.pin_memory() if self._flat.is_cuda else whole, non_blocking=True)
        (last_rows,) = upload([in_order(pieces)[1]], self._flat.device)
        return replace(self._batch, last_rows=last_rows)

    def forward(self, model: Model) -> Tensor:
        """Hidden states [R, H], to be used before the next step."""
        if self._graph is not None:
            self._graph.replay()
            return self._hidden
        hidden = model.forward(self._batch, self._cache)
        if self._shared.graphs:  # which computes nothing now: states must not go on twice
            self._graph, captured = self._shared.capture(lambda: model.forward(self._batch, self._cache))
            self._hidden = alias(captured)
        return hidden

    def _lists(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Token ids, and the rows' tensors."""
        ordered = [pieces[index] for index in in_order(pieces)[0]]
        answers = sum(len(piece.token_ids) == 1 for piece in ordered)
        filling = _filling(self.rows - sum(len(piece.token_ids) for piece in ordered), self._cache)
        prompts = [*ordered[answers:], *filling]
        nobody = Piece(self._cache.spare_slot, 0, ())
        every = [
            *ordered[:answers], *[nobody] * (self._answers - answers),
            *prompts, *[nobody] * (self._prompts - len(prompts)),
        ]  # fmt: skip
        ids = [token for piece in every for token in piece.token_ids]
        described = [(piece.slot, piece.start, len(piece.token_ids)) for piece in every]
        return [ids, *row_lists(described, self._answers, [piece.line for piece in every])]


class PromptBuffersBySize:
    """Of each number of rows, made when a step first needs them. `lines`: as in StepBuffers.new."""

    def __init__(self, sizes: Sequence[int], cache: SequenceCache, shared: Shared, *, lines: int | None):
        self.sizes, self._cache, self._shared, self._lines = list(sizes), cache, shared, lines
        self._buffers: dict[int, PromptBuffers] = {}

    def of(self, pieces: Sequence[Piece]) -> PromptBuffers | None:
        """The smallest that have room for all of them; None if there are none."""
        rows = sum(len(piece.token_ids) for piece in pieces)
        prompts = sum(len(piece.token_ids) > 1 for piece in pieces)
        for size in self.sizes:
            if size >= rows and prompts + len(_filling(size - rows, self._cache)) <= most_prompts(size):
                if size not in self._buffers:
                    self._buffers[size] = PromptBuffers(
                        size, self._cache, self._shared, StepRows.new(size, self._lines, self._shared.device)
                    )
                return self._buffers[size]
        return None


def most_prompts(rows: int) -> int:
    """That there is room for. What a prompt lacks in rows it costs in programs that leave at once."""
    return max(16, rows // 32)


def _filling(rows: int, cache: SequenceCache) -> list[Piece]:
    """Prompts of the spare slot, none longer than the cache takes."""
    most = min(cache.settings.chunk, cache.settings.max_seq_len)
    return [Piece(cache.spare_slot, 0, [0] * min(most, rows - first)) for first in range(0, rows, most)]
