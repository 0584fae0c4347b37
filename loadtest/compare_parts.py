"""What the comparison runs: one cloud, a delaying proxy before all that it serves, and gateways at the edge.

The round trip of the proxies changes between runs while everything stays up. With two cores or more, what holds a target
has the first to itself and all else shares the second: one core for the cloud's model, one for the edge.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

import httpx
import psutil

from loadtest.compare_clients import GatewayReader, Reader, StockReader, TurnsReader
from loadtest.compare_modes import STOCK, Place
from loadtest.delay_process import DelayProcess
from loadtest.export_draft import export_draft
from services.draft_gateway.link.channel import LEAST_S
from shared.errors import Unavailable
from shared.heap import leave_alone
from shared.stack.delay import Conditions
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
    """What to bring up: the target, and the places that modes ask. vLLM's own modes speculate `speculate` tokens.

    `verifier` is a module of ours that runs in the place of the stack's own verifier; with `replayed` it comes up with the
    gateways at the edge (`Parts.start_edges`), since it reads what was asked for before. At each place at the edge are
    `edges` gateways, which link to the `gateways` in the cloud in turn, and answer in turn. `timeline` is a folder for what
    tells where the time of rounds goes. `environment` is for all services, `stock_options` for vLLM as it comes. Without
    `pinned` no process is kept to one core.
    """

    target: Path
    places: frozenset[Place]
    speculate: int = 5
    jitter_ms: float = 0.0
    replayed: bool = False
    timeline: str = ""
    verifier: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    edges: int = 1
    gateways: int = 1
    stock_options: tuple[str, ...] = ()
    pinned: bool = True


@dataclass(slots=True)
class Served:
    """One place that answers: its reader, the proxies before it, the process that holds its target, and of gateways at the
    edge where each is and its process."""

    reader: Reader
    proxies: tuple[DelayProcess, ...]
    target: int
    edges: Mapping[str, int] = field(default_factory=dict)


class Carried(NamedTuple):
    """Bytes of payload: what rounds sent up and down, and what else went up, which is mostly prompts."""

    up: int
    down: int
    opening: int

    def since(self, before: Carried) -> Carried:
        """What has been added."""
        return Carried(*(now - then for now, then in zip(self, before, strict=True)))


def _counted(text: str, way: str, part: str) -> int:
    """The link's bytes at the edge's end, in a page of metrics."""
    wanted = ('end="edge"', f'direction="{way}"', f'part="{part}"')
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in text.splitlines()
        if line.startswith(BYTES) and all(label in line for label in wanted)
    )


class Parts:
    """Everything, from entering to leaving."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.places: Final[dict[Place, Served]] = {}
        self.pinned = False
        self._folder = folder
        self._wanted = wanted
        self._exits = AsyncExitStack()
        self._processes: list[ManagedProcess] = []
        self._proxies: list[DelayProcess] = []
        self._used: set[int] = set()
        self._stack: Stack | None = None
        self._verifiers: dict[Place, tuple[ManagedProcess, str]] = {}
        """Those that stand in for the stack's, by the place that they serve; the edge's serves all that has none."""

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
        """Have every proxy delay by so much from now on; returns when what was on its way is through, and links no longer
        take what is usual now for a delay by queues."""
        before_ms = max((proxy.conditions.rtt_ms for proxy in self._proxies), default=0.0)
        for proxy in self._proxies:
            await proxy.become(Conditions(rtt_ms, min(self._wanted.jitter_ms, rtt_ms), seed=seed))
        await asyncio.sleep((before_ms + rtt_ms) / 1000 + (LEAST_S if before_ms != rtt_ms else 0.0))

    async def link_bytes(self, place: Place) -> Carried:
        """Payload so far, as the sockets at the edge count it. All that goes up to stock vLLM is the request."""
        served = self.places[place]
        if not served.edges:
            counts = [await proxy.counts() for proxy in served.proxies]
            return Carried(0, sum(each.down for each in counts), sum(each.up for each in counts))
        pages = [(await self._http.get(f"{url}/metrics", follow_redirects=True)).text for url in served.edges]
        return Carried(
            *(
                sum(_counted(page, way, part) for page in pages)
                for way, part in (("up", "rounds"), ("down", "rounds"), ("up", "rest"))
            )
        )

    async def verifier_metrics(self) -> str:
        """The page of metrics of the verifier that stands in for the stack's."""
        _, url = self._verifiers[Place.EDGE]
        return (await self._http.get(f"{url}/metrics", follow_redirects=True)).text

    def cpu_ms(self, place: Place) -> float:
        """What the processes that hold the target have computed so far."""
        return sum(map(_cpu_s, _family(self.places[place].target))) * 1000

    def cpu_s(self, place: Place) -> dict[str, float]:
        """CPU seconds so far of every kind of process that has a part in the place's answers.

        `server` holds the target of vLLM as it comes, `verifier` ours; `engine` is the engine process of either, and
        `clients` is this process.
        """
        served = self.places[place]
        server, engine = (family := _family(served.target))[:1], family[1:]
        kinds = {
            "verifier" if served.edges else "server": server,
            "engine": engine,
            "proxies": [each for proxy in served.proxies for each in _family(proxy.pid)],
            "clients": [psutil.Process()],
        }
        if served.edges and self._stack is not None:
            kinds["edges"] = [each for pid in served.edges.values() for each in _family(pid)]
            for part in self._stack.record.parts:
                if part.process is not None and part.kind != "verifier":
                    kinds.setdefault(part.kind, []).extend(_family(part.process.pid))
        return {kind: sum(map(_cpu_s, processes)) for kind, processes in kinds.items()}

    # --- up -------------------------------------------------------------------------------------------------------

    async def _up(self) -> None:
        """vLLM as it comes, and all of Outrider's cloud, at the same time."""
        wanted = self._wanted
        self._http = await self._exits.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False))
        stock = {place: self._stock(place) for place in STOCK if place in wanted.places}
        if self._edges:
            await self._cloud()
            if wanted.verifier and not wanted.replayed:
                self._start_verifier(Place.EDGE, {})
        stops = await asyncio.to_thread(stop_tokens, wanted.target)
        for place, (process, port) in stock.items():
            await until(process, partial(says_ready, process.log), START_S)
            proxy = await self._proxy(port)
            reader = StockReader(proxy.port, stops)
            self._exits.callback(reader.close)
            assert process.pid is not None
            self.places[place] = Served(reader, (proxy,), process.pid)
        await self._verifiers_ready()

    @property
    def _edges(self) -> list[Place]:
        return [place for place in Place if place not in STOCK and place in self._wanted.places]

    async def start_edges(
        self,
        drafts: Mapping[Place, str],
        replay_environments: Mapping[Place, Mapping[str, str]] | None = None,
    ) -> None:
        """Bring up the gateways at the edge, and give everything its core. A draft may read answers that had to be asked
        for first; so may the verifiers that replay, by `replay_environments`: one for each of these places, and that of
        `Place.EDGE` for the others."""
        if self._stack is not None:
            stack = self._stack
            for place, environment in (replay_environments or {}).items():
                self._start_verifier(place, environment)
            await self._verifiers_ready()
            links = [
                await self._proxy(int(part.url.rpartition(":")[2])) for part in stack.record.of("gateway")
            ]
            for place in self._edges:
                await self._serve_at(stack, place, drafts[place], tuple(links))
        leave_alone()
        self.pinned = self._wanted.pinned and self._pin()

    def _start(
        self, name: str, command: Iterable[str], environment: Mapping[str, str] | None = None
    ) -> ManagedProcess:
        process = module_process(name, command, self._folder / f"{name}.log", environment)
        self._processes.append(process)
        self._exits.callback(process.stop)
        return process

    async def _proxy(self, port: int) -> DelayProcess:
        proxy = await self._exits.enter_async_context(DelayProcess((HOST, port), Conditions()))
        self._proxies.append(proxy)
        return proxy

    def _port(self) -> int:
        port = free_port(self._used)
        self._used.add(port)
        return port

    def _stock(self, place: Place) -> tuple[ManagedProcess, int]:
        port = self._port()
        command = ["loadtest.stock_server", "--model", str(self._wanted.target), "--port", str(port)]
        command += self._wanted.stock_options
        if place is not Place.STOCK:
            command += ["--speculate", str(self._wanted.speculate)]
        if place is Place.DRAFT:
            exported = self._folder / "draft"
            export_draft(self._wanted.target, exported)
            command += ["--draft", str(exported)]
        return self._start(place.value, command), port

    async def _cloud(self) -> None:
        options = StackOptions(
            target=self._wanted.target,
            draft="lookup",
            gateways=self._wanted.gateways,
            verifiers=0 if self._wanted.verifier else 1,
            environment={"OUTRIDER_TIMELINE": self._wanted.timeline, **self._wanted.environment},
            die_with_parent=True,
        )
        self._stack = Stack(options, settings=StackSettings(run_dir=self._folder / "stack"))
        self._exits.callback(self._stack.down)
        await asyncio.to_thread(self._stack.up)

    async def _serve_at(
        self, stack: Stack, place: Place, draft: str, links: tuple[DelayProcess, ...]
    ) -> None:
        """Start the place's gateways at the edge, all at once, and wait for them."""
        own = self._verifiers.get(place) or self._verifiers.get(Place.EDGE)
        verifier = own[0].pid if own is not None else stack.pid("verifier-0")
        if verifier is None:
            raise Unavailable("the verifier has no process")
        model = self._model(stack, place)
        names = [
            f"edge-{place.value}" + (f"-{number}" if number else "") for number in range(self._wanted.edges)
        ]
        started = [
            self._edge(name, model, draft, links[number % len(links)]) for number, name in enumerate(names)
        ]
        for process, url in started:
            await until(process, partial(_is_ready, url), START_S)
        readers = [GatewayReader(url, model, self._http) for _, url in started]
        edges = {url: process.pid for process, url in started if process.pid is not None}
        reader = readers[0] if len(readers) == 1 else TurnsReader(readers)
        self.places[place] = Served(reader, links, verifier, edges)

    @staticmethod
    def _model(stack: Stack, place: Place) -> str:
        """The name of the model that a place serves: a target of its own has a name of its own."""
        return f"{stack.model_name}-{place.value}" if place is Place.HEADLESS else stack.model_name

    def _edge(self, name: str, model: str, draft: str, link: DelayProcess) -> tuple[ManagedProcess, str]:
        port = self._port()
        environment = {
            **self._wanted.environment,
            "OUTRIDER_MODEL": str(self._wanted.target),
            "OUTRIDER_MODEL_NAME": model,
            "OUTRIDER_DRAFT": draft,
            "OUTRIDER_UPLINK": "link",
            "OUTRIDER_TIMELINE": self._wanted.timeline,
            "OUTRIDER_LINK": f"ws://{HOST}:{link.port}/v1/link",
            "OUTRIDER_GATEWAY_NAME": name,
            "OUTRIDER_GATEWAY_HOST": HOST,
            "OUTRIDER_GATEWAY_PORT": str(port),
        }
        return self._start(name, ["services.draft_gateway"], environment), f"http://{HOST}:{port}"

    def _start_verifier(self, place: Place, environment: Mapping[str, str]) -> None:
        assert self._stack is not None
        port = self._port()
        own = {} if place is Place.EDGE else {"OUTRIDER_VERIFIER_NAME": f"verifier-{place.value}"}
        self._verifiers[place] = (
            self._start(
                own.get("OUTRIDER_VERIFIER_NAME", "verifier"),
                [self._wanted.verifier],
                {
                    **self._wanted.environment,
                    **own,
                    "OUTRIDER_MODEL": str(self._wanted.target),
                    "OUTRIDER_MODEL_NAME": self._model(self._stack, place),
                    "OUTRIDER_TIMELINE": self._wanted.timeline,
                    "OUTRIDER_KAFKA": self._stack.kafka,
                    "OUTRIDER_REDIS_URL": self._stack.redis_url,
                    "OUTRIDER_VERIFIER_HOST": HOST,
                    "OUTRIDER_VERIFIER_PORT": str(port),
                    **environment,
                },
            ),
            f"http://{HOST}:{port}",
        )

    async def _verifiers_ready(self) -> None:
        """Wait for the verifiers that stand in for the stack's."""
        for process, url in self._verifiers.values():
            await until(process, partial(_is_ready, url), START_S)

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


def on_cuda() -> bool:
    """Whether the vLLM that is installed computes on CUDA."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def device_name() -> str:
    """What vLLM computes on."""
    if on_cuda():
        import torch

        return str(torch.cuda.get_device_name())
    return cpu_name()


def cpu_name() -> str:
    """The processor's name."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return model
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)


def module_process(
    name: str, command: Iterable[str], log: Path, environment: Mapping[str, str] | None = None
) -> ManagedProcess:
    """A module of ours as a process that ends with this one, started: `command` is the module and its arguments."""
    process = ManagedProcess(
        name,
        [sys.executable, "-m", *command],
        log,
        {"PYTHONUNBUFFERED": "1", **(environment or {})},
        die_with_parent=True,
    )
    process.start()
    return process


async def until(process: ManagedProcess, holds: Ready, timeout_s: float) -> None:
    """Return when `holds`; `StackError` with the end of its log when the process ends before, or it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not await asyncio.to_thread(holds):
        if not process.running or time.monotonic() > deadline_s:
            if await asyncio.to_thread(holds):  # it may have ended because it is done
                return
            raise process.fail("did not come up" if process.running else "has ended")
        await asyncio.sleep(0.1)


def says_ready(log: Path) -> bool:
    """Whether a process has printed `ready`."""
    return "ready" in log.read_text(errors="replace").splitlines()


def _is_ready(url: str) -> bool:
    return ask(url).ready


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process so far, 0 when it has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _set_core(pid: int, core: int) -> None:
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            os.sched_setaffinity(int(thread), {core})
