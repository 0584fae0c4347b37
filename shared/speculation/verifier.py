"""The verifier side of a session: claim, verify, commit, answer, and never stand still.

Everything that changes the state of a session at the verifier lives in this file. It does no I/O and knows no clock but
the times that are handed in.

    phase       waits for                          left by
    NEW         the first message                  Received → CLAIMING
    CLAIMING    Redis: who owns the session?       Claimed → PREFILLING, or PARKED (its KV is still live)
    PREFILLING  the engine's first token           EngineAnswered → PARKED
    PARKED      something to verify                a draft, or the floor → VERIFYING
    VERIFYING   the engine's pass                  EngineAnswered → PARKED
    ENDED       nothing: the session is forgotten here; its tokens are in Redis

Beside the phase, which is the engine's side, *results* are on their way to Redis, one commit at a time: when a pass
ends, the next one starts at once, while its tokens are still being committed. Nothing is published before it is
committed. A commit that finds the epoch or the base changed commits nothing: somebody else extends the session now, and
this side lets go of it.

What there is to verify are *drafts*, each a path of tokens from a base on. A block may be verified as soon as its path
agrees with what the target has said; what was said meanwhile is trimmed from its front. A forward may be verified when
the outcome that it assumes has come true. Of several, the newest goes first: its sender knew most. Under policy `latency`
what the verifier would draft itself goes before it where that promises more tokens, and behind it where it goes on with it.

With nothing to verify, the policy decides. Under `cost` the session waits. Under `latency` the *AR floor* takes over: the
target goes on by itself, with what the verifier drafts itself (by prompt lookup, or from what is left of a draft that was
refused, `Tail`), else one token a pass. It waits for a block that comes long before a pass of its own would end
(`patience_ms`), and goes on no longer than a gateway is heard from (`MOST_AHEAD`).
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from shared.errors import InvalidRequest, ProtocolError
from shared.protocol import (
    Block,
    Cancel,
    DraftsMessage,
    ExitsMessage,
    Fault,
    FinishReason,
    Floor,
    Forward,
    Hint,
    Outcome,
    Policy,
    Prompt,
    ReplyRoute,
    Stale,
    TokenLogprobs,
    Tokens,
    Verdict,
    VerdictsMessage,
)
from shared.sampling.sparse import SparseRow, decode


class Phase(StrEnum):
    """What the session waits for."""

    NEW = "new"
    CLAIMING = "claiming"
    PREFILLING = "prefilling"
    PARKED = "parked"
    VERIFYING = "verifying"
    ENDED = "ended"


MOST_AHEAD: Final = 64
"""Tokens that the floor may say beyond the last base that a gateway has named: who has gone needs no more."""
MOST_DRAFTS: Final = 32
"""Drafts kept a session; beyond it the oldest forward goes."""
MOST_PATHS: Final = 128
"""Drafts that a forward may name as its parent."""
MOST_FLOORS: Final = 4
"""Passes of its own, the newest ones, that a forward may follow."""
MOST_RESULTS: Final = 2
"""Results that may wait for Redis before no further pass is started."""
TOKEN_IDS: Final = 1 << 31
"""More than any vocabulary has: which of them are tokens is for the engine to say."""
NO_ROUND: Final = -1
"""The round of a pass that no draft asked for."""
MOST_READY: Final = 0.9
LEAST_AGREES: Final = 1e-6
"""Bounds of what `patience_ms` divides by."""
MEMORY: Final = 0.8
"""How much of a running mean is kept a step."""

FORESEEN: Final = 4
"""Tokens at the end of what was said that a draft is asked to have foreseen, at most."""
TAILS: Final = 16
"""Drafts, newest first, whose tails are looked at."""


class Tail(NamedTuple):
    """What is left of a draft, in the places that come next; of one that was refused, too, since often the target only said
    one word for another. `foreseen` are the tokens before it that the draft had right (again), in a row."""

    foreseen: int = 0
    tokens: Tokens = ()


FloorDraft = Callable[[Sequence[int], Tail, Tail], Tokens]
"""From what was said, what a refused draft goes on with, and what is left of a draft that could be verified now, to what
had best be verified: what is left of that draft, perhaps with more behind it, or what the verifier itself would draft,
which may be nothing."""


def no_draft(said: Sequence[int], tail: Tail, block: Tail) -> Tokens:
    """The floor without drafts."""
    return block.tokens


# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """A message of the drafts topic for this session."""

    message: DraftsMessage


@dataclass(frozen=True, slots=True)
class Claimed:
    """Redis says that the session is ours from `epoch` on, and what was committed so far, with its log-probabilities
    where they are told."""

    epoch: int
    committed: Tokens
    gateway: str
    last_round: int = -1
    last_base: int = -1
    finish_reason: FinishReason | None = None
    policy: Policy = Policy.COST
    logprobs: tuple[TokenLogprobs, ...] = ()


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
    """Tokens that the engine added, and one of `logprobs` for each where they are asked for; more than one step's where
    the reader lagged. `usual_ms` is what passes of as many rows take that compute no prompt besides; None where that isn't
    known."""

    tokens: Tokens
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    usual_ms: float | None = None


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


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time that `SetTimer` asked for is over."""

    timer: int


VerifierEvent = (
    Received | Claimed | Refused | Failed | EngineAnswered | ExitSeen | Committed | Evict | TimerFired
)


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
    """Verify `tokens` after the first `base` tokens that the engine has said, in one pass. `round` may be `NO_ROUND`.

    `confidences` are the draft's of these tokens, as levels, or nothing; `rows` what each was drawn from, or nothing where
    none was drawn.
    """

    round: int
    base: int
    tokens: Tokens
    confidences: tuple[int, ...] = ()
    rows: tuple[SparseRow, ...] = ()


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
    logprobs: tuple[TokenLogprobs, ...] = ()


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


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Report `TimerFired(timer)` after `delay_ms`; only the latest timer counts."""

    timer: int
    delay_ms: float


VerifierAction = Claim | OpenEngine | Verify | Commit | Publish | CloseEngine | Release | Forget | SetTimer


# --- state --------------------------------------------------------------------------------------------

_HELD: Final = (Phase.PREFILLING, Phase.PARKED, Phase.VERIFYING)
"""Phases in which the session is ours in Redis, as far as we know."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """Tokens that may follow: `path` from position `base` on, of which the first `assumed` are a forward's outcome, and
    `rows` are what the others were drawn from (or nothing)."""

    message: Prompt | Block | Forward
    base: int
    path: Tokens
    assumed: int = 0
    rows: tuple[SparseRow, ...] = ()

    @property
    def round(self) -> int:
        return self.message.round

    @property
    def asks(self) -> bool:
        """Somebody waits for an answer; a forward that comes to nothing gets none."""
        return not isinstance(self.message, Forward)

    def left(self, said: Sequence[int]) -> Tokens | None:
        """What follows all that was said since; None when the path has been left."""
        since = max(0, len(said) - self.base)
        return self.path[since:] if self.path[:since] == tuple(said[self.base :][: len(self.path)]) else None

    def drawn_from(self, said: Sequence[int], count: int) -> tuple[SparseRow, ...]:
        """The rows of the `count` tokens that follow all that was said."""
        first = len(said) - self.base - self.assumed
        return self.rows[first : first + count]

    def ready(self, said: Sequence[int]) -> bool:
        """Whether a pass can verify it now: its outcome has come true, and there is something left (or it is empty)."""
        since = len(said) - self.base
        if since < self.assumed or self.left(said) is None:
            return False
        return since < len(self.path) or (self.asks and since == len(self.path) == 0)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the engine runs: a draft's tokens, or none's."""

    base: int
    tokens: Tokens
    draft: _Draft | None = None
    since_ms: float = 0.0

    @property
    def own(self) -> Tokens:
        """Its draft's among the tokens: more may stand behind them."""
        return self.tokens[: len(self.draft.path) - (self.base - self.draft.base)] if self.draft else ()


@dataclass(frozen=True, slots=True)
class _Result:
    """What a pass said, on its way to Redis."""

    ran: _Pass
    tokens: Tokens
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True)
class _Pace:
    """What the floor's patience rests on: running means, None before the first measurement."""

    pass_ms: float | None = None
    tokens: float | None = None
    floor_ms: float | None = None
    """A pass of the floor: fewer rows than a block's."""
    floor_tokens: float | None = None
    wait_ms: float | None = None
    ready: float | None = None
    """Share of a block's passes at whose end the next draft was there already."""
    since_ms: float | None = None
    """When the engine last ended a pass and had no draft for the next one."""

    def saw_pass(self, elapsed_ms: float, tokens: int) -> None:
        self.pass_ms = _mean(self.pass_ms, elapsed_ms)
        self.tokens = _mean(self.tokens, tokens)

    def saw_floor(self, elapsed_ms: float, tokens: int) -> None:
        self.floor_ms = _mean(self.floor_ms, elapsed_ms)
        self.floor_tokens = _mean(self.floor_tokens, tokens)

    def saw_end(self, *, ready: bool) -> None:
        self.ready = _mean(self.ready, float(ready))

    def saw_draft(self, now_ms: float) -> None:
        if self.since_ms is not None:
            self.wait_ms = _mean(self.wait_ms, now_ms - self.since_ms)
            self.since_ms = None


def patience_ms(
    pass_ms: float | None,
    tokens: float | None,
    wait_ms: float | None,
    ready: float | None,
    floor_ms: float | None = None,
    floor_tokens: float | None = None,
) -> float:
    """How long to wait for a block before the floor takes over; all times in ms.

    With T a block's pass, E the tokens that it yields, w the wait, and a share h of passes at whose end the next draft is
    there, a block leads to n = 1 / (1 - h) passes, so that who waits gets

        R = E n / (w + n T)

    tokens a ms. A pass of the floor, F tokens in T', is worth F - R T' beside that: less than nothing where it is slower.
    But a block that comes meanwhile is verified at once after it, if it agrees with what was said, with probability
    a = ((E - 1) / E)^F: then no wait is left, else all of it is still to come. There are 1 / a such passes before the
    next block is verified, instead of one wait, so that waiting is worth its while where

        w R < (R T' - F) / a

    It is waited for no longer than T': whatever becomes of it, no more than one pass of the floor is lost. A block that
    takes longer is not waited for at all. Before the floor has been measured F is 1 and T' is T.
    """
    if not pass_ms or not tokens or wait_ms is None or ready is None:
        return 0.0
    alone_ms, alone = floor_ms or pass_ms, floor_tokens or 1.0
    passes = 1.0 / (1.0 - min(ready, MOST_READY))
    rate = tokens * passes / (wait_ms + passes * pass_ms)
    agrees = max(((tokens - 1.0) / tokens) ** alone, LEAST_AGREES)
    return alone_ms if wait_ms < min(alone_ms, (alone_ms - alone / rate) / agrees) else 0.0


class VerifierSession:
    """One session, seen from the verifier. Feed it events one at a time, carry out its actions in order."""

    def __init__(self, session: str, *, max_block: int, floor_draft: FloorDraft = no_draft) -> None:
        self.session: Final = session
        self._max_block: Final = max_block
        self._floor_draft: Final = floor_draft
        self._phase = Phase.NEW
        self._epoch = 0
        self._gateway = ""
        self._policy = Policy.COST
        self._said: list[int] = []  # committed tokens, then those of `_results`
        self._logprobs: list[TokenLogprobs] = []  # theirs, or none where they are not asked for
        self._results: deque[_Result] = deque()
        self._committing = False
        self._ending: FinishReason | None = None  # how what was said ends
        self._finish_reason: FinishReason | None = None  # how what is committed ends
        self._engine_open = False
        self._running: _Pass | None = None
        self._drafts: dict[int, _Draft] = {}  # by round
        self._paths: OrderedDict[int, _Draft] = OrderedDict()  # what a forward may follow
        self._floors: OrderedDict[int, Tokens] = OrderedDict()  # what the floor drafted, by base
        self._arrived: list[
            Prompt | Block | Forward
        ] = []  # during a claim, or in an epoch still to be claimed
        self._stale_later: list[Prompt | Block] = []  # to be told when what was said is committed
        self._verdict: Verdict | None = None
        self._route: ReplyRoute | None = None
        self._acknowledged = 0
        self._last_round = NO_ROUND
        self._evicting: Evict | None = None
        self._pace = _Pace()
        self._timer = 0
        self._patient = False  # the floor waits for a block
        self._judge_end = (
            False  # a block's pass has ended, and it is not known yet whether the next draft is there
        )

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
        return len(self._said) - sum(len(result.tokens) for result in self._results)

    @property
    def idle(self) -> bool:
        """Parked, with nothing to do."""
        return self._phase is Phase.PARKED and not self._results

    def waits_for(self, round: int) -> bool:
        """Whether a message of that round is still to be verified or answered here."""
        if self._phase is Phase.ENDED:
            return False
        if round in self._drafts or any(message.round == round for message in self._arrived):
            return True
        return self._under_way(round) or any(message.round == round for message in self._stale_later)

    def handle(self, event: VerifierEvent, now_ms: float = 0.0) -> list[VerifierAction]:
        """The actions that `event`, which happened at `now_ms`, calls for. Events of no use give none."""
        if self._phase is Phase.ENDED:
            return []
        return _HANDLERS[type(event)](self, event, now_ms)

    # --- messages -------------------------------------------------------------------------------------

    def _received(self, event: Received, now_ms: float) -> list[VerifierAction]:
        message = event.message
        if isinstance(message, Cancel):
            return self._cancelled(message)
        if self._phase is Phase.NEW:
            if isinstance(message, Forward):  # its parent was answered by a process that is no more
                return self._let_go(release=False)
            return self._claim([message])
        if self._phase is Phase.CLAIMING or message.epoch > self._epoch:
            self._keep_for_claim(message)
            return self._claim_newer()
        return self._take(message, now_ms)

    def _keep_for_claim(self, message: Prompt | Block | Forward) -> None:
        if not any(_same(message, other) for other in self._arrived):
            self._arrived.append(message)
            del self._arrived[:-MOST_DRAFTS]

    def _claim(self, messages: list[Prompt | Block | Forward]) -> list[VerifierAction]:
        self._phase = Phase.CLAIMING
        self._arrived = messages
        first = next(message for message in messages if not isinstance(message, Forward))
        return [Claim(first.epoch, first.reply.gateway)]

    def _claim_newer(self) -> list[VerifierAction]:
        """Ask for the session in the newer epoch, once nothing of this one is under way."""
        if self._phase is not Phase.PARKED or self._results:
            return []
        newer = [message for message in self._arrived if message.epoch > self._epoch]
        if not any(not isinstance(message, Forward) for message in newer):
            return []
        return self._claim(newer)

    def _cancelled(self, message: Cancel) -> list[VerifierAction]:
        """Stop at once. A commit under way ends by itself: its tokens are true, only nobody waits for them."""
        if message.epoch < max(self._epoch, *(each.epoch for each in self._arrived), 0):
            return []
        return self._let_go(release=self._phase in _HELD)

    def _take(self, message: Prompt | Block | Forward, now_ms: float) -> list[VerifierAction]:
        """Take in a draft of this epoch (or an older one) while the session is held here."""
        actions = self._consider(message)
        if message.epoch == self._epoch:
            self._acknowledged = max(self._acknowledged, message.base)
            self._route = message.reply
        kept = self._drafts.get(message.round)
        if kept is not None and kept.ready(self._said):
            self._pace.saw_draft(now_ms)
        return [*actions, *self._go_on(now_ms), *self._end()]

    def _consider(self, message: Prompt | Block | Forward) -> list[VerifierAction]:
        """Keep a draft that may yet be verified; answer a message that can't."""
        if isinstance(message, Forward):
            self._consider_forward(message)
            return []
        if message.epoch < self._epoch:
            return [self._stale(message)]
        try:
            self._check_length(message)
            rows = _rows(message)
        except (InvalidRequest, ProtocolError) as error:
            return [self._fault(message, error.code, error.message)]
        if self._verdict is not None and _answers(self._verdict, message):
            return [Publish(self._verdict, message.reply)]
        if self._under_way(message.round):
            return []
        draft = _Draft(message, message.base, _tokens(message), rows=rows)
        if self._ending is not None or not self._may_follow(draft):
            return self._tell_stale(message)
        self._keep(draft)
        return []

    def _check_length(self, message: Prompt | Block | Forward) -> None:
        if len(_tokens(message)) > self._max_block + MOST_AHEAD:
            raise InvalidRequest(
                f"a block of {len(_tokens(message))} tokens is longer than {self._max_block + MOST_AHEAD}, the "
                "longest that is looked at"
            )

    def _consider_forward(self, message: Forward) -> None:
        parent = self._parent(message)
        if message.epoch < self._epoch or self._under_way(message.round) or parent is None:
            return
        own = parent.path[parent.assumed :]
        try:
            self._check_length(message)
            rows = _rows(message)
        except (InvalidRequest, ProtocolError):  # nobody waits to be told
            return
        if message.accepted > len(own):
            return
        assumed = (*parent.path[: parent.assumed], *own[: message.accepted], message.next_token)
        draft = _Draft(message, parent.base, (*assumed, *message.tokens), len(assumed), rows)
        if self._ending is None and draft.left(self._said) is not None:
            self._keep(draft)

    def _parent(self, message: Forward) -> _Draft | None:
        """What a forward follows: a draft, or a pass of the floor."""
        if message.parent != message.round:
            return self._paths.get(message.parent)
        drafted = self._floors.get(message.base)
        return None if drafted is None else _Draft(message, message.base, drafted)

    def _may_follow(self, draft: _Draft) -> bool:
        left = draft.left(self._said)
        return left is not None and (bool(left) or len(self._said) <= draft.base)

    def _under_way(self, round: int) -> bool:
        return any(draft.round == round for draft in self._passing())

    def _passing(self) -> list[_Draft]:
        """Drafts whose pass runs, or has ended and is not committed yet."""
        passes = [self._running, *(result.ran for result in self._results)]
        return [ran.draft for ran in passes if ran is not None and ran.draft is not None]

    def _keep(self, draft: _Draft) -> None:
        self._drafts[draft.round] = draft
        self._paths[draft.round] = draft
        self._paths.move_to_end(draft.round)
        self._last_round = max(self._last_round, draft.round)
        if len(self._paths) > MOST_PATHS:
            self._paths.popitem(last=False)
        if len(self._drafts) > MOST_DRAFTS:
            oldest = next((number for number, kept in self._drafts.items() if not kept.asks), None)
            if oldest is not None:
                del self._drafts[oldest]

    # --- claims ---------------------------------------------------------------------------------------

    def _claimed(self, event: Claimed, now_ms: float) -> list[VerifierAction]:
        if self._phase is not Phase.CLAIMING:
            return []
        arrived, self._arrived = self._arrived, []
        committed = tuple(self._said[: self.base])
        live = self._engine_open and committed == event.committed
        stopped: list[VerifierAction] = [CloseEngine()] if self._engine_open and not live else []
        first = next(message for message in arrived if not isinstance(message, Forward))
        asked = first.epoch
        self._epoch, self._gateway, self._policy = event.epoch, event.gateway, event.policy
        self._finish_reason = event.finish_reason
        self._verdict = None
        self._route = first.reply
        self._acknowledged = first.base
        self._last_round = max(self._last_round, event.last_round)
        self._phase = Phase.PARKED
        self._drafts.clear()
        self._paths.clear()
        self._floors.clear()
        if not live:
            self._said = list(event.committed)
            self._logprobs = list(event.logprobs)
            self._results.clear()
            self._ending = event.finish_reason
            self._engine_open = False
        # What made us claim was current when it came, so it counts in our epoch.
        newer = [message for message in arrived if message.epoch > max(asked, event.epoch)]
        current = [
            message.model_copy(update={"epoch": event.epoch}) if message.epoch == asked else message
            for message in arrived
            if message not in newer
        ]
        answers: list[VerifierAction] = []
        for message in current:
            answers += self._recalled(event, message) or self._consider(message)
        self._arrived = newer
        if live:
            return [*answers, *self._commit_next(), *self._go_on(now_ms), *self._end()]
        return [*stopped, *answers, *self._restore(now_ms)]

    def _restore(self, now_ms: float) -> list[VerifierAction]:
        """Prefill where there is something to verify; the pass' token answers a message that asks for just that."""
        asking = next((draft for draft in self._drafts.values() if draft.asks), None)
        if asking is None:
            return self._claim_newer() or self._let_go(release=True)
        if not asking.path:
            del self._drafts[asking.round]
        self._running = _Pass(len(self._said), (), None if asking.path else asking, now_ms)
        self._phase = Phase.PREFILLING
        self._engine_open = True
        return [OpenEngine(tuple(self._said))]

    def _recalled(self, event: Claimed, message: Prompt | Block | Forward) -> list[VerifierAction]:
        """The verdict of the last round, from what Redis says of it: a block sent twice gets the same answer."""
        if isinstance(message, Forward) or event.last_base < 0 or message.epoch < self._epoch:
            return []
        if not (message.round == event.last_round and message.base == event.last_base):
            return []
        tokens = event.committed[event.last_base :]
        verdict = Verdict(
            session=self.session,
            epoch=event.epoch,
            round=event.last_round,
            base=event.last_base,
            accepted=_accepted(_tokens(message), tokens),
            tokens=tokens,
            finish_reason=event.finish_reason,
            logprobs=event.logprobs[event.last_base :],
        )
        return [Publish(verdict, message.reply)]

    # --- passes ---------------------------------------------------------------------------------------

    def _go_on(self, now_ms: float) -> list[VerifierAction]:
        """Start the next pass, if there is something to verify, or let the floor take over."""
        if self._phase is not Phase.PARKED or not self._engine_open or len(self._results) >= MOST_RESULTS:
            return []
        if any(message.epoch > self._epoch for message in self._arrived):
            return []
        stale = self._prune()
        ready = [
            draft
            for draft in self._drafts.values()
            if draft.ready(self._said) and (draft.asks or self._evicting is None)
        ]
        if self._judge_end:
            self._judge_end = False
            self._pace.saw_end(ready=bool(ready))
        if ready:
            draft = max(ready, key=lambda each: each.round)
            left = (draft.left(self._said) or ())[: self._max_block]
            best = self._best(draft, left)
            if best[: len(left)] != left:
                return [*stale, self._verify(None, best, now_ms)]
            del self._drafts[draft.round]
            return [*stale, self._verify(draft, best, now_ms)]
        if not self._results:
            stale += self._refuse_ahead()
        if self._evicting is not None or self._policy is Policy.COST or self._patient:
            return stale
        if self._pace.since_ms is None:
            self._pace.since_ms = now_ms
            pace = self._pace
            patience = patience_ms(
                pace.pass_ms, pace.tokens, pace.wait_ms, pace.ready, pace.floor_ms, pace.floor_tokens
            )
            if patience > 0.0:
                self._patient = True
                self._timer += 1
                return [*stale, SetTimer(self._timer, patience)]
        return [*stale, *self._floor(now_ms)]

    def _verify(self, draft: _Draft | None, tokens: Tokens, now_ms: float) -> Verify:
        self._phase = Phase.VERIFYING
        self._running = _Pass(len(self._said), tokens, draft, now_ms)
        self._patient = False
        if draft is None:
            self._floors[len(self._said)] = tokens
            if len(self._floors) > MOST_FLOORS:
                self._floors.popitem(last=False)
            return Verify(NO_ROUND, len(self._said), tokens)
        confidences = _confidences(draft.message, tokens)
        rows = draft.drawn_from(self._said, len(tokens))
        return Verify(draft.round, len(self._said), tokens, confidences, rows)

    def _floor(self, now_ms: float) -> list[VerifierAction]:
        """One pass that nobody asked for."""
        if not self._heard_from:
            return []
        own = self._floor_draft(self._said, self._tail(), Tail())
        return [self._verify(None, own[: self._max_block], now_ms)]

    def _best(self, draft: _Draft, left: Tokens) -> Tokens:
        """What to verify where `left` is what is left of a draft: that, perhaps with more behind it, or something else,
        which is the floor's then.

        A draft that was drawn from distributions is verified as it is: whether it is must not hang on what was drawn.
        """
        if self._policy is Policy.COST or self._evicting is not None or draft.rows or not self._heard_from:
            return left
        foreseen = len(self._said) - draft.base - draft.assumed
        return self._floor_draft(self._said, self._tail(), Tail(foreseen, left))[: self._max_block]

    @property
    def _heard_from(self) -> bool:
        """A gateway has named a base of late, so that the floor may go on."""
        return len(self._said) - self._acknowledged < MOST_AHEAD

    def _tail(self) -> Tail:
        """Of the drafts that reach beyond what was said, the rest of the one that has foreseen most of its end; of equals
        the newest's. One that has missed the last `FORESEEN` tokens says nothing any more."""
        best, rank = Tail(), (0, -FORESEEN)
        end = self._said[-FORESEEN:]
        for draft in itertools.islice(reversed(self._paths.values()), TAILS):
            ahead = len(self._said) - draft.base
            if not 0 < ahead < len(draft.path):
                continue
            own = draft.path[max(0, ahead - FORESEEN) : ahead]
            agrees = [drafted == said for drafted, said in zip(reversed(own), reversed(end), strict=False)]
            foreseen = _leading(agrees, True)
            missed = 0 if foreseen else _leading(agrees, False)
            if (foreseen, -missed) > rank:
                best, rank = Tail(foreseen, draft.path[ahead:]), (foreseen, -missed)
        return best

    def _timer_fired(self, event: TimerFired, now_ms: float) -> list[VerifierAction]:
        if event.timer != self._timer or not self._patient:
            return []
        self._patient = False
        return self._go_on(now_ms)

    def _prune(self) -> list[VerifierAction]:
        """Forget drafts that can't follow any more; who waits for one is told."""
        told: list[VerifierAction] = []
        for number, draft in list(self._drafts.items()):
            message = draft.message
            if isinstance(message, Forward):
                if not draft.left(self._said):
                    del self._drafts[number]
            elif not self._may_follow(draft):
                del self._drafts[number]
                told += self._tell_stale(message)
        return told

    def _refuse_ahead(self) -> list[VerifierAction]:
        """Nothing is under way that could lead to the base of a block that is ahead of the session."""
        told: list[VerifierAction] = []
        for number, draft in list(self._drafts.items()):
            if draft.base > len(self._said):
                del self._drafts[number]
                text = f"the block builds on {draft.base} committed tokens, the session has {self.base}"
                told.append(self._fault(draft.message, "protocol_error", text))
        return told

    def _engine_answered(self, event: EngineAnswered, now_ms: float) -> list[VerifierAction]:
        if not self._engine_open:
            return []
        ran = self._running or _Pass(len(self._said), ())
        if self._phase is Phase.VERIFYING:
            # A prompt that was computed beside it says nothing of what the next pass takes.
            elapsed_ms = min(now_ms - ran.since_ms, event.usual_ms or math.inf)
            if ran.draft is not None:
                self._pace.saw_pass(elapsed_ms, len(event.tokens))
                self._judge_end = True
            else:
                self._pace.saw_floor(elapsed_ms, len(event.tokens))
        self._running = None
        self._said.extend(event.tokens)
        self._logprobs.extend(event.logprobs)
        self._results.append(_Result(ran, event.tokens, event.finish_reason, event.logprobs))
        self._ending = event.finish_reason
        if event.finish_reason is not None:
            self._engine_open = False
        if self._phase is Phase.CLAIMING:  # it went on by itself: committed after the claim
            return []
        self._phase = Phase.PARKED
        return [*self._go_on(now_ms), *self._commit_next()]

    def _exit_seen(self, event: ExitSeen, now_ms: float) -> list[VerifierAction]:
        ran = self._running
        if self._phase is not Phase.VERIFYING or ran is None or event.base != ran.base or ran.draft is None:
            return []
        draft = ran.draft
        trimmed = ran.base - draft.base - draft.assumed
        hint = Hint(
            session=self.session,
            epoch=self._epoch,
            round=draft.round,
            base=draft.message.base,
            layer=event.layer,
            outcomes=tuple(
                Outcome(accepted=accepted + trimmed, next_token=next_token, confidence=min(confidence, 1.0))
                for (accepted, next_token), confidence in _within(event.outcomes, ran.own, ran.tokens).items()
            ),
            elapsed_ms=event.elapsed_ms,
        )
        return [Publish(hint, draft.message.reply)]

    # --- commits --------------------------------------------------------------------------------------

    def _commit_next(self) -> list[VerifierAction]:
        if self._committing or not self._results:
            return []
        self._committing = True
        result = self._results[0]
        ran = result.ran
        number = self._last_round if ran.draft is None else ran.draft.round
        return [
            Commit(
                self._epoch,
                number,
                self.base,
                result.tokens,
                result.finish_reason,
                len(ran.own),
                _accepted(ran.own, result.tokens),
                result.logprobs,
            )
        ]

    def _commit_done(self, event: Committed, now_ms: float) -> list[VerifierAction]:
        if not self._committing:
            return []
        self._committing = False
        result = self._results.popleft()
        self._finish_reason = result.finish_reason
        started = self._go_on(now_ms)
        told: list[VerifierAction] = [self._publish(result)]
        if not self._results:
            late, self._stale_later = self._stale_later, []
            told += [self._stale(message) for message in late]
        return [*started, *told, *self._commit_next(), *self._end()]

    def _publish(self, result: _Result) -> Publish:
        """What was committed, as the verdict of the draft that was verified, or as the floor's."""
        next_pass = self._results[0].ran if self._results else self._running  # it may have ended already
        following = next_pass.draft if next_pass is not None else None
        taken = following.round if following is not None and not following.asks else None
        alone = next_pass.tokens if next_pass is not None and following is None else ()
        ran, draft = result.ran, result.ran.draft
        if draft is None:
            floor = Floor(
                session=self.session,
                epoch=self._epoch,
                base=ran.base,
                tokens=result.tokens,
                finish_reason=result.finish_reason,
                taken=taken,
                following=alone,
                logprobs=result.logprobs,
            )
            return Publish(floor, self._reply)
        base = draft.message.base if draft.asks else ran.base
        end = ran.base + len(result.tokens)
        tokens = tuple(self._said[base:end])
        self._verdict = Verdict(
            session=self.session,
            epoch=self._epoch,
            round=draft.round,
            base=base,
            accepted=_accepted(_tokens(draft.message) if draft.asks else ran.own, tokens),
            tokens=tokens,
            finish_reason=result.finish_reason,
            taken=taken,
            following=alone,
            logprobs=tuple(self._logprobs[base:end]),
        )
        return Publish(self._verdict, draft.message.reply)

    def _end(self) -> list[VerifierAction]:
        """Leave when the generation is complete, or when the KV is wanted; claim when a newer epoch asks for it."""
        if self._phase is not Phase.PARKED or self._results:
            return []
        if self._finish_reason is not None:
            told = [
                self._stale(draft.message)
                for draft in self._drafts.values()
                if not isinstance(draft.message, Forward)
            ]
            self._drafts.clear()
            return [*told, *(self._claim_newer() or self._let_go(release=True))]
        claim = self._claim_newer()
        if claim or self._evicting is None:
            return claim
        return self._let_go(release=True)

    # --- ends -----------------------------------------------------------------------------------------

    def _asking(self) -> list[Prompt | Block | Forward]:
        """Messages whose senders wait, a forward being verified among them."""
        messages = [
            *(draft.message for draft in self._passing()),
            *(draft.message for draft in self._drafts.values() if draft.asks),
            *self._stale_later,
            *(message for message in self._arrived if not isinstance(message, Forward)),
        ]
        return list({(message.epoch, message.round): message for message in messages}.values())

    def _refused(self, event: Refused, now_ms: float) -> list[VerifierAction]:
        """The session moved on without us: tell who waits where it stands, and let go."""
        answers: list[VerifierAction] = []
        for message in self._asking():
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

    def _failed(self, event: Failed, now_ms: float) -> list[VerifierAction]:
        answers: list[VerifierAction] = [
            self._fault(message, event.code, event.message, event.retry_after_s) for message in self._asking()
        ]
        return [*answers, *self._let_go(release=self._phase in _HELD and not self._committing)]

    def _evict(self, event: Evict, now_ms: float) -> list[VerifierAction]:
        self._evicting = event  # after what runs, is being committed, or waits to be verified
        return self._end()

    def _let_go(self, *, release: bool) -> list[VerifierAction]:
        self._phase = Phase.ENDED
        self._drafts.clear()
        ends: list[VerifierAction] = []
        if self._engine_open:
            ends.append(CloseEngine())
            self._engine_open = False
        if release:
            ends.append(Release(self._epoch))
        return [*ends, Forget()]

    # --- answers --------------------------------------------------------------------------------------

    @property
    def _reply(self) -> ReplyRoute:
        assert self._route is not None
        return self._route

    def _tell_stale(self, message: Prompt | Block) -> list[VerifierAction]:
        """Say where the session stands, as soon as what was said is committed."""
        if self._results:
            self._stale_later.append(message)
            return []
        return [self._stale(message)]

    def _stale(self, message: Prompt | Block) -> Publish:
        base = self.base
        since = min(message.base, base)
        stale = Stale(
            session=self.session,
            epoch=self._epoch,
            round=message.round,
            base=base,
            since=since,
            tokens=tuple(self._said[since:base]),
            gateway=self._gateway,
            finish_reason=self._finish_reason,
        )
        return Publish(stale, message.reply)

    def _fault(
        self,
        message: Prompt | Block | Forward,
        code: str,
        text: str,
        retry_after_s: float | None = None,
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


def _within(outcomes: Sequence[Outcome], own: Tokens, tokens: Tokens) -> dict[tuple[int, int], float]:
    """Outcomes of `tokens` as those of the first of them, a sender's `own`: where more were accepted, what follows these is
    the next of `tokens`."""
    found: dict[tuple[int, int], float] = {}
    for outcome in outcomes:
        beyond = outcome.accepted > len(own)
        key = (len(own), tokens[len(own)]) if beyond else (outcome.accepted, outcome.next_token)
        found[key] = found.get(key, 0.0) + outcome.confidence
    return found


def _leading(values: Sequence[bool], value: bool) -> int:
    """How many of the first values are `value`."""
    return next((count for count, each in enumerate(values) if each is not value), len(values))


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else MEMORY * mean + (1 - MEMORY) * value


def _confidences(message: Prompt | Block | Forward, last: Tokens) -> tuple[int, ...]:
    """What a message says of the last of its tokens; nothing when it says nothing, or not of each."""
    told = () if isinstance(message, Prompt) else message.confidences
    if not last or len(told) != len(_tokens(message)) or _tokens(message)[-len(last) :] != last:
        return ()
    return told[-len(last) :]


def _rows(message: Prompt | Block | Forward) -> tuple[SparseRow, ...]:
    """What a message's tokens were drawn from; nothing where none was drawn. `ProtocolError` when it can't be read."""
    if isinstance(message, Prompt) or not message.q:
        return ()
    return decode(message.q, message.tokens, TOKEN_IDS)


def _tokens(message: Prompt | Block | Forward) -> Tokens:
    """The draft tokens of a message; a prompt is an empty block."""
    return () if isinstance(message, Prompt) else message.tokens


def _accepted(block: Sequence[int], tokens: Sequence[int]) -> int:
    """Draft tokens among `tokens`, of which the last one is always counted as the target's own."""
    accepted = 0
    for drafted, said in zip(block, tokens[:-1], strict=False):
        if drafted != said:
            break
        accepted += 1
    return accepted


def _same(message: Prompt | Block | Forward, other: Prompt | Block | Forward) -> bool:
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
    TimerFired: VerifierSession._timer_fired,
}
