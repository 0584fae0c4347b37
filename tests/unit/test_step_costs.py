"""What the engine learns of its steps: a line by their rows, which no crowd's end makes it forget."""

from __future__ import annotations

import pytest

from services.verifier.engine.step_costs import StepCosts


def test_nothing_is_said_before_steps_of_two_sizes_were_seen() -> None:
    costs = StepCosts()
    assert costs.line() == (0.0, 0.0)
    for _ in range(20):
        costs.saw(1, 58.0)
    assert costs.line() == (0.0, 0.0)


def test_a_line_is_found_through_steps_of_any_sizes() -> None:
    costs = StepCosts()
    for rows in (1, 6, 16, 40, 90) * 5:
        costs.saw(rows, 56.0 + 2.4 * rows)
    assert costs.line() == pytest.approx((56.0, 2.4))


def test_what_small_steps_take_is_not_forgotten_while_only_large_ones_come() -> None:
    costs = StepCosts()
    for _ in range(10):
        costs.saw(1, 58.4)
    for _ in range(1000):
        costs.saw(90, 272.0)
    assert costs.line() == pytest.approx((56.0, 2.4))


def test_a_step_never_takes_less_by_more_rows_nor_less_than_nothing_without_any() -> None:
    falling = StepCosts()
    falling.saw(1, 100.0)
    falling.saw(16, 50.0)
    assert falling.line() == (pytest.approx(75.0), 0.0)
    steep = StepCosts()
    steep.saw(8, 10.0)
    steep.saw(16, 100.0)
    fixed_ms, row_ms = steep.line()
    assert fixed_ms == pytest.approx(0.0)
    assert row_ms > 0.0
