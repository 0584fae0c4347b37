"""What a link carries, as metrics and as plain numbers: frames and their payload, up and down, and the round trip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import Counter, Gauge, Histogram

from services.draft_gateway.link.frames import of_round
from shared.telemetry import LATENCY_BUCKETS_S

End = Literal["edge", "cloud"]

BYTES = Counter(
    "outrider_link_bytes",
    "Payload of the link's frames, without WebSocket's own bytes; of rounds (blocks, forwards, verdicts, hints), and of "
    "all else (prompts, questions, pings).",
    ["end", "direction", "part"],
)
FRAMES = Counter("outrider_link_frames", "Frames on the link.", ["end", "direction"])
DROPPED = Counter("outrider_link_dropped", "Hints that were dropped because the link was slow.", ["end"])
LINKS = Gauge("outrider_links", "Links that are up.", ["end"])
LOST = Counter("outrider_links_lost", "Links that ended, for whatever reason.", ["end"])
RESUMED = Counter("outrider_link_sessions_resumed", "Sessions taken up again over a new link.")
ROUND_TRIP = Histogram(
    "outrider_link_round_trip_seconds",
    "Round trip of the link's pings.",
    ["end"],
    buckets=LATENCY_BUCKETS_S,
)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Frames and bytes of payload, from the edge (`up`) and to it (`down`); `dropped` counts hints."""

    frames_up: int
    frames_down: int
    bytes_up: int
    bytes_down: int
    dropped: int


class Tally:
    """A counter with a value that can be read."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.value = 0

    def inc(self, by: int = 1) -> None:
        """Count."""
        self.value += by
        self._counter.inc(by)


class _Bytes:
    """Bytes one way, by what they are for."""

    def __init__(self, end: End, way: str) -> None:
        self._rounds = Tally(BYTES.labels(end, way, "rounds"))
        self._rest = Tally(BYTES.labels(end, way, "rest"))

    def count(self, payload: bytes) -> None:
        (self._rounds if of_round(payload) else self._rest).inc(len(payload))

    @property
    def total(self) -> int:
        return self._rounds.value + self._rest.value


class Meter:
    """Counts at one end, over as many connections as it sees."""

    def __init__(self, end: End) -> None:
        out, back = ("up", "down") if end == "edge" else ("down", "up")
        self._end: Final = end
        self._frames_sent, self._frames_received = (Tally(FRAMES.labels(end, way)) for way in (out, back))
        self._bytes_sent, self._bytes_received = (_Bytes(end, way) for way in (out, back))
        self._round_trip = ROUND_TRIP.labels(end)
        self.dropped: Final = Tally(DROPPED.labels(end))

    def sent(self, payload: bytes) -> None:
        """A frame was handed to the socket."""
        self._frames_sent.inc()
        self._bytes_sent.count(payload)

    def received(self, payload: bytes) -> None:
        """A frame came."""
        self._frames_received.inc()
        self._bytes_received.count(payload)

    def measured(self, round_trip_ms: float) -> None:
        """A pong came."""
        self._round_trip.observe(round_trip_ms / 1000)

    def traffic(self) -> Traffic:
        """All so far."""
        sent = (self._frames_sent.value, self._bytes_sent.total)
        received = (self._frames_received.value, self._bytes_received.total)
        up, down = (sent, received) if self._end == "edge" else (received, sent)
        return Traffic(up[0], down[0], up[1], down[1], self.dropped.value)
