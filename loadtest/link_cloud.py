"""The cloud's end of a link for measurements: the real relay, with a log in the place of Kafka and all behind it.

It notes when each block arrives, and from the moment that a session is opened sends it a verdict every so many ms, noting
when (ms on the machine's monotonic clock, to `OUTRIDER_LINK_LOG`). It serves no model and must never serve users. Run as
`python -m loadtest.link_cloud PORT INTERVAL_MS FRAMES LOG`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fastapi import WebSocket

from services.draft_gateway.link.server import LinkServer
from services.draft_gateway.settings import GatewaySettings
from services.draft_gateway.uplink import Receiver, RoundTrip
from shared.errors import SessionNotFound
from shared.http import Readiness, create_app, run_loop, run_service
from shared.protocol import (
    CloseSession,
    DraftsMessage,
    OpenSession,
    Placed,
    Prompt,
    ReplyRoute,
    TokenLogprobs,
    Tokens,
    Verdict,
)
from shared.session import SessionState
from shared.stack.ports import HOST
from shared.telemetry import TraceContext

VERDICT: Tokens = (40_002, 6, 40_004, 8, 40_006)


async def every(interval_s: float, count: int) -> AsyncIterator[int]:
    """The numbers from 0 to `count`, each at its time, which the ones before it don't put off."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for number in range(count):
        await asyncio.sleep(max(0.0, began_s + number * interval_s - loop.time()))
        yield number


class LoggingUplink:
    """An `Uplink` that leads nowhere: opens what is asked for, notes what is sent, makes verdicts up."""

    def __init__(self, log: TextIO, *, interval_s: float, frames: int) -> None:
        self._log = log
        self._interval_s = interval_s
        self._frames = frames
        self._receivers: dict[str, Receiver] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def _note(self, way: str, number: int) -> None:
        self._log.write(json.dumps({"way": way, "round": number, "ms": time.monotonic() * 1000}) + "\n")

    @property
    def reply(self) -> ReplyRoute:
        """Nothing comes back this way."""
        return ReplyRoute(gateway="bench", partition=0)

    @property
    def round_trip(self) -> RoundTrip | None:
        """There is no way."""
        return None

    def troubles(self) -> Sequence[str]:
        """None."""
        return ()

    def notes(self) -> Sequence[str]:
        """What it is."""
        return ("it only measures a link",)

    async def probe(self) -> None:
        """Nothing to ask."""

    async def start(self) -> None:
        """Nothing to connect to."""

    async def stop(self) -> None:
        """Send no more verdicts."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def subscribe(self, session: str, receiver: Receiver) -> None:
        """Verdicts for the session go to `receiver`."""
        self._receivers[session] = receiver

    def unsubscribe(self, session: str, receiver: Receiver) -> None:
        """No more."""
        self._receivers.pop(session, None)

    async def open(
        self, message: OpenSession, *, timeout_s: float, trace: TraceContext | None = None
    ) -> Placed:
        """Open it, and begin to send verdicts."""
        task = asyncio.create_task(self._pour(message.session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return Placed(session=message.session, epoch=1, verifier="none", partition=0, reply=message.reply)

    async def _pour(self, session: str) -> None:
        async for number in every(self._interval_s, self._frames):
            if (receiver := self._receivers.get(session)) is None:
                return
            self._note("down", number)
            receiver(
                Verdict(
                    session=session,
                    epoch=1,
                    round=number,
                    base=number,
                    accepted=4,
                    tokens=VERDICT,
                    verify_ms=60.0,
                    commit_ms=0.6,
                )
            )

    async def send(
        self, message: DraftsMessage, *, partition: int, trace: TraceContext | None = None
    ) -> None:
        """Note that it has come."""
        if isinstance(message, Prompt) or message.kind == "block":
            self._note("up", message.round)

    async def close(self, message: CloseSession) -> None:
        """Nothing to close."""

    async def state(self, session: str) -> SessionState | None:
        """Nothing is known of any session."""
        return None

    async def prompt(self, session: str) -> Tokens:
        """There is none."""
        raise SessionNotFound(f"there is no session {session}")

    async def tokens(self, session: str, since: int = 0) -> Tokens:
        """There are none."""
        raise SessionNotFound(f"there is no session {session}")

    async def logprobs(self, session: str, since: int = 0) -> tuple[TokenLogprobs, ...]:
        """There are none."""
        raise SessionNotFound(f"there is no session {session}")


@contextmanager
def _log(path: str) -> Iterator[TextIO]:
    with Path(path).open("w") as log:
        yield log


def main(arguments: Sequence[str]) -> int:
    """Relay until SIGTERM; the log is whole then."""
    port, interval_ms, frames, path = int(arguments[0]), float(arguments[1]), int(arguments[2]), arguments[3]
    logging.basicConfig(level=logging.INFO)
    with _log(path) as log:
        uplink = LoggingUplink(log, interval_s=interval_ms / 1000, frames=frames)
        links = LinkServer(GatewaySettings(), uplink)
        app = create_app("A link's cloud, for measurements", lambda: Readiness(notes=uplink.notes()))

        @app.websocket("/v1/link")
        async def link(websocket: WebSocket) -> None:
            await links.serve(websocket)

        async def serve(stop: asyncio.Event) -> None:
            await stop.wait()
            await links.stop()
            await uplink.stop()

        return run_loop(run_service(serve, app, host=HOST, port=port))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
