"""Messages survive the wire, tolerate what is new and refuse what is wrong by name."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import ProtocolError
from shared.protocol import (
    SCHEMA_MAJOR,
    SCHEMA_VERSION,
    AnyMessage,
    Block,
    Cancel,
    Closed,
    CloseSession,
    DeadLetter,
    Evicted,
    Fault,
    FinishReason,
    Floor,
    Forward,
    GenerationParams,
    Heartbeat,
    Hint,
    OpenSession,
    Outcome,
    Placed,
    Policy,
    Prompt,
    Refused,
    ReplyRoute,
    Stale,
    Topic,
    TouchSession,
    Verdict,
    decode,
    encode,
)

WIRE_BUDGET_US = 100

session_ids = st.text("abcXYZ019_-", min_size=1, max_size=80)
counts = st.integers(0, 2**40)
token_ids = st.integers(0, 2**31 - 1)
token_lists = st.lists(token_ids, max_size=40).map(tuple)
levels = st.lists(st.integers(0, 99), max_size=40).map(tuple)
texts = st.text(max_size=60)
milliseconds = st.floats(0, 1e9)
retry_after = st.none() | st.floats(0, 1e6)
finish_reasons = st.none() | st.sampled_from(FinishReason)
routes = st.builds(ReplyRoute, gateway=texts, partition=counts)
generation_params = st.builds(
    GenerationParams,
    max_tokens=st.integers(1, 2**20),
    stop_token_ids=token_lists,
    ignore_eos=st.booleans(),
    unheard=st.booleans(),
    seed=st.integers(-(2**63), 2**63),
    policy=st.sampled_from(Policy),
)
outcomes = st.builds(Outcome, accepted=counts, next_token=token_ids, confidence=st.floats(0, 1))

STRATEGIES: dict[type[object], st.SearchStrategy[AnyMessage]] = {
    OpenSession: st.builds(
        OpenSession,
        session=session_ids,
        epoch=counts,
        reply=routes,
        model=texts,
        prompt=token_lists,
        params=st.none() | generation_params,
        resume=st.booleans(),
        tenant=texts,
        metadata=st.dictionaries(texts, texts, max_size=4),
    ),
    CloseSession: st.builds(
        CloseSession, session=session_ids, epoch=counts, reason=texts, detach=st.booleans()
    ),
    TouchSession: st.builds(TouchSession, session=session_ids, epoch=counts),
    Placed: st.builds(
        Placed,
        session=session_ids,
        epoch=counts,
        verifier=texts,
        partition=counts,
        base=counts,
        reply=routes,
        reason=st.sampled_from(["opened", "resumed", "moved"]),
    ),
    Evicted: st.builds(Evicted, session=session_ids, epoch=counts, reason=texts),
    Closed: st.builds(Closed, session=session_ids, epoch=counts, reason=texts),
    Refused: st.builds(
        Refused,
        session=session_ids,
        epoch=counts,
        reply=routes,
        code=texts,
        message=texts,
        retry_after_s=retry_after,
    ),
    Prompt: st.builds(Prompt, session=session_ids, epoch=counts, reply=routes, round=counts, base=counts),
    Block: st.builds(
        Block,
        session=session_ids,
        epoch=counts,
        reply=routes,
        round=counts,
        base=counts,
        tokens=token_lists,
        confidences=levels,
    ),
    Forward: st.builds(
        Forward,
        session=session_ids,
        epoch=counts,
        reply=routes,
        round=counts,
        base=counts,
        parent=counts,
        accepted=counts,
        next_token=token_ids,
        tokens=token_lists,
        confidences=levels,
    ),
    Cancel: st.builds(Cancel, session=session_ids, epoch=counts, reason=texts),
    Hint: st.builds(
        Hint,
        session=session_ids,
        epoch=counts,
        round=counts,
        base=counts,
        layer=counts,
        outcomes=st.lists(outcomes, max_size=4).map(tuple),
        elapsed_ms=milliseconds,
    ),
    Verdict: st.builds(
        Verdict,
        session=session_ids,
        epoch=counts,
        round=counts,
        base=counts,
        accepted=counts,
        tokens=token_lists,
        finish_reason=finish_reasons,
        taken=st.none() | counts,
        verify_ms=milliseconds,
        commit_ms=milliseconds,
        rows=counts,
    ),
    Floor: st.builds(
        Floor,
        session=session_ids,
        epoch=counts,
        base=counts,
        tokens=token_lists,
        finish_reason=finish_reasons,
        taken=st.none() | counts,
        verify_ms=milliseconds,
        commit_ms=milliseconds,
        rows=counts,
    ),
    Stale: st.builds(
        Stale,
        session=session_ids,
        epoch=counts,
        round=counts,
        base=counts,
        since=counts,
        tokens=token_lists,
        gateway=texts,
        finish_reason=finish_reasons,
    ),
    Fault: st.builds(
        Fault,
        session=session_ids,
        epoch=counts,
        round=counts,
        code=texts,
        message=texts,
        retry_after_s=retry_after,
    ),
    Heartbeat: st.builds(
        Heartbeat,
        verifier=texts,
        incarnation=texts,
        model=texts,
        ready=st.booleans(),
        partitions=st.lists(st.integers(0, 100), max_size=12).map(tuple),
        sessions=counts,
        max_sessions=counts,
        kv_usage=st.floats(0, 1),
        kv_capacity_tokens=counts,
        max_model_len=counts,
        step_ms=milliseconds,
        stopping=st.booleans(),
    ),
    DeadLetter: st.builds(
        DeadLetter,
        source=texts,
        partition=counts,
        offset=counts,
        reader=texts,
        reason=texts,
        payload=texts,
        headers=st.dictionaries(texts, texts, max_size=4),
    ),
}

BLOCK = Block(
    session="s-0123456789abcdef",
    epoch=3,
    reply=ReplyRoute(gateway="gateway-0", partition=7),
    round=41,
    base=205,
    tokens=tuple(range(30000, 30008)),
)
VERDICT = Verdict(
    session="s-0123456789abcdef",
    epoch=3,
    round=41,
    base=205,
    accepted=8,
    tokens=tuple(range(30000, 30009)),
    verify_ms=23.456,
    commit_ms=0.789,
)


def test_every_message_is_covered_here() -> None:
    assert set(get_args(AnyMessage)) == set(STRATEGIES)


@given(st.one_of(*STRATEGIES.values()))
@settings(max_examples=600, deadline=None)
def test_every_message_survives_the_wire(message: AnyMessage) -> None:
    assert decode(message.topic, encode(message)) == message


@given(st.one_of(*STRATEGIES.values()), st.dictionaries(st.text(min_size=1), st.integers(), min_size=1))
@settings(deadline=None)
def test_fields_that_a_reader_does_not_know_are_accepted(message: AnyMessage, more: dict[str, int]) -> None:
    known = json.loads(encode(message))
    newer = json.dumps({**{f"new-{name}": value for name, value in more.items()}, **known}).encode()
    assert decode(message.topic, newer, version=f"{SCHEMA_MAJOR}.99") == message


@given(st.sampled_from(Topic), st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_with_the_topic_named(topic: Topic, payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=topic):
        decode(topic, payload)


@pytest.mark.parametrize("version", [f"{SCHEMA_MAJOR + 1}.0", "0.9", "99.1"])
def test_an_unknown_major_version_is_refused_with_ours_named(version: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(Topic.VERDICTS, encode(VERDICT), version=version)
    assert version in refused.value.message
    assert f"{SCHEMA_MAJOR}.x" in refused.value.message


@pytest.mark.parametrize("version", ["", "one", "1", "1.", ".1", "-1.0", "1.x"])
def test_a_malformed_version_is_refused(version: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(Topic.VERDICTS, encode(VERDICT), version=version)
    assert SCHEMA_VERSION in refused.value.message


def test_an_unknown_kind_is_refused_with_the_known_ones_named() -> None:
    payload = json.dumps({**json.loads(encode(BLOCK)), "kind": "blok"}).encode()
    with pytest.raises(ProtocolError) as refused:
        decode(Topic.DRAFTS, payload)
    for word in ("blok", "prompt", "block", "cancel"):
        assert word in refused.value.message


def test_a_message_of_another_topic_is_refused() -> None:
    for topic in Topic:
        if topic is not Topic.VERDICTS:
            with pytest.raises(ProtocolError):
                decode(topic, encode(VERDICT))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": [1, -2]}, "tokens.1"),
        ({"tokens": [2**31]}, "tokens.0"),
        ({"tokens": "1,2"}, "tokens"),
        ({"base": -1}, "base"),
        ({"round": None}, "round"),
        ({"session": "no spaces please"}, "session"),
        ({"session": ""}, "session"),
        ({"reply": {"gateway": "g"}}, "reply.partition"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], field: str) -> None:
    payload = json.dumps({**json.loads(encode(BLOCK)), **change}).encode()
    with pytest.raises(ProtocolError) as refused:
        decode(Topic.DRAFTS, payload)
    assert field in refused.value.message


def test_a_missing_field_is_named() -> None:
    fields = json.loads(encode(BLOCK))
    del fields["tokens"]
    with pytest.raises(ProtocolError, match="tokens"):
        decode(Topic.DRAFTS, json.dumps(fields).encode())


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        BLOCK.base = 0  # type: ignore[misc]


def median_us(work: Callable[[], object], repeats: int = 2000) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - started)
    return statistics.median(times) / 1000


@pytest.mark.parametrize("message", [BLOCK, VERDICT], ids=["block", "verdict"])
def test_encoding_and_decoding_stays_under_the_budget(message: AnyMessage) -> None:
    # The best of a few medians: what the code costs, not what else the machine did meanwhile.
    median = min(median_us(lambda: decode(message.topic, encode(message)), repeats=500) for _ in range(5))
    assert median < WIRE_BUDGET_US
