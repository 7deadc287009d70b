"""/v1/chat/completions: messages through the model's own template; its reasoning and tool calls out of its text."""

import importlib.util
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request, Response

from moe_nvfp4.errors import RequestError
from moe_nvfp4.generation import Increment, TokenLogprob
from moe_nvfp4.json_schema import checked_schema
from moe_nvfp4.launch.http_answer_parser import AnswerParser, Text
from moe_nvfp4.launch.http_dialects import CallForm
from moe_nvfp4.launch.http_errors import ApiError
from moe_nvfp4.launch.http_guard import record_of
from moe_nvfp4.launch.http_reply import ChoicesReply, Job, Reply, answer, chat_logprobs
from moe_nvfp4.launch.http_sampling import at_most, sampling_params
from moe_nvfp4.launch.http_schemas import ChatRequest, Message, NamedTool
from moe_nvfp4.launch.http_server import Server
from moe_nvfp4.tokenizer import Tokenizer

GRAMMARS = importlib.util.find_spec("xgrammar") is not None  # the extra `grammar`


ReplyForm = Callable[[str, Sequence[int], Tokenizer, list[AnswerParser]], Reply]


async def chat(server: Server, request: Request, body: ChatRequest, form: ReplyForm) -> Response:
    """`form`: what the answer looks like, `ChatReply` or what another endpoint has instead."""
    model = server.model(body.model)
    record_of(request.scope).model = model.name
    at_most("tools", len(body.tools or ()), server.settings.max_tools)
    tokenizer, dialect = model.tokenizer, model.dialect
    if tokenizer is None:
        raise ApiError(400, "messages: this model has no tokenizer; send token ids to /v1/completions")
    tools = None if body.tool_choice == "none" else body.tools
    if tools and not dialect.call:
        raise ApiError(400, "tools: this model's chat template knows none; leave them out", param="tools")
    schemas = {tool.function.name: tool.function.parameters or {} for tool in tools} if tools else None
    begun, closing, held_to = _forced(body, dialect.call) if tools and dialect.call else ("", "", {})
    params = sampling_params(
        body,
        server.settings,
        max_new_tokens=body.max_completion_tokens or body.max_tokens or model.prompts.max_seq_len,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **({"skip_special_tokens": False} if dialect.special else {}),
        **held_to,
    )

    def encode() -> tuple[list[int], bool]:
        ids = tokenizer.encode_chat(
            [_for_template(message) for message in body.messages],
            tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
            template_arguments=_template_arguments(body, thinks=not begun and params.constraint is None),
            begun=begun,
        )
        model.check([ids], params, "messages")
        end = tokenizer.decode(ids[-8:], skip_special_tokens=False).rstrip()
        opened = dialect.think is not None and end.endswith(dialect.think[0])
        return ids, opened and params.constraint is None

    ids, thinking = await model.encode(params, encode)
    most = None if body.parallel_tool_calls is not False else 1
    parsers = [
        AnswerParser(dialect, schemas, thinking=thinking, begun=begun, closing=closing, most_calls=most)
        for _ in range(params.n)
    ]
    reply = form(model.name, ids, tokenizer, parsers)
    return await answer(server, request, body, Job(model, [ids], params, reply))


def _forced(body: ChatRequest, form: CallForm) -> tuple[str, str, dict[str, Any]]:
    """Of an answer that has to be a call: how it begins, how it ends, and what is between. Where the function is not
    known yet, its arguments are no JSON, or its schema cannot be enforced, only the beginning is sure."""
    tools = {tool.function.name: tool.function for tool in body.tools or ()}
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
    elif body.tool_choice == "required" and len(tools) == 1:
        name = next(iter(tools))
    else:
        anything = form.forced.format(name="\0").partition("\0")[0]
        return anything if body.tool_choice == "required" else "", "", {}
    begun = form.forced.format(name=name)
    if not form.closing:
        return begun, "", {}
    try:
        schema = checked_schema(tools[name].parameters or {"type": "object"})
    except RequestError:
        return begun, "", {}
    return (begun, form.closing, {"json_schema": schema}) if GRAMMARS else (begun, "", {})


def _template_arguments(body: ChatRequest, *, thinks: bool) -> dict[str, Any]:
    """What the request says, before what follows from its other fields: a grammar leaves no room for reasoning."""
    arguments: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        arguments["reasoning_effort"] = body.reasoning_effort
    if body.reasoning_effort == "none" or not thinks:
        arguments["enable_thinking"] = False
    return arguments | (body.chat_template_kwargs or {})


def _for_template(message: Message) -> dict[str, Any]:
    """Templates know no developer, and most want the arguments of calls as objects, not as JSON."""
    fields = message.model_dump(exclude_none=True)
    if message.role == "developer":
        fields["role"] = "system"
    for call in fields.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                continue  # the template shows it as it is
            call["function"]["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return fields


class Choice:
    """One answer in the making."""

    def __init__(self, parser: AnswerParser):
        self.parser = parser
        self.texts = {"content": "", "reasoning": ""}
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprob] = []
        self.unsent: list[TokenLogprob] = []
        self.finish: str | None = None

    def message(self) -> dict[str, Any]:
        content = self.texts["content"] or (None if self.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.texts["reasoning"]:
            message["reasoning_content"] = self.texts["reasoning"]
        if self.calls:
            message["tool_calls"] = self.calls
        return message


class ChatReply(ChoicesReply):
    prefix, whole_name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, prompt: Sequence[int], tokenizer: Tokenizer, parsers: list[AnswerParser]):
        super().__init__(model, [prompt])
        self._tokenizer = tokenizer
        self._choices = [Choice(parser) for parser in parsers]

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self._choices))]

    def push(self, increment: Increment) -> list[dict[str, Any]]:
        self.count(increment)
        choice = self._choices[increment.choice]
        choice.unsent += increment.logprobs
        choice.logprobs += increment.logprobs
        if choice.parser.thinking:
            self.reasoning_tokens += len(increment.token_ids)
        deltas: list[dict[str, Any]] = []
        for part in choice.parser.read(increment):
            if isinstance(part, Text):
                choice.texts[part.kind] += part.text
                deltas.append({"content" if part.kind == "content" else "reasoning_content": part.text})
            else:
                function = {"name": part.name, "arguments": part.arguments}
                choice.calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
                deltas += _call_deltas(len(choice.calls) - 1, choice.calls[-1])
        chunks = [self._chunk(increment.choice, delta) for delta in deltas]
        if increment.finish_reason:
            choice.finish = increment.finish_reason
            if choice.calls and choice.finish == "stop":
                choice.finish = "tool_calls"
            chunks.append(self._chunk(increment.choice, {}, choice.finish))
        return chunks

    def choices(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": choice.message(),
                "finish_reason": choice.finish,
                "logprobs": chat_logprobs(self._tokenizer, choice.logprobs) if choice.logprobs else None,
            }
            for index, choice in enumerate(self._choices)
        ]

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """Log probabilities go with the first chunk after their tokens."""
        unsent, self._choices[index].unsent = self._choices[index].unsent, []
        logprobs = chat_logprobs(self._tokenizer, unsent) if unsent else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _call_deltas(index: int, call: dict[str, Any]) -> list[dict[str, Any]]:
    """First which function, then its arguments, as clients put them together."""
    function = call["function"]
    begin = {"index": index, **call, "function": {"name": function["name"], "arguments": ""}}
    rest = {"index": index, "function": {"arguments": function["arguments"]}}
    return [{"tool_calls": [begin]}, {"tool_calls": [rest]}]
