"""What all requests share: the models, the limits, and what is under way, so that it can be brought to an end."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from moe_nvfp4.async_runner import AsyncMoERunner
from moe_nvfp4.launch.http_errors import ApiError, unavailable
from moe_nvfp4.launch.http_models import Metrics, ServedModel
from moe_nvfp4.launch.http_settings import ServerSettings
from moe_nvfp4.launch.http_stream import Relay


class Server:
    def __init__(self, runners: Mapping[str, AsyncMoERunner], settings: ServerSettings):
        self.settings, self.metrics = settings, Metrics()
        self.models = {name: ServedModel(name, runner, self.metrics) for name, runner in runners.items()}
        self.relays: set[Relay] = set()
        self.draining = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def model(self, name: str) -> ServedModel:
        if name not in self.models:
            raise ApiError(
                404,
                f"model {name[:200]!r} is not served here; GET /v1/models lists those that are",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """A request that a drain waits for."""
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def ready(self) -> dict[str, bool]:
        """Of each model, whether it decodes."""
        found = await asyncio.gather(*(m.decodes(self.settings.ready_interval) for m in self.models.values()))
        return dict(zip(self.models, found, strict=True))

    async def drain(self) -> None:
        """No new requests from now on. Those that run may finish within the limit; then they get an error."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_seconds)
        except TimeoutError:
            for relay in list(self.relays):
                relay.fail(unavailable("the server shut down before the answer was complete", "shutting_down"))

    def close(self) -> None:
        for model in self.models.values():
            model.close()
