"""The way out of the engine process for what can't wait until the pass ends: hints, and the reason of a death.

A ZMQ push/pull pair over a Unix socket, beside vLLM's own sockets. Lossy by design: a sender never waits; when the
reader lags, hints are dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import zmq
import zmq.asyncio

HINTS_IN_FLIGHT: Final = 1024
_log = logging.getLogger(__name__)


class Outlook(msgspec.Struct, frozen=True, array_like=True):
    """What one exit foresees for one session: (accepted, next token, confidence), most likely first.

    `base` counts the tokens that the engine itself has generated for the session.
    """

    key: str
    base: int
    outcomes: list[tuple[int, int, float]]


class ExitMessage(msgspec.Struct, frozen=True, array_like=True, tag="exit"):
    """One exit's outlooks on all sessions of a pass, `elapsed_ms` after the pass began.

    `sent_s` is the sender's monotonic clock; `Sender.send` sets it.
    """

    layer: int
    elapsed_ms: float
    outlooks: list[Outlook]
    sent_s: float = 0.0


class FailureMessage(msgspec.Struct, frozen=True, array_like=True, tag="failure"):
    """Why the engine process is about to die: the exception's type and text."""

    kind: str
    text: str


ChannelMessage = ExitMessage | FailureMessage


class Sender:
    """The engine process's end. Not thread-safe."""

    def __init__(self, address: str) -> None:
        self.dropped = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, HINTS_IN_FLIGHT)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)

    def send(self, message: ChannelMessage) -> None:
        """Send at once or drop; what an exit foresees carries the time."""
        if isinstance(message, ExitMessage):
            message = msgspec.structs.replace(message, sent_s=time.monotonic())
        try:
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1


class Receiver:
    """The verifier's end: calls `on_message` in the event loop for whatever arrives."""

    def __init__(self, address: str, on_message: Callable[[ChannelMessage], None]) -> None:
        self._on_message = on_message
        self._decoder: msgspec.msgpack.Decoder[ChannelMessage] = msgspec.msgpack.Decoder(ChannelMessage)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, HINTS_IN_FLIGHT)
        self._socket.bind(address)
        self._task = asyncio.create_task(self._run(), name="engine-channel")

    async def _run(self) -> None:
        while True:
            receive: Awaitable[bytes] = self._socket.recv()
            frame = await receive
            try:
                self._on_message(self._decoder.decode(frame))
            except msgspec.DecodeError as error:
                _log.warning("unreadable message from the engine process dropped: %s", error)

    async def close(self) -> None:
        """Stop receiving; what is under way is lost."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.term()
