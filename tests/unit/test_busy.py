"""Busy time: what overlaps counts once, what is under way counts so far."""

from __future__ import annotations

from loadtest.busy import BusyTime


def test_time_with_any_work_counts_once_and_idle_time_not_at_all() -> None:
    now = 0.0
    busy = BusyTime(lambda: now)
    assert busy.ms == 0
    busy.begin()
    now = 1.0
    busy.begin()
    now = 3.0
    busy.end()
    now = 4.0
    assert busy.ms == 4000
    busy.end()
    now = 10.0
    assert busy.ms == 4000
    with busy.one():
        now = 10.5
    assert busy.ms == 4500
