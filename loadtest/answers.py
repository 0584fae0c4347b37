"""A streamed answer as its reader sees it: from the lines of an event stream to times and counts.

Knows no socket, clock or locust: whoever reads hands in each line and when it came.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

DATA: Final = "data:"
ID: Final = "id:"
END: Final = "[DONE]"


class BrokenStream(Exception):
    """The stream said that it failed, or is not one of chat chunks."""


@dataclass
class Answer:
    """One answer. Times are in ms since its request was sent.

    `first_ms` is None until there is text. `between_ms` has the time of every later token: one event may bring several
    tokens at once, and each of them then took its share of the time since the event before. Their sum is the time from
    the first event with text to the last one.
    """

    text: str = ""
    tokens: int = 0
    first_ms: float | None = None
    last_ms: float = 0.0
    between_ms: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    _position: int | None = None

    def line(self, line: str, now_ms: float) -> None:
        """Take one line of the event stream; BrokenStream when it tells of a failure."""
        if line.startswith(ID):
            self._position = _tokens_at(line.removeprefix(ID).strip())
        elif line.startswith(DATA):
            data = line.removeprefix(DATA).strip()
            if data == END:
                self.complete = True
            else:
                self._chunk(_json(data), now_ms)

    def check(self) -> None:
        """BrokenStream unless the answer came to its end."""
        if not self.complete or self.finish_reason is None:
            raise BrokenStream(
                f"the stream broke off after {self.tokens} tokens, without finish_reason and {END}"
            )

    def speculation(self) -> dict[str, int]:
        """What `usage.outrider` counts (rounds, drafted, accepted …); empty when the server says nothing of it."""
        counts = self.usage.get("outrider", {})
        return {name: count for name, count in counts.items() if isinstance(count, int) and name != "seed"}

    def _chunk(self, chunk: dict[str, Any], now_ms: float) -> None:
        if "error" in chunk:
            raise BrokenStream(str(chunk["error"].get("message", chunk["error"])))
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if text := choice.get("delta", {}).get("content"):
                self._text(text, now_ms)

    def _text(self, text: str, now_ms: float) -> None:
        """Text has come; an event's id counts the tokens up to it, without one an event counts as a token."""
        reached = self.tokens + 1 if self._position is None else self._position
        new = max(1, reached - self.tokens)
        if self.first_ms is None:
            self.first_ms = now_ms
        else:
            self.between_ms += [(now_ms - self.last_ms) / new] * new
        self.text += text
        self.tokens += new
        self.last_ms = now_ms


def _tokens_at(event_id: str) -> int | None:
    """How many tokens an id such as `chatcmpl-1:12` or `chatcmpl-1:12:finish` stands for."""
    fields = event_id.split(":")
    return int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else None


def _json(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise BrokenStream(f"not a chunk: {data[:80]!r} ({error})") from None
    if not isinstance(chunk, dict):
        raise BrokenStream(f"not a chunk: {data[:80]!r}")
    return chunk


def lines(pieces: Iterator[bytes]) -> Iterator[str]:
    """The lines of a body that comes in pieces, each as soon as it is complete."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r").decode(errors="replace")
