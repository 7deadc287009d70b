"""The side that clients see, wherever the model is: prompts in, answers out."""

import queue
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, overload

from moe_nvfp4.detokenize import IncrementalDetokenizer
from moe_nvfp4.engine import scheduler
from moe_nvfp4.engine.call import AnsweringEngine, Call, generations, last_only
from moe_nvfp4.expert_loads import ExpertLoads
from moe_nvfp4.generation import Answer, Generation, Increment
from moe_nvfp4.prompts import Message, Prompt, PromptEncoder, Requests
from moe_nvfp4.sampling import Sampler, SamplingParams
from moe_nvfp4.tokenizer import Tokenizer


class Frontend:
    """`generate` and `stream` over an engine that answers. A context manager that closes it."""

    prompts: PromptEncoder
    engine: AnsweringEngine
    max_seq_len: int
    expert_loads: ExpertLoads | None = None  # where rows are counted

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.prompts.tokenizer

    @overload  # a str is a Sequence[str] to the type checker, hence the ignore
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, sampling: SamplingParams | None = None
    ) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[int], sampling: SamplingParams | None = None) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[Message], sampling: SamplingParams | None = None) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]: ...

    def generate(
        self, prompts: Any, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generation | list[Generation]:
        """Answers one prompt or many. A prompt is a string, a list of chat messages, or a list of token ids.

        Many prompts may come with one SamplingParams for all, or one each.
        """
        requests = self.prompts.encode(prompts, sampling)
        ends = self._serve(requests, only_last=True)
        return generations(requests, {(end.prompt, end.choice): end.completion for end in ends if end.completion})

    def stream(
        self, prompts: Any, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Increment]:
        """The same, as increments while they come. A bad request raises here; closing the iterator frees its slots."""
        return self._serve(self.prompts.encode(prompts, sampling))

    def answers(self, requests: Requests) -> deque[Answer]:
        """Of all prompts and choices, in order, not yet submitted."""
        now = time.monotonic()
        answers = deque[Answer]()
        for index, (ids, params) in enumerate(zip(requests.token_ids, requests.sampling, strict=True)):
            if params.seed is None and not params.greedy:
                # Drawn here, once: whoever computes the answer, or goes on with it elsewhere, gets the same numbers.
                params = replace(params, seed=secrets.randbits(63))
            for choice in range(params.n):
                answer = self.answer(ids, [], params, choice)
                answer.prompt = index
                answer.sequence.deadline = None if params.timeout is None else now + params.timeout
                answers.append(answer)
        return answers

    def answer(self, prompt: list[int], answered: list[int], params: SamplingParams, choice: int) -> Answer:
        """One in the making, which may have some tokens already."""
        answer = Answer(
            prompt=0,
            choice=choice,
            params=params,
            sequence=scheduler.Sequence(
                ident=-1,
                tokens=list(prompt),
                max_new_tokens=params.max_new_tokens,
                max_length=self.max_seq_len,
                priority=params.priority,
                stepwise=params.constraint is not None,
            ),
            sampler=Sampler(params, choice),
            detokenizer=IncrementalDetokenizer(
                self.tokenizer,
                params.stop,
                skip_special_tokens=params.skip_special_tokens,
                pieces=self.tokenizer.pieces(params.skip_special_tokens),
            )
            if self.tokenizer
            else None,
            started=time.perf_counter(),
            matcher=self.prompts.matcher(params),
        )
        answer.resume(answered)
        return answer

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, requests: Requests, *, only_last: bool = False) -> Iterator[Increment]:
        """Increments of all answers as they come, or the last of each. Leaving early cancels what is unfinished."""
        arrived: queue.SimpleQueue[Increment | Exception] = queue.SimpleQueue()
        call = Call(self.engine, self.answers(requests), last_only(arrived.put) if only_last else arrived.put)
        try:
            while call.is_open:
                call.submit()
                yield call.take(arrived.get())
        finally:
            call.cancel()
