"""The int8 shortlist must give the answers of the whole head."""

from __future__ import annotations

import pytest
import torch

from services.verifier.engine.exit_head import (
    LEAST_LOG_PROB,
    ExactHead,
    Naming,
    ShortlistHead,
    can_shortlist,
)
from shared.protocol import Sampling
from shared.sampling import logits as sampling
from shared.sampling.rules import Row, Rules
from training.exits import fit_naming

VOCABULARY, HIDDEN, ROWS, K = 4096, 192, 40, 5


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN) * 0.1
    if not can_shortlist(weight):
        pytest.skip("no int8 kernel here; the exact head serves")
    return weight


def test_shortlist_gives_the_tokens_and_log_probabilities_of_the_whole_head(weight: torch.Tensor) -> None:
    hidden = torch.randn(ROWS, HIDDEN) * torch.rand(ROWS, 1) * 4
    drafts = torch.randint(VOCABULARY, (ROWS,))
    exact = ExactHead(lambda rows: rows @ weight.T, weight)(hidden, drafts, K)
    found = ShortlistHead(weight)(hidden, drafts, K)
    assert torch.equal(found.tokens, exact.tokens)
    torch.testing.assert_close(found.log_probs, exact.log_probs, atol=0.05, rtol=0)
    torch.testing.assert_close(found.drafted, exact.drafted, atol=0.05, rtol=0)


def test_a_reduced_vocabulary_names_its_own_tokens_alone_and_judges_any(weight: torch.Tensor) -> None:
    vocabulary = torch.arange(1, VOCABULARY, 2)
    hidden = torch.randn(ROWS, HIDDEN) * 2
    drafts = torch.randint(VOCABULARY, (ROWS,))
    exact = ExactHead(lambda rows: rows @ weight.T, weight, Naming(vocabulary))(hidden, drafts, K)
    found = ShortlistHead(weight, Naming(vocabulary))(hidden, drafts, K)
    assert bool((exact.tokens % 2 == 1).all())
    assert torch.equal(found.tokens, exact.tokens)
    named = (hidden @ weight[vocabulary].T).log_softmax(dim=-1)
    torch.testing.assert_close(exact.log_probs, named.topk(K, dim=-1).values)
    torch.testing.assert_close(found.log_probs, exact.log_probs, atol=0.05, rtol=0)
    torch.testing.assert_close(found.drafted, exact.drafted, atol=0.05, rtol=0)


def test_a_head_in_fewer_dimensions_names_the_same_tokens_where_states_have_no_more(
    weight: torch.Tensor,
) -> None:
    directions = torch.linalg.qr(torch.randn(HIDDEN, 24)).Q
    states = torch.randn(400, 24) @ directions.T * 2
    naming = fit_naming(weight, torch.arange(VOCABULARY), states, rank=32)
    hidden, drafts = states[:ROWS], torch.randint(VOCABULARY, (ROWS,))
    exact = ExactHead(lambda rows: rows @ weight.T, weight)(hidden, drafts, K)
    found = ShortlistHead(weight, naming)(hidden, drafts, K)
    assert (found.tokens == exact.tokens).float().mean() > 0.99
    assert abs(naming.tail) < 0.05
    torch.testing.assert_close(found.log_probs, exact.log_probs, atol=0.1, rtol=0)
    torch.testing.assert_close(found.drafted, exact.drafted, atol=0.1, rtol=0)


def test_shortlist_is_right_where_one_token_has_all_the_probability(weight: torch.Tensor) -> None:
    weight[7] = torch.ones(HIDDEN)
    hidden = torch.ones(1, HIDDEN)
    found = ShortlistHead(weight)(hidden, torch.tensor([7]), K)
    assert found.tokens[0, 0] == 7
    assert found.log_probs[0, 0] == pytest.approx(0.0, abs=1e-3)
    assert torch.isfinite(found.log_probs).all()


@pytest.mark.parametrize(
    "weight", [torch.zeros(VOCABULARY, HIDDEN, dtype=torch.bfloat16), torch.zeros(64, HIDDEN)]
)
def test_other_types_and_small_vocabularies_take_the_whole_head(weight: torch.Tensor) -> None:
    assert not can_shortlist(weight)


def test_exact_head_needs_no_more_candidates_than_there_are() -> None:
    found = ExactHead(lambda rows: rows, torch.eye(2))(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 5)
    assert found.tokens.tolist() == [[1, 0]]
    assert found.drafted.exp() + found.log_probs[0, 0].exp() == pytest.approx(1.0)


def drawn_rows(count: int) -> list[Row | None]:
    """Rows of several sessions' draws."""
    kinds = [
        Rules(Sampling(temperature=1.0, seed=3), 2),
        Rules(Sampling(temperature=0.7, top_p=0.9, seed=4), 2),
        Rules(Sampling(temperature=0.8, repetition_penalty=1.3, seed=5), 2),
    ]
    return [Row(kinds[n % 3], tuple(range(4 + n))) for n in range(count)]


@pytest.mark.parametrize("reduced", [False, True])
def test_scores_of_drawn_rows_are_those_of_perturbed_logits(weight: torch.Tensor, reduced: bool) -> None:
    vocabulary = torch.arange(1, VOCABULARY, 2) if reduced else None
    hidden = torch.randn(ROWS, HIDDEN) * torch.rand(ROWS, 1) * 4
    drafts = torch.randint(VOCABULARY, (ROWS,))
    rows = drawn_rows(ROWS)
    logits = (hidden @ weight.T).numpy()
    wanted = sampling.best(logits, [row for row in rows if row is not None], K, asked=drafts.numpy())
    exact = ExactHead(lambda each: each @ weight.T, weight, Naming(vocabulary))(hidden, drafts, K, rows)
    found = ShortlistHead(weight, Naming(vocabulary))(hidden, drafts, K, rows)
    if not reduced:
        left = torch.from_numpy(wanted.values).isfinite()
        assert torch.equal(exact.tokens[left], torch.from_numpy(wanted.columns)[left])
        truncated = torch.from_numpy(wanted.asked).isneginf()
        assert bool((exact.drafted[truncated] == LEAST_LOG_PROB).all())
    first = exact.log_probs > LEAST_LOG_PROB
    agree = (found.tokens == exact.tokens)[first].float().mean()
    assert agree > 0.95, "int8 may swap tokens that are near"
    assert bool((exact.log_probs[:, 0] > LEAST_LOG_PROB).all())
    same = (found.tokens == exact.tokens) & first
    apart = (found.log_probs[same] - exact.log_probs[same]).abs()
    assert apart.quantile(0.97) < 0.1
    assert apart.max() < 0.5


@pytest.mark.parametrize("kind", [ExactHead, ShortlistHead])
def test_greedy_rows_score_alike_beside_drawn_ones(weight: torch.Tensor, kind: type) -> None:
    hidden = torch.randn(9, HIDDEN)
    drafts = torch.randint(VOCABULARY, (9,))
    head = ShortlistHead(weight) if kind is ShortlistHead else ExactHead(lambda each: each @ weight.T, weight)
    rows = [row if n % 3 else None for n, row in enumerate(drawn_rows(9))]
    mixed, greedy, drawn = (
        head(hidden, drafts, K, rows),
        head(hidden, drafts, K),
        head(hidden, drafts, K, drawn_rows(9)),
    )
    for number, row in enumerate(rows):
        alone = greedy if row is None else drawn
        assert torch.equal(mixed.tokens[number], alone.tokens[number])
        torch.testing.assert_close(mixed.log_probs[number], alone.log_probs[number], atol=0.02, rtol=0)
        torch.testing.assert_close(mixed.drafted[number], alone.drafted[number], atol=0.02, rtol=0)
        assert torch.equal(mixed.draft_rows[number], weight[drafts[number]])
