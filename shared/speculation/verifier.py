"""The verifier side of a session: claim, verify one block at a time, commit, then answer.

Everything that changes the state of a session at the verifier lives in this file. It does no I/O and knows no clock.

    phase       waits for                          left by
    NEW         the first message                  Received → CLAIMING
    CLAIMING    Redis: who owns the session?       Claimed → PREFILLING, or PARKED (its KV is still live)
    PREFILLING  the engine's first token           EngineAnswered → COMMITTING
    PARKED      a block                            Received → VERIFYING
    VERIFYING   the engine's pass                  EngineAnswered → COMMITTING
    COMMITTING  Redis: compare, append             Committed → PARKED (and the verdict goes out) or ENDED
    ENDED       nothing: the session is forgotten here; its tokens are in Redis

One message at a time is *open*: the one whose answer is awaited. What arrives meanwhile waits (only the latest is kept:
a gateway has one open round). Nothing is published before it is committed. A commit that finds the epoch or the base
changed commits nothing: somebody else extends the session now, and this side lets go of it.

Left open for what comes next: `_park`, where a matching forward would start at once and the AR floor would take over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from shared.protocol import (
    Block,
    Cancel,
    DraftsMessage,
    ExitsMessage,
    Fault,
    FinishReason,
    Hint,
    Outcome,
    Prompt,
    ReplyRoute,
    Stale,
    Tokens,
    Verdict,
    VerdictsMessage,
)


class Phase(StrEnum):
    """What the session waits for."""

    NEW = "new"
    CLAIMING = "claiming"
    PREFILLING = "prefilling"
    PARKED = "parked"
    VERIFYING = "verifying"
    COMMITTING = "committing"
    ENDED = "ended"


# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """A message of the drafts topic for this session."""

    message: DraftsMessage


@dataclass(frozen=True, slots=True)
class Claimed:
    """Redis says that the session is ours from `epoch` on, and what was committed so far."""

    epoch: int
    committed: Tokens
    gateway: str
    last_round: int = -1
    last_base: int = -1
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A claim or a commit that the session's state in Redis forbids: it moved on without us."""

    epoch: int
    base: int
    since: int
    tokens: Tokens
    gateway: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A claim, commit or pass that could not be done. `code` is that of an `OutriderError`."""

    code: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineAnswered:
    """Tokens that the engine added; more than one step's where the reader lagged."""

    tokens: Tokens
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class ExitSeen:
    """What an early exit foresees for the pass that runs on `base`; outcomes are relative to the block submitted."""

    base: int
    layer: int
    outcomes: Sequence[Outcome]
    elapsed_ms: float


@dataclass(frozen=True, slots=True)
class Committed:
    """The tokens are in Redis."""

    base: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Free the KV: the session is idle, the operator wants it, or its partition went to another verifier."""

    reason: str


VerifierEvent = Received | Claimed | Refused | Failed | EngineAnswered | ExitSeen | Committed | Evict


# --- actions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """Ask Redis for the session, in the name of a message of `epoch`."""

    epoch: int
    gateway: str


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """Prefill prompt and committed tokens; the engine answers with the next token and parks."""

    committed: Tokens


@dataclass(frozen=True, slots=True)
class Verify:
    """Verify `tokens` after `base` committed tokens, in one pass."""

    round: int
    base: int
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Commit:
    """Compare (epoch, base) and append `tokens`."""

    epoch: int
    round: int
    base: int
    tokens: Tokens
    finish_reason: FinishReason | None
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Send an answer or a hint to the gateway."""

    message: VerdictsMessage | ExitsMessage
    route: ReplyRoute


@dataclass(frozen=True, slots=True)
class CloseEngine:
    """Abort what runs and free the KV."""


@dataclass(frozen=True, slots=True)
class Release:
    """Give the ownership back in Redis: the next verifier claims without a new epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop this session's state here."""


VerifierAction = Claim | OpenEngine | Verify | Commit | Publish | CloseEngine | Release | Forget


# --- state --------------------------------------------------------------------------------------------

_HELD: Final = (Phase.PREFILLING, Phase.PARKED, Phase.VERIFYING)
"""Phases in which the session is ours in Redis and nothing is asked of Redis."""


class VerifierSession:
    """One session, seen from the verifier. Feed it events one at a time, carry out its actions in order."""

    def __init__(self, session: str, *, max_block: int) -> None:
        self.session: Final = session
        self._max_block: Final = max_block
        self._phase = Phase.NEW
        self._epoch = 0
        self._gateway = ""
        self._committed: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._open: Prompt | Block | None = None
        self._waiting: Prompt | Block | None = None
        self._submitted = 0  # tokens of the open block that were already committed when it was submitted
        self._uncommitted: list[int] = []
        self._ending: FinishReason | None = None  # how the uncommitted tokens end the generation
        self._verdict: Verdict | None = None
        self._engine_open = False
        self._evicting: Evict | None = None

    @property
    def phase(self) -> Phase:
        """What the session waits for."""
        return self._phase

    @property
    def epoch(self) -> int:
        """The epoch in which this verifier holds the session."""
        return self._epoch

    @property
    def base(self) -> int:
        """Committed tokens."""
        return len(self._committed)

    @property
    def idle(self) -> bool:
        """Parked, with nothing to do."""
        return self._phase is Phase.PARKED

    @property
    def settled(self) -> bool:
        """Nobody waits for an answer."""
        return self._open is None and self._waiting is None

    def handle(self, event: VerifierEvent) -> list[VerifierAction]:
        """The actions that `event` calls for. Events of no use give none."""
        if self._phase is Phase.ENDED:
            return []
        return _HANDLERS[type(event)](self, event)

    # --- messages -------------------------------------------------------------------------------------

    def _received(self, event: Received) -> list[VerifierAction]:
        message = event.message
        if isinstance(message, Cancel):
            return self._cancelled(message)
        match self._phase:
            case Phase.NEW:
                return self._claim(message)
            case Phase.PARKED:
                return self._answer(message)
            case _:
                if self._open is None or not _same(message, self._open):
                    self._waiting = message
                return []

    def _claim(self, message: Prompt | Block) -> list[VerifierAction]:
        self._phase = Phase.CLAIMING
        self._open = message
        return [Claim(message.epoch, message.reply.gateway)]

    def _cancelled(self, message: Cancel) -> list[VerifierAction]:
        """Stop at once. A commit under way ends by itself: its tokens are true, only nobody waits for them."""
        asked_since = [asked.epoch for asked in (self._open, self._waiting) if asked is not None]
        if message.epoch < max(self._epoch, *asked_since, 0):
            return []
        return self._let_go(release=self._phase in _HELD or self._phase is Phase.COMMITTING)

    def _answer(self, message: Prompt | Block) -> list[VerifierAction]:
        """Answer a message while the session is parked: verify it, or say why there is nothing to verify."""
        if message.epoch > self._epoch:
            return self._claim(message)
        known = self._answer_without_pass(message)
        if known is not None:
            return [known]
        self._phase = Phase.VERIFYING
        self._open = message
        self._submitted = self.base - message.base
        return [Verify(message.round, self.base, _tokens(message)[self._submitted :])]

    def _answer_without_pass(self, message: Prompt | Block) -> Publish | None:
        """The answer to a message that leaves nothing to verify, or None.

        Draft tokens that were committed since the block's base are trimmed where they agree.
        """
        if message.epoch < self._epoch:
            return self._stale(message)
        tokens = _tokens(message)
        if message.base > self.base:
            text = f"the block builds on {message.base} committed tokens, the session has {self.base}"
            return self._fault(message, "protocol_error", text)
        if len(tokens) > self._max_block:
            text = f"a block of {len(tokens)} tokens is longer than {self._max_block}, the longest that is verified"
            return self._fault(message, "invalid_request", text)
        if self._verdict is not None and _answers(self._verdict, message):
            return Publish(self._verdict, message.reply)
        since = tuple(self._committed[message.base :])
        agrees = tokens[: len(since)] == since and (len(tokens) > len(since) or not since)
        if self._finish_reason is not None or not agrees:
            return self._stale(message)
        return None

    # --- claims ---------------------------------------------------------------------------------------

    def _claimed(self, event: Claimed) -> list[VerifierAction]:
        if self._phase is not Phase.CLAIMING:
            return []
        message = self._open
        assert message is not None
        live = self._engine_open and tuple(self._committed) == event.committed
        stopped: list[VerifierAction] = [CloseEngine()] if self._engine_open and not live else []
        self._engine_open = live
        self._epoch = event.epoch
        self._gateway = event.gateway
        self._finish_reason = event.finish_reason
        self._committed = list(event.committed)
        if live and self._uncommitted:  # the engine went on while we claimed
            self._waiting = self._waiting or message
            self._open = None
            return self._commit()
        if live:
            self._phase = Phase.PARKED
            self._open = None
            return [*self._answer(self._as_claimed(message)), *self._park()]
        self._uncommitted.clear()
        return [*stopped, *self._restore(event, message)]

    def _restore(self, event: Claimed, message: Prompt | Block) -> list[VerifierAction]:
        """Answer what asked for the claim and what waits; KV is restored when there is something to verify."""
        waiting, self._waiting = self._waiting, None
        self._verdict = self._recalled(event, message)
        known = self._answer_without_pass(self._as_claimed(message))
        if known is None:
            self._phase = Phase.PREFILLING
            self._open = self._as_claimed(message)
            self._waiting = waiting
            self._submitted = self.base - message.base
            self._engine_open = True
            return [OpenEngine(event.committed)]
        if waiting is None:
            return [known, *self._let_go(release=True)]
        if waiting.epoch > event.epoch:
            return [known, *self._claim(waiting)]
        if waiting.epoch < message.epoch:
            return [known, self._stale(waiting), *self._let_go(release=True)]
        return [known, *self._restore(event, waiting)]

    def _as_claimed(self, message: Prompt | Block) -> Prompt | Block:
        """The message that made us claim: it was current when it came, so it counts in our epoch."""
        return message.model_copy(update={"epoch": self._epoch})

    def _recalled(self, event: Claimed, message: Prompt | Block) -> Verdict | None:
        """The verdict of the last round, from what Redis says of it: a block sent twice gets the same answer."""
        if event.last_base < 0 or not (message.round == event.last_round and message.base == event.last_base):
            return None
        tokens = event.committed[event.last_base :]
        return Verdict(
            session=self.session,
            epoch=event.epoch,
            round=event.last_round,
            base=event.last_base,
            accepted=_accepted(_tokens(message), tokens),
            tokens=tokens,
            finish_reason=event.finish_reason,
        )

    # --- passes ---------------------------------------------------------------------------------------

    def _engine_answered(self, event: EngineAnswered) -> list[VerifierAction]:
        if not self._engine_open:
            return []
        self._uncommitted.extend(event.tokens)
        self._ending = event.finish_reason
        if event.finish_reason is not None:
            self._engine_open = False
        if self._phase in (Phase.COMMITTING, Phase.CLAIMING):
            return []  # a second step's tokens: committed after what is under way
        return self._commit()

    def _commit(self) -> list[VerifierAction]:
        tokens = tuple(self._uncommitted)
        drafted, accepted = 0, 0
        if self._phase is Phase.VERIFYING and self._open is not None:
            submitted = _tokens(self._open)[self._submitted :]
            drafted, accepted = len(submitted), _accepted(submitted, tokens)
        self._phase = Phase.COMMITTING
        number = self._open.round if self._open is not None else -1
        return [
            Commit(self._epoch, number, self.base, tokens, self._ending, drafted, accepted),
        ]

    def _exit_seen(self, event: ExitSeen) -> list[VerifierAction]:
        message = self._open
        if self._phase is not Phase.VERIFYING or message is None or event.base != self.base:
            return []
        outcomes = tuple(
            Outcome(
                accepted=outcome.accepted + self._submitted,
                next_token=outcome.next_token,
                confidence=outcome.confidence,
            )
            for outcome in event.outcomes
        )
        hint = Hint(
            session=self.session,
            epoch=self._epoch,
            round=message.round,
            base=message.base,
            layer=event.layer,
            outcomes=outcomes,
            elapsed_ms=event.elapsed_ms,
        )
        return [Publish(hint, message.reply)]

    # --- commits --------------------------------------------------------------------------------------

    def _commit_done(self, event: Committed) -> list[VerifierAction]:
        if self._phase is not Phase.COMMITTING:
            return []
        count = event.base - self.base
        self._committed.extend(self._uncommitted[:count])
        del self._uncommitted[:count]
        if self._uncommitted:
            return self._commit()
        self._phase = Phase.PARKED
        self._finish_reason = self._ending
        return [*self._publish_verdict(), *self._park()]

    def _publish_verdict(self) -> list[VerifierAction]:
        message, self._open = self._open, None
        if message is None or message.base > self.base:
            return []
        tokens = tuple(self._committed[message.base :])
        self._verdict = Verdict(
            session=self.session,
            epoch=self._epoch,
            round=message.round,
            base=message.base,
            accepted=_accepted(_tokens(message), tokens),
            tokens=tokens,
            finish_reason=self._finish_reason,
        )
        return [Publish(self._verdict, message.reply)]

    def _park(self) -> list[VerifierAction]:
        """Nothing is open: take up what waits (a forward or the AR floor would start here), or leave when done."""
        actions: list[VerifierAction] = []
        if self._phase is Phase.PARKED and self._waiting is not None:
            message, self._waiting = self._waiting, None
            actions += self._answer(message)
        if self._phase is Phase.PARKED and (self._evicting is not None or self._finish_reason is not None):
            actions += self._let_go(release=True)
        return actions

    # --- ends -----------------------------------------------------------------------------------------

    def _refused(self, event: Refused) -> list[VerifierAction]:
        """The session moved on without us: tell the one who waits where it stands, and let go."""
        answers: list[VerifierAction] = []
        for message in (self._open, self._waiting):
            if message is not None:
                # `event.tokens` begin at `event.since`: a message that builds on more is told from its own base on.
                stale = Stale(
                    session=self.session,
                    epoch=event.epoch,
                    round=message.round,
                    base=event.base,
                    since=event.since,
                    tokens=event.tokens,
                    gateway=event.gateway,
                    finish_reason=event.finish_reason,
                )
                answers.append(Publish(stale, message.reply))
        return [*answers, *self._let_go(release=False)]

    def _failed(self, event: Failed) -> list[VerifierAction]:
        answers: list[VerifierAction] = [
            self._fault(message, event.code, event.message, event.retry_after_s)
            for message in (self._open, self._waiting)
            if message is not None
        ]
        return [*answers, *self._let_go(release=self._phase in _HELD)]

    def _evict(self, event: Evict) -> list[VerifierAction]:
        if self._phase is Phase.PARKED:
            return self._let_go(release=True)
        self._evicting = event  # after the round that is open and what waits
        return []

    def _let_go(self, *, release: bool) -> list[VerifierAction]:
        self._phase = Phase.ENDED
        self._open = self._waiting = None
        ends: list[VerifierAction] = []
        if self._engine_open:
            ends.append(CloseEngine())
            self._engine_open = False
        if release:
            ends.append(Release(self._epoch))
        return [*ends, Forget()]

    # --- answers --------------------------------------------------------------------------------------

    def _stale(self, message: Prompt | Block) -> Publish:
        since = min(message.base, self.base)
        stale = Stale(
            session=self.session,
            epoch=self._epoch,
            round=message.round,
            base=self.base,
            since=since,
            tokens=tuple(self._committed[since:]),
            gateway=self._gateway,
            finish_reason=self._finish_reason,
        )
        return Publish(stale, message.reply)

    def _fault(
        self, message: Prompt | Block, code: str, text: str, retry_after_s: float | None = None
    ) -> Publish:
        fault = Fault(
            session=self.session,
            epoch=max(self._epoch, message.epoch),
            round=message.round,
            code=code,
            message=text,
            retry_after_s=retry_after_s,
        )
        return Publish(fault, message.reply)


def _tokens(message: Prompt | Block) -> Tokens:
    """The draft tokens of a message; a prompt is an empty block."""
    return message.tokens if isinstance(message, Block) else ()


def _accepted(block: Sequence[int], tokens: Sequence[int]) -> int:
    """Draft tokens among `tokens`, of which the last one is always counted as the target's own."""
    accepted = 0
    for drafted, said in zip(block, tokens[:-1], strict=False):
        if drafted != said:
            break
        accepted += 1
    return accepted


def _same(message: Prompt | Block, other: Prompt | Block) -> bool:
    return (message.epoch, message.round, message.base) == (other.epoch, other.round, other.base)


def _answers(verdict: Verdict, message: Prompt | Block) -> bool:
    return (verdict.round, verdict.base) == (message.round, message.base) and verdict.epoch == message.epoch


_HANDLERS: Final[Mapping[type, Callable[..., list[VerifierAction]]]] = {
    Received: VerifierSession._received,
    Claimed: VerifierSession._claimed,
    Refused: VerifierSession._refused,
    Failed: VerifierSession._failed,
    EngineAnswered: VerifierSession._engine_answered,
    ExitSeen: VerifierSession._exit_seen,
    Committed: VerifierSession._commit_done,
    Evict: VerifierSession._evict,
}
