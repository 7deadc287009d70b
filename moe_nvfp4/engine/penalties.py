"""Logits changed by what a sequence holds already, and by the request's own biases, before a token is chosen.

    repetition: logits of tokens in prompt or answer are divided by it if positive, multiplied if negative
    frequency:  minus the penalty for each time a token is in the answer;  presence: minus it once
    bias:       plus the request's value for a token

Counts lie on the device, a line for each slot, so that nothing waits for the host. Steps whose rows ask for none of
this do not come here.
"""

from collections.abc import Sequence
from typing import Final

import torch

from moe_nvfp4.kernels.rows import upload
from moe_nvfp4.sampling import SamplingParams

BYTES_PER_TOKEN: Final = 3  # of a vocabulary and slot
# Rows changed at a time, and what that takes for each: a vocabulary of 250,000 would want 1.3 GB for 256 rows at once.
ROWS_AT_ONCE: Final = 32
WORKSPACE_PER_TOKEN: Final = 5 * 4


class Penalties:
    def __init__(self, slots: int, device: torch.device):
        self._slots, self._device = slots, device
        self._prompt: torch.Tensor | None = None  # bool [slots, V]
        self._answer: torch.Tensor | None = None  # int16 [slots, V]

    def begin(self, slot: int, prompt: Sequence[int], answer: Sequence[int], vocab_size: int) -> None:
        """A slot's sequence is at its first new token here; `answer` is what it had before it lost another slot."""
        if self._prompt is None or self._answer is None:
            shape = (self._slots, vocab_size)
            self._prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._answer = torch.zeros(shape, dtype=torch.int16, device=self._device)
        self._prompt[slot].zero_()
        self._answer[slot].zero_()
        prompt_ids, answer_ids = (part.long() for part in upload([prompt, answer], self._device))
        self._prompt[slot].index_fill_(0, prompt_ids, True)
        self._answer[slot].index_add_(0, answer_ids, torch.ones_like(answer_ids, dtype=torch.int16))

    def apply(
        self, logits_RV: torch.Tensor, rows: torch.Tensor, slots: Sequence[int], params: Sequence[SamplingParams]
    ) -> None:
        """Changes float32 logits in place: of `rows`, which ask for it, and whose slots and requests these are."""
        for first in range(0, len(slots), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            logits_RV.index_copy_(0, rows[some], self._changed(logits_RV[rows[some]], slots[some], params[some]))

    def _changed(self, logits_RV: torch.Tensor, slots: Sequence[int], params: Sequence[SamplingParams]) -> torch.Tensor:
        assert self._prompt is not None and self._answer is not None
        columns = [[one.repetition_penalty, one.frequency_penalty, one.presence_penalty] for one in params]
        repetition, frequency, presence = torch.tensor(columns).to(self._device).T[:, :, None]
        (lines,) = upload([slots], self._device)
        counts, said = self._answer[lines], self._prompt[lines] | (self._answer[lines] > 0)
        repeated = torch.where(logits_RV > 0, logits_RV / repetition, logits_RV * repetition)
        logits_RV = torch.where(said, repeated, logits_RV) - frequency * counts - presence * (counts > 0)
        for row, one in enumerate(params):
            if one.logit_bias:
                ids, values = zip(*one.logit_bias, strict=True)
                (places,) = upload([ids], self._device)
                logits_RV[row].index_add_(0, places.long(), torch.tensor(values).to(self._device))
        return logits_RV

    def count(self, slots: Sequence[int], token_ids: torch.Tensor) -> None:
        """The rows' new tokens."""
        assert self._answer is not None
        (lines,) = upload([slots], self._device)
        one = torch.ones(len(slots), dtype=torch.int16, device=self._device)
        self._answer.index_put_((lines.long(), token_ids.long()), one, accumulate=True)
