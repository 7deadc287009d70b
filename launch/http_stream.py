"""Between an engine that does not wait and clients that may: reading ahead, server-sent events, and who went away."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from moe_nvfp4.generation import Increment

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Relay:
    """The increments of one request, read as fast as they come. With more than `most` of them waiting for a slow
    reader, the request is cancelled, which frees its pages, and `too_slow` is set."""

    def __init__(self, increments: AsyncGenerator[Increment, None], most: int | None):
        self._increments, self._most = increments, most
        self._items: deque[Increment | Exception | None] = deque()  # None: the end
        self._arrived = asyncio.Event()
        self.too_slow = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def begun(self, patience: float) -> None:
        """Waits for the first increment, not for long. Raises what has already gone wrong."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), patience)
        if self._items and isinstance(self._items[0], Exception):
            raise self._items[0]

    def fail(self, error: Exception) -> None:
        """Ends the request; its reader gets the error now."""
        self._task.cancel()
        self._items.clear()
        self._put(error)

    async def next(self, patience: float | None = None) -> Increment | None:
        """The next increment; None at the end; TimeoutError if there is none within `patience` seconds."""
        if not self._items:
            self._arrived.clear()
            async with asyncio.timeout(patience):
                await self._arrived.wait()
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    async def __aiter__(self) -> AsyncIterator[Increment]:
        while (increment := await self.next()) is not None:
            yield increment

    async def close(self) -> None:
        """The engine is told at once; what is unfinished is cancelled."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _put(self, item: Increment | Exception | None) -> None:
        self._items.append(item)
        self._arrived.set()

    async def _read(self) -> None:
        try:
            async for increment in self._increments:
                if self._most is not None and len(self._items) >= self._most:
                    self.too_slow.set()
                    return
                self._put(increment)
            self._put(None)
        except Exception as error:
            self._put(error)
        finally:
            await self._increments.aclose()


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
            await self._relay.close()
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
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


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
        await relay.close()


async def disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _raised(flag: asyncio.Event) -> None:
    await flag.wait()
