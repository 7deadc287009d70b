"""Requests and results, and the loop that turns one into the other: join, step, sample, leave."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.detokenize import IncrementalDetokenizer
from moe_nvfp4.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from moe_nvfp4.runner import MoERunner

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. The first token includes waiting for a free place and the prompt's prefill."""

    first_token: float
    total: float
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, after the first token."""
        elapsed = self.total - self.first_token
        return (self.new_tokens - 1) / elapsed if self.new_tokens > 1 and elapsed > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `text` ends before the stop string; `token_ids` are all tokens that were generated."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timing: Timing
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """All answers to one prompt; the properties are those of the first."""

    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def timing(self) -> Timing:
        return self.completions[0].timing

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.completions[0].logprobs


@dataclass(frozen=True, slots=True)
class Increment:
    """What one step added to one answer. The last one of an answer carries its completion."""

    prompt: int  # index of the prompt
    choice: int  # index among the prompt's n answers
    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completion.finish_reason if self.completion else None


@dataclass(slots=True)
class Answer:
    """An answer in the making."""

    prompt: int
    choice: int
    prompt_ids: Sequence[int]
    params: SamplingParams
    sampler: Sampler
    detokenizer: IncrementalDetokenizer | None
    started: float
    slot: int = -1
    cached: int = 0  # tokens whose keys and values are in the cache
    new_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_token: float = 0.0

    def pending(self, limit: int) -> Piece:
        """The next tokens to compute: a chunk of the prompt, or the last sampled token."""
        if self.cached < len(self.prompt_ids):
            return Piece(self.slot, self.cached, self.prompt_ids[self.cached : self.cached + limit])
        return Piece(self.slot, self.cached, self.new_ids[-1:])


def generate(runner: "MoERunner", waiting: deque[Answer]) -> Iterator[Increment]:
    """Runs all sequences to their end. Closing the iterator frees every slot it holds."""
    running: list[Answer] = []
    try:
        while waiting or running:
            while waiting and (runner.cache.free_slots or not running):
                waiting[0].slot = runner.cache.acquire()
                running.append(waiting.popleft())
            for sequence, increment in _step(runner, running):
                if increment.completion is not None:
                    running.remove(sequence)
                    runner.cache.release(sequence.slot)
                yield increment
    finally:
        for sequence in running:
            runner.cache.release(sequence.slot)


def _step(runner: "MoERunner", running: list[Answer]) -> list[tuple[Answer, Increment]]:
    budget = runner.prefill_chunk
    chosen: list[tuple[Answer, Piece]] = []
    # Sequences that decode go first: a long prompt beside them must not starve them.
    for sequence in sorted(running, key=lambda s: s.cached < len(s.prompt_ids)):
        if chosen and budget <= 0:
            break
        piece = sequence.pending(max(budget, 1))
        budget -= len(piece.token_ids)
        chosen.append((sequence, piece))
    batch = Batch.of([piece for _, piece in chosen], runner.device)
    with torch.inference_mode():
        hidden = runner.model.forward(batch, runner.cache)
        logits = runner.model.logits(hidden[batch.last_rows()])
    produced = []
    for row, (sequence, piece) in enumerate(chosen):
        sequence.cached += len(piece.token_ids)
        if sequence.cached >= len(sequence.prompt_ids):
            produced.append((sequence, _advance(runner, sequence, logits[row])))
    return produced


def _advance(runner: "MoERunner", sequence: Answer, logits: torch.Tensor) -> Increment:
    """Samples one token, and decides whether the answer ends with it."""
    params = sequence.params
    sampled = sequence.sampler.sample(logits)
    now = time.perf_counter() - sequence.started
    sequence.first_token = sequence.first_token or now
    sequence.new_ids.append(sampled.token_id)
    if params.logprobs is not None:
        top = tuple(sampled.top_logprobs or ())
        sequence.logprobs.append(TokenLogprob(sampled.token_id, sampled.logprob or 0.0, top))
    ends = sampled.token_id in params.stop_token_ids or (
        not params.ignore_eos and sampled.token_id in runner.eos_token_ids
    )
    text = ""
    finish: FinishReason | None = None
    if sequence.detokenizer is not None and not ends:
        text = sequence.detokenizer.push(sampled.token_id)
    if ends or (sequence.detokenizer is not None and sequence.detokenizer.stopped is not None):
        finish = "stop"
    elif len(sequence.new_ids) >= params.max_new_tokens or sequence.cached + 1 >= runner.max_seq_len:
        finish = "length"
    if finish is not None and sequence.detokenizer is not None:
        text += sequence.detokenizer.finish()
    sequence.text.append(text)
    completion = _completion(sequence, finish, now) if finish else None
    return Increment(sequence.prompt, sequence.choice, text, (sampled.token_id,), completion)


def _completion(sequence: Answer, finish: FinishReason, now: float) -> Completion:
    return Completion(
        text="".join(sequence.text),
        token_ids=tuple(sequence.new_ids),
        finish_reason=finish,
        timing=Timing(sequence.first_token, now, len(sequence.prompt_ids), len(sequence.new_ids)),
        logprobs=tuple(sequence.logprobs) if sequence.params.logprobs is not None else None,
    )
