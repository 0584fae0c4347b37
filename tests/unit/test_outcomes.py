"""Ranked outcomes against the sum over all of them: an exit's, the edge's own, and both mixed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.speculation.outcomes import (
    FLOOR,
    LEVELS,
    Calibration,
    Foresight,
    Guess,
    Line,
    Mixture,
    Ranked,
    Weights,
    confidence_at,
    guess,
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
    found = guess(drafts, own, told(block, VOCABULARY)).ranking(limit, Calibration())
    best = sorted(everything.values(), reverse=True)[:limit]
    assert [outcome.probability for outcome in found] == pytest.approx(best, rel=1e-4)
    for accepted, token, probability in found:
        assert probability == pytest.approx(everything[accepted, token], rel=1e-4)


def test_a_doubtful_draft_makes_early_ends_likelier_when_measurement_says_so() -> None:
    alternatives = [[(5, 0.6), (6, 0.4)], [(7, 0.6), (8, 0.4)], [(9, 1.0)]]
    doubt = Calibration(accept=Line(1.0, -2.0))
    (trusting,) = guess((5, 7), (0.6, 0.6), alternatives).ranking(1, Calibration())
    (doubting,) = guess((5, 7), (0.6, 0.6), alternatives, doubt).ranking(1, doubt)
    assert trusting[:2] == doubting[:2] == (0, 6)
    assert doubting.probability > trusting.probability


def test_a_draft_that_says_nothing_of_alternatives_yields_no_guess() -> None:
    assert guess((5, 7), (0.6, 0.6), ()).ranking(4, Calibration()) == []


def test_without_a_look_beyond_the_block_its_full_acceptance_is_not_named() -> None:
    found = guess((5,), (0.9,), [[(5, 0.9), (6, 0.1)]]).ranking(4, Calibration())
    assert found == [Ranked(0, 6, pytest.approx(0.1))]


def test_a_draft_that_is_certain_does_not_break_the_arithmetic() -> None:
    found = guess((5,), (1.0,), [[(5, 1.0), (6, 1e-9)], [(1, 1.0), (2, 0.0)]]).ranking(4, Calibration())
    assert found[0] == Ranked(1, 1, pytest.approx(1.0, abs=1e-5))
    assert all(0.0 <= outcome.probability <= 1e-5 for outcome in found[1:])


# --- mixing -------------------------------------------------------------------------------------------------------


def evenly(names: list[dict[int, float]]) -> Guess:
    """A guess for which all lengths are equally likely."""
    share = -math.log(len(names))
    return Guess((share,) * len(names), tuple({t: math.log(p) for t, p in row.items()} for row in names))


def test_an_outcome_that_both_name_comes_before_those_that_one_does() -> None:
    own = evenly([{1: 0.5}, {2: 0.3}, {}])
    hint = [(2, 3, 0.5), (1, 2, 0.3)]
    found = mix(own, {18: hint}, Mixture.plain(18, 0.5, 0.5, 0.0))
    assert found[0][:2] == (1, 2)
    assert sum(outcome.probability for outcome in found) == pytest.approx(1.0)


@given(
    st.dictionaries(st.integers(0, 3), st.floats(0.001, 1.0), min_size=1),
    st.floats(0.1, 1.0),
)
def test_a_side_without_weight_changes_no_order(names: dict[int, float], weight: float) -> None:
    hint = [(0, token, 1.0 - share) for token, share in names.items()]
    found = mix(evenly([names]), {18: hint}, Mixture.plain(18, weight, 0.0, 0.1))
    shares = [names[outcome.next_token] for outcome in found]
    assert shares == sorted(shares, reverse=True)


def test_what_neither_names_takes_its_share() -> None:
    (alone,) = mix(evenly([{2: 1.0}]), {18: [(0, 2, 1.0)]}, Mixture.plain(18, 0.5, 0.5, 1.0))
    assert alone.probability == pytest.approx(0.5)


def test_the_drafts_word_on_what_follows_a_refusal_counts_apart_from_its_word_on_where() -> None:
    own = Guess((math.log(0.9), math.log(0.1)), ({1: math.log(0.5), 2: math.log(0.4)}, {3: 0.0}))
    hint = [(0, 2, 0.3), (0, 1, 0.3), (1, 3, 0.35)]
    names_only = Mixture(Weights(0.5, 0.0, 0.0), {18: Weights(1.0, 0.0, 0.0)}, 0.0)
    assert [found[:2] for found in mix(own, {18: hint}, names_only)] == [(1, 3), (0, 1), (0, 2)]
    both = Mixture(Weights(0.5, 0.5, 0.0), {18: Weights(1.0, 0.0, 0.0)}, 0.0)
    assert [found[:2] for found in mix(own, {18: hint}, both)] == [(0, 1), (0, 2), (1, 3)]


def test_a_hint_says_how_far_the_block_holds_even_where_it_names_no_token_of_the_drafts() -> None:
    own = evenly([{1: 0.5}, {1: 0.5}])
    mixture = Mixture(Weights(1.0, 0.0, 0.0), {18: Weights(0.0, 1.0, 0.0)}, 0.0)
    found = mix(own, {18: [(1, 7, 0.8), (0, 7, 0.2)]}, mixture, 2)
    assert [outcome[:2] for outcome in found if outcome.next_token == 1] == [(1, 1)]


def test_earlier_hints_count_and_one_that_was_lost_says_nothing() -> None:
    own = evenly([{1: 0.5, 2: 0.5}])
    latest = [(0, 1, 0.5), (0, 2, 0.5)]
    mixture = Mixture(
        Weights(0.0, 0.0, 0.0), {18: Weights(0.5, 0.0, 0.5 * FLOOR), 21: Weights(1.0, 0.0, FLOOR)}, 0.0
    )
    with_both = mix(own, {18: [(0, 2, 0.9)], 21: latest}, mixture)
    assert with_both[0][:2] == (0, 2)
    assert with_both[0].probability > 0.9
    lost = mix(own, {21: latest}, mixture)
    assert [outcome.probability for outcome in lost] == pytest.approx([0.5, 0.5])


def test_at_most_so_many_are_kept_and_an_unknown_layer_has_a_plain_mixture() -> None:
    foresight = Foresight(mixtures={18: Mixture.plain(18, 0.9, 0.1, 0.0)})
    own = evenly([dict.fromkeys(range(6), 0.1)])
    assert len(mix(own, {}, foresight.mixture(18), 4)) == 4
    assert foresight.mixture(7) == Mixture.plain(7)


def test_exponents_of_older_files_are_read() -> None:
    found = Mixture.from_json(18, {"own": 0.3, "hint": 0.6, "other": 0.05})
    assert found == Mixture.plain(18, 0.3, 0.6, 0.05)
    assert found.own.named == found.own.length == 0.3
    with pytest.raises(KeyError):
        Mixture.from_json(18, {"own": {"named": 0.3}, "hints": {}, "other": 0.05})


# --- levels -------------------------------------------------------------------------------------------------------


@given(st.floats(0.0, 1.0))
def test_a_confidence_travels_as_a_small_number_and_comes_back_near(confidence: float) -> None:
    sent = level(confidence)
    assert 0 <= sent < LEVELS
    if 0.02 < confidence < 0.999:
        assert abs(confidence_at(sent) - confidence) < 0.02
