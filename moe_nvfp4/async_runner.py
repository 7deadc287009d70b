"""`AsyncMoERunner`: the same for asyncio. Any number of tasks may call it; a cancelled task frees what it holds."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_nvfp4.engine.call import Call, generations, last_only
from moe_nvfp4.frontend import Frontend
from moe_nvfp4.generation import Generation, Increment
from moe_nvfp4.prompts import Requests
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

# Gets the increments of a call in the event loop's thread, and then None, or the exception that ended it.
Receiver = Callable[[Increment | Exception | None], None]


class Mailbox:
    """Where an engine leaves what is for one event loop, which is woken once for all that has come when it looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._items: deque[tuple[Receiver, Increment | Exception]] = deque()
        self._woken = False

    def put(self, receiver: Receiver, item: Increment | Exception) -> Callable[[], None] | None:
        """From any thread. Gives what wakes the loop, if it has to be."""
        self._items.append((receiver, item))
        return None if self._woken else self._wake

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the event loop was closed, and nobody waits; the engine serves others
                self._items.clear()
                self._woken = False

    def _deliver(self) -> None:
        self._woken = False  # before it looks: what comes later wakes it again
        for _ in range(len(self._items)):
            receiver, item = self._items.popleft()
            receiver(item)


class Following:
    """A call whose increments go to a receiver. For the event loop's thread."""

    def __init__(self, runner: Frontend, requests: Requests, mailbox: Mailbox, receiver: Receiver, only_last: bool):
        self._receiver, self._is_over = receiver, False
        sink = partial(mailbox.put, self._take)
        self._call = Call(runner.engine, runner.answers(requests), last_only(sink) if only_last else sink)
        try:
            self._call.submit()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Frees what the call holds; the receiver gets nothing more."""
        self._is_over = True
        self._call.cancel()

    def _take(self, item: Increment | Exception | None) -> None:
        if self._is_over or item is None:
            return
        try:
            self._receiver(self._call.take(item))
            self._call.submit()
        except Exception as error:
            self._end(error)
            return
        if not self._call.is_open:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self._is_over:
            self.cancel()
            self._receiver(error)


class AsyncMoERunner:
    """Over a `MoERunner`, or whatever has its frontend."""

    def __init__(self, runner: Frontend):
        self.runner = runner
        self._mailbox: Mailbox | None = None

    @classmethod
    async def from_pretrained(cls, path_or_hub_id: str | Path, **settings: Any) -> "AsyncMoERunner":
        """Loads in a thread. Takes the settings of `MoERunner.prepare`."""
        return cls(await asyncio.to_thread(MoERunner.from_pretrained, path_or_hub_id, **settings))

    async def generate(
        self, prompts: Any, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generation | list[Generation]:
        """Answers one prompt or many, as `MoERunner.generate` does."""
        # In a thread: to compile a grammar may take seconds.
        requests = await asyncio.to_thread(self.runner.prompts.encode, prompts, sampling)
        ends = [end async for end in self._serve(requests, only_last=True)]
        return generations(requests, {(end.prompt, end.choice): end.completion for end in ends if end.completion})

    def stream(
        self, prompts: Any, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> AsyncGenerator[Increment, None]:
        """Increments while they come. A bad request raises here; who leaves early closes the iterator (`aclose`).

        A grammar that is new may take seconds to compile, here: call this in a thread then.
        """
        return self._serve(self.runner.prompts.encode(prompts, sampling))

    def follow(self, prompts: Any, sampling: SamplingParams, receiver: Receiver) -> Following:
        """The same for a function that is called with each increment, in the event loop's thread. Costs less than
        `stream`: nothing waits between engine and receiver."""
        return self._follow(self.runner.prompts.encode(prompts, sampling), receiver)

    async def close(self) -> None:
        await asyncio.to_thread(self.runner.close)

    async def __aenter__(self) -> "AsyncMoERunner":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _follow(self, requests: Requests, receiver: Receiver, *, only_last: bool = False) -> Following:
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return Following(self.runner, requests, self._mailbox, receiver, only_last)

    async def _serve(self, requests: Requests, *, only_last: bool = False) -> AsyncGenerator[Increment, None]:
        arrived: asyncio.Queue[Increment | Exception | None] = asyncio.Queue()
        following = self._follow(requests, arrived.put_nowait, only_last=only_last)
        try:
            while (item := await arrived.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            following.cancel()
