"""`AsyncMoERunner`: the same for asyncio. Any number of tasks may call it; a cancelled task frees what it holds."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_nvfp4.engine.call import Call, generations
from moe_nvfp4.frontend import Frontend
from moe_nvfp4.generation import Completion, Generation, Increment
from moe_nvfp4.prompts import Requests
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams


class AsyncMoERunner:
    """Over a `MoERunner`, or whatever has its frontend."""

    def __init__(self, runner: Frontend):
        self.runner = runner

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
        done: dict[tuple[int, int], Completion] = {}
        async for increment in self._serve(requests):
            if increment.completion is not None:
                done[increment.prompt, increment.choice] = increment.completion
        return generations(requests, done)

    def stream(
        self, prompts: Any, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> AsyncGenerator[Increment, None]:
        """Increments while they come. A bad request raises here; who leaves early closes the iterator (`aclose`).

        A grammar that is new may take seconds to compile, here: call this in a thread then.
        """
        return self._serve(self.runner.prompts.encode(prompts, sampling))

    async def close(self) -> None:
        await asyncio.to_thread(self.runner.close)

    async def __aenter__(self) -> "AsyncMoERunner":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _serve(self, requests: Requests) -> AsyncGenerator[Increment, None]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Increment | Exception]()

        def sink(item: Increment | Exception) -> None:
            with suppress(RuntimeError):  # the event loop was closed, and nobody waits; the engine serves others
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        call = Call(self.runner.engine, self.runner.answers(requests), sink)
        try:
            while call.is_open:
                call.submit()
                yield call.take(await arrived.get())
        finally:
            call.cancel()
