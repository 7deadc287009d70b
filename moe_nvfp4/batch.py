"""What travels through a forward pass: new tokens of one or several sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """The rows of one sequence: rows `begin` to `end` are its positions from `start` on."""

    slot: int
    start: int
    begin: int
    end: int

    @property
    def length(self) -> int:
        """Tokens of the sequence after this step."""
        return self.start + self.end - self.begin


class Piece(NamedTuple):
    """New tokens of a sequence, to follow the `start` tokens already cached in `slot`."""

    slot: int
    start: int
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device) -> "Batch":
        spans: list[Span] = []
        begin = 0
        for slot, start, token_ids in pieces:
            spans.append(Span(slot, start, begin, begin + len(token_ids)))
            begin += len(token_ids)
        ids = [token for piece in pieces for token in piece.token_ids]
        positions = [span.start + row for span in spans for row in range(span.end - span.begin)]
        return cls(torch.tensor(ids, device=device), torch.tensor(positions, device=device), tuple(spans))

    def last_rows(self) -> list[int]:
        """The row of each span that predicts its next token."""
        return [span.end - 1 for span in self.spans]
