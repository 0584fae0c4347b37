"""What an embedded Kafka and an embedded Redis have in common: one address, perhaps a process of ours behind it, and
the ports that it keeps over restarts."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Final

from shared.stack.ports import free_port, is_free
from shared.stack.processes import POLL_S, ManagedProcess, StackError

START_S: Final = 60.0
STOP_S: Final = 15.0


class Server(ABC):
    """A server at one address. `source` says in words which one it is; `process` is None when it isn't ours."""

    process: ManagedProcess | None = None

    def __init__(self, name: str, address: str, source: str) -> None:
        self.name = name
        self.address = address
        self.source = source

    @abstractmethod
    def answers(self) -> bool:
        """It serves clients now; returns within a few seconds."""

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """What has to be done on disk before its process starts; `start` does it by itself."""

    def start(self) -> None:
        """Start it and return when it answers. Raises `StackError` with the end of its log when it doesn't."""
        process = self._own_process()
        self.prepare()
        process.start()
        process.wait_until(self.answers, START_S)

    def kill(self, number: Signals = SIGKILL) -> None:
        """Send it a signal; after SIGKILL, return when it has ended."""
        self._own_process().kill(number)

    def stop(self) -> None:
        """Let it end in its own order, if it is ours and runs."""
        if self.process is not None:
            self.process.stop()

    def _own_process(self) -> ManagedProcess:
        if self.process is None:
            raise StackError(f"{self.source} is not ours to start or kill")
        return self.process


def keep_ports(directory: Path, count: int) -> list[int]:
    """`count` ports for the server whose data is in `directory`: those of its last start while they are free.

    An address stays the same over a restart, and changes only when somebody else has taken it.
    """
    file = directory / "ports.json"
    known = json.loads(file.read_text()) if file.exists() else []
    ports: list[int] = [port for port in known[:count] if is_free(port)]
    while len(ports) < count:
        ports.append(free_port(avoid=ports))
    if ports != known:
        directory.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(ports))
    return ports


def within(holds: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until `holds()`; False when it doesn't by then."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True
