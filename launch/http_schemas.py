"""What clients may send, as the OpenAI API has it and with the extensions that other servers made common.

A field that is unknown is ignored, since clients send many that change nothing here. One that would change the
answer, and that this server does not know how to follow, is refused: the answer would not be what was asked for.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator
from pydantic_core import PydanticCustomError

MAX_INT: Final = 2**63 - 1
NAME: Final = r"^[A-Za-z0-9_.-]{1,64}$"
# Field: what to do instead.
REFUSED: Final = {
    "suffix": "text between a prompt and a suffix is not written here; put both into the prompt",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this server writes text only",
    "web_search_options": "this server does not search; give it a tool that does",
    "chat_template": "the model's own template is used; chat_template_kwargs may set what it knows",
    "continue_final_message": "the last message is always complete; use /v1/completions to continue a text",
    "documents": "put them into a message",
    "prompt_logprobs": "log probabilities are of the answer's tokens; use logprobs",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "guided_choice": "use response_format",
    "guided_grammar": "use response_format",
    "structured_outputs": "use response_format",
    "min_tokens": "use ignore_eos with max_tokens",
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use logit_bias",
    "length_penalty": "there is no beam search",
    "use_beam_search": "there is no beam search",
    "truncate_prompt_tokens": "shorten the prompt",
    "include_stop_str_in_output": "add the stop string to the answer",
}

Seed = Annotated[StrictInt, Field(ge=-MAX_INT - 1, le=MAX_INT)]
Count = Annotated[StrictInt, Field(ge=1, le=MAX_INT)]
TokenId = Annotated[StrictInt, Field(ge=0, le=MAX_INT)]
JsonObject = dict[str, Any]


class Model(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class StreamOptions(Model):
    include_usage: StrictBool | None = None


class JsonSchema(Model):
    name: Annotated[str, Field(max_length=64)] = "answer"
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type json_schema needs json_schema.schema")
        return self


class SamplingRequest(Model):
    """What all endpoints have in common."""

    refused: ClassVar[Mapping[str, str]] = REFUSED
    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Count | None = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    n: Annotated[Count | None, Field(description="answers to each prompt")] = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,18}$")], float] | None = None
    response_format: ResponseFormat | None = None
    top_k: Annotated[int | None, Field(ge=-1, le=MAX_INT, description="0 and -1 are off")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_change_the_answer(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, remedy in cls.refused.items():
                if (value := data.get(name)) is True or value not in (None, False, "", [], {}, 0, 1.0):
                    raise PydanticCustomError("refused", "not supported; {remedy}", {"name": name, "remedy": remedy})
        return data


class CompletionRequest(SamplingRequest):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: StrictBool | None = None
    best_of: Count | None = None
    logprobs: Annotated[StrictInt | None, Field(ge=0, le=20)] = None
    return_token_ids: Annotated[StrictBool | None, Field(description="choices have the ids of their tokens too")] = None


class CalledFunction(Model):
    name: Annotated[str, Field(pattern=NAME)]
    arguments: str | JsonObject = "{}"


class PastCall(Model):
    id: Annotated[str, Field(max_length=256)] = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[JsonObject] | None = None
    name: Annotated[str | None, Field(max_length=64)] = None
    reasoning_content: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: Annotated[str | None, Field(max_length=256)] = None


class Function(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: JsonObject | None = None


class Tool(Model):
    type: Literal["function"]
    function: Function


class NamedFunction(Model):
    name: Annotated[str, Field(pattern=NAME)]


class NamedTool(Model):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt | None, Field(ge=0, le=20)] = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: Annotated[str | None, Field(max_length=32)] = None
    chat_template_kwargs: JsonObject | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("tools: two have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice names a function that is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        return self
