"""Dialogues with the edge side of the core: an event goes in, actions come out."""

from __future__ import annotations

import pytest

from shared.protocol import Fault, FinishReason, Hint, Outcome, Stale, Tokens, Verdict
from shared.speculation.edge import (
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
    HintArrived,
    Opened,
    Phase,
    Relocated,
    SendBlock,
    SendPrompt,
    SetTimer,
    Source,
    StaleArrived,
    StartDraft,
    TimerFired,
    VerdictArrived,
)

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
