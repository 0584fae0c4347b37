"""Where a schedule's chance comes from: a seed, or a tape of earlier draws that may have been edited.

Every decision is made from one number in [0, 1), and 0 is the calm one: no fault, the first of what may happen. Behind its
end a tape goes on with zeros, so that a shorter tape, or one with zeros in it, is a simpler schedule.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Decides, and keeps what it drew."""

    def __init__(self, seed: int, tape: Sequence[float] | None = None) -> None:
        self.tape: list[float] = []
        self._random = random.Random(seed).random
        self._given = None if tape is None else iter(tape)

    def draw(self) -> float:
        """A number in [0, 1)."""
        drawn = self._random() if self._given is None else next(self._given, 0.0)
        self.tape.append(drawn)
        return drawn

    def chance(self, probability: float) -> bool:
        """True so often."""
        return probability > 0.0 and self.draw() >= 1.0 - probability

    def below(self, count: int) -> int:
        """A whole number from 0 to `count` - 1."""
        return int(self.draw() * count) if count > 1 else 0

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.below(len(options))]
