"""The whole of Outrider on one machine: brokers and services as processes of their own, started, watched and stopped.

    with Stack(StackOptions(target=directory)) as stack:
        ...  # stack.gateway_url

`Stack` belongs to who starts it. What it does is written down in `stack.json` (see `record.py`), so that a stack may be
left running and stopped by somebody else. It kills only what it started. With `supervise` it does what Kubernetes does
for the same services elsewhere: what has died is started again, soon the first time, ever later after that.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from signal import SIGKILL, Signals
from types import TracebackType
from typing import Final, Self

from shared.settings import KafkaFlavor
from shared.stack import record as records
from shared.stack.health import NO_ANSWER, Health, ask
from shared.stack.kafka import Broker, find_kafka
from shared.stack.ports import HOST, free_port, preferred_port
from shared.stack.processes import ManagedProcess, StackError
from shared.stack.record import KAFKA, LINK, REDIS, SERVICE_GRACE_S, Part, StackRecord
from shared.stack.redis import RedisServer, find_redis
from shared.stack.server import START_S, Server
from shared.stack.settings import StackSettings

POLL_S: Final = 0.1
READY_S: Final = 240.0
FIRST_BACKOFF_S: Final = 0.5
LONGEST_BACKOFF_S: Final = 30.0
STEADY_S: Final = 30.0
"""A process that has run for so long counts as healthy again: its next restart is at once."""

logger = logging.getLogger(__name__)


class StackRunning(StackError):
    """There is a stack in this run directory, and it is well."""

    code = "stack_running"


class State(StrEnum):
    """What is told of a part while the stack comes up."""

    STARTING = "starting"
    WAITING = "waiting"
    READY = "ready"
    DIED = "died"
    RESTARTED = "restarted"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Progress:
    """One thing that happened to one part, `seconds` after the stack began to come up (or to go down)."""

    part: str
    state: State
    text: str
    seconds: float


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What to start.

    `kafka` and `redis` are addresses of ones that run already; without, embedded ones are started, which keep their
    data in the run directory unless `fresh`. `environment` goes to every service, `service_environment` to those of a
    kind ("gateway") or name ("gateway-1"). `gateway_port` is the first gateway's, where it is free; all others are
    free ports. With `die_with_parent` nothing outlives the process that holds the `Stack`.

    With `rtt_ms` there are two places: the gateways are in the cloud, one more (of the kind "edge") is at the edge and
    linked to them through proxies that delay what passes; clients go to that one, and `gateway_port` is its.
    """

    target: Path
    draft: str = "hybrid"
    kafka: str | None = None
    kafka_flavor: KafkaFlavor = KafkaFlavor.APACHE
    redis: str | None = None
    gateways: int = 1
    verifiers: int = 1
    kv_sessions: int = 1
    gateway_port: int = 0
    rtt_ms: float | None = None
    jitter_ms: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    service_environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    supervise: bool = False
    die_with_parent: bool = False
    fresh: bool = False
    ready_s: float = READY_S


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of service: its module, and how its settings begin (`OUTRIDER_GATEWAY_NAME`, `…_PORT`)."""

    name: str
    module: str
    prefix: str


KV_SESSION: Final = Kind("kv-session", "services.kv_session", "KV_SESSION")
VERIFIER: Final = Kind("verifier", "services.verifier", "VERIFIER")
GATEWAY: Final = Kind("gateway", "services.draft_gateway", "GATEWAY")
EDGE: Final = Kind("edge", "services.draft_gateway", "GATEWAY")
KINDS: Final = (KV_SESSION, VERIFIER, GATEWAY)


@dataclass(slots=True)
class _Kept:
    """A process of ours and how it fares. `wanted`: it should run, so that its death is one."""

    part: Part
    process: ManagedProcess
    wanted: bool = True
    failures: int = 0
    started_s: float = 0.0
    next_start_s: float | None = None


@dataclass(slots=True)
class _Clock:
    began_s: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began_s


class Stack:
    """One stack in one run directory. Methods block; they may be called from any thread."""

    def __init__(
        self,
        options: StackOptions,
        *,
        settings: StackSettings | None = None,
        report: Report = lambda progress: None,
    ) -> None:
        self.options = options
        self.settings = settings or StackSettings()
        self.run_dir = self.settings.run_dir.resolve()
        self._report = report
        self._kept: dict[str, _Kept] = {}
        self._servers: dict[str, Server] = {}
        self._given: list[Part] = []
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._watch: threading.Thread | None = None
        # `die_with_parent` is about the thread that starts a process: this one lives as long as the stack.
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="stack-spawner")
        self._clock = _Clock()

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # --- up and down ----------------------------------------------------------------------------------------------

    def up(self) -> Self:
        """Start everything and return when all is ready; if that fails nothing is left running.

        What a stack that has died left behind here is stopped first. Raises `StackError` when a stack runs here already
        or a part doesn't come up, with the end of its log; `BrokerUnavailable` or `StoreUnavailable` when one that was
        given doesn't answer.
        """
        with records.locked(self.run_dir):
            self._clear_up()
            self._clock = _Clock()
            try:
                kafka, redis = self._start_brokers()
                self._start_services(kafka, redis)
                self.wait_ready()
            except BaseException:
                self._stop_all()
                raise
        if self.options.supervise:
            self._watch = threading.Thread(target=self._supervise, name="stack-supervisor", daemon=True)
            self._watch.start()
        return self

    def down(self) -> None:
        """Stop all that this stack started. May be called twice."""
        self._clock = _Clock()
        self._stopping.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        with records.locked(self.run_dir):
            self._stop_all()

    def wait_ready(self, *names: str, timeout_s: float | None = None) -> None:
        """Return when the services named (all, if none is) are ready. Raises `StackError` with what they lack."""
        services = names or [part.name for part in self.record.parts if part.is_service]
        waiting = dict.fromkeys(services, NO_ANSWER)
        deadline_s = time.monotonic() + (timeout_s or self.options.ready_s)
        while waiting:
            for name in list(waiting):
                health = self._health(name)
                if health.ready:
                    self._tell(name, State.READY, "; ".join(health.notes))
                    del waiting[name]
                elif (reasons := "; ".join(health.reasons)) != waiting[name]:
                    self._tell(name, State.WAITING, reasons)
                    waiting[name] = reasons
            if waiting and time.monotonic() >= deadline_s:
                name, reasons = next(iter(waiting.items()))
                raise self._kept[name].process.fail(f"is not ready in time: {reasons}")
            if waiting:
                time.sleep(POLL_S)

    # --- one part -------------------------------------------------------------------------------------------------

    def kill(self, name: str, number: Signals = SIGKILL) -> None:
        """Send a part a signal, as a fault would; after SIGKILL, return when it has ended. `supervise` restarts it."""
        self._of(name).process.kill(number)

    def stop(self, name: str) -> None:
        """Stop a part in its own order; it stays stopped until `start`."""
        kept = self._of(name)
        with self._lock:
            kept.wanted = False
        kept.process.stop()

    def start(self, name: str, *, wait: bool = True) -> None:
        """Start a part that has ended, at its old address; return when it is ready."""
        kept = self._of(name)
        with self._lock:
            kept.wanted = True
            if not kept.process.running:
                self._spawn(kept)
        if wait and kept.part.is_service:
            self.wait_ready(name)
        elif wait and name in self._servers:
            kept.process.wait_until(self._servers[name].answers, START_S)

    def restart(self, name: str, *, wait: bool = True) -> None:
        """Stop a part in its own order and start it again."""
        self.stop(name)
        self.start(name, wait=wait)

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def record(self) -> StackRecord:
        """The stack as it is now."""
        with self._lock:
            keeper = records.this_process() if self.options.supervise else None
            parts = (*self._given, *(kept.part for kept in self._kept.values()))
            return StackRecord(keeper, self.model_name, tuple(sorted(parts, key=_order)))

    @property
    def model_name(self) -> str:
        """The target's name towards clients."""
        name = "OUTRIDER_MODEL_NAME"
        return self.options.environment.get(name) or os.environ.get(name) or self.options.target.name

    @property
    def gateway_url(self) -> str:
        """Where clients go."""
        return self.record.gateway_url

    @property
    def kafka(self) -> str:
        """Kafka's bootstrap address."""
        return self.record.of(KAFKA)[0].url

    @property
    def redis_url(self) -> str:
        """Redis' URL."""
        return self.record.of(REDIS)[0].url

    def url(self, name: str) -> str:
        """Where a part is."""
        return next(part.url for part in self.record.parts if part.name == name)

    def pid(self, name: str) -> int | None:
        """The pid of a part's process, the last one if it has ended."""
        return self._of(name).process.pid

    def restarts(self, name: str) -> int:
        """How often a part was started again after it had died."""
        return self._of(name).part.restarts

    def log(self, name: str) -> Path:
        """Where a part's output goes."""
        return self._of(name).process.log

    # --- starting -------------------------------------------------------------------------------------------------

    def _clear_up(self) -> None:
        """Stop what a stack that died left here."""
        earlier = records.read(self.run_dir)
        if earlier is None:
            return
        if earlier.running:
            raise StackRunning(
                f"a stack runs in {self.run_dir} already; stop it (outrider down) or name another run directory"
            )
        self._tell("stack", State.STOPPED, "stopping what an earlier stack left behind")
        earlier.stop()
        records.forget(self.run_dir)

    def _start_brokers(self) -> tuple[Broker, RedisServer]:
        options, logs = self.options, self.run_dir / "logs"
        if options.fresh:
            for name in (KAFKA, REDIS):
                shutil.rmtree(self.run_dir / name, ignore_errors=True)
        kafka = find_kafka(
            self.run_dir / KAFKA,
            address=options.kafka,
            flavor=options.kafka_flavor,
            settings=self.settings,
            log=logs / "kafka.log",
            die_with_parent=options.die_with_parent,
            say=lambda text: self._tell(KAFKA, State.STARTING, text),
        )
        redis = find_redis(
            self.run_dir / REDIS,
            url=options.redis,
            log=logs / "redis.log",
            die_with_parent=options.die_with_parent,
        )
        self._start_server(redis, Part(REDIS, REDIS, redis.url, redis.source))
        self._start_server(kafka, Part(KAFKA, KAFKA, kafka.bootstrap, kafka.source))
        return kafka, redis

    def _start_server(self, server: Server, part: Part) -> None:
        self._tell(part.name, State.STARTING, server.source)
        if server.process is None:
            server.start()
            self._given.append(part)
        else:
            server.prepare()
            self._servers[part.name] = server
            self._launch(part, server.process)
            server.process.wait_until(server.answers, START_S)
        self._tell(part.name, State.READY, part.url)

    def _start_services(self, kafka: Broker, redis: RedisServer) -> None:
        options = self.options
        common = {
            "OUTRIDER_MODEL": str(options.target.resolve()),
            "OUTRIDER_DRAFT": options.draft,
            "PYTHONUNBUFFERED": "1",
        }
        cloud = {
            **common,
            "OUTRIDER_KAFKA": kafka.bootstrap,
            "OUTRIDER_KAFKA_FLAVOR": kafka.flavor.value,
            "OUTRIDER_REDIS_URL": redis.url,
            "OUTRIDER_UPLINK": "kafka",
        }
        counts = {KV_SESSION: options.kv_sessions, VERIFIER: options.verifiers, GATEWAY: options.gateways}
        used: set[int] = set()
        clients_come_in = EDGE if options.rtt_ms is not None else GATEWAY
        gateways: list[int] = []
        for kind in KINDS:
            for number in range(counts[kind]):
                port = self._port(used, for_clients=kind is clients_come_in and number == 0)
                if kind is GATEWAY:
                    gateways.append(port)
                self._start_service(kind, number, port, cloud)
        if options.rtt_ms is not None:
            links = ",".join(self._start_link(number, port, used) for number, port in enumerate(gateways))
            linked = {**common, "OUTRIDER_UPLINK": "link", "OUTRIDER_LINK": links}
            self._start_service(EDGE, 0, self._port(used, for_clients=True), linked)

    def _port(self, used: set[int], *, for_clients: bool = False) -> int:
        wanted = self.options.gateway_port
        port = preferred_port(wanted, used) if for_clients and wanted else free_port(used)
        used.add(port)
        return port

    def _start_link(self, number: int, gateway_port: int, used: set[int]) -> str:
        """Put a wide-area link before a gateway; its URL."""
        name, options, port = f"{LINK}-{number}", self.options, self._port(used)
        command = [
            sys.executable, "-m", "shared.stack.delay",
            "--listen", str(port), "--to", f"{HOST}:{gateway_port}",
            "--rtt", str(options.rtt_ms), "--jitter", str(options.jitter_ms),
        ]  # fmt: skip
        process = ManagedProcess(
            name,
            command,
            self.run_dir / "logs" / f"{name}.log",
            die_with_parent=options.die_with_parent,
            grace_s=SERVICE_GRACE_S,
        )
        jitter = f" ± {options.jitter_ms:g}" if options.jitter_ms else ""
        part = Part(
            name,
            LINK,
            f"ws://{HOST}:{port}/v1/link",
            f"{options.rtt_ms:g}{jitter} ms round trip to {GATEWAY.name}-{number}",
        )
        self._tell(name, State.STARTING, part.source)
        self._launch(part, process)
        return part.url

    def _start_service(self, kind: Kind, number: int, port: int, common: Mapping[str, str]) -> None:
        name, options = f"{kind.name}-{number}", self.options
        environment = {
            **common,
            f"OUTRIDER_{kind.prefix}_NAME": name,
            f"OUTRIDER_{kind.prefix}_HOST": HOST,
            f"OUTRIDER_{kind.prefix}_PORT": str(port),
            **options.environment,
            **options.service_environment.get(kind.name, {}),
            **options.service_environment.get(name, {}),
        }
        process = ManagedProcess(
            name,
            [sys.executable, "-m", kind.module],
            self.run_dir / "logs" / f"{name}.log",
            environment,
            die_with_parent=options.die_with_parent,
            grace_s=SERVICE_GRACE_S,
        )
        part = Part(name, kind.name, f"http://{HOST}:{port}", f"python -m {kind.module}")
        self._tell(name, State.STARTING, part.source)
        self._launch(part, process)

    def _launch(self, part: Part, process: ManagedProcess) -> None:
        kept = _Kept(replace(part, log=str(process.log)), process)
        self._kept[part.name] = kept
        self._spawn(kept)

    def _spawn(self, kept: _Kept, *, again: bool = False) -> None:
        """Start a process and write that down. With the lock held when others may do the same."""
        identity = self._spawner.submit(kept.process.start).result()
        kept.part = replace(kept.part, process=identity, restarts=kept.part.restarts + again)
        kept.started_s, kept.next_start_s = time.monotonic(), None
        records.write(self.run_dir, self.record)

    # --- watching -------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        while not self._stopping.wait(POLL_S):
            for kept in tuple(self._kept.values()):
                with self._lock:
                    if kept.wanted and not kept.process.running:
                        self._revive(kept)

    def _revive(self, kept: _Kept) -> None:
        """Start a process that has died, when its time has come."""
        now_s = time.monotonic()
        if kept.next_start_s is None:
            kept.failures = 0 if now_s - kept.started_s > STEADY_S else kept.failures + 1
            kept.next_start_s = now_s + backoff_s(kept.failures)
            self._tell(kept.part.name, State.DIED, f"it ended with status {kept.process.exit_status}")
        if now_s < kept.next_start_s:
            return
        try:
            self._spawn(kept, again=True)
            self._tell(kept.part.name, State.RESTARTED, f"restart {kept.part.restarts}")
        except StackError as error:
            logger.warning("%s", error)
            kept.failures += 1
            kept.next_start_s = now_s + backoff_s(kept.failures)

    # --- stopping -------------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        with self._lock:
            for kept in self._kept.values():
                kept.wanted = False
        for name in self._kept:
            self._tell(name, State.STOPPED, "stopping")
        self.record.stop()
        for kept in self._kept.values():
            kept.process.stop()
        if self._kept:
            records.forget(self.run_dir)
        self._kept.clear()
        self._given.clear()
        self._spawner.shutdown()

    # --- small things ---------------------------------------------------------------------------------------------

    def _of(self, name: str) -> _Kept:
        try:
            return self._kept[name]
        except KeyError:
            raise StackError(
                f"there is no {name!r} of ours in this stack; there are {', '.join(sorted(self._kept))}"
            ) from None

    def _health(self, name: str) -> Health:
        """A service's readiness. Raises `StackError` when it has ended and nobody will start it again."""
        kept = self._of(name)
        if not kept.process.running and self._watch is None:
            raise kept.process.fail(f"has ended with status {kept.process.exit_status} before it was ready")
        return ask(kept.part.url)

    def _tell(self, part: str, state: State, text: str) -> None:
        self._report(Progress(part, state, text, self._clock.seconds))


def backoff_s(failures: int) -> float:
    """How long to wait before a restart: nothing after a steady run, then twice as long each time."""
    return 0.0 if failures == 0 else min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (failures - 1))


def _order(part: Part) -> tuple[int, str]:
    kinds = (KAFKA, REDIS, *(kind.name for kind in KINDS), LINK, EDGE.name)
    return (kinds.index(part.kind), part.name)
