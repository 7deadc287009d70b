"""The server as an app of Ray Serve: each replica is the whole HTTP server over engines of its own.

With one model on one GPU the engine runs in the replica's process. Otherwise each model has a group of ranks, which the
replica starts and watches, and which end with it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.routing import Route

from moe_nvfp4.async_runner import AsyncMoERunner
from moe_nvfp4.errors import EngineError
from moe_nvfp4.frontend import Frontend
from moe_nvfp4.launch.group import GroupRunner
from moe_nvfp4.launch.group_engine import GroupEngine
from moe_nvfp4.launch.group_workers import GroupSettings
from moe_nvfp4.launch.http_app import create_app
from moe_nvfp4.launch.http_settings import ServerSettings
from moe_nvfp4.runner import MoERunner

DEPLOYMENT: Final = "moe-nvfp4"
SPARE_REQUESTS: Final = 32  # beyond what engines take: /metrics, /ready, and requests that get their 429
RETRY_AFTER: Final = 5.0
HEALTH_EVERY, HEALTH_SECONDS = 5.0, 30.0
STARTS_AT_MOST: Final = 3  # of a replica that fails while it loads
METRICS_SECONDS: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSettings:
    """`models`: path by the name it is served under. `engine`: settings of `MoERunner.prepare`."""

    models: Mapping[str, str]
    server: ServerSettings
    engine: Mapping[str, Any]
    group: GroupSettings

    @property
    def in_process(self) -> bool:
        return len(self.models) == 1 and self.group.gpus == 1

    def open(self, path: str) -> Frontend:
        if self.in_process:
            return MoERunner.from_pretrained(path, device=self.group.device, **self.engine)
        return GroupRunner(path, self.group, **self.engine)


class Replica:
    def __init__(self, settings: ReplicaSettings):
        self.runners = {name: AsyncMoERunner(settings.open(path)) for name, path in settings.models.items()}
        self.http = create_app(self.runners, settings.server)
        self.http.router.routes.insert(0, Route("/metrics", self.metrics))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.http

    async def check_health(self) -> None:
        """Every model has decoded a token lately, or its group is being rebuilt; else Serve replaces this replica."""
        for name, decodes in (await self.http.state.server.ready()).items():
            engine = self.runners[name].runner.engine
            if not decodes and not (isinstance(engine, GroupEngine) and engine.rebuilding):
                raise EngineError(f"{name}: it does not decode")

    def own_metrics(self) -> tuple[str, str]:
        return serve.get_replica_context().replica_id.unique_id, self.http.state.server.metrics.registry.render()

    async def metrics(self, _: Any) -> PlainTextResponse:
        """Of all replicas, whichever of them is asked."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        found = await handle.broadcast("own_metrics").results_async(timeout_s=METRICS_SECONDS)
        return PlainTextResponse(merged(found), media_type="text/plain; version=0.0.4")

    async def __del__(self) -> None:
        for runner in getattr(self, "runners", {}).values():
            await runner.close()


def merged(texts: Iterable[tuple[str, str]]) -> str:
    """Metrics of several processes as one text: a label says whose each value is."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in sorted(texts):
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ")[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
                continue
            name, brace, rest = line.partition("{")
            if not brace:
                name, _, rest = line.partition(" ")
                rest = f"}} {rest}"
            separator = "" if rest.startswith("}") else ","
            samples.setdefault(family, []).append(f'{name}{{replica="{replica}"{separator}{rest}')
    return "".join(line + "\n" for family, head in heads.items() for line in (*head, *samples.get(family, ())))


def build(settings: ReplicaSettings, replicas: int, most: int | None = None) -> Application:
    """`most`: with it, Serve starts up to so many replicas under load, and at least `replicas`."""
    slots, waiting = settings.engine["max_batch_size"], settings.engine["max_waiting"]
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if most is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas, max_replicas=most, target_ongoing_requests=float(slots)
            )
        }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(settings.in_process and settings.group.device == "cuda")},
        # The engine's own queue is full before this is: clients get its 429 with a time to wait.
        max_ongoing_requests=len(settings.models) * (slots + waiting) + SPARE_REQUESTS,
        max_queued_requests=waiting,  # of each proxy, while no replica can take more
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER),
        graceful_shutdown_timeout_s=settings.server.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_EVERY,
        health_check_timeout_s=HEALTH_SECONDS,
        max_constructor_retry_count=STARTS_AT_MOST,
        **scaling,
    )
    return deployment.bind(settings)
