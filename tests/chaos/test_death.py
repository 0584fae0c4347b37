"""Whatever dies in mid-stream, the client gets the tokens of the uninterrupted run: none lost, none repeated.

Services and brokers are processes of their own, killed with SIGKILL when a client has received so many tokens, and
started again as Kubernetes would. Each test prints how long the client had to wait for a token.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio

from shared.protocol import Tokens
from shared.stack.settings import StackSettings
from shared.stack.stack import Stack, StackOptions
from tests.chaos.clients import Answer, LiveStream
from tests.chaos.target import write_chaos_target
from tests.integration.tiny_target import random_prompt

pytestmark = [pytest.mark.stack, pytest.mark.engine, pytest.mark.kafka, pytest.mark.timeout(300)]

STREAMS = 3
MAX_TOKENS = 400
EARLY = 20
"""Tokens that every client has when something dies."""
LATER = 20
"""Tokens that come after, when a test waits for the stream to have gone on."""
DEADLINE_S = 60.0

Say = Callable[[str], None]


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Say:
    """Print a line that the run shows."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    return say


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tell: Say) -> Iterator[Stack]:
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
    with Stack(options, settings=StackSettings(run_dir=directory)) as stack:
        yield stack


@pytest.fixture(scope="module")
def truths() -> dict[Tokens, Answer]:
    """What the target says to each prompt when nothing dies."""
    return {}


@dataclass
class Arena:
    """The stack, clients of it, and what they should get."""

    stack: Stack
    http: httpx.AsyncClient
    clients: AsyncExitStack
    truths: dict[Tokens, Answer]
    tell: Say
    streams: list[LiveStream] = field(default_factory=list)

    @property
    def gateways(self) -> list[str]:
        return [part.url for part in self.stack.record.of("gateway")]

    # --- streams --------------------------------------------------------------------------------------

    async def truth(self, prompt: Tokens) -> Answer:
        """The answer of an undisturbed run."""
        if prompt not in self.truths:
            stream = await self.open(prompt)
            self.truths[prompt] = await stream.answer()
            assert len(self.truths[prompt].tokens) == MAX_TOKENS
        return self.truths[prompt]

    async def open(self, prompt: Tokens) -> LiveStream:
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

    async def start(self, count: int = STREAMS) -> list[LiveStream]:
        """So many streams, each of which has received its first tokens."""
        for prompt in prompts(count):
            await self.truth(prompt)
        self.streams = [await self.open(prompt) for prompt in prompts(count)]
        await asyncio.gather(*(stream.reached(EARLY) for stream in self.streams))
        return self.streams

    async def went_on(self, tokens: int = LATER) -> None:
        """Return when every stream has received more than it had."""
        counts = [stream.count for stream in self.streams]
        await asyncio.gather(
            *(
                stream.reached(min(MAX_TOKENS, had + tokens))
                for stream, had in zip(self.streams, counts, strict=True)
            )
        )

    async def ends_exactly(self, what: str, since_s: float) -> None:
        """Every stream's answer is that of the undisturbed run; tells how long a client waited at most."""
        answers = await asyncio.gather(*(stream.answer() for stream in self.streams))
        waits_s = [stream.longest_wait_s(since_s) for stream in self.streams]
        self.tell(
            f"{what}: next token after {max(waits_s):.2f} s (of {len(waits_s)} streams, least {min(waits_s):.2f} s)"
        )
        for prompt, answer in zip(prompts(len(answers)), answers, strict=True):
            assert answer == await self.truth(prompt)

    # --- the stack ------------------------------------------------------------------------------------

    async def kill(self, name: str) -> float:
        """SIGKILL to a part and its children; when that was."""
        at_s = time.monotonic()
        await asyncio.to_thread(self.stack.kill, name)
        return at_s

    def pid(self, name: str) -> int:
        pid = self.stack.pid(name)
        assert pid is not None
        return pid

    async def ready(self, *names: str) -> None:
        await asyncio.to_thread(self.stack.wait_ready, *names)

    async def record(self, stream: LiveStream) -> dict[str, Any]:
        """What kv-session knows of the stream's session."""
        answer = await self.http.get(f"{self.stack.url('kv-session-0')}/v1/sessions/{stream.session}")
        assert answer.status_code == 200, answer.text
        record: dict[str, Any] = answer.json()
        return record

    async def operate(self, path: str) -> None:
        """Ask kv-session's API for something."""
        answer = await self.http.post(f"{self.stack.url('kv-session-0')}/v1/{path}")
        assert answer.status_code == 200, answer.text

    async def holder(self, stream: LiveStream) -> str:
        """The verifier that holds the stream's KV."""
        return str((await self.record(stream))["owner"]).partition("/")[0]

    async def metric(self, name: str) -> float:
        """The sum of a metric over all verifiers."""
        total = 0.0
        for part in self.stack.record.of("verifier"):
            text = (await self.http.get(f"{part.url}/metrics")).text
            assert f"# TYPE {name.partition('{')[0]} " in text, f"{part.name} has no {name}"
            total += sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
        return total

    async def kv_is_held(self) -> bool:
        """Every stream's session has KV, by the verifiers' books and by their engines'."""
        return await self._held() == (len(self.streams), len(self.streams))

    async def kv_is_free(self) -> bool:
        """No session has any."""
        return await self._held() == (0, 0)

    async def _held(self) -> tuple[float, float]:
        return await self.metric("outrider_verifier_sessions"), await self.metric(
            "outrider_verifier_engine_sessions"
        )


def prompts(count: int) -> list[Tokens]:
    return [random_prompt(seed, 12) for seed in range(count)]


async def eventually(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not await holds():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        await asyncio.sleep(0.05)


@pytest_asyncio.fixture
async def arena(fleet: Stack, truths: dict[Tokens, Answer], tell: Say) -> AsyncIterator[Arena]:
    """The stack, all of it ready."""
    async with httpx.AsyncClient(timeout=DEADLINE_S) as http, AsyncExitStack() as clients:
        arena = Arena(fleet, http, clients, truths, tell)
        await arena.ready()
        yield arena


# --- one of a kind dies -------------------------------------------------------------------------------------------


async def test_kv_session_may_die_and_streams_do_not_wait_for_it(arena: Arena) -> None:
    await arena.start()
    killed_s = await arena.kill("kv-session-0")
    await arena.ends_exactly("kv-session killed", killed_s)


async def test_a_gateway_dies_and_its_clients_resume_at_another(arena: Arena) -> None:
    streams = await arena.start()
    killed_s = await arena.kill("gateway-0")
    for stream in streams:
        await stream.cut()
        stream.resume(arena.gateways[1])
    await arena.ends_exactly("gateway killed, clients resumed at another", killed_s)


async def test_kafka_dies_and_comes_back(arena: Arena) -> None:
    await arena.start()
    killed_s = await arena.kill("kafka")
    await arena.ends_exactly("Kafka killed", killed_s)


async def test_redis_dies_and_comes_back(arena: Arena) -> None:
    await arena.start()
    killed_s = await arena.kill("redis")
    await arena.ends_exactly("Redis killed", killed_s)


# --- clients and operators ----------------------------------------------------------------------------------------


async def test_a_client_that_hangs_up_frees_its_kv_at_once_and_may_resume(arena: Arena) -> None:
    streams = await arena.start()
    await eventually(arena.kv_is_held, "the KV is seen")
    left_s = time.monotonic()
    for stream in streams:
        await stream.leave()
    await eventually(arena.kv_is_free, "KV is freed")
    arena.tell(f"clients hung up: KV free after {time.monotonic() - left_s:.2f} s")
    resumed_s = time.monotonic()
    for stream, gateway in zip(streams, [*arena.gateways, *arena.gateways], strict=False):
        stream.resume(gateway)
    await arena.ends_exactly("clients resumed", resumed_s)


async def test_deleting_a_stream_frees_its_kv_and_ends_it(arena: Arena) -> None:
    (stream,) = await arena.start(1)
    await eventually(arena.kv_is_held, "the KV is seen")
    deleted_s = time.monotonic()
    answer = await arena.http.delete(f"{arena.gateways[1]}/v1/streams/{stream.session}")
    assert answer.status_code == 200, answer.text
    await eventually(arena.kv_is_free, "KV is freed")
    arena.tell(f"stream deleted: KV free after {time.monotonic() - deleted_s:.2f} s")
    with pytest.raises(AssertionError, match="session_not_found"):
        await stream.answer()


async def test_eviction_is_invisible_to_clients(arena: Arena) -> None:
    streams = await arena.start()
    evicted_s = time.monotonic()
    for stream in streams:
        await arena.operate(f"sessions/{stream.session}/evict")
    await arena.ends_exactly("evicted", evicted_s)
    assert await arena.metric('outrider_verifier_evictions_total{reason="asked"}') >= STREAMS


async def test_draining_a_verifier_moves_its_sessions_to_the_other(arena: Arena) -> None:
    (stream,) = await arena.start(1)
    before = await arena.record(stream)
    drained = str(before["verifier"])
    drained_s = time.monotonic()
    await arena.operate(f"verifiers/{drained}/drain")
    await arena.went_on()
    after = await arena.record(stream)
    await arena.ends_exactly("verifier drained", drained_s)
    await arena.operate(f"verifiers/{drained}/undrain")
    assert after["verifier"] != drained
    assert after["epoch"] > before["epoch"]


# --- one of two verifiers -----------------------------------------------------------------------------------------


async def test_a_verifier_that_hangs_loses_its_sessions_and_never_extends_them_again(arena: Arena) -> None:
    streams = await arena.start()
    hung = await arena.holder(streams[0])
    stopped_s = time.monotonic()
    arena.stack.kill(hung, signal.SIGSTOP)
    try:
        await arena.went_on()
        taken = [await arena.record(stream) for stream in streams]
    finally:
        arena.stack.kill(hung, signal.SIGCONT)
    await arena.ends_exactly("verifier hung", stopped_s)
    for stream, before in zip(streams, taken, strict=True):
        assert before["verifier"] != hung
        assert (await arena.record(stream))["epoch"] == before["epoch"], (
            "the verifier that hung took a session back"
        )
    assert arena.stack.restarts(hung) == 0


async def test_a_verifier_that_is_asked_to_stop_hands_its_sessions_over(arena: Arena) -> None:
    streams = await arena.start()
    stopped = await arena.holder(streams[0])
    stopped_s = time.monotonic()
    os.kill(arena.pid(stopped), signal.SIGTERM)
    await arena.ends_exactly("verifier stopped", stopped_s)


async def test_a_verifier_dies_with_its_engine_and_the_other_takes_its_sessions_over(arena: Arena) -> None:
    streams = await arena.start()
    before = [await arena.record(stream) for stream in streams]
    dying = await arena.holder(streams[0])
    pid = arena.pid(dying)
    children = psutil.Process(pid).children(recursive=True)
    assert children
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)  # it alone, as the kernel does when memory runs out
    _, left = await asyncio.to_thread(psutil.wait_procs, children, 10)
    assert not left, "processes outlive their verifier"
    arena.tell(
        f"verifier killed: its {len(children)} processes gone after {time.monotonic() - killed_s:.2f} s"
    )
    await arena.went_on()
    for stream, earlier in zip(streams, before, strict=True):
        now = await arena.record(stream)
        moved = str(earlier["owner"]).startswith(f"{dying}/")
        assert (now["epoch"] > earlier["epoch"]) == moved
    await arena.ends_exactly("one verifier of two killed", killed_s)
