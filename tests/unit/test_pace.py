"""What is learnt of clocks, and what follows: the length of blocks, the number of lanes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from shared.speculation.pace import (
    AGAIN,
    TRIALS,
    TYPICAL,
    Clocks,
    Common,
    Line,
    Mean,
    PassCost,
    Rate,
    Rivals,
    Trial,
    best_length,
    expected_tokens,
    lanes_in,
    least_worth,
    thrifty_length,
)

LONGEST = 8


def line(fixed: float, each: float) -> Line:
    """A line that was seen often enough to be believed."""
    learnt = Line()
    for _ in range(10):
        for x in (1, 4, 16, 64):
            learnt.saw(x, fixed + each * x)
    return learnt


def clocks(
    *,
    acceptance: float = 0.8,
    fixed_ms: float = 50.0,
    row_ms: float = 0.5,
    sharers: float = 1.0,
    draft_ms: float = 3.0,
    round_trip_ms: float = 20.0,
    missed: float = 0.5,
    floor: bool = True,
) -> Clocks:
    return Clocks(acceptance, line(fixed_ms, row_ms), sharers, draft_ms, round_trip_ms, missed, floor)


def length(**values: Any) -> int:
    return best_length(clocks(**values), LONGEST)


def test_a_mean_starts_with_the_first_value_and_follows_slowly() -> None:
    mean = Mean()
    assert mean(7.0) == 7.0
    mean.saw(10.0)
    assert mean(7.0) == 10.0
    mean.saw(0.0)
    assert 9.0 < mean(7.0) < 10.0
    for _ in range(200):
        mean.saw(0.0)
    assert mean(7.0) == pytest.approx(0.0, abs=1e-3)


def test_a_line_finds_what_a_pass_costs_by_its_rows() -> None:
    learnt = line(20.0, 0.75)
    assert learnt.slope == pytest.approx(0.75)
    assert learnt(0) == pytest.approx(20.0)
    assert learnt(100) == pytest.approx(95.0)


def test_a_line_never_falls_and_begins_at_zero_or_above() -> None:
    falling = Line()
    for x in (1, 2, 3, 4) * 5:
        falling.saw(x, 100.0 - 10.0 * x)
    assert falling.slope == 0.0
    steep = Line()
    for x in (10, 11, 12, 13) * 5:
        steep.saw(x, 20.0 * (x - 9))
    assert steep(0) == pytest.approx(0.0)
    assert steep.slope > 0.0


def test_without_spread_or_with_too_little_seen_no_slope_is_believed() -> None:
    same = Line()
    for _ in range(50):
        same.saw(5, 30.0)
    assert (same.slope, same(1), same(500)) == (0.0, pytest.approx(30.0), pytest.approx(30.0))
    few = Line()
    few.saw(1, 10.0)
    few.saw(9, 90.0)
    assert few.slope == 0.0
    unknown = Line()
    assert not unknown.known
    assert unknown(3) == 0.0


def test_a_line_forgets_what_was_long_ago() -> None:
    learnt = line(20.0, 1.0)
    for _ in range(100):
        for x in (1, 4, 16, 64):
            learnt.saw(x, 200.0)
    assert learnt(8) == pytest.approx(200.0, rel=0.01)


@pytest.mark.parametrize(
    ("acceptance", "drafted", "tokens"), [(0.0, 5, 1.0), (0.5, 1, 1.5), (0.5, 2, 1.75), (1.0, 4, 5.0)]
)
def test_a_round_yields_what_the_formula_says(acceptance: float, drafted: int, tokens: float) -> None:
    assert expected_tokens(acceptance, drafted) == pytest.approx(tokens)


def test_before_anything_is_known_blocks_are_as_long_as_they_may_be() -> None:
    assert best_length(Clocks(0.7, Line(), 1.0, 0.0, 0.0, 0.5), LONGEST) == LONGEST


def test_under_load_blocks_get_shorter_and_at_last_there_are_none() -> None:
    lengths = [length(sharers=sharers, row_ms=1.0) for sharers in (1, 4, 16, 64, 256)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[2] > 0
    assert lengths[-1] == 0


def test_the_longer_the_link_the_longer_the_block() -> None:
    lengths = [length(round_trip_ms=rtt, acceptance=0.6) for rtt in (0.0, 50.0, 200.0, 1000.0)]
    assert all(shorter <= longer for shorter, longer in pairwise(lengths))
    assert lengths[-1] == LONGEST > lengths[0]


def test_the_likelier_a_draft_is_accepted_the_longer_the_block() -> None:
    lengths = [length(acceptance=acceptance) for acceptance in (0.0, 0.3, 0.6, 0.8, 0.95)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == LONGEST


def test_a_draft_that_is_always_wrong_is_not_worth_a_block() -> None:
    assert length(acceptance=0.0) == 0


def test_slow_drafting_that_is_hidden_costs_nothing() -> None:
    assert length(draft_ms=40.0, missed=0.0, floor=False) > length(draft_ms=40.0, missed=1.0, floor=False)


def test_where_nothing_goes_on_while_a_round_waits_a_link_may_be_too_long_for_any_block() -> None:
    assert length(round_trip_ms=2000.0, acceptance=0.5, floor=False) == 0
    assert length(round_trip_ms=2000.0, acceptance=0.5, floor=True) > 0


def test_of_blocks_that_are_worth_the_same_the_shortest_is_chosen() -> None:
    assert length(acceptance=0.0, row_ms=0.0) == 0


def test_as_many_lanes_as_are_ready_within_the_window() -> None:
    step = line(4.0, 1.0)  # five lanes take 9 ms a step
    assert lanes_in(9.0 * 3, step, 3, most=16) == 5
    assert lanes_in(1000.0, step, 3, most=16) == 16
    assert lanes_in(1.0, step, 3, most=16) == 1


def test_lanes_are_bounded_only_by_what_may_be_where_nothing_is_known_or_drafted() -> None:
    assert lanes_in(1.0, Line(), 3, most=6) == 6
    assert lanes_in(1.0, line(4.0, 1.0), 0, most=6) == 6
    assert lanes_in(1.0, line(4.0, 1.0), 3, most=0) == 0


def test_what_the_verifier_says_of_its_passes_counts_more_than_what_was_seen() -> None:
    cost = PassCost()
    assert not cost.known
    assert cost(4) == 0.0
    cost.saw(4, 300.0)
    assert cost(4) == pytest.approx(300.0)
    cost.told(50.0, 2.0)
    cost.saw(4, 300.0)
    assert cost(4) == pytest.approx(58.0)
    assert cost.known


def test_sessions_of_a_gateway_learn_together_how_often_the_draft_is_right() -> None:
    common = Common()
    assert common.acceptance(0.0) == TYPICAL
    for _ in range(100):
        common.acceptance.saw(0.25)
    assert common.acceptance(0.0) == pytest.approx(0.25, abs=0.01)
    assert Common().acceptance(0.0) == TYPICAL


def test_what_is_of_use_often_enough_is_kept_in_whatever_order() -> None:
    for order in ([True, False], [False, True]):
        trial = Trial()
        for useful in order * (TRIALS // 2):
            trial.saw(useful=useful)
        assert trial.useful == pytest.approx(0.5)
        assert trial.wanted()


def test_what_is_of_no_use_is_left_alone_once_that_is_known_but_for_a_try_now_and_then() -> None:
    trial = Trial()
    for _ in range(TRIALS):
        assert trial.wanted()
        trial.saw(useful=False)
    wanted = [trial.wanted() for _ in range(3 * AGAIN)]
    assert wanted.count(True) == 3
    for _ in range(10):
        trial.saw(useful=True)
    assert trial.wanted()


def test_before_anything_is_known_a_draft_is_as_long_as_it_may_be() -> None:
    unknown = Clocks(0.7, Line(), 1.0, 0.0, 0.0, 0.5)
    assert thrifty_length(unknown, LONGEST) == LONGEST


def test_the_verifiers_time_is_saved_by_long_blocks_unless_rows_are_dear_or_drafts_slow() -> None:
    assert thrifty_length(clocks(row_ms=0.0), LONGEST) == LONGEST
    quick = Clocks(0.8, lambda rows: 6.3 + 0.0143 * rows, 1.0, 2.5, 50.0, 0.3)
    assert (best_length(quick, LONGEST), thrifty_length(quick, LONGEST)) == (0, LONGEST), "as on a GPU"
    lengths = [thrifty_length(clocks(row_ms=row_ms, acceptance=0.6), LONGEST) for row_ms in (0, 5, 20, 1000)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] == 1
    slow = replace(clocks(row_ms=0.0), draft_ms=40.0, round_trip_ms=20.0)
    assert thrifty_length(slow, LONGEST) * 40.0 <= 20.0 + slow.pass_ms(1.0)
    assert thrifty_length(replace(slow, draft_ms=9999.0), LONGEST) == 1


def test_where_blocks_are_padded_short_ones_save_nothing() -> None:
    dear = clocks(row_ms=5.0, acceptance=0.6, sharers=8.0)
    padded = replace(dear, padded=LONGEST + 1)
    assert 1 <= thrifty_length(dear, LONGEST) < LONGEST == thrifty_length(padded, LONGEST)
    assert best_length(padded, LONGEST) == 0, "without a block a session has one row"
    cheap = replace(padded, pass_ms=line(50.0, 0.01), missed=0.0)
    assert best_length(cheap, LONGEST) == LONGEST
    assert best_length(replace(cheap, padded=4), 3) == 3


def test_a_row_has_to_bring_what_all_who_share_the_pass_lose_by_it() -> None:
    """A row takes 1 ms of each of them, who get 0.02 tokens in it."""
    cost = PassCost()
    assert least_worth(0.02, cost, 1.0) == 0.0
    cost.told(50.0, 1.0)
    assert least_worth(0.02, cost, 1.0) == pytest.approx(0.02)
    assert least_worth(0.02, cost, 50.0) == pytest.approx(1.0)
    assert least_worth(0.0, cost, 50.0) == 0.0


def test_a_rate_is_that_of_late_and_no_single_value_is_all_of_it() -> None:
    rate = Rate()
    assert rate() == 0.0
    rate.saw(5, 1.0)
    rate.saw(1, 99.0)
    assert rate() == pytest.approx(0.06, rel=0.05)
    for _ in range(200):
        rate.saw(1, 10.0)
    assert rate() == pytest.approx(0.1, rel=1e-3)


# --- blocks beside the floor ----------------------------------------------------------------------------------------


def rivals(block_tokens: int, floor_tokens: int, rounds: int = TRIALS) -> Rivals:
    """Passes of 100 ms, of which every other one verifies a block."""
    found = Rivals()
    for _ in range(rounds):
        found.verified(block_tokens, 100.0)
        found.floor.saw(floor_tokens, 100.0)
    return found


def test_blocks_that_bring_less_than_the_floor_are_left_to_it() -> None:
    assert rivals(2, 3).better_alone
    assert not rivals(3, 2).better_alone


def test_nothing_is_said_of_blocks_before_enough_of_them_were_seen() -> None:
    assert not rivals(1, 3, TRIALS - 1).better_alone


def test_blocks_that_become_better_again_are_sent_again() -> None:
    found = rivals(2, 3)
    for _ in range(40):
        found.verified(4, 100.0)
    assert not found.better_alone


def test_drafts_that_the_floor_has_always_left_behind_are_left_alone() -> None:
    found = Rivals()
    for _ in range(TRIALS):
        assert not found.better_alone
        found.overtaken()
    assert found.better_alone
    for _ in range(6):
        found.verified(3, 100.0)
    assert not found.better_alone, "there is no floor to be slower than"
