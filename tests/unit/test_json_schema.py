"""Schemas: what is taken goes on as it is, what can't be promised is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.draft_gateway.json_schema import DEEPEST, checked
from shared.errors import InvalidRequest, UnsupportedParameter

PERSON: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "plate": {"type": "string", "pattern": "[A-Z]{2}[0-9]{3}"},
        "mood": {"enum": ["good", "bad", None]},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "maxItems": 3},
        "either": {"anyOf": [{"type": "boolean"}, {"const": 7}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"friend": {"type": "object", "properties": {"name": {"type": "string"}}}},
}


def test_a_schema_is_passed_on_whole() -> None:
    assert json.loads(checked(PERSON, param="p")) == PERSON
    assert checked({}, param="p") == "{}"


@pytest.mark.parametrize(
    "keyword",
    ["allOf", "oneOf", "not", "if", "patternProperties", "propertyNames", "uniqueItems", "contains", "multipleOf",
     "format", "dependentRequired", "unevaluatedProperties", "minProperties", "$dynamicRef", "typo"],
)  # fmt: skip
def test_a_keyword_that_is_not_promised_is_named(keyword: str) -> None:
    schema = {"type": "object", "properties": {"a": {"anyOf": [{"type": "array", "items": {keyword: {}}}]}}}
    with pytest.raises(
        UnsupportedParameter, match=f"'{keyword.replace('$', '[$]')}' at /properties/a/anyOf/0/items"
    ):
        checked(schema, param="p")


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    checked(
        {"type": "object", "properties": {"format": {"type": "string"}, "not": {"type": "null"}}}, param="p"
    )


@pytest.mark.parametrize(
    "schema",
    [
        [],
        "object",
        {"type": "strin"},
        {"type": "object", "properties": []},
        {"minLength": -1},
        {"pattern": "("},
        {"type": "string", "pattern": "\\p{L}"},
        {"$ref": "#/$defs/nowhere"},
        {"$ref": "https://example.com/schema"},
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"enum": "a"},
        {"title": "x" * 70_000},
    ],
)
def test_what_is_no_schema_is_refused(schema: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked(schema, param="response_format")
    assert (caught.value.param, caught.value.status) == ("response_format", 400)
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "pattern": "a*", "maxLength": 3}, "not served together"),
        ({"type": "string", "enum": ["a", 1]}, "does not satisfy the rest"),
        ({"const": "abc", "maxLength": 2}, "does not satisfy the rest"),
        ({"anyOf": [{"type": "string"}], "maxLength": 2}, "beside 'anyOf', maxLength"),
        ({"$ref": "#/$defs/a", "type": "string", "$defs": {"a": {}}}, "beside '[$]ref', type"),
        ({"minLength": 2}, "the type string alone"),
        ({"type": "string", "minimum": 2}, "the type integer or number alone"),
        ({"maxItems": 2}, "the type array alone"),
        ({"type": "object", "required": ["a"]}, "'a' is not among the properties"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": "(a)\\1"}, "pattern"),
        ({"type": "string", "pattern": "a$b"}, "pattern"),
        ({"type": "string", "pattern": "\\bfoo"}, "pattern"),
        ({"type": "object", "properties": {"x": {"minimum": 1}}}, "at /properties/x"),
    ],
)
def test_what_a_grammar_would_leave_out_is_refused(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedParameter, match=says):
        checked(schema, param="p")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["string", "null"], "maxLength": 3},
        {"type": "string", "enum": ["a", "b"], "maxLength": 2},
        {"type": "string", "pattern": "^[A-Z]{2}-\\d+(?:x|y)?$"},
        {"$ref": "#/$defs/a", "title": "A", "$defs": {"a": {"type": "integer", "minimum": 1}}},
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
    ],
)
def test_what_a_grammar_can_say_is_taken(schema: dict[str, Any]) -> None:
    assert json.loads(checked(schema, param="p")) == schema


def test_a_schema_that_is_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(DEEPEST + 1):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidRequest, match="nested deeper"):
        checked(schema, param="p")


OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({}, [{}], [[1], 1]),
        (OBJECT, [{"a": 1}], [{}, {"a": "x"}, 1]),
        ({**OBJECT, "additionalProperties": False}, [{"a": 1}], [{"a": 1, "b": 2}]),
        ({**OBJECT, "additionalProperties": {"type": "string"}}, [{"a": 1, "b": "x"}], [{"a": 1, "b": 2}]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "é☃😀"], ["a", "abcd", 1]),
        ({"type": ["integer", "string"], "minimum": 3}, [3, "a"], [2]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0.5, 1], [0, 1.5, -1]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1]], [[], [1, 2, 3]]),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, [[1]], [["a"], [1, 2]]),
        ({"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}, ["AB-1"], ["ab-1", "AB-", "AB-1 "]),
        ({"type": "string", "pattern": "\\d|x\\."}, ["7", "x."], ["y", "xx"]),
        ({"enum": ["a", 1, None]}, ["a", 1, None], ["b", 2, False]),
        ({"anyOf": [{"type": "boolean"}, {"const": 7}]}, [True, 7], [8, "a"]),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", "minimum": 1}}}, [1], [0, "a"]),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}, "additionalProperties": False},
         [{"n": {"n": {}}}], [{"n": 1}, {"n": {"m": 1}}]),
    ],
)  # fmt: skip
def test_the_grammar_of_a_schema_that_is_taken_forbids_what_does_not_validate(
    schema: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.testing import _is_grammar_accept_string as accepts

    passed_on = checked(schema, param="p")
    grammar = xgrammar.Grammar.from_json_schema(
        passed_on if schema else '{"type": "object"}', any_whitespace=True
    )
    for value in good:
        assert accepts(grammar, json.dumps(value, ensure_ascii=False)), value
    for value in bad:
        assert not accepts(grammar, json.dumps(value, ensure_ascii=False)), value
