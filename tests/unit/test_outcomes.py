"""Ranked outcomes against the sum over all of them: an exit's, the edge's own, and both mixed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.speculation.outcomes import (
    LEVELS,
    Calibration,
    Foresight,
    Line,
    Mixture,
    Ranked,
    confidence_at,
    guess_outcomes,
    level,
    mix,
    rank_outcomes,
)

VOCABULARY = 6

weights = st.lists(st.floats(0.01, 1.0), min_size=VOCABULARY, max_size=VOCABULARY)


Block = tuple[list[int], list[list[float]], list[float]]
"""Drafts, a distribution per row, the judge's probability that each draft is accepted."""


@st.composite
def blocks(draw: st.DrawFn, *, judged: bool = True) -> Block:
    drafts = draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=4))
    rows = [draw(weights) for _ in range(len(drafts) + 1)]
    distributions = [[weight / sum(row) for weight in row] for row in rows]
    own = [row[token] for row, token in zip(distributions, drafts, strict=False)]
    return drafts, distributions, [draw(st.floats(0.01, 0.99)) for _ in drafts] if judged else own


def every_outcome(block: Block) -> dict[tuple[int, int], float]:
    drafts, rows, judge = block
    found, prefix = {}, 1.0
    for accepted, row in enumerate(rows):
        if accepted == len(drafts):
            found.update({(accepted, token): prefix * p for token, p in enumerate(row)})
            break
        draft, yes = drafts[accepted], judge[accepted]
        scale = prefix * (1 - yes) / (1 - row[draft])
        found.update({(accepted, token): scale * p for token, p in enumerate(row) if token != draft})
        prefix *= yes
    return found


def ranked(block: Block, limit: int) -> list[tuple[int, int, float]]:
    drafts, rows, judge = block
    best = [sorted(enumerate(row), key=lambda item: -item[1])[: limit + 1] for row in rows]
    return rank_outcomes(
        [math.log(row[token]) for row, token in zip(rows, drafts, strict=False)],
        [math.log(yes) for yes in judge],
        drafts,
        [[(token, math.log(p)) for token, p in row] for row in best],
        limit,
    )


@given(blocks(), st.integers(1, 5))
def test_the_most_likely_outcomes_are_found_from_few_candidates(block: Block, limit: int) -> None:
    everything = every_outcome(block)
    found = ranked(block, limit)
    best = sorted(everything.values(), reverse=True)[:limit]
    assert [confidence for *_, confidence in found] == pytest.approx(best)
    for accepted, token, confidence in found:
        assert confidence == pytest.approx(everything[accepted, token])


@given(blocks())
def test_confidences_of_all_outcomes_sum_to_one(block: Block) -> None:
    found = ranked(block, VOCABULARY * len(block[1]))
    assert sum(confidence for *_, confidence in found) == pytest.approx(1.0)


@given(blocks(judged=False))
def test_without_a_judge_an_outcome_is_the_product_of_the_exits_own_probabilities(block: Block) -> None:
    drafts, rows, _ = block
    for accepted, token, confidence in ranked(block, VOCABULARY):
        prefix = math.prod(row[draft] for row, draft in zip(rows[:accepted], drafts, strict=False))
        assert confidence == pytest.approx(prefix * rows[accepted][token])


def test_rejecting_a_draft_and_saying_it_is_no_outcome() -> None:
    assert ranked(([0], [[0.9, 0.1], [0.5, 0.5]], [0.9]), 3) == [
        (1, 0, pytest.approx(0.45)),
        (1, 1, pytest.approx(0.45)),
        (0, 1, pytest.approx(0.1)),
    ]


def test_empty_block_has_one_row() -> None:
    assert ranked(([], [[0.25, 0.75]], []), 1) == [(0, 1, pytest.approx(0.75))]


def test_certain_exit_does_not_break_the_arithmetic() -> None:
    found = rank_outcomes([0.0], [math.log(0.5)], [3], [[(3, 0.0), (1, -40.0)], [(2, 0.0)]], 2)
    assert found[0] == (1, 2, pytest.approx(0.5))
    assert 0.0 <= found[1][2] <= 0.5


# --- the edge's own guess -----------------------------------------------------------------------------------------


def told(block: Block, kept: int) -> list[list[tuple[int, float]]]:
    """What a draft engine tells of a block: each place's `kept` likeliest tokens."""
    return [sorted(enumerate(row), key=lambda item: -item[1])[:kept] for row in block[1]]


@given(blocks(judged=False), st.integers(1, 5))
def test_the_edges_guess_is_what_its_draft_says(block: Block, limit: int) -> None:
    drafts, _, own = block
    everything = every_outcome(block)
    found = guess_outcomes(drafts, own, told(block, VOCABULARY), limit)
    best = sorted(everything.values(), reverse=True)[:limit]
    assert [outcome.probability for outcome in found] == pytest.approx(best, rel=1e-4)
    for accepted, token, probability in found:
        assert probability == pytest.approx(everything[accepted, token], rel=1e-4)


def test_a_doubtful_draft_makes_early_ends_likelier_when_measurement_says_so() -> None:
    alternatives = [[(5, 0.6), (6, 0.4)], [(7, 0.6), (8, 0.4)], [(9, 1.0)]]
    trusting = guess_outcomes((5, 7), (0.6, 0.6), alternatives, 1)
    doubting = guess_outcomes((5, 7), (0.6, 0.6), alternatives, 1, Calibration(accept=Line(1.0, -2.0)))
    assert trusting[0][:2] == (0, 6)
    assert doubting[0][:2] == (0, 6)
    assert doubting[0].probability > trusting[0].probability


def test_a_draft_that_says_nothing_of_alternatives_yields_no_guess() -> None:
    assert guess_outcomes((5, 7), (0.6, 0.6), (), 4) == []


def test_without_a_look_beyond_the_block_its_full_acceptance_is_not_named() -> None:
    found = guess_outcomes((5,), (0.9,), [[(5, 0.9), (6, 0.1)]], 4)
    assert found == [Ranked(0, 6, pytest.approx(0.1))]


def test_a_draft_that_is_certain_does_not_break_the_arithmetic() -> None:
    found = guess_outcomes((5,), (1.0,), [[(5, 1.0), (6, 1e-9)], [(1, 1.0), (2, 0.0)]], 4)
    assert found[0] == Ranked(1, 1, pytest.approx(1.0, abs=1e-5))
    assert all(0.0 <= outcome.probability <= 1e-5 for outcome in found[1:])


# --- mixing -------------------------------------------------------------------------------------------------------


def test_an_outcome_that_both_name_comes_before_those_that_one_does() -> None:
    own = [(0, 1, 0.5), (1, 2, 0.3)]
    hint = [(2, 3, 0.5), (1, 2, 0.3)]
    found = mix(own, hint, Mixture(0.5, 0.5, 0.0))
    assert found[0][:2] == (1, 2)
    assert sum(outcome.probability for outcome in found) == pytest.approx(1.0)


@given(
    st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.floats(0.001, 1.0), min_size=1),
    st.floats(0.1, 1.0),
)
def test_a_side_without_weight_changes_no_order(own: dict[tuple[int, int], float], weight: float) -> None:
    ranking = sorted(((*outcome, share) for outcome, share in own.items()), key=lambda item: -item[2])
    hint = [(accepted, token, 1.0 - share) for accepted, token, share in ranking]
    found = mix(ranking, hint, Mixture(weight, 0.0, 0.1))
    shares = [own[outcome.accepted, outcome.next_token] for outcome in found]
    assert shares == sorted(shares, reverse=True)


def test_what_neither_names_takes_its_share() -> None:
    (alone,) = mix([(1, 2, 1.0)], [(1, 2, 1.0)], Mixture(0.5, 0.5, 1.0))
    assert alone.probability == pytest.approx(0.5)


def test_at_most_so_many_are_kept_and_an_unknown_layer_has_a_plain_mixture() -> None:
    foresight = Foresight(mixtures={18: Mixture(0.9, 0.1, 0.0)})
    own = [(0, token, 0.1) for token in range(6)]
    assert len(mix(own, [], foresight.mixture(18), 4)) == 4
    assert foresight.mixture(7) == Mixture()


# --- levels -------------------------------------------------------------------------------------------------------


@given(st.floats(0.0, 1.0))
def test_a_confidence_travels_as_a_small_number_and_comes_back_near(confidence: float) -> None:
    sent = level(confidence)
    assert 0 <= sent < LEVELS
    if 0.02 < confidence < 0.999:
        assert abs(confidence_at(sent) - confidence) < 0.02
