"""Which verifiers there are, as their heartbeats tell: who is alive, who takes sessions, who holds which partition.

Pure: it knows no clock but the `now_s` handed in (any monotonic one) and does no I/O.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Set
from dataclasses import dataclass
from typing import Final

from shared.protocol import Heartbeat

# A session placed (or gone) so long before a heartbeat arrives is counted (or not) in it.
COUNTED_AFTER_S: Final = 0.1
FORGOTTEN_AFTER_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Sighting:
    """A verifier's last heartbeat, without partitions that another has named since, and when it came."""

    heartbeat: Heartbeat
    heard_s: float


class Fleet:
    """The verifiers heard of. One that is silent for `timeout_s`, or says that it stops, is gone."""

    def __init__(self, *, timeout_s: float, now_s: float) -> None:
        self.drained: Set[str] = frozenset()
        self._timeout_s = timeout_s
        self._listening_since_s = now_s
        self._seen: dict[str, Sighting] = {}
        self._placed_s: defaultdict[str, deque[float]] = defaultdict(deque)
        self._left_s: defaultdict[str, deque[float]] = defaultdict(deque)

    def hear(self, heartbeat: Heartbeat, now_s: float) -> None:
        """A heartbeat has come. The partitions it names are no one else's any more."""
        for name, sighting in self._seen.items():
            kept = tuple(each for each in sighting.heartbeat.partitions if each not in heartbeat.partitions)
            if name != heartbeat.verifier and kept != sighting.heartbeat.partitions:
                lessened = sighting.heartbeat.model_copy(update={"partitions": kept})
                self._seen[name] = Sighting(lessened, sighting.heard_s)
        self._seen[heartbeat.verifier] = Sighting(heartbeat, now_s)
        for since_s in (self._placed_s[heartbeat.verifier], self._left_s[heartbeat.verifier]):
            while since_s and since_s[0] < now_s - COUNTED_AFTER_S:
                since_s.popleft()

    def placed(self, verifier: str, now_s: float) -> None:
        """A session has been placed there; it counts until a heartbeat does."""
        self._placed_s[verifier].append(now_s)

    def left(self, verifier: str, now_s: float) -> None:
        """A session has gone from there; its place is free before a heartbeat says so."""
        self._left_s[verifier].append(now_s)

    def load(self, verifier: str) -> int:
        """Sessions with live KV there, with those just placed and without those just gone."""
        sighting = self._seen.get(verifier)
        counted = sighting.heartbeat.sessions if sighting else 0
        return max(0, counted + len(self._placed_s[verifier]) - len(self._left_s[verifier]))

    def known(self) -> list[Sighting]:
        """Every verifier heard of lately, by name, alive or not."""
        return [self._seen[name] for name in sorted(self._seen)]

    def alive(self, now_s: float) -> list[Heartbeat]:
        """The verifiers that are there, by name, ready or not."""
        return [
            sighting.heartbeat
            for sighting in self.known()
            if now_s - sighting.heard_s <= self._timeout_s and not sighting.heartbeat.stopping
        ]

    def ready(self, now_s: float) -> list[Heartbeat]:
        """The verifiers that take sessions, by name: alive, ready, with partitions, not drained."""
        return [
            heartbeat
            for heartbeat in self.alive(now_s)
            if heartbeat.ready and heartbeat.partitions and heartbeat.verifier not in self.drained
        ]

    def holder(self, partition: int, now_s: float) -> Heartbeat | None:
        """Who reads this partition of the drafts topic."""
        holders = (heartbeat for heartbeat in self.alive(now_s) if partition in heartbeat.partitions)
        return next(holders, None)

    def deaf(self, now_s: float) -> None:
        """No heartbeat could arrive until now, so that silence means nothing yet."""
        self._listening_since_s = now_s

    def settled(self, now_s: float) -> bool:
        """Whether it has listened long enough for silence to mean absence."""
        return now_s - self._listening_since_s > self._timeout_s

    def forget(self, now_s: float) -> None:
        """Drop verifiers that have been gone for long."""
        for name, sighting in list(self._seen.items()):
            if now_s - sighting.heard_s > FORGOTTEN_AFTER_S:
                del self._seen[name]
                self._placed_s.pop(name, None)
                self._left_s.pop(name, None)
