"""The loop that serves: takes requests, plans steps, launches them, and hands out tokens. One thread owns the model.

On a GPU a step is launched before the tokens of the one before it have arrived, so the host works while the GPU does;
what an answer that has ended still has in flight is dropped. An error of one request ends that request; an error of a
step ends all of them, with the reason. With several ranks each has such a loop, and all take the same orders at the
same turns (see orders.py).
"""

import queue
import threading
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch

from moe_nvfp4.engine.data_parallel import DataParallelScheduler
from moe_nvfp4.engine.launch import SeparateResults, launch
from moe_nvfp4.engine.orders import Call, Cancel, Close, Late, LocalOrders, Order, Orders, Sink, Submit, hand_out
from moe_nvfp4.engine.scheduler import Scheduler, Sequence, Step
from moe_nvfp4.engine.stats import Counters, EngineStats
from moe_nvfp4.engine.stepper import Stepper, StepResult
from moe_nvfp4.errors import DeadlineError, EngineError, QueueFullError, RequestError
from moe_nvfp4.generation import Answer, Increment

Result = TypeVar("Result")


class Flight(NamedTuple):
    step: Step
    result: StepResult | SeparateResults
    launched: float  # by time.monotonic()


class Engine:
    """Started when it is built. All methods may be called from any thread.

    `turns` counts up while the loop lives: with several ranks at least every BEAT_SECONDS, alone while it is busy.
    `named` are the functions that `call_everywhere` may run. `step_bytes`: what a step of next tokens must move, given
    the tokens of each of its sequences; without it none is counted.
    """

    def __init__(
        self,
        stepper: Stepper,
        scheduler: Scheduler | DataParallelScheduler,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        orders: Orders | None = None,
        step_bytes: Callable[[list[int]], float] | None = None,
    ):
        self.stepper, self.scheduler = stepper, scheduler
        self._step_bytes = step_bytes
        self._landed = 0.0  # when the last step did
        self.eos_token_ids, self.vocab_size = eos_token_ids, vocab_size
        self._depth = 2 if stepper.device.type == "cuda" else 1
        self._orders: Orders = orders or LocalOrders()
        self.named: dict[str, Callable[..., Any]] = {}
        self.turns = 0
        self.counters = Counters()
        self._digest = 0  # of all tokens that have landed
        self._open: dict[int, tuple[Answer, Sink]] = {}
        self._flights: deque[Flight] = deque()
        self._lock = threading.Lock()
        self._next_ident, self._unfinished = 0, 0
        self._broken: Exception | None = None
        self._over: Exception | None = None  # why the loop takes no more requests
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="moe-nvfp4 engine", daemon=True)
        self._thread.start()

    def submit(self, answer: Answer, sink: Sink) -> None:
        """`sink` gets increments, the last of them with the completion, or one exception; in the loop's thread, so it
        must be quick. Raises QueueFullError where too many wait already."""
        limits = self.scheduler.limits
        with self._lock:
            self._require_alive()
            if self._unfinished >= limits.slots + limits.max_waiting:
                self.counters.refused += 1
                raise QueueFullError(
                    f"{self._unfinished:,} requests are running or waiting, as many as may. Try again later, or load "
                    "with a larger max_waiting."
                )
            self._unfinished += 1
            answer.sequence.ident, self._next_ident = self._next_ident, self._next_ident + 1
            self._orders.put(Submit(answer, sink))  # under the lock: after it, the loop may be over

    def cancel(self, answer: Answer) -> None:
        """Frees what the answer holds; nothing more comes from it. Of one that is over it does nothing."""
        self._orders.put(Cancel(answer.sequence.ident))

    def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function in the loop's thread between steps, with nothing in flight. With several ranks it runs at
        this one only: it may look at things, and change none that the others have too."""
        return cast(Result, self._call(Call(None, function=function)))

    def call_everywhere(self, name: str, **arguments: Any) -> Any:
        """Runs the function of this name at every rank, at the same turn. Gives what it gives here."""
        return self._call(Call(name, arguments))

    def _call(self, call: Call) -> Any:
        with self._lock:
            self._require_alive()
        self._orders.put(call)
        while True:
            with suppress(queue.Empty):
                succeeded, value = call.done.get(timeout=0.5)
                break
            self._require_alive()
        if not succeeded:
            raise value
        return value

    @property
    def failure(self) -> Exception | None:
        """What ended the loop, other than `close`."""
        return self._broken

    def wait(self) -> None:
        """Until the loop has ended; raises what ended it. For a rank that follows another."""
        self._thread.join()
        if self._broken is not None:
            raise self._broken

    def stats(self) -> EngineStats:
        """Now, roughly: the loop goes on meanwhile. With several ranks, pages are those of this one."""
        scheduler, pools = self.scheduler, self.scheduler.memory.pools
        return EngineStats(
            counters=replace(self.counters),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=scheduler.limits.slots,
            free_slots=scheduler.free_slots,
            pages=tuple(pool.count for pool in pools),
            free_pages=tuple(pool.available for pool in pools),
        )

    @property
    def slots(self) -> int:
        return self.scheduler.limits.slots

    @property
    def free_slots(self) -> int:
        return self.scheduler.free_slots

    def close(self) -> None:
        """Ends the thread; what is unfinished gets an error."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._orders.put(Close())
        self._thread.join()

    def release(self) -> None:
        """Lets go of the model, after `close`, whoever may still hold the engine."""
        self.__dict__.pop("stepper", None)

    def _require_alive(self) -> None:
        if self._broken is not None:
            raise EngineError(f"the engine stopped: {self._broken}. Load the model again.") from self._broken
        if self._closing:
            raise EngineError("the runner is closed; load the model again")

    def _run(self) -> None:
        try:
            if self.stepper.device.type == "cuda":
                torch.cuda.set_device(self.stepper.device)
            with torch.inference_mode():
                while self._take_orders():
                    began = time.monotonic()
                    self._turn()
                    self.counters.busy_seconds += time.monotonic() - began
        except Exception as error:
            with self._lock:
                self._broken = error
            self._fail_all(error)
        else:
            self._fail_all(EngineError("the runner was closed before the answer was complete"))
        finally:
            self._orders.close()

    def _take_orders(self) -> bool:
        """Waits for an order when there is nothing else to do. False: close."""
        orders = self._orders.take(wait=not self._flights and not self.scheduler.running and not self.scheduler.waiting)
        if self._orders.decides and (late := self.scheduler.late(time.monotonic())):
            orders.append(Late([sequence.ident for sequence in late]))
        self._orders.share(orders, self._digest)
        goes_on = True
        for order in orders:
            goes_on = goes_on and not isinstance(order, Close)
            self._obey(order)
        return goes_on

    def _obey(self, order: Order) -> None:
        match order:
            case Submit(answer, sink):
                self._begin(answer, sink)
            case Cancel(ident):
                if ident in self._open:
                    self._end(self._open[ident][0].sequence)
                    self.counters.cancelled += 1
            case Late(idents):
                for ident in idents:
                    if ident in self._open:  # else cancelled in this turn
                        why = DeadlineError("the request's deadline has passed before its answer was complete")
                        self._fail(self._open[ident][0].sequence, why)
            case Call():
                self._run_between_steps(order)

    def _run_between_steps(self, call: Call) -> None:
        while self._flights:
            self._land(self._flights.popleft())
        try:
            if self._over is not None:
                raise self._over
            function = call.function if call.name is None else partial(self.named[call.name], **call.arguments)
            call.done.put((True, None if function is None else function()))
        except BaseException as error:
            if not self._orders.decides:
                raise  # nobody asked here, and this rank is no longer like the others
            call.done.put((False, error))

    def _turn(self) -> None:
        self.turns += 1
        step = self.scheduler.plan()
        if step is not None:
            answers = [self._open[rows.sequence.ident][0] for rows in step.rows]
            began = time.monotonic()
            self._flights.append(Flight(step, launch(self.stepper, step, answers, self.vocab_size), began))
            self.counters.launched(step)
        if self._flights and (step is None or len(self._flights) >= self._depth):
            self._land(self._flights.popleft())
        elif step is None and self.scheduler.waiting and self._orders.decides:
            time.sleep(0.002)  # pages are lent out; whoever has them gives them back through an order

    def _land(self, flight: Flight) -> None:
        token_ids, peaks = flight.result.wait()
        self._count_step(flight)
        self._digest = zlib.crc32(array("i", token_ids), self._digest)
        given: list[tuple[Sink, Increment | Exception]] = []
        try:
            self._advance(flight, token_ids, peaks, given)
        finally:
            if given:
                self.counters.last_token = time.monotonic()
            hand_out(given)

    def _advance(
        self, flight: Flight, token_ids: list[int], peaks: list[float], given: list[tuple[Sink, Increment | Exception]]
    ) -> None:
        """Adds to `given` row by row: an answer that is complete is nobody's any more, and must be handed out even if
        a row after it fails."""
        for row, rows in enumerate(flight.step.rows):
            sequence = rows.sequence
            if not rows.samples:
                continue
            self.scheduler.took(rows, token_ids[row])
            if sequence.done:
                continue
            answer, sink = self._open[sequence.ident]
            try:
                increment = answer.advance(row, token_ids[row], peaks[row], flight.result.logprobs, self.eos_token_ids)
            except (FloatingPointError, RequestError) as error:
                self._fail(sequence, error)
                continue
            self._count(answer)
            if increment.completion is not None:
                self._end(sequence)
                self.counters.answered += 1
            given.append((sink, increment))

    def _begin(self, answer: Answer, sink: Sink) -> None:
        sequence, refusal = answer.sequence, self._over
        if refusal is None and not self.scheduler.fits(sequence.prompt_length + 1):
            refusal = RequestError(f"{sequence.prompt_length:,} tokens need more pages than there are")
        if refusal is not None:
            self.counters.refused += 1
            with self._lock:
                self._unfinished -= 1
            hand_out([(sink, refusal)])
            return
        self._open[sequence.ident] = answer, sink
        self.counters.requests += 1
        self.scheduler.add(sequence)

    def _count_step(self, flight: Flight) -> None:
        """From the end of the step before it, or from its launch if nothing was under way."""
        before, self._landed = self._landed, time.monotonic()
        if self._step_bytes is not None and flight.step.decodes_only:
            self.counters.decode_seconds += self._landed - max(before, flight.launched)
            self.counters.decode_bytes += self._step_bytes([rows.start + 1 for rows in flight.step.rows])

    def _count(self, answer: Answer) -> None:
        """A token has come."""
        counters, sequence = self.counters, answer.sequence
        counters.generated_tokens += 1
        if len(answer.new_ids) == 1:
            counters.prompt_tokens += sequence.prompt_length
            counters.reused_tokens += sequence.reused

    def _end(self, sequence: Sequence) -> None:
        if self._open.pop(sequence.ident, None) is not None:
            self.counters.preemptions += sequence.preemptions
            self.scheduler.finish(sequence)
            with self._lock:
                self._unfinished -= 1

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        _, sink = self._open[sequence.ident]
        self._end(sequence)
        self.counters.failed += 1
        hand_out([(sink, error)])

    def _fail_all(self, error: Exception) -> None:
        """The loop is over: nobody who came in time waits for ever."""
        self._over = error
        self._flights.clear()
        for answer, _ in list(self._open.values()):
            self._fail(answer.sequence, error)
        for order in self._orders.rest():
            self._obey(order)
