"""Events: what a client that reads from any of them on gets, however tokens were delivered and characters cut."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from services.draft_gateway.answer_text import NO_ENDING, AnswerText, Ending
from services.draft_gateway.generation import Delivery
from services.draft_gateway.openai_api import Api, OutriderOptions, ResponseForm
from services.draft_gateway.streams import (
    DONE,
    KEEPALIVE,
    EventStreamResponse,
    EventWriter,
    Position,
    Reading,
    Stage,
    Text,
    events,
    whole,
)
from shared.errors import InvalidRequest, OutriderError, SessionTaken
from shared.protocol import FinishReason, GenerationParams, Sampling, TokenLogprobs, Tokens

SESSION = "chatcmpl-1"


ENDING = Ending(strings=("bé☃", "aa"))


class ByteDecoder:
    """Tokens are bytes of UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(bytes(tokens))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class Script:
    """A token stream that delivers what it is given; an error ends it, an event is waited for."""

    prompt_length = 3

    def __init__(
        self, *steps: Delivery | OutriderError | asyncio.Event, reason: FinishReason = FinishReason.LENGTH
    ) -> None:
        self.finish_reason = reason
        self._steps = list(steps)
        self.length = sum(len(step.tokens) for step in steps if isinstance(step, Delivery))

    async def started(self, patience_s: float) -> None:
        return

    async def next(self) -> Delivery | None:
        if not self._steps:
            return None
        step = self._steps.pop(0)
        if isinstance(step, asyncio.Event):
            await step.wait()
            return await self.next()
        if isinstance(step, OutriderError):
            raise step
        assert isinstance(step, Delivery)
        return step

    def report(self) -> dict[str, Any]:
        return {"session": SESSION}

    def leave(self, reason: str, *, detach: bool) -> None:
        return


def deliveries(
    tokens: Tokens, cuts: Sequence[int], start: int = 0, *, stop: str | None = None
) -> list[Delivery]:
    """`tokens[start:]`, cut at `cuts`; a stop string may end them."""
    reason = FinishReason.LENGTH if stop is None else FinishReason.STOP
    edges = [start, *sorted({cut for cut in cuts if start < cut < len(tokens)}), len(tokens)]
    return [
        Delivery(
            low,
            tokens[low:high],
            ("accepted",) * (high - low),
            number,
            reason if high == len(tokens) else None,
            stop if high == len(tokens) else None,
        )
        for number, (low, high) in enumerate(pairwise(edges))
        if high > low
    ]


def reading(
    stream: Script, look: ResponseForm, text: Text | None = None, *, echo: str = "", **params: Any
) -> Reading:
    asked = GenerationParams(max_tokens=100, **params)
    return Reading(stream, look, text or Text(AnswerText(ByteDecoder())), asked, echo)


async def written(*writers: EventWriter, keepalive_s: float = 5.0) -> list[bytes]:
    return [chunk async for chunk in events(writers, keepalive_s=keepalive_s)]


def data(chunk: bytes) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(chunk.split(b"data: ", 1)[1])
    return parsed


def said(chunks: Sequence[bytes]) -> str:
    text = ""
    for chunk in chunks:
        if chunk in (DONE, KEEPALIVE):
            continue
        choices = data(chunk)["choices"]
        text += choices[0]["delta"].get("content", "") if choices else ""
    return text


def ids(chunks: Sequence[bytes]) -> list[str]:
    return [chunk.split(b"\n")[0][4:].decode() for chunk in chunks if chunk.startswith(b"id: ")]


def form(**fields: Any) -> ResponseForm:
    return ResponseForm(api=Api.CHAT, session=SESSION, created=1, model="m", **fields)


def cut(tokens: Tokens, ending: Ending) -> tuple[Tokens, str | None]:
    """The tokens of an answer that a stop string may end, and the string."""
    answer = AnswerText(ByteDecoder(), ending)
    return tokens[: answer.ends_within(tokens, None)], answer.stop


@settings(deadline=None)
@given(
    text=st.text(alphabet="abé☃😀 ", min_size=1, max_size=12).map(str.encode)
    | st.binary(min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 40), max_size=6),
    other_cuts=st.lists(st.integers(1, 40), max_size=6),
    trace=st.booleans(),
    include_usage=st.booleans(),
    ending=st.sampled_from([NO_ENDING, ENDING, replace(ENDING, included=True, min_tokens=3)]),
)
def test_reading_on_after_any_event_gives_exactly_the_rest(
    text: bytes, cuts: list[int], other_cuts: list[int], trace: bool, include_usage: bool, ending: Ending
) -> None:
    tokens, stop = cut(tuple(text), ending)
    look = form(include_usage=include_usage, options=OutriderOptions(trace=trace))

    def write(cuts: list[int], start: Position | None = None) -> list[bytes]:
        read = start.tokens if start is not None else 0
        stream = Script(*deliveries(tokens, cuts, read, stop=stop))
        words = Text(AnswerText(ByteDecoder(), ending), tokens[:read])
        return asyncio.run(written(EventWriter(reading(stream, look, words), start)))

    whole = write(cuts)
    if stop is None:
        assert said(whole) == text.decode(errors="replace")
    else:
        assert said(whole).endswith(stop) is ending.included
    assert whole[-1] == DONE
    for number, event_id in enumerate(ids(whole)):
        start = Position.parse(event_id, session=SESSION)
        rest = write(other_cuts, start)
        assert said(whole[: number + 1]) + said(rest) == said(whole)
        assert rest[-1] == DONE
        ends = [each for each in ids(whole)[number + 1 :] if each.count(":") == 2]
        assert [each for each in ids(rest) if each.count(":") == 2] == ends


async def test_a_stop_token_is_counted_and_not_shown() -> None:
    last = Delivery(0, tuple(b"ab!"), ("accepted",) * 3, 1, FinishReason.STOP)
    look = form(options=OutriderOptions(trace=True))
    words = Text(AnswerText(ByteDecoder()), stop_token_ids=(ord("!"),))
    stream = Script(last, reason=FinishReason.STOP)
    chunks = await written(EventWriter(reading(stream, look, words)))
    assert said(chunks) == "ab"
    assert ids(chunks) == [f"{SESSION}:0", f"{SESSION}:3", f"{SESSION}:3:finish"]
    traced = data(chunks[1])["outrider"]["tokens"]
    assert [token["text"] for token in traced] == ["a", "b", ""]
    assert data(chunks[2])["choices"][0]["stop_reason"] == ord("!")


async def test_the_end_of_the_sequence_has_no_stop_reason() -> None:
    last = Delivery(0, tuple(b"ab!"), ("accepted",) * 3, 1, FinishReason.STOP)
    chunks = await written(EventWriter(reading(Script(last, reason=FinishReason.STOP), form())))
    assert data(chunks[-2])["choices"][0]["stop_reason"] is None


async def test_log_probabilities_come_with_each_token_also_while_its_text_is_held_back() -> None:
    tokens = tuple("a☃".encode())
    logprobs = tuple(TokenLogprobs(logprob=-float(number), rank=1) for number in range(4))
    parts = [
        Delivery(0, tokens[:2], ("accepted",) * 2, 1, logprobs=logprobs[:2]),
        Delivery(2, tokens[2:3], ("accepted",), 2, logprobs=logprobs[2:3]),
        Delivery(3, tokens[3:], ("accepted",), 3, FinishReason.LENGTH, logprobs=logprobs[3:]),
    ]
    words = Text(AnswerText(ByteDecoder()), token_bytes=lambda token: bytes([token]))
    chunks = await written(EventWriter(reading(Script(*parts), form(), words, logprobs=0)))
    told = [
        token
        for chunk in chunks[:-1]
        for choice in data(chunk)["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert bytes(byte for token in told for byte in token["bytes"]) == bytes(tokens)
    assert [token["logprob"] for token in told] == [0.0, -1.0, -2.0, -3.0]
    assert said(chunks) == "a☃"


async def test_a_repeated_prompt_opens_the_text_once() -> None:
    look = ResponseForm(api=Api.COMPLETION, session="cmpl-1", created=1, model="m", echo=True)
    step = Delivery(0, tuple(b"ab"), ("accepted",) * 2, 1, FinishReason.LENGTH)
    chunks = await written(EventWriter(reading(Script(step), look, echo="Say ")))
    assert [data(chunk)["choices"][0]["text"] for chunk in chunks[:-1]] == ["Say ", "ab", ""]
    answer = await whole([reading(Script(step), look, echo="Say ")])
    assert answer["choices"][0]["text"] == "Say ab"
    resumed = EventWriter(reading(Script(step), look, echo="Say "), Position("cmpl-1", 0))
    assert data((await written(resumed))[0])["choices"][0]["text"] == "ab"


async def test_choices_come_as_they_are_ready_and_end_together() -> None:
    fast = [Delivery(0, tuple(b"ab"), ("accepted",) * 2, 1, FinishReason.LENGTH)]
    gate = asyncio.Event()
    slow = [gate, Delivery(0, tuple(b"cde"), ("accepted",) * 3, 1, FinishReason.LENGTH)]
    looks = [form(response=SESSION, include_usage=True, index=index) for index in range(2)]
    looks[1] = replace(looks[1], session=f"{SESSION}-1")
    writers = [
        EventWriter(reading(Script(*script), look)) for script, look in zip((slow, fast), looks, strict=True)
    ]
    chunks = []
    async for chunk in events(writers, keepalive_s=5):
        chunks.append(chunk)
        if b'"finish_reason":"length"' in chunk:
            gate.set()
    *parts, total, done = chunks
    assert done == DONE
    choices = [data(chunk)["choices"][0] for chunk in parts]
    assert [choice["index"] for choice in choices] == [0, 1, 1, 1, 0, 0]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length", None, "length"]
    assert ids(parts)[2:4] == [f"{SESSION}-1:2", f"{SESSION}-1:2:finish"]
    assert data(total)["usage"]["completion_tokens"] == 5 and data(total)["usage"]["prompt_tokens"] == 3
    assert [each["session"] for each in data(total)["usage"]["outrider"]["choices"]] == [SESSION, SESSION]
    assert not total.startswith(b"id: ")


async def test_a_choice_that_fails_ends_the_whole_response() -> None:
    step = Delivery(0, tuple(b"ab"), ("accepted",) * 2, 1)
    waiting = EventWriter(reading(Script(asyncio.Event()), form()))
    chunks = await written(waiting, EventWriter(reading(Script(step, SessionTaken("gone")), form(index=1))))
    assert data(chunks[-1])["error"]["code"] == "session_taken"
    with pytest.raises(SessionTaken):
        await whole([reading(Script(asyncio.Event()), form()), reading(Script(SessionTaken("gone")), form())])


async def test_the_usage_tells_the_seed_with_its_sign() -> None:
    step = Delivery(0, tuple(b"ab"), ("accepted",) * 2, 1, FinishReason.LENGTH)
    for seed in (5, -5, -(1 << 63), (1 << 63) - 1):
        answer = await whole([reading(Script(step), form(), sampling=Sampling(seed=seed % (1 << 64)))])
        assert answer["usage"]["outrider"]["seed"] == seed


async def test_a_failure_is_the_last_event_and_nothing_is_called_done() -> None:
    step = Delivery(0, tuple(b"ab"), ("accepted",) * 2, 1)
    chunks = await written(EventWriter(reading(Script(step, SessionTaken("gone")), form())))
    assert said(chunks[:-1]) == "ab"
    assert data(chunks[-1])["error"]["code"] == "session_taken"
    assert DONE not in chunks


@pytest.mark.parametrize("count", [1, 2])
async def test_a_quiet_stream_says_that_it_lives(count: int) -> None:
    step = Delivery(0, tuple(b"ab"), ("accepted",) * 2, 1, FinishReason.LENGTH)
    gate = asyncio.Event()
    writers = [EventWriter(reading(Script(gate, step), form(index=index))) for index in range(count)]
    chunks = []
    async for chunk in events(writers, keepalive_s=0.01):
        chunks.append(chunk)
        if chunk == KEEPALIVE:
            gate.set()
    assert KEEPALIVE in chunks
    assert said(chunks) == "ab" * count


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
