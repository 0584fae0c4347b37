"""A cloud for the gateways' tests: kv-session, a scripted verifier and gateways on real Kafka and Redis, and how to talk to
them. What the target says after a prompt is known beforehand."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.draft_gateway.service import DraftGateway
from services.draft_gateway.settings import GatewaySettings
from services.draft_gateway.uplink import Uplink
from services.kv_session.service import KvSessionService
from services.kv_session.settings import KvSessionSettings
from shared.http import HttpServer
from shared.protocol import Tokens
from shared.session import SessionState
from shared.stack.kafka import Broker
from shared.store import Store
from tests.integration.byte_model import END, MODEL
from tests.integration.scripted_verifier import ScriptedVerifier

VERSE = "Ein Vöglein saß im Schnee ☃ und pfiff 😀, im Schnee saß es und pfiff. "
DEADLINE_S = 20.0


def recite(prompt: Tokens, length: int) -> Tokens:
    """The verse over and over, from a point that depends on the prompt."""
    verse = tuple(VERSE.encode())
    start = sum(prompt) % len(VERSE.partition(" ")[0].encode())
    return (verse[start:] + verse * (length // len(verse) + 1))[:length]


def text_of(tokens: Tokens) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


@dataclass
class Event:
    """A server-sent event."""

    data: str
    id: str | None = None

    @property
    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.data)
        return parsed

    @property
    def text(self) -> str:
        if self.data == "[DONE]" or not self.json.get("choices"):
            return ""
        choice = self.json["choices"][0]
        return choice["text"] if "text" in choice else choice["delta"].get("content") or ""


async def read_events(response: httpx.Response) -> AsyncIterator[Event]:
    event_id, data = None, None
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            data = line[6:]
        elif not line and data is not None:
            yield Event(data, event_id)
            event_id, data = None, None


def said(events: list[Event]) -> str:
    return "".join(event.text for event in events)


async def eventually(holds: Callable[[], Any], what: str) -> Any:
    """The first true value of `holds`, or of what it gives to await, within a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = holds()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        await asyncio.sleep(0.02)
    pytest.fail(f"not within {DEADLINE_S:g} s: {what}")


def cloud_settings(
    broker: Broker, redis_url: str, redis_prefix: str, model: Path, topic_prefix: str
) -> dict[str, Any]:
    """Settings of services that find out soon what went wrong.

    The scripted verifier answers blocks: it neither goes on by itself nor takes forwards.
    """
    return {
        "kafka": broker.bootstrap,
        "kafka_flavor": broker.flavor.value,
        "redis_url": redis_url,
        "redis_prefix": redis_prefix,
        "topic_prefix": topic_prefix,
        "model": str(model),
        "round_timeout_s": 1.0,
        "policy": "cost",
        "adaptive": False,
        "forwards": False,
        "sweep_s": 0.2,
        "verifier_timeout_s": 2.0,
    }


class Cloud:
    """Gateways, a kv-session, a scripted verifier and the store beneath them."""

    def __init__(self, settings: dict[str, Any], stack: AsyncExitStack) -> None:
        self._settings = settings
        self._stack = stack
        self.store = Store(GatewaySettings(**settings))
        self.verifier = ScriptedVerifier(
            GatewaySettings(**settings), recite, model=MODEL, stop_tokens=frozenset({END})
        )

    @property
    def environment(self) -> dict[str, str]:
        """The settings as a process of its own reads them."""
        return {f"OUTRIDER_{name.upper()}": str(value) for name, value in self._settings.items()}

    async def start(self, *, kv_session: bool = True) -> None:
        await self._stack.enter_async_context(self.store)
        await self._stack.enter_async_context(self.verifier)
        if kv_session:
            await self._stack.enter_async_context(run_kv_session(self._settings))

    async def gateway(self, **settings: Any) -> httpx.AsyncClient:
        """A client of a new gateway that is ready."""
        client = await self._stack.enter_async_context(run_gateway(self._settings | settings))
        await eventually(lambda: ready(client), "the gateway is ready")
        return client

    async def state(self, session: str) -> SessionState:
        state = await self.store.state(session)
        assert state is not None
        return state


def port_of(client: httpx.AsyncClient) -> int:
    """The port of the gateway that it asks."""
    assert client.base_url.port is not None
    return client.base_url.port


async def ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


@asynccontextmanager
async def run_gateway(
    settings: dict[str, Any], uplink: Uplink | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that starts; `uplink` in place of the one that its settings name."""
    gateway = DraftGateway(GatewaySettings(gateway_port=0, **settings), uplink=uplink)
    stop = asyncio.Event()
    async with HttpServer(gateway.app, host="127.0.0.1", port=0, grace_s=2) as server:
        serving = asyncio.create_task(gateway.serve(stop))
        url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
            yield client
        stop.set()
        await serving


@asynccontextmanager
async def run_kv_session(settings: dict[str, Any]) -> AsyncIterator[None]:
    service = KvSessionService(KvSessionSettings(kv_session_port=0, **settings))
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    yield
    stop.set()
    await running


def chat(content: str = "Sing!", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 60} | fields


def completion(prompt: Any = "Sing!", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 60} | fields


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Event]:
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        return [event async for event in read_events(response)]


async def resume(client: httpx.AsyncClient, session: str, after: str | None) -> list[Event]:
    headers = {} if after is None else {"Last-Event-ID": after}
    async with client.stream("GET", f"/v1/streams/{session}", headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        return [event async for event in read_events(response)]


async def read_some(client: httpx.AsyncClient, body: dict[str, Any], count: int) -> list[Event]:
    """The first events of a stream that is then left."""
    events: list[Event] = []
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        async for event in read_events(response):
            events.append(event)
            if len(events) == count:
                break
    return events


def session_of(events: list[Event]) -> str:
    return str(events[0].json["id"])


@asynccontextmanager
async def process(environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.draft_gateway",
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        _, said = await process.communicate()
        print(said.decode(), file=sys.stderr)
