"""How long an engine has had work: the time while anything at all is in it, counted once however much that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BusyTime:
    """Adds up the time between the moment work comes to an idle engine and the moment it has none left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held = 0
        self._since_s = 0.0
        self._total_s = 0.0

    def begin(self) -> None:
        """A piece of work has come."""
        if not self._held:
            self._since_s = self._clock()
        self._held += 1

    def end(self) -> None:
        """A piece of work is done."""
        self._held -= 1
        if not self._held:
            self._total_s += self._clock() - self._since_s

    @contextmanager
    def one(self) -> Iterator[None]:
        """A piece of work from here to the end of the block."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @property
    def ms(self) -> float:
        """So far, what is under way included."""
        under_way_s = self._clock() - self._since_s if self._held else 0.0
        return (self._total_s + under_way_s) * 1000
