"""Requests and results, and the loop that turns one into the other: join, step, sample, leave."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.decoding import DecodeRow, StepResult, in_flight
from moe_nvfp4.detokenize import IncrementalDetokenizer
from moe_nvfp4.kernels.sample import Logprobs, logprobs, sample
from moe_nvfp4.sampling import Sampler, SamplingParams, check_peak, sampling_rows

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
    finished: bool = False

    @property
    def prefilling(self) -> bool:
        return self.cached < len(self.prompt_ids)

    def pending(self, limit: int) -> Piece:
        """The next tokens to compute: a chunk of the prompt, or the last sampled token."""
        if self.prefilling:
            return Piece(self.slot, self.cached, self.prompt_ids[self.cached : self.cached + limit])
        return Piece(self.slot, self.cached, self.new_ids[-1:])

    def steps_left(self, max_seq_len: int) -> int:
        """Decode steps that this answer can still take, whatever its tokens are."""
        return min(self.params.max_new_tokens - len(self.new_ids), max_seq_len - self.cached - 1)


def generate(runner: "MoERunner", waiting: deque[Answer]) -> Iterator[Increment]:
    """Runs all sequences to their end. Closing the iterator frees every slot it holds."""
    running: list[Answer] = []
    try:
        while waiting or running:
            while waiting and (runner.cache.free_slots or not running):
                waiting[0].slot = runner.cache.acquire()
                running.append(waiting.popleft())
            steps = _mixed_step if any(answer.prefilling for answer in running) else _decode_steps
            for answer, increment in steps(runner, running, bool(waiting)):
                if answer.finished:
                    running.remove(answer)
                    runner.cache.release(answer.slot)
                yield increment
    finally:
        for answer in running:
            runner.cache.release(answer.slot)


Produced = Iterator[tuple[Answer, Increment]]


def _mixed_step(runner: "MoERunner", running: list[Answer], others_wait: bool) -> Produced:
    """Chunks of prompts, beside the next token of the answers that have begun."""
    budget = runner.step_rows
    chosen: list[tuple[Answer, Piece]] = []
    # Answers that have begun go first: a long prompt beside them must not starve them.
    for answer in sorted(running, key=lambda a: a.prefilling):
        if chosen and budget <= 0:
            break
        piece = answer.pending(max(min(budget, runner.prefill_chunk), 1))
        budget -= len(piece.token_ids)
        chosen.append((answer, piece))
    ends = [answer.cached + len(piece.token_ids) >= len(answer.prompt_ids) for answer, piece in chosen]
    batch = Batch.of([piece for _, piece in chosen], runner.device)
    with torch.inference_mode():
        logits = runner.model.logits(runner.model.forward(batch, runner.cache)[batch.last_rows])
        samplers = [answer.sampler if end else None for (answer, _), end in zip(chosen, ends, strict=True)]
        token_ids, peaks = sample(logits, sampling_rows(samplers, runner.device))
        tops = _top_logprobs([answer for answer, _ in chosen])
        result = in_flight(token_ids, peaks, None if tops is None else logprobs(logits, token_ids, tops))
    values = result.wait()
    for row, ((answer, piece), end) in enumerate(zip(chosen, ends, strict=True)):
        answer.cached += len(piece.token_ids)
        if end:
            yield answer, _advance(runner, answer, row, values, result)


def _decode_steps(runner: "MoERunner", running: list[Answer], others_wait: bool) -> Produced:
    """Steps of one batch until an answer ends. On a GPU the next step is launched before the tokens of this one are
    read: the host works while the GPU does, and what an ended answer has in flight is dropped."""
    decoder, answers, owner = runner.decoder, list(running), object()
    decoder.start([DecodeRow(a.slot, a.cached, a.new_ids[-1], a.params) for a in answers], owner)
    ahead = 2 if runner.device.type == "cuda" else 1
    samples = any(not answer.params.greedy for answer in answers)
    tops, left = _top_logprobs(answers), min(answer.steps_left(runner.max_seq_len) for answer in answers)
    launched: deque[StepResult] = deque()
    while launched or not any(answer.finished for answer in answers):
        # Another iterator over the same runner may have taken the decoder while this one was paused.
        while len(launched) < ahead and left > 0 and decoder.owner is owner and not any(a.finished for a in answers):
            uniforms = [answer.sampler.uniform() for answer in answers] if samples else None
            launched.append(decoder.step(uniforms, tops))
            left -= 1
        if not launched:
            return
        result = launched.popleft()
        values = result.wait()
        for row, answer in enumerate(answers):
            if not answer.finished:
                answer.cached += 1
                yield answer, _advance(runner, answer, row, values, result)


def _top_logprobs(answers: Sequence[Answer]) -> int | None:
    wanted = [answer.params.logprobs for answer in answers if answer.params.logprobs is not None]
    return max(wanted, default=None)


def _advance(
    runner: "MoERunner", answer: Answer, row: int, values: tuple[list[int], list[float]], result: StepResult
) -> Increment:
    """Takes one token, and decides whether the answer ends with it."""
    params, token_id = answer.params, values[0][row]
    check_peak(values[1][row])
    now = time.perf_counter() - answer.started
    answer.first_token = answer.first_token or now
    answer.new_ids.append(token_id)
    if params.logprobs is not None and result.logprobs is not None:
        answer.logprobs.append(_logprob(token_id, row, params.logprobs, result.logprobs))
    ends = token_id in params.stop_token_ids or (not params.ignore_eos and token_id in runner.eos_token_ids)
    text = ""
    finish: FinishReason | None = None
    if answer.detokenizer is not None and not ends:
        text = answer.detokenizer.push(token_id)
    if ends or (answer.detokenizer is not None and answer.detokenizer.stopped is not None):
        finish = "stop"
    elif answer.steps_left(runner.max_seq_len) <= 0:
        finish = "length"
    if finish is not None and answer.detokenizer is not None:
        text += answer.detokenizer.finish()
    answer.text.append(text)
    answer.finished = finish is not None
    completion = _completion(answer, finish, now) if finish else None
    return Increment(answer.prompt, answer.choice, text, (token_id,), completion)


def _logprob(token_id: int, row: int, count: int, found: Logprobs) -> TokenLogprob:
    """Tokens of probability 0 are left out of the alternatives."""
    pairs = zip(found.ids_BK[row, :count].tolist(), found.values_BK[row, :count].tolist(), strict=True)
    return TokenLogprob(token_id, float(found.chosen_B[row]), tuple(p for p in pairs if p[1] > -math.inf))


def _completion(answer: Answer, finish: FinishReason, now: float) -> Completion:
    return Completion(
        text="".join(answer.text),
        token_ids=tuple(answer.new_ids),
        finish_reason=finish,
        timing=Timing(answer.first_token, now, len(answer.prompt_ids), len(answer.new_ids)),
        logprobs=tuple(answer.logprobs) if answer.params.logprobs is not None else None,
    )
