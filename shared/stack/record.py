"""What is known of a stack beyond the process that started it: `stack.json` in the run directory.

From it alone a stack can be looked at and stopped. Every process in it is named by pid and start time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import SIGTERM
from typing import Any, Final

from shared.stack.health import Health, ask
from shared.stack.processes import ProcessIdentity, StackError

FORMAT: Final = 1
SERVICE_GRACE_S: Final = 12.0
BROKER_GRACE_S: Final = 15.0
KEEPER_S: Final = 60.0
KAFKA, REDIS, LINK, EDGE = "kafka", "redis", "link", "edge"


@dataclass(frozen=True, slots=True)
class Part:
    """A process of the stack, or (without `process`) a server that was given. `url` is a service's or Redis' own,
    for Kafka its address, for a link that of its near end; `kind` is kafka, redis, kv-session, verifier, gateway, and
    where there are two places link (what delays the way between them) and edge (the gateway there)."""

    name: str
    kind: str
    url: str
    source: str
    log: str = ""
    process: ProcessIdentity | None = None
    restarts: int = 0

    @property
    def ours(self) -> bool:
        """The stack started it."""
        return bool(self.log)

    @property
    def alive(self) -> bool:
        """It is ours and runs."""
        return self.process is not None and self.process.alive

    @property
    def is_service(self) -> bool:
        """It answers `/readyz`."""
        return self.kind not in (KAFKA, REDIS, LINK)

    def health(self) -> Health:
        """Whether it can serve. Of a broker or a link only whether our process runs is told."""
        if self.ours and not self.alive:
            return Health(ready=False, reasons=("it doesn't run",))
        notes = (self.source,) if self.kind == LINK else ()
        return ask(self.url) if self.is_service else Health(ready=True, notes=notes)


@dataclass(frozen=True, slots=True)
class StackRecord:
    """A stack as it was last written down. `keeper` is the process that restarts what dies, if any does."""

    keeper: ProcessIdentity | None = None
    model: str = ""
    parts: tuple[Part, ...] = field(default_factory=tuple)

    @property
    def alive(self) -> bool:
        """All of its processes run, or somebody sees to it that they will."""
        return self.kept or all(part.alive for part in self.parts if part.ours)

    @property
    def kept(self) -> bool:
        """Somebody watches over it."""
        return self.keeper is not None and self.keeper.alive

    @property
    def running(self) -> bool:
        """It is a whole stack, and well or looked after; what is not is a leftover."""
        return self.alive and any(part.is_service for part in self.parts)

    def of(self, kind: str) -> tuple[Part, ...]:
        """Its parts of one kind."""
        return tuple(part for part in self.parts if part.kind == kind)

    @property
    def gateway_url(self) -> str:
        """Where clients go: the gateway at the edge, if there is one. Raises `StackError` when it has no gateway."""
        gateways = (*self.of(EDGE), *self.of("gateway"))
        if not gateways:
            raise StackError("this stack has no gateway")
        return gateways[0].url

    @property
    def places(self) -> str:
        """Where clients' gateway is and what lies between it and the rest, in words; "" when all is in one place."""
        if not (edges := self.of(EDGE)):
            return ""
        links = "; ".join(f"{link.name}: {link.source}" for link in self.of(LINK))
        return f"two places: clients talk to {edges[0].name} at the edge, all else is in the cloud ({links})"

    def stop(self) -> None:
        """Stop all that it started, in the order in which nobody misses anybody: gateways, services, brokers."""
        for kinds, grace_s in (
            ({EDGE}, SERVICE_GRACE_S),
            ({"gateway", LINK}, SERVICE_GRACE_S),
            ({"verifier", "kv-session"}, SERVICE_GRACE_S),
            ({KAFKA, REDIS}, BROKER_GRACE_S),
        ):
            processes = [part.process for part in self.parts if part.kind in kinds and part.process]
            if processes:
                with ThreadPoolExecutor(len(processes)) as pool:
                    list(pool.map(lambda process, grace_s=grace_s: process.stop(grace_s), processes))


def write(run_dir: Path, record: StackRecord) -> None:
    """Write the record down, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / "stack.json.new"
    temporary.write_text(json.dumps({"format": FORMAT, **asdict(record)}, indent=1) + "\n")
    temporary.replace(run_dir / "stack.json")


def read(run_dir: Path) -> StackRecord | None:
    """The stack of the run directory; None when none was started there. Raises `StackError` when it can't be read."""
    path = run_dir / "stack.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        return StackRecord(
            keeper=_identity(content["keeper"]),
            model=content["model"],
            parts=tuple(Part(**part | {"process": _identity(part["process"])}) for part in content["parts"]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(
            f"{path} can't be read ({error}); end what runs there by hand and delete it"
        ) from None


def forget(run_dir: Path) -> None:
    """The stack of the run directory is no more."""
    (run_dir / "stack.json").unlink(missing_ok=True)


def stop(run_dir: Path) -> StackRecord | None:
    """Stop the stack of the run directory and forget it; what it was, or None when there is none.

    A process that watches over it (a demo, `outrider up --foreground`) is asked to stop it instead.
    """
    record = read(run_dir)
    if record is None:
        return None
    if record.kept and record.keeper is not None:
        record.keeper.signal(SIGTERM)
        if record.keeper.wait(KEEPER_S):
            return record
    with locked(run_dir):
        record.stop()
        forget(run_dir)
    return record


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Only one process at a time starts or stops the stack of a run directory. Raises `StackError` for the second."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"somebody else is starting or stopping the stack of {run_dir}; wait for it"
            ) from None
        yield


def this_process() -> ProcessIdentity:
    """Ourselves, as the keeper of a stack."""
    return ProcessIdentity.of(os.getpid())


def _identity(content: dict[str, Any] | None) -> ProcessIdentity | None:
    return None if content is None else ProcessIdentity(**content)
