"""What clients may send to /v1/responses, and the same question in the form of chat."""

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, StrictBool, StrictInt, Tag, WrapValidator, model_validator
from pydantic_core import PydanticCustomError, ValidationError

from moe_nvfp4.launch.http_schemas import (
    REFUSED,
    CalledFunction,
    ChatRequest,
    Count,
    Function,
    JsonObject,
    JsonSchema,
    Model,
    NamedFunction,
    SamplingRequest,
)

DEEPEST: Final = 100
LOGPROBS: Final = "message.output_text.logprobs"
KEPT: Final = "nothing is kept here; send the whole conversation in input"
ITEMS: Final = "send messages, function_call, function_call_output and reasoning, each of them whole"
TEXT_ONLY: Final = "only text is read here; send input_text, or output_text for earlier answers"
OWN_TOOLS: Final = "no tools are run here; send type function, and run it where the call arrives"
CHOICES: Final = "send none, auto, required, or type function with its name"
MISSING: Final = {
    "previous_response_id": KEPT,
    "conversation": KEPT,
    "context_management": KEPT,
    "prompt": "there are no stored prompts; send instructions and input",
    "background": "an answer is computed while its client waits; use stream",
    "moderation": "nothing is moderated here; leave it out",
    "n": "there is one answer to a request; send more requests",
    "messages": "use input",
    "max_tokens": "use max_output_tokens",
    "max_completion_tokens": "use max_output_tokens",
    "response_format": "use text.format",
    "reasoning_effort": "use reasoning.effort",
    "logprobs": f"use include with {LOGPROBS}",
}


def _else_refused(remedy: str) -> WrapValidator:
    """What does not fit is refused with what to do instead."""

    def validate(value: Any, fits: Any) -> Any:
        try:
            return fits(value)
        except ValidationError:
            raise PydanticCustomError("refused", "not supported; {remedy}", {"remedy": remedy}) from None

    return WrapValidator(validate)


class TextPart(Model):
    type: Annotated[Literal["input_text", "output_text", "reasoning_text", "summary_text"], _else_refused(TEXT_ONLY)]
    text: str


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])]
CallId = Annotated[str, Field(max_length=256)]


class MessageItem(Model):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ReasoningItem(Model):
    type: Literal["reasoning"]
    summary: list[TextPart] | None = None
    content: list[TextPart] | None = None


class CallItem(CalledFunction):
    type: Literal["function_call"]
    call_id: CallId


class CallOutputItem(Model):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Content


def _kind(item: Any) -> str:
    """Messages may lack their type."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", "")
    return "message" if kind is None else str(kind)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="refused",
        custom_error_message="not supported; {remedy}",
        custom_error_context={"remedy": ITEMS},
    ),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class FlatTool(Function):
    type: Annotated[Literal["function"], _else_refused(OWN_TOOLS)]

    @model_validator(mode="before")
    @classmethod
    def _can_be_repeated(cls, data: Any) -> Any:
        """The answer repeats it, and what is nested deeply may be read as JSON but not written."""
        level: list[Any] = [data] if isinstance(data, dict) else []
        for _ in range(DEEPEST):
            parts = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
            level = [part for part in parts if isinstance(part, dict | list)]
        if level:
            raise ValueError(f"nested more than {DEEPEST} deep; flatten its schema")
        return data


class FunctionChoice(NamedFunction):
    type: Literal["function"]


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]

    @model_validator(mode="after")
    def _has_its_schema(self) -> "TextFormat":
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("type json_schema needs schema")
        return self


class TextOptions(Model):
    format: TextFormat | None = None


class ReasoningOptions(Model):
    effort: Annotated[str | None, Field(max_length=32)] = None


class ResponsesRequest(SamplingRequest):
    refused = {name: remedy.replace("response_format", "text.format") for name, remedy in REFUSED.items()} | MISSING
    input: Annotated[
        list[Item], Field(min_length=1), BeforeValidator(_as_items, json_schema_input_type=str | list[Item])
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | FunctionChoice, _else_refused(CHOICES)] | None = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[StrictInt | None, Field(ge=0, le=20)] = None
    truncation: Annotated[Literal["disabled"], _else_refused("send disabled, and shorten the input")] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]] | None, Field(max_length=16)] = None
    user: str | None = None
    chat_template_kwargs: JsonObject | None = None

    def as_chat(self) -> ChatRequest:
        fields: dict[str, Any] = {name: getattr(self, name) for name in SamplingRequest.model_fields}
        choice = self.tool_choice
        return ChatRequest.model_validate(
            fields
            | {
                "messages": _with_instructions(self.instructions, _messages(self.input)),
                "max_completion_tokens": self.max_output_tokens,
                "logprobs": LOGPROBS in (self.include or ()) or bool(self.top_logprobs),
                "top_logprobs": self.top_logprobs or None,
                "tools": None if self.tools is None else [_chat_tool(tool) for tool in self.tools],
                "tool_choice": _named(choice) if isinstance(choice, FunctionChoice) else choice,
                "parallel_tool_calls": self.parallel_tool_calls,
                "response_format": self._response_format(),
                "reasoning_effort": self.reasoning.effort if self.reasoning else None,
                "chat_template_kwargs": self.chat_template_kwargs,
            }
        )

    def shown_format(self) -> JsonObject:
        """As the answer repeats it."""
        form = self.text.format if self.text else None
        if form is None or form.type != "json_schema":
            return {"type": form.type if form else "text"}
        return {"type": form.type, "name": form.name, "schema": form.schema_, "strict": form.strict}

    def shown_choice(self) -> str | JsonObject:
        return dict(self.tool_choice) if isinstance(self.tool_choice, FunctionChoice) else self.tool_choice or "auto"

    def _response_format(self) -> JsonObject:
        form = self.shown_format()
        return {"type": form.pop("type"), "json_schema": form or None}


def _chat_tool(tool: FlatTool) -> JsonObject:
    return {
        "type": tool.type,
        "function": {name: value for name, value in tool if name != "type" and value is not None},
    }


def _named(choice: FunctionChoice) -> JsonObject:
    return {"type": choice.type, "function": {"name": choice.name}}


def _with_instructions(instructions: str | None, messages: list[JsonObject]) -> list[JsonObject]:
    """Many templates take one system message only, the first."""
    if not instructions:
        return messages
    first: JsonObject = {"role": "system", "content": [{"type": "text", "text": instructions}]}
    if messages and messages[0]["role"] in ("system", "developer"):
        first["content"] += messages.pop(0)["content"]
    return [first, *messages]


def _messages(items: Iterable[Item]) -> list[JsonObject]:
    """What the assistant did in one turn is one message: reasoning, then text, then calls."""
    messages: list[JsonObject] = []
    for item in items:
        last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        if isinstance(item, CallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _texts(item.output)})
        elif isinstance(item, CallItem):
            if last is None:
                messages.append(last := {"role": "assistant", "content": []})
            function = {"name": item.name, "arguments": item.arguments}
            last.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
        elif isinstance(item, ReasoningItem):
            text = "".join(part.text for part in item.content or item.summary or ())
            messages.append({"role": "assistant", "content": [], "reasoning_content": text})
        elif item.role == "assistant" and last is not None and not last["content"] and "tool_calls" not in last:
            last["content"] = _texts(item.content)
        else:
            messages.append({"role": item.role, "content": _texts(item.content)})
    return messages


def _texts(parts: Iterable[TextPart]) -> list[JsonObject]:
    return [{"type": "text", "text": part.text} for part in parts]
