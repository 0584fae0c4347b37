"""Ranked outcomes from an exit's distributions, against the sum over all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.verifier.engine.outcomes import rank_outcomes

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
