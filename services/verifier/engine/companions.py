"""Whose blocks a step of patient sessions waits for, so that they share it.

A pass takes a fixed time, whoever is in it, and little more for each row. Sessions under policy `cost` have their blocks
verified whenever they come; on their own they would come one after the other, and the engine would run nearly empty passes
without a pause. Once two have shared a pass their next blocks come together as well: a wait is paid once, a pass is saved
in every round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from shared.speculation.pace import Mean

MEMORY: Final = 0.9
"""How much of the mean, and of the mean deviation from it, is kept a return."""
SPREAD: Final = 3.0
"""Mean deviations after which a block is late, and no longer waited for (some 98 of 100 normal returns are in time)."""


@dataclass(slots=True)
class Companions:
    """When sessions' next blocks come, learned from how long they took so far. Times are in seconds, on one clock."""

    _usual: Mean = field(default_factory=lambda: Mean(memory=MEMORY))
    _deviation: Mean = field(default_factory=lambda: Mean(memory=MEMORY))
    _spoke: dict[str, float] = field(default_factory=dict)

    @property
    def usual_s(self) -> float:
        """Between what a session is told and its next block, the mean of all; 0 before the first."""
        return self._usual(0.0)

    def spoke(self, key: str, now_s: float) -> None:
        """A session was told what its block came to; the next one is on its way from now on."""
        self._spoke.pop(key, None)  # the longest under way come first
        self._spoke[key] = now_s

    def returned(self, key: str, now_s: float) -> None:
        """Its next block is there."""
        since = self._spoke.pop(key, None)
        if since is None:
            return
        took = now_s - since
        self._deviation.saw(abs(took - self.usual_s) if self.usual_s else took / 2)
        self._usual.saw(took)

    def left(self, key: str) -> None:
        """It has ended."""
        self._spoke.pop(key, None)

    def wait_s(self, now_s: float, *, ready_since: list[float], sessions: int, fixed_s: float) -> float:
        """For how long a step of the blocks that are there (`ready_since`) should wait for the next one, 0 for not at all.

        That wait holds up those that are ready. Without it the next block needs a pass of its own, which takes at least
        `fixed_s` of the engine that all `sessions` share: it is waited for where the first is not more than the second.
        No block waits longer than a round usually takes on its way.
        """
        usual_s, deviation_s = self.usual_s, self._deviation(0.0)
        if not (ready_since and usual_s):
            return 0.0
        allowed_s = usual_s + SPREAD * deviation_s
        since = next((since for since in self._spoke.values() if since + allowed_s > now_s), None)
        if since is None:
            return 0.0
        expected_s = max(since + usual_s - now_s, deviation_s)
        if expected_s * len(ready_since) > fixed_s * sessions:
            return 0.0
        return max(0.0, min(since + allowed_s, min(ready_since) + usual_s) - now_s)
