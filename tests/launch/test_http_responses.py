"""/v1/responses through the `openai` client: the answers are chat's own, and every object is one of the client's types,
strictly."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from serving import (
    NOW,
    WEATHER,
    Saying,
    Serving,
    calls_of,
    require_free,
    serving,
    until,
)

RESPONSES = "/v1/responses"
GREEDY: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
FLAT: Any = {"type": "function", **WEATHER["function"], "strict": True}
FLAT_NOW: Any = {"type": "function", "name": "now", "parameters": None, "strict": None}
DEEP: Any = reduce(lambda inner, _: {"a": inner}, range(900), {})
THOUGHT: Any = {"type": "reasoning_text", "text": "Hm"}
SAID: Any = {"type": "output_text", "text": "I look.", "annotations": []}
NOON: Any = {"type": "input_text", "text": "noon"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
DONE = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def events_of(served: Serving, **fields: Any) -> list[dict[str, Any]]:
    """Of a stream, as they are sent, and each valid to the client's own types."""
    found = []
    with httpx.stream("POST", served.url + RESPONSES, json={**fields, "stream": True}, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                found.append(json.loads(line[6:]))
                assert found[-1]["type"] == name
    for number, event in enumerate(found):
        EVENT.validate_python(event, strict=True)
        assert event["sequence_number"] == number
    return found


def bare(value: Any) -> Any:
    """Without what differs from one request to the next."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        changing = ("id", "call_id", "created_at", "completed_at", "usage")
        return {key: bare(part) for key, part in value.items() if key not in changing}
    return [bare(part) for part in value] if isinstance(value, list) else value


def chat_of(client: openai.OpenAI, messages: Any, **fields: Any) -> Any:
    return client.chat.completions.create(model=fields.pop("model", "demo"), messages=messages, **fields)


def say(served: Serving, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    saying = Saying(served.runners["tools"])
    saying.text = text
    monkeypatch.setattr(served.server.models["tools"], "runner", saying)


def test_an_answer_is_that_of_chat(client: openai.OpenAI) -> None:
    raw = client.responses.with_raw_response.create(
        model="demo", input="Hello there", max_output_tokens=10, metadata={"a": "b"}, store=True, user="me", **GREEDY
    )
    Response.model_validate_json(raw.content, strict=True)
    found = raw.parse()
    chat = chat_of(client, [{"role": "user", "content": "Hello there"}], max_tokens=10, **GREEDY)
    assert found.output_text == chat.choices[0].message.content
    assert found.usage is not None and found.usage.total_tokens == chat.usage.total_tokens
    assert (found.usage.input_tokens, found.usage.output_tokens) == (chat.usage.prompt_tokens, 10)
    assert found.status == "incomplete" and found.metadata == {"a": "b"} and found.id.startswith("resp_")
    assert found.incomplete_details is not None and found.incomplete_details.reason == "max_output_tokens"
    (message,) = found.output
    assert message.type == "message" and message.status == "incomplete"


def test_a_complete_answer(client: openai.OpenAI) -> None:
    options: Any = {"temperature": 0, "extra_body": {"ignore_eos": True, "stop": "e"}}
    found = client.responses.create(model="demo", input="Hello there", max_output_tokens=60, **options)
    assert found.status == "completed" and found.incomplete_details is None and found.completed_at
    assert found.output[0].type == "message" and found.output[0].status == "completed"
    chat = chat_of(client, [{"role": "user", "content": "Hello there"}], max_tokens=60, **options)
    assert found.output_text == chat.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"instructions": "Be brief.", "input": "Hi"},
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        ),
        (
            {
                "instructions": "Be brief.",
                "input": [
                    {"role": "developer", "content": "And kind."},
                    {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("one", "two")]},
                ],
            },
            [{"role": "system", "content": "Be brief.\nAnd kind."}, {"role": "user", "content": "one\ntwo"}],
        ),
        (
            {
                "input": [
                    {"role": "user", "content": "Hi"},
                    {"type": "reasoning", "id": "r", "summary": [], "content": [THOUGHT]},
                    {"type": "message", "id": "m", "role": "assistant", "content": [SAID], "status": "completed"},
                    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"days": 2}'},
                    {"type": "function_call", "call_id": "c2", "name": "now", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
                    {"type": "function_call_output", "call_id": "c2", "output": [NOON]},
                ],
                "tools": [FLAT, FLAT_NOW],
            },
            [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant", "reasoning_content": "Hm", "content": "I look.",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 2}'}},
                        {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                {"role": "tool", "tool_call_id": "c2", "content": "noon"},
            ],
        ),
        (
            {
                "input": [
                    {"role": "assistant", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            [
                {"role": "assistant", "content": "a"},
                {
                    "role": "assistant", "content": "b",
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
                },
                {"role": "assistant", "content": "c"},
            ],
        ),
    ],
)  # fmt: skip
def test_prompts_are_those_of_chat(client: openai.OpenAI, fields: Any, messages: Any) -> None:
    found = client.responses.create(model="tools", max_output_tokens=6, **fields, **GREEDY)
    nested = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}, NOW]
    tools = {"tools": nested} if "tools" in fields else {}
    chat = chat_of(client, messages, model="tools", max_tokens=6, **tools, **GREEDY)
    assert found.usage is not None and found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.output_text == chat.choices[0].message.content


def test_a_stream(served: Serving, client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "input": "Hello there", "max_output_tokens": 60, "temperature": 0}
    asked["extra_body"] = {"stop": ["e"], "ignore_eos": True}
    with client.responses.stream(**asked) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    whole = client.responses.create(**asked)
    assert bare(final) == bare(whole) and final.usage is not None and whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens
    assert deltas == final.output_text == whole.output_text
    events = events_of(served, **{key: asked[key] for key in ("model", "input", "temperature")}, **asked["extra_body"])
    names = [event["type"] for event in events if not event["type"].endswith(".delta")]
    begin = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert names == [*begin, *DONE, "response.completed"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []


def test_a_stream_that_is_cut(served: Serving) -> None:
    fields: Any = {"model": "demo", "input": "Hello", "max_output_tokens": 3, "ignore_eos": True, "temperature": 0}
    events = events_of(served, **fields)
    assert [event["type"] for event in events[-4:]] == [*DONE, "response.incomplete"]
    assert events[-2]["item"]["status"] == events[-1]["response"]["status"] == "incomplete"
    assert events[-1]["response"]["output"] == [events[-2]["item"]]


def test_logprobs(served: Serving, client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "input": "Hello", "max_output_tokens": 8, "top_logprobs": 2}
    found = client.responses.create(**asked, include=["message.output_text.logprobs"], **GREEDY)
    message: Any = found.output[0]
    logprobs = message.content[0].logprobs
    assert b"".join(bytes(one.bytes) for one in logprobs).decode("utf-8", "replace") == found.output_text
    assert all(len(one.top_logprobs) == 2 for one in logprobs)
    events = events_of(served, **asked, temperature=0, ignore_eos=True)
    streamed = [one for event in events if event["type"].endswith("text.delta") for one in event["logprobs"]]
    assert [one["token"] for one in streamed] == [one.token for one in logprobs]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_that_is_demanded_and_its_output(client: openai.OpenAI, choice: Any) -> None:
    turn: list[Any] = [{"role": "user", "content": "Weather?"}]
    asked: Any = {"model": "tools", "tools": [FLAT], "max_output_tokens": 300}
    with client.responses.stream(input=turn, tool_choice=choice, **asked, extra_body={"seed": 11}) as stream:
        final = stream.get_final_response()
    whole = client.responses.create(input=turn, tool_choice=choice, **asked, extra_body={"seed": 11})
    (streamed,), (call,) = final.output, whole.output
    assert streamed.type == "function_call" and call.type == "function_call" and whole.status == "completed"
    assert streamed.arguments == call.arguments and set(json.loads(call.arguments)) == {"days", "exact"}
    turn += [*whole.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    after = client.responses.create(input=turn, **{**asked, "max_output_tokens": 5})
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        turn[0],
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "sunny"},
    ]
    nested = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
    chat = chat_of(client, messages, model="tools", tools=nested, max_tokens=1)
    assert after.usage is not None and after.usage.input_tokens == chat.usage.prompt_tokens


def test_reasoning_text_and_calls(served: Serving, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    say(served, monkeypatch, f"<think>\nHm <b>.\n</think>\n\nI look.{calls_of(1)}{calls_of(2)}")
    asked: Any = {"model": "tools", "input": "Weather?", "tools": [FLAT, FLAT_NOW], "max_output_tokens": 400}
    with ThreadPoolExecutor() as pool:  # at once, since each takes a second
        jobs = [pool.submit(client.responses.create, **asked, parallel_tool_calls=more) for more in (True, False)]
        events = pool.submit(events_of, served, **asked).result()
        whole, single = (job.result() for job in jobs)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    reasoning: Any = whole.output[0]
    assert reasoning.content[0].text == "Hm <b>." and whole.output_text == "I look."
    assert [json.loads(item.arguments)["days"] for item in whole.output if item.type == "function_call"] == [1, 2]
    assert whole.usage is not None and whole.usage.output_tokens_details.reasoning_tokens > 0
    assert [item.type for item in single.output] == ["reasoning", "message", "function_call"]

    assert bare(events[-1]["response"]["output"]) == bare([item.model_dump(exclude_none=True) for item in whole.output])
    assert events[-1]["response"]["output"] == [one["item"] for one in events if one["type"].endswith("item.done")]
    deltas: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            deltas[event["item_id"]] = deltas.get(event["item_id"], "") + event["delta"]
    assert list(deltas.values()) == [
        "Hm <b>.",
        "I look.",
        *(i.arguments for i in whole.output if i.type == "function_call"),
    ]
    with client.responses.stream(**asked) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == [item.type for item in whole.output]


def test_a_schema_through_the_clients_parse(client: openai.OpenAI) -> None:
    class Weather(BaseModel):
        days: int
        exact: bool

    for model in ("demo", "tools"):
        found = client.responses.parse(
            model=model, input="Weather?", text_format=Weather, max_output_tokens=300, extra_body={"seed": 2}
        )
        assert isinstance(found.output_parsed, Weather) and found.status == "completed"
    form: Any = {"format": {"type": "json_object"}}
    some = client.responses.create(model="demo", input="x", text=form, max_output_tokens=60, temperature=0)
    assert some.output_text.lstrip().startswith("{") and some.text is not None and some.text.format is not None
    assert some.text.format.type == "json_object"


def test_thinking_is_switched_off_as_in_chat(client: openai.OpenAI) -> None:
    found = client.responses.create(model="tools", input="Hi", reasoning={"effort": "none"}, max_output_tokens=1)
    chat = chat_of(client, [{"role": "user", "content": "Hi"}], model="tools", reasoning_effort="none", max_tokens=1)
    assert found.usage is not None and found.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"previous_response_id": "resp_1"}, "send the whole conversation", "previous_response_id"),
        ({"conversation": "conv_1"}, "send the whole conversation", "conversation"),
        ({"background": True}, "use stream", "background"),
        ({"prompt": {"id": "pmpt_1"}}, "no stored prompts", "prompt"),
        ({"truncation": "auto"}, "send disabled", "truncation"),
        ({"tools": [{"type": "web_search"}]}, "send type function", "tools.0.type"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "send type function", "tools.0.type"),
        ({"tool_choice": {"type": "file_search"}}, "type function with its name", "tool_choice"),
        ({"tool_choice": "required"}, "needs tools", None),
        ({"tools": [FLAT, FLAT]}, "two have the same name", None),
        ({"tools": [FLAT]}, "chat template knows none", "tools"),
        ({"tools": [FLAT | {"parameters": DEEP}], "tool_choice": "none"}, "more than 100 deep", "tools.0"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "each of them whole", "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]}, "send input_text", None),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "send input_text", None),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "send input_text", None),
        ({"input": [{"role": "root", "content": "x"}]}, "Input should be", "input.0.message.role"),
        ({"input": []}, "at least 1 item", "input"),
        ({"input": "x " * 3000}, "the model's context is 1,024", "input"),
        ({"model": "other"}, "not served here", "model"),
        ({"max_output_tokens": 0}, "greater than or equal to 1", "max_output_tokens"),
        ({"max_tokens": 5}, "use max_output_tokens", "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}]}, "use input", "messages"),
        ({"n": 2}, "send more requests", "n"),
        ({"guided_json": {"type": "object"}}, "use text.format", "guided_json"),
        ({"stop": ["x"] * 17}, "at most 16", "stop"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "needs schema", "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {"type": "string"}}}}},
            "text.format: ", "text.format",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(client: openai.OpenAI, fields: dict[str, Any], message: str, param: str | None, stream: bool) -> None:
    asked = {"model": "demo", "input": "x", "max_output_tokens": 2, "stream": stream} | fields
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.post("/responses", body=asked, cast_to=object)
    assert message in caught.value.message and caught.value.type == "invalid_request_error"
    if param is None:
        assert any(name in caught.value.message for name in fields)
    else:
        assert caught.value.param == param


def test_an_error_in_a_stream(served: Serving) -> None:
    """What was said before it stays unfinished, and nothing calls the answer complete."""
    with serving({"demo": served.runners["demo"]}, request_seconds=0.3) as slow:
        events = events_of(slow, model="demo", input="Hello", max_output_tokens=900, ignore_eos=True, temperature=0)
        assert events[-1]["type"] == "response.failed" and events[-1]["response"]["status"] == "failed"
        error = events[-1]["response"]["error"]
        assert error["code"] == "server_error" and "deadline" in error["message"]
        assert not [one for one in events if one["type"].endswith((".done", ".completed", ".incomplete"))]
        client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key="any", max_retries=0)
        asked: Any = {"model": "demo", "input": "Hello", "max_output_tokens": 900, **GREEDY}
        with client, client.responses.stream(**asked) as stream, pytest.raises(RuntimeError, match="completed"):
            stream.get_final_response()
        until(lambda: slow.value("moe_nvfp4_requests_total", endpoint=RESPONSES, outcome="timeout") == 2)


def test_a_client_that_leaves(served: Serving) -> None:
    before = served.value("moe_nvfp4_requests_total", endpoint=RESPONSES, outcome="cancelled")
    body = {"model": "demo", "input": "Hello", "max_output_tokens": 900, "stream": True, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = f"POST {RESPONSES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    with socket.create_connection(served.listener.getsockname()) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        assert connection.recv(100)
    until(lambda: served.value("moe_nvfp4_requests_total", endpoint=RESPONSES, outcome="cancelled") == before + 1)
    require_free(served.runners["demo"])
