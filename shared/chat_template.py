"""A model's chat template: a Jinja program in its files that turns messages into the text the model was trained on.

It runs in Jinja's sandbox with the names that templates are written for: the filter, the functions and the special tokens
that transformers hands them (`transformers.utils.chat_template_utils`). No tools, no documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import InvalidRequest, ModelFilesError


class ChatTemplate:
    """A compiled template and the special tokens (`bos_token`, …) that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`ModelFilesError` when `source` is no Jinja template."""
        try:
            self._template: Final = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFilesError(f"the model's chat template can't be compiled: {error}") from None
        self._special_tokens: Final = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat as text, up to where the assistant's answer begins.

        Raises `InvalidRequest` when the template refuses the messages (roles out of order, say).
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
