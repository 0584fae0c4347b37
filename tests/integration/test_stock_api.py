"""vLLM's own OpenAI server and ours, asked the same: the same text, the same ends, the same counts, the same refusals."""

from __future__ import annotations

import asyncio
import json
import os
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

from services.draft_gateway.drafting.lookup import PromptLookup
from shared.stack.ports import free_port
from tests.integration.api_table import BAD, CONTEXT, DIFFERENT, GOOD, MODEL, ROWS, Row
from tests.integration.whole import whole

pytestmark = [pytest.mark.kafka, pytest.mark.engine, pytest.mark.timeout(600)]

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


async def test_vllms_own_server_and_ours_answer_and_refuse_alike(
    settings_env: dict[str, str], target_model: Path, tmp_path: Path
) -> None:
    assert len(GOOD) + len(BAD) >= 60
    async with stock_api(target_model, tmp_path / "stock.log") as stock:
        theirs = await ask_all(stock, ROWS)
    ours_env = settings_env | {"OUTRIDER_MAX_MODEL_LEN": str(CONTEXT)}
    async with whole(ours_env, target_model, {"lookup": PromptLookup()}) as running:
        ours = await ask_all(running.gateways["lookup"], ROWS)
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
