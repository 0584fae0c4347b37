"""What is learned of the floor's own drafts, which of them is taken, and how much of it is verified."""

from __future__ import annotations

import pytest

from services.verifier.floor_drafts import LEFT_OVER, LENGTH, LOOKED_UP, FloorDraft, FloorShares, Shares
from shared.lookup import LONGEST
from shared.speculation.verifier import Tail


def test_the_longer_the_match_the_more_tokens_are_worth_their_rows() -> None:
    lengths = [Shares(LOOKED_UP).worth(matched, 5, 0.3) for matched in range(LONGEST + 1)]
    assert lengths == sorted(lengths)
    assert lengths[0] == lengths[1] == 0
    assert lengths[-1] == 5


def test_the_more_a_row_has_to_bring_the_fewer_are_worth_it() -> None:
    lengths = [Shares(LOOKED_UP).worth(3, 5, least) for least in (0.0, 0.1, 0.4, 0.7, 0.76)]
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (5, 0)


def test_a_token_counts_as_one_after_a_match_that_those_before_it_made_longer() -> None:
    assert Shares(LOOKED_UP).worth(2, 5, 0.6 * 0.75) == 2
    assert Shares(LOOKED_UP).worth(2, 5, 0.6 * 0.75 + 1e-9) == 1


def test_what_the_target_says_changes_the_figures_of_each_length_up_to_the_first_wrong_token() -> None:
    shares = Shares(LOOKED_UP)
    shares.saw(3, (7, 8, 9, 10), (7, 8, 1, 10))
    assert shares.right(3) > LOOKED_UP[3]
    assert shares.right(4) > LOOKED_UP[4]
    assert shares.right(5) < LOOKED_UP[5]
    assert shares.right(6) == LOOKED_UP[6]


def test_matches_longer_than_the_longest_that_is_compared_are_one() -> None:
    shares = Shares(LOOKED_UP)
    shares.saw(LONGEST, (7, 7, 7), (7, 7, 1))
    assert shares.right(LONGEST) == shares.right(LONGEST + 2) < LOOKED_UP[LONGEST]


def test_shares_that_were_not_worth_their_rows_are_once_more_when_they_turn_out_right() -> None:
    shares = Shares(LOOKED_UP)
    for _ in range(100):
        shares.saw(4, (7,), (1,))
    assert shares.worth(4, 5, 0.1) == 0
    for _ in range(20):
        shares.saw(4, (7, 8, 9), (7,))
    assert shares.worth(4, 5, 0.1) > 0


def test_where_nothing_was_found_nothing_is_learned() -> None:
    shares = Shares(LOOKED_UP)
    shares.saw(0, (), (7,))
    assert [shares.right(matched) for matched in range(LONGEST + 1)] == pytest.approx(list(LOOKED_UP))


def test_expected_is_the_sum_of_the_chances_to_be_reached_and_right() -> None:
    shares = Shares((0.5, 0.8))
    assert shares.expected(0, 3) == pytest.approx(0.5 + 0.5 * 0.8 + 0.5 * 0.8 * 0.8)
    assert shares.expected(0, 0) == 0.0


# --- a session's drafts -------------------------------------------------------------------------------------------

SAID_TWICE = (1, 2, 3, 4, 5, 6, 7, 1, 2, 3)


def test_what_is_likelier_to_bring_more_is_drafted() -> None:
    floor = FloorDraft(FloorShares())
    assert floor.draft(SAID_TWICE, Tail(0, (8, 9)), 0.0) == (4, 5, 6, 7, 1, 2, 3, 4)
    assert floor.draft((1, 2, 3), Tail(1, (8, 9)), 0.0) == (8, 9)
    assert floor.draft((1, 2, 1), Tail(2, (8, 9)), 0.0) == (8, 9)


def test_a_refused_drafts_rest_is_cut_where_it_is_not_worth_its_rows() -> None:
    floor = FloorDraft(FloorShares())
    rest = tuple(range(10, 20))
    assert floor.draft((1,), Tail(1, rest), 0.0) == rest[:LENGTH]
    assert floor.draft((1,), Tail(1, rest), LEFT_OVER[1] * LEFT_OVER[2]) == rest[:2]
    assert floor.draft((1,), Tail(1, rest), 0.9) == ()


def test_with_nothing_to_go_by_nothing_is_drafted() -> None:
    assert FloorDraft(FloorShares()).draft((1, 2, 3), Tail(), 0.0) == ()


def test_both_sources_are_judged_by_what_is_said_whichever_was_drafted() -> None:
    shares = FloorShares()
    floor = FloorDraft(shares)
    floor.draft(SAID_TWICE, Tail(1, (8, 9)), 0.0)
    floor.judge((8, 1))
    assert shares.looked_up.right(3) < LOOKED_UP[3]
    assert shares.left_over.right(1) > LEFT_OVER[1]
    assert shares.left_over.right(2) < LEFT_OVER[2]


def test_what_a_pass_says_that_the_floor_did_not_draft_teaches_nothing() -> None:
    shares = FloorShares()
    floor = FloorDraft(shares)
    floor.draft(SAID_TWICE, Tail(1, (8, 9)), 0.0)
    floor.judge((8,))
    known = [shares.left_over.right(place) for place in range(5)]
    floor.judge((5, 5))
    assert [shares.left_over.right(place) for place in range(5)] == known
