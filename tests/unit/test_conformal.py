"""The conformal threshold: what is given up stays within the bound, whatever the rows and whatever is rolled back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.sampling.conformal import ConformalRule, resumed
from shared.sampling.sparse import above, dropped_mass

RULE = ConformalRule(target=0.02, rate=0.05, first=0.01, highest=0.2)

Row = list[tuple[int, float]]


def row(sure: float, flat: int) -> Row:
    """`sure` on the likeliest token, the rest spread evenly over `flat` others."""
    return [(0, sure), *((n, (1 - sure) / flat) for n in range(1, flat + 1))]


ROWS = st.builds(row, st.floats(0.05, 0.999), st.integers(1, 60))


def run(rows: list[Row], threshold: float = RULE.first) -> tuple[list[float], list[float]]:
    """What each row drops, and the threshold after each."""
    dropped, after = [], []
    for candidates in rows:
        dropped.append(dropped_mass(above(candidates, threshold)))
        threshold = RULE.after(threshold, dropped[-1])
        after.append(threshold)
    return dropped, after


@given(st.lists(ROWS, min_size=1, max_size=400))
def test_no_rows_drop_more_than_the_bound_on_average(rows: list[Row]) -> None:
    dropped, _ = run(rows)
    assert sum(dropped) / len(dropped) <= RULE.bound(len(rows)) + 1e-9


def test_rows_that_are_never_sure_drop_what_they_should() -> None:
    chance = random.Random(5)
    rows = [row(chance.uniform(0.1, 0.6), chance.randint(20, 60)) for _ in range(5000)]
    dropped, _ = run(rows)
    assert sum(dropped) / len(dropped) == pytest.approx(RULE.target, abs=0.003)


def test_sure_rows_do_not_let_the_next_ones_drop_more() -> None:
    dropped, after = run([row(0.999, 1)] * 10_000 + [row(0.2, 60)] * 50)
    assert max(after) == RULE.highest
    assert sum(dropped[10_000:]) < 50 * RULE.target + (RULE.highest + RULE.rate) / RULE.rate + 1e-9


@given(
    st.lists(st.tuples(st.lists(ROWS, min_size=1, max_size=5), st.integers(0, 5)), min_size=1, max_size=80)
)
def test_the_bound_holds_for_what_was_committed_when_tokens_are_rolled_back(
    rounds: list[tuple[list[Row], int]],
) -> None:
    threshold: float | None = None
    committed: list[float] = []
    for rows, accepted in rounds:
        dropped, after = run(rows, RULE.first if threshold is None else threshold)
        committed += dropped[: accepted + 1]
        threshold = resumed(threshold, tuple(after), accepted)
    assert sum(committed) / len(committed) <= RULE.bound(len(committed)) + 1e-9


def test_a_lane_starts_from_the_row_that_it_assumes_rejected() -> None:
    assert resumed(0.5, (0.1, 0.2, 0.3), 0) == 0.1
    assert resumed(0.5, (0.1, 0.2, 0.3), 2) == 0.3
    assert resumed(0.5, (0.1, 0.2, 0.3), 3) == 0.3
    assert resumed(0.5, (), 0) == 0.5
    assert resumed(None, (), 0) is None


@pytest.mark.parametrize(
    "wrong", [{"target": 0.0}, {"target": 1.0}, {"rate": 0.0}, {"first": 0.3, "highest": 0.2}]
)
def test_constants_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 < target < 1"):
        ConformalRule(**wrong)
