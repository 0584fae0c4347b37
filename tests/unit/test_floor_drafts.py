"""What is learned of the floor's own drafts, which of them is taken, and how much of it is verified."""

from __future__ import annotations

import pytest

from services.verifier.floor_drafts import (
    LEFT_OVER,
    LENGTH,
    LOOKED_UP,
    FloorDraft,
    FloorShares,
    Proposal,
    Shares,
)
from shared.lookup import LONGEST
from shared.speculation.verifier import Tail


def looked_up(
    matched: int, tokens: tuple[int, ...] = (7, 8, 9, 10, 11), shares: Shares | None = None
) -> Proposal:
    """Tokens that were found after a match of so many."""
    return Proposal(shares or Shares(LOOKED_UP), tokens, range(matched, matched + len(tokens)))


def test_the_longer_the_match_the_more_tokens_are_worth_their_rows() -> None:
    lengths = [looked_up(matched).worth(0.3)[0] for matched in range(LONGEST + 1)]
    assert lengths == sorted(lengths)
    assert lengths[0] == lengths[1] == 0
    assert lengths[-1] == 5


def test_the_more_a_row_has_to_bring_the_fewer_are_worth_it() -> None:
    lengths = [looked_up(3).worth(least)[0] for least in (0.0, 0.1, 0.4, 0.7, 0.76)]
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (5, 0)


def test_a_token_counts_as_one_after_a_match_that_those_before_it_made_longer() -> None:
    assert looked_up(2).worth(0.6 * 0.75)[0] == 2
    assert looked_up(2).worth(0.6 * 0.75 + 1e-9)[0] == 1


def test_what_the_target_says_changes_the_figures_of_each_length_up_to_the_first_wrong_token() -> None:
    shares = Shares(LOOKED_UP)
    looked_up(3, (7, 8, 9, 10), shares).judge((7, 8, 1, 10))
    assert shares.right(3) > LOOKED_UP[3]
    assert shares.right(4) > LOOKED_UP[4]
    assert shares.right(5) < LOOKED_UP[5]
    assert shares.right(6) == LOOKED_UP[6]


def test_matches_longer_than_the_longest_that_is_compared_are_one() -> None:
    shares = Shares(LOOKED_UP)
    looked_up(LONGEST, (7, 7, 7), shares).judge((7, 7, 1))
    assert shares.right(LONGEST) == shares.right(LONGEST + 2) < LOOKED_UP[LONGEST]


def test_shares_that_were_not_worth_their_rows_are_once_more_when_they_turn_out_right() -> None:
    shares = Shares(LOOKED_UP)
    for _ in range(100):
        looked_up(4, (7,), shares).judge((1,))
    assert looked_up(4, shares=shares).worth(0.1)[0] == 0
    for _ in range(20):
        looked_up(4, (7, 8, 9), shares).judge((7,))
    assert looked_up(4, shares=shares).worth(0.1)[0] > 0


def test_where_nothing_was_found_nothing_is_learned() -> None:
    shares = Shares(LOOKED_UP)
    looked_up(0, (), shares).judge((7,))
    assert [shares.right(matched) for matched in range(LONGEST + 1)] == pytest.approx(list(LOOKED_UP))


def test_expected_is_the_sum_of_the_chances_to_be_reached_and_right() -> None:
    shares = Shares((0.5, 0.8))
    assert looked_up(0, (7, 8, 9), shares).worth(0.0) == (3, pytest.approx(0.5 + 0.5 * 0.8 + 0.5 * 0.8 * 0.8))
    assert looked_up(0, (), shares).worth(0.0) == (0, 0.0)


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


# --- the draft head's word ----------------------------------------------------------------------------------------


def test_a_head_is_believed_at_first_and_cut_where_a_row_is_not_worth_it() -> None:
    floor = FloorDraft(FloorShares())
    floor.hear([(4, 0.9), (5, 0.6), (6, 0.1)])
    assert floor.draft((1, 2, 3), Tail(), 0.2) == (4, 5)


def test_of_head_lookup_and_rest_that_is_taken_which_is_expected_to_bring_most() -> None:
    floor = FloorDraft(FloorShares())
    floor.hear([(8, 0.9)])
    assert floor.draft(SAID_TWICE, Tail(), 0.0) == (4, 5, 6, 7, 1, 2, 3, 4)
    floor.hear([(8, 0.9), (9, 0.9), (10, 0.9)])
    assert floor.draft((1, 2, 3), Tail(0, (6, 7)), 0.0) == (8, 9, 10)


def test_a_head_that_is_surer_than_it_should_be_is_believed_less() -> None:
    shares = FloorShares()
    floor = FloorDraft(shares)
    for _ in range(60):
        floor.hear([(4, 0.95)])
        floor.draft((1, 2, 3), Tail(), 0.0)
        floor.judge((5,))
    floor.hear([(4, 0.95)])
    assert floor.draft((1, 2, 3), Tail(), 0.2) == ()
    floor.hear([(4, 0.55)])
    assert floor.draft((1, 2, 3), Tail(), 0.2) == (4,), "what it says less surely is another matter"


def test_what_a_head_has_said_counts_for_the_next_pass_alone() -> None:
    floor = FloorDraft(FloorShares())
    floor.hear([(4, 0.9)])
    floor.judge((9,))
    assert floor.draft((1, 2, 3, 9), Tail(), 0.0) == ()


# --- beside a block from the edge -----------------------------------------------------------------------------------


def test_a_block_goes_first_unless_something_else_promises_more() -> None:
    floor = FloorDraft(FloorShares())
    floor.hear([(4, 0.9), (5, 0.1)])
    assert floor.draft((1, 2, 3), Tail(), 0.0, Tail(0, (6, 7))) == (6, 7)
    floor.hear([(4, 0.95), (5, 0.95)])
    assert floor.draft((1, 2, 3), Tail(), 0.0, Tail(0, (6, 7))) == (4, 5)


def test_what_a_head_says_behind_the_whole_of_a_block_is_put_behind_it_as_far_as_it_is_worth_its_rows() -> (
    None
):
    floor = FloorDraft(FloorShares())
    floor.hear([(6, 0.9), (7, 0.9), (8, 0.9), (9, 0.05)])
    assert floor.draft((1, 2, 3), Tail(), 0.1, Tail(0, (6, 7))) == (6, 7, 8)
    floor.hear([(6, 0.9)])
    assert floor.draft((1, 2, 3), Tail(), 0.1, Tail(0, (6, 7))) == (6, 7)


def test_rows_that_bring_little_do_not_make_a_longer_draft_the_better_one() -> None:
    floor = FloorDraft(FloorShares())
    floor.hear([(4, 0.65), (5, 0.65), (8, 0.65), (9, 0.65)])
    assert floor.draft((1, 2, 3), Tail(), 0.0, Tail(0, (6, 7))) == (4, 5, 8, 9)
    floor.hear([(4, 0.65), (5, 0.65), (8, 0.65), (9, 0.65)])
    assert floor.draft((1, 2, 3), Tail(), 0.2, Tail(0, (6, 7))) == (6, 7)


def test_blocks_that_were_wrong_are_believed_less() -> None:
    shares = FloorShares()
    floor = FloorDraft(shares)
    for _ in range(40):
        floor.draft((1, 2, 3), Tail(), 0.0, Tail(0, (6, 7)))
        floor.judge((5,))
    floor.hear([(4, 0.35)])
    assert floor.draft((1, 2, 3), Tail(), 0.0, Tail(0, (6, 7))) == (4,)
    floor.hear([(4, 0.35)])
    assert floor.draft((1, 2, 3), Tail(), 0.0, Tail(3, (6, 7))) == (6, 7), (
        "one that has foreseen some is another matter"
    )
