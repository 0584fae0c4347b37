"""kv-session on a real Kafka and Redis, with verifiers that are heartbeats only."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
import pytest
from pydantic import SecretStr

from services.kv_session.placement import Placer
from services.kv_session.service import KvSessionService
from services.kv_session.settings import KvSessionSettings
from shared.bus import Bus
from shared.protocol import (
    Closed,
    CloseSession,
    Evicted,
    GenerationParams,
    Heartbeat,
    OpenSession,
    Placed,
    PlacementsMessage,
    Refused,
    ReplyRoute,
    Topic,
    TouchSession,
)
from shared.session import SessionState
from shared.stack.kafka import Broker
from shared.stack.ports import free_port
from shared.stack.redis import RedisServer
from shared.store import Store

pytestmark = pytest.mark.kafka

HERE = ReplyRoute(gateway="gateway-0", partition=0)
THERE = ReplyRoute(gateway="gateway-1", partition=1)
BEAT_S = 0.1
WAIT_S = 20.0

M = TypeVar("M", Placed, Refused, Evicted, Closed)


def a_heartbeat(name: str = "v0", partitions: tuple[int, ...] = (0, 1), **changes: object) -> Heartbeat:
    values: dict[str, object] = {
        "verifier": name,
        "incarnation": f"{name}:1",
        "model": "m",
        "ready": True,
        "partitions": partitions,
        "sessions": 0,
        "max_sessions": 16,
        "kv_usage": 0.0,
        "kv_capacity_tokens": 10_000,
        "max_model_len": 100,
    }
    return Heartbeat.model_validate({**values, **changes})


def an_open(session: str, **changes: object) -> OpenSession:
    values: dict[str, object] = {
        "session": session,
        "reply": HERE,
        "prompt": (1, 2, 3),
        "params": GenerationParams(max_tokens=10),
    }
    return OpenSession.model_validate({**values, **changes})


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Poll until the condition holds."""
    end_s = time.monotonic() + WAIT_S
    while not await condition():
        assert time.monotonic() < end_s, f"not in time: {what}"
        await asyncio.sleep(0.02)


async def heard(http: httpx.AsyncClient, name: str, **told: object) -> None:
    """Wait until kv-session shows the verifier so: heartbeats come on another topic than what is asked."""

    async def shown() -> bool:
        listed = (await http.get("/v1/verifiers")).json()["verifiers"]
        return any(each["verifier"] == name and told.items() <= each.items() for each in listed)

    await until(shown, f"kv-session knows {name} with {told}")


@dataclass
class World:
    """A deployment of its own: topics, keys, what is announced, and verifiers that beat."""

    settings: KvSessionSettings
    bus: Bus
    store: Store
    announced: list[PlacementsMessage] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)
    beating: dict[str, Heartbeat] = field(default_factory=dict)

    async def send(self, message: OpenSession | CloseSession | TouchSession) -> None:
        await self.bus.send(message)

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Beat from now on."""
        self.beating[heartbeat.verifier] = heartbeat
        await self.bus.send(heartbeat)

    def silence(self, name: str) -> None:
        """Beat no more, as after kill -9."""
        del self.beating[name]

    def of(self, kind: type[M], session: str) -> list[M]:
        """What was announced of a session, of one kind."""
        return [each for each in self.announced if isinstance(each, kind) and each.session == session]

    async def hears(self, kind: type[M], session: str, count: int = 1) -> M:
        """The `count`-th announcement of that kind."""
        try:
            async with asyncio.timeout(WAIT_S), self.news:
                await self.news.wait_for(lambda: len(self.of(kind, session)) >= count)
        except TimeoutError:
            pytest.fail(f"no {kind.__name__} number {count} of {session}; announced: {self.announced}")
        return self.of(kind, session)[count - 1]

    async def opened(self, session: str, **changes: object) -> Placed:
        await self.send(an_open(session, **changes))
        return await self.hears(Placed, session)

    async def refused(self, session: str, **changes: object) -> Refused:
        await self.send(an_open(session, **changes))
        return await self.hears(Refused, session)

    async def state(self, session: str) -> SessionState:
        state = await self.store.state(session)
        assert state is not None
        return state


@asynccontextmanager
async def background(*work: Awaitable[None]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def settings_for(broker: Broker, redis_url: str, **changes: object) -> KvSessionSettings:
    tag = uuid.uuid4().hex[:12]
    values: dict[str, object] = {
        "kafka": broker.bootstrap,
        "kafka_flavor": broker.flavor,
        "redis_url": SecretStr(redis_url),
        "topic_prefix": f"{tag}.",
        "redis_prefix": f"{tag}:",
        "drafts_partitions": 4,
        "reply_partitions": 2,
        "sessions_partitions": 2,
        "verifier_timeout_s": 1.0,
        "sweep_s": 0.1,
        "kv_session_port": 0,
    }
    return KvSessionSettings.model_validate({**values, **changes})


@asynccontextmanager
async def a_world(settings: KvSessionSettings) -> AsyncIterator[World]:
    async with Bus(settings, client="test") as bus, Store(settings) as store:
        await bus.ensure_topics()
        world = World(settings, bus, store)
        async with bus.reader(Topic.PLACEMENTS) as placements:

            async def listen() -> None:
                async for received in placements:
                    async with world.news:
                        world.announced.append(received.message)
                        world.news.notify_all()

            async def beat() -> None:
                while True:
                    for heartbeat in list(world.beating.values()):
                        await bus.send(heartbeat)
                    await asyncio.sleep(BEAT_S)

            async with background(listen(), beat()):
                yield world


@asynccontextmanager
async def serving(settings: KvSessionSettings, **changes: object) -> AsyncIterator[httpx.AsyncClient]:
    """A kv-session in this process, and a client of its API."""
    service = KvSessionService(settings.model_copy(update=changes))
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    transport = httpx.ASGITransport(service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://kv-session") as http:

        async def ready() -> bool:
            if running.done():
                await running
            return (await http.get("/readyz")).status_code == 200

        await until(ready, "kv-session ready")
        yield http
        stop.set()
        await asyncio.wait_for(running, WAIT_S)


@pytest.fixture
def settings(kafka_broker: Broker, redis_url: str) -> KvSessionSettings:
    return settings_for(kafka_broker, redis_url)


@pytest.fixture
async def world(settings: KvSessionSettings) -> AsyncIterator[World]:
    async with a_world(settings) as world:
        yield world


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(world.settings) as http:
        yield http


# --- open and refuse ----------------------------------------------------------------------------------------------


async def test_an_open_is_placed_on_a_ready_verifier(world: World, http: httpx.AsyncClient) -> None:
    await world.beat(a_heartbeat(partitions=(2, 3)))
    placed = await world.opened("s", model="m")
    assert (placed.verifier, placed.epoch, placed.base, placed.reason) == ("v0", 1, 0, "opened")
    assert placed.partition in (2, 3)
    assert placed.reply == HERE
    state = await world.state("s")
    assert (state.verifier, state.partition, state.model) == ("v0", placed.partition, "m")
    assert await world.store.prompt("s") == (1, 2, 3)


async def test_an_open_at_start_waits_for_the_first_heartbeat(world: World) -> None:
    async with serving(world.settings, verifier_timeout_s=5.0):
        await world.send(an_open("s"))
        await asyncio.sleep(0.3)  # it is being waited for, which nothing shows
        await world.beat(a_heartbeat())
        await world.hears(Placed, "s")
        assert world.of(Refused, "s") == []


async def test_without_a_verifier_an_open_is_refused_as_unavailable(
    world: World, http: httpx.AsyncClient
) -> None:
    refused = await world.refused("s")
    assert (refused.code, refused.retry_after_s) == ("unavailable", 2.0)
    assert refused.reply == HERE
    assert await world.store.state("s") is None


async def test_when_all_verifiers_are_full_an_open_is_refused_as_overload(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat(sessions=3, max_sessions=3))
    refused = await world.refused("s")
    assert (refused.code, refused.retry_after_s) == ("overloaded", 2.0)


async def test_opens_that_can_never_succeed_are_refused_with_the_reason(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    assert (await world.refused("a", model="other")).code == "model_not_found"
    assert (await world.refused("b", prompt=(1,) * 100)).code == "context_length_exceeded"
    assert (await world.refused("c", prompt=())).code == "invalid_request"
    assert (await world.refused("d", params=None)).code == "invalid_request"
    await world.opened("e")
    assert (await world.refused("e", prompt=(9,))).code == "session_taken"
    assert (await world.opened("f", prompt=(1,) * 99)).epoch == 1


async def test_an_open_sent_twice_is_one_session(world: World, http: httpx.AsyncClient) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    await world.beat(a_heartbeat("v1", partitions=(2, 3)))
    await world.beat(a_heartbeat(sessions=16))
    await heard(http, "v1", takes_sessions=True)
    await heard(http, "v0", sessions=16)
    await world.send(an_open("s"))
    again = await world.hears(Placed, "s", 2)
    assert again == world.of(Placed, "s")[0]


async def test_an_open_that_trips_a_defect_is_refused_and_stops_nothing(
    world: World, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.beat(a_heartbeat())
    with monkeypatch.context() as patch:
        patch.setattr(Placer, "place", lambda *_, **__: 1 // 0)
        assert (await world.refused("a")).code == "internal_error"
    assert (await world.opened("b")).epoch == 1


# --- resume and close ---------------------------------------------------------------------------------------------


async def test_a_resume_makes_another_gateway_the_driver(world: World, http: httpx.AsyncClient) -> None:
    await world.beat(a_heartbeat())
    placed = await world.opened("s")
    await world.store.claim("s", epoch=1, owner="v0:1")
    await world.store.commit("s", epoch=1, round=0, base=0, tokens=(5, 6))
    await world.send(OpenSession(session="s", reply=THERE, resume=True))
    resumed = await world.hears(Placed, "s", 2)
    assert (resumed.reason, resumed.epoch, resumed.base, resumed.reply) == ("resumed", 2, 2, THERE)
    assert resumed.partition == placed.partition
    state = await world.state("s")
    assert (state.reply, state.owner) == (THERE, "v0:1")


async def test_a_resume_of_an_unknown_session_is_refused(world: World, http: httpx.AsyncClient) -> None:
    await world.beat(a_heartbeat())
    refused = await world.refused("s", resume=True, prompt=(), params=None)
    assert refused.code == "session_not_found"


async def test_a_resume_goes_to_another_verifier_when_its_own_is_gone(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    await world.send(CloseSession(session="s", epoch=1, reason="client left", detach=True))
    await world.hears(Evicted, "s")
    await world.beat(a_heartbeat("v1", partitions=(2, 3)))
    await world.beat(a_heartbeat(stopping=True))
    await heard(http, "v1", takes_sessions=True)
    await heard(http, "v0", takes_sessions=False)
    await world.send(OpenSession(session="s", reply=THERE, resume=True))
    resumed = await world.hears(Placed, "s", 2)
    assert (resumed.verifier, resumed.reason, resumed.reply) == ("v1", "resumed", THERE)
    assert resumed.partition in (2, 3)
    assert (await world.state("s")).status == "open"


async def test_without_a_verifier_a_resume_keeps_its_place(world: World, http: httpx.AsyncClient) -> None:
    await world.beat(a_heartbeat())
    placed = await world.opened("s")
    await world.beat(a_heartbeat(stopping=True))
    await heard(http, "v0", takes_sessions=False)
    await world.send(OpenSession(session="s", reply=THERE, resume=True))
    resumed = await world.hears(Placed, "s", 2)
    assert (resumed.verifier, resumed.partition, resumed.epoch) == ("v0", placed.partition, 2)


async def test_closing_ends_and_detaching_frees_kv_only(world: World, http: httpx.AsyncClient) -> None:
    await world.beat(a_heartbeat())
    await world.opened("a")
    await world.opened("b")
    await world.send(CloseSession(session="a", epoch=1, reason="client left", detach=True))
    await world.send(CloseSession(session="b", epoch=1, reason="done"))
    assert (await world.hears(Evicted, "a")).reason == "client left"
    assert (await world.hears(Closed, "b")).reason == "done"
    assert (await world.state("a")).status == "detached"
    assert (await world.state("b")).status == "closed"


async def test_a_close_by_a_superseded_gateway_changes_nothing(world: World, http: httpx.AsyncClient) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    await world.send(OpenSession(session="s", reply=THERE, resume=True))
    await world.hears(Placed, "s", 2)
    await world.send(CloseSession(session="s", epoch=1, reason="late", detach=True))
    await world.send(CloseSession(session="s", epoch=2, reason="mine"))
    assert (await world.hears(Closed, "s")).reason == "mine"
    assert world.of(Evicted, "s") == []


async def test_a_touch_puts_the_expiry_off(world: World, http: httpx.AsyncClient) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    before_ms = (await world.state("s")).touched_ms
    await world.send(TouchSession(session="s", epoch=1))

    async def touched() -> bool:
        return (await world.state("s")).touched_ms > before_ms

    await until(touched, "touched")


# --- moves --------------------------------------------------------------------------------------------------------


async def test_sessions_of_a_dead_verifier_move_to_another_and_keep_their_gateway(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    for name in "abc":
        await world.opened(name)
    await world.store.claim("a", epoch=1, owner="v0:1")
    await world.store.commit("a", epoch=1, round=0, base=0, tokens=(5, 6))
    await world.beat(a_heartbeat("v1", partitions=(2, 3)))
    world.silence("v0")
    for name, base in (("a", 2), ("b", 0), ("c", 0)):
        moved = await world.hears(Placed, name, 2)
        assert (moved.verifier, moved.epoch, moved.reason) == ("v1", 2, "moved")
        assert (moved.reply, moved.base) == (HERE, base)
        assert moved.partition in (2, 3)
    assert (await world.state("a")).owner == ""


async def test_a_verifier_that_says_it_stops_is_left_at_once(world: World) -> None:
    async with serving(world.settings, sweep_s=60.0, verifier_timeout_s=0.5) as http:
        await world.beat(a_heartbeat())
        await world.beat(a_heartbeat("v1", partitions=(2, 3), sessions=9))
        await world.opened("s")

        await heard(http, "v1")
        await asyncio.sleep(0.5)  # so that silence means absence
        await world.beat(a_heartbeat(stopping=True))
        assert (await world.hears(Placed, "s", 2)).verifier == "v1"


async def test_while_no_other_is_ready_sessions_wait_for_their_verifier_to_return(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    world.silence("v0")

    await heard(http, "v0", alive=False)
    await world.beat(a_heartbeat(incarnation="v0:2"))
    await heard(http, "v0", incarnation="v0:2", alive=True)
    await world.opened("after")
    state = await world.state("s")
    assert (state.epoch, state.verifier) == (1, "v0")
    assert len(world.of(Placed, "s")) == 1


async def test_a_partition_that_kafka_has_moved_takes_its_sessions_along(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    placed = await world.opened("s")
    world.silence("v0")
    await world.beat(a_heartbeat("v1", partitions=(0, 1, 2, 3)))
    moved = await world.hears(Placed, "s", 2)
    assert (moved.verifier, moved.partition, moved.epoch) == ("v1", placed.partition, 2)


async def test_a_session_that_another_verifier_has_claimed_already_is_left_there(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    await world.store.claim("s", epoch=1, owner="v0:1")
    await world.store.claim("s", epoch=1, owner="v1:1")
    world.silence("v0")
    await world.beat(a_heartbeat("v1", partitions=(0, 1, 2, 3)))
    await world.opened("other", prompt=(9,))

    await heard(http, "v0", alive=False)
    await heard(http, "v1", alive=True)
    await world.send(an_open("probe"))
    await world.hears(Placed, "probe")
    assert (await world.state("s")).epoch == 2  # the claim's


async def test_a_move_that_was_made_but_not_announced_is_announced_later(world: World) -> None:
    await world.beat(a_heartbeat())
    async with serving(world.settings):
        await world.opened("s")
    await world.beat(a_heartbeat("v1", partitions=(2, 3)))
    await world.store.begin_move("s")
    await world.store.place("s", verifier="v1", partition=2, expected_epoch=1)
    async with serving(world.settings):
        moved = await world.hears(Placed, "s", 2)
        assert (moved.verifier, moved.partition, moved.epoch, moved.reason) == ("v1", 2, 2, "moved")


async def test_two_replicas_share_the_work_and_move_each_session_once(world: World) -> None:
    async with serving(world.settings), serving(world.settings, kv_session_name="kv-session-1"):
        await world.beat(a_heartbeat(max_sessions=64))
        names = [f"s{n}" for n in range(30)]
        for placed in await asyncio.gather(*(world.opened(name) for name in names)):
            assert placed.epoch == 1
        await world.beat(a_heartbeat("v1", partitions=(2, 3), max_sessions=64))
        world.silence("v0")
        for name in names:
            await world.hears(Placed, name, 2)
        for name in names:
            state = await world.state(name)
            assert (state.verifier, state.epoch) == ("v1", 2)


# --- the operator -------------------------------------------------------------------------------------------------


async def test_draining_moves_sessions_away_and_keeps_new_ones_out(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    await world.beat(a_heartbeat("v1", partitions=(2, 3), sessions=10))
    await heard(http, "v1", sessions=10)
    drained = (await http.post("/v1/verifiers/v0/drain")).json()
    assert (drained["drained"], drained["takes_sessions"]) == (True, False)
    moved = await world.hears(Placed, "s", 2)
    assert (moved.verifier, moved.reason) == ("v1", "moved")
    assert (await world.opened("new", prompt=(9,))).verifier == "v1"
    undrained = (await http.post("/v1/verifiers/v0/undrain")).json()
    assert (undrained["drained"], undrained["takes_sessions"]) == (False, True)
    assert (await world.opened("newer", prompt=(8,))).verifier == "v0"


async def test_a_drained_verifier_keeps_what_nobody_else_has_room_for(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    await world.beat(a_heartbeat("v1", partitions=(2, 3), sessions=16))
    await heard(http, "v1", sessions=16)
    await http.post("/v1/verifiers/v0/drain")
    assert (await world.refused("new")).code == "overloaded"
    assert (await world.state("s")).epoch == 1
    await world.beat(a_heartbeat("v1", partitions=(2, 3), sessions=15))
    assert (await world.hears(Placed, "s", 2)).verifier == "v1"


async def test_draining_outlives_the_kv_session_that_was_asked(world: World) -> None:
    await world.beat(a_heartbeat())
    async with serving(world.settings) as http:
        await world.opened("s")
        await http.post("/v1/verifiers/v0/drain")
    async with serving(world.settings):
        assert "v0 drained" in (await world.refused("new")).message


async def test_evicting_asks_the_verifier_to_free_kv_and_keeps_the_session(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    response = await http.post("/v1/sessions/s/evict")
    assert (response.status_code, response.json()["session"]) == (200, "s")
    evicted = await world.hears(Evicted, "s")
    assert (evicted.epoch, evicted.reason) == (1, "operator")
    assert (await world.state("s")).status == "open"


async def test_deleting_closes_the_session_and_erases_its_tokens(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    await world.opened("s")
    assert (await http.delete("/v1/sessions/s")).json()["status"] == "closed"
    assert (await world.hears(Closed, "s")).reason == "operator"
    assert await world.store.state("s") is None
    again = await http.delete("/v1/sessions/s")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "session_not_found")


async def test_sessions_are_shown_and_listed_by_status_and_verifier(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.beat(a_heartbeat())
    for name in "abcde":
        await world.opened(name)
    await world.send(CloseSession(session="c", epoch=1, reason="done"))
    await world.hears(Closed, "c")
    shown = (await http.get("/v1/sessions/a")).json()
    assert (shown["session"], shown["epoch"], shown["prompt_length"], shown["verifier"]) == ("a", 1, 3, "v0")
    assert shown["reply"] == {"gateway": "gateway-0", "partition": 0}

    async def listed(**query: object) -> list[str]:
        names: list[str] = []
        parameters = {"limit": "2", **{name: str(value) for name, value in query.items()}}
        while True:
            page = (await http.get("/v1/sessions", params=parameters)).json()
            names += [each["session"] for each in page["sessions"]]
            if page["cursor"] is None:
                return sorted(names)
            parameters["cursor"] = page["cursor"]

    assert await listed() == list("abcde")
    assert await listed(status="open") == list("abde")
    assert await listed(status="closed", verifier="v0") == ["c"]
    assert await listed(verifier="v9") == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/sessions/none", 404, "session_not_found"),
        ("GET", "/v1/sessions/not%20an%20id", 400, "invalid_request"),
        ("POST", "/v1/sessions/none/evict", 404, "session_not_found"),
        ("DELETE", "/v1/sessions/none", 404, "session_not_found"),
        ("GET", "/v1/sessions?status=odd", 400, "invalid_request"),
        ("GET", "/v1/sessions?limit=0", 400, "invalid_request"),
        ("GET", "/v1/sessions?cursor=odd", 400, "invalid_request"),
        ("POST", "/v1/verifiers/none/drain", 404, "verifier_not_found"),
        ("POST", "/v1/verifiers/none/undrain", 404, "verifier_not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/sessions", 405, "method_not_allowed"),
    ],
)
async def test_a_request_that_is_wrong_is_answered_with_what_is_wrong(
    shared_http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await shared_http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.fixture
async def shared_http(kafka_broker: Broker, redis_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """The API on a store only: what these requests ask needs no broker."""
    service = KvSessionService(settings_for(kafka_broker, redis_url))
    transport = httpx.ASGITransport(service.app)
    async with service.store, httpx.AsyncClient(transport=transport, base_url="http://kv-session") as http:
        yield http


async def test_health_readiness_metrics_and_docs_answer(world: World, http: httpx.AsyncClient) -> None:
    assert (await http.get("/healthz")).status_code == 200
    ready = (await http.get("/readyz")).json()
    assert ready["ready"]
    assert any("no verifier" in note for note in ready["notes"])
    await world.beat(a_heartbeat())
    await world.opened("s")
    assert not any("no verifier" in note for note in (await http.get("/readyz")).json()["notes"])
    metrics = (await http.get("/metrics")).text
    assert "outrider_kv_session_opened_total" in metrics
    paths = (await http.get("/openapi.json")).json()["paths"]
    assert {"/v1/sessions", "/v1/sessions/{session}/evict", "/v1/verifiers/{name}/drain"} <= set(paths)
    assert (await http.get("/docs")).status_code == 200


async def test_without_redis_it_is_not_ready_and_goes_on_when_redis_is_back(
    kafka_broker: Broker, own_redis: RedisServer
) -> None:
    settings = settings_for(kafka_broker, own_redis.url)
    async with a_world(settings) as world, serving(settings) as http:
        await world.beat(a_heartbeat())
        await world.opened("before")
        own_redis.kill()
        response = await http.get("/readyz")
        assert (response.status_code, response.json()["reasons"]) == (503, ["Redis does not answer"])
        await world.send(an_open("meanwhile"))
        own_redis.start()
        await world.hears(Placed, "meanwhile")
        assert (await http.get("/readyz")).status_code == 200
        assert (await world.state("before")).epoch == 1


async def test_a_verifier_that_kafka_kept_from_being_heard_is_not_gone(
    own_kafka: Broker, redis_url: str
) -> None:
    settings = settings_for(own_kafka, redis_url, verifier_timeout_s=8.0, bus_deadline_s=60.0)
    both = {"a": a_heartbeat("a", (0, 1)), "b": a_heartbeat("b", (2, 3))}
    async with a_world(settings) as world, serving(settings) as http:
        for heartbeat in both.values():
            await world.beat(heartbeat)
        late = (await world.opened("before")).verifier

        async def alive() -> set[str]:
            listed = (await http.get("/v1/verifiers")).json()["verifiers"]
            return {each["verifier"] for each in listed if each["alive"]}

        async def nobody_is_heard() -> bool:
            return not await alive()

        async def the_other_is_heard() -> bool:
            return await alive() == both.keys() - {late}

        async def both_are_heard() -> bool:
            return await alive() == both.keys()

        world.silence(late)
        await asyncio.sleep(2 * BEAT_S)  # its last heartbeat is on its way no more
        own_kafka.kill(signal.SIGSTOP)
        await until(nobody_is_heard, "the outage outlasts what a silent verifier has")
        own_kafka.kill(signal.SIGCONT)
        await until(the_other_is_heard, "the other verifier is heard first")
        await asyncio.sleep(5 * settings.sweep_s)
        await world.beat(both[late])
        await until(both_are_heard, "both verifiers are heard")
        assert (await world.state("before")).epoch == 1


# --- expiry -------------------------------------------------------------------------------------------------------


async def test_a_session_that_nobody_uses_is_closed_as_expired(kafka_broker: Broker, redis_url: str) -> None:
    settings = settings_for(kafka_broker, redis_url, session_ttl_s=0.5)
    async with a_world(settings) as world, serving(settings):
        await world.beat(a_heartbeat())
        await world.opened("s")
        closed = await world.hears(Closed, "s")
        assert (closed.reason, closed.epoch) == ("expired", 1)
        assert await world.store.state("s") is None


# --- as a process -------------------------------------------------------------------------------------------------


def a_process(settings: KvSessionSettings) -> subprocess.Popen[str]:
    values = settings.model_dump(mode="json", exclude={"redis_url"})
    environment = {f"OUTRIDER_{name.upper()}": str(value) for name, value in values.items() if value != ""}
    environment["OUTRIDER_REDIS_URL"] = settings.redis_url.get_secret_value()
    return subprocess.Popen(
        [sys.executable, "-m", "services.kv_session"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


async def test_opens_are_answered_once_read_again_after_kill_9(world: World) -> None:
    await world.beat(a_heartbeat(max_sessions=1000))
    names = [f"s{n:03}" for n in range(300)]
    process = a_process(world.settings)
    try:
        await world.opened(names[0])
        sending = [asyncio.create_task(world.send(an_open(name))) for name in names[1:]]
        await world.hears(Placed, names[20])
        process.kill()
        process.wait()
        answered = {each.session for each in world.announced}
        process = a_process(world.settings)
        await asyncio.gather(*sending)
        for name in names:
            assert (await world.hears(Placed, name)).epoch == 1
        assert len(answered) < len(names)
        assert world.of(Refused, names[-1]) == []
        states = [await world.state(name) for name in names]
        assert {(state.epoch, state.verifier) for state in states} == {(1, "v0")}
    finally:
        process.kill()
        process.communicate()


async def test_a_resume_read_again_after_kill_9_bumps_the_epoch_once(world: World) -> None:
    service = KvSessionService(world.settings)
    await world.beat(a_heartbeat())
    async with serving(world.settings):
        await world.opened("s")
    async with service.store, service.bus:
        service.directory.hear(a_heartbeat())
        resume = OpenSession(session="s", reply=THERE, resume=True)
        for _ in range(2):
            await service.directory.handle(resume, request="0@7/1")
    assert (await world.hears(Placed, "s", 3)).epoch == 2
    assert (await world.state("s")).epoch == 2


async def test_sigterm_ends_the_process_in_order(world: World) -> None:
    process = a_process(world.settings)
    try:
        await world.beat(a_heartbeat())
        await world.opened("s")
        process.send_signal(signal.SIGTERM)
        _, log = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
        assert process.returncode == 0, log
        assert "Traceback" not in log
    finally:
        process.kill()


@pytest.mark.parametrize("missing", ["kafka", "redis"])
async def test_a_missing_broker_or_store_ends_the_process_with_its_address(
    kafka_broker: Broker, redis_url: str, missing: str
) -> None:
    port = free_port()
    nowhere = f"127.0.0.1:{port}"
    settings = settings_for(
        kafka_broker,
        f"redis://:hush@{nowhere}/0" if missing == "redis" else redis_url,
        bus_deadline_s=1.0,
        store_deadline_s=1.0,
        **({"kafka": nowhere} if missing == "kafka" else {}),
    )
    process = a_process(settings)
    try:
        _, log = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert nowhere in log
    assert f"OUTRIDER_{'KAFKA' if missing == 'kafka' else 'REDIS_URL'}" in log
    assert "Traceback" not in log
    assert "hush" not in log
