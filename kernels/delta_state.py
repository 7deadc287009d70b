"""What gated delta nets keep of a sequence. The state of a head is not written at every token.

Beside the state as it was last written lies an entry for each token since. S = fade S + k added^T, an entry after the
other, gives the state of now, in the same operations and so with the same bits as if it had been written each time. An
entry is 1 KB where a state is 64. A step of many sequences writes a head's state in its turn only, every PERIOD tokens.
Heads take turns by position, whatever the slot and whatever else runs, so that every step writes as many as the next.
With fewer sequences than LAZY_FROM, and by prompts, every state is written. Either goes on from what the other left.

Letters: C channels, K taps of the convolution, H value heads, N tokens from turn to turn.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

PERIOD: Final = 4  # 8 is 5 % faster at 256 sequences, 16 % slower at 8, and takes more than twice the memory
LAZY_FROM: Final = 8  # sequences: 8.6 us against 10.8 at 8, 3.7 against 3.0 at 1; see delta_step.py


class Heads(NamedTuple):
    HK: int
    HV: int
    DK: int
    DV: int

    @property
    def channels(self) -> int:
        return 2 * self.HK * self.DK + self.HV * self.DV


def bytes_per_token(heads: Heads, sequences: int) -> float:
    """Of states and entries, of one layer and each of so many sequences: the mean over a period of decode steps."""
    state, entry = 4 * heads.HV * heads.DK * heads.DV, 4 * heads.HV * (heads.DK + heads.DV + 1)
    if sequences < LAZY_FROM:
        return 2 * state
    return state + (state + (PERIOD - 1) * entry) / PERIOD + (PERIOD - 1) / 2 * entry


class DeltaState(NamedTuple):
    """Of one layer, a line for each slot. What a slot holds before its sequence's first row is never used."""

    conv: Tensor  # [slots, K, C], the dtype of activations: the input of position p lies at p % K
    recurrent: Tensor  # float32 [slots, HV, DK, DV]: after a head's first `written` tokens
    entries: Tensor  # float32 [slots, HV, N - 1, DK + DV]: k and added of position p of head h at (p + h) % N
    fades: Tensor  # float32 [slots, HV, N - 1]
    written: Tensor  # int32 [slots, HV], never less than since the head's last turn; of no use at position 0

    @classmethod
    def empty(
        cls,
        lines: Sequence[int],
        heads: Heads,
        taps: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        period: int = PERIOD,
    ) -> "DeltaState":
        """Not initialised. `lines` are the leading dimensions of all parts."""
        return cls(
            torch.empty(*lines, taps, heads.channels, dtype=dtype, device=device),
            torch.empty(*lines, heads.HV, heads.DK, heads.DV, device=device),
            torch.empty(*lines, heads.HV, period - 1, heads.DK + heads.DV, device=device),
            torch.empty(*lines, heads.HV, period - 1, device=device),
            torch.empty(*lines, heads.HV, dtype=torch.int32, device=device),
        )

    @property
    def heads(self) -> Heads:
        value_heads, dk, dv = self.recurrent.shape[1:]
        return Heads((self.conv.shape[-1] - value_heads * dv) // (2 * dk), value_heads, dk, dv)

    @property
    def period(self) -> int:
        return self.fades.shape[-1] + 1

    def memory(self, slot: int, length: int) -> Tensor:
        """[HV, DK, DV] after `length` tokens, in the dtype of `recurrent`: zeros, or what was written and the entries
        since."""
        memory = self.recurrent[slot]
        if length == 0:
            return torch.zeros_like(memory)
        if bool((self.written[slot] == length).all()):
            return memory.clone()
        since = (length + torch.arange(len(memory), device=memory.device)) % self.period
        for cell in range(self.period - 1):
            position = length - since + cell
            there = (cell < since) & (position >= self.written[slot])
            k, added = self.entries[slot, :, cell].to(memory.dtype).split(memory.shape[1:], dim=-1)
            later = self.fades[slot, :, cell, None, None] * memory + k[:, :, None] * added[:, None, :]
            memory = torch.where(there[:, None, None], later, memory)
        return memory
