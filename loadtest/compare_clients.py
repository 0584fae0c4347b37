"""Readers of the comparison: one answer from a gateway, or from vLLM as it comes, with the time at which each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Final, Protocol

import httpx

from shared.errors import Unavailable
from shared.protocol import Tokens
from shared.stack.ports import HOST

DEADLINE_S: Final = 240.0


@dataclass(slots=True)
class Answer:
    """One answer as its reader saw it: `arrivals` are (ms since the request, tokens so far) of every event with tokens.

    `usage` is what the server says that it did; of vLLM as it comes only its `passes`.
    """

    tokens: tuple[int, ...] = ()
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)

    def add(self, tokens: list[int], now_ms: float) -> None:
        """More tokens have come."""
        if tokens:
            self.tokens += tuple(tokens)
            self.arrivals.append((now_ms, len(self.tokens)))

    @property
    def ttft_ms(self) -> float:
        """From the request to the first token."""
        return self.arrivals[0][0]

    @property
    def ms_per_token(self) -> float | None:
        """Time a token after the first event; None when all came at once."""
        (first_ms, first), (last_ms, last) = self.arrivals[0], self.arrivals[-1]
        return (last_ms - first_ms) / (last - first) if last > first else None


class Reader(Protocol):
    """Asks for one answer and reads it to its end."""

    async def ask(self, prompt: Tokens, max_tokens: int, options: Mapping[str, Any]) -> Answer:
        """The answer; `Unavailable` when it breaks off."""
        ...


class GatewayReader:
    """Streams completions from a gateway over HTTP."""

    def __init__(self, url: str, model: str, client: httpx.AsyncClient) -> None:
        self._url = url
        self._model = model
        self._client = client

    async def ask(
        self,
        prompt: Tokens,
        max_tokens: int,
        options: Mapping[str, Any],
        more: Mapping[str, Any] | None = None,
    ) -> Answer:
        """See `Reader`. `options` are the request's `outrider`, `more` is what else it says."""
        body = {
            **(more or {}),
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "outrider": {**options, "return_token_ids": True},
        }
        answer, began_s = Answer(), time.monotonic()
        try:
            async with (
                asyncio.timeout(DEADLINE_S),
                self._client.stream("POST", f"{self._url}/v1/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    said = (await response.aread()).decode(errors="replace")
                    raise Unavailable(f"{self._url} answered {response.status_code}: {said[:300]}")
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        _take(answer, json.loads(line[6:]), (time.monotonic() - began_s) * 1000)
        except (httpx.HTTPError, TimeoutError) as error:
            raise Unavailable(f"{self._url}: the answer broke off: {error!r}") from error
        if not answer.usage:
            raise Unavailable(f"{self._url}: the answer broke off after {len(answer.tokens)} tokens")
        return answer


class TurnsReader:
    """Asks several readers in turn, one for each answer."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._turns = cycle(readers)

    async def ask(self, prompt: Tokens, max_tokens: int, options: Mapping[str, Any]) -> Answer:
        """See `Reader`."""
        return await next(self._turns).ask(prompt, max_tokens, options)


def _take(answer: Answer, chunk: Mapping[str, Any], now_ms: float) -> None:
    if "error" in chunk:
        raise Unavailable(f"the answer broke off: {chunk['error'].get('message')}")
    for choice in chunk["choices"]:
        answer.add(choice.get("token_ids", []), now_ms)
    if chunk.get("usage"):
        answer.usage = chunk["usage"]["outrider"]


class StockReader:
    """Reads from `loadtest.stock_server`, with connections that are kept: a link, too, is there before the request."""

    def __init__(self, port: int, stops: frozenset[int]) -> None:
        self._port = port
        self._stops = sorted(stops)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, prompt: Tokens, max_tokens: int, options: Mapping[str, Any]) -> Answer:
        """See `Reader`."""
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection(HOST, self._port)
        asked = {"prompt": list(prompt), "max_tokens": max_tokens, "stop": self._stops}
        answer, began_s = Answer(), time.monotonic()
        writer.write(json.dumps(asked).encode() + b"\n")
        async with asyncio.timeout(DEADLINE_S):
            while line := await reader.readline():
                said = json.loads(line)
                answer.add(said.get("t", []), (time.monotonic() - began_s) * 1000)
                if "error" in said:
                    raise Unavailable(f"vLLM: {said['error']}")
                if "finish" in said:
                    self._free.append((reader, writer))
                    answer.usage = {"passes": said["steps"]}
                    return answer
        raise Unavailable(f"vLLM's answer broke off after {len(answer.tokens)} tokens")

    async def busy_ms(self) -> float:
        """How long the engine has had requests so far."""
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection(HOST, self._port)
        writer.write(b'{"stats": true}\n')
        async with asyncio.timeout(DEADLINE_S):
            said = json.loads(await reader.readline())
        self._free.append((reader, writer))
        return float(said["busy_ms"])

    async def connect(self, count: int) -> None:
        """Have so many connections open."""
        while len(self._free) < count:
            self._free.append(await asyncio.open_connection(HOST, self._port))

    def close(self) -> None:
        """Close what is open."""
        for _, writer in self._free:
            writer.close()
        self._free.clear()
