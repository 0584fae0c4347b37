"""The common HTTP side: errors leave in OpenAI's form, health and readiness speak, the server stops in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from shared.errors import Overloaded, SessionNotFound
from shared.http import AddressTaken, HttpServer, Readiness, create_app, load_settings, run_service
from shared.settings import CommonSettings


class Order(BaseModel):
    count: int = Field(ge=1)


def an_app(readiness: Readiness | None = None) -> FastAPI:
    async def ready() -> Readiness:
        return readiness or Readiness()

    app = create_app("Test", ready)

    @app.get("/missing")
    async def missing() -> None:
        raise SessionNotFound("there is no session x")

    @app.get("/full")
    async def full() -> None:
        raise Overloaded("no room", retry_after_s=1.6)

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("a secret detail")

    @app.post("/orders")
    async def order(order: Order) -> int:
        return order.count

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(0.5)
        return "done"

    return app


def client(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def error_of(response: httpx.Response, status: int) -> dict[str, str | None]:
    assert response.status_code == status
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]  # type: ignore[no-any-return]


async def test_our_errors_keep_their_status_code_and_message() -> None:
    async with client(an_app()) as http:
        error = await error_of(await http.get("/missing"), 404)
        assert error["code"] == "session_not_found"
        assert error["message"] == "there is no session x"
        full = await http.get("/full")
        assert (await error_of(full, 429))["type"] == "rate_limit_error"
        assert full.headers["Retry-After"] == "2"


async def test_malformed_json_is_named_as_such() -> None:
    async with client(an_app()) as http:
        response = await http.post(
            "/orders", content=b'{"count": 1', headers={"Content-Type": "application/json"}
        )
        assert "not JSON" in str((await error_of(response, 400))["message"])


@pytest.mark.parametrize("body", [{"count": 0}, {"count": "many"}, {}])
async def test_a_bad_field_is_named(body: dict[str, object]) -> None:
    async with client(an_app()) as http:
        error = await error_of(await http.post("/orders", json=body), 400)
        assert error["param"] == "count"
        assert error["code"] == "invalid_request"


async def test_an_unknown_path_or_method_is_named() -> None:
    async with client(an_app()) as http:
        assert "/nowhere" in str((await error_of(await http.get("/nowhere"), 404))["message"])
        assert "POST" in str((await error_of(await http.get("/orders"), 405))["message"])


async def test_a_defect_answers_500_and_tells_the_client_nothing_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with client(an_app()) as http:
        response = await http.get("/broken")
    error = await error_of(response, 500)
    assert error["code"] == "internal_error"
    assert "secret" not in response.text


async def test_readiness_says_what_is_missing() -> None:
    async with client(an_app(Readiness(missing=["Kafka does not answer"], notes=["careful"]))) as http:
        response = await http.get("/readyz")
        assert response.status_code == 503
        body = {"ready": False, "reasons": ["Kafka does not answer"], "notes": ["careful"]}
        assert response.json() == body
        assert (await http.get("/healthz")).status_code == 200
    async with client(an_app()) as http:
        assert (await http.get("/readyz")).json() == {"ready": True, "reasons": [], "notes": []}


async def test_metrics_are_prometheus_text_and_docs_are_on() -> None:
    async with client(an_app()) as http:
        metrics = await http.get("/metrics")
        assert metrics.headers["Content-Type"].startswith("text/plain")
        assert "python_info" in metrics.text
        assert (await http.get("/openapi.json")).json()["info"]["title"] == "Test"


async def test_what_is_written_to_a_client_waits_for_no_acknowledgement() -> None:
    async with (
        HttpServer(an_app(), host="127.0.0.1", port=0) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client,
    ):
        await client.get("/healthz")
        connections = server._server.server_state.connections
        sockets = [connection.transport.get_extra_info("socket") for connection in connections]
        assert [one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets] == [1]


async def test_stopping_lets_open_requests_end() -> None:
    server = HttpServer(an_app(), host="127.0.0.1", port=0)
    async with server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
        await http.get("/healthz")
        slow = asyncio.create_task(http.get("/slow"))
        await asyncio.sleep(0.1)
        await server.stop()
        assert (await slow).json() == "done"
        with pytest.raises(httpx.ConnectError):
            await http.get("/healthz")


async def test_a_taken_port_is_named() -> None:
    async with HttpServer(an_app(), host="127.0.0.1", port=0) as first:
        with pytest.raises(AddressTaken, match=rf"{first.port}.*in use"):
            await HttpServer(an_app(), host="127.0.0.1", port=first.port).start()


async def test_a_service_that_cannot_go_on_ends_with_its_message(caplog: pytest.LogCaptureFixture) -> None:
    async def serve(stop: asyncio.Event) -> None:
        raise SessionNotFound("nothing to serve")

    with caplog.at_level(logging.CRITICAL):
        assert await run_service(serve, an_app(), host="127.0.0.1", port=0) == 1
    assert caplog.messages == ["nothing to serve"]


async def test_sigterm_ends_a_service_in_order() -> None:
    steps: list[str] = []

    async def serve(stop: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        steps.append("wound up")

    assert await run_service(serve, an_app(), host="127.0.0.1", port=0) == 0
    assert steps == ["wound up"]


async def test_what_is_there_when_a_service_is_ready_is_no_longer_looked_through() -> None:
    states = [Readiness(missing=["a broker"])] * 2
    frozen: list[int] = []

    async def serve(stop: asyncio.Event) -> None:
        await asyncio.sleep(0.05)
        frozen.append(gc.get_freeze_count())
        for _ in range(500):
            if not states and gc.get_freeze_count():  # which counts them, one by one
                break
            await asyncio.sleep(0.02)
        frozen.append(gc.get_freeze_count())

    app = create_app("Test", lambda: states.pop() if states else Readiness())
    gc.unfreeze()
    try:
        assert await run_service(serve, app, host="127.0.0.1", port=0) == 0
        assert not states
        assert frozen[0] == 0, "it was not ready yet"
        assert frozen[1] > 1000
    finally:
        gc.unfreeze()


def test_a_bad_setting_is_named_without_a_traceback() -> None:
    program = "from tests.unit.test_http import *; load_settings(CommonSettings)"
    environment = {**os.environ, "OUTRIDER_DRAFTS_PARTITIONS": "many"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("OUTRIDER_DRAFTS_PARTITIONS='many':")
    assert "Traceback" not in ended.stderr


def test_good_settings_load() -> None:
    assert load_settings(CommonSettings).drafts_partitions >= 1
