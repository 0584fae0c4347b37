"""The whole path in one process: real Kafka, Redis and vLLM, the three services, and a gateway for each draft engine.

Clients talk HTTP to the gateways. One process, so that a test can ask the verifier's own engine what the target says by
itself, and how many tokens it has scheduled.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from services.draft_gateway.drafting import DraftEngine
from services.draft_gateway.service import DraftGateway
from services.draft_gateway.settings import GatewaySettings
from services.kv_session.service import KvSessionService
from services.kv_session.settings import KvSessionSettings
from services.verifier.engine.engine import VllmEngine
from services.verifier.service import VerifierService
from services.verifier.settings import VerifierSettings
from shared.http import HttpServer
from shared.protocol import Tokens

READY_S = 120.0
ANSWER_S = 240.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got: tokens and text as they were streamed, and the usage at the end."""

    tokens: Tokens
    text: str
    finish_reason: str
    outrider: Mapping[str, Any]


@dataclass
class Whole:
    """The running services."""

    environment: Mapping[str, str]
    engine: VllmEngine
    verifier: VerifierService
    gateways: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    async def stream(self, gateway: str, prompt: Tokens, max_tokens: int, **options: Any) -> Answer:
        """Stream one completion of `prompt`, given as tokens."""
        body = {
            "model": "target",
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "outrider": {"return_token_ids": True, **options},
        }
        tokens: list[int] = []
        parts: list[str] = []
        finish_reason, usage = "", {}
        async with self.gateways[gateway].stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for data in events(response):
                assert "error" not in data, data
                for choice in data["choices"]:
                    tokens += choice.get("token_ids") or []
                    parts.append(choice.get("text") or "")
                    finish_reason = choice.get("finish_reason") or finish_reason
                usage = data.get("usage") or usage
        return Answer(tuple(tokens), "".join(parts), finish_reason, usage["outrider"])

    async def stream_all(
        self, gateway: str, prompts: Sequence[Tokens], max_tokens: int, *, at_a_time: int, **options: Any
    ) -> list[Answer]:
        """Stream all prompts, so many at a time."""
        places = asyncio.Semaphore(at_a_time)

        async def one(prompt: Tokens) -> Answer:
            async with places:
                return await self.stream(gateway, prompt, max_tokens, **options)

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The data of server-sent events, up to `[DONE]`."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@asynccontextmanager
async def whole(
    environment: Mapping[str, str], target: Path, drafts: Mapping[str, DraftEngine]
) -> AsyncIterator[Whole]:
    """Start everything; one gateway for each draft engine, by its name."""
    common = {**environment, "OUTRIDER_MODEL": str(target), "OUTRIDER_MODEL_NAME": "target"}
    before = dict(os.environ)
    os.environ.update(common)
    try:
        verifier_settings = VerifierSettings(max_sessions=24, max_model_len=512, idle_ttl_s=300)
        engine = VllmEngine(verifier_settings)
        verifier = VerifierService(verifier_settings, engine)
        kv_session = KvSessionService(KvSessionSettings())
        gateways = {
            name: DraftGateway(GatewaySettings(gateway_name=name, round_timeout_s=60), engine=draft)
            for name, draft in drafts.items()
        }
    finally:
        os.environ.clear()
        os.environ.update(before)
    running = Whole(common, engine, verifier)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        work = [asyncio.create_task(verifier.run(stop)), asyncio.create_task(kv_session.run(stop))]
        for name, gateway in gateways.items():
            work.append(asyncio.create_task(gateway.serve(stop)))
            server = await stack.enter_async_context(HttpServer(gateway.app, host="127.0.0.1", port=0))
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=ANSWER_S)
            running.gateways[name] = await stack.enter_async_context(client)
        try:
            await asyncio.wait_for(_ready(running, work), READY_S)
            yield running
        finally:
            stop.set()
            await asyncio.gather(*work)


async def _ready(running: Whole, work: Sequence[asyncio.Task[None]]) -> None:
    """Wait until an answer can be had through every gateway."""
    waiting = dict(running.gateways)
    while waiting:
        for task in work:
            if task.done():
                task.result()
        for name, client in list(waiting.items()):
            body = {"model": "target", "prompt": [1, 2, 3], "max_tokens": 1}
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 200:
                del waiting[name]
        await asyncio.sleep(0.2)
