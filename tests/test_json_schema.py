"""What is taken of JSON Schema is enforced: no text that the library takes breaks a schema that was not refused."""

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from moe_nvfp4.errors import RequestError
from moe_nvfp4.json_schema import checked_schema

REFUSED: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[1]", "expected a mapping"),
    ({"a": object()}, "not JSON"),
    ('{"minimum": NaN}', "NaN is not a number of JSON"),
    ({"description": "x" * 100_001}, "at most 100,000"),
    ({"type": "objct"}, r"\$: 'type': got 'objct'; expected one of"),
    ({"not": {"type": "object"}}, "'not' cannot be enforced"),
    ({"type": "array", "items": {"if": {}}}, r"\$\.items: 'if' cannot be enforced"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems' cannot"),
    ({"minimum": 3}, "'minimum' needs 'type': 'number'"),
    ({"type": "string", "minimum": 3}, "'minimum' needs 'type': 'number'"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "only one of 'maxLength' and 'pattern'"),
    ({"type": "string", "pattern": 'a"b'}, "pattern .*cannot be enforced"),
    ({"type": "object", "required": ["a"]}, "'required' names 'a'"),
    ({"type": "object", "patternProperties": {"a": {}}, "properties": {"b": {}}}, "only one of"),
    ({"allOf": [{"type": "integer"}, {"type": "number"}]}, "merge them"),
    ({"anyOf": [{"type": "integer"}], "type": "integer"}, "'type' beside 'anyOf'"),
    ({"type": "integer", "enum": [1, "a"]}, "'enum' has values that are not of type 'integer'"),
    ({"type": "integer", "const": True}, "'const' has values"),
    ({"$ref": "https://example.org/a"}, r"\$ref .*expected a place in this schema"),
    ({"properties": [1]}, "expected a mapping of schemas"),
    ({"anyOf": {}}, "expected a list of schemas"),
    ({"items": [{}]}, "expected a schema"),
    ({"type": "number", "minimum": True}, "expected a number"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_refused(schema: Any, message: str) -> None:
    with pytest.raises(RequestError, match=rf"^SamplingParams\.json_schema: .*{message}") as caught:
        checked_schema(schema)
    assert len(str(caught.value)) < 400


def test_depth() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(70):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestError, match="nested more than 64 deep"):
        checked_schema(deep)
    with pytest.raises(RequestError, match="not JSON"):
        checked_schema('{"items":' * 10_000)


def test_taken_as_they_are() -> None:
    schema = {
        "title": "Order",
        "type": "object",
        "properties": {"b": {"$ref": "#/$defs/size"}, "a": {"type": ["string", "null"], "default": None}},
        "required": ["b", "a"],
        "additionalProperties": False,
        "$defs": {"size": {"type": "string", "enum": ["S", "ü"]}},
    }
    text = checked_schema(schema)
    assert json.loads(text) == schema and list(json.loads(text)["properties"]) == ["b", "a"]
    assert checked_schema(text) == text
    assert checked_schema("true") == "true"


class Draw:
    """Random schemas and random values, small enough to meet."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        draw = self.random
        kinds: list[Callable[[], Any]] = [
            lambda: draw.randrange(-3, 6),
            lambda: draw.choice([0.5, 1.5, -2.5]),
            lambda: draw.choice(["", "a", "b", "ab", "abc", "2020-01-01"]),
            lambda: draw.random() < 0.5,
            lambda: None,
            lambda: {draw.choice("abc"): self.value(depth + 1) for _ in range(draw.randrange(3))},
            lambda: [self.value(depth + 1) for _ in range(draw.randrange(4))],
        ]
        return draw.choice(kinds if depth < 3 else kinds[:5])()

    def schema(self, depth: int = 0) -> Any:
        draw = self.random
        if depth > 3:
            return draw.choice([True, {"type": "integer"}, {"type": "string"}, {}])
        if depth == 3 or draw.random() < 0.5:
            return self.typed(depth)
        below = [self.schema(depth + 1) for _ in range(draw.randrange(1, 4))]
        constant = {"const": self.value(1)}
        return draw.choice(
            [{"enum": [self.value(1), 3]}, constant, {"anyOf": below}, {"oneOf": below}, {"allOf": below}]
        )

    def typed(self, depth: int) -> Any:
        draw, below = self.random, lambda: self.schema(depth + 1)
        kind = draw.choice(["integer", "number", "string", "boolean", "null", "object", "array"])
        numbers = {"minimum": -1, "exclusiveMaximum": 3, "maximum": 2, "exclusiveMinimum": 0}
        keywords: dict[str, dict[str, Callable[[], Any]]] = {
            "string": {
                "minLength": lambda: draw.randrange(3),
                "maxLength": lambda: draw.randrange(3),
                "pattern": lambda: draw.choice(["^a$", "^[ab]+$", "a", "^a|b$", "(a|b){1,2}"]),
                "format": lambda: draw.choice(["date", "unknown"]),
            },
            "object": {
                "properties": lambda: {name: below() for name in draw.sample("abc", 2)},
                "required": lambda: [draw.choice("abc")],
                "additionalProperties": lambda: draw.choice([True, False, below()]),
                "minProperties": lambda: 1,
                "maxProperties": lambda: draw.randrange(1, 3),
                "patternProperties": lambda: {"^a": below()},
                "propertyNames": lambda: draw.choice([{"pattern": "^[ab]$"}, {"type": "string", "minLength": 2}]),
                "unevaluatedProperties": lambda: draw.choice([False, True, {"type": "integer"}]),
            },
            "array": {
                "items": lambda: draw.choice([True, False, below()]),
                "prefixItems": lambda: [below()],
                "minItems": lambda: draw.randrange(3),
                "maxItems": lambda: draw.randrange(3),
                "unevaluatedItems": lambda: draw.choice([False, True, {"type": "integer"}]),
            },
            "integer": {name: lambda value=value: value for name, value in numbers.items()},  # type: ignore[misc]
        }
        schema: dict[str, Any] = {}
        for name, make in keywords.get("integer" if kind == "number" else kind, {}).items():
            if draw.random() < 0.3:
                schema[name] = make()
        if draw.random() < 0.9:
            schema["type"] = kind if draw.random() < 0.85 else [kind, "null"]
        return schema


@pytest.mark.parametrize("seed", range(3))
def test_what_is_taken_is_enforced(seed: int) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.testing import _is_grammar_accept_string as takes

    draw, compiled, taken = Draw(seed), 0, 0
    for _ in range(600):
        schema = draw.schema()
        try:
            text = checked_schema(schema)
            grammar = xgrammar.Grammar.from_json_schema(text, max_whitespace_cnt=8)
        except (RequestError, RuntimeError):
            continue
        compiled += 1
        # The one keyword that is weaker than it says.
        validator = jsonschema.Draft202012Validator(json.loads(text.replace('"oneOf"', '"anyOf"')))
        for value in [draw.value() for _ in range(12)]:
            if takes(grammar, json.dumps(value)):
                taken += 1
                assert validator.is_valid(value), (text, value)
    assert compiled > 150 and taken > 150
