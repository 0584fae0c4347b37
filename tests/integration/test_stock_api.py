"""vLLM's own OpenAI server and ours, asked the same: the same text, the same ends, the same counts, the same refusals."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from jsonschema import validate

from services.draft_gateway.drafting.lookup import PromptLookup
from shared.stack.ports import free_port
from tests.integration import api_table
from tests.integration.api_table import BAD, CONTEXT, DIFFERENT, GOOD, MODEL, ROWS, Row
from tests.integration.whole import whole

pytestmark = [
    pytest.mark.engine,
    pytest.mark.kafka,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

READY_S = 240.0
ANSWER_S = 240.0
AT_A_TIME = 6


@dataclass(frozen=True)
class Told:
    """What is compared of an answer. Of a refusal it is the status alone."""

    status: int
    choices: tuple[tuple[str, str, str | int | None], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    message: str = ""

    @property
    def compared(self) -> tuple[object, ...]:
        """All but the words of a refusal."""
        return self.status, self.choices, self.prompt_tokens, self.completion_tokens


async def ask(client: httpx.AsyncClient, row: Row) -> Told:
    """What a server says to a request."""
    content = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
    response = await client.request(row.method, row.path, content=content, headers=row.headers)
    if response.status_code != 200:
        return Told(response.status_code, message=response.text)
    if response.headers["content-type"].startswith("text/event-stream"):
        return _streamed(response.text)
    body = response.json()
    choices = tuple(
        (_text(choice, "message"), choice["finish_reason"], choice["stop_reason"])
        for choice in sorted(body["choices"], key=lambda choice: int(choice["index"]))
    )
    return Told(200, choices, body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])


def _text(choice: Mapping[str, Any], part: str) -> str:
    return choice["text"] if "text" in choice else choice[part].get("content") or ""


def _streamed(events: str) -> Told:
    text, finish_reason, stop_reason, usage = "", "", None, {}
    *lines, done = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    for line in lines:
        chunk = json.loads(line)
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += _text(choice, "delta")
            finish_reason = choice["finish_reason"] or finish_reason
            stop_reason = choice.get("stop_reason") or stop_reason
    return Told(
        200,
        ((text, finish_reason, stop_reason),),
        usage.get("prompt_tokens", 0),
        usage.get("completion_tokens", 0),
    )


@asynccontextmanager
async def stock_api(target: Path, log: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of vLLM's own server, when it is ready."""
    port = free_port()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OUTRIDER_", "VLLM_"))
    }
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.integration.stock_api", str(target), str(port), MODEL, str(CONTEXT),
            stdout=output, stderr=asyncio.subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S) as client:
            await ready(client, log)
            yield client
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


async def ready(client: httpx.AsyncClient, log: Path) -> None:
    """Wait until vLLM's own server answers."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.25)
    said = await asyncio.to_thread(log.read_text)
    pytest.fail(f"vLLM's own server did not start in {READY_S:g} s; it said: {said[-2000:]}")


async def ask_all(client: httpx.AsyncClient, rows: list[Row]) -> list[Told]:
    """What a server says to each, some at a time."""
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(row: Row) -> Told:
        async with places:
            return await ask(client, row)

    return list(await asyncio.gather(*(one(row) for row in rows)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(kafka: str, redis_url: str, target_model: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of our gateway, with prompt lookup for a draft and the whole path behind it."""
    name = f"api-{secrets.token_hex(4)}"
    environment = {
        "OUTRIDER_KAFKA": kafka,
        "OUTRIDER_REDIS_URL": redis_url,
        "OUTRIDER_TOPIC_PREFIX": f"{name}-",
        "OUTRIDER_REDIS_PREFIX": f"{name}:",
        "OUTRIDER_MAX_MODEL_LEN": str(CONTEXT),
    }
    async with whole(environment, target_model, {"lookup": PromptLookup()}) as running:
        yield running.gateways["lookup"]


async def test_vllms_own_server_and_ours_answer_and_refuse_alike(
    gateway: httpx.AsyncClient, target_model: Path, tmp_path: Path
) -> None:
    assert len(GOOD) + len(BAD) >= 60
    async with stock_api(target_model, tmp_path / "stock.log") as stock:
        theirs = await ask_all(stock, ROWS)
    ours = await ask_all(gateway, ROWS)
    wrong = []
    for row, their, our in zip(ROWS, theirs, ours, strict=True):
        expected, found = (
            ((row.ours, row.theirs), (our.status, their.status))
            if row.why
            else (their.compared, our.compared)
        )
        if found != expected:
            wrong.append(f"{row}\n  vLLM: {their}\n  ours: {our}")
    print(f"{len(GOOD)} answers and {len(BAD)} refusals compared; {len(DIFFERENT)} differ for a reason")
    assert not wrong, f"{len(wrong)} of {len(ROWS)} differ:\n" + "\n".join(wrong)
    for row, told in zip(ROWS, theirs, strict=True):
        assert (told.status == 200) is (row in GOOD or row.theirs == 200), f"{row}: {told}"


async def test_answers_that_were_drawn_are_replayed_to_the_token(gateway: httpx.AsyncClient) -> None:
    asked = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.9, "n": 3}
    penalties = {"top_p": 0.9, "repetition_penalty": 1.2, "logit_bias": {"28": -3}, "stop": ["and"]}
    for fields in ({}, penalties):
        answer = (await gateway.post("/v1/completions", json=asked | fields)).json()
        texts = [choice["text"] for choice in answer["choices"]]
        assert len(set(texts)) == 3
        for index, text in enumerate(texts):
            session = f"{answer['id']}-{index}" if index else answer["id"]
            again = (await gateway.post(f"/v1/streams/{session}/replay")).json()
            assert (again["equal"], again["text"]) == (True, text)
        seed = answer["usage"]["outrider"]["seed"]
        repeated = (await gateway.post("/v1/completions", json=asked | fields | {"seed": seed})).json()
        assert repeated["choices"] == answer["choices"]


async def test_answers_with_a_schema_parse_and_validate_at_any_temperature(
    gateway: httpx.AsyncClient,
) -> None:
    for temperature, seed in ((0, 0), (0.8, 1), (1.2, 2), (2.0, 3)):
        fields = {"max_tokens": 120, "temperature": temperature, "seed": seed}
        for asked in ({"type": "json_object"}, api_table.schema(api_table.SCHEMA)):
            row = api_table.chat("Describe a city as JSON.", response_format=asked, **fields)
            told = await ask(gateway, row)
            text, finish_reason, _ = told.choices[0]
            if finish_reason == "stop":
                found = json.loads(text)
                validate(found, asked.get("json_schema", {}).get("schema", {"type": "object"}))
            else:
                assert asked["type"] == "json_object", told
