"""`GroupEngine`: what clients' calls need of an engine, over workers that may be replaced while it serves.

The driver keeps of every open answer its tokens so far. When a rank fails the group is ended and built again, on as
many GPUs as there are, and every open answer goes on from its tokens; its client sees nothing but a pause.
"""

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import ray
from ray.exceptions import RayError

from moe_nvfp4.engine.orders import Sink, hand_out
from moe_nvfp4.engine.stats import EngineStats
from moe_nvfp4.errors import EngineError, MemoryPlanError, MoeNvfp4Error, QueueFullError
from moe_nvfp4.generation import Answer, Increment, Timing
from moe_nvfp4.launch.group_workers import BEAT_EVERY, CLOSING_SECONDS, GroupSettings, WorkerFailed, Workers, place
from moe_nvfp4.launch.worker import Request

FAILURES_AT_MOST: Final = 4  # within FAILURE_WINDOW seconds; then the group gives up
FAILURE_WINDOW: Final = 300.0
FAILURES_OF_A_REQUEST: Final = 3  # without a token between them; then it is taken for the cause
PLACEMENT_SECONDS_AGAIN: Final = 10.0  # a process that hangs needs 5 s to be killed; then fewer ranks are tried
PLACEMENT_SECONDS_FEWER: Final = 2.0
RELEASE_SECONDS: Final = 3.0


@dataclass(slots=True, eq=False)
class Open:
    """An answer that is not complete."""

    answer: Answer
    sink: Sink
    sent_to: int = -1  # the number of the group that has it
    failures: int = 0


class GroupEngine:
    """Started when it is built. All methods may be called from any thread."""

    def __init__(self, model: str, model_settings: dict[str, Any], settings: GroupSettings, verbose: bool):
        self._model, self._model_settings, self._settings = model, model_settings, settings
        self._verbose = verbose
        self._lock = threading.Lock()
        self._open: dict[int, Open] = {}
        self._next_ident, self._number = 0, 0
        self._over: Exception | None = None
        self._closing = threading.Event()
        self._outbox: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # idents, or minus 1 - ident to cancel
        self._failed_at: deque[float] = deque(maxlen=FAILURES_AT_MOST)
        self.recoveries: list[float] = []  # seconds from the notice to the first token of each new group
        self._max_waiting = int(model_settings.get("max_waiting", 4096))
        self._workers: Workers | None = None
        self._workers = workers = self._start(settings.placement_seconds)
        self.profile, self.load_seconds = workers.profile, workers.load_seconds
        assert workers.stats is not None
        self._stats = workers.stats
        self._threads = [
            threading.Thread(target=run, name=f"moe-nvfp4 group: {name}", daemon=True)
            for name, run in (("send", self._send), ("watch", self._watch))
        ]
        self._receive_from(workers)
        for thread in self._threads:
            thread.start()

    @property
    def slots(self) -> int:
        return self.profile.slots

    def stats(self) -> EngineStats:
        """Of rank 0, some tenths of a second ago; counted from the last start of the group."""
        if (workers := self._workers) is not None and workers.stats is not None:
            self._stats = workers.stats
        return self._stats

    @property
    def rebuilding(self) -> bool:
        """Whether answers pause because the group has failed and is being built again."""
        return self._workers is None and self._over is None and not self._closing.is_set()

    @property
    def workers(self) -> Workers:
        """Those of now."""
        with self._lock:
            self._require_alive()
            if self._workers is None:
                raise EngineError("the group is being rebuilt after a failure; try again in some seconds")
            return self._workers

    def submit(self, answer: Answer, sink: Sink) -> None:
        """As `Engine.submit`; `sink` is called in a thread of the group's."""
        with self._lock:
            self._require_alive()
            if len(self._open) >= self.slots + self._max_waiting:
                raise QueueFullError(
                    f"{len(self._open):,} requests are running or waiting, as many as may. Try again later, or load "
                    "with a larger max_waiting."
                )
            answer.sequence.ident = ident = self._next_ident
            self._next_ident += 1
            self._open[ident] = Open(answer, sink)
            self._outbox.put(ident)

    def cancel(self, answer: Answer) -> None:
        with self._lock:
            if self._open.pop(answer.sequence.ident, None) is not None:
                self._outbox.put(-1 - answer.sequence.ident)

    def close(self) -> None:
        """Ends the workers; what is unfinished gets an error."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            workers, self._workers = self._workers, None
        self._outbox.put(None)
        if workers is not None:
            workers.close()
        for thread in self._threads:
            thread.join(CLOSING_SECONDS)  # one that builds the group again ends what it has built, later
        self._fail_all(EngineError("the runner was closed before the answer was complete"))

    def _require_alive(self) -> None:
        if self._over is not None:
            raise EngineError(f"the group stopped: {self._over}") from self._over
        if self._closing.is_set():
            raise EngineError("the runner is closed; load the model again")

    def _report(self, line: str) -> None:
        if self._verbose:
            print(line, file=sys.stderr, flush=True)

    def _start(self, placement_seconds: float, *, again: bool = False) -> Workers:
        """On as many ranks as asked for. `again`: answers wait, so on as many as there is room for, and graphs of steps
        with prompts are captured when they come."""
        settings, model_settings = self._settings, self._model_settings | ({"warm_up": False} if again else {})
        for size in range(settings.gpus, 0 if again else settings.gpus - 1, -1):
            if (group := place(settings, size, placement_seconds)) is None:
                placement_seconds = PLACEMENT_SECONDS_FEWER
                continue
            if size < settings.gpus:
                self._report(f"there is room for {size} of {settings.gpus} ranks; going on with them")
            return Workers(settings, group, self._model, model_settings, self._report)
        wanted = f"{settings.gpus} ranks of {settings.bundle}, {settings.strategy}"
        raise EngineError(f"no room in this Ray cluster for {wanted}: it has {ray.available_resources()} free")

    def _send(self) -> None:
        """Orders travel together when they come faster than they can be sent."""
        closing = False
        while not closing:
            taken = [self._outbox.get()]
            with suppress(queue.Empty):
                while True:
                    taken.append(self._outbox.get_nowait())
            closing = None in taken
            with self._lock:
                if self._workers is None:
                    continue  # what is open is sent when there is a group again
                cancelled = [-1 - item for item in taken if item is not None and item < 0]
                requests = [self._request(item) for item in taken if item is not None and item in self._open]
                wanted = [request for request in requests if request is not None]
                if bound := [request.params for request in wanted if request.params.constraint is not None]:
                    for follower in self._workers.actors[1:]:
                        follower.expect.remote(bound)
                if wanted or cancelled:
                    self._workers.leader.take.remote(wanted, cancelled)

    def _request(self, ident: int) -> Request | None:
        """None if this group has it already."""
        one = self._open[ident]
        if one.sent_to == self._number:
            return None
        one.sent_to, sequence = self._number, one.answer.sequence
        seconds = None if sequence.deadline is None else max(0.0, sequence.deadline - time.monotonic())
        length, answered = sequence.prompt_length, list(one.answer.new_ids)
        return Request(ident, sequence.tokens[:length], answered, one.answer.params, one.answer.choice, seconds)

    def _receive_from(self, workers: Workers) -> None:
        thread = threading.Thread(
            target=self._receive, args=(workers, self._number), name="moe-nvfp4 group: receive", daemon=True
        )
        thread.start()

    def _receive(self, workers: Workers, number: int) -> None:
        try:
            for batch in workers.increments():
                hand_out(self._taken(number, ray.get(batch)))
        except RayError:
            return  # `_watch` notices as well, and knows why
        except Exception as error:
            self._give_up(EngineError(f"a client's sink has raised {error!r}"))

    def _taken(
        self, number: int, batch: list[tuple[int, Increment | Exception]]
    ) -> Iterator[tuple[Sink, Increment | Exception]]:
        for ident, item in batch:
            with self._lock:
                one = self._open.get(ident)
                if one is None or number != self._number:
                    continue  # cancelled, or of a group that is gone
                if isinstance(item, Exception):
                    if not isinstance(item, MoeNvfp4Error | FloatingPointError) or isinstance(item, EngineError):
                        continue  # the group fails; the answer will go on
                    del self._open[ident]
                else:
                    item = _recorded(one.answer, item)
                    one.failures = 0
                    if item.completion is not None:
                        del self._open[ident]
            yield one.sink, item

    def _watch(self) -> None:
        while not self._closing.wait(BEAT_EVERY):
            workers = self._workers
            try:
                if workers is not None:
                    workers.check()
            except WorkerFailed as failure:
                if not self._closing.is_set() and not self._recover(workers, failure):
                    return
            except Exception as error:
                self._give_up(EngineError(f"Ray is gone: {error!r}"))
                return

    def _recover(self, workers: Workers | None, failure: WorkerFailed) -> bool:
        """Ends the group and builds it again, until it decodes or has failed too often."""
        noticed = time.monotonic()
        with self._lock:
            self._workers, self._number = None, self._number + 1
        while not self._closing.is_set():
            self._report(f"{failure}\nThe group is built again; {len(self._open)} answers go on from their tokens.")
            if workers is not None:
                workers.end()
            self._failed_at.append(time.monotonic())
            if len(self._failed_at) == FAILURES_AT_MOST and self._failed_at[-1] - self._failed_at[0] < FAILURE_WINDOW:
                return self._give_up(
                    EngineError(f"{FAILURES_AT_MOST} failures within {FAILURE_WINDOW:g} s; the last: {failure}")
                )
            if workers is not None:  # a group that never began had no requests
                self._drop_suspects(failure)
            try:
                workers = self._start(PLACEMENT_SECONDS_AGAIN, again=True)
            except WorkerFailed as again:
                workers, failure = None, again
                continue
            except MemoryPlanError as again:  # planned beside a process that ends, but has not let go of its memory yet
                workers, failure = None, WorkerFailed(str(again))
                self._closing.wait(RELEASE_SECONDS)
                continue
            except Exception as error:
                return self._give_up(EngineError(f"the group cannot be built again: {error}; it failed as {failure}"))
            self.recoveries.append(time.monotonic() - noticed)
            self._report(f"the group decodes again, {self.recoveries[-1]:.1f} s after the failure was noticed")
            with self._lock:
                if self._closing.is_set():
                    workers.end()
                    return False
                self._workers = workers
                for ident in sorted(self._open):
                    self._outbox.put(ident)
            self._receive_from(workers)
            return True
        return False

    def _drop_suspects(self, failure: WorkerFailed) -> None:
        """Requests at whose side a group failed again and again, without a token in between. The last one that did has
        the number before this."""
        dropped = []
        with self._lock:
            for ident, one in list(self._open.items()):
                one.failures += one.sent_to == self._number - 1
                if one.failures >= FAILURES_OF_A_REQUEST:
                    dropped.append(self._open.pop(ident))
        for one in dropped:
            why = EngineError(f"the group failed {one.failures} times while it computed this; the last: {failure}")
            hand_out([(one.sink, why)])

    def _give_up(self, error: EngineError) -> bool:
        self._report(f"giving up: {error}")
        with self._lock:
            self._over = error
        self._fail_all(error)
        return False

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            ended, self._open = list(self._open.values()), {}
        hand_out((one.sink, error) for one in ended)


def _recorded(answer: Answer, item: Increment) -> Increment:
    """The increment in terms of the client's call, whichever group gave it."""
    now = time.perf_counter() - answer.started
    answer.first_token = answer.first_token or now
    answer.new_ids += item.token_ids
    answer.logprobs += item.logprobs
    completion = item.completion
    if completion is not None:
        length, reused = answer.sequence.prompt_length, completion.timing.reused_tokens
        completion = replace(
            completion,
            timing=Timing(answer.first_token, now, length, len(answer.new_ids), reused),
            logprobs=None if completion.logprobs is None else tuple(answer.logprobs),
        )
    return replace(item, prompt=answer.prompt, choice=answer.choice, completion=completion)
