"""Errors in the form of the OpenAI API. What a client sees never holds a traceback, nor anything of another request."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from moe_nvfp4.errors import DeadlineError, EngineError, MoeNvfp4Error, QueueFullError, RequestError

log = logging.getLogger("moe_nvfp4.http")
# Names of SamplingParams that the API calls otherwise.
API_NAMES = {
    "max_new_tokens": "max_tokens",
    "logprobs": "top_logprobs",
    "json_schema": "response_format",
    "json_object": "response_format",
}


class ApiError(Exception):
    """One refusal: status, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same for an endpoint that calls fields otherwise."""
        told: dict[str, Any] = self.body["error"]
        given = next((name for name in names if self.message.startswith(name)), "")
        message = names.get(given, "") + self.message.removeprefix(given)
        param = names.get(told["param"], told["param"])
        return ApiError(self.status, message, kind=told["type"], param=param, code=told["code"], headers=self.headers)

    @property
    def outcome(self) -> str:
        return outcome_of(self.status)

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def outcome_of(status: int) -> str:
    """The word for it in metrics and logs."""
    words = {429: "rejected", 503: "rejected", 504: "timeout"}
    return words.get(status) or ("ok" if status < 400 else "client_error" if status < 500 else "error")


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """ASCII, because a message may quote what UTF-8 cannot encode."""
    return Response(json.dumps(body, separators=(",", ":")), status, dict(headers or {}), "application/json")


def overloaded(message: str, retry_after: float, *, status: int = 429, code: str = "queue_full") -> ApiError:
    kind = "rate_limit_error" if status == 429 else "server_error"
    return ApiError(status, message, kind=kind, code=code, headers={"Retry-After": str(max(1, round(retry_after)))})


def unavailable(message: str, code: str) -> ApiError:
    return overloaded(message, 5, status=503, code=code)


def api_error(error: Exception, retry_after: float = 1.0) -> ApiError:
    """The error as a client sees it; one that is not its fault is logged in whole and told without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return overloaded("too many requests are running or waiting; try again later", retry_after)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), kind="timeout_error", code="deadline_exceeded")
    if isinstance(error, RequestError):
        return _request_error(str(error))
    if isinstance(error, EngineError):
        log.error("the engine refused a request: %s", error)
        return unavailable("the model cannot answer now; try again later", "engine_unavailable")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server made a mistake; it has been logged", kind="server_error", code="internal_error")


def _request_error(message: str) -> ApiError:
    where, _, rest = message.partition(": ")
    if not where.startswith("SamplingParams."):
        return ApiError(400, message)
    name = where.removeprefix("SamplingParams.")
    name = API_NAMES.get(name, name)
    return ApiError(400, f"{name}: {rest}", param=name)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first problem, one with a remedy if there is any. Its input is not repeated: it may be long, and it is the
    client's own."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "refused")
    place = [str(part) for part in problem["loc"][1:]]
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['ctx']['error']} at character {place[0]}")
    if problem["type"] == "model_attributes_type" and not place:
        return ApiError(400, "the body is not a JSON object; send one, with Content-Type: application/json")
    name = problem.get("ctx", {}).get("name") or ".".join(place)[:200] or None
    reason = str(problem["msg"]).removeprefix("Value error, ")[:500]
    return ApiError(400, f"{name or 'body'}: {reason}", param=name, code="invalid_value")


def install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(MoeNvfp4Error)
    async def _(_: Request, error: MoeNvfp4Error) -> Response:
        return api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> Response:
        return _validation_error(error).response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        reasons = {
            404: f"no such address: {request.method} {request.url.path[:200]}",
            405: f"{request.url.path[:200]} does not take {request.method}",
        }
        message = reasons.get(error.status_code, str(error.detail)[:500])
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> Response:
        return api_error(error).response()
