"""Whatever dies in mid-stream, the client gets the tokens of the uninterrupted run: none lost, none repeated.

Services and brokers are processes of their own, killed with SIGKILL when a client has received so many tokens, and
started again as Kubernetes would. Each test prints how long the client had to wait for a token.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio

from shared.protocol import Tokens
from shared.stack.health import ask
from shared.stack.processes import ProcessIdentity
from shared.stack.settings import StackSettings
from shared.stack.stack import Progress, Stack, StackOptions, State
from tests.chaos.clients import Answer, LiveStream, StreamBroken
from tests.chaos.target import write_chaos_target
from tests.integration.tiny_target import random_prompt
from tests.prompts import real_prompts

pytestmark = [pytest.mark.stack, pytest.mark.engine, pytest.mark.kafka, pytest.mark.timeout(600)]

MAX_TOKENS = 200
EARLY = 20
"""Tokens that every client has when something dies."""
LATER = 20
"""Tokens that come after, when a test waits for the stream to have gone on."""
DEADLINE_S = 60.0
ENGINE_PROCESS = "VLLM::EngineCore"

Say = Callable[[str], None]


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Say:
    """Print a line that the run shows."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    return say


@dataclass
class Arena:
    """A stack, its clients, and what they should get."""

    stack: Stack
    told: Sequence[Progress]
    http: httpx.AsyncClient
    clients: AsyncExitStack
    prompts: Sequence[Tokens | str]
    truths: dict[Tokens | str, Answer]
    tell: Say
    streams: list[LiveStream] = field(default_factory=list)

    @property
    def gateways(self) -> list[str]:
        return [part.url for part in self.stack.record.of("gateway")]

    @property
    def verifiers(self) -> list[str]:
        return [part.name for part in self.stack.record.of("verifier")]

    # --- streams --------------------------------------------------------------------------------------

    async def open(self, prompt: Tokens | str) -> LiveStream:
        """A stream that has been asked for."""
        body = {
            "model": self.stack.model_name,
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "outrider": {"return_token_ids": True},
        }
        stream = await self.clients.enter_async_context(LiveStream(self.http, body))
        stream.start(self.gateways[0])
        return stream

    async def start(self) -> list[LiveStream]:
        """A stream for each prompt; all have received their first tokens."""
        for prompt in self.prompts:
            if prompt not in self.truths:
                self.truths[prompt] = await (await self.open(prompt)).answer()
        self.streams = [await self.open(prompt) for prompt in self.prompts]
        await asyncio.gather(*(stream.reached(EARLY) for stream in self.streams))
        return self.streams

    async def went_on(self) -> None:
        """Return when every stream has received more than it had."""
        wanted = [min(MAX_TOKENS, stream.count + LATER) for stream in self.streams]
        await asyncio.gather(
            *(stream.reached(count) for stream, count in zip(self.streams, wanted, strict=True))
        )

    async def ends_exactly(self, what: str, since_s: float) -> None:
        """Every answer is that of the undisturbed run; tells how long the clients waited for a token at most."""
        answers = await asyncio.gather(*(stream.answer() for stream in self.streams))
        for prompt, answer in zip(self.prompts, answers, strict=True):
            assert len(answer.tokens) == MAX_TOKENS
            assert answer == self.truths[prompt]
        waits_s = sorted(stream.longest_wait_s(since_s) for stream in self.streams)
        shown = ", ".join(f"{wait_s:.2f}" for wait_s in waits_s)
        self.tell(
            f"{what}: next token after {waits_s[-1]:.2f} s (longest waits of {len(waits_s)} streams: {shown})"
        )

    # --- the stack ------------------------------------------------------------------------------------

    async def kill(self, *names: str) -> float:
        """SIGKILL to parts and all that they started; when that was."""
        at_s = time.monotonic()
        for name in names:
            await asyncio.to_thread(self.stack.kill, name)
        return at_s

    def pid(self, name: str) -> int:
        """The process of a part."""
        pid = self.stack.pid(name)
        assert pid is not None
        return pid

    async def ready(self) -> None:
        """Return when every service is ready, and kv-session knows it of the verifiers."""
        await asyncio.to_thread(self.stack.wait_ready)
        await eventually(self.verifiers_take_sessions, "kv-session has heard of every verifier")

    async def verifiers_take_sessions(self) -> bool:
        """Whether kv-session places sessions on every verifier."""
        answer = await self.http.get(f"{self.stack.url('kv-session-0')}/v1/verifiers")
        taking = {one["verifier"] for one in answer.json()["verifiers"] if one["takes_sessions"]}
        return taking == set(self.verifiers)

    async def record(self, stream: LiveStream) -> dict[str, Any]:
        """What kv-session knows of the stream's session."""
        answer = await self.http.get(f"{self.stack.url('kv-session-0')}/v1/sessions/{stream.session}")
        assert answer.status_code == 200, answer.text
        record: dict[str, Any] = answer.json()
        return record

    async def records(self) -> list[dict[str, Any]]:
        """What it knows of all of them."""
        return [await self.record(stream) for stream in self.streams]

    async def operate(self, path: str) -> None:
        """Ask kv-session's API for something."""
        answer = await self.http.post(f"{self.stack.url('kv-session-0')}/v1/{path}")
        assert answer.status_code == 200, answer.text

    async def metric(self, name: str) -> float:
        """The sum of a metric over all verifiers."""
        total = 0.0
        for verifier in self.verifiers:
            text = (await self.http.get(f"{self.stack.url(verifier)}/metrics")).text
            assert f"# TYPE {name.partition('{')[0]} " in text, f"{verifier} has no {name}"
            total += sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
        return total

    async def kv_is_held(self) -> bool:
        """Every stream's session has KV, by the verifiers' books and by their engines'."""
        return await self._held() == (len(self.streams), len(self.streams))

    async def kv_is_free(self) -> bool:
        """No session has any."""
        return await self._held() == (0, 0)

    async def _held(self) -> tuple[float, float]:
        held = await self.metric("outrider_verifier_sessions")
        return held, await self.metric("outrider_verifier_engine_sessions")


async def eventually(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not await holds():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        await asyncio.sleep(0.05)


def held_by(record: Mapping[str, Any], verifier: str) -> bool:
    """Whether the session's KV is there."""
    return str(record["owner"]).startswith(f"{verifier}/")


@pytest.fixture(scope="module")
def told() -> list[Progress]:
    """What happened to the parts of the fleet."""
    return []


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, told: list[Progress], tell: Say) -> Iterator[Stack]:
    """Everything on brokers of its own: two verifiers, two gateways, and a supervisor that restarts what dies."""
    directory = tmp_path_factory.mktemp("chaos")
    options = StackOptions(
        target=write_chaos_target(directory / "tiny-target"),
        gateways=2,
        verifiers=2,
        environment={
            "OUTRIDER_MAX_MODEL_LEN": "512",
            "OUTRIDER_KV_CACHE_MB": "64",
            "OUTRIDER_MAX_SESSIONS": "8",
        },
        supervise=True,
        die_with_parent=True,
    )
    tell(f"chaos: starting two verifiers, two gateways and their brokers, logs in {directory / 'logs'}")
    with Stack(options, settings=StackSettings(run_dir=directory), report=told.append) as stack:
        yield stack


@pytest.fixture(scope="module")
def truths() -> dict[Tokens | str, Answer]:
    """What the targets say when nothing dies."""
    return {}


@pytest_asyncio.fixture
async def clients() -> AsyncIterator[AsyncExitStack]:
    """Whoever enters leaves when the test ends."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest_asyncio.fixture
async def arena(
    fleet: Stack,
    told: list[Progress],
    clients: AsyncExitStack,
    truths: dict[Tokens | str, Answer],
    tell: Say,
) -> Arena:
    """The fleet, all of it ready, and three prompts for the tiny target."""
    http = await clients.enter_async_context(httpx.AsyncClient(timeout=DEADLINE_S))
    prompts = [random_prompt(seed, 12) for seed in range(3)]
    arena = Arena(fleet, told, http, clients, prompts, truths, tell)
    await arena.ready()
    return arena


# --- one of a kind dies -------------------------------------------------------------------------------------------


async def test_kv_session_dies_and_streams_do_not_wait_for_it(arena: Arena) -> None:
    await arena.start()
    killed_s = await arena.kill("kv-session-0")
    late = await arena.open(arena.prompts[0])
    await arena.ends_exactly("kv-session killed", killed_s)
    assert await late.answer() == arena.truths[arena.prompts[0]]
    arena.tell(
        f"kv-session killed: first token of a new stream after {late.arrivals[0].at_s - killed_s:.2f} s"
    )


async def test_a_gateway_dies_and_its_clients_resume_at_another(arena: Arena) -> None:
    streams = await arena.start()
    killed_s = await arena.kill("gateway-0")
    for stream in streams:
        await stream.cut()
        stream.resume(arena.gateways[1])
    await arena.ends_exactly("gateway killed, clients resumed at another", killed_s)


async def test_kafka_dies_and_comes_back(arena: Arena) -> None:
    await arena.start()
    before = await arena.records()
    killed_s = await arena.kill("kafka")
    await arena.ends_exactly("Kafka killed", killed_s)
    moved = sum(
        now["epoch"] > earlier["epoch"] for earlier, now in zip(before, await arena.records(), strict=True)
    )
    arena.tell(f"Kafka killed: {moved} of {len(before)} sessions moved over it")


async def test_redis_dies_and_comes_back(arena: Arena) -> None:
    await arena.start()
    killed_s = await arena.kill("redis")
    await arena.ends_exactly("Redis killed", killed_s)


async def test_both_brokers_and_kv_session_die_at_once(arena: Arena) -> None:
    await arena.start()
    killed_s = await arena.kill("redis", "kafka", "kv-session-0")
    await arena.ends_exactly("Kafka, Redis and kv-session killed", killed_s)


# --- clients and operators ----------------------------------------------------------------------------------------


async def test_clients_that_hang_up_free_their_kv_at_once_and_may_resume_anywhere(arena: Arena) -> None:
    streams = await arena.start()
    await eventually(arena.kv_is_held, "the KV is seen")
    left_s = time.monotonic()
    for stream in streams:
        await stream.leave()
    await eventually(arena.kv_is_free, "the KV is free")
    arena.tell(f"clients hung up: KV free after {time.monotonic() - left_s:.2f} s")
    resumed_s = time.monotonic()
    for stream, gateway in zip(streams, [*arena.gateways, *arena.gateways], strict=False):
        stream.resume(gateway)
    await arena.ends_exactly("clients resumed", resumed_s)


async def test_deleting_streams_frees_their_kv_and_ends_them(arena: Arena) -> None:
    streams = await arena.start()
    await eventually(arena.kv_is_held, "the KV is seen")
    deleted_s = time.monotonic()
    for stream in streams:
        answer = await arena.http.delete(f"{arena.gateways[1]}/v1/streams/{stream.session}")
        assert answer.status_code == 200, answer.text
    await eventually(arena.kv_is_free, "the KV is free")
    arena.tell(f"streams deleted: KV free after {time.monotonic() - deleted_s:.2f} s")
    for stream in streams:
        with pytest.raises(StreamBroken, match="session_not_found"):
            await stream.answer()


async def test_eviction_is_invisible_to_clients(arena: Arena) -> None:
    streams = await arena.start()
    evictions = 'outrider_verifier_evictions_total{reason="asked"}'
    before = await arena.metric(evictions)
    evicted_s = time.monotonic()
    for stream in streams:
        await arena.operate(f"sessions/{stream.session}/evict")
    await arena.ends_exactly("evicted", evicted_s)
    assert await arena.metric(evictions) == before + len(streams)


async def test_draining_a_verifier_moves_its_sessions_to_the_other(arena: Arena) -> None:
    await arena.start()
    before = await arena.records()
    drained = before[0]["verifier"]
    drained_s = time.monotonic()
    await arena.operate(f"verifiers/{drained}/drain")
    try:
        await arena.went_on()
        after = await arena.records()
        await arena.ends_exactly("verifier drained", drained_s)
    finally:
        await arena.operate(f"verifiers/{drained}/undrain")
    for earlier, now in zip(before, after, strict=True):
        assert not held_by(now, drained)
        assert (now["epoch"] > earlier["epoch"]) == held_by(earlier, drained)


# --- one of two verifiers -----------------------------------------------------------------------------------------


async def test_a_verifier_that_hangs_loses_its_sessions_and_changes_nothing_when_it_goes_on(
    arena: Arena,
) -> None:
    await arena.start()
    before = await arena.records()
    hung = before[0]["verifier"]
    stopped_s = time.monotonic()
    arena.stack.kill(hung, signal.SIGSTOP)
    try:
        await arena.went_on()
        after = await arena.records()
    finally:
        arena.stack.kill(hung, signal.SIGCONT)
    await arena.ends_exactly("verifier hung", stopped_s)
    for earlier, now in zip(before, after, strict=True):
        assert not held_by(now, hung)
        assert (now["epoch"] > earlier["epoch"]) == held_by(earlier, hung)
    await arena.ready()
    assert arena.stack.restarts(hung) == 0


async def test_a_verifier_that_is_asked_to_stop_hands_its_sessions_over_and_comes_back(arena: Arena) -> None:
    await arena.start()
    (stopped, *_) = [record["verifier"] for record in await arena.records()]
    restarts = arena.stack.restarts(stopped)
    stopped_s = time.monotonic()
    os.kill(arena.pid(stopped), signal.SIGTERM)
    await arena.ends_exactly("verifier stopped", stopped_s)

    async def restarted() -> bool:
        return arena.stack.restarts(stopped) > restarts

    await eventually(restarted, "it has ended and is started again")
    deaths = [told.text for told in arena.told if (told.part, told.state) == (stopped, State.DIED)]
    assert deaths[-1] == "it ended with status 0"
    runs = 0
    while not await arena.verifiers_take_sessions():  # it gets its share of the partitions in mid-stream
        since_s = time.monotonic()
        await arena.start()
        runs += 1
        await arena.ends_exactly(f"verifier on its way back, run {runs}", since_s)
    arena.tell(f"verifier stopped: it takes sessions again after {time.monotonic() - stopped_s:.2f} s")


async def test_a_verifier_dies_with_its_engine_and_the_other_takes_its_sessions_over(arena: Arena) -> None:
    await arena.start()
    before = await arena.records()
    dying = before[0]["verifier"]
    family = psutil.Process(arena.pid(dying)).children(recursive=True)
    children = [ProcessIdentity.of(child.pid) for child in family]
    (engine,) = (ProcessIdentity.of(child.pid) for child in family if child.name() == ENGINE_PROCESS)
    killed_s = time.monotonic()
    os.kill(arena.pid(dying), signal.SIGKILL)  # it alone, as the kernel does when memory runs out

    async def engine_gone() -> bool:
        return not engine.alive

    async def all_gone() -> bool:
        return not any(child.alive for child in children)

    await eventually(engine_gone, "the engine process is gone")
    engine_s = time.monotonic() - killed_s
    await eventually(all_gone, "the verifier's other processes are gone")
    all_s = time.monotonic() - killed_s
    arena.tell(
        f"verifier killed: engine gone after {engine_s:.2f} s, all {len(children)} processes after {all_s:.2f} s"
    )
    await arena.went_on()
    for earlier, now in zip(before, await arena.records(), strict=True):
        assert (now["epoch"] > earlier["epoch"]) == held_by(earlier, dying)
    await arena.ends_exactly("one verifier of two killed", killed_s)


# --- the only verifier --------------------------------------------------------------------------------------------


async def test_the_only_verifier_dies_and_goes_on_when_it_is_back(
    stack: Stack, clients: AsyncExitStack, tell: Say
) -> None:
    http = await clients.enter_async_context(httpx.AsyncClient(timeout=DEADLINE_S))
    arena = Arena(stack, (), http, clients, real_prompts(2), {}, tell)
    await arena.ready()
    await arena.start()
    before = await arena.records()
    killed_s = await arena.kill("verifier-0")
    engine_s = ready_s = 0.0
    while not ready_s:
        health = await asyncio.to_thread(ask, stack.url("verifier-0"))
        now_s = time.monotonic() - killed_s
        assert now_s < 4 * DEADLINE_S, health
        if (
            not engine_s
            and any("partition" in reason for reason in health.reasons)
            and len(health.reasons) == 1
        ):
            engine_s = now_s
        ready_s = now_s if health.ready else 0.0
    tell(f"the only verifier killed: engine back after {engine_s:.2f} s, partitions after {ready_s:.2f} s")
    await arena.ends_exactly("the only verifier killed", killed_s)
    for earlier, now in zip(before, await arena.records(), strict=True):
        assert now["epoch"] == earlier["epoch"] + 1
