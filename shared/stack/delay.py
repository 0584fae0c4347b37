"""A wide-area link for tests, demos and benchmarks: a TCP proxy that delays what passes, each way by half a round trip.

It sees the bytes that a real link would carry, so nothing that costs a round trip can hide from it; the first bytes of a
connection also wait for the handshake that a real one would have taken. It keeps the order of bytes, loses none, and cuts
connections when it is told to.

    python -m shared.stack.delay --listen 8101 --to 127.0.0.1:8100 --rtt 50 --jitter 5

Timers of asyncio's usual loop are up to 1 ms late, because epoll counts in ms; the program takes a loop over select(),
whose timers are some 0.1 ms late.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import selectors
import signal
import sys
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, cast

from shared.errors import OutriderError
from shared.stack.ports import HOST

UNLIMITED_QUEUE: Final = 4 << 20
"""Bytes on their way in one direction, where no bandwidth bounds them."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a link is like. Each direction takes `rtt_ms` / 2, give or take `jitter_ms` / 2 at random by `seed`;
    `bytes_per_s` passes at most, and `queue_bytes` may wait for that before the sender is held up."""

    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    bytes_per_s: float | None = None
    queue_bytes: int = 64 << 10
    seed: int = 0


@dataclass(slots=True)
class Counts:
    """Bytes that went from the listening side to the other (`up`) and back, and connections so far."""

    up: int = 0
    down: int = 0
    connections: int = 0


class DelayProxy:
    """Listens between entering and leaving, and passes everything to `target` and back."""

    def __init__(
        self, target: tuple[str, int], conditions: Conditions, *, port: int = 0, host: str = HOST
    ) -> None:
        self.conditions = conditions
        self.counts: Final = Counts()
        self._target = target
        self._address = (host, port)
        self._random = random.Random(conditions.seed)
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Pair(self).near, *self._address)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self.drop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def port(self) -> int:
        """The port listened on."""
        return int(self._server.sockets[0].getsockname()[1]) if self._server else self._address[1]

    def drop(self) -> int:
        """Cut every connection, with all that is on its way; how many."""
        pairs = tuple(self._pairs)
        for pair in pairs:
            pair.abort()
        return len(pairs)

    def delay_s(self) -> float:
        """How long something on its way now takes."""
        conditions = self.conditions
        jitter_ms = self._random.uniform(-conditions.jitter_ms, conditions.jitter_ms) / 2
        return max(0.0, conditions.rtt_ms / 2 + jitter_ms) / 1000

    def _connected(self, pair: _Pair) -> None:
        self.counts.connections += 1
        self._pairs.add(pair)
        task = asyncio.get_running_loop().create_task(self._connect(pair))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, pair: _Pair) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: pair.far, *self._target)
        except OSError:
            pair.abort()

    def _disconnected(self, pair: _Pair) -> None:
        self._pairs.discard(pair)


class _Pair:
    """One connection and its continuation."""

    def __init__(self, proxy: DelayProxy) -> None:
        self.proxy: Final = proxy
        self.near: Final = _Side(self, "up")
        self.far: Final = _Side(self, "down")
        self.near.other, self.far.other = self.far, self.near

    def abort(self) -> None:
        """Cut both."""
        for side in (self.near, self.far):
            side.abort()
        self.proxy._disconnected(self)

    def close(self) -> None:
        """Close both, after what was written to them."""
        for side in (self.near, self.far):
            side.close()
        self.proxy._disconnected(self)


class _Side(asyncio.Protocol):
    """One end: what it receives is written to the other when it is due."""

    other: _Side

    def __init__(self, pair: _Pair, way: str) -> None:
        self._pair = pair
        self._way = way
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._due: deque[tuple[float, bytes | None]] = deque()  # None: the end of the stream
        self._queued = 0
        self._earliest_s = 0.0
        self._free_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._held_up = False
        self._ended = False

    # --- what asyncio calls ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """This end is there."""
        self._transport = cast(asyncio.Transport, transport)
        if self is self._pair.near:
            # What the client sends first would have waited for SYN and SYN-ACK.
            self._earliest_s = self._loop.time() + self._pair.proxy.conditions.rtt_ms / 1000
            self._pair.proxy._connected(self._pair)
        else:
            self.other._set_timer()

    def data_received(self, data: bytes) -> None:
        """Bytes come in."""
        conditions, counts = self._pair.proxy.conditions, self._pair.proxy.counts
        setattr(counts, self._way, getattr(counts, self._way) + len(data))
        self._queued += len(data)
        self._append(data)
        limit = conditions.queue_bytes if conditions.bytes_per_s else UNLIMITED_QUEUE
        if self._queued > limit and self._transport is not None:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Nothing more comes from here; the other way stays open."""
        self._append(None)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """This end is gone; the other gets what was on its way, and then the end."""
        if error is not None:
            self._pair.abort()
        else:
            self._append(None)

    def pause_writing(self) -> None:
        """Whoever reads here is slower than we are."""
        self._held_up = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._held_up = False
        self.other._flush()

    # --- the delay ---------------------------------------------------------------------------------

    def _append(self, data: bytes | None) -> None:
        now_s = max(self._loop.time(), self._earliest_s)
        bytes_per_s = self._pair.proxy.conditions.bytes_per_s
        self._free_s = max(now_s, self._free_s)
        if bytes_per_s and data:
            self._free_s += len(data) / bytes_per_s
        due_s = self._free_s + self._pair.proxy.delay_s()
        if self._due:
            due_s = max(due_s, self._due[-1][0])
        self._due.append((due_s, data))
        self._set_timer()

    def _set_timer(self) -> None:
        if self._due and self._timer is None and self.other._transport is not None:
            self._timer = self._loop.call_at(self._due[0][0], self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        target, now_s = self.other._transport, self._loop.time()
        while target is not None and self._due and self._due[0][0] <= now_s and not self.other._held_up:
            _, data = self._due.popleft()
            if data is None:
                self._end(target)
                continue
            self._queued -= len(data)
            target.write(data)
        if self._transport is not None and not self._transport.is_closing() and self._queued == 0:
            self._transport.resume_reading()
        if not self.other._held_up:
            self._set_timer()

    def _end(self, target: asyncio.Transport) -> None:
        """Pass the end of this stream on; with both at their end, or this connection gone, all is over."""
        self._ended = True
        if self.other._ended or self._transport is None or self._transport.is_closing():
            self._pair.close()
        elif target.can_write_eof() and not target.is_closing():
            target.write_eof()

    def close(self) -> None:
        """Close it, after what was written to it."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Cut it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due.clear()
        if self._transport is not None:
            self._transport.abort()


# --- the program --------------------------------------------------------------------------------------------------


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no address; write HOST:PORT")
    return host or HOST, int(port)


def main(arguments: list[str] | None = None) -> int:
    """Run a proxy until SIGTERM or Ctrl-C; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m shared.stack.delay", description=__doc__)
    parser.add_argument("--listen", type=int, required=True, metavar="PORT", help="0: any; it is printed")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt", type=float, required=True, metavar="MS", help="round trip")
    parser.add_argument("--jitter", type=float, default=0.0, metavar="MS", help="default: 0")
    parser.add_argument("--bandwidth", type=float, metavar="BYTES", help="bytes a second, each way")
    parser.add_argument("--seed", type=int, default=0, help="of the jitter")
    parsed = parser.parse_args(arguments)
    conditions = Conditions(parsed.rtt, parsed.jitter, parsed.bandwidth, seed=parsed.seed)
    try:
        with asyncio.Runner(loop_factory=precise_loop) as runner:
            runner.run(_serve(DelayProxy(parsed.to, conditions, port=parsed.listen)))
    except (OSError, OutriderError) as error:
        print(f"delay: {error}", file=sys.stderr)
        return 1
    return 0


def precise_loop() -> asyncio.AbstractEventLoop:
    """A loop whose timers are some 0.1 ms late at most."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def _serve(proxy: DelayProxy) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with proxy:
        print(f"listening on {HOST}:{proxy.port}, {proxy.conditions.rtt_ms:g} ms round trip", flush=True)
        await stop.wait()
    counts = proxy.counts
    print(f"{counts.connections} connections, {counts.up} bytes up, {counts.down} bytes down", flush=True)


if __name__ == "__main__":
    sys.exit(main())
