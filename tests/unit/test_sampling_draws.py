"""Draws: the noise that is not looked up would have changed nothing, and the distribution is the target's.

Statistics are G-tests against distributions that are worked out here in another way, on 200,000 draws a case with fixed
seeds. What is broken on purpose has to fail them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared.protocol import Sampling
from shared.sampling import noise
from shared.sampling.logits import Vocabulary, best, draw, processed
from shared.sampling.noise import Place, Stream
from shared.sampling.rules import Row, Rules
from tests.reference import shares

Floats = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

LARGE = 49152
SMALL = 48
SAMPLES = 200_000
LEAST_P = 0.001
BROKEN_P = 1e-9


def rules(prompt_length: int = 3, **sampling: Any) -> Rules:
    return Rules(Sampling(**sampling), prompt_length, (2, 5))


def model_like(seed: int, rows: int, width: int = LARGE) -> Floats:
    """Logits with a few tokens ahead and a long tail."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.5, (rows, width)).astype(np.float32)
    for row in logits:
        row[rng.integers(width, size=12)] += rng.uniform(4, 14, size=12)
    return logits


def flat(seed: int, rows: int, width: int = LARGE) -> Floats:
    return np.random.default_rng(seed).normal(0, 0.3, (rows, width)).astype(np.float32)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.7},
    "hot": {"temperature": 2.5},
    "nucleus": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 5000},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.6},
    "greedy, penalised": {"repetition_penalty": 1.2, "logit_bias": ((11, 3.0),)},
}


# --- exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [model_like, flat])
@pytest.mark.parametrize("name", CASES)
def test_a_draw_is_the_largest_of_all_perturbed_logits(name: str, make: Callable[[int, int], Floats]) -> None:
    """Nothing that could have won is left out."""
    logits = make(1, 40)
    drawn_by = rules(seed=77, choice=2, **CASES[name])
    rows = [Row(drawn_by, tuple(range(10 + n))) for n in range(40)]
    tokens = np.arange(LARGE)
    perturbed = np.empty((40, LARGE))
    for number, row in enumerate(rows):
        scaled = processed(logits[number], row).astype(np.float64)
        temperature = drawn_by.temperature
        gumbel = noise.gumbel(noise.address(Place(77, 2, 7 + number)), tokens)
        perturbed[number] = temperature * (scaled + gumbel) if temperature else scaled
    assert np.array_equal(draw(logits, rows), perturbed.argmax(axis=1))
    found = best(logits, rows, 5, asked=np.full(40, 123))
    wanted = np.argsort(-perturbed, axis=1, kind="stable")[:, :5]
    left = np.isfinite(found.values)
    assert np.array_equal(left, np.isfinite(np.take_along_axis(perturbed, wanted, axis=1)))
    assert np.array_equal(found.columns[left], wanted[left])
    np.testing.assert_allclose(found.asked, perturbed[:, 123])
    ids = np.random.default_rng(3).permutation(LARGE)
    reordered = Vocabulary(ids[:9000]).with_more(ids[9000:])
    assert np.array_equal(ids[draw(logits[:, ids], rows, reordered)], perturbed.argmax(axis=1))


def test_rows_drawn_together_are_drawn_as_each_alone() -> None:
    logits = model_like(2, 6)
    kinds = [rules(seed=n, **CASES[name]) for n, name in enumerate(("plain", "nucleus", "greedy, penalised"))]
    rows = [Row(kinds[n % 3], tuple(range(5 + n))) for n in range(6)]
    together = draw(logits, rows)
    assert [int(draw(logits[n : n + 1], rows[n : n + 1])[0]) for n in range(6)] == together.tolist()


def test_the_sum_of_perturbed_logits_is_near_and_that_of_greedy_ones_exact() -> None:
    logits = model_like(3, 4)
    greedy = [Row(rules(logit_bias=((1, 1.0),)), (1, 2, 3, 4))] * 4
    found = best(logits, greedy, 2)
    wanted = torch.from_numpy(np.stack([processed(row, greedy[0]) for row in logits])).logsumexp(dim=-1)
    np.testing.assert_allclose(found.total, wanted.numpy(), rtol=1e-6)
    kept = best(logits, [Row(rules(seed=4, temperature=1.0, top_k=1), (1, 2, 3, 4))] * 4, 1)
    np.testing.assert_allclose(np.exp(kept.values[:, 0] - kept.total), 1.0)


def test_a_row_with_fewer_tokens_than_asked_for_is_filled_up() -> None:
    found = best(model_like(5, 1), [Row(rules(temperature=1.0, top_k=2), (1, 2, 3))], 4)
    assert np.isfinite(found.values[0]).tolist() == [True, True, False, False]


def test_a_row_that_a_grammar_leaves_few_tokens_yields_one_of_them() -> None:
    logits = flat(4, 30)
    allowed = np.array([7, 300, 40_000])
    logits[:, np.setdiff1d(np.arange(LARGE), allowed)] = -np.inf
    rows = [Row(rules(seed=seed, temperature=1.0), (1, 2, 3)) for seed in range(30)]
    assert set(draw(logits, rows).tolist()) == set(allowed.tolist())
    found = best(logits, rows, 5)
    assert np.isfinite(found.values).sum(axis=1).tolist() == [3] * 30


def test_tokens_of_another_choice_or_seed_differ() -> None:
    logits = np.repeat(flat(1, 1), 3, axis=0)
    asked = [{"seed": 1}, {"seed": 2}, {"seed": 1, "choice": 1}]
    tokens = draw(logits, [Row(rules(temperature=1.0, **each), (1, 2, 3, 4)) for each in asked])
    assert len(set(tokens.tolist())) == 3


def test_a_row_knows_its_position_whatever_was_committed_before() -> None:
    assert Row(rules(prompt_length=3, temperature=1.0), (1, 2, 3, 9, 9)).position == 2


# --- distribution -------------------------------------------------------------------------------------


def g_test(counts: Ints, expected: Floats) -> float:
    """P of counts at least as far from `expected` shares (Wilks; cells with few are joined; a forbidden token is 0)."""
    counts, expected = counts.ravel(), expected.ravel() * counts.sum()
    if np.any(counts[expected == 0] > 0):
        return 0.0
    order = np.argsort(expected)
    rare = order[np.cumsum(expected[order]) < 10]
    common = np.setdiff1d(np.flatnonzero(expected), rare)
    observed = np.append(counts[common], counts[rare].sum()).astype(float)
    wanted = np.append(expected[common], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    seen = observed > 0
    g = 2 * float((observed[seen] * np.log(observed[seen] / wanted[seen])).sum())
    freedom = len(wanted) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(g / 2).double()))


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "temperature": {"temperature": 0.7},
    "nucleus": {"temperature": 1.0, "top_p": 0.85},
    "all truncations": {"temperature": 1.2, "min_p": 0.01, "top_k": 20, "top_p": 0.95},
    "penalties": {
        "temperature": 0.9,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": ((7, 1.5),),
        "min_tokens": 4,
        "top_p": 0.95,
    },
}
LOGITS = (np.random.default_rng(8).normal(0, 1.6, SMALL)).astype(np.float32)
PROMPT, OUTPUT = (4, 7, 30), (9, 9, 20)
SALT = 20_261_124


CHUNK = 5000


@functools.cache
def noise_of(step: int) -> Floats:
    """Noise of the whole small vocabulary at each sample's first, or second, position `[SAMPLES, SMALL]`."""
    places = noise.addresses([Place(SALT, 0, 2 * sample + step) for sample in range(SAMPLES)])
    parts = [
        noise.gumbel(places.take(slice(start, start + CHUNK)).column(), np.arange(SMALL)[None])
        for start in range(0, SAMPLES, CHUNK)
    ]
    return np.concatenate(parts)


def scaled_after(sampling: Sampling, output: tuple[int, ...]) -> Floats:
    return processed(LOGITS, Row(Rules(sampling, len(PROMPT), (2, 5)), (*PROMPT, *output)))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_keyed_draws_have_the_target_s_distribution(name: str) -> None:
    sampling = Sampling(**DISTRIBUTIONS[name])
    scaled = scaled_after(sampling, OUTPUT)
    tokens = (scaled + noise_of(0)).argmax(axis=1)
    counts = np.bincount(tokens, minlength=SMALL)
    assert g_test(counts, shares(LOGITS, sampling, PROMPT, OUTPUT)) > LEAST_P


@pytest.mark.parametrize("name", ["plain", "penalties"])
def test_draw_itself_has_the_target_s_distribution(name: str) -> None:
    """The function that the target calls, on fewer draws, seed by seed."""
    sampling = [Sampling(seed=seed, **DISTRIBUTIONS[name]) for seed in range(10_000)]
    rows = [Row(Rules(each, len(PROMPT), (2, 5)), (*PROMPT, *OUTPUT)) for each in sampling]
    tokens = draw(np.repeat(LOGITS[None], len(rows), axis=0), rows)
    assert g_test(np.bincount(tokens, minlength=SMALL), shares(LOGITS, sampling[0], PROMPT, OUTPUT)) > LEAST_P


def two_steps(sampling: Sampling, second_noise: Floats) -> tuple[Ints, Floats]:
    """Counts of pairs of tokens, the second drawn after the first; and their distribution."""
    first = (scaled_after(sampling, OUTPUT) + noise_of(0)).argmax(axis=1)
    following = np.stack([scaled_after(sampling, (*OUTPUT, token)) for token in range(SMALL)])
    second = (following[first] + second_noise).argmax(axis=1)
    counts = np.bincount(first * SMALL + second, minlength=SMALL * SMALL)
    ahead = shares(LOGITS, sampling, PROMPT, OUTPUT)
    behind = np.stack([shares(LOGITS, sampling, PROMPT, (*OUTPUT, token)) for token in range(SMALL)])
    return counts, ahead[:, None] * behind


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_pairs_of_draws_have_the_target_s_distribution(name: str) -> None:
    counts, expected = two_steps(Sampling(**DISTRIBUTIONS[name]), noise_of(1))
    assert g_test(counts, expected) > LEAST_P


def test_the_same_noise_used_twice_is_found_out() -> None:
    counts, expected = two_steps(Sampling(**DISTRIBUTIONS["plain"]), noise_of(0))
    assert g_test(counts, expected) < BROKEN_P


def test_truncation_after_sampling_is_found_out() -> None:
    """Who draws first, and takes the likeliest token for one that truncation forbids, draws that too often."""
    sampling = Sampling(**DISTRIBUTIONS["nucleus"])
    whole = scaled_after(Sampling(temperature=1.0), OUTPUT)
    tokens = (whole + noise_of(0)).argmax(axis=1)
    allowed = np.isfinite(scaled_after(sampling, OUTPUT))
    tokens = np.where(allowed[tokens], tokens, whole.argmax())
    counts = np.bincount(tokens, minlength=SMALL)
    assert g_test(counts, shares(LOGITS, sampling, PROMPT, OUTPUT)) < BROKEN_P


def test_penalties_that_miss_the_token_before_are_found_out() -> None:
    sampling = Sampling(**DISTRIBUTIONS["penalties"])
    _, expected = two_steps(sampling, noise_of(1))
    scaled = scaled_after(sampling, OUTPUT)
    first, second = ((scaled + noise_of(step)).argmax(axis=1) for step in (0, 1))
    counts = np.bincount(first * SMALL + second, minlength=SMALL * SMALL)
    assert g_test(counts, expected) < BROKEN_P


def test_draft_and_target_agree_as_often_as_promised() -> None:
    """At least (1 - TV) / (1 + TV), for distributions at a distance TV (Daliri et al., arXiv 2408.07978)."""
    target = LOGITS
    rng = np.random.default_rng(3)
    for spread in (0.1, 0.5, 1.5):
        draft = target + rng.normal(0, spread, SMALL).astype(np.float32)
        p, q = (np.exp(each) / np.exp(each).sum() for each in (target, draft))
        distance = np.abs(p - q).sum() / 2
        gumbel = noise_of(0)
        agreed = float(((target + gumbel).argmax(axis=1) == (draft + gumbel).argmax(axis=1)).mean())
        assert agreed > (1 - distance) / (1 + distance) - 0.005


def test_streams_of_one_place_are_independent() -> None:
    samples = 20_000
    at = [
        noise.addresses([Place(5, 0, n, stream) for n in range(samples)])
        for stream in (Stream.DRAFT, Stream.TARGET)
    ]
    tokens = [(LOGITS + noise.gumbel(each.column(), np.arange(SMALL)[None])).argmax(axis=1) for each in at]
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum()
    counts = np.bincount(tokens[0] * SMALL + tokens[1], minlength=SMALL * SMALL)
    assert g_test(counts, p[:, None] * p[None]) > LEAST_P
