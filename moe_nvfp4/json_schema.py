"""Which JSON schemas can be enforced while an answer is made. The others are refused, by keyword and place.

The grammar library ignores keywords in places where it does not look for them, and then an answer that breaks the
schema would come without a word. So a schema must use only what the library was seen to enforce; `oneOf` is the one
that is weaker than it says: more than one may match, as with `anyOf`. Objects have no other properties than the schema
names, unless it says additionalProperties. Patterns hold for the whole string.
"""

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Final

from moe_nvfp4.errors import RequestError

MAX_CHARACTERS: Final = 100_000
MAX_DEPTH: Final = 64

# Each keyword holds for one type; where the type is not given, these alone imply it.
KEYWORDS: Final = {
    "object": frozenset(["properties", "required", "additionalProperties", "unevaluatedProperties"])
    | {"patternProperties", "propertyNames", "minProperties", "maxProperties"},
    "array": frozenset(["items", "prefixItems", "unevaluatedItems", "minItems", "maxItems"]),
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
}
IMPLIES: Final = frozenset(["properties", "additionalProperties", "patternProperties", "items", "prefixItems"])
DECIDES: Final = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # beside one of these no other has an effect
UNENFORCED: Final = (
    frozenset(["not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "multipleOf"])
    | {"dependentRequired", "dependentSchemas", "dependencies", "additionalItems", "$dynamicRef", "$recursiveRef"}
)  # fmt: skip
# Characters that JSON escapes in strings, and the library does not where a pattern has them as they are.
ESCAPED: Final = re.compile(r'["\x00-\x1f]|\\[\\ntrfv0xuc]')
HARMLESS: Final = {"uniqueItems": False, "nullable": False}
SCHEMAS: Final = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames")
LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPPINGS: Final = ("properties", "patternProperties", "$defs", "definitions")
TYPES: Final = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


def checked_schema(value: object) -> str:
    """The schema, a mapping or JSON text, as JSON text."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        if len(text) > MAX_CHARACTERS:
            raise RequestError(f"SamplingParams.json_schema: {len(text):,} characters; at most {MAX_CHARACTERS:,}")
        schema = json.loads(text, parse_constant=_no_constant)
        if not isinstance(schema, Mapping) and schema is not True:
            raise RequestError(f"SamplingParams.json_schema: got {reprlib.repr(schema)}; expected a mapping")
        _check(schema, "$", 0)
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"SamplingParams.json_schema: got {reprlib.repr(value)}, not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _refuse(where: str, problem: str) -> RequestError:
    return RequestError(f"SamplingParams.json_schema: {where}: {problem}")


def _check(schema: Any, where: str, depth: int) -> None:
    if isinstance(schema, bool):
        return
    if depth > MAX_DEPTH:
        raise _refuse(where, f"nested more than {MAX_DEPTH} deep")
    if not isinstance(schema, dict):
        raise _refuse(where, f"got {reprlib.repr(schema)}; expected a schema")
    for keyword in schema:
        if keyword in UNENFORCED and schema[keyword] != HARMLESS.get(keyword, ...):
            raise _refuse(where, f"{keyword!r} cannot be enforced; leave it out, and check it in the answer")
    assertions = schema.keys() & frozenset().union(*KEYWORDS.values(), DECIDES, ["type"])
    if deciding := [keyword for keyword in DECIDES if keyword in schema]:
        _check_deciding(schema, deciding[0], assertions, where)
    else:
        _check_types(schema, assertions, where)
    for keyword in SCHEMAS:
        if keyword in schema:
            _check(schema[keyword], f"{where}.{keyword}", depth + 1)
    for keyword in LISTS:
        parts = schema.get(keyword, [])
        if not isinstance(parts, list):
            raise _refuse(where, f"{keyword!r}: got {reprlib.repr(parts)}; expected a list of schemas")
        for index, part in enumerate(parts):
            _check(part, f"{where}.{keyword}[{index}]", depth + 1)
    for keyword in MAPPINGS:
        named = schema.get(keyword, {})
        if not isinstance(named, dict):
            raise _refuse(where, f"{keyword!r}: got {reprlib.repr(named)}; expected a mapping of schemas")
        for name, part in named.items():
            _check(part, f"{where}.{keyword}.{name}", depth + 1)


def _check_deciding(schema: dict[str, Any], keyword: str, assertions: set[str], where: str) -> None:
    """`$ref`, `enum` and others, beside which the library reads nothing else."""
    values = schema.get("enum", [schema.get("const")])
    if keyword in ("const", "enum") and isinstance(values, list):
        kinds = _types(schema, where)
        if kinds and not all(any(_is(value, kind) for kind in kinds) for value in values):
            raise _refuse(where, f"{keyword!r} has values that are not of type {schema['type']!r}")
        assertions = assertions - {"type"}
    if others := sorted(assertions - {keyword}):
        raise _refuse(where, f"{others[0]!r} beside {keyword!r} cannot be enforced; put it inside")
    if keyword == "$ref" and not str(schema["$ref"]).startswith("#"):
        raise _refuse(where, f"$ref {reprlib.repr(schema['$ref'])}; expected a place in this schema, such as #/$defs/x")
    if keyword == "allOf" and isinstance(schema["allOf"], list) and len(schema["allOf"]) > 1:
        raise _refuse(where, "'allOf' of more than one schema cannot be enforced; merge them into one")


def _check_types(schema: dict[str, Any], assertions: set[str], where: str) -> None:
    kinds = _types(schema, where)
    for kind, keywords in KEYWORDS.items():
        used = assertions & keywords
        given = kind in kinds or (kind == "number" and "integer" in kinds)
        if used and not given and (kinds or not used & IMPLIES):
            raise _refuse(where, f"{min(used)!r} needs 'type': {kind!r} beside it, or has no effect")
    required, named = schema.get("required", []), schema.get("properties", {})
    for name in required if isinstance(required, list) else []:
        if not isinstance(named, dict) or name not in named:
            raise _refuse(
                where, f"'required' names {reprlib.repr(name)}, which is not among 'properties'; add it there"
            )
    objects, strings = assertions & KEYWORDS["object"], assertions & KEYWORDS["string"]
    if objects & {"patternProperties", "propertyNames"} and len(objects) > 1:
        raise _refuse(where, f"only one of {' and '.join(sorted(map(repr, objects)))} can be enforced")
    if strings & {"pattern", "format"} and len(strings) > 1:
        raise _refuse(where, f"only one of {' and '.join(sorted(map(repr, strings)))} can be enforced")
    for pattern in [schema[keyword] for keyword in strings & {"pattern"}] + list(schema.get("patternProperties", ())):
        if not isinstance(pattern, str) or ESCAPED.search(pattern):
            raise _refuse(
                where,
                f"pattern {reprlib.repr(pattern)}: quotes, backslashes and control characters cannot be "
                "enforced; expected a regular expression without them",
            )
    for keyword in assertions & KEYWORDS["number"]:
        if isinstance(schema[keyword], bool):
            raise _refuse(where, f"{keyword!r}: got {schema[keyword]}; expected a number")


def _types(schema: dict[str, Any], where: str) -> list[str]:
    stated = schema.get("type", [])
    kinds = stated if isinstance(stated, list) else [stated]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in TYPES:
            raise _refuse(where, f"'type': got {reprlib.repr(kind)}; expected one of {', '.join(TYPES)}")
    return kinds


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, TYPES[kind])  # type: ignore[arg-type]
