"""How answers are drawn and where they end, over real Kafka, Redis and kv-session: what a gateway does with parameters.

The verifier's place is taken by `ScriptedVerifier`, which says something else for every seed and choice.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from services.draft_gateway.answer_text import AnswerText, Ending
from shared.cli import main
from shared.protocol import FinishReason, Sampling, SamplingMode, Tokens
from shared.session import SessionStatus
from shared.stack.kafka import Broker
from shared.text import Tokenizer
from tests.integration.byte_model import MODEL
from tests.integration.scripted_cloud import (
    Cloud,
    Event,
    chat,
    cloud_settings,
    completion,
    eventually,
    read_some,
    recite,
    resume,
    said,
    session_of,
    stream,
    text_of,
)
from tests.integration.scripted_verifier import drawn

pytestmark = [pytest.mark.kafka]

PROMPT = tuple(b"Sing!")
STOPS = ["Schnee ☃ u", "😀, im Sch", "saß es"]


async def has_status(cloud: Cloud, session: str, status: SessionStatus) -> bool:
    """Whether the store says so of the session; kv-session closes one by a message of its own."""
    return (await cloud.state(session)).status is status


@pytest.fixture(scope="module")
def shared_topics() -> str:
    """Topics of this module, made once; its tests are told apart by their sessions."""
    return f"answers-{secrets.token_hex(3)}-"


@pytest.fixture
async def cloud(
    kafka_broker: Broker, redis_url: str, redis_prefix: str, byte_model: Path, shared_topics: str
) -> AsyncIterator[Cloud]:
    async with AsyncExitStack() as stack:
        cloud = Cloud(cloud_settings(kafka_broker, redis_url, redis_prefix, byte_model, shared_topics), stack)
        await cloud.start()
        yield cloud


@pytest.fixture
def tokenizer(byte_model: Path) -> Tokenizer:
    return Tokenizer.load(byte_model)


def sampled(seed: int, choice: int = 0, length: int = 60) -> Tokens:
    """What the scripted target says after the prompt at a temperature above 0."""
    return recite(drawn(PROMPT, Sampling(temperature=1.0, seed=seed, choice=choice)), length)


def ended(tokenizer: Tokenizer, tokens: Tokens, ending: Ending) -> tuple[str, int, str | None]:
    """Text, length and stop string of an answer that grows by a token at a time."""
    answer = AnswerText(tokenizer.decoder(), ending)
    text = ""
    for count, token in enumerate(tokens, 1):
        text += answer.push(token)
        if answer.stop is not None:
            return text, count, answer.stop
    return text + answer.flush(), len(tokens), None


def finishes(events: list[Event]) -> list[dict[str, Any]]:
    """The choices that end, of a stream's events."""
    choices = [choice for event in events[:-1] for choice in event.json["choices"]]
    return [choice for choice in choices if choice["finish_reason"]]


def freed(cloud: Cloud) -> set[str]:
    """The sessions that were cancelled at the verifier."""
    return {cancel.session for cancel in cloud.verifier.cancelled}


# --- stop strings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"include_stop_str_in_output": True}, {"min_tokens": 60}])
async def test_a_stop_string_across_blocks_ends_the_answer_at_its_character_and_token(
    cloud: Cloud, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    gateway, other = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    truth = recite(PROMPT, 160)
    included = bool(fields.get("include_stop_str_in_output"))
    for stop in ([STOPS[0]], STOPS[1:]):
        ending = Ending(tuple(stop), included, fields.get("min_tokens", 0))
        text, count, found = ended(tokenizer, truth, ending)
        assert found in stop
        body = completion(max_tokens=160, stop=stop, outrider={"return_token_ids": True}, **fields)
        answer = (await gateway.post("/v1/completions", json=body)).json()
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", found)
        assert tuple(choice["token_ids"]) == truth[:count]
        assert answer["usage"]["completion_tokens"] == count

        events = await stream(gateway, "/v1/completions", body | {"stream_options": {"include_usage": True}})
        session = session_of(events)
        assert said(events) == text
        for number in range(len(events)):
            assert text.startswith(said(events[:number]))
        assert events[-2].json["usage"]["completion_tokens"] == count
        for read in (0, len(events) // 2, len(events) - 3):
            rest = await resume(other, session, events[read].id)
            assert said(events[: read + 1]) + said(rest) == text
            assert [end["stop_reason"] for end in finishes(rest)] == [found] * (read < len(events) - 3)
            assert rest[-1].data == "[DONE]"
        await eventually(lambda own=session: own in freed(cloud), "the KV is freed")
        await eventually(partial(has_status, cloud, session, SessionStatus.CLOSED), "the session is closed")


async def test_a_stream_left_before_its_stop_string_ends_at_it_on_another_gateway(
    cloud: Cloud, tokenizer: Tokenizer
) -> None:
    first, second = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    cloud.verifier.pass_s = 0.05
    stop = "und pfiff. Ein Vöglein"
    text, count, _ = ended(tokenizer, recite(PROMPT, 300), Ending((stop,)))
    body = completion(max_tokens=300, stop=stop, stream_options={"include_usage": True})
    events = await read_some(first, body, 5)
    session = session_of(events)

    await eventually(partial(has_status, cloud, session, SessionStatus.DETACHED), "the session is detached")
    rest = await resume(second, session, events[-1].id)
    assert said(events) + said(rest) == text
    assert rest[-2].json["usage"]["completion_tokens"] == count


async def test_tokens_that_were_committed_behind_a_stop_string_belong_to_no_answer(
    cloud: Cloud, tokenizer: Tokenizer
) -> None:
    """As when its gateway died before it saw them."""
    first, second = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    cloud.verifier.pass_s = 0.05
    truth = recite(PROMPT, 300)
    stop = "und pfiff. Ein Vöglein"
    text, count, _ = ended(tokenizer, truth, Ending((stop,)))
    events = await read_some(first, completion(max_tokens=300, stop=stop), 3)
    session = session_of(events)

    await eventually(partial(has_status, cloud, session, SessionStatus.DETACHED), "the session is detached")
    state = await cloud.state(session)
    await cloud.store.commit(
        session, epoch=state.epoch, round=900, base=state.base, tokens=truth[state.base : count + 40]
    )
    position = int((events[-1].id or "").rpartition(":")[2])
    rest = await resume(second, session, events[-1].id)
    assert said(events) + said(rest) == text
    assert finishes(rest)[0]["stop_reason"] == stop
    ahead = await second.get(f"/v1/streams/{session}", headers={"Last-Event-ID": f"{session}:{count + 1}"})
    assert (position < count, ahead.status_code) == (True, 400)
    await eventually(partial(has_status, cloud, session, SessionStatus.CLOSED), "the session is closed")


# --- sampling ---------------------------------------------------------------------------------------------------


async def test_a_request_goes_to_the_verifier_with_all_that_it_says(cloud: Cloud) -> None:
    gateway = await cloud.gateway(default_temperature=0.6)
    asked = completion(
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias={"65": 5, "66": -500},
        min_tokens=3,
        stop="zz",
        logprobs=None,
        outrider={"sampling": "ratio"},
    )
    answer = (await gateway.post("/v1/completions", json=asked)).json()
    params = (await cloud.state(answer["id"])).params
    assert params.stop == ("zz",)
    assert params.sampling == Sampling(
        temperature=0.6,
        top_p=0.9,
        min_p=0.1,
        seed=(1 << 64) - 1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias=((65, 5.0), (66, -100.0)),
        min_tokens=3,
        mode=SamplingMode.RATIO,
    )
    assert answer["usage"]["outrider"]["seed"] == -1
    greedy = (await gateway.post("/v1/completions", json=asked | {"temperature": 0})).json()
    sampling = (await cloud.state(greedy["id"])).params.sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.0, 1.0, 0.0)
    assert (sampling.mode, sampling.presence_penalty) == (SamplingMode.KEYED, 0.5)


async def test_a_seed_that_was_drawn_is_told_and_gives_the_same_answer(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    answers = []
    for fields in ({}, {}):
        body = completion(temperature=0.8, **fields)
        answers.append((await gateway.post("/v1/completions", json=body)).json())
    seeds = [answer["usage"]["outrider"]["seed"] for answer in answers]
    assert seeds[0] != seeds[1] and all(0 <= seed < 1 << 53 for seed in seeds)
    again = (await gateway.post("/v1/completions", json=completion(temperature=0.8, seed=seeds[0]))).json()
    assert again["choices"][0]["text"] == answers[0]["choices"][0]["text"] == text_of(sampled(seeds[0]))
    key = {"Idempotency-Key": secrets.token_hex(8)}
    kept = [
        (await gateway.post("/v1/completions", json=completion(temperature=0.8, n=2), headers=key)).json()
        for _ in range(2)
    ]
    assert kept[0]["choices"] == kept[1]["choices"]


async def test_choices_differ_come_by_index_and_are_counted_together(cloud: Cloud) -> None:
    gateway, other = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    expected = [text_of(sampled(7, choice)) for choice in range(3)]
    assert len(set(expected)) == 3
    body = completion(temperature=1.0, seed=7, n=3)
    answer = (await gateway.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in answer["choices"]] == expected
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 180, 185)
    assert len(usage["outrider"]["choices"]) == 3 and usage["outrider"]["seed"] == 7

    asked = body | {"stream_options": {"include_usage": True}}
    events = await stream(gateway, "/v1/completions", asked)
    response = session_of(events)
    assert {event.json["id"] for event in events[:-1]} == {response}
    assert events[-1].data == "[DONE]" and events[-2].json["usage"]["completion_tokens"] == 180
    assert events[-2].id is None
    for index, text in enumerate(expected):
        own = [event for event in events[:-2] if event.json["choices"][0]["index"] == index]
        session = f"{response}-{index}" if index else response
        assert said(own) == text
        assert all((event.id or "").startswith(f"{session}:") for event in own)
        middle = len(own) // 2
        rest = await resume(other, session, own[middle].id)
        assert said(own[: middle + 1]) + said(rest) == text
        assert {choice["index"] for event in rest[:-1] for choice in event.json["choices"]} == {index}
        assert rest[-2].json["usage"]["completion_tokens"] == 60


async def test_openais_client_reads_several_choices_of_a_chat(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Sing!"}], "max_tokens": 40}
    async with AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key="none") as client:
        whole = await client.chat.completions.create(n=2, temperature=1.0, seed=3, **asked)
        texts = {0: "", 1: ""}
        async for chunk in await client.chat.completions.create(
            n=2, temperature=1.0, seed=3, stream=True, **asked
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert texts[0] != texts[1]


async def test_choices_for_which_there_is_no_room_are_refused_together(cloud: Cloud) -> None:
    gateway = await cloud.gateway(gateway_max_streams=2)
    refused = await gateway.post("/v1/completions", json=completion(temperature=1.0, n=3))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    cloud.verifier.hold.clear()
    waiting = asyncio.create_task(gateway.post("/v1/completions", json=completion()))
    await eventually(lambda: cloud.verifier.blocks, "a session is open")
    refused = await gateway.post("/v1/completions", json=completion(temperature=1.0, n=2))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    cloud.verifier.hold.set()
    assert (await waiting).status_code == 200


async def test_a_client_that_leaves_frees_all_choices(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    cloud.verifier.pass_s = 0.05
    events = await read_some(gateway, completion(max_tokens=200, temperature=1.0, n=2), 4)
    response = session_of(events)

    await eventually(lambda: {response, f"{response}-1"} <= freed(cloud), "the KV of both is freed")


async def test_a_schema_goes_to_the_verifier_as_it_is(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = (await gateway.post("/v1/completions", json=completion(response_format=asked))).json()
    assert json.loads((await cloud.state(answer["id"])).params.json_schema) == schema


# --- echo -------------------------------------------------------------------------------------------------------


async def test_a_prompt_is_repeated_in_front_of_the_answer(cloud: Cloud) -> None:
    gateway, other = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    expected = "Sing!" + text_of(recite(PROMPT, 60))
    for prompt in ("Sing!", list(PROMPT)):
        answer = (await gateway.post("/v1/completions", json=completion(prompt, echo=True))).json()
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["completion_tokens"] == 60
    events = await stream(gateway, "/v1/completions", completion(echo=True))
    assert (events[0].text, said(events)) == ("Sing!", expected)
    session = session_of(events)
    assert said(await resume(other, session, None)) == expected
    assert said(await resume(other, session, events[0].id)) == expected.removeprefix("Sing!")


# --- log-probabilities ------------------------------------------------------------------------------------------


def told_in(events: list[Event]) -> list[dict[str, Any]]:
    """What a chat's stream tells of its tokens."""
    return [
        token
        for event in events
        if event.data != "[DONE]"
        for choice in event.json["choices"]
        if choice["logprobs"]
        for token in choice["logprobs"]["content"]
    ]


async def test_log_probabilities_of_a_chat_come_whole_streamed_and_resumed(cloud: Cloud) -> None:
    gateway, other = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    body = chat(logprobs=True, top_logprobs=2)
    answer = (await gateway.post("/v1/chat/completions", json=body)).json()
    told = answer["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in told] == [-position / 8 for position in range(60)]
    spelled = bytes(byte for token in told for byte in token["bytes"])
    assert spelled.decode(errors="replace") == answer["choices"][0]["message"]["content"]
    assert all(
        [top["logprob"] for top in token["top_logprobs"]] == [token["logprob"], token["logprob"] - 1]
        for token in told
    )

    events = await stream(gateway, "/v1/chat/completions", body)
    assert told_in(events) == told
    for read in (0, len(events) // 2):
        rest = await resume(other, session_of(events), events[read].id)
        assert told_in(events[: read + 1]) + told_in(rest) == told


async def test_log_probabilities_of_a_completion_say_where_each_token_begins(cloud: Cloud) -> None:
    gateway, other = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    cloud.verifier.pass_s = 0.05
    body = completion(logprobs=1, max_tokens=150, stop="und pfiff. Ein")
    answer = (await gateway.post("/v1/completions", json=body)).json()
    told = answer["choices"][0]["logprobs"]
    count = answer["usage"]["completion_tokens"]
    assert [len(each) for each in told.values()] == [count] * 4
    offset = 0
    for token, at in zip(told["tokens"], told["text_offset"], strict=True):
        assert at == offset
        offset += len(token)
    events = await read_some(gateway, body, 4)
    rest = await resume(other, session_of(events), events[-1].id)
    parts = [
        choice["logprobs"]
        for event in [*events, *rest[:-1]]
        for choice in event.json["choices"]
        if choice["logprobs"]
    ]
    for name, whole in told.items():
        assert [each for part in parts for each in part[name]] == whole


async def test_log_probabilities_of_an_answer_that_was_lost_come_from_the_store(cloud: Cloud) -> None:
    gateway = await cloud.gateway(round_timeout_s=0.3)
    dropped: list[int] = []

    def first_of_each(verdict: Any) -> bool:
        dropped.append(verdict.round)
        return verdict.round in (2, 5) and dropped.count(verdict.round) == 1

    cloud.verifier.drop_verdict = first_of_each
    answer = (await gateway.post("/v1/chat/completions", json=chat(logprobs=True))).json()
    told = answer["choices"][0]["logprobs"]["content"]
    assert {2, 5} <= set(dropped)
    assert [token["logprob"] for token in told] == [-position / 8 for position in range(60)]


# --- replays ----------------------------------------------------------------------------------------------------


async def replay(gateway: httpx.AsyncClient, session: str) -> int:
    """The exit status of `outrider replay`."""
    return await asyncio.to_thread(main, ["replay", session, "--gateway", str(gateway.base_url)])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.9, "seed": 11},
        {"temperature": 0.9, "stop": STOPS},
        {"temperature": 0.9, "min_tokens": 60, "stop_token_ids": [ord("S")]},
        {"echo": True},
    ],
)
async def test_an_answer_is_replayed_on_any_gateway(
    cloud: Cloud, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    gateway, other = await cloud.gateway(), await cloud.gateway(gateway_name="gateway-1")
    body = completion(outrider={"return_token_ids": True}, **fields)
    answer = (await gateway.post("/v1/completions", json=body)).json()
    tokens = answer["choices"][0]["token_ids"]
    assert await replay(other, answer["id"]) == 0
    printed = capsys.readouterr().out
    assert f"tokens: {' '.join(map(str, tokens))}" in printed
    assert f"equal: {len(tokens)} tokens, seed {answer['usage']['outrider']['seed']}" in printed


async def test_every_choice_of_an_answer_is_replayed_by_its_own_id(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    events = await stream(gateway, "/v1/completions", completion(temperature=1.0, n=2))
    for session in (session_of(events), f"{session_of(events)}-1"):
        assert await replay(gateway, session) == 0


async def test_an_answer_that_comes_out_otherwise_is_told_by_its_first_difference(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = await cloud.gateway()
    answer = (await gateway.post("/v1/completions", json=completion(max_tokens=9))).json()
    said_before = recite(PROMPT, 9)

    def otherwise(prompt: Tokens, length: int) -> Tokens:
        return (*said_before[:4], 90, *said_before[5:])[:length]

    cloud.verifier.recite = otherwise
    assert await replay(gateway, answer["id"]) == 1
    assert "different from token 4 on: 9 tokens" in capsys.readouterr().out


async def test_what_cannot_be_replayed_is_said_clearly(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = await cloud.gateway()
    body = completion(temperature=1.0, outrider={"sampling": "ratio"})
    ratio = (await gateway.post("/v1/completions", json=body)).json()["id"]
    for session, says in (
        (ratio, "ratio mode"),
        ("cmpl-unknown", "or it has expired"),
        ("no id!", "no session"),
    ):
        assert await replay(gateway, session) == 1
        assert says in capsys.readouterr().err
    refused = await gateway.post(f"/v1/streams/{ratio}/replay")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_replayable")
    assert await asyncio.to_thread(main, ["replay", "cmpl-1", "--gateway", "http://127.0.0.1:9"]) == 1
    assert "can't be asked" in capsys.readouterr().err


async def test_chats_and_other_finish_reasons_are_as_before(cloud: Cloud) -> None:
    gateway = await cloud.gateway()
    answer = (await gateway.post("/v1/chat/completions", json=chat(max_completion_tokens=60))).json()
    assert answer["choices"][0]["finish_reason"] == FinishReason.LENGTH
    assert (answer["choices"][0]["stop_reason"], answer["choices"][0]["logprobs"]) == (None, None)
