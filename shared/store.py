"""What Redis holds of a session, and the atomic steps that change it: create, place, claim, commit, close.

Every change of more than one key is one Lua function (`store_*.lua` beside this file) over keys of one session, which
share a hash slot, so that it holds on Redis Cluster too. The store knows nothing of Kafka, placement policy or the
engine; it keeps the two promises that the rest is built on: an epoch only grows, and tokens are only appended, by whom
the epoch allows, where the base says.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from shared.errors import StaleEpoch
from shared.protocol import FinishReason, GenerationParams, ReplyRoute, Tokens

TOKEN_BYTES: Final = 4


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

    `base` counts the committed tokens; `owner` is the incarnation of the verifier process that holds its KV, or ""; a
    session whose `finish_reason` is set generates nothing more. `last_round` and `last_base` are those of the last
    commit, or -1. Times are milliseconds since the Unix epoch, by Redis' clock.
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

    @property
    def ended(self) -> bool:
        """Nothing more will be generated."""
        return self.finish_reason is not None or self.status is SessionStatus.CLOSED


@dataclass(frozen=True, slots=True)
class Claim:
    """What a verifier needs to restore a session's KV; `took_over` when another incarnation owned it (epoch + 1)."""

    state: SessionState
    prompt: Tokens
    tokens: Tokens
    took_over: bool


@dataclass(frozen=True, slots=True)
class CommitResult:
    """`base` after the commit; `repeated` when this very commit had been made before."""

    base: int
    repeated: bool


class StaleClaim(StaleEpoch):
    """The claim's epoch is older than the session's; `state` is the session as it stands."""

    def __init__(self, message: str, *, state: SessionState) -> None:
        super().__init__(message)
        self.state = state


class CommitConflict(StaleEpoch):
    """The commit changed nothing: the session has another epoch (`fenced`), another base, or has ended.

    `epoch`, `base`, `finish_reason` and `gateway` are the session's own, `tokens` what is committed since the base that
    the commit was built on (none when that base lies ahead).
    """

    def __init__(
        self,
        message: str,
        *,
        epoch: int,
        base: int,
        tokens: Tokens,
        finish_reason: FinishReason | None,
        gateway: str,
        fenced: bool,
    ) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.base = base
        self.tokens = tokens
        self.finish_reason = finish_reason
        self.gateway = gateway
        self.fenced = fenced


def pack(tokens: Tokens) -> bytes:
    """Token ids as packed unsigned 32-bit integers, little endian."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> Tokens:
    """The token ids in `packed`; ValueError when its length isn't a multiple of four bytes."""
    if len(packed) % TOKEN_BYTES:
        raise ValueError(
            f"{len(packed)} bytes are no whole number of packed tokens ({TOKEN_BYTES} bytes each)"
        )
    tokens = array("I")
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)
