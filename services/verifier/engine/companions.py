"""Whose blocks a step of patient sessions waits for, so that they share it.

A pass takes a fixed time, whoever is in it, and little more for each row. Sessions under policy `cost` have their blocks
verified whenever they come; on their own they would come one after the other, and the engine would run nearly empty passes
without a pause. Once two have shared a pass their next blocks come together as well: a wait is paid once, a pass is saved
in every round.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

RETURNS: Final = 128
"""The last returns, by which it is judged how long the next ones take."""
LATE: Final = 0.99
"""Share of them after which a block is late, and no longer waited for."""
MOST_USUAL: Final = 3.0
"""Usual returns for which a block waits at most: a few sessions that are far away don't hold up the others. What is foreseen
returns at once, so that others take twice what is usual and more."""


@dataclass(slots=True)
class Companions:
    """When sessions' next blocks come, learned from how long they took so far. Times are in seconds, on one clock."""

    _took: deque[float] = field(default_factory=lambda: deque(maxlen=RETURNS))
    _spoke: dict[str, float] = field(default_factory=dict)
    _ended_s: float = 0.0
    """When the last pass had: whoever was in it spoke then."""
    _usual_s: float = 0.0
    _longest_s: float = 0.0
    _known: bool = True
    """Whether the two times are those of the last returns."""

    @property
    def usual_s(self) -> float:
        """Between what a session is told and its next block, the mean of the last ones; 0 before the first."""
        self._look()
        return self._usual_s

    @property
    def under_way(self) -> bool:
        """Whether any block is, of which it can be said how long it takes."""
        self._look()
        return bool(self._spoke and self._longest_s)

    def spoke(self, key: str, now_s: float) -> None:
        """A session was told what its block came to; the next one is on its way from now on."""
        self._spoke.pop(key, None)  # the longest under way come first
        self._spoke[key] = self._ended_s = now_s

    def returned(self, key: str, now_s: float) -> None:
        """Its next block is there."""
        since = self._spoke.pop(key, None)
        if since is not None:
            self._took.append(now_s - since)
            self._known = False

    def left(self, key: str) -> None:
        """It has ended."""
        self._spoke.pop(key, None)

    def _look(self) -> None:
        if not self._known:
            took = sorted(self._took)
            self._usual_s, self._longest_s = sum(took) / len(took), took[int(LATE * len(took))]
            self._known = True

    def wait_s(self, now_s: float, *, ready_since: list[float]) -> float:
        """For how long a step of the blocks and prompts that are there (`ready_since`) should wait for others, 0 for not at
        all.

        It waits until the last that are on their way should have come: some were foreseen and come at once, the others
        after a round trip and a draft. No block waits longer than others take to come, from when it could have had a pass:
        one that has missed the last pass by a little is there before the others have even been told, and a step that it
        hurried would leave some of these behind, to hurry the next. Waiting for some of them only is worth little: sessions
        fall into step with each other, or they don't.
        """
        if not (ready_since and self.under_way):
            return 0.0
        last_s = next(reversed(self._spoke.values())) + self._longest_s
        first_s = max(min(ready_since), self._ended_s)
        return max(0.0, min(last_s, first_s + MOST_USUAL * self._usual_s) - now_s)
