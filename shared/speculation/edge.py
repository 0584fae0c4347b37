"""The edge side of a session: drafts, lanes, hints, and what the client is shown.

Everything that changes the state of a session at the edge lives in this file. It does no I/O and knows no clock:
events come in with the time at which they happened, actions go out.

    phase      waits for                      left by
    OPENING    the placement                  Opened → PREFILL or DRAFTING
    PREFILL    the first verdict              VerdictArrived → DRAFTING
    DRAFTING   the draft of the next block    Drafted → VERIFYING
    VERIFYING  the verdict                    VerdictArrived → VERIFYING (hit) or DRAFTING (late, miss)
    ENDED      nothing                        –

The algorithm is that of Venkatesha, Kundu and Panda (arXiv 2505.21594): while a block is verified, every outcome that
an early exit foresees with enough confidence starts a *lane*, a draft that assumes this outcome; the verdict picks the
lane that assumed right. Three places are left open for what comes next: `_start_lanes` (lanes from the edge's own
guesses, at the moment a block is sent), `_lane_ready` (a finished lane may be forwarded), `_length` (block length by
measurement).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from shared.protocol import Fault, FinishReason, Hint, Outcome, Stale, Tokens, Verdict


class Phase(StrEnum):
    """What the session waits for."""

    OPENING = "opening"
    PREFILL = "prefill"
    DRAFTING = "drafting"
    VERIFYING = "verifying"
    ENDED = "ended"


class Source(StrEnum):
    """Where a token that the client sees was first written: the verdict vouches for each of them."""

    ACCEPTED = "accepted"
    PREEMPTIVE = "preemptive"
    CORRECTED = "corrected"


@dataclass(frozen=True, slots=True)
class EdgeConfig:
    """How one session speculates. Lengths in tokens, times in ms."""

    gateway: str
    max_tokens: int
    block_length: int = 5
    stop_tokens: frozenset[int] = frozenset()
    hints: bool = True
    hint_threshold: float = 0.2
    max_lanes: int = 4
    round_timeout_ms: float = 2_000.0
    stall_timeout_ms: float = 120_000.0


# --- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """The session is placed; `committed` is what the target has said so far, `round` the next round's number."""

    epoch: int
    committed: Tokens = ()
    round: int = 0


@dataclass(frozen=True, slots=True)
class Relocated:
    """The session was placed anew: what is open has to be sent again."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Drafted:
    """A lane's draft is finished; it may be shorter than asked, or empty."""

    lane: int
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class HintArrived:
    """An early exit's forecast."""

    hint: Hint


@dataclass(frozen=True, slots=True)
class VerdictArrived:
    """A round's committed outcome."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class StaleArrived:
    """The verifier did nothing with a block, and says where the session stands."""

    stale: Stale


@dataclass(frozen=True, slots=True)
class FaultArrived:
    """The verifier can't answer a round."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time that `SetTimer` asked for is over."""

    timer: int


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The client has left, or the gateway stops."""


EdgeEvent = (
    Opened
    | Relocated
    | Drafted
    | HintArrived
    | VerdictArrived
    | StaleArrived
    | FaultArrived
    | TimerFired
    | Abandoned
)


# --- actions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendPrompt:
    """Ask the verifier to begin."""

    epoch: int
    round: int
    base: int


@dataclass(frozen=True, slots=True)
class SendBlock:
    """Send a block up."""

    epoch: int
    round: int
    base: int
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class StartDraft:
    """Draft at most `length` tokens after the first `base` committed tokens and then `assumed`."""

    lane: int
    base: int
    assumed: Tokens
    length: int


@dataclass(frozen=True, slots=True)
class DropDraft:
    """The lane's draft is of no more use."""

    lane: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Newly committed tokens for the client, the first of them at position `base`."""

    base: int
    tokens: Tokens
    sources: tuple[Source, ...]
    round: int


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Report `TimerFired(timer)` after `delay_ms`; only the latest timer counts."""

    timer: int
    delay_ms: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The generation is complete."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    """The generation cannot go on; `code` is that of an `OutriderError`."""

    code: str
    message: str
    retry_after_s: float | None = None


EdgeAction = SendPrompt | SendBlock | StartDraft | DropDraft | Deliver | SetTimer | Finish | Fail


# --- state -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class EdgeStatistics:
    """What speculation did in this session, since this gateway drives it. Leads in ms, one a round and layer."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    late: int = 0
    hints: int = 0
    hinted_rounds: int = 0
    lanes: int = 0
    resent: int = 0
    exit_lead_ms: dict[int, list[float]] = field(default_factory=dict)

    @property
    def tokens_per_round(self) -> float:
        """Committed tokens a verified round (the first token of a prefill aside)."""
        return self.tokens / self.rounds if self.rounds else 0.0


@dataclass(slots=True)
class _Lane:
    base: int
    assumed: Tokens
    confidence: float
    tokens: Tokens | None = None  # None while it is drafted


@dataclass(slots=True)
class _Round:
    number: int
    base: int
    tokens: Tokens
    preemptive: bool = False
    hint_ms: dict[int, float] = field(default_factory=dict)


class EdgeSession:
    """One generation, seen from the edge. Feed it events, carry out its actions in order."""

    def __init__(self, config: EdgeConfig) -> None:
        self._config: Final = config
        self._phase = Phase.OPENING
        self._epoch = 0
        self._committed: list[int] = []
        self._next_round = 0
        self._round: _Round | None = None
        self._main: int | None = None  # the lane whose draft the next block waits for
        self._lanes: dict[int, _Lane] = {}
        self._next_lane = 0
        self._timer = 0
        self._progress_ms = 0.0
        self.statistics: Final = EdgeStatistics()

    @property
    def phase(self) -> Phase:
        """What the session waits for."""
        return self._phase

    @property
    def epoch(self) -> int:
        """The session's fencing number, as far as the edge knows."""
        return self._epoch

    @property
    def base(self) -> int:
        """How many tokens are committed, as far as the edge knows."""
        return len(self._committed)

    @property
    def committed(self) -> Tokens:
        """The committed tokens."""
        return tuple(self._committed)

    def handle(self, event: EdgeEvent, now_ms: float) -> list[EdgeAction]:
        """The actions that `event`, which happened at `now_ms`, calls for. Events of no use give none."""
        if self._phase is Phase.ENDED:
            return []
        return _HANDLERS[type(event)](self, event, now_ms)

    # --- opening and moving ------------------------------------------------------------------------

    def _opened(self, event: Opened, now_ms: float) -> list[EdgeAction]:
        if self._phase is not Phase.OPENING:
            return self._relocated(Relocated(event.epoch), now_ms)
        self._epoch = event.epoch
        self._committed = list(event.committed)
        self._next_round = event.round
        self._progress_ms = now_ms
        if self._committed:
            return self._draft_next()
        self._phase = Phase.PREFILL
        self._round = _Round(self._take_round(), 0, ())
        return self._send()

    def _relocated(self, event: Relocated, now_ms: float) -> list[EdgeAction]:
        if self._phase is Phase.OPENING or event.epoch <= self._epoch:
            return []
        self._epoch = event.epoch
        return self._send_again()

    # --- drafts ------------------------------------------------------------------------------------

    def _drafted(self, event: Drafted, now_ms: float) -> list[EdgeAction]:
        lane = self._lanes.get(event.lane)
        if lane is None or lane.tokens is not None:
            return []
        lane.tokens = event.tokens
        if event.lane == self._main:
            return self._send_lane(event.lane, preemptive=bool(lane.assumed))
        return self._lane_ready(event.lane)

    def _lane_ready(self, lane: int) -> list[EdgeAction]:
        """A lane is finished before the verdict: it waits here (and could be forwarded from here)."""
        return []

    def _length(self, base: int) -> int:
        """Tokens to draft for a block on `base` committed tokens: what max_tokens leaves beside the target's own."""
        return max(0, min(self._config.block_length, self._config.max_tokens - base - 1))

    def _start(self, assumed: Tokens, confidence: float) -> tuple[int, list[EdgeAction]]:
        lane, self._next_lane = self._next_lane, self._next_lane + 1
        base = self.base if self._round is None else self._round.base
        self._lanes[lane] = _Lane(base, assumed, confidence)
        length = self._length(base + len(assumed))
        if length == 0:
            self._lanes[lane].tokens = ()
            return lane, []
        return lane, [StartDraft(lane, base, assumed, length)]

    def _draft_next(self) -> list[EdgeAction]:
        self._phase = Phase.DRAFTING
        self._round = None
        self._main, actions = self._start((), 1.0)
        return actions or self._send_lane(self._main, preemptive=False)

    def _drop(self, keep: int | None = None) -> list[EdgeAction]:
        dropped: list[EdgeAction] = [
            DropDraft(number)
            for number, lane in self._lanes.items()
            if number != keep and lane.tokens is None
        ]
        self._lanes = {number: lane for number, lane in self._lanes.items() if number == keep}
        return dropped

    # --- sending -----------------------------------------------------------------------------------

    def _take_round(self) -> int:
        taken, self._next_round = self._next_round, self._next_round + 1
        return taken

    def _send_lane(self, number: int, *, preemptive: bool) -> list[EdgeAction]:
        tokens = self._lanes[number].tokens or ()
        self._main = None
        self._lanes = {}
        self._phase = Phase.VERIFYING
        self._round = _Round(self._take_round(), self.base, tokens, preemptive=preemptive and bool(tokens))
        self.statistics.rounds += 1
        self.statistics.drafted += len(tokens)
        return [*self._send(), *self._start_lanes()]

    def _start_lanes(self) -> list[EdgeAction]:
        """Lanes that need no hint would start here, as the block goes up."""
        return []

    def _send(self, delay_ms: float | None = None) -> list[EdgeAction]:
        assert self._round is not None
        self._timer += 1
        timer = SetTimer(self._timer, self._config.round_timeout_ms if delay_ms is None else delay_ms)
        if self._phase is Phase.PREFILL:
            return [SendPrompt(self._epoch, self._round.number, self._round.base), timer]
        return [SendBlock(self._epoch, self._round.number, self._round.base, self._round.tokens), timer]

    def _send_again(self) -> list[EdgeAction]:
        if self._round is None:
            return []
        self.statistics.resent += 1
        return self._send()

    def _timer_fired(self, event: TimerFired, now_ms: float) -> list[EdgeAction]:
        if event.timer != self._timer or self._round is None:
            return []
        quiet_ms = now_ms - self._progress_ms
        if quiet_ms >= self._config.stall_timeout_ms:
            return self._fail(
                "unavailable", f"no verifier answered for {quiet_ms / 1000:.0f} s; try again later", 5.0
            )
        return self._send_again()

    # --- hints -------------------------------------------------------------------------------------

    def _hint_arrived(self, event: HintArrived, now_ms: float) -> list[EdgeAction]:
        hint, open_round = event.hint, self._round
        if (
            self._phase is not Phase.VERIFYING
            or open_round is None
            or (hint.epoch, hint.round, hint.base) != (self._epoch, open_round.number, open_round.base)
        ):
            return []
        self.statistics.hints += 1
        self.statistics.hinted_rounds += not open_round.hint_ms
        open_round.hint_ms.setdefault(hint.layer, now_ms)
        if not self._config.hints:
            return []
        return [
            action
            for outcome in hint.outcomes
            if outcome.confidence >= self._config.hint_threshold
            for action in self._assume(open_round, outcome)
        ]

    def _assume(self, open_round: _Round, outcome: Outcome) -> list[EdgeAction]:
        """Start a lane for `outcome`, in place of a less likely one where there is no room."""
        if outcome.accepted > len(open_round.tokens):
            return []
        assumed = (*open_round.tokens[: outcome.accepted], outcome.next_token)
        if self._ends(assumed) or open_round.base + len(assumed) >= self._config.max_tokens:
            return []
        for lane in self._lanes.values():
            if lane.assumed == assumed:
                lane.confidence = max(lane.confidence, outcome.confidence)
                return []
        dropped: list[EdgeAction] = []
        if len(self._lanes) >= self._config.max_lanes:
            weakest = min(self._lanes, key=lambda number: self._lanes[number].confidence, default=None)
            if weakest is None or self._lanes[weakest].confidence >= outcome.confidence:
                return []
            if self._lanes.pop(weakest).tokens is None:
                dropped = [DropDraft(weakest)]
        _, started = self._start(assumed, outcome.confidence)
        self.statistics.lanes += 1
        return [*dropped, *started]

    def _ends(self, tokens: Tokens) -> bool:
        return not self._config.stop_tokens.isdisjoint(tokens)

    # --- verdicts ----------------------------------------------------------------------------------

    def _verdict_arrived(self, event: VerdictArrived, now_ms: float) -> list[EdgeAction]:
        verdict = event.verdict
        if self._phase is Phase.OPENING or verdict.epoch < self._epoch:
            return []
        self._epoch = verdict.epoch
        answers = self._round is not None and verdict.round == self._round.number
        if answers and self._phase is Phase.VERIFYING:
            self._measure(verdict, now_ms)
        return self._advance(
            verdict.base, verdict.tokens, verdict.finish_reason, verdict.round, answers, now_ms
        )

    def _stale_arrived(self, event: StaleArrived, now_ms: float) -> list[EdgeAction]:
        stale = event.stale
        if self._phase is Phase.OPENING or stale.epoch < self._epoch:
            return []
        if stale.gateway and stale.gateway != self._config.gateway:
            return self._fail("session_taken", f"the session was taken over by {stale.gateway}")
        self._epoch = stale.epoch
        answers = self._round is not None and stale.round == self._round.number
        return self._advance(stale.since, stale.tokens, stale.finish_reason, stale.round, answers, now_ms)

    def _fault_arrived(self, event: FaultArrived, now_ms: float) -> list[EdgeAction]:
        fault = event.fault
        if self._round is None or fault.epoch < self._epoch or fault.round != self._round.number:
            return []
        quiet_ms = now_ms - self._progress_ms
        if fault.retry_after_s is not None and self._committed and quiet_ms < self._config.stall_timeout_ms:
            self._timer += 1
            return [SetTimer(self._timer, fault.retry_after_s * 1000)]
        return self._fail(fault.code, fault.message, fault.retry_after_s)

    def _measure(self, verdict: Verdict, now_ms: float) -> None:
        assert self._round is not None
        self.statistics.accepted += verdict.accepted
        for layer, hint_ms in self._round.hint_ms.items():
            self.statistics.exit_lead_ms.setdefault(layer, []).append(now_ms - hint_ms)

    def _advance(
        self,
        base: int,
        tokens: Tokens,
        finish_reason: FinishReason | None,
        number: int,
        answers: bool,
        now_ms: float,
    ) -> list[EdgeAction]:
        """Take over what was committed from position `base` on, and go on from there."""
        known = self.base - base
        if known < 0:  # an answer before this one was lost: ask again, the verifier tells what is missing
            return self._send_again() if answers else []
        if tokens[:known] != tuple(self._committed[base : base + len(tokens)]):
            return self._fail(
                "internal_error", f"the session's tokens from {base} on differ from those already delivered"
            )
        new = tokens[known:]
        if not new and finish_reason is None:
            return self._send_again() if answers and base + len(tokens) == self.base else []
        first_new = self.base
        self._committed.extend(new)
        self._progress_ms = now_ms
        self.statistics.tokens += len(new) if self._phase is not Phase.PREFILL else 0
        delivered: list[EdgeAction] = []
        if new:
            delivered = [Deliver(first_new, new, self._sources(first_new, new), number)]
        if finish_reason is not None:
            self._phase = Phase.ENDED
            return [*self._drop(), *delivered, Finish(finish_reason)]
        following = self._next()
        return [*following, *delivered]  # what goes up is not kept waiting by what is shown

    def _sources(self, first: int, tokens: Tokens) -> tuple[Source, ...]:
        """Tokens that agree with the open block were drafted, up to the first that does not; the rest was not."""
        if self._round is None:
            return (Source.CORRECTED,) * len(tokens)
        drafted = Source.PREEMPTIVE if self._round.preemptive else Source.ACCEPTED
        skipped = first - self._round.base
        agreed = 0
        if 0 <= skipped <= len(self._round.tokens):
            for token, expected in zip(tokens, self._round.tokens[skipped:], strict=False):
                if token != expected:
                    break
                agreed += 1
        return (drafted,) * agreed + (Source.CORRECTED,) * (len(tokens) - agreed)

    def _next(self) -> list[EdgeAction]:
        """Go on with the lane that assumed what was committed, or with a new draft."""
        verified = self._phase is Phase.VERIFYING
        for number, lane in self._lanes.items():
            if lane.assumed and tuple(self._committed[lane.base :]) == lane.assumed:
                dropped = self._drop(keep=number)
                if lane.tokens is None:
                    self.statistics.late += 1
                    self._phase, self._round, self._main = Phase.DRAFTING, None, number
                    return dropped
                self.statistics.hits += 1
                return [*self._send_lane(number, preemptive=True), *dropped]
        self.statistics.misses += verified
        return [*self._drop(), *self._draft_next()]

    # --- ends --------------------------------------------------------------------------------------

    def _fail(self, code: str, message: str, retry_after_s: float | None = None) -> list[EdgeAction]:
        self._phase = Phase.ENDED
        return [*self._drop(), Fail(code, message, retry_after_s)]

    def _abandoned(self, event: Abandoned, now_ms: float) -> list[EdgeAction]:
        self._phase = Phase.ENDED
        return self._drop()


_HANDLERS: Final[Mapping[type, Callable[..., list[EdgeAction]]]] = {
    Opened: EdgeSession._opened,
    Relocated: EdgeSession._relocated,
    Drafted: EdgeSession._drafted,
    HintArrived: EdgeSession._hint_arrived,
    VerdictArrived: EdgeSession._verdict_arrived,
    StaleArrived: EdgeSession._stale_arrived,
    FaultArrived: EdgeSession._fault_arrived,
    TimerFired: EdgeSession._timer_fired,
    Abandoned: EdgeSession._abandoned,
}
