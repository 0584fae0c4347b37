"""What is learned of looked-up tokens, and how many are verified."""

from __future__ import annotations

import pytest

from services.verifier.lookups import PRIOR, Lookups
from shared.lookup import LONGEST


def test_the_longer_the_match_the_more_tokens_are_worth_their_rows() -> None:
    lengths = [Lookups().worth(matched, 5, 0.3) for matched in range(LONGEST + 1)]
    assert lengths == sorted(lengths)
    assert lengths[0] == lengths[1] == 0
    assert lengths[-1] == 5


def test_the_more_a_row_has_to_bring_the_fewer_are_worth_it() -> None:
    lengths = [Lookups().worth(3, 5, least) for least in (0.0, 0.1, 0.4, 0.7, 0.76)]
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (5, 0)


def test_a_token_counts_as_one_after_a_match_that_those_before_it_made_longer() -> None:
    assert Lookups().worth(2, 5, 0.6 * 0.75) == 2
    assert Lookups().worth(2, 5, 0.6 * 0.75 + 1e-9) == 1


def test_what_the_target_says_changes_the_figures_of_each_length_up_to_the_first_wrong_token() -> None:
    lookups = Lookups()
    lookups.saw(3, (7, 8, 9, 10), (7, 8, 1, 10))
    assert lookups.right(3) > PRIOR[3]
    assert lookups.right(4) > PRIOR[4]
    assert lookups.right(5) < PRIOR[5]
    assert lookups.right(6) == PRIOR[6]


def test_matches_longer_than_the_longest_that_is_compared_are_one() -> None:
    lookups = Lookups()
    lookups.saw(LONGEST, (7, 7, 7), (7, 7, 1))
    assert lookups.right(LONGEST) == lookups.right(LONGEST + 2) < PRIOR[LONGEST]


def test_lookups_that_were_not_worth_their_rows_are_once_more_when_they_turn_out_right() -> None:
    lookups = Lookups()
    for _ in range(100):
        lookups.saw(4, (7,), (1,))
    assert lookups.worth(4, 5, 0.1) == 0
    for _ in range(20):
        lookups.saw(4, (7, 8, 9), (7,))
    assert lookups.worth(4, 5, 0.1) > 0


def test_where_nothing_was_found_nothing_is_learned() -> None:
    lookups = Lookups()
    lookups.saw(0, (), (7,))
    assert [lookups.right(matched) for matched in range(LONGEST + 1)] == pytest.approx(list(PRIOR))
