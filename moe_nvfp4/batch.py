"""What travels through a forward pass: new tokens of one or several sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_nvfp4.kernels.rows import Rows, upload
from moe_nvfp4.routing.dispatch import StepRows


class Piece(NamedTuple):
    """New tokens of a sequence, to follow the `start` tokens already cached in `slot`. `line`: see Rows.lines."""

    slot: int
    start: int
    token_ids: Sequence[int]
    line: int = -1


def in_order(pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    """Which piece comes when, as the kernels want them, those of one row first; and the last row of each piece."""
    order = sorted(range(len(pieces)), key=lambda index: len(pieces[index].token_ids) != 1)
    ends, end = [0] * len(pieces), 0
    for index in order:
        end += len(pieces[index].token_ids)
        ends[index] = end - 1
    return order, ends


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids: torch.Tensor  # int32 [T]
    rows: Rows
    last_rows: torch.Tensor  # int32 [B]: the row of each piece that predicts its next token, in the pieces' order
    step: StepRows | None = None  # where ranks work together or rows are counted

    @classmethod
    def of(
        cls,
        pieces: Sequence[Piece],
        device: torch.device,
        step: StepRows | None = None,
    ) -> "Batch":
        order, ends = in_order(pieces)
        ids = [token for index in order for token in pieces[index].token_ids]
        token_ids, last_rows = upload([ids, ends], device)
        ordered = [pieces[index] for index in order]
        rows = Rows.of([(p.slot, p.start, len(p.token_ids)) for p in ordered], device, [p.line for p in ordered])
        return cls(token_ids, rows, last_rows, step)
