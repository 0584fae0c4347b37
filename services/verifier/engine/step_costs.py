"""What a step of the engine takes by the rows in it, learned from the steps themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

WEIGHT: Final = 0.1
"""How far a step moves the mean of its size."""


@dataclass(slots=True)
class StepCosts:
    """A least-squares line through the means of steps of 1, 2-3, 4-7, 8-15, ... rows.

    No mean fades while no such step comes: what a crowd's steps take is known when the next crowd begins. Steps in which a
    prompt is computed say nothing of rows that verify, and should not be shown.
    """

    means: dict[int, tuple[float, float]] = field(default_factory=dict)
    """(rows, ms) by the number of bits of the rows."""

    def saw(self, rows: int, elapsed_ms: float) -> None:
        """A step of so many rows took so long."""
        size = rows.bit_length()
        known_rows, known_ms = self.means.get(size, (float(rows), elapsed_ms))
        self.means[size] = (
            known_rows + WEIGHT * (rows - known_rows),
            known_ms + WEIGHT * (elapsed_ms - known_ms),
        )

    def line(self) -> tuple[float, float]:
        """(ms of a step, ms of a row in it), neither below 0; (0, 0) before steps of two sizes were seen."""
        points = list(self.means.values())
        if len(points) < 2:
            return 0.0, 0.0
        rows = sum(x for x, _ in points) / len(points)
        ms = sum(y for _, y in points) / len(points)
        spread = sum((x - rows) ** 2 for x, _ in points)
        slope = sum((x - rows) * (y - ms) for x, y in points) / spread
        slope = min(max(0.0, slope), ms / rows)
        return ms - slope * rows, slope
