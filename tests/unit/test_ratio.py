"""Ratio mode says what the target would: joint distributions of two tokens over blocks, lanes, trims and rollbacks.

Models over a small vocabulary whose next token depends on the one before. What is said in 200,000 runs is compared with
the product of the target's own probabilities, which are written out here once more; each run has its own place in the
session's noise. Runs are vectorised, of the same functions that `judge` is made of, and `judge` is shown to agree with
them run by run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared.protocol import Sampling, SamplingMode
from shared.sampling.conformal import ConformalRule
from shared.sampling.logits import processed
from shared.sampling.noise import Address, Place, Stream, addresses, gumbel, uniform
from shared.sampling.ratio import (
    Decision,
    Truncation,
    accept_uniform,
    accepts,
    candidates,
    dense,
    draft_token,
    draft_uniform,
    judge,
    path_number,
    probabilities,
    residual,
)
from shared.sampling.rules import Row, Rules
from shared.sampling.sparse import Candidate, SparseRow, above, dropped_mass, quantised, top
from tests.reference import shares

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

V = 7
RUNS = 200_000
SEED = 20261124
BATCH = 50_000
PROMPT = (2, 3, 2)


def model(seed: int, sharpness: float) -> Floats:
    """Logits after nothing (row V) and after each token, `[V + 1, V]`."""
    return np.random.default_rng(seed).standard_normal((V + 1, V)) * sharpness


TARGET = model(1, 1.2)
DRAFT = TARGET + model(2, 0.9)


def request(**asked: Any) -> Sampling:
    return Sampling(**({"temperature": 0.8, "seed": SEED, "mode": SamplingMode.RATIO} | asked))


REQUESTS = {
    "plain": request(),
    "hot": request(temperature=1.3),
    "top_p": request(top_p=0.8),
    "top_k and min_p": request(top_k=4, min_p=0.05),
    "penalties": request(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
    "bias": request(logit_bias=((1, 1.5), (4, -2.0)), presence_penalty=0.7),
    "all": request(temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.2, presence_penalty=0.3),
}


def row_after(sampling: Sampling, *said: int) -> Row:
    return Row(Rules(sampling, len(PROMPT)), np.array((*PROMPT, *said)))


CONTEXTS = (*((token,) for token in range(V)), ())


def target_rows(sampling: Sampling) -> Floats:
    """The target's probabilities of a second token after each first one, and of the first (row V), `[V + 1, V]`."""
    return np.stack(
        [probabilities(processed(TARGET[at], row_after(sampling, *said))) for at, said in enumerate(CONTEXTS)]
    )


def expected_rows(sampling: Sampling) -> Floats:
    return np.stack([shares(TARGET[at], sampling, PROMPT, said) for at, said in enumerate(CONTEXTS)])


def draft_rows(sampling: Sampling, truncation: Truncation, bits: int) -> list[SparseRow]:
    """What the draft draws from in each of these places."""
    return [
        quantised(truncation(candidates(DRAFT[at], row_after(sampling, *said), None)), bits)
        for at, said in enumerate(CONTEXTS)
    ]


# --- what the draft draws from ------------------------------------------------------------------------------------


def everything(found: Sequence[Candidate]) -> list[Candidate]:
    return list(found)


def conformal(found: Sequence[Candidate]) -> list[Candidate]:
    """What a threshold keeps that has come to rest on rows like this one."""
    rule, threshold = ConformalRule(target=0.15, rate=0.1, highest=0.5), 0.3
    for _ in range(20):
        threshold = rule.after(threshold, dropped_mass(above(found, threshold)))
    return above(found, threshold)


# --- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Runs of the models, vectorised: where each stands in the noise, and what it can do there. A context is the token
    before, V for none."""

    p: Floats
    q: list[SparseRow]
    places: Address

    def __len__(self) -> int:
        return len(self.places.position)

    def at(self, stream: Stream, row: int) -> Address:
        position = self.places.position + row
        return self.places._replace(position=position, stream=np.full_like(position, int(stream) << 1))

    def test_uniforms(self, row: int) -> Floats:
        return uniform(self.at(Stream.ACCEPT, row), np.zeros(len(self), dtype=np.int64))

    def noise(self, row: int) -> Floats:
        """What the residual, or the target itself, draws with."""
        return gumbel(self.at(Stream.RESIDUAL, row).column(), np.arange(V)[None])

    def drafted(self, row: int, context: Ints) -> Ints:
        """The draft's token, by the path that the context is."""
        numbers = np.array([*(path_number([token]) for token in range(V)), path_number([])])
        return self.picked(uniform(self.at(Stream.DRAFT, row), numbers[context]), context)

    def picked(self, uniforms: Floats, context: Ints) -> Ints:
        pairs = zip(uniforms.tolist(), context.tolist(), strict=True)
        return np.array([self.q[after].draw(number) for number, after in pairs])

    def drawn(self, weights: Floats, row: int) -> Ints:
        with np.errstate(divide="ignore"):
            return (np.log(weights) + self.noise(row)).argmax(axis=-1)

    def said_by_target(self, row: int, context: Ints) -> Ints:
        return self.drawn(self.p[context], row)

    def tested(self, row: int, context: Ints, drafted: Ints) -> tuple[npt.NDArray[np.bool_], Ints]:
        """One token tested: whether it holds, and what is said."""
        every, p = np.arange(len(self)), self.p[context]
        q = np.stack([dense(each, V) for each in self.q])[context]
        held = accepts(p[every, drafted], q[every, drafted], self.test_uniforms(row))
        return held, np.where(held, drafted, self.drawn(residual(p, q), row))

    def start(self) -> Ints:
        """The context of the first token."""
        return np.full(len(self), V)


def runs(p: Floats, q: list[SparseRow], first: int, count: int) -> Runs:
    places = addresses([Place(SEED, 0, 0)])
    return Runs(p, q, places._replace(position=np.arange(first, first + count) * 4))


Play = Callable[[Runs], tuple[Ints, Ints]]


def block_of_two(run: Runs) -> tuple[Ints, Ints]:
    """A block of two; where its first token is rejected, the next round drafts anew."""
    d0 = run.drafted(0, run.start())
    d1 = run.drafted(1, d0)
    held, x0 = run.tested(0, run.start(), d0)
    _, x1 = run.tested(1, x0, np.where(held, d1, run.drafted(1, x0)))
    return x0, x1


def block_of_one(run: Runs) -> tuple[Ints, Ints]:
    """A block of one; the target's own next token where it holds."""
    held, x0 = run.tested(0, run.start(), run.drafted(0, run.start()))
    _, after = run.tested(1, x0, run.drafted(1, x0))
    return x0, np.where(held, run.said_by_target(1, x0), after)


def late_and_trimmed(run: Runs) -> tuple[Ints, Ints]:
    """The floor speaks first in every other run; what is left of the block is tested where it agrees."""
    d0 = run.drafted(0, run.start())
    d1 = run.drafted(1, d0)
    late = np.arange(len(run)) % 2 == 0
    held, x0 = run.tested(0, run.start(), d0)
    x0 = np.where(late, run.said_by_target(0, run.start()), x0)
    agrees = np.where(late, x0 == d0, held)
    _, x1 = run.tested(1, x0, np.where(agrees, d1, run.drafted(1, x0)))
    return x0, x1


def lanes_by_surprise(run: Runs) -> tuple[Ints, Ints]:
    """Which lanes there are hangs on the draws of the block under way: the lane that came true, or the floor."""
    d0 = run.drafted(0, run.start())
    d1 = run.drafted(1, d0)
    held, x0 = run.tested(0, run.start(), d0)
    lane = d1 < V // 2  # known when lanes are started, and nothing of a lane's own draws
    _, of_lane = run.tested(1, x0, run.drafted(1, x0))
    _, of_block = run.tested(1, x0, d1)
    return x0, np.where(held, of_block, np.where(lane, of_lane, run.said_by_target(1, x0)))


PLAYS: dict[str, Play] = {
    "block of two": block_of_two,
    "block of one": block_of_one,
    "late and trimmed": late_and_trimmed,
    "lanes by surprise": lanes_by_surprise,
}
TRUNCATIONS: dict[str, tuple[Truncation, int]] = {
    "quantised": (everything, 8),
    "few bits": (everything, 3),
    "top 3": (lambda found: top(found, 3), 6),
    "conformal": (conformal, 6),
}
CASES = [
    *(("block of two", name, "conformal") for name in REQUESTS),
    *(("block of two", "all", name) for name in TRUNCATIONS if name != "conformal"),
    *((name, "all", "conformal") for name in PLAYS if name != "block of two"),
]


def counted(play: Play, p: Floats, q: list[SparseRow]) -> Ints:
    """How often each pair was said, `[V, V]`."""
    counts = np.zeros(V * V, dtype=np.int64)
    for first in range(0, RUNS, BATCH):
        x0, x1 = play(runs(p, q, first, BATCH))
        counts += np.bincount(x0 * V + x1, minlength=V * V)
    return counts.reshape(V, V)


def chi_squared(counts: Ints, p: Floats) -> float:
    """The probability of a deviation as large as that of `counts` from the joint distribution that `p` means."""
    expected = (p[V][:, None] * p[:V] * counts.sum()).ravel()
    seen = counts.ravel().astype(float)
    if (seen[expected == 0] > 0).any():
        return 0.0
    usual, rare = expected >= 10, (expected > 0) & (expected < 10)
    cells = [(seen[usual], expected[usual])]
    if expected[rare].sum() >= 10:
        cells.append((seen[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    statistic = sum(float(((found - due) ** 2 / due).sum()) for found, due in cells)
    freedom = sum(len(due) for _, due in cells) - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize(("play", "name", "truncation"), CASES, ids=lambda each: each.replace(" ", "-"))
def test_two_tokens_are_distributed_as_the_target_says(play: str, name: str, truncation: str) -> None:
    sampling, (kept, bits) = REQUESTS[name], TRUNCATIONS[truncation]
    counts = counted(PLAYS[play], target_rows(sampling), draft_rows(sampling, kept, bits))
    assert counts.sum() == RUNS
    assert chi_squared(counts, expected_rows(sampling)) > 0.001


def test_looked_up_tokens_are_tested_as_certain() -> None:
    q = [SparseRow.certain((token + 1) % V) for token in range(V + 1)]
    counts = counted(block_of_two, target_rows(REQUESTS["all"]), q)
    assert chi_squared(counts, expected_rows(REQUESTS["all"])) > 0.001


# --- what must be found -------------------------------------------------------------------------------------------


class TargetForResidual(Runs):
    def tested(self, row: int, context: Ints, drafted: Ints) -> tuple[npt.NDArray[np.bool_], Ints]:
        held, said = super().tested(row, context, drafted)
        return held, np.where(held, said, self.said_by_target(row, context))


class ResidualNotRenormalised(Runs):
    """Drawn by its running sum, which ends below one: what is beyond goes to the last token."""

    def drawn(self, weights: Floats, row: int) -> Ints:
        number = uniform(self.at(Stream.RESIDUAL, row), np.zeros(len(self), dtype=np.int64))
        return (weights.cumsum(axis=-1) < number[:, None]).sum(axis=-1).clip(max=V - 1)


class OneNoiseForDraftAndTest(Runs):
    def drafted(self, row: int, context: Ints) -> Ints:
        return self.picked(self.test_uniforms(row), context)


class OneNoiseForTestAndResidual(Runs):
    def test_uniforms(self, row: int) -> Floats:
        return np.exp(-np.exp(-self.noise(row)[:, 0]))  # uniform, but it is the first token's noise


class OneNoiseForAllPlaces(Runs):
    """The same noise used twice: every row is tested with the first one's."""

    def test_uniforms(self, row: int) -> Floats:
        return super().test_uniforms(0)


class TruncatedAfterDrawing(Runs):
    """q is truncated, as it should be; the draw was from all of it."""

    def picked(self, uniforms: Floats, context: Ints) -> Ints:
        whole = draft_rows(REQUESTS["plain"], everything, 8)
        return Runs(self.p, whole, self.places).picked(uniforms, context)


def floor_where_the_draw_is_large(run: Runs) -> tuple[Ints, Ints]:
    """A branch chosen by what it says: a lane is left to the floor when it drew a token of large number."""
    x0 = run.said_by_target(0, run.start())
    d1 = run.drafted(1, x0)
    _, of_lane = run.tested(1, x0, d1)
    return x0, np.where(d1 < V // 2, of_lane, run.said_by_target(1, x0))


@pytest.mark.parametrize(
    "broken",
    [
        TargetForResidual,
        ResidualNotRenormalised,
        OneNoiseForDraftAndTest,
        OneNoiseForTestAndResidual,
        OneNoiseForAllPlaces,
        TruncatedAfterDrawing,
    ],
    ids=lambda each: each.__name__,
)
def test_what_is_broken_is_found(broken: type[Runs]) -> None:
    p, q = target_rows(REQUESTS["plain"]), draft_rows(REQUESTS["plain"], *TRUNCATIONS["top 3"])

    def play(run: Runs) -> tuple[Ints, Ints]:
        return block_of_two(broken(run.p, run.q, run.places))

    assert chi_squared(counted(block_of_two, p, q), expected_rows(REQUESTS["plain"])) > 0.001
    assert chi_squared(counted(play, p, q), expected_rows(REQUESTS["plain"])) < 1e-6


def test_a_branch_that_is_chosen_by_what_it_says_is_found() -> None:
    p, q = target_rows(REQUESTS["plain"]), draft_rows(REQUESTS["plain"], everything, 6)
    counts = counted(floor_where_the_draw_is_large, p, q)
    assert chi_squared(counts, expected_rows(REQUESTS["plain"])) < 1e-6


# --- one block ----------------------------------------------------------------------------------------------------


def test_blocks_are_drawn_and_judged_as_the_runs_are() -> None:
    sampling = REQUESTS["plain"]
    p, q = target_rows(sampling), draft_rows(sampling, conformal, 6)
    count = 300
    # In these runs a position is the number of tokens said before.
    together = replace(runs(p, q, 0, count), places=addresses([Place(SEED, n, 0) for n in range(count)]))
    d0 = together.drafted(0, together.start())
    d1 = together.drafted(1, d0)
    held0, x0 = together.tested(0, together.start(), d0)
    held1, x1 = together.tested(1, d0, d1)
    last = together.said_by_target(2, d1)
    outcomes = set()
    for number in range(count):
        own = sampling.model_copy(update={"choice": number})
        first = draft_token(DRAFT[V], row_after(own), None, conformal)
        second = draft_token(DRAFT[first.token], row_after(own, first.token), None, conformal)
        assert (first.token, second.token) == (d0[number], d1[number])
        said = (first.token, second.token)
        rows = [row_after(own, *said[:length]) for length in range(3)]
        logits = TARGET[[V, *said]]
        judged = judge(lambda row, logits=logits: logits[row], rows, said, [first.row, second.row])
        if not held0[number]:
            assert judged == Decision(0, x0[number])
        elif not held1[number]:
            assert judged == Decision(1, x1[number])
        else:
            assert judged == Decision(2, last[number])
        outcomes.add(judged.accepted)
    assert outcomes == {0, 1, 2}


def fixed(*shares: float) -> Floats:
    """Logits of these probabilities at temperature 1."""
    with np.errstate(divide="ignore"):
        return np.log(np.array(shares))


def judged(p: Floats, token: int, row: SparseRow, seed: int) -> Decision:
    """One token after nothing, judged."""
    sampling = Sampling(temperature=1.0, seed=seed)
    rows = [Row(Rules(sampling, 1), [0]), Row(Rules(sampling, 1), [0, token])]
    return judge(lambda _: p, rows, [token], [row])


def test_a_token_that_its_row_does_not_name_is_taken_as_certain() -> None:
    p = fixed(0.25, 0.75)
    for seed in range(200):
        assert judged(p, 0, SparseRow((1,), (8,)), seed) == judged(p, 0, SparseRow.certain(0), seed)
    held = sum(judged(p, 0, SparseRow((1,), (8,)), seed).accepted for seed in range(2000))
    assert 0.2 < held / 2000 < 0.3


def test_a_token_that_the_target_excludes_is_never_accepted() -> None:
    assert all(judged(fixed(0.0, 1.0), 0, SparseRow((0, 1), (1, 1)), seed) == (0, 1) for seed in range(200))


def test_a_rejected_token_is_never_said_in_its_own_place() -> None:
    for seed in range(500):
        accepted, said = judged(fixed(0.3, 0.3, 0.4), 0, SparseRow((0, 1), (4, 4)), seed)
        assert accepted or said != 0


def test_rows_after_the_one_that_decides_are_not_looked_at() -> None:
    sampling = Sampling(temperature=1.0)
    rows = [Row(Rules(sampling, 1), [0, *[1] * n]) for n in range(3)]
    asked: list[int] = []

    def logits(row: int) -> Floats:
        asked.append(row)
        return fixed(1.0, 0.0)

    assert judge(logits, rows, [1, 1], []) == Decision(0, 0)
    assert asked == [0]


def test_a_token_left_out_since_the_target_excludes_it_is_rejected_like_one_that_is_tested() -> None:
    p, q = fixed(0.0, 0.4, 0.3, 0.3), SparseRow((0, 1, 2), (4, 2, 2))
    outcomes = set()
    for seed in range(300):
        rules = Rules(Sampling(temperature=1.0, seed=seed, mode=SamplingMode.RATIO), 1)
        rows = [Row(rules, [0]), Row(rules, [0, 0])]
        tested = judge(lambda _: p, rows, [0], [q])
        assert judge(lambda _: p, rows[:1], [], [q]) == tested
        outcomes.add(tested.next_token)
    assert outcomes == {1, 2, 3}


def test_an_empty_block_is_the_targets_own_draw() -> None:
    p = target_rows(REQUESTS["plain"])
    run = replace(runs(p, [], 0, 50), places=addresses([Place(SEED, n, 0) for n in range(50)]))
    said = run.said_by_target(0, run.start())
    for number in range(50):
        own = REQUESTS["plain"].model_copy(update={"choice": number})
        assert judge(lambda _: TARGET[V], [row_after(own)], [], []) == Decision(0, said[number])


def test_the_same_block_gets_the_same_verdict_and_another_choice_or_place_another_one() -> None:
    def verdicts(choice: int, *before: int) -> list[Decision]:
        found = []
        for seed in range(60):
            rules = Rules(Sampling(temperature=1.3, seed=seed, choice=choice), 1)
            rows = [Row(rules, [0, *before, *([1, 2][:n])]) for n in range(3)]
            q = [SparseRow((1, 4), (32, 32)), SparseRow((0, 2), (16, 48))]
            found.append(judge(lambda row: TARGET[row], rows, [1, 2], q))
        return found

    assert verdicts(0) == verdicts(0)
    assert verdicts(0) != verdicts(1)
    assert verdicts(0) != verdicts(0, 5)


def test_noise_of_test_and_draft_differs_and_so_does_that_of_other_paths() -> None:
    place = Place(SEED, 0, 3)
    numbers = [accept_uniform(place), *(draft_uniform(place, path_number([token])) for token in range(100))]
    assert len(set(numbers)) == 101


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="1 rows, 1 tokens"):
        judge(lambda _: TARGET[0], [row_after(REQUESTS["plain"])], [0], [])


def test_paths_that_differ_in_their_last_token_have_numbers_of_their_own() -> None:
    assert len({path_number([1, token]) for token in range(5000)}) == 5000


def test_where_nothing_is_left_of_the_residual_the_target_draws() -> None:
    p = np.array([0.5, 0.5])
    assert np.array_equal(residual(p, p), p)


# --- the draft ----------------------------------------------------------------------------------------------------


def test_a_draft_draws_from_what_it_tells() -> None:
    rows = [row_after(REQUESTS["hot"].model_copy(update={"choice": n})) for n in range(4000)]
    drawn = [draft_token(DRAFT[V], row, None, lambda found: top(found, 3), bits=4) for row in rows]
    (row,) = {each.row for each in drawn}
    for token in row.tokens:
        share = sum(each.token == token for each in drawn) / len(drawn)
        assert share == pytest.approx(row.probability(token), abs=0.04)
    assert len(row.tokens) == 3
    assert drawn[0].dropped == pytest.approx(
        1 - sum(share for _, share in candidates(DRAFT[V], rows[0], None)[:3])
    )
