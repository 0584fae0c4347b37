"""What the comparison runs: one cloud, a delaying proxy before all that it serves, and gateways at the edge.

The proxies run in this process, so that the round trip changes between runs while everything stays up. With two cores
or more, what holds a target has the first to itself and all else shares the second: one core for the cloud's model, one
for the edge.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx
import psutil

from loadtest.compare_clients import GatewayReader, Reader, StockReader
from loadtest.compare_modes import Place
from shared.errors import Unavailable
from shared.stack.delay import Conditions, DelayProxy
from shared.stack.health import ask
from shared.stack.ports import HOST, free_port
from shared.stack.processes import ManagedProcess
from shared.stack.settings import StackSettings
from shared.stack.stack import Stack, StackOptions

START_S: Final = 240.0
TARGET_CORE: Final = 0
OTHER_CORE: Final = 1
BYTES: Final = "outrider_link_bytes_total"

Ready = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to bring up: the target, the places that modes ask, the drafts of the gateways at the edge.

    `verifier` is the module of the process that verifies and `verifier_environment` what it reads beside the usual.
    """

    target: Path
    places: frozenset[Place]
    drafts: Mapping[Place, str]
    ngram: int = 5
    jitter_ms: float = 0.0
    verifier: str | None = None
    verifier_environment: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Served:
    """One place that answers: its reader, the proxy before it, the process that holds its target."""

    reader: Reader
    proxy: DelayProxy
    target: int
    metrics_url: str = ""


class Parts:
    """Everything, from entering to leaving."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.places: Final[dict[Place, Served]] = {}
        self.pinned = False
        self._folder = folder
        self._wanted = wanted
        self._exits = AsyncExitStack()
        self._processes: list[ManagedProcess] = []
        self._used: set[int] = set()

    async def __aenter__(self) -> Self:
        try:
            await self._up()
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    # --- while it runs --------------------------------------------------------------------------------------------

    async def set_round_trip(self, rtt_ms: float, seed: int = 0) -> None:
        """Have every proxy delay by so much from now on; returns when what was on its way is through."""
        before_ms = max((served.proxy.conditions.rtt_ms for served in self.places.values()), default=0.0)
        for served in self.places.values():
            served.proxy.conditions = Conditions(rtt_ms, min(self._wanted.jitter_ms, rtt_ms), seed=seed)
        await asyncio.sleep((before_ms + rtt_ms) / 1000)

    async def link_bytes(self, place: Place) -> tuple[int, int]:
        """Payload so far, up and down, as the socket at the edge counts it."""
        served = self.places[place]
        if not served.metrics_url:
            return served.proxy.counts.up, served.proxy.counts.down
        text = (await self._http.get(served.metrics_url, follow_redirects=True)).text
        counted = dict.fromkeys(("up", "down"), 0)
        for line in text.splitlines():
            if line.startswith(BYTES) and 'end="edge"' in line:
                for way in counted:
                    if f'direction="{way}"' in line:
                        counted[way] = int(float(line.rpartition(" ")[2]))
        return counted["up"], counted["down"]

    def cpu_ms(self, place: Place) -> float:
        """What the processes that hold the target have computed so far."""
        total_s = 0.0
        for process in _family(self.places[place].target):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total_s += times.user + times.system
        return total_s * 1000

    # --- up -------------------------------------------------------------------------------------------------------

    async def _up(self) -> None:
        wanted = self._wanted
        self._http = await self._exits.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False))
        stock = {place: self._stock(place) for place in (Place.STOCK, Place.NGRAM) if place in wanted.places}
        edges = [place for place in (Place.EDGE, Place.WRONG) if place in wanted.places]
        if edges:
            await self._outrider(edges)
        for place, (process, port) in stock.items():
            await self._wait(process, partial(_says_ready, process.log))
            proxy = await self._proxy(port)
            reader = StockReader(proxy.port, await asyncio.to_thread(stop_tokens, wanted.target))
            self._exits.callback(reader.close)
            assert process.pid is not None
            self.places[place] = Served(reader, proxy, process.pid)
        self.pinned = self._pin()

    def _start(
        self, name: str, command: Iterable[str], environment: Mapping[str, str] | None = None
    ) -> ManagedProcess:
        process = ManagedProcess(
            name,
            [sys.executable, "-m", *command],
            self._folder / f"{name}.log",
            {"PYTHONUNBUFFERED": "1", **(environment or {})},
            die_with_parent=True,
        )
        process.start()
        self._processes.append(process)
        self._exits.callback(process.stop)
        return process

    async def _wait(self, process: ManagedProcess, answers: Ready) -> None:
        deadline_s = time.monotonic() + START_S
        while not await asyncio.to_thread(answers):
            if not process.running or time.monotonic() > deadline_s:
                raise process.fail("did not come up")
            await asyncio.sleep(0.1)

    async def _proxy(self, port: int) -> DelayProxy:
        return await self._exits.enter_async_context(DelayProxy((HOST, port), Conditions()))

    def _port(self) -> int:
        port = free_port(self._used)
        self._used.add(port)
        return port

    def _stock(self, place: Place) -> tuple[ManagedProcess, int]:
        port = self._port()
        command = ["loadtest.stock_server", "--model", str(self._wanted.target), "--port", str(port)]
        if place is Place.NGRAM:
            command += ["--ngram", str(self._wanted.ngram)]
        return self._start(place.value, command), port

    async def _outrider(self, edges: Iterable[Place]) -> None:
        wanted = self._wanted
        stack = Stack(
            StackOptions(
                target=wanted.target,
                draft="lookup",
                verifiers=0 if wanted.verifier else 1,
                die_with_parent=True,
                environment=wanted.environment,
            ),
            settings=StackSettings(run_dir=self._folder / "stack"),
        )
        await asyncio.to_thread(stack.up)
        self._exits.callback(stack.down)
        gateway = int(stack.gateway_url.rpartition(":")[2])
        verifier = stack.pid("verifier-0") if wanted.verifier is None else await self._verifier(stack)
        if verifier is None:
            raise Unavailable("the verifier has no process")
        proxy = await self._proxy(gateway)
        for place in edges:
            port = self._port()
            name = f"edge-{place.value}"
            environment = {
                **wanted.environment,
                "OUTRIDER_MODEL": str(wanted.target),
                "OUTRIDER_DRAFT": wanted.drafts[place],
                "OUTRIDER_UPLINK": "link",
                "OUTRIDER_LINK": f"ws://{HOST}:{proxy.port}/v1/link",
                "OUTRIDER_GATEWAY_NAME": name,
                "OUTRIDER_GATEWAY_HOST": HOST,
                "OUTRIDER_GATEWAY_PORT": str(port),
            }
            process = self._start(name, ["services.draft_gateway"], environment)
            url = f"http://{HOST}:{port}"
            await self._wait(process, partial(_is_ready, url))
            reader = GatewayReader(url, stack.model_name, self._http)
            self.places[place] = Served(reader, proxy, verifier, f"{url}/metrics")

    async def _verifier(self, stack: Stack) -> int | None:
        wanted, port = self._wanted, self._port()
        assert wanted.verifier is not None
        environment = {
            "OUTRIDER_MODEL": str(wanted.target),
            "OUTRIDER_KAFKA": stack.kafka,
            "OUTRIDER_REDIS_URL": stack.redis_url,
            "OUTRIDER_VERIFIER_HOST": HOST,
            "OUTRIDER_VERIFIER_PORT": str(port),
            **wanted.environment,
            **wanted.verifier_environment,
        }
        process = self._start("verifier", [wanted.verifier], environment)
        await self._wait(process, partial(_is_ready, f"http://{HOST}:{port}"))
        return process.pid

    # --- cores ----------------------------------------------------------------------------------------------------

    def _pin(self) -> bool:
        """Give the targets a core and all else another; False where that can't be had."""
        if not hasattr(os, "sched_setaffinity") or not {TARGET_CORE, OTHER_CORE} <= os.sched_getaffinity(0):
            return False
        for process in _family(os.getpid()):
            _set_core(process.pid, OTHER_CORE)
        for served in self.places.values():
            for process in _family(served.target):
                _set_core(process.pid, TARGET_CORE)
        return True


def stop_tokens(target: Path) -> frozenset[int]:
    """The tokens that end the target's answers."""
    from shared.text import Tokenizer

    return Tokenizer.load(target).stop_tokens


def _says_ready(log: Path) -> bool:
    return "ready" in log.read_text(errors="replace").splitlines()


def _is_ready(url: str) -> bool:
    return ask(url).ready


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _set_core(pid: int, core: int) -> None:
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            os.sched_setaffinity(int(thread), {core})
