"""The core, both sides of it, in a world that loses, doubles, reorders and crashes: the client never notices."""

from __future__ import annotations

import pytest

from shared.speculation import verifier as v
from tests.simulation.world import Faults, World

CALM = Faults(
    lose=0, double=0, reorder=0, crash_verifier=0, crash_gateway=0, unasked=0, move=0, evict=0, redis_fails=0
)

HARSH = Faults(crash_verifier=0.05, crash_gateway=0.03, move=0.03, evict=0.05, redis_fails=0.05)


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("calm", CALM),
        ("lossy", Faults(crash_verifier=0, crash_gateway=0, move=0)),
        ("crashing", HARSH),
        ("wrong drafts", Faults(wrong_draft=1.0)),
        ("right drafts", Faults(wrong_draft=0.0)),
    ],
)
def test_the_client_gets_exactly_what_the_target_says(name: str, faults: Faults) -> None:
    crashes = 0
    for seed in range(600):
        world = World(seed, faults)
        try:
            world.run()
        except AssertionError as broken:
            raise AssertionError(f"{name}, seed {seed}: {broken}") from broken
        crashes += world.crashes
    assert crashes or not (faults.crash_verifier or faults.crash_gateway)


def test_in_a_calm_world_every_round_is_verified_once() -> None:
    for seed in range(200):
        world = World(seed, CALM)
        world.run()
        rounds = [verdict.round for verdict in world.published]
        assert rounds == list(range(len(rounds)))
        assert world.edge.statistics.resent == 0


def test_a_verdict_published_before_its_commit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug put back in: the simulation must be able to see it."""
    honest = v.VerifierSession._commit

    def hasty(self: v.VerifierSession) -> list[v.VerifierAction]:
        actions = honest(self)
        committed, uncommitted = list(self._committed), list(self._uncommitted)
        self._committed.extend(uncommitted)
        message = self._open
        early = self._publish_verdict()
        self._open, self._committed = message, committed
        return [*early, *actions]

    monkeypatch.setattr(v.VerifierSession, "_commit", hasty)
    with pytest.raises(AssertionError, match="published, not committed"):
        for seed in range(50):
            World(seed, CALM).run()


def test_a_base_that_nobody_compares_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: World, commit: v.Commit) -> v.VerifierEvent:
        self.record = type(self.record)(
            **{**vars(self.record), "tokens": (*self.record.tokens, *commit.tokens)}
        )
        return v.Committed(commit.base + len(commit.tokens))

    monkeypatch.setattr(World, "_commit", careless)
    with pytest.raises(AssertionError):
        for seed in range(300):
            World(seed, HARSH).run()
