"""The `openai` client against a real server with a tiny model: what it asks for, it gets, and it equals the runner's
own answer."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import NOW, WEATHER, Saying, Serving, calls_of

from moe_nvfp4.sampling import SamplingParams

GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
HELLO: Any = [{"role": "user", "content": "Hello there"}]


def offline(served: Serving, prompt: Any, **fields: Any) -> Any:
    return served.runners["demo"].generate(prompt, SamplingParams(ignore_eos=True, **fields))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "tools"]
    assert client.models.retrieve("tools").id == "tools"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize("prompt", ["Once upon", ["Once upon", "a b c"], [5, 6, 7], [[5, 6, 7], [8], [9, 10]]])
def test_completions(served: Serving, client: openai.OpenAI, prompt: Any) -> None:
    found = client.completions.create(model="demo", prompt=prompt, max_tokens=9, **GREEDY)
    expected = offline(served, prompt, max_new_tokens=9)
    expected = expected if isinstance(expected, list) else [expected]
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    assert [choice.index for choice in found.choices] == list(range(len(expected)))
    assert {choice.finish_reason for choice in found.choices} == {"length"}
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(one.prompt_token_ids) for one in expected)
    assert found.usage.completion_tokens == 9 * len(expected)


def test_completion_options(served: Serving, client: openai.OpenAI) -> None:
    options: Any = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    own = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True}
    found = client.completions.create(
        model="demo", prompt="Once", max_tokens=8, n=3, echo=True, logit_bias={"40": 3}, **options, extra_body=own
    )
    params = {**options, **own, "logit_bias": {40: 3}, "max_new_tokens": 8, "n": 3}
    params.pop("ignore_eos")
    expected = offline(served, "Once", **params).completions
    assert [choice.text for choice in found.choices] == ["Once" + one.text for one in expected]
    assert len({choice.text for choice in found.choices}) == 3
    stop = expected[0].text[6:9]
    cut = client.completions.create(
        model="demo", prompt="Once", max_tokens=8, stop=[stop], logit_bias={"40": 3}, **options, extra_body=own
    ).choices[0]
    assert cut.finish_reason == "stop" and cut.text == expected[0].text[: expected[0].text.index(stop)]


def test_completion_logprobs(served: Serving, client: openai.OpenAI) -> None:
    found = client.completions.create(model="demo", prompt="Once", max_tokens=12, logprobs=3, **GREEDY).choices[0]
    expected = offline(served, "Once", max_new_tokens=12, logprobs=3)
    logprobs = found.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.top_logprobs and logprobs.text_offset
    assert logprobs.token_logprobs == pytest.approx([one.logprob for one in expected.logprobs])
    assert [max(top.values()) for top in logprobs.top_logprobs] == pytest.approx(logprobs.token_logprobs)
    starts = zip(logprobs.text_offset, logprobs.tokens, strict=True)
    assert all(found.text.startswith(token, at) for at, token in starts if "\ufffd" not in found.text[: at + 1])


def test_completion_stream(client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "prompt": [[5, 6], [7, 8]], "max_tokens": 8, "n": 2, "seed": 3, "logprobs": 1}
    whole = client.completions.create(**asked)
    texts, finish, logprobs = [""] * 4, [""] * 4, [[] for _ in range(4)]
    for chunk in client.completions.create(**asked, stream=True, echo=False):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finish[choice.index] = choice.finish_reason or ""
            logprobs[choice.index] += (choice.logprobs and choice.logprobs.token_logprobs) or []
    assert texts == [choice.text for choice in whole.choices]
    assert finish == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs and choice.logprobs.token_logprobs for choice in whole.choices]


def test_completion_token_ids(served: Serving, client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "prompt": [[5, 6], [7, 8]], "max_tokens": 8, "n": 2, "seed": 3}
    asked["extra_body"] = {"return_token_ids": True, "ignore_eos": True}
    params = {"max_new_tokens": 8, "n": 2, "seed": 3, "temperature": 1.0}
    expected = [
        list(one.token_ids) for found in offline(served, asked["prompt"], **params) for one in found.completions
    ]
    found = client.completions.create(**asked).choices
    assert [choice.model_extra for choice in found] == [{"token_ids": ids} for ids in expected]
    streamed: list[list[int]] = [[] for _ in expected]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            assert choice.model_extra is not None
            streamed[choice.index] += choice.model_extra["token_ids"]
    assert streamed == expected


def test_chat(served: Serving, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="demo", messages=HELLO, max_completion_tokens=10, logprobs=True, top_logprobs=2, **GREEDY
    )
    expected = offline(served, HELLO, max_new_tokens=10, logprobs=2)
    choice = found.choices[0]
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert b"".join(bytes(one.bytes or []) for one in content).decode("utf-8", "replace") == expected.text
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in expected.logprobs])
    assert all(len(one.top_logprobs) == 2 for one in content)
    assert found.usage is not None and found.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_chat_stream(client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "messages": HELLO, "max_tokens": 10, "n": 3, "seed": 5, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    for index, choice in enumerate(whole.choices):
        mine = [one for chunk in chunks for one in chunk.choices if one.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
        streamed = [one for part in mine if part.logprobs for one in part.logprobs.content or []]
        assert choice.logprobs is not None and streamed == choice.logprobs.content


def test_a_second_turn_reuses_the_first(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "word " * 120}]
    first = client.chat.completions.create(model="demo", messages=messages, max_tokens=4, **GREEDY)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *HELLO]
    usage = client.chat.completions.create(model="demo", messages=messages, max_tokens=4, **GREEDY).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 64


def test_fields_that_change_nothing_are_taken(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="demo", messages=HELLO, max_tokens=2, user="me", store=False, metadata={"a": "b"}, service_tier="auto",
        extra_body={"something_new": {"deep": [1]}},
    )  # fmt: skip
    assert found.choices


def test_text_parts_and_developer(served: Serving, client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}]
    found = client.chat.completions.create(model="demo", messages=parts, max_tokens=6, **GREEDY)
    assert found.choices[0].message.content == offline(served, plain, max_new_tokens=6).text


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"messages": []}, "at least 1 item", "messages"),
        ({"messages": [{"role": "root", "content": "x"}]}, "Input should be", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "expected", None),
        ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
        ({"temperature": -1}, "greater than or equal to 0", "temperature"),
        ({"n": 100}, "at most 16", "n"),
        ({"stop": ["x"] * 17}, "at most 16", "stop"),
        ({"stop": "x" * 2000}, "at most 1,024", "stop"),
        ({"logit_bias": {"5000": 1}}, "expected ids 0 to 1023", "logit_bias"),
        ({"logit_bias": {"x": 1}}, "match", "logit_bias.x.[key]"),
        ({"top_logprobs": 3}, "needs logprobs true", None),
        ({"tools": [NOW]}, "chat template knows none", "tools"),
        ({"tool_choice": "required"}, "needs tools", None),
        ({"functions": [{"name": "f"}]}, "use tools", "functions"),
        ({"continue_final_message": True}, "always complete", "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "the model's context is 1,024", "messages"),
        ({"model": "other"}, "not served here", "model"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "leave it out", None),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema", "response_format"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: dict[str, Any], message: str, param: str | None) -> None:
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 2} | fields
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.post("/chat/completions", body=asked, cast_to=object)
    assert message in caught.value.message and caught.value.param == param
    assert caught.value.request_id and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [2000]}, None),
    ],
)
def test_bad_completions(client: openai.OpenAI, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "demo", "prompt": "x", "max_tokens": 2, **fields})
    assert caught.value.param == param


def test_context_length_has_its_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=[1] * 1024)
    assert caught.value.code == "context_length_exceeded"


def test_timeout_of_the_client(served: Serving, client: openai.OpenAI) -> None:
    """It gives up; the pages come back, which the fixture's end holds."""
    before = served.value("moe_nvfp4_requests_total", outcome="cancelled")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(model="demo", prompt="x", max_tokens=1000, **GREEDY)
    deadline = time.monotonic() + 5
    while served.value("moe_nvfp4_requests_total", outcome="cancelled") == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_async_client_with_many_at_once(served: Serving) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            asks = [
                client.completions.create(model="demo", prompt=[7 + i], max_tokens=5 + i % 4, **GREEDY)
                for i in range(24)
            ]
            return [one.choices[0].text for one in await asyncio.gather(*asks)]

    expected = [offline(served, [7 + i], max_new_tokens=5 + i % 4).text for i in range(24)]
    assert asyncio.run(ask()) == expected


def test_tools_are_shown_and_past_calls_too(served: Serving, client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 2}'}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    found = client.chat.completions.create(model="tools", messages=messages, tools=[WEATHER], max_tokens=3)
    tokenizer = served.runners["tools"].tokenizer
    assert tokenizer is not None and found.usage is not None
    parsed = [*HELLO, {**messages[1], "tool_calls": [json.loads(json.dumps(call))]}, messages[2]]
    parsed[1]["tool_calls"][0]["function"]["arguments"] = {"days": 2}
    assert found.usage.prompt_tokens == len(tokenizer.encode_chat(parsed, tools=[WEATHER]))
    assert found.choices[0].message.tool_calls is None, "a random model's text is no call"


def arguments_of(call: Any) -> Any:
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"days", "exact"}
    assert type(arguments["days"]) is int and type(arguments["exact"]) is bool
    return arguments


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_demanded(client: openai.OpenAI, choice: Any) -> None:
    """Even a random model makes it, since its arguments are held to the schema."""
    asked: Any = {"messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200, "seed": 11, "n": 2}
    whole = client.chat.completions.create(model="tools", **asked)
    for one in whole.choices:
        assert one.finish_reason == "tool_calls" and one.message.content is None and one.message.tool_calls
        arguments_of(one.message.tool_calls[0])
    built: list[dict[str, str]] = [{"name": "", "arguments": ""} for _ in range(2)]
    for chunk in client.chat.completions.create(model="tools", **asked, stream=True):
        for one in chunk.choices:
            for part in one.delta.tool_calls or []:
                assert part.index == 0 and part.function is not None
                built[one.index]["name"] += part.function.name or ""
                built[one.index]["arguments"] += part.function.arguments or ""
    expected = [one.message.tool_calls[0].function for one in whole.choices if one.message.tool_calls]
    assert built == [{"name": one.name, "arguments": one.arguments} for one in expected]


def test_a_demanded_call_whose_schema_cannot_be_enforced(client: openai.OpenAI) -> None:
    """The answer begins as a call; a random model does not finish it, and then it is text."""
    tool = {"type": "function", "function": {"name": "odd", "parameters": {"not": {"type": "string"}}}}
    asked: Any = {"messages": HELLO, "tools": [tool], "tool_choice": "required", "max_tokens": 9, **GREEDY}
    message = client.chat.completions.create(model="tools", **asked).choices[0].message
    assert (message.content or "").startswith('<tool_call>\n{"name": "odd", "arguments": ') and not message.tool_calls


def test_reasoning_content_and_calls(served: Serving, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    saying = Saying(served.runners["tools"])
    saying.text = f"<think>\nHm <b>.\n</think>\n\nI look.{calls_of(1)}{calls_of(2)}"
    monkeypatch.setattr(served.server.models["tools"], "runner", saying)
    asked: Any = {"model": "tools", "messages": HELLO, "max_tokens": 400}
    others: list[dict[str, Any]] = [
        {"tools": [WEATHER], "parallel_tool_calls": False},
        {"tools": [NOW]},
        {"tools": [WEATHER], "tool_choice": "none"},
    ]
    with ThreadPoolExecutor() as pool:  # at once, since each takes a second
        whole, single, *without = pool.map(
            lambda fields: client.chat.completions.create(**asked, **fields), [{"tools": [WEATHER, NOW]}, *others]
        )
    message: Any = whole.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm <b>.", "I look.")
    assert [arguments_of(call)["days"] for call in message.tool_calls] == [1, 2]
    assert whole.choices[0].finish_reason == "tool_calls"
    usage: Any = whole.usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens

    deltas: list[Any] = []
    for chunk in client.chat.completions.create(**asked, tools=[WEATHER, NOW], stream=True):
        deltas.append(chunk.choices[0].delta)
    assert "".join(getattr(one, "reasoning_content", None) or "" for one in deltas) == "Hm <b>."
    assert "".join(one.content or "" for one in deltas) == "I look."
    parts = [part for one in deltas for part in one.tool_calls or []]
    assert [part.index for part in parts] == [0, 0, 1, 1]
    assert [part.function.name for part in parts if part.id] == ["weather", "weather"]

    assert len(single.choices[0].message.tool_calls or []) == 1
    for found in without:
        message = found.choices[0].message
        assert message.tool_calls is None and message.content == f"I look.{calls_of(1)}{calls_of(2)}"


def test_an_answer_with_calls_runs_through_the_clients_stream_helper(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model="tools", messages=HELLO, tools=[WEATHER], tool_choice=choice, max_tokens=200, seed=3
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    arguments_of(message.tool_calls[0])


def test_json_schema(client: openai.OpenAI) -> None:
    schema = WEATHER["function"]["parameters"]
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    for model in ("demo", "tools"):
        found = client.chat.completions.create(
            model=model, messages=HELLO, response_format=wanted, max_tokens=300, seed=2
        ).choices[0]
        assert found.finish_reason == "stop" and set(json.loads(found.message.content or "")) == {"days", "exact"}
        assert getattr(found.message, "reasoning_content", None) is None
    text = client.completions.create(
        model="demo", prompt="x", max_tokens=300, seed=2, extra_body={"response_format": wanted}
    ).choices[0]
    assert set(json.loads(text.text)) == {"days", "exact"}


def test_json_object(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="demo", messages=HELLO, response_format={"type": "json_object"}, max_tokens=60, temperature=0
    ).choices[0]
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content or ""), dict)
    assert (found.message.content or "").lstrip().startswith("{")


def test_a_schema_that_cannot_be_enforced(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, response_format=wanted)
    assert caught.value.param == "response_format"
