"""Runs schedules by the thousand, and makes one that breaks an invariant as short as it gets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tests.simulation.choices import Choices
from tests.simulation.world import Counts, Faults, World

WORLDS: Final[Mapping[str, Faults]] = {
    "calm": Faults(
        lose=0.0, double=0.0, reorder=0.0, crash_verifier=0.0, crash_gateway=0.0, take_over=0.0, unasked=0.0,
        move=0.0, evict=0.0, redis_fails=0.0, skew=0.0,
    ),
    "lossy": Faults(crash_verifier=0.0, crash_gateway=0.0, take_over=0.0, move=0.0),
    "ordinary": Faults(),
    "harsh": Faults(crash_verifier=0.03, crash_gateway=0.02, take_over=0.02, move=0.02, evict=0.03, redis_fails=0.05),
    "always wrong": Faults(wrong_draft=1.0),
    "always right": Faults(wrong_draft=0.0),
    "right and calm": Faults(
        lose=0.0, double=0.0, reorder=0.0, crash_verifier=0.0, crash_gateway=0.0, take_over=0.0, unasked=0.0,
        move=0.0, evict=0.0, redis_fails=0.0, wrong_draft=0.1,
    ),
}  # fmt: skip
"""By name, what may go wrong; a search goes through them in turn."""

ATTEMPTS: Final = 3_000
"""Schedules run to make one that breaks an invariant shorter."""
PART: Final = 1_000
"""Schedules that a process runs before it takes the next."""
EVERY: Final = 10 * PART
"""After how many schedules a search tells how far it is."""


@dataclass(frozen=True)
class Violation:
    """An invariant that broke. `steps` are those of the shortest schedule found that breaks it as well."""

    world: str
    seed: int
    said: str
    first_steps: int
    steps: int
    trace: Sequence[str]

    def __str__(self) -> str:
        head = (
            f"{self.said}\n  world {self.world!r}, seed {self.seed}; {self.first_steps} steps at first, "
            f"{self.steps} when shrunk:"
        )
        return "\n".join([head, *(f"  {line}" for line in self.trace)])


@dataclass
class Report:
    """What a search came to."""

    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    violations: list[Violation] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.counts.schedules / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.counts.schedules:,} schedules in {self.seconds:.1f} s ({rate:,.0f}/s)",
            ", ".join(
                f"{name} {value:,}" for name, value in vars(self.counts).items() if name != "schedules"
            ),
            *(str(violation) for violation in self.violations),
            f"{len(self.violations)} violations of an invariant",
        ]
        return "\n".join(lines)


def run(
    schedules: int,
    seed: int,
    *,
    worlds: Sequence[str] = tuple(WORLDS),
    stop_after: int = 3,
    attempts: int = ATTEMPTS,
    processes: int = 1,
    every: Callable[[Report], None] | None = None,
) -> Report:
    """Run so many schedules, the first of seed `seed`, in `worlds` by turns; stop after so many violations.

    What is reported, but for the time, is the same with any number of `processes`. `every` hears of each 10,000.
    """
    report = Report()
    began = time.monotonic()
    end = seed + schedules
    parts = [range(first, min(first + PART, end)) for first in range(seed, end, PART)]
    search = partial(_search, worlds=worlds, stop_after=stop_after, attempts=attempts)
    with closing(_results(search, parts, processes)) as results:
        for stretches in results:
            for counts, violation in stretches:
                report.counts.add(counts)
                if violation is not None:
                    report.violations.append(violation)
                if len(report.violations) == stop_after:
                    report.seconds = time.monotonic() - began
                    return report
            report.seconds = time.monotonic() - began
            if every is not None and report.counts.schedules % EVERY == 0:
                every(report)
    return report


_Stretch = tuple[Counts, Violation | None]
"""What schedules in a row have covered, and how the last of them ended."""


def _search(part: range, worlds: Sequence[str], stop_after: int, attempts: int) -> list[_Stretch]:
    """A part's schedules: a stretch up to each violation, one for what is left; nothing after `stop_after` violations."""
    stretches: list[_Stretch] = []
    counts = Counts()
    for number in part:
        name = worlds[number % len(worlds)]
        world, said = _run_one(Choices(number), WORLDS[name])
        counts.add(world.counts)
        if said is not None:
            stretches.append((counts, _explain(name, number, world, said, attempts)))
            if len(stretches) == stop_after:
                return stretches
            counts = Counts()
    return [*stretches, (counts, None)]


def _results(
    search: Callable[[range], list[_Stretch]], parts: Sequence[range], processes: int
) -> Iterator[list[_Stretch]]:
    """What each part came to, in their order; closing it ends the search."""
    processes = min(processes, len(parts))
    if processes <= 1:
        yield from map(search, parts)
        return
    # forked: a process has what this one has, a bug that a test has put in included
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _stay_with_parent)
    try:
        yield from pool.map(search, parts)
    finally:
        pool.shutdown(cancel_futures=True)


def _stay_with_parent() -> None:
    """Die when the search does, even by SIGKILL; what Ctrl-C means is for the search to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="search-watch", daemon=True).start()


def _run_one(choices: Choices, faults: Faults, trace: list[str] | None = None) -> tuple[World, str | None]:
    world = World(choices, faults, trace=trace)
    try:
        world.run()
    except Exception as broken:
        return world, str(broken).partition("\n")[0] or repr(broken)
    return world, None


def _explain(name: str, seed: int, world: World, said: str, attempts: int) -> Violation:
    trace: list[str] = []
    again, _ = _run_one(Choices(seed, keep=True), WORLDS[name])
    tape = shrink(again.choices.tape, WORLDS[name], said, attempts)
    shortest, _ = _run_one(Choices(0, tape), WORLDS[name], trace)
    return Violation(name, seed, said, world.counts.steps, shortest.counts.steps, trace)


def shrink(tape: Sequence[float], faults: Faults, said: str, attempts: int = ATTEMPTS) -> list[float]:
    """A simpler tape on which the same invariant breaks: parts are left out, others made calm, as long as any can be.

    It ends after so many attempts with the best so far.
    """
    kind = _kind(said)
    best = list(tape)

    def breaks(candidate: list[float]) -> bool:
        nonlocal attempts
        attempts -= 1
        world, said = _run_one(Choices(0, candidate), faults)
        return said is not None and _kind(said) == kind and len(world.choices.tape) <= len(best)

    size = len(best)
    while size >= 1 and attempts > 0:
        shrunk = False
        at = 0
        while at < len(best) and attempts > 0:
            without = best[:at] + best[at + size :]
            calm = best[:at] + [0.0] * len(best[at : at + size]) + best[at + size :]
            if breaks(without):
                best, shrunk = without, True
            elif calm != best and breaks(calm):
                best, shrunk = calm, True
                at += size
            else:
                at += size
        if not shrunk:
            size //= 2
    return best


def _kind(said: str) -> str:
    """What broke, without the figures in it."""
    return "".join(character for character in said if not character.isdigit())[:60]
