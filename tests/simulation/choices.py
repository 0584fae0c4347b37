"""Where a schedule's chance comes from: a seed, or a tape of earlier draws that may have been edited.

Every decision is made from one number in [0, 1), and 0 is the calm one: no fault, the first of what may happen. Behind its
end a tape goes on with zeros, so that a shorter tape, or one with zeros in it, is a simpler schedule.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Decides. With `keep`, or from a tape, what it drew is kept as `tape`; keeping costs time."""

    draw: Callable[[], float]
    """A number in [0, 1)."""

    def __init__(self, seed: int, tape: Sequence[float] | None = None, *, keep: bool = False) -> None:
        self.tape: list[float] = []
        if tape is None and not keep:
            self.draw = random.Random(seed).random
            return
        drawn = chain(tape, repeat(0.0)) if tape is not None else iter(random.Random(seed).random, None)

        def kept() -> float:
            self.tape.append(value := next(drawn))
            return value

        self.draw = kept

    def chance(self, probability: float) -> bool:
        """True so often."""
        return probability > 0.0 and self.draw() >= 1.0 - probability

    def below(self, count: int) -> int:
        """A whole number from 0 to `count` - 1."""
        return int(self.draw() * count) if count > 1 else 0

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.below(len(options))]
