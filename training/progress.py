"""How far a training run is, at which learning rate, and where it says so."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

Say = Callable[[str], None]


class Clock:
    """The share of a run that is done: by steps, or by seconds when `max_seconds` comes first.

    With steps alone the run is reproducible; with seconds it fits a lease.
    """

    def __init__(self, steps: int, max_seconds: float | None, spent_s: float = 0.0) -> None:
        self._steps = steps
        self._max_seconds = max_seconds
        self._began = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        """Seconds since the run began, earlier parts counted in."""
        return time.monotonic() - self._began

    def done(self, step: int) -> float:
        """0 at the start, 1 at the end."""
        share = step / max(1, self._steps)
        if self._max_seconds is not None:
            share = max(share, self.spent_s / self._max_seconds)
        return min(1.0, share)


def rate(done: float, warm_up: float = 0.02) -> float:
    """A linear warm-up, then a linear way down to 0, as a share of the peak learning rate."""
    if done < warm_up:
        return max(done / warm_up, 0.02)
    return max(0.0, (1 - done) / (1 - warm_up))


class Journal:
    """Appends figures to a JSON-lines file and says them."""

    def __init__(self, path: Path, say: Say) -> None:
        self._path = path
        self._say = say

    def note(self, name: str, **figures: float | int) -> None:
        """One line, in the file and for the reader."""
        with self._path.open("a") as opened:
            opened.write(json.dumps({"run": name, **figures}) + "\n")
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value:,}"
            for key, value in figures.items()
        )
        self._say(f"{name}: {shown}")
