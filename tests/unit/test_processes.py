"""Child processes: what is ours dies when it must, what is not ours never does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.stack.processes import ManagedProcess, ProcessIdentity, StackError, tail

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)",
]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(child.pid, flush=True); time.sleep(600)",
]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[ManagedProcess]]:
    started: list[ManagedProcess] = []
    yield started
    for process in started:
        process.grace_s = 0.0
        process.stop()


def started(
    processes: list[ManagedProcess], tmp_path: Path, command: list[str], **options: object
) -> ManagedProcess:
    process = ManagedProcess("it", command, tmp_path / "it.log", **options)  # type: ignore[arg-type]
    process.start()
    processes.append(process)
    return process


def said(process: ManagedProcess) -> str:
    """The first line that it prints."""
    deadline = time.monotonic() + 10
    while not (lines := tail(process.log)):
        assert time.monotonic() < deadline, "it says nothing"
        time.sleep(0.01)
    return lines[0]


def test_a_process_stops_in_its_own_order_and_can_start_again(
    processes: list[ManagedProcess], tmp_path: Path
) -> None:
    process = started(processes, tmp_path, SLEEP)
    first = process.identity
    assert process.running
    process.stop()
    assert process.exit_status == -signal.SIGTERM
    second = process.start()
    assert first is not None
    assert not first.alive
    assert second.alive


def test_one_that_ignores_sigterm_is_killed_after_its_grace(
    processes: list[ManagedProcess], tmp_path: Path
) -> None:
    process = started(processes, tmp_path, STUBBORN, grace_s=0.2)
    said(process)
    process.stop()
    assert process.exit_status == -signal.SIGKILL


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_what_it_started_itself_dies_with_it(
    processes: list[ManagedProcess], tmp_path: Path, how: str
) -> None:
    process = started(processes, tmp_path, PARENT)
    child = ProcessIdentity.of(int(said(process)))
    getattr(process, how)()
    assert child.wait(5)


def test_what_a_dead_leader_left_behind_is_found(processes: list[ManagedProcess], tmp_path: Path) -> None:
    process = started(processes, tmp_path, PARENT)
    child = ProcessIdentity.of(int(said(process)))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert process.identity is not None
    assert process.identity.wait(5)
    assert child.alive
    process.stop()
    assert child.wait(5)


def test_a_process_that_got_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        earlier = ProcessIdentity(stranger.pid, "0")
        assert not earlier.alive
        assert not earlier.signal(signal.SIGKILL, group=True)
        earlier.stop(grace_s=0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_one_that_ends_before_it_is_ready_says_why(processes: list[ManagedProcess], tmp_path: Path) -> None:
    process = started(processes, tmp_path, [sys.executable, "-c", "raise SystemExit('no luck today')"])
    with pytest.raises(StackError, match=r"ended with status 1(.|\n)*no luck today"):
        process.wait_until(lambda: False, 10)


def test_one_that_never_answers_is_stopped(processes: list[ManagedProcess], tmp_path: Path) -> None:
    process = started(processes, tmp_path, SLEEP)
    with pytest.raises(StackError, match="did not answer within 0 s"):
        process.wait_until(lambda: False, 0.1)
    assert not process.running


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = ManagedProcess("it", [str(tmp_path / "nothing")], tmp_path / "it.log")
    with pytest.raises(StackError, match="it can't be started"):
        process.start()


def test_starting_twice_is_refused(processes: list[ManagedProcess], tmp_path: Path) -> None:
    process = started(processes, tmp_path, SLEEP)
    with pytest.raises(StackError, match="runs already"):
        process.start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel offers this")
def test_one_that_dies_with_its_parent_dies_when_the_thread_that_started_it_ends(
    processes: list[ManagedProcess], tmp_path: Path
) -> None:
    thread = threading.Thread(
        target=started, args=(processes, tmp_path, SLEEP), kwargs={"die_with_parent": True}
    )
    thread.start()
    thread.join()
    (process,) = processes
    assert process.identity is not None
    assert process.identity.wait(5)
    assert process.exit_status == -signal.SIGKILL
