"""The core, both sides of it, in a world that loses, doubles, reorders and crashes: the client never notices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shared.protocol import Block, Forward, Policy, Prompt, Tokens, Verdict
from shared.speculation import edge as e
from shared.speculation import verifier as v
from tests.simulation.choices import Choices
from tests.simulation.search import WORLDS, Violation, run, shrink
from tests.simulation.world import World

SCHEDULES = 20_000
PARTS = 4
"""Each of its own, so that none takes long."""


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", WORLDS)
def test_the_client_gets_exactly_what_the_target_says(name: str, part: int) -> None:
    schedules = SCHEDULES // (PARTS * len(WORLDS)) + 1
    report = run(schedules, part * schedules, worlds=[name], stop_after=1)
    assert not report.violations, str(report)
    seen, faults = report.counts, WORLDS[name]
    assert seen.floors and seen.stales + (faults.reorder == 0)
    assert seen.crashes or not faults.crash_verifier
    if faults.wrong_draft < 1.0:
        assert seen.hits and seen.taken and seen.chains and seen.trims


def test_in_a_calm_world_that_waits_every_round_is_verified_once() -> None:
    seen = 0
    for seed in range(200):
        world = World(Choices(seed), WORLDS["calm"])
        if world.policy is Policy.COST:
            world.run()
            rounds = [answer.round for answer in world.published if isinstance(answer, Verdict)]
            assert len(rounds) == len(world.published) == len(set(rounds))
            seen += 1
    assert seen


def test_the_same_seed_is_the_same_schedule_and_its_tape_too() -> None:
    for seed in range(20):
        traces: list[list[str]] = [[], [], []]
        first = World(Choices(seed, keep=True), WORLDS["harsh"], trace=traces[0])
        first.run()
        World(Choices(seed), WORLDS["harsh"], trace=traces[1]).run()
        World(Choices(0, first.choices.tape), WORLDS["harsh"], trace=traces[2]).run()
        assert traces[0] == traces[1] == traces[2]


# --- bugs put back in: the search must be able to see them --------------------------------------------------------


def found(schedules: int = 1_500) -> Violation:
    """The first violation."""
    report = run(schedules, 0, stop_after=1, attempts=300)
    assert report.violations, "nothing was found"
    return report.violations[0]


def test_a_verdict_published_before_its_commit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = v.VerifierSession._commit_next

    def hasty(self: v.VerifierSession) -> list[v.VerifierAction]:
        commits = honest(self)
        return [self._publish(self._results[0]), *commits] if commits else []

    monkeypatch.setattr(v.VerifierSession, "_commit_next", hasty)
    assert found().said == "published, not committed"


def test_a_store_that_does_not_compare_the_base_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: World, commit: v.Commit) -> v.VerifierEvent:
        return self._append(commit)

    monkeypatch.setattr(World, "_commit", careless)
    assert found().said


def test_a_store_that_does_not_compare_the_epoch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: World, commit: v.Commit) -> v.VerifierEvent:
        fits = commit.base == len(self.record.tokens) and self.record.finish_reason is None
        return self._append(commit) if fits else self._refusal(commit.base)

    monkeypatch.setattr(World, "_commit", careless)
    assert found().said == "committed in an epoch that is over"


def test_a_block_whose_epoch_nobody_compares_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = v.VerifierSession._consider

    def careless(self: v.VerifierSession, message: Prompt | Block | Forward) -> list[v.VerifierAction]:
        return honest(self, message.model_copy(update={"epoch": self._epoch}))

    monkeypatch.setattr(v.VerifierSession, "_consider", careless)
    assert found(
        6_000
    ).said in (  # it is the other gateway's round of that number, or none of the one that drives
        "verified a draft of a gateway that drives the session no more",
        "verified a draft at another place than its own",
    )


def test_a_forward_that_does_not_wait_for_its_outcome_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = v._Draft.ready

    def rash(self: v._Draft, said: Tokens) -> bool:
        early = not self.asks and self.base <= len(said) and bool(self.left(said))
        return early or honest(self, said)

    monkeypatch.setattr(v._Draft, "ready", rash)
    assert found().said == "verified a forward of another outcome"


def test_a_forward_whose_outcome_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = v.VerifierSession._consider_forward

    def off(self: v.VerifierSession, message: Forward) -> None:
        honest(self, message.model_copy(update={"accepted": max(0, message.accepted - 1)}))

    monkeypatch.setattr(v.VerifierSession, "_consider_forward", off)
    assert found().said == "verified a forward of another outcome"


def test_a_trim_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Callable[[v._Draft, Tokens], Tokens | None] = v._Draft.left

    def off(self: v._Draft, said: Tokens) -> Tokens | None:
        left = honest(self, said)
        return left[1:] if left and len(said) > self.base else left

    monkeypatch.setattr(v._Draft, "left", off)
    assert found().said == "verified a draft at another place than its own"


def test_a_trim_at_the_edge_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = e.EdgeSession._rebase

    def off(self: e.EdgeSession, lane: e._Lane) -> None:
        late = self.base > lane.base + len(lane.assumed)
        honest(self, lane)
        if late and lane.tokens:
            lane.tokens = lane.tokens[1:]

    monkeypatch.setattr(e.EdgeSession, "_rebase", off)
    assert found().said == "sent up what nobody drafted for that place"


def test_a_block_sent_again_cut_short_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a round's hints count from must not change: this bug was there."""
    honest = e.EdgeSession._ask

    def short(self: e.EdgeSession) -> list[e.EdgeAction]:
        actions = honest(self)
        for place, action in enumerate(actions):
            if isinstance(action, e.SendBlock) and action.base < self.base:
                left = action.tokens[self.base - action.base :]
                actions[place] = e.SendBlock(action.epoch, action.round, self.base, left)
        return actions

    monkeypatch.setattr(e.EdgeSession, "_ask", short)
    assert found(6_000).said


def test_an_answer_that_never_comes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v.VerifierSession, "_stale", lambda self, message: v.SetTimer(0, 1.0))
    said = run(300, 0, worlds=["lossy"], stop_after=1, attempts=0).violations[0].said
    assert said.startswith("not finished after")


def test_what_is_found_is_shrunk_to_the_same_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = v.VerifierSession._commit_next

    def hasty(self: v.VerifierSession) -> list[v.VerifierAction]:
        commits = honest(self)
        return [self._publish(self._results[0]), *commits] if commits else []

    monkeypatch.setattr(v.VerifierSession, "_commit_next", hasty)
    world = World(Choices(3, keep=True), WORLDS["harsh"])
    with pytest.raises(AssertionError) as broken:
        world.run()
    tape = shrink(world.choices.tape, WORLDS["harsh"], str(broken.value))
    assert tape == shrink(world.choices.tape, WORLDS["harsh"], str(broken.value))
    shortest = World(Choices(0, tape), WORLDS["harsh"])
    with pytest.raises(AssertionError, match="published, not committed"):
        shortest.run()
    assert shortest.counts.steps <= min(5, world.counts.steps)
