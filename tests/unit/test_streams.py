"""Events: what a client that reads from any of them on gets, however tokens were delivered and characters cut."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from services.draft_gateway.generation import Delivery
from services.draft_gateway.openai_api import Api, OutriderOptions, ResponseForm
from services.draft_gateway.streams import (
    DONE,
    KEEPALIVE,
    EventStreamResponse,
    EventWriter,
    Position,
    Stage,
    Text,
    events,
)
from shared.errors import InvalidRequest, OutriderError, SessionTaken
from shared.protocol import FinishReason, Tokens

SESSION = "chatcmpl-1"


class ByteDecoder:
    """Tokens are bytes of UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(bytes(tokens))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class Script:
    """A token stream that delivers what it is given; an error ends it, a number is a pause in seconds."""

    prompt_length = 3
    finish_reason = FinishReason.LENGTH

    def __init__(self, *steps: Delivery | OutriderError | float) -> None:
        self._steps = list(steps)
        self.length = sum(len(step.tokens) for step in steps if isinstance(step, Delivery))

    async def started(self, patience_s: float) -> None:
        return

    async def next(self) -> Delivery | None:
        if not self._steps:
            return None
        step = self._steps.pop(0)
        if isinstance(step, float):
            await asyncio.sleep(step)
            return await self.next()
        if isinstance(step, OutriderError):
            raise step
        assert isinstance(step, Delivery)
        return step

    def report(self) -> dict[str, Any]:
        return {"session": SESSION}

    def leave(self, reason: str, *, detach: bool) -> None:
        return


def deliveries(tokens: Tokens, cuts: Sequence[int], start: int = 0) -> list[Delivery]:
    """`tokens[start:]`, cut at `cuts`."""
    edges = [start, *sorted({cut for cut in cuts if start < cut < len(tokens)}), len(tokens)]
    return [
        Delivery(
            low,
            tokens[low:high],
            ("accepted",) * (high - low),
            number,
            FinishReason.LENGTH if high == len(tokens) else None,
        )
        for number, (low, high) in enumerate(pairwise(edges))
        if high > low
    ]


async def written(stream: Script, writer: EventWriter, keepalive_s: float = 5.0) -> list[bytes]:
    return [chunk async for chunk in events(stream, writer, keepalive_s=keepalive_s)]


def said(chunks: Sequence[bytes]) -> str:
    text = ""
    for chunk in chunks:
        if chunk in (DONE, KEEPALIVE):
            continue
        choices = json.loads(chunk.split(b"data: ", 1)[1])["choices"]
        text += choices[0]["delta"].get("content", "") if choices else ""
    return text


def ids(chunks: Sequence[bytes]) -> list[str]:
    return [chunk.split(b"\n")[0][4:].decode() for chunk in chunks if chunk.startswith(b"id: ")]


def form(**fields: Any) -> ResponseForm:
    return ResponseForm(api=Api.CHAT, session=SESSION, created=1, model="m", **fields)


@settings(deadline=None)
@given(
    text=st.text(alphabet="aé☃😀 ", min_size=1, max_size=12).map(str.encode)
    | st.binary(min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 40), max_size=6),
    other_cuts=st.lists(st.integers(1, 40), max_size=6),
    trace=st.booleans(),
    include_usage=st.booleans(),
)
def test_reading_on_after_any_event_gives_exactly_the_rest(
    text: bytes, cuts: list[int], other_cuts: list[int], trace: bool, include_usage: bool
) -> None:
    tokens = tuple(text)
    look = form(include_usage=include_usage, options=OutriderOptions(trace=trace))
    whole = asyncio.run(
        written(Script(*deliveries(tokens, cuts)), EventWriter(look, Text(ByteDecoder()), None))
    )
    assert said(whole) == text.decode(errors="replace")
    assert whole[-1] == DONE
    for number, event_id in enumerate(ids(whole)):
        start = Position.parse(event_id, session=SESSION)
        rest = asyncio.run(
            written(
                Script(*deliveries(tokens, other_cuts, start.tokens)),
                EventWriter(look, Text(ByteDecoder(), tokens[: start.tokens]), start),
            )
        )
        assert said(whole[: number + 1]) + said(rest) == said(whole)
        assert rest[-1] == DONE
        ends = [each for each in ids(whole)[number + 1 :] if each.count(":") == 2]
        assert [each for each in ids(rest) if each.count(":") == 2] == ends


async def test_a_stop_token_is_counted_and_not_shown() -> None:
    last = Delivery(0, tuple(b"ab!"), ("accepted",) * 3, 1, FinishReason.STOP)
    look = form(options=OutriderOptions(trace=True))
    chunks = await written(Script(last), EventWriter(look, Text(ByteDecoder()), None))
    assert said(chunks) == "ab"
    assert ids(chunks) == [f"{SESSION}:0", f"{SESSION}:3", f"{SESSION}:3:finish"]
    traced = json.loads(chunks[1].split(b"data: ")[1])["outrider"]["tokens"]
    assert [token["text"] for token in traced] == ["a", "b", ""]


async def test_a_failure_is_the_last_event_and_nothing_is_called_done() -> None:
    step = Delivery(0, tuple(b"ab"), ("accepted",) * 2, 1)
    stream = Script(step, SessionTaken("gone"))
    chunks = await written(stream, EventWriter(form(), Text(ByteDecoder()), None))
    assert said(chunks[:-1]) == "ab"
    assert json.loads(chunks[-1].removeprefix(b"data: "))["error"]["code"] == "session_taken"
    assert DONE not in chunks


async def test_a_quiet_stream_says_that_it_lives() -> None:
    step = Delivery(0, tuple(b"ab"), ("accepted",) * 2, 1, FinishReason.LENGTH)
    stream = Script(0.05, step)
    chunks = await written(stream, EventWriter(form(), Text(ByteDecoder()), None), keepalive_s=0.01)
    assert KEEPALIVE in chunks
    assert said(chunks) == "ab"


@pytest.mark.parametrize(
    "text", ["", "5", f"{SESSION}", f"{SESSION}:", f"{SESSION}:-1", f"{SESSION}:x", f"{SESSION}:5:end",
             "other:5", f"{SESSION}:5 ", f"{SESSION}:9999999999", "é:1"],
)  # fmt: skip
def test_what_is_no_position_of_the_stream_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Position.parse(text, session=SESSION)
    assert (caught.value.status, caught.value.param) == (400, "Last-Event-ID")


def test_a_position_is_read_as_it_was_written() -> None:
    for stage in Stage:
        position = Position(SESSION, 7, stage)
        assert Position.parse(str(position), session=SESSION) == position


# --- the response -----------------------------------------------------------------------------------------------


async def test_a_response_ends_as_soon_as_its_client_leaves_also_when_nothing_is_sent() -> None:
    left = asyncio.Event()
    ended: list[bool] = []

    async def silence() -> Any:
        yield b": hello\n\n"
        await asyncio.Event().wait()

    async def receive() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body"):
            left.set()

    response = EventStreamResponse(silence(), on_end=lambda: ended.append(True), patience_s=5)
    await asyncio.wait_for(response({"type": "http"}, receive, send), 5)
    assert ended == [True]


async def test_a_client_that_takes_nothing_counts_as_gone() -> None:
    ended: list[bool] = []

    async def body() -> Any:
        yield b"data: x\n\n"

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message.get("body"):
            await asyncio.Event().wait()

    response = EventStreamResponse(body(), on_end=lambda: ended.append(True), patience_s=0.05)
    await asyncio.wait_for(response({"type": "http"}, receive, send), 5)
    assert ended == [True]


async def test_a_defect_in_the_body_is_not_swallowed() -> None:
    async def broken() -> Any:
        yield b"data: x\n\n"
        raise ZeroDivisionError

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        return

    response = EventStreamResponse(broken(), on_end=lambda: None, patience_s=5)
    with pytest.raises(ZeroDivisionError):
        await response({"type": "http"}, receive, send)
