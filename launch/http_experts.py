"""GET /v1/experts, and how even the load of the experts is as a metric, of models that count their experts' rows."""

import asyncio
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter

from moe_nvfp4.expert_loads import ExpertLoads
from moe_nvfp4.launch.http_errors import ApiError
from moe_nvfp4.launch.http_metrics import Family, gauge
from moe_nvfp4.launch.http_server import Server


def experts_router(server: Server) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/experts")
    async def experts(model: str) -> dict[str, Any]:
        loads = _loads(server, model)
        if loads is None:
            raise ApiError(
                404,
                f"model {model[:200]!r} does not count its experts' rows; start the server with --count-experts",
                param="model",
                code="experts_not_counted",
            )
        rows = await asyncio.to_thread(loads.rows)
        layers = [{"layer": layer, "counts": counts} for layer, counts in rows.items()]
        return {"object": "experts", "model": model, "layers": layers}

    def balance() -> Iterable[Family]:
        """No line for each expert: 40 layers of 256 are too many."""
        known = [(name, loads.known()) for name in server.models if (loads := _loads(server, name))]
        values = [
            ({"model": name, "layer": str(layer)}, sum(counts) / len(counts) / max(counts))
            for name, rows in known
            for layer, counts in rows.items()
            if any(counts)
        ]
        if values:
            text = "Rows of an expert in the mean, over those of the busiest, since the start; 1 is even."
            yield gauge("moe_nvfp4_expert_balance", text, values)

    server.metrics.registry.register(balance)
    return router


def _loads(server: Server, model: str) -> ExpertLoads | None:
    return server.model(model).runner.runner.expert_loads
