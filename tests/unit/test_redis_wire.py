"""Redis' protocol: commands as redis-py writes them, and answers read however they are cut."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import InvalidResponse, NoScriptError, ResponseError

from shared.redis_wire import AnswerParser, pack

arguments = st.one_of(st.binary(max_size=9000), st.text(max_size=20), st.integers())
answers = st.recursive(
    st.one_of(st.none(), st.integers(), st.binary(max_size=40)), lambda parts: st.lists(parts, max_size=4)
)


def written(answer: Any) -> bytes:
    if answer is None:
        return b"$-1\r\n"
    if isinstance(answer, int):
        return b":%d\r\n" % answer
    if isinstance(answer, bytes):
        return b"$%d\r\n%b\r\n" % (len(answer), answer)
    return b"*%d\r\n%b" % (len(answer), b"".join(map(written, answer)))


def parser_of(stream: asyncio.StreamReader) -> AnswerParser:
    parser = AnswerParser(65536)
    parser.on_connect(SimpleNamespace(_reader=stream, encoder=None))
    return parser


@given(st.lists(st.lists(arguments, min_size=1, max_size=6), min_size=1, max_size=4))
def test_commands_are_written_as_redis_py_writes_them(commands: list[list[bytes | str | int]]) -> None:
    named = [[b"NAME", *command] for command in commands]
    assert pack(named) == b"".join(Connection().pack_commands(named))


@given(st.lists(answers, min_size=1, max_size=5), st.integers(1, 7))
def test_answers_are_read_however_they_are_cut(told: list[Any], size: int) -> None:
    async def run() -> None:
        stream = asyncio.StreamReader()
        parser = parser_of(stream)
        data = b"".join(map(written, told))
        reading = asyncio.ensure_future(_all(parser, len(told)))
        for at in range(0, len(data), size):
            stream.feed_data(data[at : at + size])
            await asyncio.sleep(0)
        assert await reading == told
        assert not await parser.can_read()

    asyncio.run(run())


async def _all(parser: AnswerParser, count: int) -> list[Any]:
    return [await parser.read_response() for _ in range(count)]


async def test_errors_are_handed_out_as_redis_py_does_and_the_answers_after_them_are_read() -> None:
    stream = asyncio.StreamReader()
    parser = parser_of(stream)
    stream.feed_data(b"-NOSCRIPT No matching script\r\n-ERR wrong\r\n+OK\r\n*2\r\n-ERR inner\r\n:1\r\n")
    forgotten, wrong, status, (inner, one) = await _all(parser, 4)
    assert isinstance(forgotten, NoScriptError) and type(wrong) is ResponseError and status == b"OK"
    assert isinstance(inner, ResponseError) and one == 1


async def test_an_end_in_the_middle_of_an_answer_is_a_lost_connection() -> None:
    stream = asyncio.StreamReader()
    parser = parser_of(stream)
    stream.feed_data(b"$10\r\nhalf")
    stream.feed_eof()
    with pytest.raises(ConnectionLost):
        await parser.read_response()


async def test_a_new_connection_reads_nothing_of_what_an_earlier_one_left() -> None:
    stream, fresh = asyncio.StreamReader(), asyncio.StreamReader()
    parser = parser_of(stream)
    stream.feed_data(b":1\r\n:2\r\n")
    assert await parser.read_response() == 1
    assert await parser.can_read()
    parser.on_connect(SimpleNamespace(_reader=fresh, encoder=None))
    fresh.feed_data(b":3\r\n")
    assert await parser.read_response() == 3


async def test_what_is_no_answer_is_refused() -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(b"HTTP/1.1 400 Bad Request\r\n")
    with pytest.raises(InvalidResponse):
        await parser_of(stream).read_response()
