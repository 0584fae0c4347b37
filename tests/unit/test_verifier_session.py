"""Dialogues with the verifier side of the core."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shared.protocol import (
    Block,
    Cancel,
    Fault,
    FinishReason,
    Floor,
    Forward,
    Hint,
    Outcome,
    Policy,
    Prompt,
    ReplyRoute,
    Stale,
    TokenLogprobs,
    Tokens,
    Verdict,
)
from shared.sampling.sparse import SparseRow, encode
from shared.speculation.verifier import (
    FORESEEN,
    MOST_AHEAD,
    NO_ROUND,
    Claim,
    Claimed,
    CloseEngine,
    Commit,
    Committed,
    EngineAnswered,
    Evict,
    ExitSeen,
    Failed,
    Forget,
    OpenEngine,
    Phase,
    Publish,
    Received,
    Refused,
    Release,
    SetTimer,
    Tail,
    TimerFired,
    VerifierAction,
    VerifierSession,
    Verify,
    patience_ms,
)

ROUTE = ReplyRoute(gateway="g", partition=3)


def prompt(epoch: int = 1) -> Received:
    return Received(Prompt(session="s", epoch=epoch, reply=ROUTE))


def block(number: int, base: int, *tokens: int, epoch: int = 1, gateway: str = "g") -> Received:
    reply = ReplyRoute(gateway=gateway, partition=3)
    return Received(Block(session="s", epoch=epoch, reply=reply, round=number, base=base, tokens=tokens))


def parked(committed: Tokens = (10,)) -> VerifierSession:
    """A session whose prefill has said `committed`, all in round 0."""
    session = VerifierSession("s", max_block=4)
    session.handle(prompt())
    session.handle(Claimed(epoch=1, committed=(), gateway="g"))
    session.handle(EngineAnswered(committed))
    session.handle(Committed(len(committed)))
    assert session.phase is Phase.PARKED
    return session


def published(actions: list[VerifierAction]) -> list[object]:
    return [action.message for action in actions if isinstance(action, Publish)]


def test_a_prompt_is_claimed_prefilled_committed_and_only_then_answered() -> None:
    session = VerifierSession("s", max_block=4)
    assert session.handle(prompt()) == [Claim(1, "g")]
    assert session.handle(Claimed(epoch=1, committed=(), gateway="g")) == [OpenEngine(())]
    assert session.handle(EngineAnswered((10,))) == [Commit(1, 0, 0, (10,), None, 0, 0)]
    assert published(session.handle(Committed(1))) == [
        Verdict(session="s", epoch=1, round=0, base=0, accepted=0, tokens=(10,))
    ]


def test_a_block_is_verified_in_one_pass_and_its_verdict_counts_what_was_accepted() -> None:
    session = parked()
    assert session.handle(block(1, 1, 11, 12, 13)) == [Verify(1, 1, (11, 12, 13))]
    assert session.handle(EngineAnswered((11, 12, 99))) == [Commit(1, 1, 1, (11, 12, 99), None, 3, 2)]
    assert published(session.handle(Committed(4))) == [
        Verdict(session="s", epoch=1, round=1, base=1, accepted=2, tokens=(11, 12, 99))
    ]


def test_an_exit_becomes_a_hint_while_the_pass_runs_and_nothing_afterwards() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    seen = ExitSeen(1, 24, (Outcome(accepted=1, next_token=5, confidence=0.5),), 3.0)
    assert published(session.handle(seen)) == [
        Hint(
            session="s",
            epoch=1,
            round=1,
            base=1,
            layer=24,
            outcomes=(Outcome(accepted=1, next_token=5, confidence=0.5),),
            elapsed_ms=3.0,
        )
    ]
    session.handle(EngineAnswered((11, 5)))
    assert session.handle(seen) == []


def test_an_empty_block_is_verified_like_any_other() -> None:
    assert parked().handle(block(1, 1)) == [Verify(1, 1, ())]


def test_a_block_sent_twice_gets_the_same_verdict() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    assert session.handle(block(1, 1, 11)) == []
    session.handle(EngineAnswered((11, 5)))
    first = published(session.handle(Committed(3)))
    assert published(session.handle(block(1, 1, 11))) == first


def test_a_block_on_an_older_base_is_trimmed_where_it_agrees() -> None:
    session = parked((10, 11))
    assert session.handle(block(1, 1, 11, 12)) == [Verify(1, 2, (12,))]
    session.handle(EngineAnswered((12, 13)))
    assert published(session.handle(Committed(4))) == [
        Verdict(session="s", epoch=1, round=1, base=1, accepted=2, tokens=(11, 12, 13))
    ]


@pytest.mark.parametrize(
    ("sent", "verified"), [((90, 80), (80,)), ((), ()), ((90,), ())], ids=["of each", "nothing", "too few"]
)
def test_what_the_draft_says_of_its_tokens_goes_with_those_that_are_left(
    sent: tuple[int, ...], verified: tuple[int, ...]
) -> None:
    told = block(1, 1, 11, 12).message.model_copy(update={"confidences": sent})
    assert parked((10, 11)).handle(Received(told)) == [Verify(1, 2, (12,), verified)]


def test_hints_for_a_trimmed_block_count_from_the_block_as_it_was_sent() -> None:
    session = parked((10, 11))
    session.handle(block(1, 1, 11, 12))
    (hint,) = published(
        session.handle(ExitSeen(2, 24, (Outcome(accepted=0, next_token=5, confidence=0.5),), 1.0))
    )
    assert isinstance(hint, Hint)
    assert (hint.base, hint.outcomes[0].accepted) == (1, 1)


def test_a_block_on_an_older_base_that_disagrees_is_stale_and_told_what_was_committed() -> None:
    (answer,) = published(parked((10, 11)).handle(block(1, 1, 77, 12)))
    assert answer == Stale(session="s", epoch=1, round=1, base=2, since=1, tokens=(11,), gateway="g")


def test_a_block_on_tokens_that_nobody_committed_is_a_fault() -> None:
    (answer,) = published(parked().handle(block(1, 9, 5)))
    assert isinstance(answer, Fault)
    assert "9 committed tokens, the session has 1" in answer.message


def test_a_block_longer_than_allowed_is_a_fault_that_names_the_limit() -> None:
    (answer,) = published(parked().handle(block(1, 1, *range(4 + MOST_AHEAD + 1))))
    assert isinstance(answer, Fault)
    assert f"longer than {4 + MOST_AHEAD}" in answer.message


def test_of_a_block_longer_than_a_pass_takes_the_first_tokens_are_verified() -> None:
    assert parked().handle(block(1, 1, 1, 2, 3, 4, 5)) == [Verify(1, 1, (1, 2, 3, 4))]


def test_an_older_epoch_changes_nothing_and_is_told_the_epoch() -> None:
    session = parked()
    session.handle(block(1, 1, 11, epoch=2))
    session.handle(Claimed(epoch=2, committed=(10,), gateway="g2"))
    session.handle(EngineAnswered((11, 5)))
    session.handle(Committed(3))
    (answer,) = published(session.handle(block(1, 3, 11, epoch=1)))
    assert answer == Stale(session="s", epoch=2, round=1, base=3, since=3, tokens=(), gateway="g2")


def test_a_newer_epoch_is_claimed_and_live_kv_is_kept() -> None:
    session = parked()
    assert session.handle(block(0, 1, 11, epoch=2, gateway="g2")) == [Claim(2, "g2")]
    claimed = session.handle(Claimed(epoch=2, committed=(10,), gateway="g2"))
    assert claimed == [Verify(0, 1, (11,))]


def test_kv_that_does_not_match_what_is_committed_is_restored() -> None:
    session = parked()
    session.handle(block(0, 3, 11, epoch=2, gateway="g2"))
    claimed = session.handle(Claimed(epoch=2, committed=(10, 50, 51), gateway="g2"))
    assert claimed == [CloseEngine(), OpenEngine((10, 50, 51))]


def test_a_takeover_answers_the_block_that_caused_it_in_the_new_epoch() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(block(5, 2, 12, epoch=1))
    assert session.handle(Claimed(epoch=2, committed=(10, 11), gateway="g")) == [OpenEngine((10, 11))]
    assert session.handle(EngineAnswered((13,))) == [Commit(2, 5, 2, (13,), None, 0, 0)]
    floor, stale = published(session.handle(Committed(3)))
    assert floor == Floor(session="s", epoch=2, base=2, tokens=(13,))
    assert stale == Stale(session="s", epoch=2, round=5, base=3, since=2, tokens=(13,), gateway="g")


def test_a_block_that_restores_the_kv_is_verified_after_the_token_that_restoring_gives() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(block(5, 2, 12, 13, epoch=1))
    session.handle(Claimed(epoch=1, committed=(10, 11), gateway="g"))
    assert session.handle(EngineAnswered((12,)))[0] == Verify(5, 3, (13,))
    session.handle(Committed(3))
    session.handle(EngineAnswered((13, 14)))
    assert published(session.handle(Committed(5))) == [
        Verdict(session="s", epoch=1, round=5, base=2, accepted=2, tokens=(12, 13, 14))
    ]


def test_a_round_that_was_committed_before_a_crash_is_answered_from_redis() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(block(5, 1, 11, 12, epoch=1))
    actions = session.handle(Claimed(epoch=2, committed=(10, 11, 77), gateway="g", last_round=5, last_base=1))
    assert published(actions) == [Verdict(session="s", epoch=2, round=5, base=1, accepted=1, tokens=(11, 77))]
    assert actions[1:] == [Release(2), Forget()]


def test_a_finished_session_is_answered_without_the_engine() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(block(5, 1, 11, epoch=1))
    actions = session.handle(
        Claimed(epoch=1, committed=(10, 2), gateway="g", finish_reason=FinishReason.STOP)
    )
    (answer,) = published(actions)
    assert isinstance(answer, Stale)
    assert (answer.tokens, answer.finish_reason) == ((2,), FinishReason.STOP)
    assert not [action for action in actions if isinstance(action, OpenEngine)]


def test_an_end_inside_the_block_is_committed_with_its_reason_and_frees_the_session() -> None:
    session = parked()
    session.handle(block(1, 1, 11, 2, 13))
    (commit,) = session.handle(EngineAnswered((11, 2), FinishReason.STOP))
    assert commit == Commit(1, 1, 1, (11, 2), FinishReason.STOP, 3, 1)
    actions = session.handle(Committed(3))
    (verdict,) = published(actions)
    assert isinstance(verdict, Verdict)
    assert verdict.finish_reason is FinishReason.STOP
    assert actions[1:] == [Release(1), Forget()]


def test_a_commit_refused_lets_go_and_says_where_the_session_stands() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(EngineAnswered((11, 5)))
    actions = session.handle(Refused(epoch=4, base=2, since=1, tokens=(11,), gateway="g2"))
    assert published(actions) == [
        Stale(session="s", epoch=4, round=1, base=2, since=1, tokens=(11,), gateway="g2")
    ]
    assert actions[1:] == [CloseEngine(), Forget()]


def test_cancel_in_mid_pass_frees_the_kv_at_once() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    cancel = Received(Cancel(session="s", epoch=1, reason="client left"))
    assert session.handle(cancel) == [CloseEngine(), Release(1), Forget()]
    assert session.handle(EngineAnswered((11, 5))) == []


def test_cancel_of_an_older_epoch_changes_nothing() -> None:
    session = parked()
    session.handle(block(1, 1, 11, epoch=2))
    session.handle(Claimed(epoch=2, committed=(10,), gateway="g"))
    assert session.handle(Received(Cancel(session="s", epoch=1, reason="late"))) == []


def test_eviction_waits_for_the_open_round() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    assert session.handle(Evict("idle")) == []
    session.handle(EngineAnswered((11, 5)))
    actions = session.handle(Committed(3))
    assert len(published(actions)) == 1
    assert actions[1:] == [CloseEngine(), Release(1), Forget()]


def test_eviction_waits_for_what_waits_too() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(block(2, 3, 12))
    session.handle(Evict("moved"))
    assert session.handle(EngineAnswered((11, 5)))[0] == Verify(2, 3, (12,))
    session.handle(Committed(3))
    session.handle(EngineAnswered((12, 6)))
    assert session.handle(Committed(5))[1:] == [CloseEngine(), Release(1), Forget()]


def test_an_eviction_asked_for_during_a_claim_is_carried_out() -> None:
    session = parked()
    session.handle(block(1, 5, 11, epoch=2))
    session.handle(Evict("moved"))
    actions = session.handle(Claimed(epoch=2, committed=(10,), gateway="g"))
    assert isinstance(published(actions)[0], Fault)
    assert actions[1:] == [CloseEngine(), Release(2), Forget()]


def test_what_waits_during_a_claim_is_answered_after_it() -> None:
    session = parked()
    session.handle(block(1, 1, 11, epoch=2))
    session.handle(block(2, 3, 12, epoch=2))
    session.handle(Claimed(epoch=2, committed=(10,), gateway="g"))
    assert session.handle(EngineAnswered((11, 5)))[0] == Verify(2, 3, (12,))


def test_what_waits_is_answered_when_the_claim_was_for_something_older() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(prompt())
    session.handle(block(1, 1, 11))
    claimed = Claimed(epoch=2, committed=(10, 11, 5), gateway="g", last_round=1, last_base=1)
    actions = session.handle(claimed)
    stale, verdict = published(actions)
    assert isinstance(stale, Stale)
    assert isinstance(verdict, Verdict)
    assert (verdict.epoch, verdict.round, verdict.accepted, verdict.tokens) == (2, 1, 1, (11, 5))
    assert actions[2:] == [Release(2), Forget()]


def test_kv_is_restored_for_what_waits_when_the_claim_was_for_something_older() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(prompt())
    session.handle(block(2, 3, 12))
    claimed = Claimed(epoch=1, committed=(10, 11, 5), gateway="g", last_round=1, last_base=1)
    actions = session.handle(claimed)
    assert len(published(actions)) == 1
    assert actions[1:] == [OpenEngine((10, 11, 5))]
    session.handle(EngineAnswered((12,)))
    floor, stale = published(session.handle(Committed(4)))
    assert isinstance(floor, Floor)
    assert isinstance(stale, Stale)
    assert (stale.round, stale.base, stale.tokens) == (2, 4, (12,))


def test_what_waits_in_a_newer_epoch_than_the_claims_is_claimed_in_turn() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(prompt())
    session.handle(block(2, 3, 12, epoch=3))
    claimed = Claimed(epoch=1, committed=(10, 11, 5), gateway="g", last_round=1, last_base=1)
    assert session.handle(claimed)[1:] == [Claim(3, "g")]
    assert session.handle(Claimed(epoch=3, committed=(10, 11, 5), gateway="g")) == [OpenEngine((10, 11, 5))]


def test_what_waits_when_the_generation_ends_is_told_that_it_has_ended() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(block(2, 3, 12))
    session.handle(EngineAnswered((11, 5), FinishReason.STOP))
    verdict, stale = published(actions := session.handle(Committed(3)))
    assert isinstance(verdict, Verdict)
    assert isinstance(stale, Stale)
    assert (stale.round, stale.base, stale.finish_reason) == (2, 3, FinishReason.STOP)
    assert actions[2:] == [Release(1), Forget()]


def test_a_cancel_from_before_a_resume_does_not_stop_what_the_resume_asked_for() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(block(1, 1, 11, epoch=2))
    assert session.handle(Received(Cancel(session="s", epoch=1, reason="client left"))) == []
    session.handle(EngineAnswered((11, 5)))
    assert session.handle(Committed(3))[-1] == Claim(2, "g")


def test_a_cancel_during_the_commit_gives_the_session_back() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(EngineAnswered((11, 5)))
    cancelled = session.handle(Received(Cancel(session="s", epoch=1, reason="client left")))
    assert cancelled == [CloseEngine(), Release(1), Forget()]


def test_a_token_that_nobody_asked_for_is_committed_and_the_next_block_takes_it_into_account() -> None:
    session = parked()
    assert session.handle(EngineAnswered((11,))) == [Commit(1, 0, 1, (11,), None, 0, 0)]
    assert published(session.handle(Committed(2))) == [Floor(session="s", epoch=1, base=1, tokens=(11,))]
    assert session.handle(block(1, 1, 11, 12)) == [Verify(1, 2, (12,))]


def test_the_latest_message_waits_for_the_open_one() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(block(2, 1, 11, 12))
    assert session.handle(EngineAnswered((11,)))[0] == Verify(2, 2, (12,))


def test_a_failed_pass_is_a_fault_that_may_be_tried_again() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    actions = session.handle(Failed("unavailable", "gone", 0.5))
    (fault,) = published(actions)
    assert isinstance(fault, Fault)
    assert fault.retry_after_s == 0.5
    assert actions[1:] == [CloseEngine(), Release(1), Forget()]


# --- forwards and the floor -----------------------------------------------------------------------------


def forward(
    number: int, parent: int, accepted: int, next_token: int, *tokens: int, base: int = 1
) -> Received:
    return Received(
        Forward(
            session="s",
            epoch=1,
            reply=ROUTE,
            round=number,
            base=base,
            parent=parent,
            accepted=accepted,
            next_token=next_token,
            tokens=tokens,
        )
    )


def on_the_floor() -> VerifierSession:
    """A parked session whose policy is latency: the floor runs."""
    session = VerifierSession("s", max_block=4)
    session.handle(prompt())
    session.handle(Claimed(epoch=1, committed=(), gateway="g", policy=Policy.LATENCY))
    assert session.handle(EngineAnswered((10,)))[0] == Verify(NO_ROUND, 1, ())
    session.handle(Committed(1))
    return session


def test_a_forward_whose_outcome_comes_true_is_verified_in_the_very_next_step() -> None:
    session = parked()
    session.handle(block(1, 1, 11, 12))
    assert session.handle(forward(2, 1, 1, 50, 51, 52)) == []
    assert session.handle(forward(3, 1, 2, 13, 14, 15)) == []
    assert session.handle(EngineAnswered((11, 12, 13))) == [
        Verify(3, 4, (14, 15)),
        Commit(1, 1, 1, (11, 12, 13), None, 2, 2),
    ]
    (verdict,) = published(session.handle(Committed(4)))
    assert isinstance(verdict, Verdict)
    assert (verdict.round, verdict.taken) == (1, 3)


def test_a_verdict_tells_which_forward_was_taken_though_its_pass_has_ended_already() -> None:
    session = parked()
    session.handle(block(1, 1, 11, 12))
    session.handle(forward(2, 1, 2, 13, 14))
    session.handle(EngineAnswered((11, 12, 13)))
    session.handle(EngineAnswered((14, 15)))
    (verdict,) = published(session.handle(Committed(4)))
    assert isinstance(verdict, Verdict)
    assert (verdict.round, verdict.taken) == (1, 2)


def test_a_verdict_tells_which_forward_was_taken_where_its_pass_had_to_wait_for_the_store() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(forward(2, 1, 1, 12, 13))
    session.handle(forward(3, 2, 1, 14, 15))
    session.handle(EngineAnswered((11, 12)))
    session.handle(EngineAnswered((13, 14)))
    assert session.handle(Committed(3))[0] == Verify(3, 5, (15,))
    (verdict,) = published(session.handle(Committed(5)))
    assert isinstance(verdict, Verdict)
    assert (verdict.round, verdict.taken) == (2, 3)


def test_a_forward_of_another_outcome_is_dropped_without_an_answer() -> None:
    session = parked()
    session.handle(block(1, 1, 11, 12))
    session.handle(forward(2, 1, 1, 50, 51, 52))
    assert session.waits_for(2)
    session.handle(EngineAnswered((11, 12, 13)))
    assert not session.waits_for(2)
    assert len(published(session.handle(Committed(4)))) == 1


def test_forwards_may_follow_forwards() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(forward(2, 1, 1, 12, 13))
    session.handle(forward(3, 2, 1, 14, 15))
    assert session.handle(EngineAnswered((11, 12)))[0] == Verify(2, 3, (13,))
    assert session.handle(EngineAnswered((13, 14))) == []  # the store lags by more than it may
    assert session.handle(Committed(3))[0] == Verify(3, 5, (15,))


def test_a_forward_that_comes_after_its_outcome_is_verified_like_a_block() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(EngineAnswered((11, 12)))
    session.handle(Committed(3))
    assert session.handle(forward(2, 1, 1, 12, 13, 14)) == [Verify(2, 3, (13, 14))]
    session.handle(EngineAnswered((13, 99)))
    assert published(session.handle(Committed(5))) == [
        Verdict(session="s", epoch=1, round=2, base=3, accepted=1, tokens=(13, 99))
    ]


def test_a_forward_of_an_unknown_parent_changes_nothing() -> None:
    session = parked()
    assert session.handle(forward(2, 7, 0, 11, 12)) == []
    assert session.idle


def test_hints_for_a_forward_count_from_its_own_tokens() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(forward(2, 1, 1, 12, 13, 14))
    session.handle(EngineAnswered((11, 12)))
    (hint,) = published(
        session.handle(ExitSeen(3, 24, (Outcome(accepted=1, next_token=5, confidence=0.5),), 1.0))
    )
    assert isinstance(hint, Hint)
    assert (hint.round, hint.outcomes[0].accepted) == (2, 1)


def test_the_floor_goes_on_by_itself_and_says_so() -> None:
    session = on_the_floor()
    assert session.handle(EngineAnswered((11,)))[0] == Verify(NO_ROUND, 2, ())
    assert published(session.handle(Committed(2))) == [Floor(session="s", epoch=1, base=1, tokens=(11,))]


def test_a_late_block_is_trimmed_by_what_the_floor_has_said() -> None:
    session = on_the_floor()
    assert session.handle(block(1, 1, 11, 12, 13)) == []
    assert session.handle(EngineAnswered((11,)))[0] == Verify(1, 2, (12, 13))
    session.handle(Committed(2))
    session.handle(EngineAnswered((12, 13, 14)))
    (verdict,) = published(session.handle(Committed(5)))
    assert isinstance(verdict, Verdict)
    assert (verdict.base, verdict.accepted, verdict.tokens) == (1, 3, (11, 12, 13, 14))


def test_a_late_block_that_disagrees_with_the_floor_is_stale() -> None:
    session = on_the_floor()
    session.handle(block(1, 1, 77, 12))
    assert session.handle(EngineAnswered((11,)))[0] == Verify(NO_ROUND, 2, ())
    floor, stale = published(session.handle(Committed(2)))
    assert isinstance(floor, Floor)
    assert stale == Stale(session="s", epoch=1, round=1, base=2, since=1, tokens=(11,), gateway="g")


def test_the_floor_uses_what_the_verifier_finds_by_itself() -> None:
    session = VerifierSession("s", max_block=4, floor_draft=lambda said, *_: (said[-1] + 1, said[-1] + 2))
    session.handle(prompt())
    session.handle(Claimed(epoch=1, committed=(), gateway="g", policy=Policy.LATENCY))
    assert session.handle(EngineAnswered((10,)))[0] == Verify(NO_ROUND, 1, (11, 12))


def promising(floors: Tokens, *, policy: Policy = Policy.LATENCY) -> tuple[VerifierSession, list[Tail]]:
    """A session that has said 10 and runs a pass of one row, and would draft `floors` itself whatever there is; and the
    blocks that it was told of."""
    offered: list[Tail] = []

    def draft(said: Sequence[int], tail: Tail, block: Tail) -> Tokens:
        offered.append(block)
        return floors if len(said) > 1 else ()

    session = VerifierSession("s", max_block=4, floor_draft=draft)
    session.handle(prompt())
    session.handle(Claimed(epoch=1, committed=(), gateway="g", policy=policy))
    session.handle(EngineAnswered((10,)))
    session.handle(Committed(1))
    return session, offered


def test_what_promises_more_than_a_block_is_verified_first_and_the_block_behind_it_where_it_agrees() -> None:
    session, offered = promising((12, 13))
    session.handle(block(1, 1, 11, 98, 14))
    assert session.handle(EngineAnswered((11,)))[0] == Verify(NO_ROUND, 2, (12, 13))
    assert offered[-1] == Tail(1, (98, 14)), "what is left of the block, which had one token right"
    session.handle(Committed(2))
    assert session.waits_for(1)
    assert session.handle(EngineAnswered((98,)))[0] == Verify(NO_ROUND, 3, (12, 13))
    assert offered[-1] == Tail(2, (14,))


def test_a_block_that_is_left_for_the_floor_is_answered_when_it_can_not_follow_any_more() -> None:
    session, _ = promising((12, 13))
    session.handle(block(1, 1, 11, 98, 14))
    session.handle(EngineAnswered((11,)))
    session.handle(Committed(2))
    session.handle(EngineAnswered((12, 13, 15)))
    stale = [
        action.message
        for action in session.handle(Committed(5))
        if isinstance(action, Publish) and isinstance(action.message, Stale)
    ]
    assert [(each.round, each.base) for each in stale] == [(1, 5)]
    assert not session.waits_for(1)


def test_what_may_follow_a_block_is_verified_behind_it_and_the_verdict_is_still_the_blocks() -> None:
    session, _ = promising((12, 13))
    session.handle(block(1, 1, 11, 12))
    assert session.handle(EngineAnswered((11,)))[0] == Verify(1, 2, (12, 13))
    session.handle(Committed(2))
    session.handle(EngineAnswered((12, 13, 14)))
    (told,) = [action.message for action in session.handle(Committed(5)) if isinstance(action, Publish)]
    assert isinstance(told, Verdict)
    assert (told.round, told.base, told.tokens, told.accepted) == (1, 1, (11, 12, 13, 14), 2)


def test_a_hint_speaks_of_the_block_alone_though_more_is_verified_behind_it() -> None:
    session, _ = promising((12, 13, 14))
    session.handle(block(1, 1, 11, 12))
    session.handle(EngineAnswered((11,)))
    session.handle(Committed(2))
    outcomes = [(0, 99, 0.1), (2, 97, 0.3), (3, 15, 0.4), (1, 13, 0.1)]
    seen = tuple(Outcome(accepted=a, next_token=t, confidence=c) for a, t, c in outcomes)
    (told,) = session.handle(ExitSeen(2, 20, seen, 1.0))
    assert isinstance(told, Publish)
    assert isinstance(told.message, Hint)
    found = [(each.accepted, each.next_token, each.confidence) for each in told.message.outcomes]
    assert found == [(1, 99, 0.1), (2, 13, pytest.approx(0.8))]


def test_a_floor_says_what_it_verifies_next_and_a_forward_may_follow_that() -> None:
    session, _ = promising((12, 13))
    session.handle(EngineAnswered((11,)))
    (told,) = published(session.handle(Committed(2)))
    assert isinstance(told, Floor)
    assert told.following == (12, 13)
    session.handle(forward(5, 5, 1, 98, 12, 13, base=2))
    session.handle(forward(6, 6, 0, 97, 12, base=2))
    assert session.handle(EngineAnswered((12, 98)))[0] == Verify(5, 4, (12, 13))
    (told,) = published(session.handle(Committed(4)))
    assert isinstance(told, Floor)
    assert (told.taken, told.following) == (5, ())


def test_a_forward_that_follows_a_pass_that_was_never_run_is_dropped() -> None:
    session, _ = promising((12, 13))
    session.handle(EngineAnswered((11,)))
    session.handle(Committed(2))
    session.handle(forward(5, 5, 0, 12, 99, base=7))
    assert not session.waits_for(5)


def test_under_cost_a_block_is_verified_as_it_is() -> None:
    session, offered = promising((12, 13), policy=Policy.COST)
    assert session.handle(block(1, 1, 11))[0] == Verify(1, 1, (11,))
    assert not offered


def drafting_tails(*blocks: Received) -> tuple[VerifierSession, list[Tail]]:
    """A session on the floor that has said 10 and runs its next pass, these blocks beside it; and the tails that its floor
    was told."""
    tails: list[Tail] = []

    def draft(said: Sequence[int], tail: Tail, block: Tail) -> Tokens:
        tails.append(tail)
        return block.tokens or tail.tokens

    session = VerifierSession("s", max_block=4, floor_draft=draft)
    session.handle(prompt())
    session.handle(Claimed(epoch=1, committed=(), gateway="g", policy=Policy.LATENCY))
    session.handle(EngineAnswered((10,)))
    session.handle(Committed(1))
    for each in blocks:
        session.handle(each)
    return session, tails


def test_what_a_refused_draft_goes_on_with_is_drafted_by_the_floor() -> None:
    session, tails = drafting_tails(block(1, 1, 11, 12, 13, 14))
    assert session.handle(EngineAnswered((99,)))[0] == Verify(NO_ROUND, 2, (12, 13, 14))
    session.handle(Committed(2))
    assert session.handle(EngineAnswered((12, 98)))[0] == Verify(NO_ROUND, 4, (14,))
    assert tails == [Tail(), Tail(0, (12, 13, 14)), Tail(0, (14,))]


def test_of_two_refused_drafts_the_one_that_was_right_again_is_believed() -> None:
    session, tails = drafting_tails(block(1, 1, 11, 99, 13, 14), block(2, 1, 11, 12, 15, 16))
    session.handle(EngineAnswered((98, 99)))
    assert tails[-1] == Tail(1, (13, 14))
    session, tails = drafting_tails(block(1, 1, 11, 12, 13), block(2, 1, 11, 12, 15))
    session.handle(EngineAnswered((98, 99)))
    assert tails[-1] == Tail(0, (15,)), "of equals the newest's"


def test_a_draft_that_was_wrong_for_long_or_ends_there_says_nothing_of_what_follows() -> None:
    long = tuple(range(11, 11 + FORESEEN + 2))
    session, tails = drafting_tails(block(1, 1, *long))
    session.handle(EngineAnswered(tuple(50 + n for n in range(FORESEEN))))
    assert tails[-1] == Tail()
    session, tails = drafting_tails(block(1, 1, 11, 12))
    session.handle(EngineAnswered((50, 51)))
    assert tails[-1] == Tail()


def test_the_floor_stops_when_the_gateway_has_not_been_heard_of_and_goes_on_when_it_has() -> None:
    session = on_the_floor()
    for base in range(1, MOST_AHEAD):
        session.handle(EngineAnswered((100,)))
        session.handle(Committed(base + 1))
    assert not [action for action in session.handle(EngineAnswered((100,))) if isinstance(action, Verify)]
    session.handle(Committed(MOST_AHEAD + 1))
    assert session.idle
    assert session.handle(block(9, MOST_AHEAD + 1)) == [Verify(9, MOST_AHEAD + 1, ())]


def test_under_the_cost_policy_a_session_waits() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    assert session.handle(EngineAnswered((11, 12))) == [Commit(1, 1, 1, (11, 12), None, 1, 1)]


def test_the_floor_waits_for_a_block_that_comes_soon_and_is_worth_it() -> None:
    """A pass takes 100 ms and yields 3 tokens; it is waited for as long as a pass of the floor takes."""
    assert patience_ms(100.0, 3.0, 20.0, 0.5) == 100.0
    assert patience_ms(100.0, 3.0, 20.0, 0.5, 95.0, 1.0) == 95.0
    assert patience_ms(100.0, 1.0, 20.0, 0.0) == 0.0  # it is never right
    assert (
        patience_ms(100.0, 1.5, 80.0, 0.0) == 0.0
    )  # one and a half tokens in 180 ms, the floor says almost two
    assert patience_ms(100.0, 1.5, 60.0, 0.0) == 0.0
    assert patience_ms(100.0, 1.5, 60.0, 0.8) > 0.0  # the next ones follow at once
    assert patience_ms(100.0, 3.0, 20.0, 0.5, 95.0, 4.0) == 0.0  # what the floor looks up is longer
    assert patience_ms(None, None, None, None) == 0.0


def test_a_block_that_comes_after_the_floors_pass_is_not_waited_for_however_much_it_is_worth() -> None:
    assert patience_ms(100.0, 50.0, 99.0, 0.9) == 100.0
    assert patience_ms(100.0, 50.0, 101.0, 0.9) == 0.0
    assert patience_ms(100.0, 50.0, 60.0, 0.9, 50.0) == 0.0


def test_the_longer_the_wait_the_less_it_takes_for_the_floor_to_go_on() -> None:
    """Six tokens in w + 200 ms, two of three blocks agree: w = (100 - (w + 200) / 6) · 3 / 2, that is 80 ms."""
    assert patience_ms(100.0, 3.0, 79.9, 0.5) == 100.0
    assert patience_ms(100.0, 3.0, 80.1, 0.5) == 0.0


def test_when_its_patience_ends_the_floor_takes_over() -> None:
    session = on_the_floor()
    session.handle(EngineAnswered((11,)), 100.0)
    session.handle(Committed(2), 100.0)
    now = 200.0
    base = 2
    session.handle(block(1, 2, 100, 100, 100, 100), now)
    session.handle(EngineAnswered((100,)), now)
    session.handle(Committed(base := base + 1), now)
    timers: list[SetTimer] = []
    for number in range(2, 8):
        actions = session.handle(EngineAnswered((100,) * 3), now := now + 100.0)
        actions += session.handle(Committed(base := base + 3), now)
        timers = [action for action in actions if isinstance(action, SetTimer)]
        if timers:
            break
        session.handle(block(number, base, 100, 100, 100), now := now + 1.0)
        if any(isinstance(action, Verify) and action.round == NO_ROUND for action in actions):
            session.handle(EngineAnswered((100,)), now := now + 99.0)
            session.handle(Committed(base := base + 1), now)
    (timer,) = timers
    assert session.handle(TimerFired(timer.timer - 1), now) == []
    assert session.handle(TimerFired(timer.timer), now) == [Verify(NO_ROUND, base, ())]


# --- log-probabilities ------------------------------------------------------------------------------------------------


def told(*tokens: int) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities by which a token is known again."""
    return tuple(TokenLogprobs(logprob=-float(token), rank=1) for token in tokens)


def test_what_is_told_of_tokens_is_committed_and_published_with_them() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(prompt())
    session.handle(Claimed(epoch=1, committed=(), gateway="g", policy=Policy.LATENCY))
    answered = session.handle(EngineAnswered((10,), None, told(10)))
    (commit,) = [action for action in answered if isinstance(action, Commit)]
    assert commit.logprobs == told(10)
    (first,) = published(session.handle(Committed(1)))
    session.handle(EngineAnswered((11,), None, told(11)))
    session.handle(Committed(2))
    session.handle(EngineAnswered((12,), None, told(12)))
    (floor,) = published(session.handle(Committed(3)))
    assert isinstance(first, Verdict)
    assert isinstance(floor, Floor)
    assert (first.logprobs, floor.tokens, floor.logprobs) == (told(10), (12,), told(12))


def test_a_verdict_tells_of_tokens_that_were_said_before_its_pass_too() -> None:
    """The block was trimmed: what the floor said of it meanwhile is the verdict's as well."""
    session = VerifierSession("s", max_block=4)
    session.handle(prompt())
    session.handle(Claimed(epoch=1, committed=(), gateway="g", policy=Policy.LATENCY))
    session.handle(EngineAnswered((10,), None, told(10)))
    session.handle(Committed(1))
    session.handle(block(1, 1, 11, 12))
    session.handle(EngineAnswered((11,), None, told(11)))
    session.handle(Committed(2))
    session.handle(EngineAnswered((12, 13), None, told(12, 13)))
    (verdict,) = published(session.handle(Committed(4)))
    assert isinstance(verdict, Verdict)
    assert (verdict.base, verdict.tokens, verdict.logprobs) == (1, (11, 12, 13), told(11, 12, 13))


def test_what_is_told_outlives_a_crash() -> None:
    session = VerifierSession("s", max_block=4)
    session.handle(block(5, 1, 11, 12, epoch=1))
    claimed = Claimed(
        epoch=2, committed=(10, 11, 77), gateway="g", last_round=5, last_base=1, logprobs=told(10, 11, 77)
    )
    (recalled,) = published(session.handle(claimed))
    assert isinstance(recalled, Verdict)
    assert recalled.logprobs == told(11, 77)
    session = VerifierSession("s", max_block=4)
    session.handle(block(6, 1, 11, 12, 13, epoch=1))
    session.handle(Claimed(epoch=2, committed=(10, 11), gateway="g", logprobs=told(10, 11)))
    session.handle(EngineAnswered((12,), None, told(12)))
    session.handle(EngineAnswered((13, 14), None, told(13, 14)))
    session.handle(Committed(3))
    (verdict,) = published(session.handle(Committed(5)))
    assert isinstance(verdict, Verdict)
    assert (verdict.tokens, verdict.logprobs) == ((11, 12, 13, 14), told(11, 12, 13, 14))


# --- ratio mode ---------------------------------------------------------------------------------------------------

ROWS = (SparseRow((11, 40), (3, 5)), SparseRow((12, 41), (2, 6)))


def drawn(number: int, base: int, *tokens: int, rows: tuple[SparseRow, ...] = ROWS) -> Received:
    return Received(block(number, base, *tokens).message.model_copy(update={"q": encode(rows, tokens)}))


def test_what_tokens_were_drawn_from_goes_to_the_engine() -> None:
    assert parked().handle(drawn(1, 1, 11, 12)) == [Verify(1, 1, (11, 12), rows=ROWS)]


def test_what_a_trimmed_blocks_tokens_were_drawn_from_is_trimmed_alike() -> None:
    assert parked((10, 11)).handle(drawn(1, 1, 11, 12)) == [Verify(1, 2, (12,), rows=ROWS[1:])]


def test_of_a_block_longer_than_a_pass_takes_the_first_rows_go_to_the_engine() -> None:
    rows = tuple(SparseRow((token, 40), (3, 5)) for token in range(11, 16))
    asked = parked().handle(drawn(1, 1, *range(11, 16), rows=rows))
    assert asked == [Verify(1, 1, (11, 12, 13, 14), rows=rows[:4])]


def test_what_a_forwards_tokens_were_drawn_from_goes_with_it_when_it_comes_true() -> None:
    session = parked()
    session.handle(block(1, 1, 20))
    forward = Forward(
        session="s",
        epoch=1,
        reply=ROUTE,
        round=2,
        base=1,
        parent=1,
        accepted=1,
        next_token=21,
        tokens=(11, 12),
        q=encode(ROWS, (11, 12)),
    )
    session.handle(Received(forward))
    assert Verify(2, 3, (11, 12), rows=ROWS) in session.handle(EngineAnswered((20, 21)))


def test_a_block_whose_distributions_cannot_be_read_is_a_fault_that_says_why() -> None:
    broken = block(1, 1, 11).message.model_copy(update={"q": b"\xff\xff"})
    session = parked()
    (answer,) = published(session.handle(Received(broken)))
    assert isinstance(answer, Fault)
    assert answer.code == "protocol_error"
    assert answer.message.startswith("q: ")
    assert session.handle(block(2, 1, 11)) == [Verify(2, 1, (11,))]


def test_a_forward_whose_distributions_cannot_be_read_is_dropped() -> None:
    session = parked()
    session.handle(block(1, 1, 20))
    forward = Forward(
        session="s", epoch=1, reply=ROUTE, round=2, base=1, parent=1, accepted=1, next_token=21, tokens=(11,)
    )
    assert session.handle(Received(forward.model_copy(update={"q": b"\xff\xff"}))) == []
    assert not any(isinstance(action, Verify) for action in session.handle(EngineAnswered((20, 21))))
