"""Schemas that an answer may be asked to satisfy: what is promised of them, and what is refused.

An answer is written under a grammar made of its schema (vLLM's structured outputs, by xgrammar), and grammars can't say
all that a schema can; what they can't say is left out of them without a word. So a schema is taken only if all of it can
be said, and an answer which is whole also validates; of any other the keyword is named. What the keywords mean is JSON
Schema's matter (draft 2020-12), not told here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft202012Validator
from pydantic_core import to_json

from shared.errors import InvalidRequest, UnsupportedParameter

LONGEST: Final = 64 << 10
"""Bytes of a schema."""
DEEPEST: Final = 32
"""Levels of schemas within schemas."""

_REMARKS: Final = frozenset(
    ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly",
     "writeOnly")
)  # fmt: skip
_PLAIN: Final = frozenset(
    ("type", "enum", "const", "required", "minItems", "maxItems", "minLength", "maxLength", "pattern", "minimum",
     "maximum", "exclusiveMinimum", "exclusiveMaximum", "$ref")
)  # fmt: skip
_OF_SCHEMAS: Final = frozenset(("properties", "$defs", "definitions"))
_SCHEMA_LISTS: Final = frozenset(("anyOf", "prefixItems"))
_SCHEMAS: Final = frozenset(("items", "additionalProperties"))
SERVED: Final = _PLAIN | _OF_SCHEMAS | _SCHEMA_LISTS | _SCHEMAS

_LENGTHS: Final = ("minLength", "maxLength")
_ALONE: Final = ("anyOf", "$ref")
"""Beside them nothing else is heeded."""
_VALUES: Final = ("enum", "const")
_NEEDED_TYPES: Final[Mapping[str, frozenset[str]]] = {
    **dict.fromkeys(("minLength", "maxLength", "pattern"), frozenset(("string",))),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), frozenset(("integer", "number"))
    ),
    **dict.fromkeys(("minItems", "maxItems"), frozenset(("array",))),
}
"""Keywords that are heeded where the type is said."""
_ESCAPED: Final = re.compile(r"\\[dDwWsStnrfv\\/.+*?()\[\]{}|^$\-]")
_CLASS: Final = re.compile(r"\[\^?[^\[\]\\]*\]")


def checked(schema: object, *, param: str) -> str:
    """The schema as JSON. InvalidRequest when it is none, UnsupportedParameter when not all of it is served."""
    if not isinstance(schema, dict):
        raise InvalidRequest(f"invalid `{param}`: a JSON schema is an object", param=param)
    written = to_json(schema)
    if len(written) > LONGEST:
        raise InvalidRequest(f"invalid `{param}`: longer than {LONGEST} bytes", param=param)
    parts = list(_parts(schema, "", param, 0))
    for path, part in parts:
        _check_keywords(path or "/", part, param)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(str(part) for part in error.absolute_path) or "its top"
        raise InvalidRequest(
            f"invalid `{param}`: no JSON schema: at {where}: {error.message[:200]}", param=param
        ) from None
    for path, part in parts:
        _check_reference(path or "/", part, schema, param)
        if fault := _unheeded(part):
            raise UnsupportedParameter(f"`{param}` at {path or '/'}: {fault}", param=param)
    return written.decode()


def _parts(
    schema: Mapping[str, Any], path: str, param: str, depth: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schema and all schemas in it, each with where it is."""
    if depth > DEEPEST:
        raise InvalidRequest(f"invalid `{param}`: nested deeper than {DEEPEST} levels", param=param)
    yield path, schema
    for keyword, value in schema.items():
        if keyword in _OF_SCHEMAS and isinstance(value, dict):
            within = [(f"{keyword}/{name}", each) for name, each in value.items()]
        elif keyword in _SCHEMA_LISTS and isinstance(value, list):
            within = [(f"{keyword}/{number}", each) for number, each in enumerate(value)]
        elif keyword in _SCHEMAS:
            within = [(keyword, value)]
        else:
            continue
        for name, each in within:
            if isinstance(each, dict):
                yield from _parts(each, f"{path}/{name}", param, depth + 1)


def _check_keywords(path: str, schema: Mapping[str, Any], param: str) -> None:
    for keyword in schema:
        if keyword not in SERVED and keyword not in _REMARKS:
            raise UnsupportedParameter(
                f"`{param}` uses {keyword!r} at {path}, which is not served: the keywords are "
                f"{', '.join(sorted(SERVED))}",
                param=param,
            )


def _check_reference(path: str, part: Mapping[str, Any], schema: Mapping[str, Any], param: str) -> None:
    """A reference leads to a schema within, and that is not a reference which leads back."""
    seen: list[object] = []
    while (reference := part.get("$ref")) is not None:
        found: object = schema
        for step in str(reference).removeprefix("#").split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if not str(reference).startswith("#") or not isinstance(found, dict) or reference in seen:
            raise InvalidRequest(
                f"invalid `{param}`: the $ref {str(reference)[:80]!r} at {path} leads to no schema within it",
                param=param,
            )
        seen.append(reference)
        part = found


def _unheeded(schema: Mapping[str, Any]) -> str:
    """What of a valid schema a grammar would leave out; "" when that is nothing."""
    said = [
        keyword for keyword in schema if keyword not in _REMARKS and keyword not in ("$defs", "definitions")
    ]
    for keyword in _ALONE:
        if keyword in schema and len(said) > 1:
            others = ", ".join(other for other in said if other != keyword)
            return f"beside {keyword!r}, {others} would not be heeded"
    validator = Draft202012Validator({keyword: schema[keyword] for keyword in said})
    for keyword in _VALUES:
        values = (
            schema.get(keyword, ()) if keyword == "enum" else [schema[keyword]] if keyword in schema else ()
        )
        for value in values:
            if "$ref" not in schema and not validator.is_valid(value):
                return f"the value {str(value)[:60]!r} of {keyword!r} does not satisfy the rest"
    types = schema.get("type", ())
    types = {types} if isinstance(types, str) else set(types)
    for keyword in said:
        if keyword in _NEEDED_TYPES and not types & _NEEDED_TYPES[keyword] and not set(_VALUES) & set(said):
            return f"{keyword!r} is heeded with the type {' or '.join(sorted(_NEEDED_TYPES[keyword]))} alone"
    for name in schema.get("required", ()):
        if name not in schema.get("properties", {}):
            return f"the required {name[:60]!r} is not among the properties"
    if "pattern" in schema:
        if any(length in schema for length in _LENGTHS):
            return "a pattern and a length are not served together"
        return _pattern_fault(schema["pattern"])
    return ""


def _pattern_fault(pattern: str) -> str:
    """What of a regular expression grammars don't know: they match whole texts, without looking around or back."""
    plain = _CLASS.sub("_", _ESCAPED.sub("_", pattern))
    plain = plain.removeprefix("^").removesuffix("$").replace("(?:", "(")
    for sign in ("(?", "^", "$", "\\", "["):
        if sign in plain:
            return f"the pattern {pattern[:60]!r} uses {sign!r} in a way that is not served"
    return ""
