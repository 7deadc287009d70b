"""/v1/responses: what chat answers, as items and typed events. Nothing is kept between requests."""

import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from moe_nvfp4.errors import RequestError
from moe_nvfp4.generation import Increment, TokenLogprob
from moe_nvfp4.launch.http_answer_parser import AnswerParser, Kind, Text
from moe_nvfp4.launch.http_chat import chat
from moe_nvfp4.launch.http_dialects import Call
from moe_nvfp4.launch.http_errors import ApiError, api_error
from moe_nvfp4.launch.http_reply import Reply, chat_logprobs
from moe_nvfp4.launch.http_responses_request import ResponsesRequest
from moe_nvfp4.launch.http_server import Server
from moe_nvfp4.launch.http_stream import compact
from moe_nvfp4.tokenizer import Tokenizer

# What chat calls otherwise.
NAMES: Final = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
ERROR_CODES: Final = {400: "invalid_prompt", 429: "rate_limit_exceeded"}  # of a response; there is no finer one
Event = dict[str, Any]


async def respond(server: Server, request: Request, body: ResponsesRequest) -> Response:
    try:
        asked = body.as_chat()
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None
    try:
        return await chat(server, request, asked, partial(ResponsesReply, body))
    except (ApiError, RequestError) as error:
        raise api_error(error).renamed(NAMES) from error


class TextItem:
    """A message or reasoning while its text comes."""

    def __init__(self, kind: Kind, index: int):
        self.kind, self._index = kind, index
        self._id = f"{'msg' if kind == 'content' else 'rs'}_{secrets.token_hex(12)}"
        self._name = "output_text" if kind == "content" else "reasoning_text"
        self._pieces: list[str] = []
        self._logprobs: list[Any] = []

    def begin(self) -> list[Event]:
        return [
            {"type": "response.output_item.added", "output_index": self._index, "item": self._item("in_progress", [])},
            self._event("response.content_part.added", part=self._part("", [])),
        ]

    def add(self, text: str, logprobs: list[Any]) -> Event:
        self._pieces.append(text)
        self._logprobs += logprobs
        return self._event(f"response.{self._name}.delta", delta=text, **self._shown(logprobs))

    def end(self, status: str) -> tuple[dict[str, Any], list[Event]]:
        """The item as it stays, and what says so."""
        text = "".join(self._pieces)
        part = self._part(text, self._logprobs)
        item = self._item(status, [part])
        return item, [
            self._event(f"response.{self._name}.done", text=text, **self._shown(self._logprobs)),
            self._event("response.content_part.done", part=part),
            {"type": "response.output_item.done", "output_index": self._index, "item": item},
        ]

    def _event(self, name: str, **fields: Any) -> Event:
        return {"type": name, "item_id": self._id, "output_index": self._index, "content_index": 0, **fields}

    def _shown(self, logprobs: list[Any]) -> dict[str, Any]:
        return {"logprobs": logprobs} if self.kind == "content" else {}

    def _part(self, text: str, logprobs: list[Any]) -> dict[str, Any]:
        part = {"type": self._name, "text": text}
        return part | {"annotations": [], "logprobs": logprobs} if self.kind == "content" else part

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        if self.kind == "content":
            return {"type": "message", "id": self._id, "status": status, "role": "assistant", "content": content}
        return {"type": "reasoning", "id": self._id, "status": status, "summary": [], "content": content}


def call_events(call: Call, index: int) -> tuple[dict[str, Any], list[Event]]:
    """A call comes whole: its item, and what says so."""
    item = {
        "type": "function_call",
        "id": f"fc_{secrets.token_hex(12)}",
        "call_id": f"call_{secrets.token_hex(12)}",
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }
    place = {"item_id": item["id"], "output_index": index}
    begun = {**item, "arguments": "", "status": "in_progress"}
    return item, [
        {"type": "response.output_item.added", "output_index": index, "item": begun},
        {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments},
        {"type": "response.function_call_arguments.done", **place, "arguments": call.arguments},
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]


class ResponsesReply(Reply):
    prefix = "resp_"

    def __init__(
        self,
        asked: ResponsesRequest,
        model: str,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        parsers: list[AnswerParser],
    ):
        super().__init__(model, [prompt])
        (self._parser,) = parsers
        self._asked, self._tokenizer = asked, tokenizer
        self._output: list[dict[str, Any]] = []
        self._open: TextItem | None = None
        self._unsent: list[TokenLogprob] = []
        self._status, self._events = "in_progress", 0

    def opening(self) -> list[Event]:
        return [{"type": f"response.{name}", "response": self.whole()} for name in ("created", "in_progress")]

    def push(self, increment: Increment) -> list[Event]:
        self.count(increment)
        if self._parser.thinking:
            self.reasoning_tokens += len(increment.token_ids)
        else:
            self._unsent += increment.logprobs
        events: list[Event] = []
        for part in self._parser.read(increment):
            events += self._add_text(part.kind, part.text) if isinstance(part, Text) else self._add_call(part)
        if increment.finish_reason:
            self._status = "completed" if increment.finish_reason == "stop" else "incomplete"
            if not self._output and self._open is None:
                events += self._add_text("content", "")  # clients expect an item
            events += self._close(self._status)
        return events

    def event(self, data: Event) -> str:
        numbered = {**data, "sequence_number": self._events}
        self._events += 1
        return f"event: {data['type']}\ndata: {compact(numbered)}\n\n"

    def ending(self) -> str:
        return self.event({"type": f"response.{self._status}", "response": self.whole()})

    def failure(self, error: ApiError) -> str:
        told = error.body["error"]
        code = ERROR_CODES.get(error.status, "server_error")
        shown = {"code": code, "message": told["message"], "type": told["type"], "param": told["param"]}
        self._status = "failed"
        return self.event({"type": "response.failed", "response": self.whole() | {"error": shown}})

    def whole(self) -> dict[str, Any]:
        asked, over = self._asked, self._status in ("completed", "incomplete")
        effort = asked.reasoning.effort if asked.reasoning else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "model": self._model,
            "output": list(self._output),
            "usage": self._usage() if over else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "background": False,
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": asked.shown_format()},
            "tool_choice": asked.shown_choice(),
            "tools": [dict(tool) for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "user": asked.user,
        }

    def _add_text(self, kind: Kind, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open.kind != kind:
            events += self._close("completed")
            self._open = TextItem(kind, len(self._output))
            events += self._open.begin()
        unsent, self._unsent = self._unsent, []
        logprobs = chat_logprobs(self._tokenizer, unsent)["content"] if kind == "content" else []
        return [*events, self._open.add(text, logprobs)]

    def _add_call(self, call: Call) -> list[Event]:
        events = self._close("completed")
        item, told = call_events(call, len(self._output))
        self._output.append(item)
        self._unsent = []
        return events + told

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        item, events = self._open.end(status)
        self._output.append(item)
        self._open = None
        return events

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.reused_tokens, "cache_write_tokens": 0},
            "output_tokens": self.new_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }
