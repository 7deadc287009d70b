"""Requests and results: answers in the making, their increments, completions and timings."""

import math
import time
from dataclasses import dataclass, field
from typing import Literal

from moe_nvfp4.detokenize import IncrementalDetokenizer
from moe_nvfp4.engine.scheduler import Sequence
from moe_nvfp4.errors import RequestError
from moe_nvfp4.grammar import Matcher
from moe_nvfp4.kernels.sample import Logprobs
from moe_nvfp4.sampling import Sampler, SamplingParams, check_peak

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
    reused_tokens: int = 0  # of the prompt, found in the cache

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


@dataclass(slots=True)  # to build a frozen one takes three times as long, and there is one for each token
class Increment:
    """What one step added to one answer. The last one of an answer carries its completion."""

    prompt: int  # index of the prompt
    choice: int  # index among the prompt's n answers
    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of token_ids, if the request asked for them

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completion.finish_reason if self.completion else None


@dataclass(slots=True)
class Answer:
    """An answer in the making."""

    prompt: int
    choice: int
    params: SamplingParams
    sequence: Sequence
    sampler: Sampler
    detokenizer: IncrementalDetokenizer | None
    started: float
    matcher: Matcher | None = None  # of an answer that follows a grammar
    new_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_token: float = 0.0

    def resume(self, token_ids: list[int]) -> None:
        """Takes tokens that it got elsewhere, before it is submitted here."""
        self.sequence.tokens += token_ids  # beyond the prompt, as after a preemption
        self.new_ids += token_ids
        self.sampler.skip(len(token_ids))
        for token_id in token_ids:
            self._follow(token_id)
        if self.detokenizer is not None:
            self.text += map(self.detokenizer.push, token_ids)

    def advance(
        self, row: int, token_id: int, peak: float, found: Logprobs | None, eos_token_ids: frozenset[int]
    ) -> Increment:
        """Takes one token, row `row` of a step, and decides whether the answer ends with it."""
        params = self.params
        if self.matcher is not None and peak == -math.inf:
            raise RequestError(f"SamplingParams.{_kind(params)}: no token of this model's vocabulary fits here")
        check_peak(peak)
        self._follow(token_id)
        now = time.perf_counter() - self.started
        self.first_token = self.first_token or now
        self.new_ids.append(token_id)
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None and found is not None:
            logprobs = (_logprob(token_id, row, params.logprobs, found),)
            self.logprobs += logprobs
        ends = token_id in params.stop_token_ids or (not params.ignore_eos and token_id in eos_token_ids)
        text = ""
        finish: FinishReason | None = None
        if self.detokenizer is not None and not ends:
            text = self.detokenizer.push(token_id)
        if ends or (self.detokenizer is not None and self.detokenizer.stopped is not None):
            finish = "stop"
        elif self._is_full():
            finish = "length"
        if finish is not None and self.detokenizer is not None:
            text += self.detokenizer.finish()
        self.text.append(text)
        completion = self._completion(finish, now) if finish else None
        return Increment(self.prompt, self.choice, text, (token_id,), completion, logprobs)

    def _follow(self, token_id: int) -> None:
        if self.matcher is not None and not self.matcher.accept(token_id):
            raise RequestError(f"SamplingParams.{_kind(self.params)}: token {token_id} does not follow it")

    def _is_full(self) -> bool:
        length = self.sequence.prompt_length + len(self.new_ids)
        return len(self.new_ids) >= self.params.max_new_tokens or length >= self.sequence.max_length

    def _completion(self, finish: FinishReason, now: float) -> Completion:
        return Completion(
            text="".join(self.text),
            token_ids=tuple(self.new_ids),
            finish_reason=finish,
            timing=Timing(self.first_token, now, self.sequence.prompt_length, len(self.new_ids), self.sequence.reused),
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
        )


def _kind(params: SamplingParams) -> str:
    return params.constraint.kind if params.constraint else ""


def _logprob(token_id: int, row: int, count: int, found: Logprobs) -> TokenLogprob:
    """Tokens of probability 0 are left out of the alternatives."""
    pairs = zip(found.ids_BK[row, :count].tolist(), found.values_BK[row, :count].tolist(), strict=True)
    return TokenLogprob(token_id, float(found.chosen_B[row]), tuple(p for p in pairs if p[1] > -math.inf))
