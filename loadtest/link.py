"""What the link costs: one-way times of its frames through a wide-area link, `scripts/bench link`.

An edge sends a block every 12 ms, as many sessions would, over the real uplink, WebSocket and relay; the cloud sends a
verdict every 12 ms at the same time. Edge, cloud and the proxy that delays are processes of their own, which read the same
monotonic clock. A frame's way is from the call that sends it to the call that hands it over at the other end; what is left
beyond half the round trip is the price of three processes and the proxy's timer.

`link.json` holds `{"rtt_ms", "jitter_ms", "interval_ms", "frames", "up_ms": {"p50", "p95", "p99"}, "down_ms": {...},
"round_trip_ms": {"last_ms", "smoothed_ms", "minimum_ms"}, "bytes_per_frame": {"up", "down"}, "lost"}`. Bytes are the
payload that the edge's socket counted, pings included; `lost` counts frames that never came.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from loadtest.hop import percentiles
from loadtest.link_cloud import every
from services.draft_gateway.link.client import LinkUplink
from services.draft_gateway.settings import GatewaySettings, UplinkKind
from services.draft_gateway.uplink import SessionMessage
from shared.errors import InvalidRequest
from shared.protocol import Block, GenerationParams, OpenSession, Tokens, Verdict
from shared.stack.health import ask
from shared.stack.ports import HOST, free_port
from shared.stack.processes import ManagedProcess

SESSION = "cmpl-0123456789abcdef0123456789abcdef"
BLOCK: Tokens = (40_001, 5, 40_003, 7, 40_005)
START_DEADLINE_S = 60.0
LATE_S = 10.0


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `frames` each way, one every `interval_ms`, after `warmup` that don't count."""

    rtt_ms: float = 50.0
    jitter_ms: float = 0.0
    interval_ms: float = 12.0
    frames: int = 1000
    warmup: int = 50

    @property
    def count(self) -> int:
        """Frames that are sent each way."""
        return self.frames + self.warmup


@dataclass(frozen=True, slots=True)
class Report:
    """What `link.json` holds; times in ms, one way but for the round trip."""

    rtt_ms: float
    jitter_ms: float
    interval_ms: float
    frames: int
    up_ms: Mapping[str, float]
    down_ms: Mapping[str, float]
    round_trip_ms: Mapping[str, float]
    bytes_per_frame: Mapping[str, float]
    lost: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What the edge saw: when it sent each block and received each verdict (ms), bytes of both, the round trip."""

    sent_ms: Mapping[int, float]
    received_ms: Mapping[int, float]
    bytes_up: int
    bytes_down: int
    round_trip_ms: Mapping[str, float]


async def measure(link: str, options: Options) -> Seen:
    """Send blocks and receive verdicts over the link."""
    uplink = LinkUplink(GatewaySettings(uplink=UplinkKind.LINK, link=link, gateway_name="bench"))
    sent_ms: dict[int, float] = {}
    received_ms: dict[int, float] = {}
    complete = asyncio.Event()

    def receive(message: SessionMessage) -> None:
        if isinstance(message, Verdict):
            received_ms[message.round] = time.monotonic() * 1000
            if message.round == options.count - 1:
                complete.set()

    await uplink.start()
    try:
        uplink.subscribe(SESSION, receive)
        params = GenerationParams(max_tokens=options.count)
        opening = OpenSession(session=SESSION, reply=uplink.reply, prompt=(1, 2, 3), params=params)
        await uplink.open(opening, timeout_s=LATE_S)
        before = uplink.traffic()
        async for number in every(options.interval_ms / 1000, options.count):
            block = Block(
                session=SESSION, epoch=1, reply=uplink.reply, round=number, base=number, tokens=BLOCK
            )
            sent_ms[number] = time.monotonic() * 1000
            await uplink.send(block, partition=0)
        async with asyncio.timeout(LATE_S):
            await complete.wait()
        await asyncio.sleep(options.rtt_ms / 1000)
        after, trip = uplink.traffic(), uplink.round_trip
        assert trip is not None
        return Seen(
            sent_ms,
            received_ms,
            after.bytes_up - before.bytes_up,
            after.bytes_down - before.bytes_down,
            asdict(trip),
        )
    finally:
        await uplink.stop()


def read_log(path: Path) -> tuple[dict[int, float], dict[int, float]]:
    """When the cloud received each block and sent each verdict, ms."""
    seen: dict[str, dict[int, float]] = {"up": {}, "down": {}}
    for line in path.read_text().splitlines():
        noted = json.loads(line)
        seen[noted["way"]][noted["round"]] = noted["ms"]
    return seen["up"], seen["down"]


def report(
    seen: Seen, arrived_ms: Mapping[int, float], left_ms: Mapping[int, float], options: Options
) -> Report:
    """The figures of all frames but the first few."""
    numbers = range(options.warmup, options.count)
    up_ms = [arrived_ms[number] - seen.sent_ms[number] for number in numbers if number in arrived_ms]
    down_ms = [seen.received_ms[number] - left_ms[number] for number in numbers if number in seen.received_ms]
    return Report(
        options.rtt_ms,
        options.jitter_ms,
        options.interval_ms,
        options.frames,
        percentiles(up_ms),
        percentiles(down_ms),
        {name: round(value, 3) for name, value in seen.round_trip_ms.items()},
        {
            "up": round(seen.bytes_up / options.count, 2),
            "down": round(seen.bytes_down / options.count, 2),
        },
        2 * options.frames - len(up_ms) - len(down_ms),
    )


@contextmanager
def parts(folder: Path, options: Options) -> Iterator[tuple[str, Path]]:
    """The cloud's end and the proxy before it, as processes; the link's URL and the cloud's log, whole afterwards."""
    cloud_port, link_port = free_port(), free_port()
    log = folder / "cloud.log"
    cloud = ManagedProcess(
        "link-cloud",
        [
            sys.executable, "-m", "loadtest.link_cloud",
            str(cloud_port), str(options.interval_ms), str(options.count), str(log),
        ],
        folder / "cloud.out",
        die_with_parent=True,
    )  # fmt: skip
    proxy = ManagedProcess(
        "delay",
        [
            sys.executable, "-m", "shared.stack.delay", "--listen", str(link_port),
            "--to", f"{HOST}:{cloud_port}", "--rtt", str(options.rtt_ms), "--jitter", str(options.jitter_ms),
        ],
        folder / "delay.out",
        die_with_parent=True,
    )  # fmt: skip
    cloud.start()
    try:
        cloud.wait_until(lambda: ask(f"http://{HOST}:{cloud_port}").ready, START_DEADLINE_S)
        proxy.start()
        try:
            proxy.wait_until(lambda: ask(f"http://{HOST}:{link_port}").ready, START_DEADLINE_S)
            yield f"ws://{HOST}:{link_port}/v1/link", log
        finally:
            proxy.stop()
    finally:
        cloud.stop()


def show(found: Report) -> str:
    """The report as lines for a person."""
    lines = [
        f"{found.frames} frames each way, one every {found.interval_ms:g} ms, through {found.rtt_ms:g} ms of round trip"
        + (f" ± {found.jitter_ms:g}" if found.jitter_ms else ""),
        f"{'':10}{'p50':>9}{'p95':>9}{'p99':>9}  ms one way",
    ]
    for name, figures in (("up", found.up_ms), ("down", found.down_ms)):
        lines.append(f"{name:10}" + "".join(f"{figures[key]:9.2f}" for key in ("p50", "p95", "p99")))
    trip = ", ".join(f"{name.removesuffix('_ms')} {value:.1f}" for name, value in found.round_trip_ms.items())
    return "\n".join(
        [
            *lines,
            f"round trip by pings, ms: {trip}",
            f"bytes a frame: {found.bytes_per_frame['up']:g} up, {found.bytes_per_frame['down']:g} down; "
            f"{found.lost} lost",
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--out", type=Path, help="folder for link.json")
    parser.add_argument("--rtt", type=float, default=50.0, help="round trip of the link, ms (default: 50)")
    parser.add_argument("--jitter", type=float, default=0.0, help="how much it varies, ms (default: 0)")
    parser.add_argument("--interval", type=float, default=12.0, help="ms between frames (default: 12)")
    parser.add_argument("--frames", type=int, default=1000, help="frames each way (default: 1000)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    options = Options(arguments.rtt, arguments.jitter, arguments.interval, arguments.frames)
    if options.frames < 2:
        raise InvalidRequest(f"--frames {options.frames}: at least 2 are needed for a figure")
    with tempfile.TemporaryDirectory(prefix="outrider-link-") as folder:
        with parts(Path(folder), options) as (link, log):
            seen = uvloop.run(measure(link, options))
        found = report(seen, *read_log(log), options)
    print(show(found))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "link.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    return 0
