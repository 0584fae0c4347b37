"""Child processes that outlive a careless parent: each leads a session of its own, logs to a file, and is known by pid
*and* start time, so that whoever stops it later stops that process and never another one that got its number.

It does not decide when a process should run; see `stack.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from shared.errors import OutriderError

POLL_S: Final = 0.02
KILL_DEADLINE_S: Final = 10.0
PR_SET_PDEATHSIG: Final = 1


class StackError(OutriderError):
    """A part of the local stack doesn't start, has ended, or isn't there."""

    code = "stack_error"


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process and no other: `started` differs whenever a system gives the same pid again."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """The process that has `pid` now. Raises `StackError` when there is none."""
        started = _start_mark(pid)
        if started is None:
            raise StackError(f"there is no process {pid}")
        return cls(pid, started)

    @property
    def alive(self) -> bool:
        """It runs; a zombie does not."""
        return _start_mark(self.pid) == self.started

    def signal(self, number: signal.Signals, *, group: bool = False) -> bool:
        """Send a signal, to all of its group if so asked; False when it has ended before."""
        if not self.alive:
            return False
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s`; nothing of its session is left. Raises `StackError` like `kill`."""
        self.signal(signal.SIGTERM)
        self.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to it and to all that it started in its session. Raises `StackError` if it won't die."""
        self.signal(signal.SIGKILL, group=True)
        for member in self._orphans():
            member.signal(signal.SIGKILL)
        if not self.wait(KILL_DEADLINE_S):
            raise StackError(f"process {self.pid} is still there {KILL_DEADLINE_S:.0f} s after SIGKILL")

    def wait(self, timeout_s: float) -> bool:
        """Wait until it has ended; False when it hasn't by then."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _orphans(self) -> Iterator[ProcessIdentity]:
        """What is left of the session that it led. The kernel gives no pid anew that a session still bears."""
        leader = _start_mark(self.pid, zombies=True)
        if leader is not None and leader != self.started:
            return
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError, StackError):
                if process.pid != self.pid and os.getsid(process.pid) == self.pid:
                    yield ProcessIdentity.of(process.pid)


def _start_mark(pid: int, *, zombies: bool = False) -> str | None:
    """What tells this process from an earlier or later one of the same pid; None when there is none that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _start_mark_elsewhere(pid)
    except NotADirectoryError:
        return _start_mark_elsewhere(pid)
    state, ticks_since_boot = fields[0], fields[19]
    return None if state in "ZX" and not zombies else ticks_since_boot


def _start_mark_elsewhere(pid: int) -> str | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None


@dataclass(slots=True)
class ManagedProcess:
    """One command that can be started, killed and started again; its output goes to the end of `log`.

    With `die_with_parent` the kernel kills it when *the thread* that started it ends (Linux only): start it from one
    that lives as long as it should.
    """

    name: str
    command: Sequence[str | Path]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    die_with_parent: bool = False
    grace_s: float = 10.0
    identity: ProcessIdentity | None = None
    _popen: subprocess.Popen[bytes] | None = None

    def start(self) -> ProcessIdentity:
        """Start it. Raises `StackError` when it runs already or can't be started."""
        if self.running:
            raise StackError(f"{self.name} runs already (pid {self.pid})")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            try:
                self._popen = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.environment},
                    start_new_session=True,
                    preexec_fn=_death_with_parent() if self.die_with_parent else None,  # noqa: PLW1509
                )
            except OSError as error:
                raise StackError(f"{self.name} can't be started: {error}") from error
        # Until it is polled a child that has ended is a zombie, so its pid still means this one.
        mark = _start_mark(self._popen.pid, zombies=True)
        self.identity = ProcessIdentity(self._popen.pid, mark or "")
        return self.identity

    @property
    def pid(self) -> int | None:
        """Its pid, also after its end; None when it was never started."""
        return self.identity.pid if self.identity else None

    @property
    def running(self) -> bool:
        """It was started and hasn't ended."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_status(self) -> int | None:
        """How it ended (negative: the signal that ended it); None while it runs or when it never did."""
        return self._popen.poll() if self._popen else None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to it and to all that it started; after SIGKILL, return when they have ended."""
        # Whoever watches over it may start it again as soon as it has ended.
        popen, identity = self._popen, self.identity
        if popen is None or identity is None:
            raise StackError(f"{self.name} has not been started")
        if number is signal.SIGKILL:
            identity.kill()
            popen.wait()
        else:
            identity.signal(number, group=True)

    def stop(self) -> None:
        """SIGTERM, SIGKILL after `grace_s`; does nothing when it has ended."""
        popen, identity = self._popen, self.identity
        if popen is not None and identity is not None:
            identity.stop(self.grace_s)
            popen.wait()

    def fail(self, reason: str) -> StackError:
        """The error that says why it doesn't do, with the last lines of its log."""
        lines = tail(self.log)
        shown = "".join(f"\n    {line}" for line in lines)
        return StackError(f"{self.name} {reason}; the end of {self.log}:{shown or ' (it is empty)'}")

    def wait_until(self, answers: Callable[[], bool], timeout_s: float) -> None:
        """Return when `answers()`; stops it and raises `StackError` when it ends before, or never does."""
        deadline = time.monotonic() + timeout_s
        while not answers():
            if not self.running:
                raise self.fail(f"has ended with status {self.exit_status} before it was ready")
            if time.monotonic() >= deadline:
                error = self.fail(f"did not answer within {timeout_s:.0f} s")
                self.stop()
                raise error
            time.sleep(POLL_S)


def tail(log: Path, lines: int = 12, most_bytes: int = 16_384) -> list[str]:
    """The last lines of a log file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - most_bytes))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def _death_with_parent() -> Callable[[], None] | None:
    """What the child does between fork and exec, so that it dies with the thread that forked it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask_for_death() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)

    return ask_for_death
