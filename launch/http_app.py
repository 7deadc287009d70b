"""The HTTP server: an app in the form of the OpenAI API over runners. `create_app` is all that others need."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from moe_nvfp4 import __version__
from moe_nvfp4.async_runner import AsyncMoERunner
from moe_nvfp4.launch.http_chat import ChatReply, chat
from moe_nvfp4.launch.http_completions import complete
from moe_nvfp4.launch.http_errors import install_error_handlers, json_response, unavailable
from moe_nvfp4.launch.http_experts import experts_router
from moe_nvfp4.launch.http_guard import Guard
from moe_nvfp4.launch.http_responses import respond
from moe_nvfp4.launch.http_responses_request import ResponsesRequest
from moe_nvfp4.launch.http_schemas import ChatRequest, CompletionRequest
from moe_nvfp4.launch.http_server import Server
from moe_nvfp4.launch.http_settings import ServerSettings
from moe_nvfp4.launch.page import page_router


def create_app(runners: Mapping[str, AsyncMoERunner], settings: ServerSettings | None = None) -> FastAPI:
    """Serves each runner under its name. `app.state.server` is what drains it; the runners stay the caller's, and are
    to be closed after the app."""
    server = Server(runners, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(title="moe-nvfp4", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    install_error_handlers(app)
    app.add_middleware(Guard, server=server)
    app.include_router(page_router())
    app.include_router(experts_router(server))
    _add_answers(app, server)
    _add_models(app, server)
    _add_health(app, server)
    return app


def _add_answers(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions", response_class=Response)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await complete(server, request, body)

    @app.post("/v1/chat/completions", response_class=Response)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await chat(server, request, body, ChatReply)

    @app.post("/v1/responses", response_class=Response)
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        return await respond(server, request, body)


def _add_models(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model.card() for model in server.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return server.model(name).card()


def _add_health(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive and its event loop turns."""
        return {"status": "ok"}

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """Every model has decoded a token within the last interval; an idle one decodes one now."""
        if server.draining:
            return unavailable("the server is shutting down", "shutting_down").response()
        found = await server.ready()
        status = 200 if all(found.values()) else 503
        return json_response({"status": "ready" if status == 200 else "not ready", "models": found}, status)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(server.metrics.registry.render(), media_type="text/plain; version=0.0.4")
