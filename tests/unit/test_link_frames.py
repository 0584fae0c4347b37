"""The link's frames: every kind survives the way, nothing that is cut or garbled does, and they are small."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from services.draft_gateway.link import codec, frames
from services.draft_gateway.link.codec import (
    Layout,
    Names,
    Number,
    Reader,
    UnknownKind,
    UnknownSession,
    Writer,
)
from services.draft_gateway.link.frames import (
    LAYOUTS,
    Answer,
    Ask,
    AskLogprobs,
    AskPrompt,
    AskState,
    AskTokens,
    AskTroubles,
    Bind,
    Done,
    Failed,
    Frame,
    LogprobsTold,
    Ping,
    Pong,
    Release,
    StateTold,
    TokensTold,
    Troubles,
    decode,
    encode,
)
from shared import protocol
from shared.errors import ProtocolError
from shared.protocol import (
    Block,
    Cancel,
    Closed,
    CloseSession,
    Evicted,
    Fault,
    FinishReason,
    Floor,
    Forward,
    GenerationParams,
    Hint,
    OpenSession,
    Outcome,
    Placed,
    Policy,
    Prompt,
    ReplyRoute,
    Sampling,
    SamplingMode,
    Stale,
    TokenLogprobs,
    Verdict,
)
from shared.session import SessionState, SessionStatus
from shared.telemetry import TraceContext

SESSION, NUMBER = "cmpl-0123456789abcdef0123456789abcdef", 7
ROUTE = ReplyRoute(gateway="edge-0.abcd", partition=3)
NOT_CARRIED = {protocol.TouchSession, protocol.Refused, protocol.Heartbeat, protocol.DeadLetter}
"""Messages between services in the cloud; a refusal reaches the edge as `Failed`."""


class Agreed:
    """What both ends know: one session's number, and the edge's reply route."""

    reply = ROUTE

    def number(self, session: str) -> int:
        return NUMBER if session == SESSION else 0

    def session(self, number: int) -> str:
        if number != NUMBER:
            raise UnknownSession(f"no session {number}")
        return SESSION


NAMES: Names = Agreed()

sessions = st.sampled_from([SESSION, "cmpl-another"])
counts = st.integers(0, 2**40)
token_ids = st.integers(0, 2**31 - 1)
tokens = st.lists(token_ids, max_size=40).map(tuple)
levels = st.lists(st.integers(0, 99), max_size=40).map(tuple)
texts = st.text(max_size=30)
times = st.integers(0, 10**8).map(lambda hundredths: hundredths / 100)
head = {"session": sessions, "epoch": counts}
of_round = {**head, "round": counts, "base": counts}
finish = st.none() | st.sampled_from(FinishReason)
retry = st.none() | times
likelihoods = st.floats(-100, 0)
logprobs = st.lists(
    st.builds(
        TokenLogprobs,
        logprob=likelihoods, rank=counts, top=st.lists(st.tuples(token_ids, likelihoods), max_size=3).map(tuple),
    ),
    max_size=3,
).map(tuple)  # fmt: skip
measured = {
    "finish_reason": finish, "taken": st.none() | counts, "verify_ms": times, "commit_ms": times, "rows": counts,
    "logprobs": logprobs, "sessions": counts, "fixed_ms": times, "row_ms": times, "padded": counts,
}  # fmt: skip
params = st.builds(
    GenerationParams,
    max_tokens=st.integers(1, 10**6), stop_token_ids=tokens, ignore_eos=st.booleans(), unheard=st.booleans(),
    policy=st.sampled_from(Policy), logprobs=st.none() | st.integers(0, 20),
    stop=st.lists(st.text(min_size=1, max_size=10), max_size=4).map(tuple), json_schema=st.sampled_from(["", "{}"]),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 2), seed=st.integers(0, 2**64 - 1), choice=st.integers(0, 127),
        logit_bias=st.lists(st.tuples(token_ids, st.floats(-100, 100)), max_size=3).map(tuple),
        mode=st.sampled_from(SamplingMode),
    ),
)  # fmt: skip
outcomes = st.builds(
    Outcome,
    accepted=counts,
    next_token=token_ids,
    confidence=st.integers(0, 255).map(lambda byte: byte / 255),
)
names = st.text("abcdefgh-_.0123456789", min_size=1, max_size=20)
states = st.builds(
    SessionState,
    session=sessions, status=st.sampled_from(SessionStatus), epoch=counts, base=counts, prompt_length=counts,
    params=params, model=names, verifier=names, partition=counts, owner=names,
    reply=st.builds(ReplyRoute, gateway=names, partition=counts), finish_reason=finish, last_round=counts,
    last_base=counts, created_ms=counts, touched_ms=counts, tenant=texts,
    metadata=st.dictionaries(names, texts, max_size=3),
)  # fmt: skip

MESSAGES: dict[type[Any], st.SearchStrategy[Any]] = {
    Prompt: st.builds(Prompt, reply=st.just(ROUTE), **of_round),
    Block: st.builds(Block, reply=st.just(ROUTE), tokens=tokens, confidences=levels, **of_round),
    Forward: st.builds(
        Forward,
        reply=st.just(ROUTE), parent=counts, accepted=counts, next_token=token_ids, tokens=tokens,
        confidences=levels, **of_round,
    ),
    Cancel: st.builds(Cancel, reason=texts, **head),
    Hint: st.builds(
        Hint, layer=counts, outcomes=st.lists(outcomes, max_size=5).map(tuple), elapsed_ms=times, **of_round
    ),
    Verdict: st.builds(Verdict, accepted=counts, tokens=tokens, **of_round, **measured),
    Floor: st.builds(Floor, base=counts, tokens=tokens, **head, **measured),
    Stale: st.builds(Stale, since=counts, tokens=tokens, gateway=texts, finish_reason=finish, **of_round),
    Fault: st.builds(Fault, round=counts, code=texts, message=texts, retry_after_s=retry, **head),
    OpenSession: st.builds(
        OpenSession,
        reply=st.just(ROUTE), model=names, prompt=tokens, params=st.none() | params, resume=st.booleans(),
        tenant=texts, metadata=st.dictionaries(names, texts, max_size=3), **head,
    ),
    CloseSession: st.builds(CloseSession, reason=texts, detach=st.booleans(), **head),
    Placed: st.builds(
        Placed,
        verifier=names, partition=counts, base=counts, reason=st.sampled_from(["opened", "resumed", "moved"]),
        reply=st.just(ROUTE) | st.builds(ReplyRoute, gateway=names, partition=st.just(0)), **head,
    ),
    Evicted: st.builds(Evicted, reason=texts, **head),
    Closed: st.builds(Closed, reason=texts, **head),
    AskState: st.builds(AskState, sessions),
    AskPrompt: st.builds(AskPrompt, sessions),
    AskTokens: st.builds(AskTokens, sessions, counts),
    AskLogprobs: st.builds(AskLogprobs, sessions, counts),
    AskTroubles: st.just(AskTroubles()),
    StateTold: st.builds(StateTold, st.none() | states),
    TokensTold: st.builds(TokensTold, tokens),
    LogprobsTold: st.builds(LogprobsTold, logprobs),
    Done: st.just(Done()),
    Failed: st.builds(Failed, texts, texts, retry),
    Ping: st.builds(Ping, counts),
    Pong: st.builds(Pong, counts),
    Bind: st.builds(Bind, counts, names),
    Release: st.builds(Release, counts),
    Troubles: st.builds(Troubles, st.lists(texts, max_size=3).map(tuple)),
}  # fmt: skip
traces = st.builds(
    TraceContext,
    st.text("0123456789abcdef", min_size=32, max_size=32), st.text("0123456789abcdef", min_size=16, max_size=16),
    st.booleans(),
)  # fmt: skip
QUESTIONS = (OpenSession, CloseSession, Cancel, AskState, AskPrompt, AskTokens, AskLogprobs, AskTroubles)
REPLIES = (Placed, StateTold, TokensTold, LogprobsTold, Troubles, Done, Failed)
MESSAGES[Ask] = st.builds(
    Ask, counts, st.one_of(*(MESSAGES[kind] for kind in QUESTIONS)), counts, traces | st.none()
)
MESSAGES[Answer] = st.builds(Answer, counts, st.one_of(*(MESSAGES[kind] for kind in REPLIES)))
any_frame: st.SearchStrategy[Frame] = st.one_of(*MESSAGES.values())


@given(any_frame)
def test_every_frame_survives_the_way(frame: Frame) -> None:
    assert decode(encode(frame, NAMES), NAMES) == frame


def test_every_kind_is_tested_and_every_message_that_concerns_the_edge_is_carried() -> None:
    carried = {layout.model for layout in LAYOUTS.values()}
    assert carried == set(MESSAGES)
    assert carried >= set(get_args(protocol.AnyMessage)) - NOT_CARRIED


@pytest.mark.parametrize(
    "layout", [*LAYOUTS.values(), frames.PARAMS], ids=lambda layout: layout.model.__name__
)
def test_every_field_has_its_line(layout: Layout) -> None:
    model = layout.model
    fields = set(model.model_fields if issubclass(model, BaseModel) else model.__dataclass_fields__)
    assert layout.fields == fields - {"kind"}
    numbers = [number for number, _ in layout.optional.values()]
    assert len(numbers) == len(set(numbers))


@given(any_frame, st.data())
def test_a_frame_that_is_cut_short_is_refused_or_is_one_without_its_last_fields(
    frame: Frame, data: st.DataObject
) -> None:
    whole = encode(frame, NAMES)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        got = decode(cut, NAMES)
    except ProtocolError as error:
        assert error.message
    else:  # it ended where an optional field would have begun
        assert type(got) is type(frame)


@given(st.binary(max_size=60))
def test_garbage_is_refused_with_a_reason_or_read_as_what_it_says(garbage: bytes) -> None:
    try:
        frame = decode(garbage, NAMES)
    except ProtocolError as error:
        assert error.message
    else:
        assert decode(encode(frame, NAMES), NAMES) == frame


def test_a_number_that_never_ends_and_a_list_longer_than_its_frame_cost_nothing() -> None:
    for greedy in (b"\x02" + b"\xff" * 60, b"\x31\xfc\xff\xff\xff\x7f", b"\x26\xff\xff\xff\x7f"):
        with pytest.raises(ProtocolError):
            decode(greedy, NAMES)


def test_a_session_without_a_number_and_a_kind_of_the_future_are_told_apart_from_faults() -> None:
    late = encode(Hint(session=SESSION, epoch=1, round=1, base=1, layer=3, outcomes=()), NAMES)
    with pytest.raises(UnknownSession):
        decode(late.replace(bytes([NUMBER]), bytes([NUMBER + 1]), 1), NAMES)
    with pytest.raises(UnknownKind):
        decode(b"\x7e\x01\x02", NAMES)


def test_an_older_reader_skips_fields_that_it_does_not_know() -> None:
    verdict = Verdict(session=SESSION, epoch=1, round=2, base=3, accepted=1, tokens=(4, 5), verify_ms=6.5)
    out = Writer(NAMES)
    out.data += encode(verdict, NAMES)
    out.varint(2 * 99 + codec.VARINT)
    out.varint(12345)
    out.varint(2 * 100 + codec.BYTES)
    out.chunk(b"something new")
    assert decode(bytes(out.data), NAMES) == verdict


def test_a_newer_reader_takes_the_default_for_a_field_that_is_not_there() -> None:
    older = Layout(Prompt, {"session": codec.Session(), "epoch": Number(), "reply": codec.Route()})
    out = Writer(NAMES)
    older.put(out, Prompt(session=SESSION, epoch=4, reply=ROUTE, round=9))
    newer = Layout(Prompt, dict(older.positional), {"round": (1, Number()), "base": (2, Number())})
    assert newer.take(Reader(bytes(out.data), NAMES)) == Prompt(session=SESSION, epoch=4, reply=ROUTE)


@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_a_block_and_its_verdict_fit_into_the_budget(vocabulary: int) -> None:
    """24 bytes a committed token is what a round may cost that commits one; a good one commits four or five."""
    drafted = tuple(range(vocabulary - 5, vocabulary))
    block = Block(session=SESSION, epoch=3, reply=ROUTE, round=900, base=1900, tokens=drafted)
    verdict = Verdict(
        session=SESSION,
        epoch=3,
        round=900,
        base=1900,
        accepted=4,
        tokens=drafted,
        verify_ms=61.27,
        commit_ms=0.61,
    )
    assert len(encode(block, NAMES)) <= 24
    assert len(encode(verdict, NAMES)) <= 32
    assert len(encode(Ping(100), NAMES)) <= 3


def test_what_can_not_be_written_is_refused() -> None:
    with pytest.raises(ProtocolError, match="0 or more"):
        Writer(NAMES).varint(-1)
    with pytest.raises(ProtocolError, match="0 to 255"):
        codec.SmallNumbers().put(Writer(NAMES), (256,))


def test_what_a_row_takes_on_a_large_gpu_is_told() -> None:
    verdict = Verdict(
        session=SESSION,
        epoch=1,
        round=1,
        base=1,
        accepted=0,
        tokens=(4,),
        fixed_ms=6.3,
        row_ms=0.0143,
        padded=6,
    )
    assert decode(encode(verdict, NAMES), NAMES) == verdict


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_time_that_makes_no_sense_loses_no_verdict(value: float) -> None:
    verdict = Verdict(session=SESSION, epoch=1, round=1, base=1, accepted=0, tokens=(4,), verify_ms=value)
    assert decode(encode(verdict, NAMES), NAMES) == verdict.model_copy(update={"verify_ms": 0.0})
