"""What a draft engine is: something that continues contexts, several at a time, and never has to be right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.protocol import Tokens
from shared.sampling.rules import Rules
from shared.sampling.sparse import SparseRow


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Continue `context` (prompt, committed and assumed tokens) by at most `length` tokens, for one lane of a session.

    `beyond` asks a model also what may follow the last drafted token: one step more. `rules` say how the target draws
    its tokens, where that is not greedily: a model then draws as the target does, with the same noise, or in ratio mode with
    its own. `threshold` is then what the first row's conformal one is, None at a session's beginning.
    """

    session: str
    lane: int
    context: Tokens
    length: int
    beyond: bool = False
    rules: Rules | None = None
    threshold: float | None = None


Alternative = tuple[int, float]
"""A token and the draft engine's probability of it."""
Alternatives = tuple[tuple[Alternative, ...], ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted tokens, perhaps fewer than asked for or none, each with the engine's own probability that it is right if
    those before it are.

    `alternatives` are, for each drafted token, what might have stood in its place: a few tokens, likeliest first, the
    drafted one among them. One entry more, where asked for and found: what may follow the last token. Empty where the
    engine can't say. In ratio mode `rows` are what the tokens were drawn from, and `thresholds` the conformal ones after
    each of them; empty where none was drawn.
    """

    tokens: Tokens
    confidences: tuple[float, ...]
    alternatives: Alternatives = ()
    rows: tuple[SparseRow, ...] = ()
    thresholds: tuple[float, ...] = ()


EMPTY = Draft((), ())

Dropped = Callable[[DraftRequest], bool]


def none_dropped(request: DraftRequest) -> bool:
    """Every request is still wanted."""
    return False


Ready = Callable[[int, Draft], None]
"""Told of a request, by its number, as soon as all its tokens are there."""


def none_told(number: int, draft: Draft) -> None:
    """Nobody wants a draft before all are finished."""


class DraftEngine(Protocol):
    """Drafts for many sessions. Called by one thread at a time."""

    @property
    def name(self) -> str:
        """What it is, for logs and `/readyz`."""
        ...

    @property
    def immediate(self) -> bool:
        """Whether a draft takes so little time (some 10 µs) that no thread is worth its while."""
        ...

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        """A draft for each request, in order. Those that `dropped` says are of no more use may come back short. An engine
        that takes time tells `ready` of those that are there while it goes on with others, or looks `beyond` them."""
        ...

    def forget(self, session: str) -> None:
        """Free what is kept for a session."""
        ...
