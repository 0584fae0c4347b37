"""`scripts/simulate`: a search for schedules under which the speculation core breaks an invariant."""

from __future__ import annotations

import argparse
import gc
import os
import sys

from tests.simulation.search import Report, run


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    """Exit status 1 when an invariant was broken."""
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--schedules", type=int, default=20_000, help="how many to run (default 20,000)")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed; the next has the next")
    parser.add_argument(
        "--processes", type=int, default=cores(), help="how many share them (default: a core each)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options = parser.parse_args()
    if options.schedules < 1:
        parser.error(f"--schedules must be 1 or more, not {options.schedules}")
    if options.processes < 1:
        parser.error(f"--processes must be 1 or more, not {options.processes}")

    def progress(report: Report) -> None:
        if not options.quiet:
            print(
                f"{report.counts.schedules:,} schedules, {report.seconds:.0f} s", file=sys.stderr, flush=True
            )

    gc.set_threshold(100_000, 20, 20)  # a schedule leaves much behind that is gone at once
    report = run(options.schedules, options.seed, processes=options.processes, every=progress)
    print(report)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
