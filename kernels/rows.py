"""Which rows of a step belong to which sequence: the description that attention and recurrent layers share.

A step computes T rows of B sequences. The rows of sequence b are starts[b] to starts[b + 1], and they are its last
positions. Sequences with one row come first, so that decoding and prefill are each one launch. Every sequence has a
slot: its line in a page table, its place among recurrent states. Slots of padding rows are spare ones. Recurrent
layers take a sequence's rows 64 at a time, and can leave the states before the last of these chunks in a line as well.
"""

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    positions: Tensor  # int32 [T]
    row_slots: Tensor  # int32 [T], the slot of each row's sequence
    slots: Tensor  # int32 [B]
    starts: Tensor  # int32 [B + 1]
    lengths: Tensor  # int32 [B], tokens of each sequence after this step
    lines: Tensor  # int32 [B], for the states before each sequence's last chunk; -1: none, as for 64 rows or fewer
    decodes: int  # the first so many sequences have exactly one row
    longest: int  # most rows of one sequence

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
        parts = [
            [before + row for _, before, count in pieces for row in range(count)],
            [slot for slot, _, count in pieces for _ in range(count)],
            [slot for slot, _, _ in pieces],
            [0, *accumulate(counts)],
            [before + count for _, before, count in pieces],
            [-1] * len(pieces) if lines is None else lines,
        ]
        positions, row_slots, slots, starts, lengths, kept = upload(parts, device)
        return cls(positions, row_slots, slots, starts, lengths, kept, decodes, longest=max(counts, default=0))

    def prefills(self) -> "Rows":
        """The sequences after the decoding ones; their `starts` still count rows of the whole step."""
        first = self.decodes
        slots, starts, lengths, lines = (x[first:] for x in (self.slots, self.starts, self.lengths, self.lines))
        return self._replace(slots=slots, starts=starts, lengths=lengths, lines=lines, decodes=0)


def upload(parts: Sequence[Sequence[int]], device: torch.device | str) -> list[Tensor]:
    """Lists as int32 tensors, in one copy. Each begins at a multiple of 16 bytes, for which kernels are compiled."""
    flat, starts = array("i"), []  # twice as fast for torch to take as a list
    for part in parts:
        flat.extend([0] * (-len(flat) % 4))
        starts.append(len(flat))
        flat.extend(part)
    whole = torch.frombuffer(flat, dtype=torch.int32) if flat else torch.empty(0, dtype=torch.int32)
    if torch.device(device).type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return [whole[start : start + len(part)] for start, part in zip(starts, parts, strict=True)]
