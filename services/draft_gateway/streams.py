"""Server-sent events: positions in a stream, committed tokens as events, and a response that notices who has left.

An event's `id` says how far its reader has got, in committed tokens, so that `Last-Event-ID` resumes after exactly
these. What of their text waits for more bytes of a character is a function of the tokens alone: whoever feeds the
first n tokens to a new decoder stands where the old one stood.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.draft_gateway.generation import Delivery, TokenStream
from services.draft_gateway.openai_api import JsonObject, Piece, ResponseForm, usage
from shared.errors import InvalidRequest, OutriderError
from shared.protocol import FinishReason, Tokens

DONE: Final = b"data: [DONE]\n\n"
KEEPALIVE: Final = b": keep-alive\n\n"

_EVENT_ID: Final = re.compile(r"([A-Za-z0-9_-]{1,80}):(\d{1,9})(?::(finish|usage))?")


class TextDecoder(Protocol):
    """Tokens to text, piece by piece: `push` gives the text that is certain now, `flush` what is left over."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def flush(self) -> str:
        """What no further token will complete."""
        ...


class Stage(StrEnum):
    """What a client has of a stream's end."""

    TOKENS = ""
    FINISH = "finish"
    USAGE = "usage"


@dataclass(frozen=True, slots=True)
class Position:
    """How far a client has read: how many committed tokens its text stands for, and what it has of the end."""

    session: str
    tokens: int
    stage: Stage = Stage.TOKENS

    def __str__(self) -> str:
        """The position as an SSE id."""
        return f"{self.session}:{self.tokens}" + (f":{self.stage.value}" if self.stage else "")

    @classmethod
    def parse(cls, text: str, *, session: str) -> Position:
        """The position that `text`, a Last-Event-ID of `session`, stands for; InvalidRequest when it is none."""
        match = _EVENT_ID.fullmatch(text)
        if match is None or match[1] != session:
            raise InvalidRequest(
                f"Last-Event-ID {text[:120]!r} is not one of this stream's: send the `id` of the last event "
                f"received, such as {session}:12, or leave it out to read from the start",
                param="Last-Event-ID",
            )
        return cls(session, int(match[2]), Stage(match[3] or ""))


def event(data: bytes, position: Position | None = None) -> bytes:
    """One server-sent event; `data` is a single line."""
    return (
        b"data: %b\n\n" % data
        if position is None
        else b"id: %b\ndata: %b\n\n" % (str(position).encode(), data)
    )


def error_event(error: OutriderError) -> bytes:
    """The event that ends a stream which can't go on: OpenAI's error body, and no `[DONE]` after it."""
    return event(to_json(error.as_openai()))


class Text:
    """The text of a generation, as its tokens are delivered. A stop token ends the text and is no part of it."""

    def __init__(self, decoder: TextDecoder, before: Tokens = ()) -> None:
        self._decoder = decoder
        if before:
            decoder.push(before)

    def add(self, delivery: Delivery) -> str:
        """What the delivered tokens add."""
        return self._decoder.push(_shown(delivery))

    def add_traced(self, delivery: Delivery) -> list[tuple[str, str]]:
        """What each delivered token adds, and who wrote it."""
        texts = [self._decoder.push((token,)) for token in _shown(delivery)]
        texts += [""] * (len(delivery.tokens) - len(texts))
        return list(zip(texts, delivery.sources, strict=True))

    def finish(self) -> str:
        """What is left over at the end."""
        return self._decoder.flush()


def _shown(delivery: Delivery) -> Tokens:
    return delivery.tokens[:-1] if delivery.finish_reason is FinishReason.STOP else delivery.tokens


class EventWriter:
    """Writes one stream's events, from a position on."""

    def __init__(self, form: ResponseForm, text: Text, start: Position | None) -> None:
        self._form = form
        self._text = text
        self._resumed = start is not None
        self._position = start or Position(form.session, 0)

    def opening(self) -> list[bytes]:
        """The role chunk of a chat that is read from its start."""
        chunk = None if self._resumed else self._form.role_chunk()
        return [] if chunk is None else [self._event(chunk)]

    def delivered(self, delivery: Delivery) -> list[bytes]:
        """One event for all the tokens of a verdict; none while their text waits for the rest of a character."""
        options = self._form.options
        traced = self._text.add_traced(delivery) if options.trace else []
        text = "".join(part for part, _ in traced) if options.trace else self._text.add(delivery)
        self._position = Position(self._form.session, delivery.base + len(delivery.tokens))
        if not (text or options.trace or options.return_token_ids):
            return []
        return [self._event(self._form.text_chunk(Piece(text, delivery.tokens, traced, delivery.round)))]

    def ending(self, reason: FinishReason, total: JsonObject) -> list[bytes]:
        """What ends the stream, as far as its reader does not have it yet."""
        stage, events = self._position.stage, []
        if stage is Stage.TOKENS:
            events.append(self._end(Stage.FINISH, self._form.finish_chunk(reason, self._text.finish())))
        if self._form.include_usage and stage is not Stage.USAGE:
            events.append(self._end(Stage.USAGE, self._form.usage_chunk(total)))
        return [*events, DONE]

    def _end(self, stage: Stage, chunk: JsonObject) -> bytes:
        self._position = Position(self._form.session, self._position.tokens, stage)
        return self._event(chunk)

    def _event(self, chunk: JsonObject) -> bytes:
        return event(to_json(chunk), self._position)


async def events(stream: TokenStream, writer: EventWriter, *, keepalive_s: float) -> AsyncIterator[bytes]:
    """The whole of a stream as bytes. A failure becomes its last event."""
    for written in writer.opening():
        yield written
    try:
        while True:
            try:
                async with asyncio.timeout(keepalive_s):
                    delivery = await stream.next()
            except TimeoutError:
                yield KEEPALIVE
                continue
            if delivery is None:
                break
            for written in writer.delivered(delivery):
                yield written
    except OutriderError as error:
        yield error_event(error)
        return
    for written in writer.ending(stream.finish_reason, usage_of(stream)):
        yield written


async def whole(stream: TokenStream, form: ResponseForm, text: Text) -> JsonObject:
    """The answer in one piece, when it is complete. Raises what the generation fails with."""
    parts: list[str] = []
    tokens: list[int] = []
    while (delivery := await stream.next()) is not None:
        parts.append(text.add(delivery))
        tokens += delivery.tokens
    parts.append(text.finish())
    return form.whole("".join(parts), tuple(tokens), stream.finish_reason, usage_of(stream))


def usage_of(stream: TokenStream) -> JsonObject:
    """The usage of a stream that has ended."""
    return usage(stream.prompt_length, stream.length, stream.report())


class EventStreamResponse(Response):
    """Sends server-sent events until they end or the client leaves; then calls `on_end`, in any case, once.

    A client that takes nothing for `patience_s` counts as gone.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        body: AsyncIterator[bytes],
        *,
        on_end: Callable[[], None],
        patience_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._body = body
        self._on_end = on_end
        self._patience_s = patience_s
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream."""
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_end()
            sending.cancel()
            leaving.cancel()
            await asyncio.wait({sending, leaving})
        if not sending.cancelled():
            sending.result()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._body:
            try:
                async with asyncio.timeout(self._patience_s):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except TimeoutError:
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
