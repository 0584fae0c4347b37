"""A gateway and a kv-session, as far as a verifier sees them: opens sessions, sends blocks, hears what is answered."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from services.verifier.engine.types import Engine
from services.verifier.service import VerifierService
from services.verifier.settings import VerifierSettings
from shared.bus import Bus, Reader
from shared.protocol import (
    Block,
    Cancel,
    DeadLetter,
    Fault,
    Floor,
    Forward,
    GenerationParams,
    Heartbeat,
    Hint,
    OpenSession,
    PlacementsMessage,
    Policy,
    Prompt,
    ReplyRoute,
    Stale,
    Tokens,
    Topic,
    Verdict,
)
from shared.session import SessionState
from shared.store import Store
from tests.integration.scripted_engine import ScriptedEngine

WAIT_S = 20.0
ROUTE = ReplyRoute(gateway="gateway-0", partition=1)
PROMPT: Tokens = (5, 6, 7)
HEARD = (Topic.VERDICTS, Topic.EXITS, Topic.HEARTBEATS, Topic.DEAD_LETTERS)

Answer = TypeVar("Answer", Verdict, Floor, Stale, Fault, Hint)
Heard = Verdict | Floor | Stale | Fault | Hint | Heartbeat | DeadLetter


async def until(holds: Callable[[], bool | Awaitable[bool]], what: str, deadline_s: float = WAIT_S) -> None:
    """Poll until it holds."""
    end_s = time.monotonic() + deadline_s
    while True:
        value = holds()
        if value if isinstance(value, bool) else await value:
            return
        if time.monotonic() >= end_s:
            pytest.fail(f"not within {deadline_s:g} s: {what}")
        await asyncio.sleep(0.005)


@dataclass
class Peer:
    """What a test drives and hears."""

    settings: VerifierSettings
    bus: Bus
    store: Store
    heard: list[Heard] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def open(self, session: str, *, partition: int = 0, **options: Any) -> None:
        """Open the session and ask for its first token; see `create` for the options."""
        await self.create(session, partition=partition, **options)
        await self.prompt(session, partition=partition)

    async def create(
        self,
        session: str,
        *,
        prompt: Tokens = PROMPT,
        partition: int = 0,
        max_tokens: int = 1000,
        stop: Tokens = (),
        policy: Policy = Policy.COST,
    ) -> None:
        """Open the session in Redis, as kv-session does. The verifier waits for blocks unless `policy` says otherwise."""
        params = GenerationParams(max_tokens=max_tokens, stop_token_ids=stop, policy=policy)
        message = OpenSession(session=session, reply=ROUTE, model="m", prompt=prompt, params=params)
        await self.store.create(message, verifier="v0", partition=partition)

    async def prompt(self, session: str, *, epoch: int = 1, partition: int = 0) -> None:
        """Send the prompt (again)."""
        await self.bus.send(Prompt(session=session, epoch=epoch, reply=ROUTE), partition=partition)

    async def block(
        self, session: str, number: int, base: int, *tokens: int, epoch: int = 1, partition: int = 0
    ) -> None:
        """Send a block."""
        message = Block(session=session, epoch=epoch, reply=ROUTE, round=number, base=base, tokens=tokens)
        await self.bus.send(message, partition=partition)

    async def forward(
        self, session: str, number: int, parent: int, accepted: int, next_token: int, *tokens: int, base: int
    ) -> None:
        """Send a forward: a block for the round `parent` if its outcome is (`accepted`, `next_token`)."""
        message = Forward(
            session=session,
            epoch=1,
            reply=ROUTE,
            round=number,
            base=base,
            parent=parent,
            accepted=accepted,
            next_token=next_token,
            tokens=tokens,
        )
        await self.bus.send(message, partition=0)

    async def cancel(self, session: str, *, epoch: int = 1, partition: int = 0) -> None:
        """Send a cancel."""
        await self.bus.send(Cancel(session=session, epoch=epoch, reason="client left"), partition=partition)

    async def announce(self, message: PlacementsMessage) -> None:
        """Say something on the placements topic."""
        await self.bus.send(message)

    def of(self, kind: type[Answer], session: str) -> list[Answer]:
        """The answers of a kind that a session got."""
        return [each for each in self.heard if isinstance(each, kind) and each.session == session]

    async def hears(self, kind: type[Answer], session: str, count: int = 1) -> Answer:
        """The `count`-th answer of that kind."""
        await self._until(
            lambda: len(self.of(kind, session)) >= count, f"{kind.__name__} {count} of {session}"
        )
        return self.of(kind, session)[count - 1]

    async def beats(self, holds: Callable[[Heartbeat], bool], what: str) -> Heartbeat:
        """A heartbeat of which that holds, once there is one."""

        def found() -> list[Heartbeat]:
            return [each for each in self.heard if isinstance(each, Heartbeat) and holds(each)]

        await self._until(lambda: bool(found()), what)
        return found()[-1]

    async def dead_letters(self, count: int) -> list[DeadLetter]:
        """So many dead letters, once they are there."""

        def found() -> list[DeadLetter]:
            return [each for each in self.heard if isinstance(each, DeadLetter)]

        await self._until(lambda: len(found()) >= count, f"{count} dead letters")
        return found()

    async def state(self, session: str) -> SessionState:
        """The session in Redis."""
        state = await self.store.state(session)
        assert state is not None
        return state

    async def owner(self, session: str) -> str:
        """Who holds the session's KV, by Redis."""
        return (await self.state(session)).owner

    async def listen(self, reader: Reader[Any]) -> None:
        """Note what is read."""
        async for received in reader:
            async with self.news:
                self.heard.append(received.message)
                self.news.notify_all()

    async def _until(self, holds: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(WAIT_S), self.news:
                await self.news.wait_for(holds)
        except TimeoutError:
            heard = [each for each in self.heard if not isinstance(each, Heartbeat)]
            pytest.fail(f"never heard: {what}; heard instead: {heard}")


@asynccontextmanager
async def a_peer(settings: VerifierSettings) -> AsyncIterator[Peer]:
    """A peer that listens to everything a verifier says."""
    async with Bus(settings, client="peer") as bus, Store(settings) as store:
        await bus.ensure_topics()
        peer = Peer(settings, bus, store)
        readers: list[Reader[Any]] = [bus.reader(topic) for topic in HEARD]
        for reader in readers:
            await reader.start()
        listening = [asyncio.create_task(peer.listen(reader)) for reader in readers]
        try:
            yield peer
        finally:
            for task in listening:
                task.cancel()
            await asyncio.gather(*listening, return_exceptions=True)
            for reader in readers:
                await reader.stop()


@dataclass
class Running:
    """A verifier in this process."""

    service: VerifierService
    engine: ScriptedEngine
    http: httpx.AsyncClient
    work: asyncio.Task[None]
    stop: asyncio.Event

    async def ready(self) -> bool:
        """Whether `/readyz` says so."""
        if self.work.done():
            await self.work
        return (await self.http.get("/readyz")).status_code == 200

    async def ends(self) -> None:
        """Stop it in order."""
        self.stop.set()
        async with asyncio.timeout(WAIT_S):
            await self.work


@asynccontextmanager
async def a_verifier(settings: VerifierSettings, **changes: object) -> AsyncIterator[Running]:
    """A verifier around a scripted engine, once it is ready; stopped in order unless the test has done so."""
    changed = settings.model_copy(update=changes)
    engine = ScriptedEngine(changed)
    assert isinstance(engine, Engine)
    service = VerifierService(changed, engine)
    stop = asyncio.Event()
    work = asyncio.create_task(service.run(stop))
    transport = httpx.ASGITransport(service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://verifier") as http:
        running = Running(service, engine, http, work, stop)
        try:
            await until(running.ready, "the verifier is ready")
            yield running
        finally:
            engine.go.set()
            stop.set()
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(work, return_exceptions=True)


@asynccontextmanager
async def a_process(
    module: str, environment: Mapping[str, str], errors: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m module` as a process of its own, its stderr in a file; killed at the end if it still runs."""
    with errors.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            env={**_without_ours(os.environ), **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("OUTRIDER_")}
