"""Around every request: its id, its log line, keys, the limit of its body, and no new ones while the server drains."""

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_nvfp4.launch.http_errors import ApiError, outcome_of, unavailable
from moe_nvfp4.launch.http_server import Server
from moe_nvfp4.launch.http_stream import ClientGone

log = logging.getLogger("moe_nvfp4.http")
KEY: Final = "moe_nvfp4.record"
GIVEN_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
COUNTED: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@dataclass(slots=True)
class Record:
    """What is logged of a request: never its text."""

    id: str
    method: str
    path: str
    status: int = 499  # until there is another: the client left
    model: str | None = None
    outcome: str | None = None  # None: what the status says
    prompt_tokens: int = 0
    new_tokens: int = 0

    def line(self, seconds: float) -> str:
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields | {"path": self.path[:200], "seconds": round(seconds, 4)})


def record_of(scope: Scope) -> Record:
    record: Record = scope[KEY]
    return record


class Guard:
    """Plain ASGI: it hands disconnects and back-pressure through as they come."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        name = given if GIVEN_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope[KEY] = record = Record(name, scope["method"], scope["path"])
        began = time.monotonic()
        try:
            await self._guarded(scope, receive, self._tagged(record, send))
        except ClientGone:
            record.outcome = "cancelled"
        except asyncio.CancelledError:
            record.outcome = "cancelled"
            raise
        finally:
            self._log(record, time.monotonic() - began)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        with self._server.one_more():
            try:
                self._admit(scope)
                receive = await self._with_body(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        keys = self._server.settings.api_keys
        if keys and not _is_one_of(_header(scope, b"authorization"), keys):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._server.draining:
            raise unavailable("the server is shutting down; send the request again", "shutting_down")

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the whole body, within the limits, and gives it to the app as one message."""
        settings, declared = self._server.settings, _header(scope, b"content-length")
        too_large = ApiError(
            413, f"the body is larger than {settings.max_body_bytes:,} bytes; send less", code="body_too_large"
        )
        if declared.isdecimal() and int(declared[:20]) > settings.max_body_bytes:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > settings.max_body_bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {settings.body_seconds:g} s", code="timeout") from None
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    def _tagged(self, record: Record, send: Send) -> Send:
        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                extra = [(b"x-request-id", record.id.encode())]
                if self._server.draining:
                    extra.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        return tagged

    def _log(self, record: Record, seconds: float) -> None:
        record.outcome = record.outcome or outcome_of(record.status)
        if record.path in COUNTED:
            self._server.metrics.requests.add(endpoint=record.path, model=record.model or "", outcome=record.outcome)
        log.info("%s", record.line(seconds))


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _is_one_of(authorization: str, keys: Sequence[str]) -> bool:
    """Each key is compared, in a time that says nothing about how much of it was right."""
    scheme, _, given = authorization.partition(" ")
    same = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    return scheme.lower() == "bearer" and any(same)
