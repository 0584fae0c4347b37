"""What exits in a CUDA graph foresee against what the same exits foresee computed eagerly, of the same blocks.

The modules and their weights are the same; around them the layers of one pass were compiled and captured, those of the
other were not, so that the residual stream itself differs by rounding. Confidences may differ by `TOLERANCES`, and the
likeliest outcome may be another only where two are closer than that. In float32 too vLLM's attention on CUDA multiplies in
TensorFloat-32, of 10 bits: a last bit that is another before it becomes some 3e-4 of a state after 20 layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

TOLERANCES: Final[Mapping[str, float]] = {"float32": 5e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Of a confidence (0 to 1), by the type of the weights: ten or twenty roundings of the factors on the way."""

Key = tuple[str, int, int]
"""Session, base, layer."""
Outcomes = Mapping[tuple[int, int], float]
"""(accepted, next token) → confidence, likeliest first."""


@dataclass(frozen=True, slots=True)
class Compared:
    """`hints` were there from both sides, `missing` from one alone. `worst` is the largest difference of confidences of an
    outcome that both name, `beyond` counts hints in which one differs by more than the tolerance or the likeliest outcome is
    another one without that being a tie. `furthest` are the outcomes of the hint that differs most: where, and the
    confidences in the graph and eagerly."""

    hints: int
    missing: int
    tolerance: float
    worst: float
    beyond: int
    same_best: int
    furthest: tuple[Key, list[tuple[tuple[int, int], float, float]]] | None = None

    @property
    def equal(self) -> bool:
        """There was something to compare, and all of it is within the tolerance."""
        return self.hints > 0 and not self.beyond


def read(reports: Iterable[Sequence[Any]]) -> dict[Key, Outcomes]:
    """Reports as `loadtest.exact_engine` writes them."""
    return {
        (str(session), int(base), int(layer)): {
            (accepted, token): confidence for accepted, token, confidence in outcomes
        }
        for session, base, layer, outcomes in reports
    }


def compare(graph: Mapping[Key, Outcomes], eager: Mapping[Key, Outcomes], tolerance: float) -> Compared:
    """Hints of the same session, base and layer side by side."""
    both = graph.keys() & eager.keys()
    worst, beyond, same_best, furthest = 0.0, 0, 0, None
    for key in both:
        one, other = graph[key], eager[key]
        difference = max(
            (abs(one[outcome] - other[outcome]) for outcome in one.keys() & other.keys()), default=0.0
        )
        if difference > worst:
            worst, furthest = difference, key
        best, other_best = next(iter(one), None), next(iter(other), None)
        same_best += best == other_best
        beyond += difference > tolerance or not _tied(one, best, other, other_best, tolerance)
    missing = len(graph.keys() ^ eager.keys())
    return Compared(
        len(both),
        missing,
        tolerance,
        worst,
        beyond,
        same_best,
        None if furthest is None else (furthest, _side_by_side(graph[furthest], eager[furthest])),
    )


def _side_by_side(one: Outcomes, other: Outcomes) -> list[tuple[tuple[int, int], float, float]]:
    return [(outcome, one[outcome], other[outcome]) for outcome in one if outcome in other]


def _tied(
    one: Outcomes,
    best: tuple[int, int] | None,
    other: Outcomes,
    other_best: tuple[int, int] | None,
    tolerance: float,
) -> bool:
    """Whether both sides name the same outcome first, or find the other's as likely as their own."""
    if best == other_best:
        return True
    if best is None or other_best is None or other_best not in one or best not in other:
        return False
    return one[best] - one[other_best] <= 2 * tolerance and other[other_best] - other[best] <= 2 * tolerance
