"""Which rows of a step belong to which sequence: the description that attention and recurrent layers share.

A step computes T rows of B sequences. The rows of sequence b are starts[b] to starts[b + 1], and they are its last
positions. Sequences with one row come first, so that decoding and prefill are each one launch. Every sequence has a
slot: its line in a page table, its place among recurrent states. Slots of padding rows are spare ones. Prompts are
taken 64 rows at a time; recurrent layers can leave the states before the last of these chunks in a line as well.

A CUDA graph serves steps of other sequences than it was captured with. So what it launches depends on the room there is
for sequences of either kind: those that a step lacks have no rows, and the length 0.
"""

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import torch
from torch import Tensor

CHUNK: Final = 64  # rows


class Rows(NamedTuple):
    positions: Tensor  # int32 [T]
    row_slots: Tensor  # int32 [T], the slot of each row's sequence
    slots: Tensor  # int32 [B]
    starts: Tensor  # int32 [B + 1]
    lengths: Tensor  # int32 [B], tokens of each sequence after this step
    lines: Tensor  # int32 [B], for the states before each sequence's last chunk; -1: none, as for 64 rows or fewer
    chunks: Tensor  # int32 [places], whose each chunk of the sequences of many rows is: see chunk_places
    decodes: int  # the first so many sequences have one row, or none
    in_graph: bool = False  # sizes say what there is room for, not what there is

    @classmethod
    def of(
        cls,
        pieces: Sequence[tuple[int, int, int]],
        device: torch.device | str = "cpu",
        lines: Sequence[int] | None = None,
    ) -> "Rows":
        """From (slot, tokens before this step, rows) of each sequence, those of one row first."""
        counts = [count for _, _, count in pieces]
        decodes = next((index for index, count in enumerate(counts) if count != 1), len(counts))
        assert 1 not in counts[decodes:], f"sequences of one row come first, got {counts}"
        return cls.over(upload(row_lists(pieces, decodes, lines), device), decodes)

    @classmethod
    def over(cls, tensors: Sequence[Tensor], decodes: int, *, in_graph: bool = False) -> "Rows":
        """Of what `row_lists` gives."""
        positions, row_slots, slots, starts, lengths, lines, chunks = tensors
        return cls(positions, row_slots, slots, starts, lengths, lines, chunks, decodes, in_graph)

    def prefills(self) -> "Rows":
        """The sequences after the decoding ones; their `starts` still count rows of the whole step."""
        first = self.decodes
        slots, starts, lengths, lines = (x[first:] for x in (self.slots, self.starts, self.lengths, self.lines))
        return self._replace(slots=slots, starts=starts, lengths=lengths, lines=lines, decodes=0)


def row_lists(
    pieces: Sequence[tuple[int, int, int]], decodes: int, lines: Sequence[int] | None = None
) -> list[list[int]]:
    """The tensors of Rows, in their order, from (slot, tokens before this step, rows) of each sequence."""
    counts = [count for _, _, count in pieces]
    starts = [0, *accumulate(counts)]
    return [
        [before + row for _, before, count in pieces for row in range(count)],
        [slot for slot, _, count in pieces for _ in range(count)],
        [slot for slot, _, _ in pieces],
        starts,
        [before + count for _, before, count in pieces],
        [-1] * len(pieces) if lines is None else list(lines),
        chunk_places(starts[decodes:]),
    ]


def chunk_places(starts: Sequence[int]) -> list[int]:
    """Which sequence's chunk belongs in each place, or -1. Sequence b has the places from starts[b] // CHUNK + b on, as
    many as it has chunks. So sequences never share one, and how many there are follows from the numbers of both."""
    sequences = len(starts) - 1
    places = [-1] * (starts[-1] // CHUNK + sequences)
    for b in range(sequences):
        first, chunks = starts[b] // CHUNK + b, -(-(starts[b + 1] - starts[b]) // CHUNK)
        places[first : first + chunks] = [b] * chunks
    return places


def upload(parts: Sequence[Sequence[int]], device: torch.device | str) -> list[Tensor]:
    """Lists as int32 tensors, in one copy."""
    whole, places = pack(parts)
    if torch.device(device).type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return [whole[place] for place in places]


def pack(parts: Sequence[Sequence[int]]) -> tuple[Tensor, list[slice]]:
    """Lists as one tensor on the CPU. Each begins at a multiple of 16 bytes, for which kernels are compiled."""
    flat, starts = array("i"), []  # twice as fast for torch to take as a list
    for part in parts:
        flat.extend([0] * (-len(flat) % 4))
        starts.append(len(flat))
        flat.extend(part)
    whole = torch.frombuffer(flat, dtype=torch.int32) if flat else torch.empty(0, dtype=torch.int32)
    return whole, [slice(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
