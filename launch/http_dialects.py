"""How models write tool calls and reasoning: the marks around them, and what lies between the marks of a call.

Which dialect a model speaks is read from its chat template, since the template shows it the form to use.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from moe_nvfp4.tokenizer import Tokenizer

Schemas = Mapping[str, Mapping[str, Any]]  # name of a tool -> JSON schema of its parameters


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # JSON of an object


class CallForm(NamedTuple):
    """`forced` is how a call begins, for requests that demand one. Where its arguments follow as plain JSON, they can
    be held to the schema of the tool, and `closing` ends the call after them."""

    marks: tuple[str, str]
    read: Callable[[str, Schemas], Call | None]
    forced: str
    closing: str = ""


@dataclass(frozen=True, slots=True)
class Dialect:
    think: tuple[str, str] | None = None
    call: CallForm | None = None
    special: bool = False  # the marks are special tokens, which the text of an answer leaves out by default

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> "Dialect":
        if tokenizer is None:
            return cls()
        template = tokenizer.chat_template
        think = next((marks for sign, marks in THINK if sign in template), None)
        call = next((form for sign, form in CALLS if sign in template), None)
        marks = [*(think or ()), *(call.marks if call else ())]
        special = any(mark not in tokenizer.decode(tokenizer.encode(mark)) for mark in marks)
        return cls(think, call, special)


def read_json_call(body: str, schemas: Schemas) -> Call | None:
    """{"name": ..., "arguments": {...}}"""
    try:
        value = json.loads(body)
        arguments = value["arguments"] if "arguments" in value else value["parameters"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return _call(value["name"], arguments, schemas)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


FUNCTION: Final = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
PARAMETER: Final = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def read_xml_call(body: str, schemas: Schemas) -> Call | None:
    """<function=name><parameter=key>value</parameter>...</function>; the schema says which values are no strings."""
    found = FUNCTION.fullmatch(body)
    if found is None or found[1] not in schemas:
        return None
    properties = schemas[found[1]].get("properties")
    arguments, place, text = {}, 0, found[2].strip()
    while place < len(text):
        parameter = PARAMETER.match(text, place)
        if parameter is None:
            return None
        schema = properties.get(parameter[1]) if isinstance(properties, Mapping) else None
        arguments[parameter[1]] = _typed(parameter[2], schema)
        place = parameter.end()
    return _call(found[1], arguments, schemas)


def _typed(text: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string" or schema is None:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


GEMMA_CALL: Final = re.compile(r"\s*call:([^{\s]+)\s*(\{.*\})\s*", re.DOTALL)
GEMMA_PIECE: Final = re.compile(
    r'<\|"\|>(.*?)<\|"\|>|("(?:[^"\\]|\\.)*")|([^\s{}\[\],:"]+)(\s*:)?', re.DOTALL
)  # a string, a JSON string, a key or a bare value


def read_gemma_call(body: str, schemas: Schemas) -> Call | None:
    """call:name{key:<|"|>text<|"|>,other:1,list:[...]}: JSON but for its strings and its bare keys."""
    found = GEMMA_CALL.fullmatch(body)
    if found is None:
        return None

    def as_json(piece: re.Match[str]) -> str:
        text, quoted, bare, colon = piece.groups()
        if text is not None:
            return json.dumps(text)
        if quoted is not None:
            return str(quoted)
        if colon:
            return json.dumps(bare) + colon
        bare = {"None": "null", "True": "true", "False": "false"}.get(bare, bare)
        try:
            json.loads(bare)
        except ValueError:
            return json.dumps(bare)
        return str(bare)

    try:
        return _call(found[1], json.loads(GEMMA_PIECE.sub(as_json, found[2])), schemas)
    except (ValueError, RecursionError):
        return None


def _call(name: Any, arguments: Any, schemas: Schemas) -> Call | None:
    """A call only if it names a tool of the request and its arguments are an object that JSON can hold."""
    if not isinstance(name, str) or name not in schemas or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


# By what a template holds.
THINK: Final = (("<|channel>", ("<|channel>thought", "<channel|>")), ("<think>", ("<think>", "</think>")))
XML_MARKS: Final = ("<tool_call>", "</tool_call>")
JSON_CALL: Final = '<tool_call>\n{{"name": "{name}", "arguments": '
CALLS: Final = (
    ("<|tool_call>", CallForm(("<|tool_call>", "<tool_call|>"), read_gemma_call, "<|tool_call>call:{name}{{")),
    ("<function=", CallForm(XML_MARKS, read_xml_call, "<tool_call>\n<function={name}>\n")),
    ("<tool_call>", CallForm(XML_MARKS, read_json_call, JSON_CALL, "}\n</tool_call>")),
)
