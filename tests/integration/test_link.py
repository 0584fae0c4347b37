"""Gateways at the edge: the same answers over a link as without, whatever happens to it, and of one's own sessions only.

Kafka, Redis, kv-session, both gateways and the WebSocket between them are real; the verifier recites.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from pydantic import SecretStr
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.typing import Subprotocol

from services.draft_gateway.link.channel import FAULTY
from services.draft_gateway.link.client import GATEWAY_HEADER, LinkUplink
from services.draft_gateway.link.frames import SUBPROTOCOL, Upward
from services.draft_gateway.link.server import Relay
from services.draft_gateway.settings import GatewaySettings
from shared.errors import SessionNotFound, Unavailable
from shared.protocol import Block, Cancel, CloseSession, OpenSession, Prompt, Verdict
from shared.session import SessionStatus
from shared.settings import KafkaFlavor
from shared.stack.delay import Conditions, DelayProxy
from shared.stack.demo import Demo
from shared.stack.kafka import Broker
from shared.stack.ports import free_port
from shared.stack.settings import StackSettings
from shared.stack.stack import Stack, StackOptions
from tests.integration.scripted_cloud import (
    Cloud,
    Event,
    cloud_settings,
    completion,
    eventually,
    port_of,
    process,
    read_events,
    ready,
    recite,
    resume,
    run_gateway,
    said,
    session_of,
    stream,
    text_of,
)

pytestmark = [pytest.mark.kafka, pytest.mark.asyncio(loop_scope="module")]

KEY, OTHER_KEY = "robots-0123456789", "shop-0123456789ab"


@pytest.fixture(scope="module")
def settings(kafka_broker: Broker, redis_url: str, byte_model: Path) -> dict[str, Any]:
    """Topics and keys of this module; its tests are told apart by their sessions."""
    name = f"link-{secrets.token_hex(3)}"
    return cloud_settings(kafka_broker, redis_url, f"{name}:", byte_model, f"{name}-")


@dataclass
class Edge:
    """A gateway at the edge: a client of it, and its end of the link."""

    client: httpx.AsyncClient
    uplink: LinkUplink


class Places(Cloud):
    """A cloud, and edges linked to it."""

    def renew(self, stack: AsyncExitStack) -> None:
        """Gateways live in `stack` from now on; the verifier does nothing unusual."""
        self._stack = stack
        self.verifier.pass_s = 0.01
        self.verifier.blocks.clear()
        self.verifier.cancelled.clear()
        self.verifier.hold.set()
        self.verifier.drop_verdict = lambda verdict: False

    def url(self, gateway: httpx.AsyncClient | int) -> str:
        """Where a gateway takes links."""
        return f"ws://127.0.0.1:{gateway if isinstance(gateway, int) else port_of(gateway)}/v1/link"

    async def proxy(self, gateway: httpx.AsyncClient, *, port: int = 0, **conditions: Any) -> DelayProxy:
        """A wide-area link to a gateway."""
        target = ("127.0.0.1", port_of(gateway))
        return await self._stack.enter_async_context(DelayProxy(target, Conditions(**conditions), port=port))

    @asynccontextmanager
    async def an_edge(self, *links: str, **settings: Any) -> AsyncIterator[Edge]:
        """A gateway at the edge that links to `links`. It has no address of Kafka or Redis."""
        nothing = {"kafka": "127.0.0.1:1", "redis_url": "redis://127.0.0.1:1/0"}
        own = self._settings | nothing | {"uplink": "link", "link": ",".join(links)} | settings
        own["gateway_name"] = "edge"
        uplink = LinkUplink(GatewaySettings(**own))
        async with run_gateway(own, uplink) as client:
            yield Edge(client, uplink)

    async def edge(self, *links: str, **settings: Any) -> Edge:
        """One that is linked."""
        edge = await self._stack.enter_async_context(self.an_edge(*links, **settings))
        await eventually(lambda: ready(edge.client), "the edge is linked")
        return edge


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cloud(settings: dict[str, Any]) -> AsyncIterator[Places]:
    """kv-session and the verifier, which take seconds to meet."""
    async with AsyncExitStack() as stack:
        places = Places(settings, stack)
        await places.start()
        yield places


@pytest_asyncio.fixture(loop_scope="module")
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def places(cloud: Places, stack: AsyncExitStack) -> Places:
    """The cloud as new, with gateways of the test's own."""
    cloud.renew(stack)
    return cloud


async def up(client: httpx.AsyncClient) -> bool:
    """The process that it asks has started and is ready."""
    try:
        return await ready(client)
    except httpx.TransportError:
        return False


def truth(length: int, prompt: bytes = b"Sing!") -> str:
    return text_of(recite(tuple(prompt), length))


async def read_on(response: httpx.Response, disturb: dict[int, Callable[[], Any]]) -> list[Event]:
    """All events; after so many of them something is done."""
    events: list[Event] = []
    async for event in read_events(response):
        events.append(event)
        if (doing := disturb.pop(len(events), None)) is not None:
            done = doing()
            if asyncio.iscoroutine(done):
                await done
    assert not disturb, "the answer was over before it was disturbed"
    return events


async def disturbed(
    client: httpx.AsyncClient, length: int, disturb: dict[int, Callable[[], Any]]
) -> list[Event]:
    """A streamed answer during which something happens."""
    body = completion(max_tokens=length, stream=True, stream_options={"include_usage": True})
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        return await read_on(response, disturb)


# --- as without it ----------------------------------------------------------------------------------------------


async def test_answers_over_a_link_are_those_without_and_hints_come_in_time_and_bytes_are_few(
    places: Places,
) -> None:
    cloud = await places.gateway()
    proxy = await places.proxy(cloud, rtt_ms=20)
    edge = await places.edge(places.url(proxy.port))
    places.verifier.pass_s = 0.06
    before = edge.uplink.traffic()
    events = await disturbed(edge.client, 60, {})
    assert said(events) == truth(60)
    report = events[-2].json["usage"]["outrider"]
    # 25 of 48 on an idle machine; beside other work one may be late
    assert report["hits"] > 0.4 * report["rounds"]
    assert report["hints_before_verdict"] >= report["rounds"] / 2
    after = edge.uplink.traffic()
    assert 0 < after.bytes_up - before.bytes_up <= 24 * 60
    assert 0 < after.bytes_down - before.bytes_down <= 30 * 60
    assert proxy.counts.up > after.bytes_up and proxy.counts.down > after.bytes_down
    trip = edge.uplink.round_trip
    assert trip is not None and 20 <= trip.minimum_ms <= min(trip.smoothed_ms, trip.last_ms)

    session = session_of(events)
    assert said(await resume(cloud, session, events[10].id)) == said(events[11:])
    assert said(await resume(edge.client, session, events[10].id)) == said(events[11:])
    notes = (await edge.client.get("/readyz")).json()["notes"]
    assert any("linked to ws://" in note and "round trip" in note for note in notes)
    assert "1 linked from the edge" in (await cloud.get("/readyz")).json()["notes"]
    metrics = (await edge.client.get("/metrics")).text
    for part in ("rounds", "rest"):
        assert f'outrider_link_bytes_total{{direction="up",end="edge",part="{part}"}}' in metrics
    assert 'outrider_link_round_trip_seconds_count{end="edge"}' in metrics


async def test_refusals_positions_and_cancellations_are_those_without(places: Places) -> None:
    edge = await places.edge(places.url(await places.gateway()))
    assert (await edge.client.get("/v1/streams/cmpl-unknown")).status_code == 404
    events = await stream(edge.client, "/v1/completions", completion())
    ahead = {"Last-Event-ID": f"{session_of(events)}:61"}
    assert (await edge.client.get(f"/v1/streams/{session_of(events)}", headers=ahead)).status_code == 400

    places.verifier.pass_s = 0.1
    async with edge.client.stream(
        "POST", "/v1/completions", json=completion(max_tokens=200, stream=True)
    ) as response:
        reading = read_events(response)
        session = session_of([await anext(reading)])
        assert (await edge.client.delete(f"/v1/streams/{session}")).json()["deleted"]
        assert [event async for event in reading][-1].json["error"]["code"] == "session_not_found"
    await eventually(
        lambda: [c for c in places.verifier.cancelled if c.session == session], "the KV is freed"
    )

    places.verifier.pass_s = 0.01
    key = {"Idempotency-Key": secrets.token_hex(8)}
    first = (await edge.client.post("/v1/completions", json=completion(), headers=key)).json()
    again = (await edge.client.post("/v1/completions", json=completion(), headers=key)).json()
    assert (first["id"], first["choices"]) == (again["id"], again["choices"])


async def test_a_stream_moves_between_cloud_and_edge_and_whoever_had_it_is_told(places: Places) -> None:
    cloud = await places.gateway()
    edge = await places.edge(places.url(cloud))
    places.verifier.pass_s = 0.04
    for first, second in ((cloud, edge.client), (edge.client, cloud)):
        async with first.stream(
            "POST", "/v1/completions", json=completion(max_tokens=30, stream=True)
        ) as response:
            reading = read_events(response)
            seen = [await anext(reading)]
            taking = asyncio.create_task(resume(second, session_of(seen), seen[0].id))
            seen += [event async for event in reading]
            newer = await taking
        assert seen[-1].json["error"]["code"] == "session_taken"
        assert seen[0].text + said(newer) == truth(30)


# --- the first token ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True], ids=["", "lost"])
async def test_a_sessions_prompt_is_sent_where_it_is_opened_and_by_the_edge_only_if_nothing_comes_of_it(
    places: Places, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    sent: list[Prompt] = []
    pass_up = Relay._pass_up

    def seen(relay: Relay, message: Upward) -> None:
        if isinstance(message, Prompt):
            sent.append(message)
        if not (lost and len(sent) == 1):
            pass_up(relay, message)

    monkeypatch.setattr(Relay, "_pass_up", seen)
    edge = await places.edge(places.url(await places.gateway()), round_timeout_s=0.5 if lost else 60)
    events = await disturbed(edge.client, 20, {})
    assert said(events) == truth(20)
    assert len(sent) == 1 + lost
    assert {(prompt.round, prompt.base) for prompt in sent} == {(0, 0)}


# --- when it is lost --------------------------------------------------------------------------------------------


async def test_a_link_that_is_cut_in_mid_stream_again_and_again_costs_no_token(places: Places) -> None:
    proxy = await places.proxy(await places.gateway(), rtt_ms=10)
    edge = await places.edge(places.url(proxy.port))
    places.verifier.pass_s = 0.04
    cuts: dict[int, Callable[[], Any]] = dict.fromkeys((1, 9, 10, 22), proxy.drop)
    events = await disturbed(edge.client, 200, cuts)
    assert said(events) == truth(200)
    assert events[-2].json["usage"]["completion_tokens"] == 200
    assert (await places.state(session_of(events))).epoch >= 3
    assert proxy.counts.connections >= 4


@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "the last one"])
async def test_a_verdict_that_was_lost_with_the_link_is_read_from_redis(places: Places, last: bool) -> None:
    proxy = await places.proxy(await places.gateway(), rtt_ms=10)
    edge = await places.edge(places.url(proxy.port), round_timeout_s=60)
    cuts: list[int] = []

    def lose(verdict: Verdict) -> bool:
        """Committed, and then never heard: nobody asks for it again either, before the link is back."""
        lost = verdict.finish_reason is not None if last else verdict.round == 4 and not cuts
        if lost:
            cuts.append(proxy.drop())
        return lost

    places.verifier.drop_verdict = lose
    events = await disturbed(edge.client, 60, {})
    assert cuts == [1]
    assert said(events) == truth(60)
    assert events[-1].data == "[DONE]"


async def test_choices_stop_strings_log_probabilities_and_replays_are_those_without_a_link(
    places: Places,
) -> None:
    cloud = await places.gateway()
    proxy = await places.proxy(cloud, rtt_ms=10)
    edge = await places.edge(places.url(proxy.port), round_timeout_s=60)
    body = completion(temperature=1.0, seed=5, n=2, stop=["Schnee saß"], logprobs=1, max_tokens=150)
    near = (await cloud.post("/v1/completions", json=body)).json()
    cuts: list[int] = []

    def lose(verdict: Verdict) -> bool:
        """Its tokens are told after the link is back, without their log-probabilities: these are asked for."""
        lost = verdict.round == 4 and not cuts
        if lost:
            cuts.append(proxy.drop())
        return lost

    places.verifier.drop_verdict = lose
    far = (await edge.client.post("/v1/completions", json=body)).json()
    assert cuts == [1]
    assert far["choices"] == near["choices"]
    assert [choice["finish_reason"] for choice in far["choices"]] == ["stop", "stop"]
    assert far["usage"]["completion_tokens"] == near["usage"]["completion_tokens"]
    for session in (near["id"], f"{far['id']}-1"):
        again = (await cloud.post(f"/v1/streams/{session}/replay")).json()
        assert again["equal"] is True
    own = (await edge.client.post(f"/v1/streams/{far['id']}/replay")).json()
    assert (own["equal"], own["text"]) == (True, far["choices"][0]["text"])


async def test_a_link_that_stays_away_frees_the_kv_and_goes_on_when_it_is_back(places: Places) -> None:
    cloud, port = await places.gateway(link_grace_s=0.2), free_port()
    async with AsyncExitStack() as first:
        await first.enter_async_context(
            DelayProxy(("127.0.0.1", port_of(cloud)), Conditions(rtt_ms=4), port=port)
        )
        edge = await places.edge(places.url(port))
        places.verifier.pass_s = 0.05

        async def away() -> None:
            session = places.verifier.blocks[-1].session
            await first.aclose()

            async def detached() -> bool:
                return (await places.state(session)).status is SessionStatus.DETACHED

            await eventually(detached, "the session is detached")
            await eventually(
                lambda: [c for c in places.verifier.cancelled if c.session == session], "its KV is freed"
            )
            refused = await edge.client.post("/v1/completions", json=completion())
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert "link" in refused.json()["error"]["message"]
            read = await edge.client.get(f"/v1/streams/{session}")
            assert (read.status_code, read.json()["error"]["code"]) == (503, "unavailable")
            await places.proxy(cloud, port=port, rtt_ms=4)

        assert said(await disturbed(edge.client, 40, {5: away})) == truth(40)
    await eventually(lambda: ready(edge.client), "the edge is linked again")


async def test_an_edge_that_stops_detaches_its_streams_which_go_on_elsewhere(
    places: Places, unused_tcp_port: int
) -> None:
    cloud = await places.gateway()
    places.verifier.pass_s = 0.04
    environment = places.environment | {
        "OUTRIDER_GATEWAY_PORT": str(unused_tcp_port),
        "OUTRIDER_UPLINK": "link",
        "OUTRIDER_LINK": places.url(cloud),
    }
    async with (
        process(environment) as edge,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{unused_tcp_port}", timeout=20) as client,
    ):
        await eventually(lambda: up(client), "the edge is linked")
        body = completion(max_tokens=60, stream=True)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            events = await read_on(response, {4: lambda: edge.send_signal(signal.SIGTERM)})
        assert events[-1].json["error"]["code"] == "unavailable"
        assert await asyncio.wait_for(edge.wait(), 20) == 0
    session = session_of(events)
    await eventually(
        lambda: [c for c in places.verifier.cancelled if c.session == session], "the KV is freed"
    )
    assert said(events[:-1]) + said(await resume(cloud, session, events[-2].id)) == truth(60)


async def test_a_gateway_in_the_cloud_that_stops_hands_its_links_to_another(
    places: Places, settings: dict[str, Any]
) -> None:
    second = await places.gateway(gateway_name="gateway-1")
    async with AsyncExitStack() as first:
        stopping = await first.enter_async_context(run_gateway(settings))
        await eventually(lambda: ready(stopping), "the first is ready")
        edge = await places.edge(places.url(stopping), places.url(second))
        places.verifier.pass_s = 0.05
        assert said(await disturbed(edge.client, 60, {6: first.aclose})) == truth(60)
    assert "1 linked from the edge" in (await second.get("/readyz")).json()["notes"]


@pytest.mark.stack
async def test_a_gateway_in_the_cloud_that_is_killed_in_mid_stream_is_replaced_by_another(
    places: Places, unused_tcp_port: int
) -> None:
    second = await places.gateway(gateway_name="gateway-1")
    environment = places.environment | {"OUTRIDER_GATEWAY_PORT": str(unused_tcp_port)}
    async with (
        process(environment) as doomed,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{unused_tcp_port}", timeout=20) as client,
    ):
        await eventually(lambda: up(client), "the process is ready")
        edge = await places.edge(places.url(unused_tcp_port), places.url(second))
        places.verifier.pass_s = 0.05
        events = await disturbed(edge.client, 80, {8: lambda: doomed.send_signal(signal.SIGKILL)})
        assert await doomed.wait() == -signal.SIGKILL
    assert said(events) == truth(80)
    assert (await places.state(session_of(events))).epoch > 1


async def test_an_edge_without_a_cloud_says_so_and_is_ready_when_there_is_one(
    places: Places, stack: AsyncExitStack
) -> None:
    port = free_port()
    edge = await stack.enter_async_context(places.an_edge(places.url(port)))

    async def told() -> bool:
        response = await edge.client.get("/readyz")
        return response.status_code == 503 and f"ws://127.0.0.1:{port}" in response.text

    await eventually(told, "/readyz names the link")
    response = await edge.client.post("/v1/completions", json=completion())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    await places.proxy(await places.gateway(), port=port)
    await eventually(lambda: ready(edge.client), "the edge is linked")


# --- when it is slow --------------------------------------------------------------------------------------------


async def test_a_slow_link_drops_hints_and_no_verdict(places: Places) -> None:
    cloud = await places.gateway(link_slow_ms=20)
    proxy = await places.proxy(cloud)
    edge = await places.edge(places.url(proxy.port), link_timeout_s=20, round_timeout_s=60)
    await eventually(lambda: edge.uplink.round_trip, "the link is measured while it is idle")
    proxy.conditions = Conditions(bytes_per_s=3000)
    prompts = [f"{number}!" for number in range(16)]

    async def ask(prompt: str) -> str:
        answer = (await edge.client.post("/v1/completions", json=completion(prompt, max_tokens=24))).json()
        assert answer["usage"]["outrider"]["resent"] == 0, "no verdict was lost"
        return str(answer["choices"][0]["text"])

    answers = await asyncio.gather(*map(ask, prompts))
    assert answers == [truth(24, prompt.encode()) for prompt in prompts]
    lines = (await cloud.get("/metrics")).text.splitlines()
    dropped = next(line for line in lines if line.startswith('outrider_link_dropped_total{end="cloud"}'))
    assert float(dropped.split()[-1]) > 0


# --- who may ----------------------------------------------------------------------------------------------------


async def test_only_who_has_a_key_may_link_and_sees_its_own_sessions_only(
    places: Places, stack: AsyncExitStack
) -> None:
    cloud = await places.gateway(link_keys=SecretStr(f"robots={KEY},shop={OTHER_KEY}"))
    wrong = await stack.enter_async_context(places.an_edge(places.url(cloud), link_key=SecretStr("x" * 20)))

    async def refused() -> bool:
        return "401" in (await wrong.client.get("/readyz")).text

    await eventually(refused, "the wrong key is refused")
    assert "x" * 20 not in (await wrong.client.get("/readyz")).text

    robots = await places.edge(places.url(cloud), link_key=SecretStr(KEY))
    shop = await places.edge(places.url(cloud), link_key=SecretStr(OTHER_KEY))
    events = await stream(robots.client, "/v1/completions", completion())
    session = session_of(events)
    assert (await places.state(session)).tenant == "robots"
    assert said(await resume(robots.client, session, events[3].id)) == said(events[4:])
    for method, path in (("GET", f"/v1/streams/{session}"), ("DELETE", f"/v1/streams/{session}")):
        foreign = await shop.client.request(method, path)
        assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "session_not_found")

    # The same by the link itself, past what the gateway at the edge would ask.
    epoch = (await places.state(session)).epoch
    uplink = shop.uplink
    assert await uplink.state(session) is None
    received: list[Any] = []
    uplink.subscribe(session, received.append)
    mine = OpenSession(session=session, reply=uplink.reply, resume=True)
    anew = OpenSession(session=session, reply=uplink.reply, prompt=(1,), model="m")
    for forbidden in (
        uplink.open(mine, timeout_s=5),
        uplink.open(anew, timeout_s=5),
        uplink.prompt(session),
        uplink.tokens(session),
        uplink.close(CloseSession(session=session, epoch=epoch, reason="mine now")),
        uplink.send(Cancel(session=session, epoch=epoch, reason="mine now"), partition=0),
    ):
        with pytest.raises(SessionNotFound):
            await forbidden
    assert (await places.state(session)).epoch == epoch
    assert received == []


async def test_a_block_for_a_session_that_the_link_has_not_opened_goes_nowhere(places: Places) -> None:
    edge = await places.edge(places.url(await places.gateway()))
    block = Block(session="cmpl-foreign", epoch=1, reply=edge.uplink.reply, round=1, base=1, tokens=(2,))
    with pytest.raises(Unavailable):
        await edge.uplink.send(block, partition=0)
    assert places.verifier.blocks == []


async def test_what_is_no_link_is_refused_and_what_is_no_frame_ends_it_with_a_reason(places: Places) -> None:
    url = places.url(await places.gateway())
    name = {GATEWAY_HEADER: "edge.1"}
    spoken = [Subprotocol(SUBPROTOCOL)]
    with pytest.raises(InvalidStatus) as refused:
        await connect(url, additional_headers=name, proxy=None)
    assert refused.value.response.status_code == 400
    with pytest.raises(InvalidStatus) as refused:
        await connect(url, subprotocols=spoken, additional_headers={GATEWAY_HEADER: "a b"}, proxy=None)
    assert b"outrider-gateway" in (refused.value.response.body or b"")
    for wrong, reason in (
        (b"\x22\x01\x09ab", "Bind: cut short"),
        ("text", "binary"),
        (b"\x26\x00", "Troubles is nothing that goes up"),
    ):
        async with connect(
            url, subprotocols=spoken, additional_headers=name, proxy=None, compression=None
        ) as socket:
            await socket.send(wrong)
            with pytest.raises(ConnectionClosedError) as ended:
                while True:
                    await socket.recv()
            assert ended.value.rcvd is not None
            assert ended.value.rcvd.code == FAULTY and reason in ended.value.rcvd.reason


# --- two places on one machine ----------------------------------------------------------------------------------


@pytest.mark.stack
async def test_a_stack_with_a_round_trip_has_two_places_and_the_demo_talks_to_the_edge(
    places: Places, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Brokers, kv-session and verifier are those of the tests; gateways, proxy and edge are processes of the stack."""
    options = StackOptions(
        target=Path(settings["model"]),
        kafka=settings["kafka"],
        kafka_flavor=KafkaFlavor(settings["kafka_flavor"]),
        redis=settings["redis_url"],
        verifiers=0,
        kv_sessions=0,
        rtt_ms=30.0,
        environment={name: value for name, value in places.environment.items() if name.endswith("_PREFIX")},
        die_with_parent=True,
    )
    own = StackSettings(run_dir=tmp_path)
    two_places = Stack(options, settings=own)
    try:
        await asyncio.to_thread(two_places.up)
        assert two_places.gateway_url == two_places.url("edge-0")
        out = io.StringIO()
        demo = Demo(
            settings=own, options=lambda: options, prompts=["Sing!"], max_tokens=20, once=True, out=out
        )
        assert await asyncio.to_thread(demo.run) == 0, out.getvalue()
        assert "clients talk to edge-0 at the edge" in out.getvalue()
        assert "link-0: 30 ms round trip to gateway-0" in out.getvalue()
        assert "20 tokens in" in out.getvalue()
        status = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shared.cli", "status", "--run-dir", str(tmp_path)),
            stdout=asyncio.subprocess.PIPE,
        )
        told = (await status.communicate())[0].decode()
        assert status.returncode == 0, told
        shown = {line.split()[0]: line for line in told.splitlines()}
        assert list(shown) == ["kafka", "redis", "gateway-0", "link-0", "edge-0"]
        assert "30 ms round trip to gateway-0" in shown["link-0"]
        assert "1 linked from the edge" in shown["gateway-0"]
        measured = re.search(r"linked to ws://\S+, round trip ([\d.]+) ms", shown["edge-0"])
        assert measured is not None and float(measured[1]) >= 30
    finally:
        await asyncio.to_thread(two_places.down)


async def test_the_benchmark_of_the_link_counts_every_frame_and_half_the_round_trip(tmp_path: Path) -> None:
    command = ["-m", "loadtest.bench", "link", "--out", str(tmp_path), "--rtt", "20", "--frames", "40"]
    bench = await asyncio.create_subprocess_exec(sys.executable, *command)
    assert await bench.wait() == 0
    found = json.loads((tmp_path / "link.json").read_text())
    assert (found["frames"], found["lost"]) == (40, 0)
    assert min(found["up_ms"]["p50"], found["down_ms"]["p50"]) >= 10
    assert found["round_trip_ms"]["minimum_ms"] >= 20
    assert 0 < found["bytes_per_frame"]["up"] <= 24
