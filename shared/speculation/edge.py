"""The edge side of a session: drafts, lanes, forwards, hints, and what the client is shown.

Everything that changes the state of a session at the edge lives in this file. It does no I/O and knows no clock:
events come in with the time at which they happened, actions go out.

    phase      waits for                                left by
    OPENING    the placement                            Opened → PREFILL or DRAFTING
    PREFILL    the first verdict                        VerdictArrived → DRAFTING
    DRAFTING   the draft of the next block              Drafted → VERIFYING
    VERIFYING  the verdict of the open lane             VerdictArrived, FloorArrived → VERIFYING or DRAFTING
    FOLLOWING  what the target says by itself           FloorArrived → FOLLOWING or DRAFTING
    ENDED      nothing                                  –

A *lane* is a draft that assumes a path of tokens after a base. One lane is *open*: the verifier has it, as a block or as
a forward, and its verdict is awaited. As it goes up, the edge starts lanes for the outcomes that its own draft makes
likely, the likeliest first (`_expand`), and for what may follow them in turn: what is not sent before the verdict
reaches the edge may be too late on a long link. A hint says what an early exit foresees: it re-ranks the outcomes of the
lane it speaks of, which starts lanes, or stops some. A lane that is finished goes up before the verdict (`_forward`),
if it is worth its bytes. What was committed decides: lanes that assumed otherwise are dropped, and the one that came
true is open from then on. It is late if it is still being drafted, and a block if it had not been forwarded.

Under policy `latency` the verifier runs passes by itself, too, with drafts of its own, and says which (`following`). Such a
draft is open as a block is: the edge looks what it would say itself at each of its places, which makes outcomes likely, and
forwards lanes that follow them. Where the way is too long for that, beside the pass, the edge drafts a block (`_beside`).

When a lane is ready decides what it is worth. Its forward is in time, whatever the round trip, when it is drafted within
the verify time, since the block and the forward travel equally long. A lane that is ready before the verdict arrives,
within the verify time and the round trip, still saves the draft.

The paper's algorithm (Venkatesha, Kundu and Panda, arXiv 2505.21594) is this with `guesses` and `forwards` off: lanes
from hints alone, kept until the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from shared.protocol import Fault, FinishReason, Floor, Hint, Policy, Stale, Tokens, Verdict
from shared.sampling.conformal import resumed
from shared.sampling.sparse import SparseRow
from shared.speculation.outcomes import Foresight, Guess, Ranked, guess, level, logit, mix, sigmoid
from shared.speculation.pace import (
    TYPICAL,
    Clocks,
    Common,
    Mean,
    Rate,
    best_length,
    lanes_in,
    least_worth,
    thrifty_length,
)


class Phase(StrEnum):
    """What the session waits for."""

    OPENING = "opening"
    PREFILL = "prefill"
    DRAFTING = "drafting"
    VERIFYING = "verifying"
    FOLLOWING = "following"
    ENDED = "ended"


class Source(StrEnum):
    """Where a token that the client sees was first written: the verdict vouches for each of them."""

    ACCEPTED = "accepted"
    PREEMPTIVE = "preemptive"
    CORRECTED = "corrected"


class Origin(StrEnum):
    """What a lane started from."""

    NEED = "need"
    """The next block had to be drafted."""
    GUESS = "guess"
    EXIT = "exit"


@dataclass(frozen=True, slots=True)
class EdgeConfig:
    """How one session speculates. Lengths in tokens, times in ms.

    `guesses` starts lanes as a block goes up, `hints` from what exits foresee, `forwards` sends them before the verdict;
    `adaptive` chooses the length of each block by measurement, `block_length` at most. `policy` is the verifier's for
    this session: whether it goes on by itself.
    """

    gateway: str
    max_tokens: int
    block_length: int = 5
    adaptive: bool = False
    stop_tokens: frozenset[int] = frozenset()
    policy: Policy = Policy.COST
    hints: bool = True
    guesses: bool = False
    forwards: bool = False
    lane_threshold: float = 0.05
    max_lanes: int = 4
    forwards_per_token: float = 0.6
    foresight: Foresight = field(default_factory=Foresight)
    round_timeout_ms: float = 2_000.0
    stall_timeout_ms: float = 120_000.0
    round_trip_ms: float | None = None
    """What the link measures: without the waits for a pass under way that blocks have. None where nothing measures it."""
    common: Common | None = None
    """What sessions have learned together; None for a session that learns alone."""


LANES_KEPT: Final = 24
"""Lanes a session keeps, finished ones included; the least likely go first."""
OUTCOMES: Final = 8
"""Outcomes of a lane that are looked at."""
MOST_AHEAD: Final = 24
"""Tokens drafted beyond a block, for what the floor will have said when it arrives."""
SURER: Final = 1.5
"""By how much likelier an outcome must be for a lane to be stopped in its favour."""
CREDIT: Final = 8.0
"""Forwards that may be saved up."""
AGREED: Final = 0.9
APART: Final = 0.2
"""How often a token of the floor's draft is right where the edge would have said the same one, or another; rounded from
1,758 places in answers of the pair that ships."""
SHORTEST: Final = 2
"""Tokens of a lane beside a pass of the floor, at least: fewer lanes are drafted rather than shorter ones."""
HOPS_MS: Final = 10.0
"""What a message takes beside the link, there and back."""
OWN: Final = 0.9
"""How much of its own acceptance a session keeps a token; it starts from that of all, so that a first block that is
refused at once does not end its drafts."""
ACKNOWLEDGE: Final = 24
"""A gateway that only follows shows after so many tokens that it is there."""
RESTS: Final = (16, 128)
"""Tokens to follow, at first and at most, before a draft that was of no use is tried again."""

# The likeliest token's place in a lane's alternatives and the probability it has there.
Alternatives = tuple[tuple[tuple[int, float], ...], ...]


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
    """A lane's draft is finished; it may be shorter than asked, or empty. The rest is the engine's, see `Draft`.

    It may come twice: as soon as its tokens are there, and again with what may follow the last of them.
    """

    lane: int
    tokens: Tokens
    confidences: tuple[float, ...] = ()
    alternatives: Alternatives = ()
    rows: tuple[SparseRow, ...] = ()
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class HintArrived:
    """An early exit's forecast."""

    hint: Hint


@dataclass(frozen=True, slots=True)
class VerdictArrived:
    """A round's committed outcome."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class FloorArrived:
    """What the target said by itself, committed."""

    floor: Floor


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
    | FloorArrived
    | StaleArrived
    | FaultArrived
    | TimerFired
    | Abandoned
)


def arrived(message: Verdict | Floor | Hint | Stale | Fault) -> EdgeEvent:
    """What a verifier's message is to the edge."""
    match message:
        case Verdict():
            return VerdictArrived(message)
        case Floor():
            return FloorArrived(message)
        case Hint():
            return HintArrived(message)
        case Stale():
            return StaleArrived(message)
        case Fault():
            return FaultArrived(message)


# --- actions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendPrompt:
    """Ask the verifier to begin."""

    epoch: int
    round: int
    base: int


@dataclass(frozen=True, slots=True)
class SendBlock:
    """Send a block up. `confidences` are the draft's, as levels, one a token or none at all; `rows` what each token was
    drawn from, or nothing where none was drawn."""

    epoch: int
    round: int
    base: int
    tokens: Tokens
    confidences: tuple[int, ...] = ()
    rows: tuple[SparseRow, ...] = ()


@dataclass(frozen=True, slots=True)
class SendForward:
    """Send a lane up that follows `parent`'s outcome (`accepted`, `next_token`)."""

    epoch: int
    round: int
    base: int
    parent: int
    accepted: int
    next_token: int
    tokens: Tokens
    confidences: tuple[int, ...] = ()
    rows: tuple[SparseRow, ...] = ()


@dataclass(frozen=True, slots=True)
class StartDraft:
    """Draft at most `length` tokens after the first `base` committed tokens and then `assumed`.

    `beyond` asks also what may follow the last one. `threshold` is the conformal one that the first row starts from
    (`shared.sampling.conformal`), None where no row has been made yet.
    """

    lane: int
    base: int
    assumed: Tokens
    length: int
    beyond: bool = False
    threshold: float | None = None


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


EdgeAction = (
    SendPrompt | SendBlock | SendForward | StartDraft | DropDraft | Deliver | SetTimer | Finish | Fail
)


# --- state -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class EdgeStatistics:
    """What speculation did in this session, since this gateway drives it. Leads in ms, one a round and layer.

    `rounds` were verified; `passes` are those and the floor's. Of the lanes that came true, `hits` were finished (`taken`
    before the verdict, by the verifier), `late` were not; `misses` are rounds that no lane had foreseen.
    """

    rounds: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    floor_tokens: int = 0
    hits: int = 0
    hits_by_guess: int = 0
    hits_by_exit: int = 0
    taken: int = 0
    misses: int = 0
    late: int = 0
    hints: int = 0
    hinted_rounds: int = 0
    lanes: int = 0
    forwards: int = 0
    drafted_in_all: int = 0
    resent: int = 0
    verify_ms: float = 0.0
    exit_lead_ms: dict[int, list[float]] = field(default_factory=dict)

    @property
    def tokens_per_round(self) -> float:
        """Committed tokens a verified round (the first token of a prefill and the floor's aside)."""
        return (self.tokens - self.floor_tokens) / self.rounds if self.rounds else 0.0


@dataclass(slots=True)
class _Lane:
    """A draft that assumes `assumed` after the first `base` tokens; `tokens` is None while it is drafted."""

    number: int
    base: int
    assumed: Tokens
    probability: float
    origin: Origin
    started_ms: float
    parent: int | None = None
    """The lane whose outcome it assumes."""
    outcome: tuple[int, int] = (0, 0)
    tokens: Tokens | None = None
    confidences: tuple[float, ...] = ()
    alternatives: Alternatives = ()
    rows: tuple[SparseRow, ...] = ()
    threshold: float | None = None
    """The conformal threshold of its first row."""
    thresholds: tuple[float, ...] = ()
    """Those after each of its rows."""
    round: int | None = None
    """By what number the verifier knows it."""
    sent_ms: float | None = None
    """When it went up as a block."""
    guess: Guess | None = None
    """What the draft itself makes likely, where it can say."""
    hints: dict[int, tuple[tuple[int, int, float], ...]] = field(default_factory=dict)
    """What exits foresee, by layer."""
    ranking: tuple[Ranked, ...] = ()
    hint_ms: dict[int, float] = field(default_factory=dict)
    looks: dict[int, int] = field(default_factory=dict)
    """Of a pass that the verifier runs by itself, whose draft these tokens are: the looks at what may stand at each of its
    places, and behind it, that are still to come; place by number."""
    alone: bool = False
    """It is the draft of a pass that the verifier runs by itself."""

    @property
    def path(self) -> Tokens:
        return (*self.assumed, *(self.tokens or ()))

    def threshold_after(self, accepted: int) -> float | None:
        """The conformal threshold for what follows `accepted` of its tokens and another one."""
        return resumed(self.threshold, self.thresholds, accepted)

    def levels(self) -> tuple[int, ...]:
        """How sure the draft was of its tokens, as it travels."""
        return tuple(level(confidence) for confidence in self.confidences)

    def left(self, committed: Sequence[int]) -> Tokens | None:
        """What of its path follows `committed`; None when that has left the path."""
        since = len(committed) - self.base
        path = self.path
        return path[since:] if path[:since] == tuple(committed[self.base :][: len(path)]) else None

    def came_true(self, committed: Sequence[int]) -> bool:
        """All that it assumes is committed."""
        return len(committed) - self.base >= len(self.assumed) and self.left(committed) is not None


class EdgeSession:
    """One generation, seen from the edge. Feed it events, carry out its actions in order."""

    def __init__(self, config: EdgeConfig) -> None:
        self._config: Final = config
        self._phase = Phase.OPENING
        self._epoch = 0
        self._committed: list[int] = []
        self._next_round = 0
        self._prompt_round = 0
        self._open: _Lane | None = None
        self._main: int | None = None  # the lane whose draft the next block waits for
        self._lanes: dict[int, _Lane] = {}  # all but the open one
        self._next_lane = 0
        self._timer = 0
        self._progress_ms = 0.0
        self._credit = CREDIT / 2
        self._acknowledged = 0
        self._rest, self._resting = 0, RESTS[0]
        self._rested = False
        self._missed = Mean()
        self._rate = Rate()
        self._threshold: float | None = None  # after the rows of what is committed
        common = config.common or Common()
        self._sharers = common.sharers
        self._draft_acceptance = common.acceptance
        self._acceptance = Mean(common.acceptance(TYPICAL), memory=OWN)
        self._exits = common.exits
        self._rivals = common.rivals
        self._round_trip = Mean()
        self._alone = Mean()  # a pass that the verifier runs by itself, ms
        self._pass = common.pass_ms
        self._step = common.step_ms
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
            return self._draft_next(now_ms)
        self._phase = Phase.PREFILL
        self._prompt_round = self._take_round()
        return self._ask()

    def _relocated(self, event: Relocated, now_ms: float) -> list[EdgeAction]:
        if self._phase is Phase.OPENING or event.epoch <= self._epoch:
            return []
        self._enter(event.epoch)
        return self._ask_again()

    def _enter(self, epoch: int) -> None:
        """In a new epoch the verifier knows of no forward sent before, and runs another pass."""
        if epoch > self._epoch:
            self._epoch = epoch
            for lane in self._lanes.values():
                lane.round = None
            if self._open is not None and self._open.alone:
                self._open.looks.clear()
                self._open.ranking = ()
                for lane in self._lanes.values():
                    lane.parent = None if lane.parent == self._open.number else lane.parent

    # --- drafts ------------------------------------------------------------------------------------

    def _drafted(self, event: Drafted, now_ms: float) -> list[EdgeAction]:
        if self._open is not None and event.lane in self._open.looks:
            return self._looked(self._open, event, now_ms)
        lane = self._lane(event.lane)
        if lane is None:
            return []
        if lane.tokens is not None:
            return self._seen_beyond(lane, event, now_ms)
        if event.tokens:
            beside = sum(other.started_ms == lane.started_ms for other in self._lanes.values())
            self._step.saw(beside, (now_ms - lane.started_ms) / len(event.tokens))
        lane.tokens, lane.confidences, lane.alternatives = event.tokens, event.confidences, event.alternatives
        lane.rows, lane.thresholds = event.rows, event.thresholds
        self.statistics.drafted_in_all += len(event.tokens)
        self._cut(lane)
        if event.lane == self._main:
            return self._use(lane, now_ms)
        return [*self._forward(lane), *self._expand(now_ms)]

    # --- beside a pass of the floor ----------------------------------------------------------------

    def _beside(self, following: Tokens, now_ms: float) -> list[EdgeAction] | None:
        """Draft beside a pass that the verifier runs by itself, to verify `following`: what may come of it is guessed as the
        outcome of a block is. None where that would be too late."""
        config = self._config
        way_ms = config.round_trip_ms
        if not (config.guesses and config.forwards and self._floor_is_rival) or way_ms is None:
            return None
        places = min(len(following), config.block_length) + 1
        places = min(places, config.max_tokens - self.base - 1)
        look_ms = self._step(max(1, places))
        left_ms = self._alone(self._pass(self._sharers(1.0))) - way_ms - HOPS_MS - look_ms
        if self._rest > 0 or places < 1 or left_ms <= SHORTEST * self._step(1) or not self._best_length():
            return None
        number, self._next_lane = self._next_lane, self._next_lane + 1
        lane = _Lane(
            number,
            self.base,
            (),
            1.0,
            Origin.NEED,
            now_ms,
            threshold=self._threshold,
            tokens=following,
            alone=True,
        )
        stopped: list[EdgeAction] = []
        if self._open is not None:
            stopped += [DropDraft(look) for look in self._open.looks]
            if not self._open.alone and self._open.left(self._committed):  # it may be verified yet
                self._lanes[self._open.number] = self._open
        stopped += self._drop([each for each in self._lanes.values() if not self._moved(each, lane)])
        self._make_open(lane)
        actions: list[EdgeAction] = []
        for place in range(places):
            if not config.stop_tokens.isdisjoint(following[:place]):
                break
            look, self._next_lane = self._next_lane, self._next_lane + 1
            lane.looks[look] = place
            actions.append(StartDraft(look, self.base, following[:place], 1, False, self._threshold))
        lane.alternatives = ((),) * len(lane.looks)
        if self.base - self._acknowledged >= ACKNOWLEDGE:
            self._acknowledged = self.base
            actions.append(SendBlock(self._epoch, self._take_round(), self.base, ()))
        ready = [action for each in list(self._lanes.values()) for action in self._forward(each)]
        return [*ready, *stopped, *actions, self._later()]

    def _moved(self, lane: _Lane, parent: _Lane) -> bool:
        """Keep a lane beside another pass, if its path goes on from what is committed: as it is where the verifier knows of
        it, or of the lane that it follows, else as one that follows the pass."""
        if lane.left(self._committed) is None:
            return False
        follows = self._lanes.get(lane.parent) if lane.parent is not None else None
        if lane.round is not None or (follows is not None and follows.round is not None):
            return True
        since = self.base - lane.base
        if since > len(lane.assumed):
            if lane.tokens is None:
                return False
            self._rebase(lane)
        else:
            lane.base, lane.assumed = self.base, lane.assumed[since:]
        lane.parent = parent.number
        return True

    def _looked(self, lane: _Lane, event: Drafted, now_ms: float) -> list[EdgeAction]:
        """What may stand at one place of the floor's draft is known."""
        place = lane.looks.pop(event.lane)
        self.statistics.drafted_in_all += len(event.tokens)
        seen = list(lane.alternatives)
        seen[place] = event.alternatives[0] if event.alternatives else ()
        lane.alternatives = tuple(seen)
        if lane.looks:
            return []
        names = zip(lane.tokens or (), lane.alternatives, strict=False)
        lane.confidences = tuple(self._floor_right(token, alternatives) for token, alternatives in names)
        lane.ranking = self._guess(lane)
        return self._expand(now_ms)

    def _floor_right(self, token: int, alternatives: Sequence[tuple[int, float]]) -> float:
        """How likely the floor's draft is right where the edge's own likeliest tokens are these."""
        return AGREED if alternatives and alternatives[0][0] == token else APART

    def _seen_beyond(self, lane: _Lane, event: Drafted, now_ms: float) -> list[EdgeAction]:
        """What may follow the last token of a draft that is in use already."""
        own = lane.tokens or ()
        whole = bool(own) and event.tokens[-len(own) :] == own and len(event.alternatives) > len(event.tokens)
        if not whole or len(lane.alternatives) != len(own):
            return []
        lane.alternatives = (*lane.alternatives, event.alternatives[-1])
        if lane.round is None or not self._config.guesses:
            return []
        lane.ranking = self._guess(lane)
        self._mix_in_hints(lane)
        self._reweigh()
        return self._expand(now_ms)

    def _cut(self, lane: _Lane) -> None:
        """Keep of a draft what is worth verifying: tokens that are likely enough to be reached and accepted.

        What their rows have to bring rests on the rate at which tokens came: the acceptance of those that were kept would
        promise too much. Where blocks are padded a token that is left out saves no row.
        """
        if not self._config.adaptive or self._pass.padded or len(lane.confidences) != len(lane.tokens or ()):
            return
        accept, share = self._config.foresight.own.accept, 1.0
        least = least_worth(self._rate(), self._pass, self._sharers(1.0))
        for kept, confidence in enumerate(lane.confidences):
            share *= sigmoid(accept(logit(confidence)))
            if share < least:
                self._shorten(lane, max(kept, 1) if lane.origin is Origin.NEED else kept)
                return

    @staticmethod
    def _shorten(lane: _Lane, length: int) -> None:
        """Keep the first `length` tokens; what may stand after them is known."""
        lane.tokens, lane.confidences = (lane.tokens or ())[:length], lane.confidences[:length]
        lane.alternatives = lane.alternatives[: length + 1]
        lane.rows, lane.thresholds = lane.rows[:length], lane.thresholds[:length]

    def _use(self, lane: _Lane, now_ms: float) -> list[EdgeAction]:
        """The draft that was waited for is there: send it up as far as it is still ahead of what was committed."""
        left = lane.left(self._committed)
        if left or (left is not None and not lane.tokens and self._config.policy is Policy.COST):
            return self._send_block(lane, now_ms)
        del self._lanes[lane.number]
        if left is not None and not lane.tokens:
            return self._follow()
        self._rivals.overtaken()
        self._judge(lane)
        return self._draft_next(now_ms)

    def _start(
        self,
        base: int,
        assumed: Tokens,
        length: int,
        now_ms: float,
        *,
        probability: float,
        origin: Origin,
        threshold: float | None,
    ) -> tuple[_Lane, list[EdgeAction]]:
        number, self._next_lane = self._next_lane, self._next_lane + 1
        lane = self._lanes[number] = _Lane(
            number, base, assumed, probability, origin, now_ms, threshold=threshold
        )
        if length == 0:
            lane.tokens = ()
            return lane, []
        return lane, [StartDraft(number, base, assumed, length, self._config.guesses, threshold)]

    def _draft_next(self, now_ms: float) -> list[EdgeAction]:
        """Draft a block on what is committed, or only follow where none is worth its while."""
        self._open = None
        if self._rest > 0:
            return self._follow()
        length = self._room(self.base, self._best_length())
        if length and self._config.policy is Policy.LATENCY:
            length = self._room(self.base, length + self._ahead(length))
        if length == 0 and self._config.policy is Policy.LATENCY:
            return self._follow()
        self._phase = Phase.DRAFTING
        lane, actions = self._start(
            self.base, (), length, now_ms, probability=1.0, origin=Origin.NEED, threshold=self._threshold
        )
        self._main = lane.number
        return actions or self._send_block(lane, now_ms)

    def _room(self, position: int, length: int) -> int:
        """`length`, as far as max_tokens leaves it beside the target's own token."""
        return max(0, min(length, self._config.max_tokens - position - 1))

    def _best_length(self) -> int:
        longest = self._config.block_length
        if not self._config.adaptive or not longest:
            return longest
        worth_it = best_length(self._clocks(), longest) and not self._rivals.better_alone
        if self._config.policy is Policy.COST or worth_it:
            self._rested, self._resting = False, RESTS[0]
            return self._length()
        if self._rested:  # only a draft can tell whether drafts have become better
            self._rested = False
            return longest
        self._rested = True
        self._rest, self._resting = self._resting, min(2 * self._resting, RESTS[1])
        return 0

    def _length(self) -> int:
        """Tokens to draft for a block, or for a lane that may become one.

        Under policy `latency` the target goes on meanwhile, so that a draft is as long as it may be: which of its tokens
        are worth their rows is known once they are there (`_cut`). Under `cost` it is the verifier's time that is saved.
        """
        longest = self._config.block_length
        if not self._config.adaptive or self._config.policy is Policy.LATENCY:
            return max(1, longest)
        return thrifty_length(self._clocks(), longest)

    def _clocks(self) -> Clocks:
        return Clocks(
            acceptance=self._acceptance(TYPICAL),
            pass_ms=self._pass,
            sharers=self._sharers(1.0),
            draft_ms=self._step(1),
            round_trip_ms=self._round_trip(0.0),
            missed=self._missed(0.5),
            floor=self._config.policy is Policy.LATENCY,
            padded=self._pass.padded,
        )

    def _ahead(self, length: int) -> int:
        """Tokens that the floor will have said when a block of `length` arrives: drafted as well, to be trimmed."""
        pass_ms = self._pass(self._sharers(1.0))
        late_ms = self._round_trip(0.0) + length * self._step(1)
        if pass_ms <= 0.0 or late_ms < pass_ms:  # a pass that the block would find running is waited with
            return 0
        return min(MOST_AHEAD, math.ceil(late_ms * (self._rivals.floor() or 1.0 / pass_ms)))

    def _follow(self) -> list[EdgeAction]:
        """Draft nothing: the target goes on by itself."""
        self._phase = Phase.FOLLOWING
        self._main = None
        if self.base - self._acknowledged < ACKNOWLEDGE:
            return [self._later()]
        return self._ask()

    # --- sending -----------------------------------------------------------------------------------

    def _take_round(self) -> int:
        taken, self._next_round = self._next_round, self._next_round + 1
        return taken

    def _send_block(self, lane: _Lane, now_ms: float) -> list[EdgeAction]:
        """Send a lane up that came true, less what is committed of it."""
        self._rebase(lane)
        lane.round, lane.sent_ms = self._take_round(), now_ms
        lane.ranking = self._guess(lane)
        self._make_open(lane)
        return [*self._ask(), *self._expand(now_ms)]

    def _rebase(self, lane: _Lane) -> None:
        gone = self.base - lane.base - len(lane.assumed)
        lane.tokens = (lane.tokens or ())[gone:]
        lane.confidences, lane.alternatives = lane.confidences[gone:], lane.alternatives[gone:]
        if gone > 0:
            lane.threshold = lane.threshold_after(gone - 1)
        lane.rows, lane.thresholds = lane.rows[gone:], lane.thresholds[gone:]
        lane.base, lane.assumed = self.base, ()

    def _make_open(self, lane: _Lane) -> None:
        self._lanes.pop(lane.number, None)
        self._open, self._main, self._phase = lane, None, Phase.VERIFYING

    def _ask(self) -> list[EdgeAction]:
        """Send what an answer is waited for, and wait."""
        self._acknowledged = self.base
        if self._phase is Phase.PREFILL:
            return [SendPrompt(self._epoch, self._prompt_round, 0), self._later()]
        lane = self._open
        if lane is not None and lane.round is not None:
            # As it was, however much of it is committed by now: forwards and hints of its round count from its start.
            start = lane.base + len(lane.assumed)
            return [
                SendBlock(self._epoch, lane.round, start, lane.tokens or (), self._levels(lane), lane.rows),
                self._later(),
            ]
        return [SendBlock(self._epoch, self._take_round(), self.base, ()), self._later()]

    def _levels(self, lane: _Lane) -> tuple[int, ...]:
        """How sure the draft was, for the exits; nothing where nobody listens to them."""
        return lane.levels() if self._config.hints else ()

    def _later(self, delay_ms: float | None = None) -> SetTimer:
        self._timer += 1
        return SetTimer(self._timer, self._config.round_timeout_ms if delay_ms is None else delay_ms)

    def _ask_again(self) -> list[EdgeAction]:
        if self._phase is Phase.DRAFTING:
            return []
        self.statistics.resent += 1
        return self._ask()

    def _timer_fired(self, event: TimerFired, now_ms: float) -> list[EdgeAction]:
        if event.timer != self._timer or self._phase is Phase.DRAFTING:
            return []
        quiet_ms = now_ms - self._progress_ms
        if quiet_ms >= self._config.stall_timeout_ms:
            return self._fail(
                "unavailable", f"no verifier answered for {quiet_ms / 1000:.0f} s; try again later", 5.0
            )
        return self._ask_again()

    def _forward(self, lane: _Lane) -> list[EdgeAction]:
        """Send a finished lane up before the verdict, if the verifier knows what it follows and it is worth its bytes."""
        parent = self._lane(lane.parent)
        if (
            not self._config.forwards
            or lane.round is not None
            or not lane.tokens
            or parent is None
            or (parent.round is None and not parent.alone)
            or self._credit < 1.0
            or lane.probability < self._config.lane_threshold
        ):
            return []
        accepted = self._accepted(lane, parent) if not parent.alone else self._leave(lane, parent)
        if accepted < 0 or not lane.tokens:
            return []
        self._credit -= 1.0
        self._acknowledged = self.base
        self.statistics.forwards += 1
        lane.round = self._take_round()
        lane.ranking = self._guess(lane)
        return [
            SendForward(
                self._epoch,
                lane.round,
                self.base,
                lane.round if parent.round is None else parent.round,
                accepted,
                lane.assumed[-1],
                lane.tokens,
                self._levels(lane),
                lane.rows,
            )
        ]

    @staticmethod
    def _leave(lane: _Lane, parent: _Lane) -> int:
        """How far a lane goes with the floor's draft; it assumes from then on that it leaves it there. -1 where it can't."""
        path, theirs = lane.path, parent.path
        agreed = next(
            (place for place, (own, other) in enumerate(zip(path, theirs, strict=False)) if own != other),
            min(len(path), len(theirs)),
        )
        more = agreed + 1 - len(lane.assumed)
        if more < 0 or agreed >= len(path):
            return -1
        if more:
            lane.threshold = lane.threshold_after(more - 1)
        lane.assumed, lane.tokens = path[: agreed + 1], path[agreed + 1 :]
        lane.confidences, lane.alternatives = lane.confidences[more:], lane.alternatives[more:]
        lane.rows, lane.thresholds = lane.rows[more:], lane.thresholds[more:]
        return agreed

    # --- lanes -------------------------------------------------------------------------------------

    def _lane(self, number: int | None) -> _Lane | None:
        if self._open is not None and self._open.number == number:
            return self._open
        return self._lanes.get(number) if number is not None else None

    @staticmethod
    def _accepted(lane: _Lane, parent: _Lane) -> int:
        """How many of its parent's own tokens a lane assumes to be accepted."""
        return lane.base + len(lane.assumed) - 1 - parent.base - len(parent.assumed)

    def _guess(self, lane: _Lane) -> tuple[Ranked, ...]:
        """The outcomes that the draft itself makes likely, which the lane keeps to weigh hints by."""
        if not self._config.guesses:
            return ()
        own = self._config.foresight.own
        lane.guess = guess(lane.tokens or (), lane.confidences, lane.alternatives, own)
        return tuple(lane.guess.ranking(OUTCOMES, own))

    def _expand(self, now_ms: float) -> list[EdgeAction]:
        """Start lanes for the likeliest outcomes, as many as there is time and room for."""
        if self._open is None or self._config.block_length == 0:
            return []
        actions: list[EdgeAction] = []
        most, longest = self._room_for_lanes(now_ms)
        while (found := self._likeliest()) is not None:
            probability, parent, assumed = found
            drafting = [lane for lane in self._lanes.values() if lane.tokens is None]
            rivals = drafting if len(drafting) >= most else list(self._lanes.values())
            if rivals is drafting or len(rivals) >= LANES_KEPT:
                weakest = min(rivals, key=lambda lane: lane.probability, default=None)
                if weakest is None or probability <= SURER * weakest.probability:
                    break
                actions += self._drop([weakest])
            length = self._room(parent.base + len(assumed), longest)
            origin = Origin.EXIT if parent.hint_ms else Origin.GUESS
            accepted = len(assumed) - 1 - len(parent.assumed)
            lane, started = self._start(
                parent.base,
                assumed,
                length,
                now_ms,
                probability=probability,
                origin=origin,
                threshold=parent.threshold_after(accepted),
            )
            lane.parent = parent.number
            self.statistics.lanes += 1
            actions += started
        return actions

    def _room_for_lanes(self, now_ms: float) -> tuple[int, int]:
        """How many lanes are drafted at a time, as many as are ready within the window; and how long each of them is."""
        most = self._config.max_lanes
        if self._open is not None and self._open.alone:
            return self._room_beside(self._open, most, now_ms)
        open_tokens = self._open.tokens if self._open is not None else None
        window_ms = self._pass(1 + len(open_tokens or ()))
        if not self._config.forwards:
            window_ms += self._round_trip(0.0)
        if window_ms > 0.0:
            most = lanes_in(window_ms, self._step, self._config.block_length, most)
        return most, self._length()

    def _room_beside(self, lane: _Lane, most: int, now_ms: float) -> tuple[int, int]:
        """The same beside a pass of the floor, of which the edge heard half a round trip after it had begun."""

        way_ms = (self._config.round_trip_ms or 0.0) + HOPS_MS
        left_ms = lane.started_ms + self._alone(self._pass(self._sharers(1.0))) - way_ms - now_ms
        for lanes in range(most, 0, -1):
            length = int(left_ms / max(self._step(lanes), 1e-3))
            if length >= SHORTEST:
                return lanes, min(length, self._length())
        return 0, 0

    def _nodes(self) -> Iterator[tuple[float, _Lane]]:
        """Lanes whose outcomes are worth a thought: the open one, and those that were forwarded."""
        if self._open is not None:
            yield 1.0, self._open
        for lane in self._lanes.values():
            if lane.round is not None:
                yield lane.probability, lane

    def _likeliest(self) -> tuple[float, _Lane, Tokens] | None:
        """The likeliest outcome that no lane assumes yet: its probability, the lane it ends, the path it assumes."""
        taken = {self._ahead_of(lane.base, lane.assumed) for lane in self._lanes.values()}
        best: tuple[float, _Lane, Tokens] | None = None
        for weight, node in self._nodes():
            for outcome in node.ranking:
                probability = weight * outcome.probability
                if probability < self._config.lane_threshold or (best is not None and probability <= best[0]):
                    continue
                own = node.tokens or ()
                if outcome.accepted > len(own):
                    continue
                assumed = (*node.assumed, *own[: outcome.accepted], outcome.next_token)
                ahead = self._ahead_of(node.base, assumed)
                if ahead and ahead not in taken and self._goes_on(node.base, assumed):
                    best = probability, node, assumed
        return best

    def _ahead_of(self, base: int, assumed: Tokens) -> Tokens:
        """What a path assumes beyond what is committed; nothing where it has been overtaken, or left."""
        since = self.base - base
        return assumed[since:] if assumed[:since] == tuple(self._committed[base:]) else ()

    def _goes_on(self, base: int, assumed: Tokens) -> bool:
        """Whether a draft may follow a path."""
        stops = not self._config.stop_tokens.isdisjoint(assumed)
        return not stops and self._room(base + len(assumed), 1) > 0

    def _reweigh(self) -> None:
        """Lanes are as likely as the outcomes that they assume have become."""
        for lane in self._lanes.values():  # parents come first
            parent = self._lane(lane.parent)
            if parent is None or not parent.ranking:
                continue
            outcome = (self._accepted(lane, parent), lane.assumed[-1] if lane.assumed else -1)
            share = next(
                (r.probability for r in parent.ranking if (r.accepted, r.next_token) == outcome), 0.0
            )
            lane.probability = share * (1.0 if parent is self._open else parent.probability)

    def _drop(self, lanes: Sequence[_Lane]) -> list[EdgeAction]:
        for lane in lanes:
            del self._lanes[lane.number]
        return [DropDraft(lane.number) for lane in lanes if lane.tokens is None]

    # --- hints -------------------------------------------------------------------------------------

    def _hint_arrived(self, event: HintArrived, now_ms: float) -> list[EdgeAction]:
        hint = event.hint
        node = next((lane for _, lane in self._nodes() if lane.round == hint.round), None)
        if node is None or self._phase is not Phase.VERIFYING or hint.epoch != self._epoch:
            return []
        self.statistics.hints += 1
        self.statistics.hinted_rounds += not node.hint_ms
        node.hint_ms.setdefault(hint.layer, now_ms)
        if not self._config.hints:
            return []
        foreseen = tuple((each.accepted, each.next_token, each.confidence) for each in hint.outcomes)
        node.hints[hint.layer] = foreseen
        if not self._mix_in_hints(
            node
        ):  # what another exit has foreseen counts as well: the surer one is right
            known = {(each.accepted, each.next_token): each.probability for each in node.ranking}
            for accepted, token, share in foreseen:
                known[accepted, token] = max(share, known.get((accepted, token), 0.0))
            node.ranking = tuple(Ranked(*outcome, share) for outcome, share in known.items())
        self._reweigh()
        hopeless = [
            lane
            for lane in self._lanes.values()
            if lane.tokens is None
            and lane.parent == node.number
            and lane.number != self._main
            and lane.probability < self._config.lane_threshold
        ]
        ready = [action for lane in list(self._lanes.values()) for action in self._forward(lane)]
        return [*self._drop(hopeless), *ready, *self._expand(now_ms)]

    def _mix_in_hints(self, node: _Lane) -> bool:
        """Rank a lane's outcomes by what is known of them; False where the draft says nothing of them itself."""
        if node.guess is None or not any(node.guess.names):
            return False
        if node.hints:
            mixture = self._config.foresight.mixture(max(node.hints))
            node.ranking = tuple(mix(node.guess, node.hints, mixture, OUTCOMES))
        return True

    # --- verdicts ----------------------------------------------------------------------------------

    def _verdict_arrived(self, event: VerdictArrived, now_ms: float) -> list[EdgeAction]:
        verdict = event.verdict
        if self._phase is Phase.OPENING or verdict.epoch < self._epoch:
            return []
        self._enter(verdict.epoch)
        answers = self._answers(verdict.round)
        if answers and self._phase is Phase.VERIFYING:
            self._measure(verdict, now_ms)
            if self._floor_is_rival:
                self._rivals.verified(len(verdict.tokens), now_ms - self._progress_ms)
        return self._advance(
            verdict.base,
            verdict.tokens,
            verdict.finish_reason,
            verdict.round,
            now_ms,
            answers=answers,
            taken=verdict.taken,
            following=verdict.following,
        )

    def _floor_arrived(self, event: FloorArrived, now_ms: float) -> list[EdgeAction]:
        floor = event.floor
        if self._phase is Phase.OPENING or floor.epoch < self._epoch:
            return []
        self._enter(floor.epoch)
        self.statistics.passes += floor.passes
        self._rivals.floor.saw(len(floor.tokens), now_ms - self._progress_ms)
        self._saw_pass(floor, 1)
        if floor.verify_ms > 0.0:
            self._alone.saw(floor.verify_ms / max(1, floor.passes))
        before = self.statistics.tokens
        actions = self._advance(
            floor.base,
            floor.tokens,
            floor.finish_reason,
            self._next_round,
            now_ms,
            answers=False,
            taken=floor.taken,
            following=floor.following,
        )
        self.statistics.floor_tokens += self.statistics.tokens - before
        return actions

    def _stale_arrived(self, event: StaleArrived, now_ms: float) -> list[EdgeAction]:
        stale = event.stale
        if self._phase is Phase.OPENING or stale.epoch < self._epoch:
            return []
        if stale.gateway and stale.gateway != self._config.gateway:
            return self._fail("session_taken", f"the session was taken over by {stale.gateway}")
        self._enter(stale.epoch)
        return self._advance(
            stale.since,
            stale.tokens,
            stale.finish_reason,
            stale.round,
            now_ms,
            answers=self._answers(stale.round),
            verified=False,
        )

    @property
    def _floor_is_rival(self) -> bool:
        """The session chooses between blocks and the floor: how blocks fare in one that does not is no measure of theirs."""
        return self._config.adaptive and self._config.policy is Policy.LATENCY

    def _answers(self, round: int) -> bool:
        if self._phase is Phase.PREFILL:
            return round == self._prompt_round
        return self._open is not None and round == self._open.round

    def _fault_arrived(self, event: FaultArrived, now_ms: float) -> list[EdgeAction]:
        fault = event.fault
        if fault.epoch < self._epoch or not self._answers(fault.round):
            return []
        quiet_ms = now_ms - self._progress_ms
        if fault.retry_after_s is not None and self._committed and quiet_ms < self._config.stall_timeout_ms:
            return [self._later(fault.retry_after_s * 1000)]
        return self._fail(fault.code, fault.message, fault.retry_after_s)

    def _measure(self, verdict: Verdict, now_ms: float) -> None:
        """What the verdict of the open lane teaches."""
        lane = self._open
        assert lane is not None
        statistics = self.statistics
        own = len(lane.tokens or ())
        statistics.rounds += 1
        statistics.passes += verdict.passes
        statistics.drafted += own
        statistics.accepted += verdict.accepted
        statistics.verify_ms += verdict.verify_ms
        self._saw_pass(verdict, own + 1)
        if lane.sent_ms is not None and verdict.verify_ms > 0.0:
            away_ms = now_ms - lane.sent_ms - verdict.verify_ms - verdict.commit_ms
            # It may have waited for a pass under way: the shortest times are those of the way alone.
            known = self._round_trip(away_ms)
            self._round_trip.saw(min(max(0.0, away_ms), 1.5 * known + 1.0))
        for layer, hint_ms in lane.hint_ms.items():
            statistics.exit_lead_ms.setdefault(layer, []).append(now_ms - hint_ms)

    def _saw_pass(self, answer: Verdict | Floor, own: int) -> None:
        """What a pass of which `own` rows were this session's says of passes."""
        rows = answer.rows or own
        if answer.verify_ms > 0.0:
            self._pass.saw(rows, answer.verify_ms)
            self._sharers.saw(answer.sessions or max(1.0, rows / own))
        if answer.row_ms > 0.0 or answer.padded:
            self._pass.told(answer.fixed_ms, answer.row_ms, answer.padded)

    def _judge(self, lane: _Lane) -> int:
        """How far a lane agreed with what was committed."""
        own = lane.tokens or ()
        truth = self._committed[lane.base + len(lane.assumed) :]
        for accepted, (drafted, said) in enumerate(zip(own, truth, strict=False)):
            self._acceptance.saw(float(drafted == said))
            self._draft_acceptance.saw(float(drafted == said))
            if drafted != said:
                return accepted
        return min(len(own), len(truth))

    def _advance(
        self,
        base: int,
        tokens: Tokens,
        finish_reason: FinishReason | None,
        number: int,
        now_ms: float,
        *,
        answers: bool,
        verified: bool = True,
        taken: int | None = None,
        following: Tokens = (),
    ) -> list[EdgeAction]:
        """Take over what was committed from position `base` on, and go on from there. `following` is what the verifier has
        drafted for the pass that it runs behind these tokens by itself, if it does."""
        known = self.base - base
        if known < 0:  # an answer before this one was lost: ask again, the verifier tells what is missing
            return self._ask_again() if answers or self._phase is Phase.FOLLOWING else []
        if tokens[:known] != tuple(self._committed[base : base + len(tokens)]):
            return self._fail(
                "internal_error", f"the session's tokens from {base} on differ from those already delivered"
            )
        new = tokens[known:]
        if not new and finish_reason is None:
            if not answers or base + len(tokens) < self.base:
                return []
            # A round that is over is not asked for again, though all that it said was known already.
            return self._next(answers, taken, (), now_ms) if verified else self._ask_again()
        first_new = self.base
        if new and self._phase is not Phase.PREFILL:
            self._rate.saw(len(new), now_ms - self._progress_ms)
        self._committed.extend(new)
        self._progress_ms = now_ms
        self.statistics.tokens += len(new) if self._phase is not Phase.PREFILL else 0
        self._credit = min(CREDIT, self._credit + self._config.forwards_per_token * len(new))
        self._rest -= min(self._rest, len(new))
        delivered: list[EdgeAction] = []
        if new:
            delivered = [Deliver(first_new, new, self._sources(first_new, new), number)]
        if finish_reason is not None:
            self._phase = Phase.ENDED
            return [*self._drop(list(self._lanes.values())), *delivered, Finish(finish_reason)]
        next_steps = self._next(answers, taken, following, now_ms)
        return [*next_steps, *delivered]  # what goes up is not kept waiting by what is shown

    def _sources(self, first: int, tokens: Tokens) -> tuple[Source, ...]:
        """Tokens that agree with the open lane were drafted, up to the first that does not; the rest was not."""
        lane = self._open
        if lane is None:
            return (Source.CORRECTED,) * len(tokens)
        drafted = Source.ACCEPTED if lane.origin is Origin.NEED else Source.PREEMPTIVE
        skipped = first - lane.base
        agreed = 0
        if 0 <= skipped <= len(lane.path):
            for token, expected in zip(tokens, lane.path[skipped:], strict=False):
                if token != expected:
                    break
                agreed += 1
        return (drafted,) * agreed + (Source.CORRECTED,) * (len(tokens) - agreed)

    def _next(self, answers: bool, taken: int | None, following: Tokens, now_ms: float) -> list[EdgeAction]:
        """Go on: with the lane that was open, with the one that came true, beside a pass of the floor, or a new draft."""
        if self._phase is Phase.PREFILL:
            beside = self._beside(following, now_ms) if following else None
            return self._draft_next(now_ms) if beside is None else beside
        gone = self._drop(
            [
                lane
                for lane in self._lanes.values()
                if (left := lane.left(self._committed)) is None
                or (lane.tokens is not None and not left)
                or (
                    lane.tokens is None
                    and lane.number != self._main
                    and lane.base + len(lane.assumed) < self.base
                )
            ]
        )
        if following and (beside := self._go_beside(following, answers, now_ms)) is not None:
            return [*gone, *beside]
        if self._phase is Phase.FOLLOWING:
            return [*self._draft_next(now_ms), *gone]
        if self._phase is Phase.DRAFTING:
            return gone if self._main in self._lanes else [*self._draft_next(now_ms), *gone]
        open_lane = self._open
        assert open_lane is not None
        if not answers:
            if open_lane.left(self._committed):
                return [*gone, *self._expand(now_ms)]
            if not open_lane.alone:
                self._rivals.overtaken()
        self._close(open_lane)
        return [*self._succeed(taken, now_ms), *gone]

    def _close(self, lane: _Lane) -> None:
        """The open lane is done: learn how its draft fared."""
        if not lane.alone:
            self._threshold = lane.threshold_after(self._judge(lane))

    def _go_beside(self, following: Tokens, answers: bool, now_ms: float) -> list[EdgeAction] | None:
        """Have the open lane make room for a pass of the floor; None where that is not worth its while."""
        lane, main = self._open, self._lanes.get(self._main) if self._main is not None else None
        if main is not None and self.base > main.base + len(main.assumed):
            return None  # what is being drafted for an older base may hold yet
        beside = self._beside(following, now_ms)
        if beside is None or lane is None:
            return beside
        if lane.left(self._committed) and not answers and not lane.alone:
            return beside
        if not lane.alone and not answers:
            self._rivals.overtaken()
        self._close(lane)
        return beside

    def _succeed(self, taken: int | None, now_ms: float) -> list[EdgeAction]:
        """The open lane is done: the one that came true is open now, or a new block has to be drafted."""
        true = [lane for lane in self._lanes.values() if lane.came_true(self._committed)]
        lane = max(
            true,
            key=lambda each: (
                each.round == taken and taken is not None,
                each.tokens is not None,
                -1 if each.round is None else each.round,
            ),
            default=None,
        )
        statistics = self.statistics
        self._missed.saw(float(lane is None or lane.tokens is None))
        if self._config.guesses and self._open is not None and self._open.hint_ms:
            in_time = lane is not None and lane.tokens is not None and lane.origin is Origin.EXIT
            self._exits.saw(useful=in_time)
        if lane is None:
            statistics.misses += 1
            if (
                self._open is not None and not self._open.alone and self._open.left(self._committed)
            ):  # longer than a pass
                return [*self._drop(list(self._lanes.values())), *self._send_block(self._open, now_ms)]
            return [*self._drop(list(self._lanes.values())), *self._draft_next(now_ms)]
        if lane.tokens is None:
            statistics.late += 1
            self._phase, self._open, self._main = Phase.DRAFTING, None, lane.number
            return []
        statistics.hits += 1
        statistics.hits_by_guess += lane.origin is Origin.GUESS
        statistics.hits_by_exit += lane.origin is Origin.EXIT
        if lane.round is None:
            return self._send_block(lane, now_ms)
        statistics.taken += lane.round == taken
        self._make_open(lane)
        self._reweigh()
        ready = [action for each in list(self._lanes.values()) for action in self._forward(each)]
        return [self._later(), *ready, *self._expand(now_ms)]

    # --- ends --------------------------------------------------------------------------------------

    def _fail(self, code: str, message: str, retry_after_s: float | None = None) -> list[EdgeAction]:
        self._phase = Phase.ENDED
        return [*self._drop(list(self._lanes.values())), Fail(code, message, retry_after_s)]

    def _abandoned(self, event: Abandoned, now_ms: float) -> list[EdgeAction]:
        self._phase = Phase.ENDED
        return self._drop(list(self._lanes.values()))


_HANDLERS: Final[Mapping[type, Callable[..., list[EdgeAction]]]] = {
    Opened: EdgeSession._opened,
    Relocated: EdgeSession._relocated,
    Drafted: EdgeSession._drafted,
    HintArrived: EdgeSession._hint_arrived,
    VerdictArrived: EdgeSession._verdict_arrived,
    FloorArrived: EdgeSession._floor_arrived,
    StaleArrived: EdgeSession._stale_arrived,
    FaultArrived: EdgeSession._fault_arrived,
    TimerFired: EdgeSession._timer_fired,
    Abandoned: EdgeSession._abandoned,
}
