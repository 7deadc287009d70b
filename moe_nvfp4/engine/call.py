"""One call with its answers: submits them as the queue takes them, and cancels what is unfinished when it ends."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

from moe_nvfp4.engine.orders import Sink
from moe_nvfp4.engine.stats import EngineStats
from moe_nvfp4.errors import QueueFullError
from moe_nvfp4.generation import Answer, Completion, Generation, Increment
from moe_nvfp4.prompts import Requests


class AnsweringEngine(Protocol):
    """What a call needs of an engine, be it of this process or of ranks elsewhere."""

    @property
    def slots(self) -> int:
        """Answers that are computed at once."""

    def submit(self, answer: Answer, sink: Sink) -> None: ...

    def cancel(self, answer: Answer) -> None: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Call:
    def __init__(self, engine: AnsweringEngine, answers: deque[Answer], sink: Sink):
        self._engine, self._waiting, self._sink = engine, answers, sink
        # A call with many prompts must not fill the queue for everybody else.
        self._at_once = 2 * engine.slots
        self._submitted: dict[tuple[int, int], Answer] = {}

    @property
    def is_open(self) -> bool:
        return bool(self._waiting or self._submitted)

    def submit(self) -> None:
        """What may be submitted now. Raises QueueFullError where the queue is full of others' requests."""
        while self._waiting and len(self._submitted) < self._at_once:
            answer = self._waiting[0]
            try:
                self._engine.submit(answer, self._sink)
            except QueueFullError:
                if not self._submitted:
                    raise
                return
            self._waiting.popleft()
            self._submitted[answer.prompt, answer.choice] = answer

    def take(self, item: Increment | Exception) -> Increment:
        """What the sink got."""
        if isinstance(item, Exception):
            raise item
        if item.completion is not None:
            del self._submitted[item.prompt, item.choice]
        return item

    def cancel(self) -> None:
        for answer in self._submitted.values():
            self._engine.cancel(answer)
        self._waiting.clear()
        self._submitted.clear()


def last_only(sink: Sink) -> Sink:
    """For a caller that waits for whole answers, and need not be woken for each token."""

    def pass_on(item: Increment | Exception) -> Callable[[], None] | None:
        return sink(item) if isinstance(item, Exception) or item.completion is not None else None

    return pass_on


def generations(requests: Requests, done: dict[tuple[int, int], Completion]) -> Generation | list[Generation]:
    """Completions by (prompt, choice) as the call's result."""
    results = [
        Generation(tuple(ids), tuple(done[index, choice] for choice in range(params.n)))
        for index, (ids, params) in enumerate(zip(requests.token_ids, requests.sampling, strict=True))
    ]
    return results if requests.many else results[0]
