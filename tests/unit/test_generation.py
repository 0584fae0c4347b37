"""The shell around the core, as dialogues: messages in, messages out, and what the reader gets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from services.draft_gateway.answer_text import AnswerText, Ending
from services.draft_gateway.drafting import Draft, DraftRequest
from services.draft_gateway.drafting.drafter import Early
from services.draft_gateway.generation import Delivery, Generation, Replay
from shared.errors import (
    BrokerUnavailable,
    ContextLengthExceeded,
    OutriderError,
    SessionNotFound,
    SessionTaken,
    Unavailable,
)
from shared.protocol import (
    Block,
    Cancel,
    Closed,
    CloseSession,
    Fault,
    FinishReason,
    Floor,
    Forward,
    GenerationParams,
    Hint,
    Outcome,
    Placed,
    Policy,
    Prompt,
    ReplyRoute,
    Stale,
    TokenLogprobs,
    Tokens,
    Verdict,
)
from shared.sampling.sparse import SparseRow, decode
from shared.session import SessionState, SessionStats, SessionStatus
from shared.speculation.edge import EdgeConfig
from shared.speculation.outcomes import LEVELS
from shared.telemetry import TraceContext

SESSION = "cmpl-1"
ME = ReplyRoute(gateway="me", partition=3)
PROMPT = (1, 2, 3)
SURE = (LEVELS - 1,) * 3


class Wire:
    """An uplink that keeps what is sent; `blocked` holds sends back, `failure` fails them."""

    reply = ME

    def __init__(self) -> None:
        self.sent: list[tuple[Any, int]] = []
        self.closed: list[CloseSession] = []
        self.attempts = 0
        self.failure: OutriderError | None = None
        self.told: tuple[TokenLogprobs, ...] = ()
        self.open = asyncio.Event()
        self.open.set()

    async def logprobs(self, session: str, since: int = 0) -> tuple[TokenLogprobs, ...]:
        return self.told[since:]

    async def send(self, message: Any, *, partition: int, trace: TraceContext | None = None) -> None:
        self.attempts += 1
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.sent.append((message, partition))

    async def close(self, message: CloseSession) -> None:
        self.closed.append(message)

    @property
    def blocks(self) -> list[Prompt | Block]:
        return [message for message, _ in self.sent if not isinstance(message, Cancel | Forward)]


class Pencil:
    """A drafter that continues 10, 11, 12, … after the context's last token; it may fail or wait."""

    def __init__(self) -> None:
        self.requests: list[DraftRequest] = []
        self.forgotten: list[str] = []
        self.failure: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def draft(self, request: DraftRequest, early: Early | None = None) -> Draft:
        self.requests.append(request)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        tokens = tuple(request.context[-1] + 1 + number for number in range(request.length))
        return Draft(tokens, (1.0,) * len(tokens))

    def forget(self, session: str) -> None:
        self.forgotten.append(session)


class Desk:
    """A generation with its surroundings."""

    def __init__(
        self,
        *,
        resumable: bool = True,
        max_tokens: int = 50,
        drafter: Pencil | None = None,
        text: AnswerText | None = None,
        logprobs: bool = False,
        **config: Any,
    ) -> None:
        self.wire = Wire()
        self.pencil = drafter or Pencil()
        self.ended = 0
        self.generation = Generation(
            SESSION,
            PROMPT,
            EdgeConfig(gateway=ME.gateway, max_tokens=max_tokens, block_length=3, **config),
            uplink=self.wire,  # type: ignore[arg-type]
            drafter=self.pencil,  # type: ignore[arg-type]
            trace=TraceContext.new(),
            resumable=resumable,
            on_end=lambda generation: setattr(self, "ended", self.ended + 1),
            text=text,
            logprobs=logprobs,
        )

    async def begin(self, committed: Tokens = (), read: int = 0) -> None:
        self.generation.place(placed(epoch=1, partition=5))
        self.generation.begin(committed=committed, read=read, next_round=1 if committed else 0)
        await settle()

    async def verdict(self, round: int, base: int, *tokens: int, **fields: Any) -> None:
        self.generation.receive(
            Verdict(
                session=SESSION,
                epoch=fields.pop("epoch", 1),
                round=round,
                base=base,
                accepted=len(tokens) - 1,
                tokens=tokens,
                **fields,
            )
        )
        await settle()

    async def delivered(self) -> list[Delivery]:
        """All that waits for the reader."""
        found = []
        while True:
            try:
                async with asyncio.timeout(0.01):
                    delivery = await self.generation.next()
            except TimeoutError:
                return found
            if delivery is None:
                return found
            found.append(delivery)


def placed(*, epoch: int, partition: int, gateway: ReplyRoute = ME, reason: Any = "opened") -> Placed:
    return Placed(
        session=SESSION, epoch=epoch, verifier="v", partition=partition, reply=gateway, reason=reason
    )


async def settle() -> None:
    """Let tasks run that wait for nothing."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_prompt_goes_up_and_its_first_token_is_followed_by_a_block() -> None:
    desk = Desk()
    await desk.begin()
    assert desk.wire.sent == [(Prompt(session=SESSION, epoch=1, reply=ME, round=0, base=0), 5)]
    await desk.verdict(0, 0, 9)
    assert desk.pencil.requests[0].context == (*PROMPT, 9)
    assert desk.wire.blocks[-1] == Block(
        session=SESSION, epoch=1, reply=ME, round=1, base=1, tokens=(10, 11, 12), confidences=SURE
    )
    assert await desk.delivered() == [Delivery(0, (9,), ("corrected",), 0)]


async def test_what_arrives_before_its_driver_has_begun_is_not_lost() -> None:
    desk = Desk()
    desk.generation.place(placed(epoch=1, partition=5))
    await desk.verdict(0, 0, 9)
    assert (await desk.delivered(), desk.wire.sent) == ([], [])
    await desk.begin()
    assert await desk.delivered() == [Delivery(0, (9,), ("corrected",), 0)]
    assert desk.pencil.requests[0].context == (*PROMPT, 9)


async def test_what_arrives_before_a_resumed_stream_has_begun_is_not_said_twice() -> None:
    desk = Desk()
    desk.generation.place(placed(epoch=1, partition=5))
    await desk.verdict(4, 1, 10, 11)
    await desk.begin(committed=(9, 10), read=1)
    assert [token for delivery in await desk.delivered() for token in delivery.tokens] == [10, 11]


async def test_after_a_hit_the_next_block_is_on_its_way_before_the_reader_wakes() -> None:
    desk = Desk()
    await desk.begin()
    await desk.verdict(0, 0, 9)
    await desk.delivered()
    outcome = Outcome(accepted=3, next_token=13, confidence=0.9)
    desk.generation.receive(Hint(session=SESSION, epoch=1, round=1, base=1, layer=7, outcomes=(outcome,)))
    await settle()
    order: list[str] = []

    async def read() -> None:
        await desk.generation.next()
        order.append(f"read after {desk.wire.attempts} sends")

    reading = asyncio.create_task(read())
    await settle()
    before = desk.wire.attempts
    desk.generation.receive(
        Verdict(session=SESSION, epoch=1, round=1, base=1, accepted=3, tokens=(10, 11, 12, 13))
    )
    await reading
    assert order == [f"read after {before + 1} sends"]
    assert desk.wire.blocks[-1].round == 2
    report = desk.generation.report()
    assert (report["hits"], report["hints"], report["hints_before_verdict"]) == (1, 1, 1)
    assert report["exit_lead_ms"]["7"]["count"] == 1


async def test_a_finished_lane_goes_up_as_a_forward_and_the_verdict_that_took_it_needs_no_block() -> None:
    desk = Desk(forwards=True)
    await desk.begin()
    await desk.verdict(0, 0, 9)
    outcome = Outcome(accepted=3, next_token=13, confidence=0.9)
    desk.generation.receive(Hint(session=SESSION, epoch=1, round=1, base=1, layer=7, outcomes=(outcome,)))
    await settle()
    forward = Forward(
        session=SESSION,
        epoch=1,
        reply=ME,
        round=2,
        base=1,
        parent=1,
        accepted=3,
        next_token=13,
        tokens=(14, 15, 16),
        confidences=SURE,
    )
    assert desk.wire.sent[-1] == (forward, 5)
    await desk.verdict(1, 1, 10, 11, 12, 13, taken=2)
    await desk.verdict(2, 5, 14, 15, 16, 17)
    assert [message.round for message in desk.wire.blocks if isinstance(message, Block)] == [1, 3]
    report = desk.generation.report()
    assert (report["forwards"], report["taken"], report["hits_by_exit"]) == (1, 1, 1)


async def test_what_the_floor_says_is_delivered_and_leaves_a_block_that_agrees_alone() -> None:
    desk = Desk(policy=Policy.LATENCY)
    await desk.begin()
    await desk.verdict(0, 0, 9)
    sent = desk.wire.attempts
    desk.generation.receive(Floor(session=SESSION, epoch=1, base=1, tokens=(10,), verify_ms=5.0, rows=1))
    await settle()
    assert desk.wire.attempts == sent
    await desk.verdict(1, 1, 10, 11, 12, 13)
    assert [delivery.tokens for delivery in await desk.delivered()] == [(9,), (10,), (11, 12, 13)]
    report = desk.generation.report()
    assert (report["floor_tokens"], report["rounds"], report["passes"]) == (1, 1, 2)


async def test_the_last_verdict_tells_the_reader_why_it_ends_and_closes_the_session() -> None:
    desk = Desk(max_tokens=2)
    await desk.begin()
    await desk.verdict(0, 0, 9)
    await desk.verdict(1, 1, 10, finish_reason=FinishReason.LENGTH)
    assert [delivery.finish_reason for delivery in await desk.delivered()] == [None, FinishReason.LENGTH]
    assert await desk.generation.next() is None
    assert desk.generation.finish_reason is FinishReason.LENGTH
    assert [(close.detach, close.epoch) for close in desk.wire.closed] == [(False, 1)]
    assert desk.pencil.forgotten == [SESSION]
    assert desk.ended == 1


async def test_an_unanswered_block_is_sent_again_but_not_beside_itself() -> None:
    desk = Desk(round_timeout_ms=20.0)
    desk.wire.open.clear()
    await desk.begin()
    await asyncio.sleep(0.1)
    assert desk.wire.attempts == 1
    desk.wire.open.set()
    await asyncio.sleep(0.1)
    assert len(desk.wire.blocks) > 1
    assert set(desk.wire.blocks) == {desk.wire.blocks[0]}
    desk.generation.leave("enough", detach=False)


async def test_a_broker_that_is_away_for_a_while_ends_nothing() -> None:
    desk = Desk(round_timeout_ms=20.0)
    desk.wire.failure = BrokerUnavailable("away")
    await desk.begin()
    await asyncio.sleep(0.05)
    assert desk.wire.attempts > 1 and desk.ended == 0
    desk.wire.failure = None
    await asyncio.sleep(0.05)
    assert desk.wire.blocks
    desk.generation.leave("enough", detach=False)


async def test_nothing_heard_for_too_long_is_an_error_in_time() -> None:
    desk = Desk(round_timeout_ms=10.0, stall_timeout_ms=40.0)
    await desk.begin()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(desk.generation.next(), 5)
    assert desk.wire.closed[-1].detach


async def test_when_drafting_fails_an_empty_block_goes_up() -> None:
    desk = Desk()
    desk.pencil.failure = ZeroDivisionError()
    await desk.begin()
    await desk.verdict(0, 0, 9)
    assert desk.wire.blocks[-1] == Block(session=SESSION, epoch=1, reply=ME, round=1, base=1, tokens=())


async def test_a_moved_session_gets_its_open_block_at_the_new_place() -> None:
    desk = Desk()
    await desk.begin()
    desk.generation.receive(placed(epoch=2, partition=8, reason="moved"))
    await settle()
    assert desk.wire.sent[-1] == (Prompt(session=SESSION, epoch=2, reply=ME, round=0, base=0), 8)


async def test_a_placement_of_an_older_epoch_changes_nothing() -> None:
    desk = Desk()
    desk.generation.place(placed(epoch=4, partition=5))
    desk.generation.begin()
    desk.generation.receive(placed(epoch=3, partition=8, reason="moved"))
    await settle()
    assert [partition for _, partition in desk.wire.sent] == [5]


async def test_a_session_resumed_elsewhere_is_let_go_without_a_word() -> None:
    desk = Desk()
    await desk.begin()
    other = ReplyRoute(gateway="other", partition=1)
    desk.generation.receive(placed(epoch=2, partition=5, gateway=other, reason="resumed"))
    with pytest.raises(SessionTaken):
        await desk.generation.next()
    await settle()
    assert desk.wire.closed == []
    assert not [message for message, _ in desk.wire.sent if isinstance(message, Cancel)]


@pytest.mark.parametrize(("resumable", "detached"), [(True, True), (False, False)])
async def test_a_client_that_leaves_frees_the_kv_and_keeps_the_tokens_where_it_may_return(
    resumable: bool, detached: bool
) -> None:
    desk = Desk(resumable=resumable)
    await desk.begin()
    desk.generation.leave("left", detach=True)
    desk.generation.leave("left", detach=True)
    await desk.generation.settled()
    cancels = [message for message, _ in desk.wire.sent if isinstance(message, Cancel)]
    assert len(cancels) == 1
    assert [close.detach for close in desk.wire.closed] == [detached]
    assert desk.ended == 1


async def test_a_closed_session_ends_its_stream() -> None:
    desk = Desk()
    await desk.begin()
    desk.generation.receive(Closed(session=SESSION, epoch=1, reason="operator"))
    with pytest.raises(SessionNotFound, match="operator"):
        await desk.generation.next()


async def test_a_fault_that_no_retry_mends_is_the_clients_error_and_closes_the_session() -> None:
    desk = Desk()
    await desk.begin()
    code = ContextLengthExceeded.code
    desk.generation.receive(Fault(session=SESSION, epoch=1, round=0, code=code, message="too long"))
    with pytest.raises(ContextLengthExceeded, match="too long"):
        await desk.generation.started(1)
    await desk.generation.settled()
    assert [close.detach for close in desk.wire.closed] == [False]


async def test_a_defect_ends_this_session_with_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    await desk.begin()

    def broken(event: object, now_ms: float) -> Sequence[object]:
        raise ZeroDivisionError

    monkeypatch.setattr(desk.generation._core, "handle", broken)
    await desk.verdict(0, 0, 9)
    with pytest.raises(OutriderError, match="its log says why"):
        await desk.generation.next()
    assert desk.ended == 1


async def test_a_resumed_generation_gives_first_what_its_reader_missed() -> None:
    desk = Desk()
    await desk.begin(committed=(9, 10, 11), read=1)
    assert await desk.delivered() == [Delivery(1, (10, 11), ("replayed", "replayed"), 0)]
    assert desk.wire.blocks == [
        Block(session=SESSION, epoch=1, reply=ME, round=1, base=3, tokens=(12, 13, 14), confidences=SURE)
    ]


async def test_waiting_for_the_first_delivery_has_an_end() -> None:
    desk = Desk()
    await desk.begin()
    await asyncio.wait_for(desk.generation.started(0.01), 5)
    desk.generation.leave("enough", detach=False)


# --- stop strings and log-probabilities ---------------------------------------------------------------------


class NumberText:
    """Tokens as text: token 10 is "10 ", so that strings span tokens."""

    def push(self, tokens: Sequence[int]) -> str:
        return "".join(f"{token} " for token in tokens)

    def flush(self) -> str:
        return ""


def ending(*strings: str, **fields: Any) -> AnswerText:
    return AnswerText(NumberText(), Ending(strings, **fields))


async def test_a_stop_string_across_blocks_ends_the_session_at_its_last_token() -> None:
    desk = Desk(text=ending("9 10 1"))
    await desk.begin()
    await desk.verdict(0, 0, 9)
    await desk.verdict(1, 1, 10, 11, 12, 13)
    await desk.generation.settled()
    assert await desk.delivered() == [
        Delivery(0, (9,), ("corrected",), 0),
        Delivery(1, (10, 11), ("accepted",) * 2, 1, FinishReason.STOP, "9 10 1"),
    ]
    assert await desk.generation.next() is None
    assert (desk.generation.finish_reason, desk.generation.length) == (FinishReason.STOP, 3)
    assert [message for message, _ in desk.wire.sent if isinstance(message, Cancel)]
    assert [close.detach for close in desk.wire.closed] == [False]
    assert desk.ended == 1


async def test_a_stop_string_in_the_last_tokens_goes_before_the_limit_and_needs_no_cancel() -> None:
    desk = Desk(text=ending("10"), max_tokens=2)
    await desk.begin()
    await desk.verdict(0, 0, 9)
    await desk.verdict(1, 1, 10, finish_reason=FinishReason.LENGTH)
    await desk.generation.settled()
    assert desk.generation.finish_reason is FinishReason.STOP
    assert not [message for message, _ in desk.wire.sent if isinstance(message, Cancel)]


async def test_a_resumed_generation_knows_the_beginning_of_a_stop_string() -> None:
    desk = Desk(text=ending("10 11"))
    await desk.begin(committed=(9, 10), read=2)
    await desk.verdict(1, 2, 11, 12)
    assert await desk.delivered() == [
        Delivery(2, (11,), ("accepted",), 1, FinishReason.STOP, "10 11"),
    ]


async def test_log_probabilities_go_with_their_tokens_however_answers_overlap() -> None:
    desk = Desk(logprobs=True)
    told = [TokenLogprobs(logprob=-float(number), rank=1) for number in range(4)]
    await desk.begin()
    await desk.verdict(0, 0, 9, logprobs=(told[0],))
    desk.generation.receive(Floor(session=SESSION, epoch=1, base=1, tokens=(10,), logprobs=(told[1],)))
    await desk.verdict(1, 1, 10, 11, 12, logprobs=tuple(told[1:]))
    assert [delivery.logprobs for delivery in await desk.delivered()] == [
        (told[0],),
        (told[1],),
        tuple(told[2:]),
    ]


async def test_what_was_missed_gets_its_log_probabilities_from_the_store() -> None:
    desk = Desk(logprobs=True)
    told = tuple(TokenLogprobs(logprob=-float(number), rank=1) for number in range(3))
    desk.wire.told = told
    await desk.begin()
    await desk.verdict(0, 0, 9, logprobs=told[:1])
    desk.generation.receive(
        Stale(session=SESSION, epoch=1, round=1, base=3, since=1, tokens=(10, 11), gateway=ME.gateway)
    )
    await settle()
    assert [delivery.logprobs for delivery in await desk.delivered()] == [told[:1], told[1:]]


# --- replays ----------------------------------------------------------------------------------------------------


def finished(reason: FinishReason | None) -> SessionState:
    return SessionState(
        session=SESSION,
        status=SessionStatus.FINISHED,
        epoch=1,
        base=3,
        prompt_length=3,
        params=GenerationParams(max_tokens=3),
        model="m",
        verifier="v",
        partition=5,
        owner="",
        reply=ME,
        finish_reason=reason,
        last_round=2,
        last_base=2,
        created_ms=0,
        touched_ms=0,
        stats=SessionStats(rounds=2, drafted=4, accepted=1),
    )


@pytest.mark.parametrize(("position", "rest"), [(0, (9, 10, 11)), (2, (11,)), (3, ())])
async def test_a_finished_session_is_read_again_from_any_position(position: int, rest: Tokens) -> None:
    replay = Replay(finished(FinishReason.STOP), (9, 10, 11), position, FinishReason.STOP)
    tokens: list[int] = []
    while (delivery := await replay.next()) is not None:
        assert delivery.base == position and delivery.finish_reason is FinishReason.STOP
        tokens += delivery.tokens
    assert tuple(tokens) == rest
    assert (replay.finish_reason, replay.length) == (FinishReason.STOP, 3)
    assert replay.report()["rounds"] == 2


def test_a_cancelled_session_is_not_read_again() -> None:
    with pytest.raises(SessionNotFound):
        Replay(finished(FinishReason.CANCELLED), (9,), 0, FinishReason.CANCELLED)


# --- ratio mode ---------------------------------------------------------------------------------------------------

ROWS = tuple(SparseRow((token, token + 100), (3, 5)) for token in (10, 11, 12))


class Drawing(Pencil):
    """A pencil that tells what its tokens were drawn from."""

    async def draft(self, request: DraftRequest, early: Early | None = None) -> Draft:
        plain = await super().draft(request)
        return replace(plain, rows=ROWS[: len(plain.tokens)], thresholds=(0.1, 0.2, 0.3)[: len(plain.tokens)])


async def test_what_tokens_were_drawn_from_travels_as_bytes_and_the_next_draft_starts_where_it_left() -> None:
    desk = Desk(drafter=Drawing())
    await desk.begin()
    await desk.verdict(0, 0, 9)
    block = desk.wire.blocks[-1]
    assert isinstance(block, Block)
    assert decode(block.q, block.tokens, 200) == ROWS
    await desk.verdict(1, 1, 10, 50)
    assert [request.threshold for request in desk.pencil.requests] == [None, 0.2]
