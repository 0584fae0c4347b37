"""Clients that notice everything: what came, when it came, and whether it fits what came before."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import httpx

from shared.protocol import Tokens

DEADLINE_S = 240.0


class StreamBroken(AssertionError):
    """A stream told an error, or ended before its end."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A server-sent event with tokens, and when it came."""

    at_s: float
    event_id: str
    tokens: Tokens
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """All that a client got, over all its connections."""

    tokens: Tokens
    text: str
    finish_reason: str


class LiveStream:
    """One client's streamed completion, read in the background; `resume` goes on with it at another gateway."""

    def __init__(self, http: httpx.AsyncClient, body: Mapping[str, Any]) -> None:
        self.session = ""
        self.arrivals: list[Arrival] = []
        self.finish_reason = ""
        self._http = http
        self._body = {**body, "stream": True}
        self._last_id = ""
        self._news = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    @property
    def count(self) -> int:
        """Tokens received so far."""
        return sum(len(arrival.tokens) for arrival in self.arrivals)

    # --- reading --------------------------------------------------------------------------------------

    def start(self, gateway: str) -> None:
        """Ask for the completion."""
        self._read(self._http.stream("POST", f"{gateway}/v1/completions", json=self._body))

    def resume(self, gateway: str) -> None:
        """Read on after the last event that came."""
        url = f"{gateway}/v1/streams/{self.session}"
        self._read(self._http.stream("GET", url, headers={"Last-Event-ID": self._last_id}))

    async def leave(self) -> None:
        """Hang up."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])

    async def reached(self, tokens: int) -> None:
        """Return when so many tokens have come. Raises what ended the stream before."""
        async with asyncio.timeout(DEADLINE_S):
            while self.count < tokens:
                self._news.clear()
                await self._told()

    async def cut(self) -> None:
        """Return when the connection has broken off, which it must."""
        assert self._reading is not None
        with suppress(httpx.TransportError):
            async with asyncio.timeout(DEADLINE_S):
                await self._reading
            raise StreamBroken("the stream came to its end instead")

    async def answer(self) -> Answer:
        """Everything, when it is complete."""
        assert self._reading is not None
        async with asyncio.timeout(DEADLINE_S):
            await self._reading
        tokens = tuple(token for arrival in self.arrivals for token in arrival.tokens)
        return Answer(tokens, "".join(arrival.text for arrival in self.arrivals), self.finish_reason)

    def longest_wait_s(self, since_s: float) -> float:
        """The longest that the client waited for a token after `since_s`, of the monotonic clock."""
        times = [since_s, *(each.at_s for each in self.arrivals if each.tokens and each.at_s > since_s)]
        return max((later - earlier for earlier, later in pairwise(times)), default=float("inf"))

    # --- the inside -----------------------------------------------------------------------------------

    async def _told(self) -> None:
        assert self._reading is not None
        news = asyncio.ensure_future(self._news.wait())
        await asyncio.wait([news, self._reading], return_when=asyncio.FIRST_COMPLETED)
        news.cancel()
        if self._reading.done() and not self._news.is_set():
            self._reading.result()
            raise StreamBroken(f"the stream ended after {self.count} tokens")

    def _read(self, connection: Any) -> None:
        self._reading = asyncio.create_task(self._take_in(connection))

    async def _take_in(self, connection: Any) -> None:
        async with connection as response:
            if response.status_code != 200:
                raise StreamBroken(f"{response.status_code}: {(await response.aread()).decode()}")
            async for event_id, data in _events(response):
                if data == "[DONE]":
                    return
                self._take(event_id, json.loads(data))
        raise StreamBroken(f"the stream ended without [DONE] after {self.count} tokens")

    def _take(self, event_id: str, data: dict[str, Any]) -> None:
        if "error" in data:
            raise StreamBroken(json.dumps(data["error"]))
        self.session = data["id"]
        self._last_id = event_id
        for choice in data["choices"]:
            tokens = tuple(choice.get("token_ids") or ())
            self.arrivals.append(Arrival(time.monotonic(), event_id, tokens, choice["text"]))
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        position = int(event_id.split(":")[1])
        if position != self.count:
            raise StreamBroken(f"event {event_id} came when the client had {self.count} tokens")
        self._news.set()


async def _events(response: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    event_id = ""
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line.startswith("data: "):
            yield event_id, line.removeprefix("data: ")
