"""Dialogues with the edge side of the core: an event goes in, actions come out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shared.protocol import Fault, FinishReason, Floor, Hint, Outcome, Policy, Stale, Tokens, Verdict
from shared.sampling.sparse import SparseRow
from shared.speculation.edge import (
    ACKNOWLEDGE,
    CREDIT,
    RESTS,
    Abandoned,
    Deliver,
    Drafted,
    DropDraft,
    EdgeAction,
    EdgeConfig,
    EdgeSession,
    Fail,
    FaultArrived,
    Finish,
    FloorArrived,
    HintArrived,
    Opened,
    Phase,
    Relocated,
    SendBlock,
    SendForward,
    SendPrompt,
    SetTimer,
    Source,
    StaleArrived,
    StartDraft,
    TimerFired,
    VerdictArrived,
)
from shared.speculation.pace import TRIALS, Common

CONFIG = EdgeConfig(
    gateway="g", max_tokens=100, block_length=3, stop_tokens=frozenset({2}), max_lanes=2, lane_threshold=0.2
)


def verdict(
    number: int, base: int, accepted: int, *tokens: int, epoch: int = 1, finish: FinishReason | None = None
) -> VerdictArrived:
    return VerdictArrived(
        Verdict(
            session="s",
            epoch=epoch,
            round=number,
            base=base,
            accepted=accepted,
            tokens=tokens,
            finish_reason=finish,
        )
    )


def hint(
    number: int, base: int, *outcomes: tuple[int, int, float], layer: int = 24, epoch: int = 1
) -> HintArrived:
    return HintArrived(
        Hint(
            session="s",
            epoch=epoch,
            round=number,
            base=base,
            layer=layer,
            outcomes=tuple(Outcome(accepted=a, next_token=t, confidence=c) for a, t, c in outcomes),
        )
    )


def stale(
    number: int, base: int, since: int, *tokens: int, epoch: int = 1, gateway: str = "g"
) -> StaleArrived:
    return StaleArrived(
        Stale(session="s", epoch=epoch, round=number, base=base, since=since, tokens=tokens, gateway=gateway)
    )


def without_timers(actions: list[EdgeAction]) -> list[EdgeAction]:
    return [action for action in actions if not isinstance(action, SetTimer)]


def drafting(config: EdgeConfig = CONFIG) -> EdgeSession:
    """A session whose prefill has said 10; lane 0 is being drafted."""
    edge = EdgeSession(config)
    edge.handle(Opened(epoch=1), 0.0)
    edge.handle(verdict(0, 0, 0, 10), 1.0)
    assert edge.phase is Phase.DRAFTING
    return edge


def verifying(config: EdgeConfig = CONFIG, block: Tokens = (11, 12, 13)) -> EdgeSession:
    """A session whose block of round 1, on base 1, is up."""
    edge = drafting(config)
    edge.handle(Drafted(0, block), 2.0)
    assert edge.phase is Phase.VERIFYING
    return edge


def test_a_new_session_sends_its_prompt_and_drafts_after_the_first_verdict() -> None:
    edge = EdgeSession(CONFIG)
    assert without_timers(edge.handle(Opened(epoch=1), 0.0)) == [SendPrompt(1, 0, 0)]
    assert edge.handle(verdict(0, 0, 0, 10), 1.0) == [
        StartDraft(0, 1, (), 3),
        Deliver(0, (10,), (Source.CORRECTED,), 0),
    ]


def test_a_resumed_session_goes_on_drafting_from_what_is_committed() -> None:
    edge = EdgeSession(CONFIG)
    assert edge.handle(Opened(epoch=3, committed=(10, 11), round=7), 0.0) == [StartDraft(0, 2, (), 3)]
    assert without_timers(edge.handle(Drafted(0, (12,)), 1.0)) == [SendBlock(3, 7, 2, (12,))]


def test_a_hint_starts_a_lane_and_the_verdict_that_agrees_sends_it_at_once() -> None:
    edge = verifying()
    assert edge.handle(hint(1, 1, (2, 99, 0.9)), 3.0) == [StartDraft(1, 1, (11, 12, 99), 3)]
    edge.handle(Drafted(1, (20, 21)), 4.0)
    actions = without_timers(edge.handle(verdict(1, 1, 2, 11, 12, 99), 9.0))
    assert actions == [
        SendBlock(1, 2, 4, (20, 21)),
        Deliver(1, (11, 12, 99), (Source.ACCEPTED, Source.ACCEPTED, Source.CORRECTED), 1),
    ]
    assert (edge.statistics.hits, edge.statistics.misses, edge.statistics.late) == (1, 0, 0)
    assert edge.statistics.exit_lead_ms == {24: [6.0]}


def test_tokens_of_a_block_that_was_a_lane_are_shown_as_preemptive() -> None:
    edge = verifying()
    edge.handle(hint(1, 1, (0, 99, 0.9)), 3.0)
    edge.handle(Drafted(1, (20, 21)), 4.0)
    edge.handle(verdict(1, 1, 0, 99), 5.0)
    delivered = [a for a in edge.handle(verdict(2, 2, 1, 20, 50), 6.0) if isinstance(a, Deliver)]
    assert delivered == [Deliver(2, (20, 50), (Source.PREEMPTIVE, Source.CORRECTED), 2)]


def test_a_lane_that_is_still_drafted_when_the_verdict_comes_is_late_and_becomes_the_next_block() -> None:
    edge = verifying()
    edge.handle(hint(1, 1, (0, 99, 0.9)), 3.0)
    assert [a for a in edge.handle(verdict(1, 1, 0, 99), 5.0) if not isinstance(a, Deliver)] == []
    assert edge.phase is Phase.DRAFTING
    assert without_timers(edge.handle(Drafted(1, (20,)), 6.0)) == [SendBlock(1, 2, 2, (20,))]
    assert edge.statistics.late == 1


def test_a_miss_drops_the_lanes_and_drafts_anew() -> None:
    edge = verifying()
    edge.handle(hint(1, 1, (0, 99, 0.9)), 3.0)
    assert edge.handle(verdict(1, 1, 1, 11, 77), 5.0)[:2] == [StartDraft(2, 3, (), 3), DropDraft(1)]
    assert edge.statistics.misses == 1
    assert edge.handle(Drafted(1, (1,)), 6.0) == []


@pytest.mark.parametrize(
    "late_or_foreign",
    [
        hint(2, 1, (0, 99, 0.9)),
        hint(1, 1, (0, 99, 0.9), epoch=2),
        hint(1, 1, (0, 99, 0.1)),
        hint(1, 1, (4, 99, 0.9)),
        hint(1, 1, (0, 2, 0.9)),
    ],
    ids=[
        "other round",
        "other epoch",
        "no confidence",
        "more than the block",
        "ends the answer",
    ],
)
def test_a_hint_of_no_use_starts_nothing(late_or_foreign: HintArrived) -> None:
    assert verifying().handle(late_or_foreign, 3.0) == []


def test_hints_switched_off_are_measured_but_start_nothing() -> None:
    edge = verifying(EdgeConfig(gateway="g", max_tokens=100, block_length=3, hints=False))
    assert edge.handle(hint(1, 1, (0, 99, 0.9)), 3.0) == []
    assert edge.statistics.hinted_rounds == 1


def test_a_likelier_outcome_takes_the_place_of_the_least_likely_lane() -> None:
    edge = verifying()
    edge.handle(hint(1, 1, (0, 97, 0.3), (0, 98, 0.5)), 3.0)
    assert edge.handle(hint(1, 1, (0, 99, 0.46), layer=27), 4.0) == [DropDraft(2), StartDraft(3, 1, (99,), 3)]
    assert edge.handle(hint(1, 1, (1, 99, 0.2), layer=28), 5.0) == []


def test_a_repeated_verdict_changes_nothing() -> None:
    edge = verifying()
    edge.handle(verdict(1, 1, 0, 99), 5.0)
    assert edge.handle(verdict(1, 1, 0, 99), 6.0) == []
    assert edge.committed == (10, 99)


def test_a_verdict_of_an_older_epoch_changes_nothing() -> None:
    edge = verifying()
    edge.handle(Relocated(epoch=4), 3.0)
    assert edge.handle(verdict(1, 1, 0, 99, epoch=3), 5.0) == []
    assert edge.committed == (10,)


def test_a_verdict_of_a_newer_epoch_is_taken_and_the_epoch_with_it() -> None:
    edge = verifying()
    edge.handle(verdict(1, 1, 0, 99, epoch=2), 5.0)
    assert edge.epoch == 2
    assert without_timers(edge.handle(Drafted(1, (5,)), 6.0)) == [SendBlock(2, 2, 2, (5,))]


def test_a_session_moved_elsewhere_sends_its_open_block_again_in_the_new_epoch() -> None:
    edge = verifying()
    assert without_timers(edge.handle(Relocated(epoch=2), 3.0)) == [SendBlock(2, 1, 1, (11, 12, 13))]
    assert edge.handle(Relocated(epoch=2), 4.0) == []


def test_an_unanswered_round_is_sent_again_and_only_the_latest_timer_counts() -> None:
    edge = drafting()
    timer = next(a for a in edge.handle(Drafted(0, (11,)), 2.0) if isinstance(a, SetTimer))
    again = edge.handle(TimerFired(timer.timer), 2.0 + timer.delay_ms)
    assert without_timers(again) == [SendBlock(1, 1, 1, (11,))]
    assert edge.handle(TimerFired(timer.timer), 9e9) == []


def test_a_round_that_nobody_answers_fails_after_the_stall_timeout() -> None:
    edge = drafting()
    timer = next(a for a in edge.handle(Drafted(0, (11,)), 2.0) if isinstance(a, SetTimer))
    (failed,) = edge.handle(TimerFired(timer.timer), 121_000.0)
    assert isinstance(failed, Fail)
    assert failed.code == "unavailable"


def test_a_stale_answer_brings_the_edge_up_to_date() -> None:
    edge = verifying()
    actions = edge.handle(stale(1, 3, 1, 50, 51), 5.0)
    assert actions == [
        StartDraft(1, 3, (), 3),
        Deliver(1, (50, 51), (Source.CORRECTED, Source.CORRECTED), 1),
    ]


def test_a_stale_answer_that_only_names_a_newer_epoch_makes_the_block_go_up_again() -> None:
    edge = verifying()
    assert without_timers(edge.handle(stale(1, 1, 1, epoch=5), 5.0)) == [SendBlock(5, 1, 1, (11, 12, 13))]


def test_a_session_that_another_gateway_drives_ends_here() -> None:
    (failed,) = verifying().handle(stale(1, 1, 1, epoch=2, gateway="other"), 5.0)
    assert isinstance(failed, Fail)
    assert failed.code == "session_taken"


def test_an_answer_beyond_a_gap_delivers_nothing_and_asks_again() -> None:
    edge = verifying()
    assert without_timers(edge.handle(verdict(1, 4, 0, 60), 5.0)) == [SendBlock(1, 1, 1, (11, 12, 13))]
    assert edge.committed == (10,)


def test_tokens_that_contradict_what_was_delivered_end_the_session_loudly() -> None:
    (failed,) = verifying().handle(stale(1, 2, 0, 77, 51), 5.0)
    assert isinstance(failed, Fail)
    assert failed.code == "internal_error"


def test_the_finishing_verdict_delivers_then_finishes_and_drops_what_is_drafted() -> None:
    edge = verifying()
    edge.handle(hint(1, 1, (0, 99, 0.9)), 3.0)
    assert edge.handle(verdict(1, 1, 1, 11, 2, finish=FinishReason.STOP), 5.0) == [
        DropDraft(1),
        Deliver(1, (11, 2), (Source.ACCEPTED, Source.CORRECTED), 1),
        Finish(FinishReason.STOP),
    ]
    assert edge.handle(verdict(2, 3, 0, 5), 6.0) == []


def test_no_draft_is_longer_than_what_max_tokens_leaves() -> None:
    edge = EdgeSession(EdgeConfig(gateway="g", max_tokens=4, block_length=5))
    edge.handle(Opened(epoch=1), 0.0)
    assert StartDraft(0, 1, (), 2) in edge.handle(verdict(0, 0, 0, 10), 1.0)


def test_with_room_for_one_token_an_empty_block_goes_up_undrafted() -> None:
    edge = EdgeSession(EdgeConfig(gateway="g", max_tokens=2, block_length=5))
    edge.handle(Opened(epoch=1), 0.0)
    assert SendBlock(1, 1, 1, ()) in edge.handle(verdict(0, 0, 0, 10), 1.0)


def test_a_fault_that_may_pass_is_waited_for_once_the_answer_has_begun() -> None:
    edge = verifying()
    fault = Fault(session="s", epoch=1, round=1, code="overloaded", message="full", retry_after_s=0.5)
    (timer,) = edge.handle(FaultArrived(fault), 5.0)
    assert isinstance(timer, SetTimer)
    assert timer.delay_ms == 500
    assert without_timers(edge.handle(TimerFired(timer.timer), 505.0)) == [SendBlock(1, 1, 1, (11, 12, 13))]


def test_a_fault_before_the_first_token_is_passed_on_at_once() -> None:
    edge = EdgeSession(CONFIG)
    edge.handle(Opened(epoch=1), 0.0)
    fault = Fault(session="s", epoch=1, round=0, code="overloaded", message="full", retry_after_s=0.5)
    assert edge.handle(FaultArrived(fault), 5.0) == [Fail("overloaded", "full", 0.5)]


def test_an_abandoned_session_drops_its_lanes_and_is_deaf() -> None:
    edge = verifying()
    edge.handle(hint(1, 1, (0, 99, 0.9)), 3.0)
    assert edge.handle(Abandoned(), 4.0) == [DropDraft(1)]
    assert edge.handle(verdict(1, 1, 0, 99), 5.0) == []


# --- lanes from the edge's own guesses, forwards, the floor -------------------------------------------------------

AHEAD = EdgeConfig(
    gateway="g",
    max_tokens=200,
    block_length=2,
    stop_tokens=frozenset({2}),
    policy=Policy.LATENCY,
    guesses=True,
    forwards=True,
    max_lanes=2,
    lane_threshold=0.1,
)
NO_LEVELS: tuple[int, ...] = ()


def floor(base: int, *tokens: int, epoch: int = 1, verify_ms: float = 0.0) -> FloorArrived:
    return FloorArrived(Floor(session="s", epoch=epoch, base=base, tokens=tokens, verify_ms=verify_ms))


def took(message: VerdictArrived, taken: int) -> VerdictArrived:
    return VerdictArrived(message.verdict.model_copy(update={"taken": taken}))


def draft(lane: int, first: int = 11) -> Drafted:
    """Two tokens. The draft's outcomes: (2, first + 2) 36 %, (1, 60) 27 %, (1, 61) 18 %, (0, 50) 10 %."""
    return Drafted(
        lane,
        (first, first + 1),
        (0.9, 0.5),
        (
            ((first, 0.9), (50, 0.1)),
            ((first + 1, 0.5), (60, 0.3), (61, 0.2)),
            ((first + 2, 0.8), (70, 0.2)),
        ),
    )


def plain(lane: int, *tokens: int) -> Drafted:
    """Tokens that nothing is known of."""
    return Drafted(lane, tokens)


def guessing(config: EdgeConfig = AHEAD) -> tuple[EdgeSession, list[EdgeAction]]:
    """A session whose block (11, 12) of round 1, on base 1, has just gone up, and what went with it."""
    edge = drafting(config)
    return edge, without_timers(edge.handle(draft(0), 2.0))


def of_kind(kind: type[EdgeAction], actions: list[EdgeAction]) -> list[EdgeAction]:
    return [action for action in actions if isinstance(action, kind)]


def lane(number: int, base: int, *assumed: int) -> StartDraft:
    return StartDraft(number, base, assumed, AHEAD.block_length, beyond=True)


def test_as_a_block_goes_up_lanes_start_for_the_likeliest_outcomes_and_no_more_than_may() -> None:
    _, actions = guessing()
    assert isinstance(actions[0], SendBlock)
    assert actions[1:] == [lane(1, 1, 11, 12, 13), lane(2, 1, 11, 60)]


def test_a_lane_that_ends_makes_room_for_the_next_likely_outcome() -> None:
    edge, _ = guessing(replace(AHEAD, forwards=False))
    assert edge.handle(plain(1, 14, 15), 3.0) == [lane(3, 1, 11, 61)]
    assert edge.handle(plain(2, 80, 81), 4.0) == []  # the rest is less likely than the threshold


@pytest.mark.parametrize("changed", [{"guesses": False}, {"max_lanes": 0}])
def test_without_guesses_or_room_nothing_starts_before_a_hint(changed: dict[str, bool]) -> None:
    _, actions = guessing(replace(AHEAD, **changed))  # type: ignore[arg-type]
    assert [type(action) for action in actions] == [SendBlock]


def test_a_finished_lane_goes_up_before_the_verdict_with_what_it_follows() -> None:
    edge, _ = guessing()
    (forward, *_) = edge.handle(plain(2, 80, 81), 3.0)
    assert forward == SendForward(
        1, 2, 1, parent=1, accepted=1, next_token=60, tokens=(80, 81), confidences=NO_LEVELS
    )


def test_a_forward_tells_how_sure_its_draft_was() -> None:
    edge, actions = guessing()
    (block,) = of_kind(SendBlock, actions)
    assert isinstance(block, SendBlock) and len(block.confidences) == 2
    (forward, *_) = edge.handle(draft(1, 14), 3.0)
    assert isinstance(forward, SendForward)
    assert forward.confidences == block.confidences


def test_the_verdict_that_took_a_forward_needs_no_new_block() -> None:
    edge, _ = guessing()
    edge.handle(plain(1, 14, 15), 3.0)
    edge.handle(plain(2, 80, 81), 4.0)
    actions = edge.handle(took(verdict(1, 1, 2, 11, 12, 13), 2), 9.0)
    assert not of_kind(SendBlock, actions) and not of_kind(SendForward, actions)
    assert of_kind(SetTimer, actions)
    assert edge.phase is Phase.VERIFYING
    assert (edge.statistics.hits, edge.statistics.hits_by_guess, edge.statistics.taken) == (1, 1, 1)
    delivered = of_kind(Deliver, edge.handle(verdict(2, 4, 2, 14, 15, 16), 12.0))
    assert delivered == [
        Deliver(4, (14, 15, 16), (Source.PREEMPTIVE, Source.PREEMPTIVE, Source.CORRECTED), 2)
    ]


def test_lanes_and_forwards_of_other_outcomes_are_dropped_by_the_verdict() -> None:
    edge, _ = guessing()
    edge.handle(plain(1, 14, 15), 3.0)  # lane 3 starts in its place
    actions = edge.handle(took(verdict(1, 1, 2, 11, 12, 13), 2), 9.0)
    assert {action.lane for action in of_kind(DropDraft, actions) if isinstance(action, DropDraft)} == {2, 3}


def test_a_forward_that_came_too_late_is_open_all_the_same() -> None:
    edge, _ = guessing()
    edge.handle(plain(1, 14, 15), 3.0)
    actions = edge.handle(verdict(1, 1, 2, 11, 12, 13), 9.0)
    assert not of_kind(SendBlock, actions)
    assert (edge.statistics.hits, edge.statistics.taken) == (1, 0)
    (timer,) = of_kind(SetTimer, actions)
    assert isinstance(timer, SetTimer)
    again = without_timers(edge.handle(TimerFired(timer.timer), 9.0 + timer.delay_ms))
    assert again == [SendBlock(1, 2, 4, (14, 15))]  # lost on its way, perhaps: now as a block


def test_a_lane_that_was_not_forwarded_goes_up_as_a_block_when_it_comes_true() -> None:
    edge, _ = guessing(replace(AHEAD, forwards=False))
    edge.handle(plain(1, 14, 15), 3.0)
    assert edge.handle(verdict(1, 1, 2, 11, 12, 13), 9.0)[0] == SendBlock(1, 2, 4, (14, 15))


def test_what_follows_a_forward_is_drafted_and_forwarded_in_turn() -> None:
    edge, _ = guessing()
    first, *started = edge.handle(draft(1, 14), 3.0)
    assert isinstance(first, SendForward)
    assert started == [lane(3, 1, 11, 61)]
    # 36 % of 36 %: the outcome of the forward's own tokens is next in line, when there is room.
    assert lane(4, 1, 11, 12, 13, 14, 15, 16) in edge.handle(plain(2, 80), 4.0)
    second = of_kind(SendForward, edge.handle(plain(4, 17, 18), 5.0))
    assert second == [SendForward(1, 4, 1, parent=2, accepted=2, next_token=16, tokens=(17, 18))]


def test_two_rounds_ahead_are_taken_without_a_word_from_the_edge() -> None:
    edge, _ = guessing()
    edge.handle(draft(1, 14), 3.0)
    edge.handle(plain(2, 80), 4.0)
    edge.handle(plain(4, 17, 18), 5.0)
    actions = edge.handle(took(verdict(1, 1, 2, 11, 12, 13), 2), 9.0)
    actions += edge.handle(took(verdict(2, 4, 2, 14, 15, 16), 4), 12.0)
    assert not of_kind(SendBlock, actions)
    assert (edge.statistics.taken, edge.base) == (2, 7)
    delivered = of_kind(Deliver, edge.handle(verdict(4, 7, 2, 17, 18, 19), 15.0))
    assert delivered == [
        Deliver(7, (17, 18, 19), (Source.PREEMPTIVE, Source.PREEMPTIVE, Source.CORRECTED), 4)
    ]


def test_a_hint_ranks_the_outcomes_anew_which_starts_one_lane_and_stops_another() -> None:
    edge, _ = guessing()
    actions = edge.handle(hint(1, 1, (0, 50, 0.98)), 3.0)
    assert lane(3, 1, 50) in actions
    assert of_kind(DropDraft, actions)
    edge.handle(plain(3, 80, 81), 4.0)
    edge.handle(verdict(1, 1, 0, 50), 9.0)
    assert (edge.statistics.hits, edge.statistics.hits_by_exit, edge.statistics.hits_by_guess) == (1, 1, 0)


@pytest.mark.parametrize(("guesses", "seen"), [(True, 2), (False, 0)])
def test_whether_exits_were_of_use_is_learned_beside_guesses(guesses: bool, seen: int) -> None:
    """A lane of theirs that is late is none; and without guesses every lane is theirs, which says nothing of what they
    add."""
    common = Common()
    edge = drafting(replace(AHEAD, guesses=guesses, common=common))
    edge.handle(draft(0, 11), 2.0)
    (started,) = (
        action
        for action in edge.handle(hint(1, 1, (0, 50, 0.98)), 3.0)
        if isinstance(action, StartDraft) and action.assumed == (50,)
    )
    edge.handle(plain(started.lane, 80, 81), 4.0)
    edge.handle(verdict(1, 1, 0, 50), 9.0)
    assert (edge.phase, edge.statistics.hits_by_exit) == (Phase.VERIFYING, 1)
    edge.handle(hint(2, 2, (0, 60, 0.98)), 11.0)
    edge.handle(verdict(2, 2, 0, 60), 19.0)
    assert (edge.phase, edge.statistics.late) == (Phase.DRAFTING, 1)
    assert common.exits.seen == seen
    assert common.exits.useful == (0.5 if guesses else 0.0)


def test_a_hint_makes_a_finished_lane_likely_enough_to_be_forwarded() -> None:
    edge = drafting(replace(AHEAD, lane_threshold=0.0, forwards_per_token=0.0))
    edge.handle(draft(0), 2.0)
    edge._config = replace(edge._config, lane_threshold=0.5)  # type: ignore[misc]
    assert not of_kind(SendForward, edge.handle(plain(1, 14, 15), 3.0))
    forwards = of_kind(SendForward, edge.handle(hint(1, 1, (2, 13, 0.99)), 4.0))
    assert forwards == [SendForward(1, 2, 1, parent=1, accepted=2, next_token=13, tokens=(14, 15))]


def test_a_hint_about_a_forward_counts_from_the_forwards_own_tokens() -> None:
    edge, _ = guessing()
    edge.handle(plain(1, 14, 15), 3.0)
    edge.handle(plain(2, 80), 4.0)
    started = of_kind(StartDraft, edge.handle(hint(2, 4, (1, 99, 0.95)), 5.0))
    assert lane(4, 1, 11, 12, 13, 14, 99) in started


def test_a_token_of_the_floor_that_agrees_leaves_the_open_block_alone() -> None:
    edge, _ = guessing()
    actions = edge.handle(floor(1, 11), 3.0)
    assert not of_kind(SendBlock, actions) and not of_kind(SetTimer, actions)
    assert of_kind(Deliver, actions) == [Deliver(1, (11,), (Source.ACCEPTED,), 2)]
    assert edge.phase is Phase.VERIFYING
    after = of_kind(Deliver, edge.handle(verdict(1, 1, 2, 11, 12, 13), 9.0))
    assert after == [Deliver(2, (12, 13), (Source.ACCEPTED, Source.CORRECTED), 1)]
    assert edge.statistics.floor_tokens == 1


def test_a_token_of_the_floor_that_contradicts_makes_the_edge_draft_anew_at_once() -> None:
    edge, _ = guessing()
    actions = edge.handle(floor(1, 77), 3.0)
    assert actions[0] == StartDraft(3, 2, (), 2, beyond=True)
    assert {action.lane for action in of_kind(DropDraft, actions) if isinstance(action, DropDraft)} == {1, 2}
    assert edge.phase is Phase.DRAFTING
    assert edge.handle(stale(1, 2, 1, 77), 4.0) == []


def test_a_token_of_the_floor_that_a_lane_foresaw_makes_that_lane_the_open_one() -> None:
    edge, _ = guessing()
    edge.handle(plain(2, 80, 81), 3.0)
    edge.handle(floor(1, 11), 4.0)
    actions = edge.handle(floor(2, 60), 5.0)
    assert edge.phase is Phase.VERIFYING
    assert not of_kind(SendBlock, actions)
    assert edge.statistics.hits == 1


def test_a_draft_that_the_floor_overtook_goes_up_without_what_was_said_meanwhile() -> None:
    edge = drafting(AHEAD)
    edge.handle(floor(1, 11), 2.0)
    (block, *_) = edge.handle(plain(0, 11, 12), 3.0)
    assert block == SendBlock(1, 1, 2, (12,))


def test_a_draft_that_the_floor_contradicted_is_given_up() -> None:
    edge = drafting(AHEAD)
    actions = edge.handle(floor(1, 77), 2.0)
    assert of_kind(StartDraft, actions) == []
    assert edge.handle(plain(0, 11, 12), 3.0) == [StartDraft(1, 2, (), 2, beyond=True)]


def test_on_a_long_link_the_edge_drafts_past_what_the_floor_will_have_said() -> None:
    edge = drafting(AHEAD)
    edge.handle(Drafted(0, (11, 12)), 2.0)
    away = VerdictArrived(verdict(1, 1, 0, 77).verdict.model_copy(update={"verify_ms": 10.0, "rows": 3}))
    (start, *_) = edge.handle(away, 112.0)  # 100 ms away, and a pass takes 10 ms
    assert isinstance(start, StartDraft)
    assert start.length >= AHEAD.block_length + 10


def test_what_a_pass_left_of_a_long_block_goes_up_next() -> None:
    edge = drafting(replace(AHEAD, block_length=6, guesses=False))
    edge.handle(plain(0, 11, 12, 13, 14, 15, 16), 2.0)
    actions = without_timers(edge.handle(verdict(1, 1, 3, 11, 12, 13, 14), 9.0))
    assert actions[0] == SendBlock(1, 2, 5, (15, 16))


def test_a_verdict_that_says_nothing_new_still_ends_its_round() -> None:
    edge = drafting(replace(AHEAD, guesses=False))
    edge.handle(plain(0, 11, 12), 2.0)
    edge.handle(floor(1, 11), 3.0)
    actions = without_timers(edge.handle(verdict(1, 1, 0, 11), 4.0))
    assert actions == [SendBlock(1, 2, 2, (12,))]


def test_a_block_sent_again_is_what_it_was() -> None:
    edge, _ = guessing()
    edge.handle(floor(1, 11), 3.0)
    (block,) = of_kind(SendBlock, edge.handle(Relocated(2), 4.0))
    assert isinstance(block, SendBlock)
    assert (block.epoch, block.round, block.base, block.tokens) == (2, 1, 1, (11, 12))


def test_an_empty_draft_is_followed_by_following() -> None:
    edge = drafting(AHEAD)
    actions = edge.handle(plain(0), 2.0)
    assert edge.phase is Phase.FOLLOWING
    assert not of_kind(SendBlock, actions)
    assert of_kind(StartDraft, edge.handle(floor(1, 11), 3.0)) == [StartDraft(1, 2, (), 2, beyond=True)]


def following(edge: EdgeSession, base: int, count: int) -> list[EdgeAction]:
    """So many tokens of the floor, one a time."""
    return [
        action for at in range(base, base + count) for action in edge.handle(floor(at, 100 + at), 3.0 + at)
    ]


def test_one_that_only_follows_shows_now_and_then_that_it_is_there() -> None:
    edge = EdgeSession(replace(AHEAD, block_length=0))
    edge.handle(Opened(epoch=1), 0.0)
    edge.handle(verdict(0, 0, 0, 10), 1.0)
    assert edge.phase is Phase.FOLLOWING
    actions = following(edge, 1, 3 * ACKNOWLEDGE)
    blocks = of_kind(SendBlock, actions)
    assert [(block.base, block.tokens) for block in blocks if isinstance(block, SendBlock)] == [
        (ACKNOWLEDGE, ()),
        (2 * ACKNOWLEDGE, ()),
        (3 * ACKNOWLEDGE, ()),
    ]
    assert not of_kind(StartDraft, actions)


def wrong_drafts_until_it_follows(edge: EdgeSession) -> int:
    """Every draft is wrong; how many of them there were."""
    tries = 0
    while edge.phase is not Phase.FOLLOWING:
        tries += 1
        assert tries < 100
        edge.handle(plain(edge._next_lane - 1, 7, 7), 10.0)
        answer = verdict(edge._next_round - 1, edge.base, 0, 100).verdict
        edge.handle(VerdictArrived(answer.model_copy(update={"verify_ms": 10.0, "rows": 3})), 20.0)
    return tries


def tokens_until_it_drafts(edge: EdgeSession) -> int:
    """How many tokens of the floor it follows."""
    first = edge.base
    while edge.phase is Phase.FOLLOWING:
        edge.handle(floor(edge.base, 100, verify_ms=10.0), 30.0)
    return edge.base - first


def test_where_no_draft_pays_the_edge_follows_ever_longer_between_two_tries() -> None:
    edge = drafting(replace(AHEAD, max_tokens=10_000, adaptive=True, guesses=False, forwards=False))
    wrong_drafts_until_it_follows(edge)
    assert tokens_until_it_drafts(edge) == RESTS[0]
    assert wrong_drafts_until_it_follows(edge) == 1
    assert tokens_until_it_drafts(edge) == 2 * RESTS[0]
    for _ in range(5):
        wrong_drafts_until_it_follows(edge)
        followed = tokens_until_it_drafts(edge)
    assert followed == RESTS[1]


def floor_is_better() -> Common:
    """What a gateway has learned where the floor says more a pass than a block's round brings."""
    common = Common()
    for _ in range(TRIALS):
        common.rivals.verified(2, 100.0)
        common.rivals.floor.saw(3, 100.0)
    return common


@pytest.mark.parametrize(
    ("policy", "phase"), [(Policy.LATENCY, Phase.FOLLOWING), (Policy.COST, Phase.DRAFTING)]
)
def test_where_the_floor_is_quicker_the_edge_stands_back_unless_passes_are_to_be_saved(
    policy: Policy, phase: Phase
) -> None:
    edge = EdgeSession(replace(AHEAD, adaptive=True, policy=policy, common=floor_is_better()))
    edge.handle(Opened(epoch=1), 0.0)
    edge.handle(verdict(0, 0, 0, 10), 1.0)
    assert edge.phase is phase


def test_an_edge_that_stands_back_tries_again_with_one_block() -> None:
    config = replace(AHEAD, max_tokens=10_000, adaptive=True, common=floor_is_better())
    edge = EdgeSession(config)
    edge.handle(Opened(epoch=1), 0.0)
    edge.handle(verdict(0, 0, 0, 10), 1.0)
    assert tokens_until_it_drafts(edge) == RESTS[0]
    assert edge.phase is Phase.DRAFTING


def test_a_draft_that_the_floor_has_left_is_counted_as_overtaken() -> None:
    common = Common()
    edge = drafting(replace(AHEAD, common=common))
    edge.handle(floor(1, 99), 3.0)
    edge.handle(plain(0, 11, 12), 4.0)
    assert (common.rivals.drafts, common.rivals.in_time(1.0)) == (1, 0.0)


@pytest.mark.parametrize(
    ("config", "counted"),
    [
        (replace(AHEAD, adaptive=True), 1),
        (replace(AHEAD, adaptive=True, policy=Policy.COST), 0),
        (replace(AHEAD, guesses=False, forwards=False, policy=Policy.COST), 0),
    ],
)
def test_only_sessions_that_have_the_choice_teach_how_blocks_fare_beside_the_floor(
    config: EdgeConfig, counted: int
) -> None:
    common = Common()
    edge = drafting(replace(config, common=common))
    edge.handle(plain(0, 11, 12), 2.0)
    edge.handle(verdict(1, 1, 2, 11, 12, 13), 9.0)
    assert common.rivals.drafts == counted


def test_no_more_forwards_go_up_than_are_earned_by_committed_tokens() -> None:
    edge = drafting(replace(AHEAD, forwards_per_token=0.5, max_lanes=8, lane_threshold=0.0))
    edge.handle(draft(0), 2.0)

    def finish_lanes(first: int, last: int) -> int:
        """How many forwards go up as these lanes end."""
        actions = [a for number in range(first, last) for a in edge.handle(draft(number, 20 * number), 3.0)]
        return len(of_kind(SendForward, actions))

    assert finish_lanes(1, 9) == int(
        CREDIT / 2 + 0.5
    )  # what the first token has earned makes up for half a one
    edge.handle(floor(1, 11), 4.0)
    assert edge.phase is Phase.VERIFYING
    assert finish_lanes(9, edge._next_lane) == 1


def test_in_a_new_epoch_forwards_are_forgotten_and_sent_anew_only_as_blocks() -> None:
    edge, _ = guessing()
    edge.handle(plain(1, 14, 15), 3.0)
    edge.handle(Relocated(2), 4.0)
    actions = without_timers(edge.handle(verdict(1, 1, 2, 11, 12, 13, epoch=2), 9.0))
    assert actions[0] == SendBlock(2, 3, 4, (14, 15))
    assert edge.statistics.taken == 0


def test_a_hint_for_a_forward_of_an_older_epoch_starts_nothing() -> None:
    edge, _ = guessing()
    edge.handle(plain(1, 14, 15), 3.0)
    edge.handle(Relocated(2), 4.0)
    assert edge.handle(hint(2, 4, (1, 99, 0.95), epoch=2), 5.0) == []


def test_without_exits_that_listen_a_block_does_not_say_how_sure_its_draft_was() -> None:
    _, actions = guessing(replace(AHEAD, hints=False))
    (block,) = of_kind(SendBlock, actions)
    assert isinstance(block, SendBlock) and block.tokens and block.confidences == ()


def test_a_first_block_that_is_refused_at_once_does_not_end_a_sessions_drafts() -> None:
    edge = drafting(where_rows_cost(2.0))
    edge.handle(plain(0, 7, 7), 2.0)
    edge.handle(verdict(1, 1, 0, 100), 60.0)
    assert edge.phase is Phase.DRAFTING


# --- what of a draft is worth its rows ------------------------------------------------------------------------------


def where_rows_cost(row_ms: float, padded: int = 0, **changes: Any) -> EdgeConfig:
    """A pass takes 50 ms and so much a row; blocks are padded to so many."""
    common = Common()
    common.pass_ms.told(50.0, row_ms, padded)
    return replace(AHEAD, block_length=4, adaptive=True, common=common, **changes)


def going(config: EdgeConfig) -> EdgeSession:
    """A session that got two tokens in 72 ms and drafts lane 1: a row of 10 ms has to bring 0.28 tokens."""
    edge = drafting(config)
    edge.handle(plain(0, 11), 2.0)
    edge.handle(verdict(1, 1, 1, 11, 12), 73.0)
    assert edge.phase is Phase.DRAFTING
    return edge


def unsure(lane: int, *confidences: float) -> Drafted:
    """Tokens 11, 12, ... of which the draft is so sure, and what else might stand in their places and after them."""
    tokens = tuple(range(11, 11 + len(confidences)))
    places = tuple(
        ((token, sure), (token + 40, 1.0 - sure)) for token, sure in zip(tokens, confidences, strict=True)
    )
    return Drafted(lane, tokens, confidences, (*places, ((11 + len(tokens), 0.9),)))


def blocks(actions: list[EdgeAction]) -> list[Tokens]:
    return [action.tokens for action in actions if isinstance(action, SendBlock)]


def test_of_a_draft_those_tokens_go_up_that_are_likely_enough_to_be_reached_and_right() -> None:
    edge = going(where_rows_cost(10.0))
    actions = edge.handle(unsure(1, 0.9, 0.9, 0.3, 0.9), 80.0)
    assert blocks(actions) == [(11, 12)]
    assert edge.statistics.drafted_in_all == 5


def test_what_may_stand_after_the_tokens_that_are_kept_is_guessed() -> None:
    edge = going(where_rows_cost(10.0))
    actions = edge.handle(unsure(1, 0.9, 0.9, 0.3, 0.9), 80.0)
    assert [start.assumed for start in starts(actions)] == [(11, 12, 53), (11, 12, 13)]


def test_a_block_that_is_waited_for_keeps_its_first_token_and_a_lane_may_lose_all() -> None:
    edge = going(where_rows_cost(10.0))
    actions = edge.handle(unsure(1, 0.1, 0.1), 80.0)
    assert blocks(actions) == [(11,)]
    (first, *_) = starts(actions)
    assert of_kind(SendForward, edge.handle(unsure(first.lane, 0.1, 0.1), 81.0)) == []


@pytest.mark.parametrize(
    "config",
    [where_rows_cost(0.0), replace(where_rows_cost(10.0), adaptive=False), where_rows_cost(10.0, padded=5)],
    ids=["free", "fixed", "padded"],
)
def test_where_rows_cost_nothing_or_lengths_are_fixed_all_of_a_draft_goes_up(config: EdgeConfig) -> None:
    edge = going(config)
    assert blocks(edge.handle(unsure(1, 0.9, 0.1, 0.1, 0.1), 80.0)) == [(11, 12, 13, 14)]


def test_before_anything_was_said_all_of_a_draft_goes_up() -> None:
    edge = drafting(where_rows_cost(10.0))
    assert blocks(edge.handle(unsure(0, 0.9, 0.1, 0.1, 0.1), 2.0)) == [(11, 12, 13, 14)]


def test_a_draft_that_says_nothing_of_its_tokens_is_not_cut() -> None:
    edge = going(where_rows_cost(10.0))
    assert blocks(edge.handle(plain(1, 11, 12, 13, 14), 80.0)) == [(11, 12, 13, 14)]


def after_a_miss(config: EdgeConfig) -> int:
    """Tokens that are drafted after a round of which a draft step took 200 ms and a pass 54."""
    edge = drafting(config)
    edge.handle(unsure(0, 0.9, 0.9, 0.9, 0.9), 801.0)
    told = verdict(1, 1, 2, 11, 12, 77).verdict.model_copy(
        update={"verify_ms": 54.0, "rows": 5, "fixed_ms": 50.0, "row_ms": 1.0}
    )
    (start, *_) = starts(edge.handle(VerdictArrived(told), 860.0))
    return start.length


def test_a_draft_is_as_long_as_it_may_be_where_the_target_goes_on_and_shorter_where_it_waits() -> None:
    config = where_rows_cost(1.0, guesses=False)
    waiting = replace(where_rows_cost(1.0, guesses=False), policy=Policy.COST)
    assert after_a_miss(config) >= config.block_length > after_a_miss(waiting)


def test_the_tokens_of_a_draft_are_used_before_what_may_follow_them_is_known() -> None:
    config = replace(AHEAD, max_lanes=3)
    edge = drafting(config)
    whole = draft(0)
    actions = edge.handle(replace(whole, alternatives=whole.alternatives[:2]), 2.0)
    assert blocks(actions) == [(11, 12)]
    assert [start.assumed for start in starts(actions)] == [(11, 60), (11, 61)]
    assert [start.assumed for start in starts(edge.handle(whole, 4.0))] == [(11, 12, 13)]
    assert edge.handle(whole, 5.0) == []


def test_what_follows_a_draft_of_which_less_went_up_is_not_what_follows_the_block() -> None:
    edge = going(where_rows_cost(10.0, max_lanes=8, lane_threshold=0.0))
    whole = unsure(1, 0.9, 0.9, 0.3, 0.9)
    edge.handle(replace(whole, alternatives=whole.alternatives[:4]), 80.0)
    assert edge.handle(whole, 81.0) == []


def test_what_follows_a_draft_whose_front_the_floor_has_said_follows_the_rest_of_it() -> None:
    edge = drafting(replace(AHEAD, block_length=3))
    edge.handle(floor(1, 11), 2.0)
    whole = unsure(0, 0.9, 0.9, 0.9)
    assert blocks(edge.handle(replace(whole, alternatives=whole.alternatives[:3]), 3.0)) == [(12, 13)]
    assert (12, 13, 14) in [start.assumed for start in starts(edge.handle(whole, 4.0))]


# --- ratio mode ---------------------------------------------------------------------------------------------------

ROWS = tuple(SparseRow((token, token + 100), (3, 5)) for token in (11, 12, 13))
AFTER = (0.1, 0.2, 0.3)
"""Thresholds after these rows."""


def drawn(number: int = 0, tokens: Tokens = (11, 12, 13)) -> Drafted:
    return Drafted(number, tokens, rows=ROWS[: len(tokens)], thresholds=AFTER[: len(tokens)])


def starts(actions: list[EdgeAction]) -> list[StartDraft]:
    return [action for action in actions if isinstance(action, StartDraft)]


def test_what_tokens_were_drawn_from_goes_up_with_them_and_again_when_they_are_sent_again() -> None:
    edge = drafting()
    assert SendBlock(1, 1, 1, (11, 12, 13), rows=ROWS) in edge.handle(drawn(), 2.0)
    again = without_timers(edge.handle(Relocated(epoch=2), 3.0))
    assert again == [SendBlock(2, 1, 1, (11, 12, 13), rows=ROWS)]


def test_the_first_draft_has_no_threshold_and_the_next_one_that_after_the_rejected_row() -> None:
    edge = drafting()
    edge.handle(drawn(), 2.0)
    (start,) = starts(edge.handle(verdict(1, 1, 1, 11, 99), 3.0))
    assert start == StartDraft(1, 3, (), 3, threshold=0.2)


def test_after_a_block_that_holds_the_next_draft_starts_from_its_last_threshold() -> None:
    edge = drafting()
    edge.handle(drawn(), 2.0)
    (start,) = starts(edge.handle(verdict(1, 1, 3, 11, 12, 13, 99), 3.0))
    assert start.threshold == 0.3


@pytest.mark.parametrize(("accepted", "threshold"), [(0, 0.1), (2, 0.3), (3, 0.3)])
def test_a_lane_starts_from_the_threshold_of_the_outcome_that_it_assumes(
    accepted: int, threshold: float
) -> None:
    edge = drafting()
    edge.handle(drawn(), 2.0)
    (start,) = starts(edge.handle(hint(1, 1, (accepted, 99, 0.9)), 3.0))
    assert start == StartDraft(1, 1, (*(11, 12, 13)[:accepted], 99), 3, threshold=threshold)


def test_a_lane_and_the_draft_that_a_miss_calls_for_start_from_the_same_threshold() -> None:
    def started(*, hinted: bool) -> StartDraft:
        edge = drafting()
        edge.handle(drawn(), 2.0)
        lane = edge.handle(hint(1, 1, (1, 99, 0.9)), 3.0) if hinted else []
        return (starts(lane) or starts(edge.handle(verdict(1, 1, 1, 11, 99), 4.0)))[0]

    assert started(hinted=True).threshold == started(hinted=False).threshold == 0.2


def test_a_draft_without_rows_leaves_the_threshold_as_it_was() -> None:
    edge = drafting()
    edge.handle(drawn(), 2.0)
    edge.handle(verdict(1, 1, 0, 99), 3.0)
    edge.handle(Drafted(1, (20, 21)), 4.0)
    (start,) = starts(edge.handle(verdict(2, 2, 1, 20, 50), 5.0))
    assert start.threshold == 0.1


def test_a_draft_that_the_floor_overtook_goes_up_with_the_rows_that_are_left() -> None:
    edge = drafting(replace(CONFIG, policy=Policy.LATENCY))
    edge.handle(floor(1, 11), 2.0)
    assert SendBlock(1, 1, 2, (12, 13), rows=ROWS[1:]) in edge.handle(drawn(), 3.0)
    (start,) = starts(edge.handle(verdict(1, 2, 0, 99), 4.0))
    assert start.threshold == 0.2


def test_a_forward_takes_along_what_its_tokens_were_drawn_from() -> None:
    edge, actions = guessing()
    (first, *_) = starts(actions)
    forwards = of_kind(SendForward, edge.handle(drawn(first.lane, (11, 12)), 5.0))
    assert [forward.rows for forward in forwards if isinstance(forward, SendForward)] == [ROWS[:2]]


# --- beside a pass of the floor -----------------------------------------------------------------------------------


BESIDE = replace(AHEAD, adaptive=True, round_trip_ms=10.0, max_lanes=4, lane_threshold=0.02)


def slow_passes() -> Common:
    """What a gateway has learned where a pass takes 100 ms, and a draft step 5."""
    common = Common()
    common.pass_ms.told(99.0, 1.0)
    for _ in range(3):
        common.step_ms.saw(1, 5.0)
    return common


def beside(config: EdgeConfig = BESIDE) -> tuple[EdgeSession, list[EdgeAction]]:
    """A session whose prefill has said 10, while the verifier goes on by itself with 11 and 12."""
    edge = EdgeSession(replace(config, common=slow_passes()))
    edge.handle(Opened(epoch=1), 0.0)
    first = verdict(0, 0, 0, 10).verdict.model_copy(update={"following": (11, 12)})
    return edge, edge.handle(VerdictArrived(first), 100.0)


def looked(edge: EdgeSession) -> list[EdgeAction]:
    """The edge would say 11 as well, then 92 where the floor says 12, and 13 behind that: lanes are started."""
    actions: list[EdgeAction] = []
    for look, (likeliest, second) in enumerate([(11, 81), (92, 82), (13, 83)], start=1):
        places = (((likeliest, 0.7), (second, 0.2)),)
        actions += edge.handle(Drafted(look, (likeliest,), (0.7,), places), 105.0)
    return actions


def test_beside_a_pass_of_the_floor_the_edge_looks_what_it_would_say_at_each_of_its_places() -> None:
    edge, actions = beside()
    assert of_kind(StartDraft, actions) == [
        StartDraft(1, 1, (), 1),
        StartDraft(2, 1, (11,), 1),
        StartDraft(3, 1, (11, 12), 1),
    ]
    assert not of_kind(SendBlock, actions)
    assert edge.phase is Phase.VERIFYING


def test_lanes_follow_what_may_come_of_the_pass_and_go_up_as_forwards_of_it() -> None:
    edge, _ = beside()
    started = [action for action in looked(edge) if isinstance(action, StartDraft)]
    assert started[0].assumed == (11, 92), "the floor and the edge part there"
    assert {lane.assumed for lane in started} >= {(81,), (11, 12, 13)}
    sent = of_kind(SendForward, edge.handle(Drafted(started[0].lane, (14, 15), (0.7, 0.7)), 120.0))
    (forward,) = sent
    assert isinstance(forward, SendForward)
    assert forward.parent == forward.round
    assert (forward.base, forward.accepted, forward.next_token, forward.tokens) == (1, 1, 92, (14, 15))


def test_a_forward_that_the_floor_has_gone_on_with_is_open_and_its_verdict_ends_it() -> None:
    edge, _ = beside()
    lane = next(action for action in looked(edge) if isinstance(action, StartDraft)).lane
    (forward,) = of_kind(SendForward, edge.handle(Drafted(lane, (14, 15), (0.7, 0.7)), 120.0))
    assert isinstance(forward, SendForward)
    said = floor(1, 11, 92).floor.model_copy(update={"taken": forward.round})
    actions = edge.handle(FloorArrived(said), 200.0)
    assert not of_kind(SendBlock, actions)
    assert (edge.statistics.taken, edge.statistics.hits) == (1, 1)
    edge.handle(verdict(forward.round, 3, 2, 14, 15, 16), 300.0)
    assert edge.committed == (10, 11, 92, 14, 15, 16)
    assert edge.statistics.accepted == 2


def test_a_lane_that_still_holds_is_forwarded_beside_the_next_pass() -> None:
    edge, _ = beside()
    lane = next(a for a in looked(edge) if isinstance(a, StartDraft) and a.assumed == (11, 12, 13)).lane
    said = floor(1, 11, 12).floor.model_copy(update={"following": (77, 78)})
    edge.handle(FloorArrived(said), 200.0)
    (forward,) = of_kind(SendForward, edge.handle(Drafted(lane, (14, 15), (0.7, 0.7)), 210.0))
    assert isinstance(forward, SendForward)
    assert (forward.base, forward.accepted, forward.next_token, forward.tokens) == (3, 0, 13, (14, 15))


@pytest.mark.parametrize(
    "config",
    [
        replace(BESIDE, round_trip_ms=None),
        replace(BESIDE, round_trip_ms=96.0),
        replace(BESIDE, forwards=False),
        replace(BESIDE, guesses=False),
        replace(BESIDE, adaptive=False),
    ],
    ids=["the way is not known", "the way is too long", "no forwards", "no guesses", "fixed blocks"],
)
def test_where_lanes_would_be_late_or_are_switched_off_a_block_is_drafted(config: EdgeConfig) -> None:
    edge, _ = beside(config)
    assert edge.phase is Phase.DRAFTING


def test_in_a_new_epoch_nothing_follows_a_pass_of_the_one_before() -> None:
    edge, _ = beside()
    lane = next(action for action in looked(edge) if isinstance(action, StartDraft)).lane
    edge.handle(Relocated(2), 110.0)
    assert not of_kind(SendForward, edge.handle(Drafted(lane, (14, 15), (0.7, 0.7)), 120.0))


def test_what_is_looked_up_after_the_pass_has_ended_is_of_no_use() -> None:
    edge, _ = beside()
    edge.handle(floor(1, 99), 200.0)
    assert edge.handle(Drafted(1, (11,), (0.7,), (((11, 0.7),),)), 201.0) == []
