"""The way up: how a gateway opens sessions, sends blocks and hears of hints, verdicts and placements.

`Uplink` is all that the rest of the gateway knows of it. Inside the data centre it is Kafka and Redis
(`kafka_uplink.py`), at the edge a link to a gateway in the cloud (`link/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from shared.protocol import (
    Closed,
    CloseSession,
    DraftsMessage,
    Evicted,
    Fault,
    Floor,
    Hint,
    OpenSession,
    Placed,
    ReplyRoute,
    Stale,
    TokenLogprobs,
    Tokens,
    Verdict,
)
from shared.session import SessionState
from shared.telemetry import TraceContext

SessionMessage = Hint | Verdict | Floor | Stale | Fault | Placed | Evicted | Closed
Receiver = Callable[[SessionMessage], None]

RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """The time to the cloud and back, ms: the last measurement, the smoothed value, the least so far."""

    last_ms: float
    smoothed_ms: float
    minimum_ms: float


class Uplink(Protocol):
    """What a gateway needs of the cloud."""

    @property
    def reply(self) -> ReplyRoute:
        """Where hints and verdicts for this gateway are to be sent now. Unavailable before the first start."""
        ...

    @property
    def round_trip(self) -> RoundTrip | None:
        """The time to the cloud and back; None inside the data centre, and before the first measurement."""
        ...

    def troubles(self) -> Sequence[str]:
        """Why it can't serve now; empty when it can."""
        ...

    def notes(self) -> Sequence[str]:
        """What an operator should know of it."""
        ...

    async def probe(self) -> None:
        """Ask the broker for a sign of life; `troubles` tells the answer."""
        ...

    async def start(self) -> None:
        """Connect; raises Unavailable, and may then be tried again."""
        ...

    async def stop(self) -> None:
        """Disconnect, after what was sent has arrived."""
        ...

    def subscribe(self, session: str, receiver: Receiver) -> None:
        """Hand every message for the session to `receiver`, at once, in the order of arrival.

        Earlier receivers go on receiving until they unsubscribe: from what they get they learn who took it over.
        """
        ...

    def unsubscribe(self, session: str, receiver: Receiver) -> None:
        """Stop that."""
        ...

    async def open(
        self, message: OpenSession, *, timeout_s: float, trace: TraceContext | None = None
    ) -> Placed:
        """Open or resume a session. Raises what it was refused with, or Unavailable after `timeout_s`."""
        ...

    async def send(
        self, message: DraftsMessage, *, partition: int, trace: TraceContext | None = None
    ) -> None:
        """Send to the verifier that holds `partition`."""
        ...

    async def close(self, message: CloseSession) -> None:
        """Tell that this gateway is done with a session."""
        ...

    async def state(self, session: str) -> SessionState | None:
        """What is known of a session; None when there is none."""
        ...

    async def prompt(self, session: str) -> Tokens:
        """A session's prompt."""
        ...

    async def tokens(self, session: str, since: int = 0) -> Tokens:
        """What was committed, from position `since` on."""
        ...

    async def logprobs(self, session: str, since: int = 0) -> tuple[TokenLogprobs, ...]:
        """The log-probabilities of what was committed, from position `since` on, if the session asks for them."""
        ...
