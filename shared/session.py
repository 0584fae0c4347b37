"""What is known of a session: its record, as Redis holds it and as the link tells it. How it is kept is in `store.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from shared.protocol import FinishReason, GenerationParams, ReplyRoute


class SessionStatus(StrEnum):
    """Where a session is in its life. A detached one may be resumed; finished and closed ones can be replayed only."""

    OPEN = "open"
    DETACHED = "detached"
    FINISHED = "finished"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class SessionStats:
    """Rounds committed so far, draft tokens in them, and how many of those were accepted."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session's record, without its tokens.

    `base` counts the committed tokens; `owner` is the incarnation of the verifier process that holds its KV, or "". A
    session whose `finish_reason` is set generates nothing more ("cancelled" when it was closed before its end).
    `last_round` and `last_base` are those of the last commit, or -1. Times are milliseconds since the Unix epoch, by
    Redis' clock.
    """

    session: str
    status: SessionStatus
    epoch: int
    base: int
    prompt_length: int
    params: GenerationParams
    model: str
    verifier: str
    partition: int
    owner: str
    reply: ReplyRoute
    finish_reason: FinishReason | None
    last_round: int
    last_base: int
    created_ms: int
    touched_ms: int
    tenant: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    stats: SessionStats = SessionStats()
    close_reason: str = ""

    @property
    def ended(self) -> bool:
        """Nothing more will be generated."""
        return self.finish_reason is not None or self.status is SessionStatus.CLOSED
