"""Dialogues with the verifier side of the core."""

from __future__ import annotations

from shared.protocol import (
    Block,
    Cancel,
    Fault,
    FinishReason,
    Hint,
    Outcome,
    Prompt,
    ReplyRoute,
    Stale,
    Tokens,
    Verdict,
)
from shared.speculation.verifier import (
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
    VerifierAction,
    VerifierSession,
    Verify,
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
    (answer,) = published(parked().handle(block(1, 1, 1, 2, 3, 4, 5)))
    assert isinstance(answer, Fault)
    assert "longer than 4" in answer.message


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
    assert session.handle(EngineAnswered((12,))) == [Commit(2, 5, 2, (12,), None, 0, 0)]
    assert published(session.handle(Committed(3))) == [
        Verdict(session="s", epoch=2, round=5, base=2, accepted=0, tokens=(12,))
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
    session.handle(EngineAnswered((11, 5)))
    assert session.handle(Committed(3))[-1] == Verify(2, 3, (12,))
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
    session.handle(EngineAnswered((11, 5)))
    assert session.handle(Committed(3))[-1] == Verify(2, 3, (12,))


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
    (verdict,) = published(session.handle(Committed(4)))
    assert isinstance(verdict, Verdict)
    assert (verdict.round, verdict.base, verdict.tokens) == (2, 3, (12,))


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
    assert session.handle(EngineAnswered((11,))) == [Commit(1, -1, 1, (11,), None, 0, 0)]
    assert session.handle(Committed(2)) == []
    assert session.handle(block(1, 1, 11, 12)) == [Verify(1, 2, (12,))]


def test_the_latest_message_waits_for_the_open_one() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    session.handle(block(2, 1, 11, 12))
    session.handle(EngineAnswered((11,)))
    actions = session.handle(Committed(2))
    assert actions[-1] == Verify(2, 2, (12,))


def test_a_failed_pass_is_a_fault_that_may_be_tried_again() -> None:
    session = parked()
    session.handle(block(1, 1, 11))
    actions = session.handle(Failed("unavailable", "gone", 0.5))
    (fault,) = published(actions)
    assert isinstance(fault, Fault)
    assert fault.retry_after_s == 0.5
    assert actions[1:] == [CloseEngine(), Release(1), Forget()]
