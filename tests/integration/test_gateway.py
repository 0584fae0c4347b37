"""The gateway against real Kafka, Redis and kv-session; the verifier's place is taken by `ScriptedVerifier`."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from shared.protocol import Block, Cancel, Fault, FinishReason, Prompt, Verdict
from shared.session import SessionStatus
from shared.stack.kafka import Broker
from shared.stack.redis import RedisServer
from tests.integration.byte_model import MODEL
from tests.integration.scripted_cloud import (
    DEADLINE_S,
    Cloud,
    chat,
    cloud_settings,
    completion,
    eventually,
    process,
    read_events,
    read_some,
    ready,
    recite,
    resume,
    run_gateway,
    said,
    session_of,
    stream,
    text_of,
)

pytestmark = [pytest.mark.kafka]


@pytest.fixture(scope="module")
def shared_topics() -> str:
    """Topics of this module, made once; its tests are told apart by their sessions."""
    return f"gateway-{secrets.token_hex(3)}-"


@pytest.fixture
def settings(
    kafka_broker: Broker, redis_url: str, redis_prefix: str, byte_model: Path, shared_topics: str
) -> dict[str, Any]:
    return cloud_settings(kafka_broker, redis_url, redis_prefix, byte_model, shared_topics)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def cloud(settings: dict[str, Any], stack: AsyncExitStack) -> Cloud:
    cloud = Cloud(settings, stack)
    await cloud.start()
    return cloud


# --- shapes -----------------------------------------------------------------------------------------------------


async def test_openais_client_gets_what_the_target_says_streamed_and_whole(
    cloud: Cloud, stack: AsyncExitStack
) -> None:
    gateway = await cloud.gateway()
    client = await stack.enter_async_context(AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key="none"))
    asked: Any = {"model": MODEL, "max_tokens": 60}
    expected = text_of(recite(tuple(b"Sing!"), 60))

    whole = await client.completions.create(prompt="Sing!", **asked)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 60, 65)

    chunks = [chunk async for chunk in await client.completions.create(prompt="Sing!", stream=True, **asked)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"

    messages: Any = [{"role": "user", "content": "Sing!"}]
    answer = await client.chat.completions.create(messages=messages, **asked)
    streamed = await client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **asked
    )
    deltas = [chunk async for chunk in streamed]
    assert deltas[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in deltas if chunk.choices)
    assert text == answer.choices[0].message.content != ""
    assert (deltas[-1].choices, deltas[-1].usage) != ([], None)
    assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 60

    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "outrider"
    with pytest.raises(NotFoundError) as missing:
        await client.models.retrieve("gpt-9")
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as refused:
        await client.chat.completions.create(messages=messages, reasoning_effort="high", **asked)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "reasoning_effort")


async def test_a_stream_tells_positions_sources_tokens_and_what_speculation_did(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    cloud.verifier.pass_s = 0.04
    body = completion(
        max_tokens=200,
        stream_options={"include_usage": True},
        outrider={"trace": True, "return_token_ids": True, "block_length": 4},
    )
    events = await stream(gateway, "/v1/completions", body)
    *chunks, finish, usage, done = events
    assert done.data == "[DONE]"

    truth = recite(tuple(b"Sing!"), 200)
    assert [token for chunk in chunks for token in chunk.json["choices"][0]["token_ids"]] == list(truth)
    reached = 0
    for chunk in chunks:
        assert len(chunk.json["choices"][0]["token_ids"]) <= 5
        reached += len(chunk.json["choices"][0]["token_ids"])
        assert chunk.id == f"{session_of(events)}:{reached}"
        assert "".join(token["text"] for token in chunk.json["outrider"]["tokens"]) == chunk.text
    assert (finish.id, usage.id) == (f"{session_of(events)}:200:finish", f"{session_of(events)}:200:usage")
    assert said(events) == text_of(truth)
    sources = {token["source"] for chunk in chunks for token in chunk.json["outrider"]["tokens"]}
    assert {"corrected", "preemptive"} <= sources <= {"accepted", "corrected", "preemptive"}

    report = usage.json["usage"]["outrider"]
    assert report["session"] == session_of(events)
    assert report["rounds"] == len(chunks) - 1
    assert report["accepted"] + report["rounds"] + 1 >= 200 > report["rounds"]
    assert report["hits"] > 0
    assert report["hinted_rounds"] >= 0.9 * report["rounds"]
    assert report["hints_before_verdict"] <= report["hints"]
    lead = report["exit_lead_ms"]["7"]
    assert lead["count"] == report["hinted_rounds"] and 0 <= lead["min"] <= lead["p50"]


async def test_hints_and_drafts_can_be_switched_off_for_a_request(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    plain = (await gateway.post("/v1/completions", json=completion(outrider={"draft": "none"}))).json()
    assert (plain["usage"]["outrider"]["drafted"], plain["usage"]["outrider"]["rounds"]) == (0, 59)
    expected = text_of(recite(tuple(b"Sing!"), 60))
    assert plain["choices"][0]["text"] == expected
    body = completion(outrider={"hints": False, "trace": True}, stream_options={"include_usage": True})
    deaf = await stream(gateway, "/v1/completions", body)
    assert said(deaf) == expected
    report = deaf[-2].json["usage"]["outrider"]
    assert (report["lanes"], report["hits"], report["late"]) == (0, 0, 0)
    traced = [token for event in deaf[:-3] for token in event.json["outrider"]["tokens"]]
    assert {token["source"] for token in traced} == {"accepted", "corrected"}


async def test_a_stop_token_ends_the_text_and_is_no_part_of_it(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    truth = recite(tuple(b"Sing!"), 60)
    stop = ord("S")
    expected = text_of(truth[: truth.index(stop)])
    body = completion(stop_token_ids=[stop], outrider={"return_token_ids": True})
    answer = (await gateway.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["token_ids"][-1] == stop
    events = await stream(gateway, "/v1/completions", completion(stop_token_ids=[stop]))
    assert said(events) == expected
    assert said(await resume(gateway, session_of(events), None)) == expected


# --- bad requests -----------------------------------------------------------------------------------------------


BAD_REQUESTS: list[tuple[str, str, Any, int, str, str | None]] = [
    ("POST", "/v1/chat/completions", b"{", 400, "invalid_request", None),
    ("POST", "/v1/chat/completions", b"", 400, "invalid_request", None),
    ("POST", "/v1/completions", b"[1]", 400, "invalid_request", None),
    ("POST", "/v1/chat/completions", chat(messages=[]), 400, "invalid_request", "messages"),
    ("POST", "/v1/chat/completions", chat(model="gpt-9"), 404, "model_not_found", "model"),
    ("POST", "/v1/completions", completion("x" * 5000), 400, "context_length_exceeded", "prompt"),
    (
        "POST",
        "/v1/completions",
        completion(max_tokens=3000),
        400,
        "context_length_exceeded",
        "max_tokens",
    ),
    ("POST", "/v1/completions", completion(""), 400, "invalid_request", "prompt"),
    ("POST", "/v1/completions", completion([70000]), 400, "invalid_request", "prompt"),
    ("POST", "/v1/completions", completion(logit_bias={"258": 1}), 400, "invalid_request", "logit_bias"),
    ("POST", "/v1/completions", completion(stop_token_ids=[258]), 400, "invalid_request", "stop_token_ids"),
    ("POST", "/v1/completions", completion(min_tokens=61), 400, "invalid_request", "min_tokens"),
    ("POST", "/v1/completions", completion(n=2), 400, "invalid_request", "n"),
    ("POST", "/v1/completions", completion(n=2, temperature=0), 400, "invalid_request", "n"),
    ("POST", "/v1/streams/chatcmpl-unknown/replay", None, 404, "session_not_found", None),
    (
        "POST",
        "/v1/completions",
        completion(outrider={"block_length": 99}),
        400,
        "invalid_request",
        "outrider.block_length",
    ),
    ("POST", "/v1/chat/completions", chat("x" * (3 << 20)), 413, "request_too_large", None),
    ("GET", "/v1/chat/completions", None, 405, "method_not_allowed", None),
    ("DELETE", "/v1/models", None, 405, "method_not_allowed", None),
    ("GET", "/v1/nothing", None, 404, "not_found", None),
    ("GET", "/v1/models/gpt-9", None, 404, "model_not_found", "model"),
    ("GET", "/v1/streams/chatcmpl-unknown", None, 404, "session_not_found", None),
    ("GET", "/v1/streams/no such id!", None, 404, "session_not_found", None),
    ("DELETE", "/v1/streams/chatcmpl-unknown", None, 404, "session_not_found", None),
    (
        "GET",
        "/v1/streams/chatcmpl-1?last_event_id=nonsense",
        None,
        400,
        "invalid_request",
        "Last-Event-ID",
    ),
    (
        "GET",
        "/v1/streams/chatcmpl-1?last_event_id=chatcmpl-2:5",
        None,
        400,
        "invalid_request",
        "Last-Event-ID",
    ),
]


async def test_every_bad_request_gets_an_openai_error(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    for method, path, body, status, code, param in BAD_REQUESTS:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        response = await gateway.request(method, path, content=content)
        asked = f"{method} {path} {(content or b'')[:80]!r}: {response.text}"
        assert response.status_code == status, asked
        error = response.json()["error"]
        assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error"), asked
        assert error["message"] and "Traceback" not in error["message"], asked


async def test_a_body_that_grows_too_large_without_saying_so_is_refused(cloud: Cloud) -> None:
    gateway = await cloud.gateway(max_request_bytes=1000)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    response = await gateway.post("/v1/completions", content=endless())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


async def test_the_openapi_document_describes_both_bodies(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    paths = (await gateway.get("/openapi.json")).json()["paths"]
    for path, field in (("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert field in schema["properties"] and "$ref" not in json.dumps(schema)
        assert {"temperature", "seed", "n", "stop", "logprobs", "best_of"} <= set(schema["properties"])


# --- resuming ---------------------------------------------------------------------------------------------------


async def test_a_stream_resumes_after_any_event_on_another_gateway_without_loss_or_repeats(
    cloud: Cloud,
) -> None:
    first, second = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    body = chat(stream_options={"include_usage": True})
    events = await stream(first, "/v1/chat/completions", body)
    session = session_of(events)
    for read in range(len(events)):
        after = events[read - 1].id if read else None
        rest = await resume(second, session, after)
        assert said(rest) == said(events[read:])
        endings = [event.id for event in rest if event.id and event.id.count(":") == 2]
        assert endings == [event.id for event in events[read:] if event.id and event.id.count(":") == 2]
        assert rest[-1].data == "[DONE]"
        roles = [event for event in rest if '"role"' in event.data]
        assert len(roles) == (read == 0)


async def test_a_stream_left_in_its_middle_is_detached_and_goes_on_at_another_gateway(cloud: Cloud) -> None:
    first, second = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    cloud.verifier.pass_s = 0.05
    body = completion(max_tokens=200, stream_options={"include_usage": True})
    events = await read_some(first, body, 5)
    session = session_of(events)

    async def detached() -> bool:
        return (await cloud.state(session)).status is SessionStatus.DETACHED

    await eventually(detached, "the session is detached")
    await eventually(lambda: [c for c in cloud.verifier.cancelled if c.session == session], "the KV is freed")
    rest = await resume(second, session, events[-1].id)
    assert said(events) + said(rest) == text_of(recite(tuple(b"Sing!"), 200))
    assert rest[-1].data == "[DONE]"
    assert rest[-2].json["usage"]["completion_tokens"] == 200
    state = await cloud.state(session)
    assert (state.finish_reason, state.epoch) == (FinishReason.LENGTH, 2)


async def test_a_position_ahead_of_the_session_is_refused(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    events = await stream(gateway, "/v1/completions", completion())
    session = session_of(events)
    response = await gateway.get(f"/v1/streams/{session}", headers={"Last-Event-ID": f"{session}:61"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Last-Event-ID"


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_newer_connection_takes_the_stream_over(cloud: Cloud, elsewhere: bool) -> None:
    first = await cloud.gateway()
    second = await cloud.gateway(gateway_name="gateway-1") if elsewhere else first
    cloud.verifier.pass_s = 0.05
    body = completion(max_tokens=50, stream=True)
    async with first.stream("POST", "/v1/completions", json=body) as response:
        older = read_events(response)
        seen = [await anext(older)]
        taking = asyncio.create_task(resume(second, session_of(seen), seen[0].id))
        async for event in older:
            seen.append(event)
        newer = await taking
    assert seen[-1].json["error"]["code"] == "session_taken"
    assert seen[0].text + said(newer) == text_of(recite(tuple(b"Sing!"), 50))
    assert newer[-1].data == "[DONE]"


async def test_an_idempotency_key_reads_the_same_answer_again(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    headers = {"Idempotency-Key": secrets.token_hex(8)}
    first = (await gateway.post("/v1/completions", json=completion(), headers=headers)).json()
    blocks = len(cloud.verifier.blocks)
    again = (await gateway.post("/v1/completions", json=completion(), headers=headers)).json()
    assert (first["id"], first["choices"], first["created"]) == (
        again["id"],
        again["choices"],
        again["created"],
    )
    assert len(cloud.verifier.blocks) == blocks
    other = await gateway.post("/v1/completions", json=completion(max_tokens=5), headers=headers)
    assert (other.status_code, other.json()["error"]["param"]) == (400, "Idempotency-Key")


# --- leaving and cancelling -------------------------------------------------------------------------------------


async def test_a_client_that_leaves_before_its_whole_answer_ends_the_session(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    cloud.verifier.pass_s = 0.2
    asking = asyncio.create_task(gateway.post("/v1/completions", json=completion(max_tokens=200)))
    block = await eventually(lambda: cloud.verifier.blocks[-1:], "a block has arrived")
    asking.cancel()
    session = block[0].session

    async def closed() -> bool:
        return (await cloud.state(session)).status is SessionStatus.CLOSED

    await eventually(closed, "the session is closed")
    await eventually(lambda: [c for c in cloud.verifier.cancelled if c.session == session], "the KV is freed")
    response = await gateway.get(f"/v1/streams/{session}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "session_not_found")


async def test_a_deleted_stream_ends_everywhere_and_for_good(cloud: Cloud) -> None:
    first, second = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    cloud.verifier.pass_s = 0.1
    async with first.stream(
        "POST", "/v1/completions", json=completion(max_tokens=200, stream=True)
    ) as response:
        events = read_events(response)
        session = session_of([await anext(events)])
        deleted = await second.delete(f"/v1/streams/{session}")
        assert deleted.json() == {"id": session, "object": "stream.deleted", "deleted": True}
        last = [event async for event in events][-1]
    assert last.json["error"]["code"] == "session_not_found"
    assert (await second.get(f"/v1/streams/{session}")).status_code == 404
    cancelled: list[Cancel] = cloud.verifier.cancelled
    await eventually(lambda: [c for c in cancelled if c.session == session], "the KV is freed")


# --- trouble above ----------------------------------------------------------------------------------------------


async def test_lost_verdicts_are_asked_for_again(cloud: Cloud) -> None:
    gateway = await cloud.gateway(round_timeout_s=0.3)
    dropped: set[int] = set()

    def drop(verdict: Verdict) -> bool:
        lost = verdict.round % 3 == 0 and verdict.round not in dropped
        dropped.add(verdict.round)
        return lost

    cloud.verifier.drop_verdict = drop
    answer = (await gateway.post("/v1/completions", json=completion())).json()
    assert answer["choices"][0]["text"] == text_of(recite(tuple(b"Sing!"), 60))
    assert answer["usage"]["outrider"]["resent"] > 0


async def test_a_refused_session_is_refused_to_the_client(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    cloud.verifier.ready = False

    async def refused() -> httpx.Response | None:
        response = await gateway.post("/v1/chat/completions", json=chat(stream=True))
        return response if response.status_code != 200 else None

    response = await eventually(refused, "kv-session has heard that no verifier is ready")
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    assert int(response.headers["retry-after"]) >= 1


def fault(
    code: str, *, after_round: int, retry_after_s: float | None = None
) -> Callable[[Prompt | Block], Fault | None]:
    def decide(message: Prompt | Block) -> Fault | None:
        if message.round < after_round:
            return None
        return Fault(
            session=message.session,
            epoch=message.epoch,
            round=message.round,
            code=code,
            message="as the test wants it",
            retry_after_s=retry_after_s,
        )

    return decide


async def test_a_fault_before_the_first_token_becomes_a_status(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    cloud.verifier.fault = fault("overloaded", after_round=0, retry_after_s=3)
    for body in (chat(), chat(stream=True)):
        response = await gateway.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        assert response.json()["error"]["code"] == "overloaded"


async def test_a_fault_in_the_middle_ends_the_stream_with_an_error_event_and_may_be_resumed(
    cloud: Cloud,
) -> None:
    gateway = await cloud.gateway()
    cloud.verifier.fault = fault("engine_error", after_round=3)
    events = await stream(gateway, "/v1/completions", completion())
    assert events[-1].json["error"] == {
        "message": "as the test wants it",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    cloud.verifier.fault = lambda message: None
    rest = await resume(gateway, session_of(events), events[-2].id)
    assert said(events[:-1]) + said(rest) == text_of(recite(tuple(b"Sing!"), 60))


async def test_a_verifier_that_says_nothing_is_a_503_in_time(cloud: Cloud) -> None:
    gateway = await cloud.gateway(stall_timeout_s=0.6, round_timeout_s=0.2)
    cloud.verifier.hold.clear()
    response = await gateway.post("/v1/completions", json=completion())
    cloud.verifier.hold.set()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert "retry-after" in response.headers


async def test_a_quiet_stream_gets_keepalives(cloud: Cloud) -> None:
    gateway = await cloud.gateway(keepalive_s=0.1)
    cloud.verifier.hold.clear()
    async with gateway.stream(
        "POST", "/v1/completions", json=completion(max_tokens=3, stream=True)
    ) as response:
        lines = response.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        cloud.verifier.hold.set()
        assert "data: [DONE]" in [line async for line in lines]


async def test_without_kv_session_opening_ends_in_time(
    settings: dict[str, Any], stack: AsyncExitStack
) -> None:
    cloud = Cloud(settings, stack)
    await cloud.start(kv_session=False)
    gateway = await cloud.gateway(open_timeout_s=0.5)
    started = time.monotonic()
    response = await gateway.post("/v1/completions", json=completion())
    assert time.monotonic() - started < 5
    assert response.status_code == 503
    assert "kv-session did not answer" in response.json()["error"]["message"]


async def test_more_streams_than_allowed_are_refused_with_retry_after(cloud: Cloud) -> None:
    gateway = await cloud.gateway(gateway_max_streams=1)
    cloud.verifier.hold.clear()
    asking = asyncio.create_task(gateway.post("/v1/completions", json=completion()))
    await eventually(lambda: cloud.verifier.blocks, "the first is in flight")
    refused = await gateway.post("/v1/completions", json=completion())
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    cloud.verifier.hold.set()
    assert (await asking).status_code == 200
    assert (await gateway.post("/v1/completions", json=completion())).status_code == 200


@pytest.mark.parametrize(
    ("setting", "address", "names"),
    [("kafka", "127.0.0.1:1", "Kafka"), ("redis_url", "redis://127.0.0.1:1/0", "Redis")],
)
async def test_without_broker_or_store_the_gateway_says_so_at_once(
    settings: dict[str, Any], stack: AsyncExitStack, setting: str, address: str, names: str
) -> None:
    away = settings | {setting: address, "bus_deadline_s": 0.5, "store_deadline_s": 0.5}
    client = await stack.enter_async_context(run_gateway(away))

    async def told() -> bool:
        response = await client.get("/readyz")
        return response.status_code == 503 and names in response.text

    await eventually(told, f"/readyz names {names}")
    assert (await client.get("/healthz")).status_code == 200
    response = await client.post("/v1/chat/completions", json=chat())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert names in response.json()["error"]["message"]


async def test_a_broker_that_goes_away_is_told_at_the_door_and_costs_a_stream_no_token(
    settings: dict[str, Any], stack: AsyncExitStack, own_kafka: Broker
) -> None:
    cloud = Cloud(settings | {"kafka": own_kafka.bootstrap}, stack)
    await cloud.start()
    gateway = await cloud.gateway(open_timeout_s=1.0, lease_s=1.0)
    cloud.verifier.pass_s = 0.05
    asking = asyncio.create_task(stream(gateway, "/v1/completions", completion(max_tokens=200)))
    await eventually(lambda: len(cloud.verifier.blocks) > 3, "blocks go up")
    await asyncio.to_thread(own_kafka.kill)

    async def told() -> bool:
        response = await gateway.get("/readyz")
        return response.status_code == 503 and "Kafka" in response.text

    await eventually(told, "/readyz names Kafka")
    refused = await gateway.post("/v1/completions", json=completion())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert "Kafka" in refused.json()["error"]["message"]
    await asyncio.to_thread(own_kafka.start)
    events = await asking
    assert said(events) == text_of(recite(tuple(b"Sing!"), 200))
    assert events[-1].data == "[DONE]"
    await eventually(lambda: ready(gateway), "the gateway is ready again")


async def test_a_store_that_goes_away_is_told_at_the_door(
    settings: dict[str, Any], stack: AsyncExitStack, own_redis: RedisServer
) -> None:
    cloud = Cloud(settings | {"redis_url": own_redis.url, "store_deadline_s": 1.0}, stack)
    await cloud.start()
    gateway = await cloud.gateway(lease_s=1.0)
    await asyncio.to_thread(own_redis.kill)

    async def told() -> bool:
        response = await gateway.get("/readyz")
        return response.status_code == 503 and "Redis" in response.text

    await eventually(told, "/readyz names Redis")
    refused = await gateway.post("/v1/completions", json=completion())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert "Redis" in refused.json()["error"]["message"]
    read = await gateway.get("/v1/streams/cmpl-1")
    assert (read.status_code, read.json()["error"]["code"]) == (503, "store_unavailable")
    await asyncio.to_thread(own_redis.start)
    await eventually(lambda: ready(gateway), "the gateway is ready again")


async def test_a_lost_lease_moves_replies_and_keeps_streams_alive(cloud: Cloud) -> None:
    gateway = await cloud.gateway(lease_s=0.3)
    cloud.verifier.pass_s = 0.1
    asking = asyncio.create_task(stream(gateway, "/v1/completions", completion(max_tokens=200)))
    block = (await eventually(lambda: cloud.verifier.blocks[-1:], "a block has arrived"))[0]
    lease = f"reply:{block.reply.partition}"
    while not await cloud.store.acquire(lease, "somebody else", 60):  # its owner may renew it in between
        await cloud.store.free(lease, block.reply.gateway)

    def moved() -> bool:
        return cloud.verifier.blocks[-1].reply.partition != block.reply.partition

    await eventually(moved, "replies go elsewhere")
    assert said(await asking) == text_of(recite(tuple(b"Sing!"), 200))


async def test_metrics_count_rounds_tokens_and_leads(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    await stream(gateway, "/v1/completions", completion())
    text = (await gateway.get("/metrics")).text
    for name in (
        "outrider_gateway_rounds_total",
        'outrider_gateway_tokens_total{source="accepted"}',
        'outrider_gateway_lanes_total{fate="hit"}',
        "outrider_gateway_first_token_seconds_count",
        "outrider_gateway_inter_token_seconds_count",
        'outrider_gateway_exit_lead_seconds_count{layer="7"}',
        'outrider_gateway_generations_total{end="length"}',
    ):
        value = next(line for line in text.splitlines() if line.startswith(name)).split()[-1]
        assert float(value) > 0, name


# --- the process ------------------------------------------------------------------------------------------------


@pytest.mark.stack
async def test_sigterm_detaches_streams_which_go_on_elsewhere(cloud: Cloud, unused_tcp_port: int) -> None:
    other = await cloud.gateway()
    cloud.verifier.pass_s = 0.1
    environment = cloud.environment | {
        "OUTRIDER_GATEWAY_PORT": str(unused_tcp_port),
        "OUTRIDER_GATEWAY_NAME": "gateway-1",
    }
    async with (
        process(environment) as gateway,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{unused_tcp_port}", timeout=DEADLINE_S) as client,
    ):

        async def started() -> bool:
            try:
                return await ready(client)
            except httpx.TransportError:
                return False

        await eventually(started, "the process is ready")
        body = completion(max_tokens=150, stream=True)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            reading = read_events(response)
            events = [await anext(reading)]
            gateway.send_signal(signal.SIGTERM)
            events += [event async for event in reading]
        assert events[-1].json["error"]["code"] == "unavailable"
        assert await asyncio.wait_for(gateway.wait(), DEADLINE_S) == 0
    rest = await resume(other, session_of(events), events[-2].id)
    assert said(events[:-1]) + said(rest) == text_of(recite(tuple(b"Sing!"), 150))


@pytest.mark.stack
@pytest.mark.parametrize("model", ["", "/nonexistent/model"])
async def test_a_missing_model_is_a_clear_error_at_the_start(settings: dict[str, Any], model: str) -> None:
    environment = {"OUTRIDER_KAFKA": settings["kafka"], "OUTRIDER_MODEL": model}
    async with process(environment) as gateway:
        assert gateway.stderr is not None
        said_last = (await asyncio.wait_for(gateway.stderr.read(), 60)).decode()
        assert await gateway.wait() == 1
    assert "model" in said_last and "Traceback" not in said_last
