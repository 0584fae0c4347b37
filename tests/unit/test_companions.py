"""Sharing a pass: what waiting for companions brings, and what it costs, in virtual time."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import pytest

from services.verifier.engine.companions import Companions

RETURN_S = 0.06
FIXED_S = 0.006
SESSION_S = 0.00009
"""What a pass takes on a large GPU, and a session in it."""
FORESEEN_S = 0.002
"""How long a block takes that was there before the pass had ended."""
LASTS_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """What came of it: sessions a pass, the engine's time a round of a session, how long a round takes."""

    together: float
    busy_s: float
    round_s: float


def simulate(
    sessions: int, *, gather: bool, jitter_s: float, spread: float = 0.0, foreseen: float = 0.0
) -> Outcome:
    """Sessions whose blocks come back a while after each pass; `spread` of them by how far they are away, and a share that
    was `foreseen` at once."""
    chance, companions = random.Random(1), Companions()
    away = [RETURN_S * (1 + spread * (chance.random() - 0.5)) for _ in range(sessions)]
    coming = [(chance.random() * RETURN_S, number) for number in range(sessions)]
    heapq.heapify(coming)
    ready: dict[int, float] = {}
    now_s = busy_s = 0.0
    passes = rounds = 0
    while now_s < LASTS_S:
        while coming and coming[0][0] <= now_s:
            at_s, number = heapq.heappop(coming)
            ready[number] = at_s
            companions.returned(str(number), at_s)
        if not ready:
            now_s = coming[0][0]
            continue
        since = list(ready.values())
        wait_s = companions.wait_s(now_s, ready_since=since)
        if gather and wait_s > 0.0:
            now_s = min([now_s + wait_s + 1e-9, *(at_s for at_s, _ in coming[:1])])
            continue
        took_s = FIXED_S + SESSION_S * len(ready)
        now_s, busy_s = now_s + took_s, busy_s + took_s
        passes, rounds = passes + 1, rounds + len(ready)
        for number in ready:
            companions.spoke(str(number), now_s)
            drafted_s = away[number] + chance.expovariate(1 / jitter_s)
            back_s = FORESEEN_S if chance.random() < foreseen else drafted_s
            heapq.heappush(coming, (now_s + back_s, number))
        ready.clear()
    return Outcome(rounds / passes, busy_s / rounds, LASTS_S * sessions / rounds)


@pytest.mark.parametrize("sessions", [4, 16, 64])
@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("jitter_s", [0.002, 0.01])
@pytest.mark.parametrize("foreseen", [0.0, 0.35])
def test_sessions_share_passes_and_none_waits_much_longer_than_the_others_take(
    sessions: int, spread: float, jitter_s: float, foreseen: float
) -> None:
    alone = simulate(sessions, gather=False, jitter_s=jitter_s, spread=spread, foreseen=foreseen)
    shared = simulate(sessions, gather=True, jitter_s=jitter_s, spread=spread, foreseen=foreseen)
    assert shared.together > 1.8 * alone.together
    assert shared.busy_s < 0.6 * alone.busy_s
    assert shared.round_s < alone.round_s + 1.2 * RETURN_S
    assert shared.together > 0.85 * sessions


@pytest.mark.parametrize("sessions", [2, 3, 4])
def test_few_sessions_share_nearly_every_pass(sessions: int) -> None:
    alone = simulate(sessions, gather=False, jitter_s=0.005, foreseen=0.35)
    shared = simulate(sessions, gather=True, jitter_s=0.005, foreseen=0.35)
    assert shared.together > 0.85 * sessions
    assert shared.busy_s < 1.2 / sessions * alone.busy_s * alone.together
    assert shared.round_s < 1.8 * alone.round_s


def test_a_few_that_are_far_away_do_not_hold_up_the_others() -> None:
    companions = Companions()
    for number in range(128):
        companions.spoke("a", float(number))
        companions.returned("a", number + (1.0 if number % 25 == 0 else 0.05))
    companions.spoke("far", 200.0)
    waited_s = companions.wait_s(200.0, ready_since=[200.0])
    assert 0.05 < waited_s < 0.3


def test_a_block_that_missed_the_last_pass_does_not_have_the_next_one_leave_others_behind() -> None:
    companions = Companions()
    for number in range(128):
        companions.spoke("a", float(number))
        companions.returned("a", number + 0.06)
    companions.spoke("a", 200.0)
    companions.returned("late", 199.995)  # while that pass was under way
    waited_s = companions.wait_s(200.0, ready_since=[199.995])
    assert waited_s == pytest.approx(0.06)
    assert companions.wait_s(200.061, ready_since=[199.995]) == 0.0


def test_a_session_alone_waits_for_nobody() -> None:
    assert simulate(1, gather=True, jitter_s=0.002) == simulate(1, gather=False, jitter_s=0.002)


def test_nothing_is_waited_for_before_a_return_was_seen() -> None:
    companions = Companions()
    companions.spoke("a", 0.0)
    assert companions.wait_s(0.01, ready_since=[0.01]) == 0.0


def test_the_usual_time_follows_what_sessions_take() -> None:
    companions = Companions()
    for number in range(500):
        companions.spoke("a", float(number))
        companions.returned("a", number + (0.2 if number < 300 else 0.1))
    assert companions.usual_s == pytest.approx(0.1, rel=0.02)
    companions.returned("a", 1000.0)
    companions.returned("unknown", 1000.0)
    assert companions.usual_s == pytest.approx(0.1, rel=0.02), "only what was told something comes back"
