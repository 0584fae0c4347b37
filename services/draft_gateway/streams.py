"""Server-sent events: positions in a stream, committed tokens as events, and a response that notices who has left.

An event's `id` says how far its reader has got, in committed tokens of one choice, so that `Last-Event-ID` resumes after
exactly these. What of their text waits for more bytes of a character, or may yet become a stop string, is a function of
the tokens alone: whoever feeds the first n tokens to a new text stands where the old one stood.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.draft_gateway.answer_text import AnswerText
from services.draft_gateway.generation import Delivery, TokenStream
from services.draft_gateway.openai_api import (
    SEED_LIMIT,
    JsonObject,
    Likelihood,
    Piece,
    ResponseForm,
    Told,
    usage,
)
from shared.errors import InvalidRequest, OutriderError
from shared.protocol import FinishReason, GenerationParams, Tokens

DONE: Final = b"data: [DONE]\n\n"
KEEPALIVE: Final = b": keep-alive\n\n"

_EVENT_ID: Final = re.compile(r"([A-Za-z0-9_-]{1,80}):(\d{1,9})(?::(finish|usage))?")


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

    def __init__(
        self,
        answer: AnswerText,
        before: Tokens = (),
        reason: FinishReason | None = None,
        *,
        token_bytes: Callable[[int], bytes] | None = None,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        """`before` was read before, up to the end of the sequence if there is a `reason`.

        `token_bytes` where log-probabilities are to be told; `stop_token_ids` are those that are told as what has
        stopped the answer.
        """
        self._answer: Final = answer
        self._token_bytes: Final = token_bytes
        self._stop_token_ids: Final = stop_token_ids
        self._last = before[-1] if before else -1
        self._answer.ends_within(before, reason)
        self._offset = 0
        if token_bytes is not None:
            self._offset = sum(len(_readable(token_bytes(token))) for token in before)

    def piece(self, delivery: Delivery) -> Piece:
        """What the delivered tokens add."""
        ended = delivery.finish_reason is FinishReason.STOP and delivery.stop is None
        *tokens, last = delivery.tokens
        texts = [self._answer.push(token) for token in tokens]
        texts.append(self._answer.push_last(last) if ended else self._answer.push(last))
        self._last = last
        return Piece(
            text="".join(texts),
            tokens=delivery.tokens,
            traced=list(zip(texts, delivery.sources, strict=True)),
            round=delivery.round,
            told=self._told(delivery),
        )

    def finish(self) -> str:
        """What is left over at the end."""
        return self._answer.flush()

    def stop_reason(self, reason: FinishReason) -> str | int | None:
        """The stop string or the stop token that has ended it; None where it is the end of the sequence, or the limit."""
        if reason is not FinishReason.STOP or self._answer.stop is not None:
            return self._answer.stop
        return self._last if self._last in self._stop_token_ids else None

    def _told(self, delivery: Delivery) -> list[Told] | None:
        if self._token_bytes is None:
            return None
        told = []
        for token, known in zip(delivery.tokens, delivery.logprobs, strict=True):
            own = self._likelihood(token, known.logprob)
            top = [self._likelihood(other, logprob) for other, logprob in known.top]
            told.append(Told(own, top, self._offset))
            self._offset += len(own.token)
        return told

    def _likelihood(self, token: int, logprob: float) -> Likelihood:
        assert self._token_bytes is not None
        data = self._token_bytes(token)
        return Likelihood(_readable(data), data, logprob)


def _readable(data: bytes) -> str:
    return data.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Reading:
    """A stream that is read: how its answers look, the text that its deliveries go on with, and what it was asked for.

    `echo` is the prompt's text where the answer is to begin with it.
    """

    stream: TokenStream
    form: ResponseForm
    text: Text
    params: GenerationParams
    echo: str = ""


class EventWriter:
    """Writes one choice's events, from a position on."""

    def __init__(self, reading: Reading, start: Position | None = None) -> None:
        self.reading: Final = reading
        self._form: Final = reading.form
        self._text: Final = reading.text
        self._resumed: Final = start is not None
        self._position = start or Position(reading.form.session, 0)

    def opening(self) -> list[bytes]:
        """The chunk before all tokens, of a stream that is read from its start: a chat's role, a repeated prompt."""
        if self._resumed:
            return []
        chunk = self._form.role_chunk()
        if chunk is None and self.reading.echo:
            chunk = self._form.text_chunk(Piece(self.reading.echo, ()))
        return [] if chunk is None else [self._event(chunk)]

    def delivered(self, delivery: Delivery) -> list[bytes]:
        """One event for all the tokens of a verdict; none while their text waits for the rest of a character."""
        options = self._form.options
        piece = self._text.piece(delivery)
        self._position = Position(self._form.session, delivery.base + len(delivery.tokens))
        if not (piece.text or piece.told or options.trace or options.return_token_ids):
            return []
        return [self._event(self._form.text_chunk(piece))]

    def finishing(self, reason: FinishReason) -> list[bytes]:
        """The event that ends the choice, unless its reader has it."""
        if self._position.stage is not Stage.TOKENS:
            return []
        chunk = self._form.finish_chunk(reason, self._text.finish(), self._text.stop_reason(reason))
        return [self._end(Stage.FINISH, chunk)]

    def totalling(self, total: JsonObject, *, alone: bool) -> list[bytes]:
        """The event with the usage, if it was asked for. It belongs to no choice unless there is one `alone`."""
        if not self._form.include_usage or self._position.stage is Stage.USAGE:
            return []
        chunk = self._form.usage_chunk(total)
        return [self._end(Stage.USAGE, chunk) if alone else event(to_json(chunk))]

    def _end(self, stage: Stage, chunk: JsonObject) -> bytes:
        self._position = Position(self._form.session, self._position.tokens, stage)
        return self._event(chunk)

    def _event(self, chunk: JsonObject) -> bytes:
        return event(to_json(chunk), self._position)


async def events(writers: Sequence[EventWriter], *, keepalive_s: float) -> AsyncIterator[bytes]:
    """The whole of a response as bytes: the choices' events as they come. A failure becomes the last event."""
    for writer in writers:
        for written in writer.opening():
            yield written
    arriving = _arriving([writer.reading.stream for writer in writers], keepalive_s)
    try:
        async with aclosing(arriving):
            async for arrival in arriving:
                if arrival is None:
                    yield KEEPALIVE
                    continue
                number, delivery = arrival
                writer = writers[number]
                for written in (
                    writer.delivered(delivery)
                    if delivery is not None
                    else writer.finishing(writer.reading.stream.finish_reason)
                ):
                    yield written
    except OutriderError as error:
        yield error_event(error)
        return
    total = usage_of([writer.reading for writer in writers])
    for written in writers[0].totalling(total, alone=len(writers) == 1):
        yield written
    yield DONE


async def _arriving(
    streams: Sequence[TokenStream], keepalive_s: float
) -> AsyncGenerator[tuple[int, Delivery | None] | None, None]:
    """Each stream's deliveries as they come, with its number, and its end; None when all were quiet for so long."""
    if len(streams) == 1:  # without a task for each delivery: this is the path that has to be short
        while True:
            try:
                async with asyncio.timeout(keepalive_s):
                    delivery = await streams[0].next()
            except TimeoutError:
                yield None
                continue
            yield 0, delivery
            if delivery is None:
                return
    waiting = {asyncio.ensure_future(stream.next()): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, timeout=keepalive_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield None
            for task in sorted(done, key=waiting.__getitem__):
                number = waiting.pop(task)
                delivery = task.result()
                if delivery is not None:
                    waiting[asyncio.ensure_future(streams[number].next())] = number
                yield number, delivery
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def whole(readings: Sequence[Reading]) -> JsonObject:
    """The answer in one piece, when all choices are complete. Raises what the first of them fails with."""
    choices = [asyncio.ensure_future(_choice(reading)) for reading in readings]
    try:
        written = await asyncio.gather(*choices)
    finally:
        for choice in choices:
            choice.cancel()
        await asyncio.gather(*choices, return_exceptions=True)
    return readings[0].form.whole(written, usage_of(readings))


async def _choice(reading: Reading) -> JsonObject:
    text, told, tokens = reading.echo, list[Told](), list[int]()
    while (delivery := await reading.stream.next()) is not None:
        piece = reading.text.piece(delivery)
        text += piece.text
        tokens += piece.tokens
        told += piece.told or ()
    text += reading.text.finish()
    reason = reading.stream.finish_reason
    asked = reading.params.logprobs is not None
    piece = Piece(text, tuple(tokens), told=told if asked else None)
    return reading.form.choice(piece, reason, reading.text.stop_reason(reason))


def usage_of(readings: Sequence[Reading]) -> JsonObject:
    """The usage of choices that have ended. Of several, `outrider` has a report of each."""
    reports = [reading.stream.report() for reading in readings]
    outrider = reports[0] if len(reports) == 1 else {"choices": reports}
    return usage(
        readings[0].stream.prompt_length,
        sum(reading.stream.length for reading in readings),
        {**outrider, "seed": seed_of(readings[0].params)},
    )


def seed_of(params: GenerationParams) -> int:
    """The seed as a request says it, with its sign."""
    seed = params.sampling.seed
    return seed if seed < SEED_LIMIT else seed - 2 * SEED_LIMIT


async def everything(reading: Reading) -> tuple[str, Tokens]:
    """Text and tokens of a stream, when it is complete."""
    text, tokens = "", list[int]()
    while (delivery := await reading.stream.next()) is not None:
        text += reading.text.piece(delivery).text
        tokens += delivery.tokens
    return text + reading.text.finish(), tuple(tokens)


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
