"""A search for broken invariants comes to the same in one process and in several."""

from __future__ import annotations

import multiprocessing
import os
import sys
from threading import BrokenBarrierError

import pytest

from shared.speculation import verifier as v
from tests.simulation import __main__ as command
from tests.simulation import search
from tests.simulation.choices import Choices
from tests.simulation.world import Counts, Faults, World

DEADLINE_S = 30.0


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PART", 20)
    monkeypatch.setattr(search, "EVERY", 60)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts are published before they are committed."""
    honest = v.VerifierSession._commit_next

    def hasty(self: v.VerifierSession) -> list[v.VerifierAction]:
        commits = honest(self)
        return [self._publish(self._results[0]), *commits] if commits else []

    monkeypatch.setattr(v.VerifierSession, "_commit_next", hasty)


def covered_by(seed: int, schedules: int) -> Counts:
    """What schedules cover that are run one by one, without a search."""
    covered = Counts()
    for number in range(seed, seed + schedules):
        world = World(Choices(number), search.WORLDS[tuple(search.WORLDS)[number % len(search.WORLDS)]])
        world.run()
        covered.add(world.counts)
    return covered


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("processes", [1, 2, 3, 50])
def test_every_schedule_is_run_once_whatever_the_number_of_processes(processes: int) -> None:
    heard: list[int] = []
    found = search.run(
        130, 7, processes=processes, every=lambda report: heard.append(report.counts.schedules)
    )
    assert found.counts.schedules == 130
    assert found.counts == covered_by(7, 130)
    assert not found.violations
    assert heard == [60, 120]


@pytest.mark.usefixtures("small_parts", "hasty")
@pytest.mark.parametrize("stop_after", [1, 3, 1000])
def test_violations_are_the_same_whatever_the_number_of_processes(stop_after: int) -> None:
    alone, shared = (
        search.run(70, 7, stop_after=stop_after, attempts=20, processes=processes) for processes in (1, 3)
    )
    assert len(alone.violations) == min(stop_after, 70)
    assert alone.violations == shared.violations
    assert alone.counts == shared.counts
    seeds = [violation.seed for violation in alone.violations]
    assert alone.counts.schedules == (seeds[-1] - 7 + 1 if stop_after < 1000 else 70)


def test_processes_search_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other in its only schedule, which no single process could."""
    meeting = multiprocessing.get_context("fork").Barrier(2)
    here = os.getpid()

    def meets(choices: Choices, faults: Faults, trace: list[str] | None = None) -> tuple[World, str | None]:
        world = World(choices, faults)
        if os.getpid() == here:
            return world, "not in a process of its own"
        try:
            meeting.wait(DEADLINE_S)
        except BrokenBarrierError:
            return world, "alone"
        return world, None

    monkeypatch.setattr(search, "PART", 1)
    monkeypatch.setattr(search, "_run_one", meets)
    assert not search.run(2, 0, attempts=0, processes=2).violations


def simulate(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scripts/simulate", *words])
    monkeypatch.setattr(command.gc, "set_threshold", lambda *_: None)
    return command.main()


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.usefixtures("small_parts")
def test_the_command_shows_progress_and_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processes: str
) -> None:
    assert simulate(monkeypatch, "--schedules", "60", "--processes", processes) == 0
    said = capsys.readouterr()
    assert said.err.startswith("60 schedules, ")
    assert said.out.startswith("60 schedules in ")
    assert said.out.endswith("\n0 violations of an invariant\n")


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.usefixtures("small_parts", "hasty")
def test_the_command_says_what_broke_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processes: str
) -> None:
    assert simulate(monkeypatch, "--schedules", "60", "--processes", processes, "--quiet") == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("published, not committed") == 3
    assert "shrunk" in said.out


def test_no_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        simulate(monkeypatch, "--processes", "0")
    assert "--processes must be 1 or more, not 0" in capsys.readouterr().err
