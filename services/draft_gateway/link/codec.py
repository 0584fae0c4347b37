"""Values as compact bytes, and layouts: tables that say which fields of a frame travel, in which order and how.

A frame is its kind, its positional fields, then any optional fields that differ from their defaults, each after a tag:

    frame    = kind field* (tag field)*            kind, tag: varints
    tag      = 2 × number + form                   form 0: a varint follows, form 1: a length and so many bytes

A reader skips tags that it doesn't know, so that an older one reads what a newer one writes. Varints hold seven bits a
byte, least first, the eighth bit set on all but the last (as in LEB128). This file knows no frame; `frames.py` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final, Protocol

from pydantic import BaseModel, TypeAdapter, ValidationError

from shared.errors import ProtocolError
from shared.protocol import Outcome, ReplyRoute, Tokens
from shared.telemetry import TraceContext

VARINT, BYTES = 0, 1
LONGEST_VARINT: Final = 10  # bytes


class UnknownSession(ProtocolError):
    """A frame for a session number that names nothing here (any more)."""


class UnknownKind(ProtocolError):
    """A frame of a kind that only a newer peer knows."""


class Names(Protocol):
    """What both ends of a connection agree on, so that it need not travel with every frame."""

    @property
    def reply(self) -> ReplyRoute:
        """The route that answers to the edge take, as this end sees it."""
        ...

    def number(self, session: str) -> int:
        """The session's number on this connection; 0 when it has none and has to be spelled out."""
        ...

    def session(self, number: int) -> str:
        """The session of a number. Raises `UnknownSession`."""
        ...


class Writer:
    """Bytes being written."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.data = bytearray()

    def varint(self, value: int) -> None:
        """A number from 0 on. Raises `ProtocolError` below."""
        if value < 0:
            raise ProtocolError(f"{value} can't be written: the link's numbers are 0 or more")
        while value > 0x7F:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def chunk(self, content: bytes) -> None:
        """A length and so many bytes."""
        self.varint(len(content))
        self.data += content


class Reader:
    """Bytes being read. Whatever reads beyond their end raises `ProtocolError`."""

    def __init__(self, data: bytes, names: Names) -> None:
        self.names = names
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def varint(self) -> int:
        """A number."""
        value = shift = 0
        for byte in self._data[self._at : self._at + LONGEST_VARINT]:
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        if shift < 7 * LONGEST_VARINT:
            raise ProtocolError("cut short within a number")
        raise ProtocolError(f"a number of more than {LONGEST_VARINT} bytes")

    def raw(self, count: int) -> bytes:
        """The next `count` bytes."""
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise ProtocolError(f"cut short: {count} more bytes were announced, {self.left} are left")
        self._at += count
        return taken

    def chunk(self) -> bytes:
        """As many bytes as the length before them says."""
        return self.raw(self.varint())


class Codec(Protocol):
    """How one value is written and read. `form` is what its tag says follows, when it is an optional field."""

    form: int

    def put(self, out: Writer, value: Any, /) -> None:
        """Write `value`."""
        ...

    def take(self, data: Reader, /) -> Any:
        """Read one. Raises `ProtocolError`."""
        ...


# --- values -------------------------------------------------------------------------------------------------------


class Number:
    """An integer from 0 on."""

    form = VARINT

    def put(self, out: Writer, value: int) -> None:
        out.varint(value)

    def take(self, data: Reader) -> int:
        return data.varint()


class Flag:
    """True or false."""

    form = VARINT

    def put(self, out: Writer, value: bool) -> None:
        out.varint(int(value))

    def take(self, data: Reader) -> bool:
        return bool(data.varint())


class Scaled:
    """A number that is no integer, rounded to a step; below 0 it becomes 0, and what is not finite too.

    Times are rounded to 0.01 ms. A clock that ran backwards is no reason to lose a verdict.
    """

    form = VARINT

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def put(self, out: Writer, value: float) -> None:
        out.varint(round(value * self._steps) if 0 < value < float("inf") else 0)

    def take(self, data: Reader) -> float:
        return data.varint() / self._steps


class Choice:
    """One of a few values, by its place among them. New ones go to the end."""

    form = VARINT

    def __init__(self, values: Sequence[str | Enum]) -> None:
        self._values = tuple(values)

    def put(self, out: Writer, value: str | Enum) -> None:
        out.varint(self._values.index(value))

    def take(self, data: Reader) -> str | Enum:
        place = data.varint()
        if place >= len(self._values):
            raise ProtocolError(f"choice {place} of {len(self._values)}: {', '.join(map(str, self._values))}")
        return self._values[place]


class Text:
    """Text as UTF-8."""

    form = BYTES

    def put(self, out: Writer, value: str) -> None:
        out.chunk(value.encode())

    def take(self, data: Reader) -> str:
        try:
            return data.chunk().decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"text that is not UTF-8: {error.reason}") from None


class Texts:
    """Several texts."""

    form = BYTES

    def put(self, out: Writer, value: Sequence[str]) -> None:
        out.varint(len(value))
        for text in value:
            out.chunk(text.encode())

    def take(self, data: Reader) -> tuple[str, ...]:
        return tuple(Text().take(data) for _ in range(data.varint()))


class Pairs:
    """A mapping of texts to texts."""

    form = BYTES

    def put(self, out: Writer, value: Mapping[str, str]) -> None:
        Texts().put(out, [text for pair in value.items() for text in pair])

    def take(self, data: Reader) -> dict[str, str]:
        texts = iter(Texts().take(data))
        return dict(zip(texts, texts, strict=False))


class TokenList:
    """Token ids, all as wide as the widest of them needs: 2 bytes each below 65,536.

    Count and width share a varint (4 × count + width − 1), so that up to 31 tokens cost one byte more than themselves.
    """

    form = BYTES

    def put(self, out: Writer, value: Tokens) -> None:
        width = max(1, (max(value, default=0).bit_length() + 7) // 8)
        out.varint(4 * len(value) + width - 1)
        for token in value:
            out.data += token.to_bytes(width, "little")

    def take(self, data: Reader) -> Tokens:
        count, width = divmod(data.varint(), 4)
        width += 1
        packed = data.raw(count * width)
        return tuple(int.from_bytes(packed[at : at + width], "little") for at in range(0, len(packed), width))


class SmallNumbers:
    """Integers from 0 to 255, a byte each."""

    form = BYTES

    def put(self, out: Writer, value: Sequence[int]) -> None:
        if not all(0 <= number <= 0xFF for number in value):
            raise ProtocolError(f"{list(value)} can't be written: these numbers are 0 to 255")
        out.chunk(bytes(value))

    def take(self, data: Reader) -> tuple[int, ...]:
        return tuple(data.chunk())


class Outcomes:
    """Outcomes with their confidences, these rounded to 1/255."""

    form = BYTES

    def put(self, out: Writer, value: Sequence[Outcome]) -> None:
        out.varint(len(value))
        for outcome in value:
            out.varint(outcome.accepted)
            out.varint(outcome.next_token)
            out.data.append(round(outcome.confidence * 0xFF))

    def take(self, data: Reader) -> tuple[Outcome, ...]:
        return tuple(
            Outcome(accepted=data.varint(), next_token=data.varint(), confidence=data.raw(1)[0] / 0xFF)
            for _ in range(data.varint())
        )


class Session:
    """A session: by its number, or spelled out after a 0."""

    form = BYTES

    def put(self, out: Writer, value: str) -> None:
        number = out.names.number(value)
        out.varint(number)
        if number == 0:
            out.chunk(value.encode())

    def take(self, data: Reader) -> str:
        number = data.varint()
        return data.names.session(number) if number else Text().take(data)


class Route:
    """Where answers go. It never travels: the relay knows."""

    form = BYTES

    def put(self, out: Writer, value: ReplyRoute) -> None:
        return

    def take(self, data: Reader) -> ReplyRoute:
        return data.names.reply


class Driver:
    """Who drives a session: nothing when it is the edge itself, else that gateway's name."""

    form = BYTES

    def put(self, out: Writer, value: ReplyRoute) -> None:
        out.chunk(b"" if value.gateway == out.names.reply.gateway else value.gateway.encode())

    def take(self, data: Reader) -> ReplyRoute:
        gateway = Text().take(data)
        return ReplyRoute(gateway=gateway, partition=0) if gateway else data.names.reply


class Trace:
    """A trace context: 16 bytes of trace, 8 of span, 1 of flags."""

    form = BYTES

    def put(self, out: Writer, value: TraceContext) -> None:
        out.data += bytes.fromhex(value.trace_id) + bytes.fromhex(value.span_id) + bytes([value.sampled])

    def take(self, data: Reader) -> TraceContext:
        return TraceContext(data.raw(16).hex(), data.raw(8).hex(), bool(data.raw(1)[0]))


class Json:
    """Something rare, as JSON."""

    form = BYTES

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self._adapter = adapter

    def put(self, out: Writer, value: object) -> None:
        out.chunk(self._adapter.dump_json(value))

    def take(self, data: Reader) -> Any:
        try:
            return self._adapter.validate_json(data.chunk())
        except ValidationError as error:
            raise ProtocolError(
                f"not what was expected: {error.errors(include_url=False)[0]['msg']}"
            ) from None


# --- layouts ------------------------------------------------------------------------------------------------------


class Bytes:
    """Bytes as they are."""

    form = BYTES

    def put(self, out: Writer, value: bytes) -> None:
        out.chunk(value)

    def take(self, data: Reader) -> bytes:
        return data.chunk()


class Layout:
    """How a model's fields travel: `positional` ones always and in order, `optional` ones by number where they differ
    from their default.

    Numbers and positions are forever: a field that is no longer wanted keeps its own, a new one is optional.
    """

    def __init__(
        self,
        model: type[Any],
        positional: Mapping[str, Codec],
        optional: Mapping[str, tuple[int, Codec]] | None = None,
    ) -> None:
        self.model: Final = model
        self.positional: Final = positional
        self.optional: Final = optional or {}
        self._names = {number: (name, codec) for name, (number, codec) in self.optional.items()}
        self._defaults = _defaults(model)

    @property
    def fields(self) -> frozenset[str]:
        """The fields that travel."""
        return frozenset(self.positional) | frozenset(self.optional)

    def put(self, out: Writer, value: object) -> None:
        """Write the fields of `value`."""
        for name, codec in self.positional.items():
            codec.put(out, getattr(value, name))
        for name, (number, codec) in self.optional.items():
            content = getattr(value, name)
            if content == self._defaults[name]:
                continue
            out.varint(2 * number + codec.form)
            if codec.form == VARINT:
                codec.put(out, content)
            else:
                inner = Writer(out.names)
                codec.put(inner, content)
                out.chunk(bytes(inner.data))

    def take(self, data: Reader) -> Any:
        """Read all that is left as the model. Raises `ProtocolError`."""
        found = {name: codec.take(data) for name, codec in self.positional.items()}
        while data.left:
            number, form = divmod(data.varint(), 2)
            content = data if form == VARINT else Reader(data.chunk(), data.names)
            if number not in self._names:
                if form == VARINT:
                    data.varint()
                continue
            name, codec = self._names[number]
            if codec.form != form:
                raise ProtocolError(f"{self.model.__name__}.{name}: its tag says another form than it has")
            found[name] = codec.take(content)
        try:
            return self.model(**found)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise ProtocolError(f"{self.model.__name__}.{where}: {fault['msg']}") from None


class Record:
    """A model within a field."""

    form = BYTES

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def put(self, out: Writer, value: object) -> None:
        inner = Writer(out.names)
        self._layout.put(inner, value)
        out.chunk(bytes(inner.data))

    def take(self, data: Reader) -> Any:
        return self._layout.take(Reader(data.chunk(), data.names))


def _defaults(model: type[Any]) -> Mapping[str, object]:
    if issubclass(model, BaseModel):
        return {
            name: field.get_default(call_default_factory=True, validated_data={})
            for name, field in model.model_fields.items()
        }
    return {field.name: field.default for field in dataclasses.fields(model)}
