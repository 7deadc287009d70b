"""Answers split into reasoning, content and calls: the dialects of the models, and any way the text may be cut."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import DEMO

from moe_nvfp4.launch.http_answer_parser import AnswerParser, Text
from moe_nvfp4.launch.http_dialects import CALLS, THINK, Call, CallForm, Dialect
from moe_nvfp4.tokenizer import Tokenizer

FORMS = dict(CALLS)
CHANNEL, TAGS = dict(THINK)["<|channel>"], dict(THINK)["<think>"]
HERMES = Dialect(TAGS, FORMS["<tool_call>"])
CODER = Dialect(TAGS, FORMS["<function="])
GEMMA = Dialect(CHANNEL, FORMS["<|tool_call>"], special=True)
TOOLS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "places": {"type": "array"},
        },
    },
    "now": {},
}
LONDON = Call("weather", '{"city": "London", "days": 3}')


def parse(parser: AnswerParser, text: str, cuts: random.Random | None = None, *, stopped: bool = True) -> list[object]:
    """The parts, with neighbours of one kind joined: ("content", text), ("reasoning", text) or a call."""
    parts = []
    while text:
        size = cuts.randint(1, 6) if cuts else len(text)
        parts += parser.push(text[:size])
        text = text[size:]
    joined: list[object] = []
    for part in parts + parser.finish(stopped=stopped):
        if isinstance(part, Call):
            joined.append(part)
        elif joined and isinstance(joined[-1], tuple) and joined[-1][0] == part.kind:
            joined[-1] = (part.kind, joined[-1][1] + part.text)
        else:
            joined.append((part.kind, part.text))
    return joined


ANSWERS = [
    # The model of each dialect, its text, what it means.
    (HERMES, "Hello.", [("content", "Hello.")]),
    (HERMES, "<think>\nHm.\n\nYes.\n</think>\n\nHello.\n", [("reasoning", "Hm.\n\nYes."), ("content", "Hello.\n")]),
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "London", "days": 3}}\n</tool_call>', [LONDON]),
    (
        HERMES,
        'I ask.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "weather", '
        '"arguments": "{\\"city\\": \\"London\\", \\"days\\": 3}"}\n</tool_call>\n',
        [("content", "I ask."), Call("now", "{}"), LONDON],
    ),
    (HERMES, '<think>a</think><tool_call>{"name": "now", "arguments": {}}', [("reasoning", "a"), Call("now", "{}")]),
    (
        CODER,
        "<tool_call>\n<function=weather>\n<parameter=city>\nLondon\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        [LONDON],
    ),
    (
        CODER,
        "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
        '<parameter=places>\n["a\\n<b>"]\n</parameter>\n<parameter=other>\n1\n2\n</parameter>\n</function>\n</tool_call>',
        [Call("weather", '{"city": "12", "exact": true, "places": ["a\\n<b>"], "other": "1\\n2"}')],
    ),
    (CODER, "<tool_call>\n<function=now>\n</function>\n</tool_call>", [Call("now", "{}")]),
    (GEMMA, '<|tool_call>call:weather{city:<|"|>London<|"|>,days:3}<tool_call|>', [LONDON]),
    (
        GEMMA,
        '<|channel>thought\nHm.\n<channel|>So:<|tool_call>call:weather{places:[<|"|>a "b": {c}<|"|>,{n:1.5}],'
        "exact:true,city:null}<tool_call|><|tool_call>call:now{}<tool_call|>",
        [
            ("reasoning", "Hm."),
            ("content", "So:"),
            Call("weather", '{"places": ["a \\"b\\": {c}", {"n": 1.5}], "exact": true, "city": null}'),
            Call("now", "{}"),
        ],
    ),
    (GEMMA, "<|channel>thought\n<channel|>Hello.", [("content", "Hello.")]),
]


@pytest.mark.parametrize(("dialect", "text", "expected"), ANSWERS)
def test_answers_however_they_are_cut(dialect: Dialect, text: str, expected: list[object]) -> None:
    assert parse(AnswerParser(dialect, TOOLS), text) == expected
    for seed in range(30):
        assert parse(AnswerParser(dialect, TOOLS), text, random.Random(seed)) == expected


NO_CALLS = [
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": \n</tool_call>'),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "now", "arguments": [1]}</tool_call> and more'),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"x": NaN}}</tool_call>'),
    (HERMES, "<tool_call>" + "[" * 100_000 + "</tool_call>"),
    (HERMES, '<tool_call>["now"]</tool_call>'),
    (HERMES, "a <tool_cal"),
    (CODER, "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
    (CODER, "<tool_call>\n<function=weather>\n<parameter=city>\nLondon\n</function>\n</tool_call>"),
    (CODER, "<tool_call>\nnow()\n</tool_call>"),
    (GEMMA, "<|tool_call>call:now{a:}<tool_call|>"),
    (GEMMA, "<|tool_call>now{}<tool_call|>"),
    (GEMMA, '<|tool_call>call:now{a:<|"|>never closed}<tool_call|>'),
]


@pytest.mark.parametrize(("dialect", "text"), NO_CALLS)
def test_what_is_no_call_stays_content(dialect: Dialect, text: str) -> None:
    assert parse(AnswerParser(dialect, TOOLS), text, random.Random(1)) == [("content", text)]


@pytest.mark.parametrize("dialect", [HERMES, CODER, GEMMA])
def test_without_tools_nothing_is_a_call(dialect: Dialect) -> None:
    text = "".join(text for one, text, _ in ANSWERS if one is dialect and "think" not in text and "channel" not in text)
    assert parse(AnswerParser(dialect, None), text, random.Random(2)) == [("content", text)]


def test_an_answer_that_was_cut_is_no_call() -> None:
    text = '<tool_call>\n{"name": "now", "arguments": {}}'
    assert parse(AnswerParser(HERMES, TOOLS), text, stopped=False) == [("content", text)]
    assert parse(AnswerParser(HERMES, TOOLS), "<think>so far", stopped=False) == [("reasoning", "so far")]


def test_reasoning_that_the_prompt_began() -> None:
    parser = AnswerParser(HERMES, TOOLS, thinking=True)
    assert parser.thinking
    assert parse(parser, "Hm.\n</think>\n\n<think> is a tag.") == [
        ("reasoning", "Hm."),
        ("content", "<think> is a tag."),
    ]


def test_reasoning_only_at_the_start() -> None:
    text = "The tag <think> opens it, </think> closes it."
    assert parse(AnswerParser(HERMES, TOOLS), text, random.Random(3)) == [("content", text)]


def test_a_call_that_the_prompt_began() -> None:
    begun = FORMS["<tool_call>"].forced.format(name="weather")
    parser = AnswerParser(HERMES, TOOLS, begun=begun)
    assert parse(parser, '{"city": "London", "days": 3}}\n</tool_call>', random.Random(4)) == [LONDON]
    for form in FORMS.values():
        assert form.forced.format(name="now").startswith(form.marks[0])


@given(st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "a", " ", "\n", "{}"])))
def test_no_text_is_lost(pieces: list[str]) -> None:
    """Whatever a model writes: what is not white space or a mark of reasoning is given out, in order."""
    parser = AnswerParser(HERMES, TOOLS)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish(stopped=True)
    assert all(isinstance(part, Text) and part.text for part in parts)
    shown = "".join(part.text for part in parts if isinstance(part, Text))
    given_out, written = ("".join(re.sub("</?think>", "", text).split()) for text in (shown, "".join(pieces)))
    assert given_out == written


SCALARS = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.characters(exclude_characters='<|"', codec="utf-8"))
)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.recursive(SCALARS, st.lists, max_leaves=5)))
def test_arguments_come_back(arguments: dict[str, object]) -> None:
    """As the templates of Hermes and Gemma write them."""

    def gemma(value: object) -> str:
        if isinstance(value, str):
            return f'<|"|>{value}<|"|>'
        if isinstance(value, list):
            return "[" + ",".join(map(gemma, value)) + "]"
        return json.dumps(value)

    body = "{" + ",".join(f"{key}:{gemma(value)}" for key, value in arguments.items()) + "}"
    for form, text in (
        (FORMS["<|tool_call>"], f"call:now{body}"),
        (FORMS["<tool_call>"], json.dumps({"name": "now", "arguments": arguments})),
    ):
        call = form.read(text, TOOLS)
        assert call is not None and json.loads(call.arguments) == arguments


@pytest.mark.parametrize(
    ("template", "think", "call"),
    [
        ("{{ messages }}", None, None),
        ("<think> <tool_call>{}", TAGS, FORMS["<tool_call>"]),
        ("<tool_call><function=name>", None, FORMS["<function="]),
        ("<|channel><|tool_call>", CHANNEL, FORMS["<|tool_call>"]),
    ],
)
def test_the_template_says_the_dialect(template: str, think: object, call: CallForm | None) -> None:
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    tokenizer._tokenizer.chat_template = template
    assert Dialect.of(tokenizer) == Dialect(think, call, special=False)


def test_marks_that_are_special_tokens() -> None:
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    tokenizer._tokenizer.chat_template = "<think>"
    tokenizer._tokenizer.add_special_tokens({"extra_special_tokens": ["<think>"]})
    assert Dialect.of(tokenizer).special
    assert Dialect.of(None) == Dialect()
