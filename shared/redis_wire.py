"""Redis' wire protocol (RESP2), written and read with as little as possible: commands become one piece of bytes, and an
answer is read without a coroutine for each of its parts. redis-py's own ways cost four times as much, which made them a
fifth of what a verifier's process computes. https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from redis._parsers import _AsyncRESP2Parser
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import InvalidResponse

READ_BYTES: Final = 64 << 10

_END: Final = b"\r\n"
_ERROR, _STATUS, _INTEGER, _BULK, _ARRAY = b"-+:$*"


class Incomplete(Exception):
    """More bytes have to come before there is an answer."""


def pack(commands: Iterable[Sequence[bytes | str | int]]) -> bytes:
    """Commands as bytes, to be sent in one piece."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            data = argument if isinstance(argument, bytes) else str(argument).encode()
            parts += b"$%d\r\n" % len(data), data, _END
    return b"".join(parts)


class AnswerParser(_AsyncRESP2Parser):
    """In the place of redis-py's parser: parses what has come at once, and waits only for what has not."""

    def __init__(self, socket_read_size: int) -> None:
        super().__init__(socket_read_size)
        self._held = b""
        self._at = 0

    def on_connect(self, connection: Any) -> None:
        """See redis-py."""
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        self._held, self._at = b"", 0

    async def can_read(self) -> bool:
        """See redis-py."""
        return self._at < len(self._held) or bool(await super().can_read())

    async def read_response(self, disable_decoding: bool = False) -> Any:
        """The next answer; an error of the server's is returned. Raises redis-py's `ConnectionError`."""
        stream = self._stream
        if stream is None or not self._connected:
            raise ConnectionLost("Connection closed by server.")
        while True:
            try:
                answer, self._at = self._parse(self._held, self._at)
                break
            except Incomplete:
                more = await stream.read(READ_BYTES)
                if not more:
                    raise ConnectionLost("Connection closed by server.") from None
                self._held, self._at = self._held[self._at :] + more, 0
        if isinstance(answer, ConnectionLost):
            raise answer
        return answer

    def _parse(self, data: bytes, at: int) -> tuple[Any, int]:
        """The answer that begins at `at`, and where it ends."""
        end = data.find(_END, at)
        if end < 0:
            raise Incomplete
        kind, text, after = data[at], data[at + 1 : end], end + 2
        if kind == _INTEGER:
            return int(text), after
        if kind == _BULK:
            size = int(text)
            if size < 0:
                return None, after
            if len(data) < after + size + 2:
                raise Incomplete
            return data[after : after + size], after + size + 2
        if kind == _ARRAY:
            if (size := int(text)) < 0:
                return None, after
            answers = []
            for _ in range(size):
                answer, after = self._parse(data, after)
                answers.append(answer)
            return answers, after
        if kind == _STATUS:
            return text, after
        if kind == _ERROR:
            return self.parse_error(text.decode(errors="replace")), after  # type: ignore[no-untyped-call]
        raise InvalidResponse(f"Protocol Error: {data[at:end]!r}")
