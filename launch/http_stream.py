"""Between an engine that does not wait and clients that may: reading ahead, server-sent events, and who went away."""

import asyncio
import json
import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from moe_nvfp4.async_runner import Following, Receiver
from moe_nvfp4.generation import Increment

Result = TypeVar("Result")
compact: Final = json.JSONEncoder(separators=(",", ":")).encode


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Relay:
    """The increments of one request between engine and reader. With more than `most` of them waiting for a reader
    that is busy with those before, the request is cancelled, which frees its pages, and `too_slow` is set."""

    def __init__(self, follow: Callable[[Receiver], Following], most: int | None):
        self._most = most
        self._items: deque[Increment | Exception | None] = deque()  # None: the end
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[bool] | None = None  # who waits for an item: whether one came in time
        self._deadline = math.inf  # of the reader
        self._alarm: asyncio.TimerHandle | None = None
        self.too_slow = asyncio.Event()
        self._following: Following | None = None
        try:
            self._following = follow(self._put)
        except Exception as error:
            self._put(error)

    async def begun(self, patience: float) -> None:
        """Waits for the first increment, not for long. Raises what has already gone wrong."""
        with suppress(TimeoutError):
            await self._arrival(patience)
        if self._items and isinstance(self._items[0], Exception):
            raise self._items[0]

    def fail(self, error: Exception) -> None:
        """Ends the request; its reader gets the error now."""
        self.close()
        self._items.clear()
        self._put(error)

    async def next(self, patience: float | None = None) -> list[Increment]:
        """All that has come, at least one increment; [] at the end. TimeoutError if none comes within `patience`
        seconds."""
        await self._arrival(patience)
        if isinstance(self._items[0], Exception):
            raise self._items[0]
        found: list[Increment] = []
        while self._items and isinstance(item := self._items[0], Increment):
            found.append(item)
            self._items.popleft()
        return found

    def close(self) -> None:
        """The engine is told at once; what is unfinished is cancelled."""
        if self._following is not None:
            self._following.cancel()
        if self._alarm is not None:
            self._alarm.cancel()

    def _put(self, item: Increment | Exception | None) -> None:
        if self._reader is not None:
            if not self._reader.done():
                self._reader.set_result(True)
        elif self._most is not None and len(self._items) >= self._most and isinstance(item, Increment):
            self.too_slow.set()
            self.close()
            return
        self._items.append(item)

    async def _arrival(self, patience: float | None) -> None:
        if self._items:
            return
        self._reader = self._loop.create_future()
        self._deadline = math.inf if patience is None else self._loop.time() + patience
        if patience is not None and (self._alarm is None or self._alarm.when() > self._deadline):
            self._set_alarm()
        try:
            if not await self._reader:
                raise TimeoutError
        finally:
            self._reader = None

    def _set_alarm(self) -> None:
        """One for many waits: a timeout of asyncio for each token would cost more than all else here."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(self._deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._reader is None or self._reader.done() or self._deadline == math.inf:
            return  # the next wait sets another
        if self._deadline > self._loop.time():
            self._set_alarm()
        else:
            self._reader.set_result(False)


class EventStream(Response):
    """Server-sent events. Ends when they end, when the client goes, and when it reads too slowly."""

    media_type = "text/event-stream"

    def __init__(self, relay: Relay, events: AsyncGenerator[str, None], over: Callable[[str | None], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._relay, self._events, self._over = relay, events, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        jobs = [
            asyncio.create_task(self._send_all(send)),
            asyncio.create_task(disconnected(receive)),
            asyncio.create_task(_raised(self._relay.too_slow)),
        ]
        outcome: str | None = "cancelled"
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            outcome = None if jobs[0].done() else "cancelled" if jobs[1].done() else "slow_reader"
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.wait(jobs)
            self._relay.close()
            await self._events.aclose()
            self._over(outcome)
        if jobs[0].done() and not jobs[0].cancelled() and (error := jobs[0].exception()) is not None:
            raise error

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def event(data: Any) -> str:
    return f"data: {compact(data)}\n\n"


async def while_connected(request: Request, relay: Relay, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which reads the relay; ClientGone, and the relay closed, if the client leaves before."""
    job, gone = asyncio.create_task(work), asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait([job, gone], return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGone
        return job.result()
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.wait([job, gone])
        relay.close()


async def disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _raised(flag: asyncio.Event) -> None:
    await flag.wait()
