"""The verifier service on real Kafka and Redis; a script says what the model would."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from pydantic import SecretStr
from redis.asyncio import Redis

from services.verifier.settings import VerifierSettings
from shared.errors import EngineError
from shared.protocol import (
    SCHEMA_VERSION,
    Closed,
    Evicted,
    Fault,
    FinishReason,
    Floor,
    Hint,
    Placed,
    Policy,
    ReplyRoute,
    Stale,
    Tokens,
    Topic,
    Verdict,
)
from shared.session import SessionStatus
from shared.speculation.verifier import MOST_AHEAD
from shared.stack.kafka import Broker
from shared.stack.ports import free_port
from shared.stack.redis import RedisServer
from tests.integration.scripted_engine import LAYERS, truth
from tests.integration.verifier_peer import (
    PROMPT,
    ROUTE,
    Peer,
    Running,
    a_peer,
    a_process,
    a_verifier,
    until,
)

pytestmark = pytest.mark.kafka

SAID = truth(PROMPT, 200)
QUIET_S = 0.3


def settings_for(broker: Broker, redis_url: str, prefix: str, **changes: object) -> VerifierSettings:
    values: dict[str, object] = {
        "kafka": broker.bootstrap,
        "kafka_flavor": broker.flavor,
        "redis_url": SecretStr(redis_url),
        "topic_prefix": prefix,
        "redis_prefix": f"{prefix}:",
        "drafts_partitions": 2,
        "reply_partitions": 2,
        "sessions_partitions": 1,
        "verifier_name": "v0",
        "model_name": "scripted",
        "max_sessions": 4,
        "member_timeout_s": 1.0,
        "heartbeat_s": 0.1,
        "room_after_s": 0.05,
    }
    return VerifierSettings.model_validate({**values, **changes})


@pytest.fixture
def settings(kafka_broker: Broker, redis_url: str, topic_prefix: str) -> VerifierSettings:
    return settings_for(kafka_broker, redis_url, topic_prefix)


@pytest.fixture
async def peer(settings: VerifierSettings) -> AsyncIterator[Peer]:
    async with a_peer(settings) as peer:
        yield peer


@pytest.fixture
async def verifier(peer: Peer) -> AsyncIterator[Running]:
    async with a_verifier(peer.settings) as verifier:
        yield verifier


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as redis:
        yield redis


@asynccontextmanager
async def writes_paused(redis: Redis) -> AsyncIterator[None]:
    """Redis answers who reads, and lets who writes wait."""
    await redis.execute_command("CLIENT", "PAUSE", 10_000, "WRITE")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        await redis.execute_command("CLIENT", "UNPAUSE")  # type: ignore[no-untyped-call]


# --- rounds -------------------------------------------------------------------------------------------------------


async def test_a_prompt_is_claimed_prefilled_committed_and_answered(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    verdict = await peer.hears(Verdict, "s")
    assert (verdict.round, verdict.base, verdict.accepted, verdict.tokens) == (0, 0, 0, SAID[:1])
    state = await peer.state("s")
    assert (state.epoch, state.base, state.owner) == (1, 1, verifier.service.incarnation)
    assert verifier.engine.prefills == [("s", 0)]


async def test_rounds_answer_what_the_target_says_whatever_is_drafted(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    base = 1
    for number, draft in enumerate([SAID[1:5], (1, 2, 3), (), (*SAID[8:9], 9)], start=1):
        await peer.block("s", number, base, *draft)
        verdict = await peer.hears(Verdict, "s", number + 1)
        assert (verdict.round, verdict.base) == (number, base)
        assert verdict.tokens == SAID[base : base + verdict.accepted + 1]
        assert verdict.tokens[: verdict.accepted] == draft[: verdict.accepted]
        assert verdict.verify_ms > 0
        base += len(verdict.tokens)
    assert [verdict.accepted for verdict in peer.of(Verdict, "s")] == [0, 4, 0, 0, 1]
    state = await peer.state("s")
    assert await peer.store.tokens("s") == SAID[:base]
    assert (state.stats.rounds, state.stats.drafted, state.stats.accepted) == (5, 9, 5)
    assert verifier.engine.prefills == [("s", 0)]


async def test_hints_of_every_exit_come_while_the_pass_runs(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    verifier.engine.go.clear()
    await peer.block("s", 1, 1, *SAID[1:3])
    hint = await peer.hears(Hint, "s", len(LAYERS))
    assert [each.layer for each in peer.of(Hint, "s")] == list(LAYERS)
    assert (hint.round, hint.base) == (1, 1)
    assert (hint.outcomes[0].accepted, hint.outcomes[0].next_token) == (2, SAID[3])
    assert len(peer.of(Verdict, "s")) == 1
    verifier.engine.go.set()
    verdict = await peer.hears(Verdict, "s", 2)
    assert (verdict.accepted, verdict.tokens[-1]) == (2, SAID[3])


async def test_no_verdict_before_its_commit(peer: Peer, verifier: Running, redis: Redis) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    async with writes_paused(redis):
        await peer.block("s", 1, 1, SAID[1])
        await peer.hears(Hint, "s", len(LAYERS))
        await until(lambda: verifier.engine.in_mid_pass == 0, "the pass has ended")
        await asyncio.sleep(QUIET_S)
        assert len(peer.of(Verdict, "s")) == 1
        assert (await peer.state("s")).base == 1
    await peer.hears(Verdict, "s", 2)
    assert (await peer.state("s")).base == 3


async def test_the_round_in_flight_is_noted_in_redis_until_its_commit(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    verifier.engine.go.clear()
    await peer.block("s", 1, 1, *SAID[1:3])

    async def noted() -> bool:
        speculation = await peer.store.speculation("s")
        return speculation is not None and (speculation.round, speculation.block) == (1, SAID[1:3])

    await until(noted, "the round is noted")
    verifier.engine.go.set()
    await peer.hears(Verdict, "s", 2)
    assert await peer.store.speculation("s") is None


async def test_a_stop_token_inside_a_block_ends_the_session_and_frees_it(
    peer: Peer, verifier: Running
) -> None:
    await peer.open("s", stop=(SAID[3],))
    await peer.hears(Verdict, "s")
    await peer.block("s", 1, 1, *SAID[1:6])
    verdict = await peer.hears(Verdict, "s", 2)
    assert (verdict.tokens, verdict.finish_reason) == (SAID[1:4], FinishReason.STOP)
    assert (await peer.state("s")).status is SessionStatus.FINISHED
    await until(lambda: not verifier.engine.open_sessions, "the KV is free")
    await until(lambda: _unowned(peer, "s"), "the session is nobody's")


async def test_max_tokens_is_met_exactly(peer: Peer, verifier: Running) -> None:
    await peer.open("s", max_tokens=4)
    await peer.hears(Verdict, "s")
    await peer.block("s", 1, 1, *SAID[1:8])
    verdict = await peer.hears(Verdict, "s", 2)
    assert (verdict.tokens, verdict.finish_reason) == (SAID[1:4], FinishReason.LENGTH)
    await peer.block("s", 2, 4, 1)
    stale = await peer.hears(Stale, "s")
    assert (stale.base, stale.finish_reason) == (4, FinishReason.LENGTH)


async def test_sessions_are_verified_side_by_side(peer: Peer, verifier: Running) -> None:
    names = [f"s{number}" for number in range(4)]
    for number, name in enumerate(names):
        await peer.open(name, prompt=(number + 1,), partition=number % 2)
    for name in names:
        await peer.hears(Verdict, name)
    verifier.engine.go.clear()
    for number, name in enumerate(names):
        await peer.block(name, 1, 1, 1, partition=number % 2)
    await until(lambda: verifier.engine.in_mid_pass == len(names), "all passes run at a time")
    verifier.engine.go.set()
    for number, name in enumerate(names):
        verdict = await peer.hears(Verdict, name, 2)
        assert verdict.tokens == truth((number + 1,), 2)[1:]


# --- forwards and the floor ---------------------------------------------------------------------------------------


async def test_under_latency_the_target_goes_on_by_itself_as_long_as_a_gateway_is_heard_of(
    peer: Peer, verifier: Running
) -> None:
    await peer.open("s", policy=Policy.LATENCY)
    await peer.hears(Verdict, "s")

    def told() -> Tokens:
        return tuple(token for floor in peer.of(Floor, "s") for token in floor.tokens)

    await peer.hears(Floor, "s", MOST_AHEAD - 1)
    await until(lambda: verifier.service._shells["s"].idle, "nobody asks for more")
    assert told() == SAID[1:MOST_AHEAD]
    assert [floor.base for floor in peer.of(Floor, "s")] == list(range(1, MOST_AHEAD))
    assert await peer.store.tokens("s") == SAID[:MOST_AHEAD]
    await peer.block("s", 1, MOST_AHEAD)
    assert (await peer.hears(Verdict, "s", 2)).tokens == SAID[MOST_AHEAD : MOST_AHEAD + 1]
    floor = await peer.hears(Floor, "s", MOST_AHEAD)
    assert (floor.base, floor.tokens) == (MOST_AHEAD + 1, SAID[MOST_AHEAD + 1 : MOST_AHEAD + 2])
    assert floor.verify_ms > 0 and floor.rows == 1


async def test_a_forward_is_verified_in_the_very_next_pass_and_the_verdict_says_so(
    peer: Peer, verifier: Running
) -> None:
    verifier.engine.go.clear()
    await peer.open("s", policy=Policy.LATENCY)
    await peer.block("s", 1, 1, *SAID[1:3])
    await peer.forward("s", 2, 1, 1, 9, 9, base=1)
    await peer.forward("s", 3, 1, 2, SAID[3], *SAID[4:6], base=1)
    await until(
        lambda: "s" in verifier.service.sessions and verifier.service._shells["s"].unanswered == 4,
        "all has been read",
    )
    verifier.engine.go.set()
    first, second = await peer.hears(Verdict, "s", 2), await peer.hears(Verdict, "s", 3)
    assert (first.round, first.tokens, first.taken) == (1, SAID[1:4], 3)
    assert (second.round, second.base, second.accepted, second.tokens) == (3, 4, 2, SAID[4:7])
    assert verifier.engine.submitted[:2] == [("s", 1, SAID[1:3]), ("s", 4, SAID[4:6])]


async def test_a_block_that_the_floor_has_overtaken_is_trimmed(peer: Peer, verifier: Running) -> None:
    await peer.open("s", policy=Policy.LATENCY)
    await peer.hears(Floor, "s", MOST_AHEAD - 1)
    await until(lambda: verifier.service._shells["s"].idle, "nobody asks for more")
    late = MOST_AHEAD - 5
    await peer.block("s", 1, late, *SAID[late : late + 8])
    verdict = await peer.hears(Verdict, "s", 2)
    assert (verdict.base, verdict.accepted, verdict.tokens) == (late, 8, SAID[late : late + 9])
    assert ("s", MOST_AHEAD, SAID[MOST_AHEAD : late + 8]) in verifier.engine.submitted


# --- messages that change nothing ---------------------------------------------------------------------------------


async def test_a_block_sent_twice_gets_the_same_verdict_and_is_verified_once(
    peer: Peer, verifier: Running
) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await peer.block("s", 1, 1, *SAID[1:3])
    first = await peer.hears(Verdict, "s", 2)
    await peer.block("s", 1, 1, *SAID[1:3])
    again = await peer.hears(Verdict, "s", 3)
    assert _essence(again) == _essence(first)
    assert len(verifier.engine.submitted) == 1


async def test_a_block_sent_twice_before_its_verdict_is_answered_once(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    verifier.engine.go.clear()
    await peer.block("s", 1, 1, SAID[1])
    await peer.hears(Hint, "s")
    await peer.block("s", 1, 1, SAID[1])
    await peer.block("other", 1, 1, 1)
    await peer.hears(Fault, "other")  # so the second one has been read
    verifier.engine.go.set()
    await peer.hears(Verdict, "s", 2)
    await peer.block("s", 2, 3, SAID[3])
    verdict = await peer.hears(Verdict, "s", 3)
    assert verdict.round == 2
    assert len(verifier.engine.submitted) == 2


async def test_a_block_on_tokens_that_nobody_committed_is_a_fault(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await peer.block("s", 1, 7, 1, 2)
    fault = await peer.hears(Fault, "s")
    assert (fault.code, fault.round, fault.retry_after_s) == ("protocol_error", 1, None)
    assert fault.message == "the block builds on 7 committed tokens, the session has 1"
    await peer.block("s", 2, 1, SAID[1])
    assert (await peer.hears(Verdict, "s", 2)).tokens == SAID[1:3]


async def test_a_block_that_is_too_long_is_a_fault_that_names_the_limit(
    peer: Peer, verifier: Running
) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await peer.block("s", 1, 1, *range(73))
    fault = await peer.hears(Fault, "s")
    assert fault.code == "invalid_request"
    assert "73 tokens is longer than 72" in fault.message
    assert verifier.engine.submitted == []


async def test_an_older_base_is_answered_with_what_was_committed_since(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await peer.block("s", 1, 1, *SAID[1:3])
    await peer.hears(Verdict, "s", 2)
    await peer.block("s", 2, 1, 1, 2)
    stale = await peer.hears(Stale, "s")
    assert (stale.epoch, stale.round, stale.base, stale.since) == (1, 2, 4, 1)
    assert (stale.tokens, stale.gateway) == (SAID[1:4], ROUTE.gateway)


async def test_an_older_epoch_is_answered_with_the_current_one(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    other = ReplyRoute(gateway="gateway-9", partition=0)
    await peer.store.place("s", verifier="v0", partition=0, reply=other)
    await peer.block("s", 1, 1, SAID[1], epoch=2)
    assert (await peer.hears(Verdict, "s", 2)).epoch == 2
    await peer.block("s", 2, 3, SAID[3], epoch=1)
    stale = await peer.hears(Stale, "s")
    assert (stale.epoch, stale.base, stale.tokens, stale.gateway) == (2, 3, (), "gateway-9")
    assert verifier.engine.prefills == [("s", 0)]  # the resume has found its KV alive


async def test_an_older_epoch_at_a_verifier_that_does_not_hold_the_session_is_stale_too(
    peer: Peer, verifier: Running
) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await peer.announce(Evicted(session="s", epoch=1, reason="test"))
    await until(lambda: not verifier.engine.open_sessions, "the KV is free")
    await peer.store.place("s", verifier="v0", partition=0)
    await peer.block("s", 1, 1, SAID[1], epoch=1)
    stale = await peer.hears(Stale, "s")
    assert (stale.epoch, stale.base) == (2, 1)


async def test_an_unknown_session_is_a_fault(peer: Peer, verifier: Running) -> None:
    await peer.block("nobody", 3, 1, 1)
    fault = await peer.hears(Fault, "nobody")
    assert (fault.code, fault.round) == ("session_not_found", 3)
    assert "nobody" in fault.message
    await peer.open("s")
    await peer.hears(Verdict, "s")


async def test_a_block_for_a_closed_session_is_told_that_it_has_ended(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await peer.store.close("s", status=SessionStatus.CLOSED, reason="operator")
    await peer.announce(Closed(session="s", epoch=1, reason="operator"))
    await until(lambda: not verifier.engine.open_sessions, "the KV is free")
    await peer.block("s", 1, 1, SAID[1])
    stale = await peer.hears(Stale, "s")
    assert (stale.base, stale.finish_reason) == (1, FinishReason.CANCELLED)
    assert verifier.engine.prefills == [("s", 0)]


async def test_a_session_that_sends_more_than_may_wait_is_told_and_others_are_served(
    peer: Peer,
) -> None:
    async with a_verifier(peer.settings, session_queue=3) as verifier:
        await peer.open("s")
        await peer.hears(Verdict, "s")
        verifier.engine.go.clear()
        for number in range(1, 6):
            await peer.block("s", number, 1, SAID[1])
        fault = await peer.hears(Fault, "s", 2)
        assert (fault.code, fault.round) == ("overloaded", 5)
        assert fault.retry_after_s == 1.0
        verifier.engine.go.set()
        assert (await peer.hears(Verdict, "s", 2)).round == 1
        await peer.open("t", partition=1)
        await peer.hears(Verdict, "t")


# --- letting go ---------------------------------------------------------------------------------------------------


async def test_cancel_in_mid_pass_frees_the_kv_and_the_ownership(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    verifier.engine.go.clear()
    await peer.block("s", 1, 1, *SAID[1:3])
    await peer.hears(Hint, "s")
    assert verifier.engine.in_mid_pass == 1
    await peer.cancel("s")
    await until(lambda: not verifier.engine.open_sessions, "the KV is free")
    await until(lambda: _unowned(peer, "s"), "the session is nobody's")
    verifier.engine.go.set()
    assert (await peer.state("s")).base == 1
    await peer.block("s", 2, 1, *SAID[1:3])
    verdict = await peer.hears(Verdict, "s", 2)
    assert (verdict.round, verdict.epoch) == (2, 1)
    assert verdict.tokens == SAID[1:4]  # the first of them said by the prefill that restored it
    assert verifier.engine.prefills == [("s", 0), ("s", 1)]


async def test_cancel_while_claiming_leaves_no_owner(peer: Peer, verifier: Running, redis: Redis) -> None:
    await peer.create("s")
    async with writes_paused(redis):
        await peer.prompt("s")
        await until(lambda: "s" in verifier.service.sessions, "the claim is under way")
        await peer.cancel("s")
        await until(lambda: "s" not in verifier.service.sessions, "the cancel has been read")

    async def claimed() -> bool:
        return await redis.hexists(f"{peer.settings.redis_prefix}{{s}}:state", "claimed_epoch")

    await until(claimed, "the claim has been made")
    await until(lambda: _unowned(peer, "s"), "the session is nobody's")
    assert verifier.engine.prefills == []


async def test_an_idle_session_loses_its_kv_and_the_next_block_restores_it(peer: Peer) -> None:
    async with a_verifier(peer.settings, idle_ttl_s=0.2) as verifier:
        await peer.open("s")
        await peer.hears(Verdict, "s")
        await peer.block("s", 1, 1, *SAID[1:3])
        await peer.hears(Verdict, "s", 2)
        await until(lambda: not verifier.engine.open_sessions, "the KV is free")
        await until(lambda: _unowned(peer, "s"), "the session is nobody's")
        await peer.block("s", 2, 4, *SAID[4:6])
        verdict = await peer.hears(Verdict, "s", 3)
        assert (verdict.epoch, verdict.tokens) == (1, SAID[4:7])
        assert verifier.engine.prefills == [("s", 0), ("s", 4)]


async def test_evicted_frees_the_kv_after_the_open_round(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    verifier.engine.go.clear()
    await peer.block("s", 1, 1, SAID[1])
    await peer.hears(Hint, "s")
    await peer.announce(Evicted(session="s", epoch=1, reason="operator"))
    await peer.announce(Evicted(session="s", epoch=0, reason="from before"))
    verifier.engine.go.set()
    assert (await peer.hears(Verdict, "s", 2)).tokens == SAID[1:3]
    await until(lambda: not verifier.engine.open_sessions, "the KV is free")
    await until(lambda: _unowned(peer, "s"), "the session is nobody's")


async def test_closed_stops_in_mid_pass(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    verifier.engine.go.clear()
    await peer.block("s", 1, 1, SAID[1])
    await peer.hears(Hint, "s")
    await peer.announce(Closed(session="s", epoch=1, reason="expired"))
    await until(lambda: not verifier.engine.open_sessions, "the KV is free")
    assert len(peer.of(Verdict, "s")) == 1


async def test_an_announcement_of_an_older_epoch_changes_nothing(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await peer.store.place("s", verifier="v0", partition=0)
    await peer.block("s", 1, 1, SAID[1], epoch=2)
    await peer.hears(Verdict, "s", 2)
    await peer.announce(Closed(session="s", epoch=1, reason="late"))
    await peer.open("marker")
    await peer.hears(Verdict, "marker")
    await peer.announce(Evicted(session="marker", epoch=1, reason="read after the late one"))
    await until(lambda: "marker" not in verifier.engine.open_sessions, "placements have been read")
    assert "s" in verifier.engine.open_sessions


async def test_a_session_placed_on_a_partition_of_another_is_let_go(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.open("t", partition=1)
    await peer.hears(Verdict, "s")
    await peer.hears(Verdict, "t")
    values = {"epoch": 2, "verifier": "v1", "reply": ROUTE, "reason": "moved"}
    await peer.announce(Placed(session="t", partition=0, **values))  # also one of ours
    await peer.announce(Placed(session="s", partition=7, **values))
    await until(lambda: verifier.engine.open_sessions == {"t"}, "the KV of the moved one is free")
    await until(lambda: _unowned(peer, "s"), "the session is nobody's")


# --- admission ----------------------------------------------------------------------------------------------------


async def test_when_all_places_are_taken_the_session_idle_longest_gives_its_own_up(peer: Peer) -> None:
    async with a_verifier(peer.settings, max_sessions=2) as verifier:
        for name in ("a", "b"):
            await peer.open(name)
            await peer.hears(Verdict, name)
        await peer.block("a", 1, 1, SAID[1])  # now b is the one that has been idle longest
        await peer.hears(Verdict, "a", 2)
        await asyncio.sleep(peer.settings.room_after_s)
        await peer.open("c")
        await peer.hears(Verdict, "c")
        assert verifier.engine.open_sessions == {"a", "c"}
        assert await peer.owner("b") == ""
        await asyncio.sleep(peer.settings.room_after_s)
        await peer.block("b", 1, 1, *SAID[1:3])
        assert (await peer.hears(Verdict, "b", 2)).tokens == SAID[1:4]
        assert verifier.engine.most_open == 2


async def test_when_all_places_are_busy_a_session_is_refused_with_when_to_try_again(peer: Peer) -> None:
    async with a_verifier(peer.settings, max_sessions=2, room_after_s=60.0) as verifier:
        for name in ("a", "b"):
            await peer.open(name)
            await peer.hears(Verdict, name)
        await peer.open("c")
        fault = await peer.hears(Fault, "c")
        assert (fault.code, fault.round) == ("overloaded", 0)
        assert fault.retry_after_s
        assert await peer.owner("c") == ""
        assert verifier.engine.open_sessions == {"a", "b"}
        await peer.cancel("a")
        await until(lambda: verifier.engine.open_sessions == {"b"}, "a place is free")
        await peer.prompt("c")
        await peer.hears(Verdict, "c")


async def test_any_number_of_sessions_at_once_take_turns_in_the_places_there_are(peer: Peer) -> None:
    async with a_verifier(peer.settings, max_sessions=3, room_after_s=0.001) as verifier:
        names = [f"s{number}" for number in range(12)]
        for name in names:
            await peer.open(name)
        for name in names:
            for prompts in itertools.count(1):
                await until(
                    lambda name=name, prompts=prompts: (  # type: ignore[misc]
                        bool(peer.of(Verdict, name)) or len(peer.of(Fault, name)) >= prompts
                    ),
                    f"an answer to {name}",
                )
                if peer.of(Verdict, name):
                    break
                assert peer.of(Fault, name)[-1].message.startswith("every place")
                await peer.prompt(name)
        assert verifier.engine.most_open == 3


# --- takeovers ----------------------------------------------------------------------------------------------------


async def test_a_takeover_fences_the_old_verifier_off(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    verifier.engine.go.clear()
    await peer.block("s", 1, 1, SAID[1])
    await peer.hears(Hint, "s")
    claim = await peer.store.claim("s", epoch=1, owner="another")
    assert (claim.took_over, claim.state.epoch, claim.tokens) == (True, 2, SAID[:1])
    await peer.store.commit("s", epoch=2, round=1, base=1, tokens=SAID[1:4])
    verifier.engine.go.set()
    stale = await peer.hears(Stale, "s")
    assert (stale.epoch, stale.round, stale.base, stale.since) == (2, 1, 4, 1)
    assert stale.tokens == SAID[1:4]
    assert await peer.owner("s") == "another"
    assert await peer.store.tokens("s") == SAID[:4]
    await until(lambda: not verifier.engine.open_sessions, "the old one's KV is free")
    assert len(peer.of(Verdict, "s")) == 1


async def test_partitions_move_to_a_second_verifier_and_back_with_their_sessions(
    peer: Peer, verifier: Running
) -> None:
    for number in range(2):
        await peer.open(f"s{number}", partition=number)
        await peer.hears(Verdict, f"s{number}")
    async with a_verifier(peer.settings, verifier_name="v1") as second:
        beat = await peer.beats(
            lambda beat: beat.verifier == "v1" and len(beat.partitions) == 1, "v1 has a partition"
        )
        moved = beat.partitions[0]
        await peer.beats(
            lambda beat: beat.verifier == "v0" and beat.partitions == (1 - moved,), "v0 has the other"
        )
        for number in range(2):
            await peer.block(f"s{number}", 1, 1, *SAID[1:3], partition=number)
            verdict = await peer.hears(Verdict, f"s{number}", 2)
            assert verdict.epoch == 1  # given back, so nobody was fenced off
            assert verdict.tokens == SAID[1:4]
        assert second.engine.prefills == [(f"s{moved}", 1)]
        assert verifier.engine.open_sessions == {f"s{1 - moved}"}
        await second.ends()
        assert not second.engine.open_sessions
    await peer.block(f"s{moved}", 2, 4, *SAID[4:6], partition=moved)
    verdict = await peer.hears(Verdict, f"s{moved}", 3)
    assert (verdict.epoch, verdict.tokens) == (1, SAID[4:7])


def environment_of(settings: VerifierSettings, port: int, **more: object) -> dict[str, str]:
    values = {
        "kafka": settings.kafka,
        "kafka_flavor": settings.kafka_flavor.value,
        "redis_url": settings.redis_url.get_secret_value(),
        "topic_prefix": settings.topic_prefix,
        "redis_prefix": settings.redis_prefix,
        "verifier_name": "v0",
        "verifier_port": port,
        "member_timeout_s": 1.0,
        "heartbeat_s": 0.1,
        "model_name": "timer",
        **more,
    }
    return {f"OUTRIDER_{name.upper()}": str(value) for name, value in values.items()}


TIMER = "loadtest.timer_verifier"
NEVER_MS = 10_000_000


@pytest.mark.stack
async def test_a_message_whose_answer_a_kill_prevented_is_read_again_by_the_successor(
    peer: Peer, tmp_path: Path, unused_tcp_port: int
) -> None:
    slow = environment_of(peer.settings, unused_tcp_port, timer_ms=NEVER_MS)
    async with a_process(TIMER, slow, tmp_path / "first.log") as first:
        await peer.open("s")

        async def claimed() -> bool:
            return await peer.owner("s") != ""

        await until(claimed, "the first verifier holds the session")
        first.kill()
        await first.wait()
    assert not peer.of(Verdict, "s")
    quick = environment_of(peer.settings, unused_tcp_port, timer_ms=5)
    async with a_process(TIMER, quick, tmp_path / "second.log"):
        verdict = await peer.hears(Verdict, "s")
        assert (verdict.round, verdict.base, verdict.epoch) == (0, 0, 2)


@pytest.mark.stack
async def test_a_block_answered_before_a_kill_gets_the_same_verdict_from_the_successor(
    peer: Peer, tmp_path: Path, unused_tcp_port: int
) -> None:
    environment = environment_of(peer.settings, unused_tcp_port, timer_ms=5)
    async with a_process(TIMER, environment, tmp_path / "first.log") as first:
        await peer.open("s")
        await peer.hears(Verdict, "s")
        await peer.block("s", 1, 1, 7, 8, 9)
        before = await peer.hears(Verdict, "s", 2)
        first.kill()
        await first.wait()
    async with a_process(TIMER, environment, tmp_path / "second.log"):
        await peer.block("s", 1, 1, 7, 8, 9)
        after = await peer.hears(Verdict, "s", 3)
        assert _essence(after)[1:] == _essence(before)[1:]
        assert (before.epoch, after.epoch) == (1, 2)
        assert await peer.store.tokens("s") == (1, 7, 8, 9, 1)
        await peer.block("s", 2, 5, 1, 3, epoch=2)
        assert (await peer.hears(Verdict, "s", 4)).tokens == (1, 3, 1)


@pytest.mark.stack
async def test_a_verifier_that_was_frozen_in_mid_pass_finds_its_commit_refused(
    peer: Peer, tmp_path: Path
) -> None:
    ports = [free_port() for _ in range(2)]
    slow = environment_of(peer.settings, ports[0], timer_ms=1500)
    async with a_process(TIMER, slow, tmp_path / "first.log") as first:
        await peer.open("s")
        await peer.hears(Verdict, "s")
        await peer.block("s", 1, 1, 1, 7)
        await peer.hears(Hint, "s")
        os.kill(first.pid, signal.SIGSTOP)
        quick = environment_of(peer.settings, ports[1], verifier_name="v1", timer_ms=5)
        async with a_process(TIMER, quick, tmp_path / "second.log"):
            taken = await peer.hears(Verdict, "s", 2)
            assert (taken.epoch, taken.round, taken.tokens) == (2, 1, (1, 7, 1))
            os.kill(first.pid, signal.SIGCONT)
            stale = await peer.hears(Stale, "s")
            assert (stale.epoch, stale.base, stale.since, stale.tokens) == (2, 4, 1, (1, 7, 1))
            assert await peer.store.tokens("s") == (1, 1, 7, 1)
            assert (await peer.owner("s")).startswith("v1/")


# --- faults around it ---------------------------------------------------------------------------------------------


async def test_what_cannot_be_read_goes_to_the_dead_letters_and_the_service_goes_on(
    peer: Peer, verifier: Running
) -> None:
    topic = peer.settings.topic_prefix + Topic.DRAFTS
    bad = [
        (b"{", SCHEMA_VERSION, "not a message of outrider.drafts"),
        (b'{"kind":"nonsense"}', SCHEMA_VERSION, "nonsense"),
        (b'{"kind":"cancel","session":"s","epoch":1,"reason":"x"}', "2.0", "schema version 2.0"),
    ]
    async with AIOKafkaProducer(bootstrap_servers=peer.settings.kafka) as producer:
        for payload, version, _ in bad:
            headers = [("outrider-schema", version.encode())]
            await producer.send_and_wait(topic, payload, partition=0, headers=headers)
    letters = await peer.dead_letters(len(bad))
    for letter, (payload, _, reason) in zip(letters, bad, strict=True):
        assert (letter.source, letter.partition, letter.reader) == (Topic.DRAFTS, 0, "v0")
        assert reason in letter.reason
        assert base64.b64decode(letter.payload) == payload
    await peer.open("s")
    await peer.hears(Verdict, "s")
    assert await verifier.ready()


async def test_without_redis_a_round_is_a_fault_in_time_and_goes_on_when_it_is_back(
    kafka_broker: Broker, own_redis: RedisServer, topic_prefix: str
) -> None:
    settings = settings_for(kafka_broker, own_redis.url, topic_prefix, store_deadline_s=1.0)
    async with a_peer(settings) as peer, a_verifier(settings) as verifier:
        await peer.open("s")
        await peer.hears(Verdict, "s")
        verifier.engine.go.clear()
        await peer.block("s", 1, 1, SAID[1])
        await peer.hears(Hint, "s")
        await asyncio.to_thread(own_redis.kill)
        verifier.engine.go.set()
        fault = await peer.hears(Fault, "s")
        assert (fault.code, fault.round) == ("store_unavailable", 1)
        assert fault.retry_after_s
        assert own_redis.url.partition("//")[2].partition("/")[0] in fault.message
        await peer.block("s", 2, 1, SAID[1])
        assert (await peer.hears(Fault, "s", 2)).code == "store_unavailable"
        await asyncio.to_thread(own_redis.start)
        await peer.block("s", 3, 1, *SAID[1:3])
        verdict = await peer.hears(Verdict, "s", 2)
        assert (verdict.round, verdict.tokens) == (3, SAID[1:4])
        assert await peer.store.tokens("s") == SAID[:4]


async def test_a_redis_that_returns_in_time_costs_a_round_nothing(
    kafka_broker: Broker, own_redis: RedisServer, topic_prefix: str
) -> None:
    settings = settings_for(kafka_broker, own_redis.url, topic_prefix)
    async with a_peer(settings) as peer, a_verifier(settings) as verifier:
        await peer.open("s")
        await peer.hears(Verdict, "s")
        verifier.engine.go.clear()
        await peer.block("s", 1, 1, SAID[1])
        await peer.hears(Hint, "s")
        await asyncio.to_thread(own_redis.kill)
        verifier.engine.go.set()
        await until(lambda: verifier.engine.in_mid_pass == 0, "the pass has ended")
        await asyncio.to_thread(own_redis.start)
        assert (await peer.hears(Verdict, "s", 2)).tokens == SAID[1:3]
        assert not peer.of(Fault, "s")


async def test_notes_of_rounds_do_not_pile_up_while_redis_is_away(
    kafka_broker: Broker, own_redis: RedisServer, topic_prefix: str
) -> None:
    settings = settings_for(kafka_broker, own_redis.url, topic_prefix, store_deadline_s=0.2)
    async with a_peer(settings) as peer, a_verifier(settings) as verifier:
        await peer.open("s")
        await peer.hears(Verdict, "s")
        tasks = len(asyncio.all_tasks())
        await asyncio.to_thread(own_redis.kill)
        for number in range(1, 15):
            await peer.block("s", number, 1, SAID[1])
            await peer.hears(Fault, "s", number)
        assert len(asyncio.all_tasks()) <= tasks + 6
        await asyncio.to_thread(own_redis.start)
        assert await verifier.ready()


async def test_a_defect_on_one_session_is_a_fault_and_stops_no_other(
    peer: Peer, verifier: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = verifier.service.store.claim

    async def defective(session: str, *, epoch: int, owner: str) -> object:
        if session == "bad":
            raise RuntimeError("a defect")
        return await claim(session, epoch=epoch, owner=owner)

    monkeypatch.setattr(verifier.service.store, "claim", defective)
    await peer.open("bad")
    fault = await peer.hears(Fault, "bad")
    assert fault.code == "internal_error"
    assert "defect" not in fault.message  # what it is stands in the log
    await peer.open("good")
    await peer.hears(Verdict, "good")
    monkeypatch.undo()
    await peer.prompt("bad")
    await peer.hears(Verdict, "bad")


async def test_a_verifier_whose_engine_dies_answers_and_ends_with_the_reason(peer: Peer) -> None:
    async with a_verifier(peer.settings) as verifier:
        await peer.open("s")
        await peer.hears(Verdict, "s")
        verifier.engine.go.clear()
        await peer.block("s", 1, 1, SAID[1])
        await peer.hears(Hint, "s")
        verifier.engine.die()
        with pytest.raises(EngineError, match="the engine has died"):
            await asyncio.wait_for(asyncio.shield(verifier.work), 5)
        fault = await peer.hears(Fault, "s")
        assert (fault.code, fault.round) == ("engine_error", 1)
        assert fault.retry_after_s
        assert await peer.owner("s") == ""
        assert verifier.engine.stopped


# --- life ---------------------------------------------------------------------------------------------------------


async def test_heartbeats_carry_partitions_and_load(peer: Peer, verifier: Running) -> None:
    beat = await peer.beats(lambda beat: beat.ready, "a heartbeat that is ready")
    assert (beat.verifier, beat.model, beat.incarnation) == ("v0", "scripted", verifier.service.incarnation)
    assert (beat.partitions, beat.sessions, beat.max_sessions) == ((0, 1), 0, 4)
    assert (beat.kv_capacity_tokens, beat.max_model_len, beat.stopping) == (1 << 20, 2048, False)
    await peer.open("s")
    await peer.hears(Verdict, "s")
    busy = await peer.beats(lambda beat: beat.sessions == 1, "a heartbeat that counts the session")
    assert (busy.kv_usage, busy.step_ms) == (0.25, 4.0)


async def test_stopping_lets_open_rounds_end_gives_sessions_back_and_says_so(
    peer: Peer, verifier: Running
) -> None:
    for name in ("busy", "idle"):
        await peer.open(name)
        await peer.hears(Verdict, name)
    verifier.engine.go.clear()
    await peer.block("busy", 1, 1, SAID[1])
    await peer.hears(Hint, "busy")
    verifier.stop.set()
    await until(lambda: _unowned(peer, "idle"), "the idle session is nobody's")
    response = await verifier.http.get("/readyz")
    assert response.status_code == 503
    assert "stopping" in response.json()["reasons"]
    assert not verifier.work.done()
    verifier.engine.go.set()
    assert (await peer.hears(Verdict, "busy", 2)).tokens == SAID[1:3]
    await verifier.ends()
    assert await peer.owner("busy") == ""
    assert not verifier.engine.open_sessions
    assert verifier.engine.stopped
    last = await peer.beats(lambda beat: beat.stopping, "a heartbeat that says it stops")
    assert (last.ready, last.sessions) == (False, 0)


async def test_a_pass_that_never_ends_does_not_keep_it_from_stopping(peer: Peer, verifier: Running) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    verifier.engine.go.clear()
    await peer.block("s", 1, 1, SAID[1])
    await peer.hears(Hint, "s")
    await verifier.ends()
    assert verifier.engine.stopped


async def test_what_a_stopped_verifier_did_not_answer_its_successor_does(
    peer: Peer, verifier: Running
) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await verifier.ends()
    await peer.block("s", 1, 1, *SAID[1:3])
    async with a_verifier(peer.settings) as successor:
        verdict = await peer.hears(Verdict, "s", 2)
        assert (verdict.epoch, verdict.tokens) == (1, SAID[1:4])
        assert successor.engine.prefills == [("s", 1)]


async def test_a_verifier_that_comes_back_reads_nothing_again_that_was_answered(
    peer: Peer, verifier: Running
) -> None:
    await peer.open("s")
    await peer.hears(Verdict, "s")
    await peer.block("s", 1, 1, SAID[1])
    await peer.hears(Verdict, "s", 2)
    await verifier.ends()
    async with a_verifier(peer.settings):
        await peer.open("t")
        await peer.hears(Verdict, "t")
        assert len(peer.of(Verdict, "s")) == 2


async def test_health_readiness_and_metrics_answer(peer: Peer, verifier: Running) -> None:
    assert (await verifier.http.get("/healthz")).json() == {"status": "ok"}
    ready = await verifier.http.get("/readyz")
    assert ready.json() == {"ready": True, "reasons": [], "notes": ["a script stands in for the model"]}
    await peer.open("s")
    await peer.hears(Verdict, "s")

    async def shown() -> bool:
        return "outrider_verifier_sessions 1.0" in (await verifier.http.get("/metrics")).text

    await until(shown, "the metrics count the session")
    text = (await verifier.http.get("/metrics")).text
    for name in ("answers_total", "committed_tokens_total", "verify_seconds_bucket", "kv_usage_ratio"):
        assert f"outrider_verifier_{name}" in text
    verifier.engine.die()
    assert "the engine has died" in (await verifier.http.get("/readyz")).json()["reasons"]


async def _unowned(peer: Peer, session: str) -> bool:
    return await peer.owner(session) == ""


def _essence(verdict: Verdict) -> tuple[object, ...]:
    """What makes two verdicts the same: all but how long they took."""
    return (
        verdict.epoch,
        verdict.round,
        verdict.base,
        verdict.accepted,
        verdict.tokens,
        verdict.finish_reason,
    )
