"""What a session learns of its clocks, and what follows: how long a block should be, how many lanes fit beside it.

Running figures and arithmetic only. Times are ms, lengths tokens; nothing here knows a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

MEMORY: Final = 0.95
"""How much of what was seen is kept a step: a figure rests on the last 20 or so."""
SOON: Final = 0.8
"""The same of what changes at once, such as how many sessions there are."""
WORTH_WHILE: Final = 1.01
"""What drafts that are wrong but for a few in a thousand don't reach, where rows cost nothing."""
TRIALS: Final = 12
"""Times that something is used before it is judged."""
LEAST_USE: Final = 0.15
"""What is of use less often is left alone: exits cost a twentieth to a sixth of a pass, and save half of one at most."""
REMEMBERED: Final = 20
"""Times that its use rests on."""
AGAIN: Final = 16
"""Every so manieth time it is used all the same."""
TYPICAL: Final = 0.7
"""How often a draft token is accepted, before anything is known."""
CLEARLY: Final = 0.9
"""Blocks that bring so much of what the floor brings are not given up for it: both figures move by as much."""
FEWEST: Final = 8.0
"""Observations, weighted, without which a slope is not believed."""


@dataclass(slots=True)
class Mean:
    """A running mean that starts with the first value."""

    value: float | None = None
    memory: float = MEMORY

    def saw(self, value: float) -> None:
        """Take in one more."""
        self.value = value if self.value is None else self.memory * self.value + (1.0 - self.memory) * value

    def __call__(self, otherwise: float) -> float:
        """The mean, or `otherwise` before the first value."""
        return otherwise if self.value is None else self.value


@dataclass(slots=True)
class Rate:
    """Tokens a ms, of late: both fade as a `Mean` does; 0 before the first were counted."""

    tokens: float = 0.0
    ms: float = 0.0

    def saw(self, tokens: int, elapsed_ms: float) -> None:
        """So many came in so long."""
        self.tokens = MEMORY * self.tokens + tokens
        self.ms = MEMORY * self.ms + elapsed_ms

    def __call__(self) -> float:
        """The rate."""
        return self.tokens / self.ms if self.ms > 0.0 else 0.0


@dataclass(slots=True)
class Line:
    """A running least-squares line y = a + b x that never falls: what a pass costs by its rows, a step by its lanes.

    Old observations fade by `MEMORY`. Without enough spread in x, all of y is put down to a.
    """

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def saw(self, x: float, y: float) -> None:
        """Take in one more point."""
        self.weight = MEMORY * self.weight + 1.0
        self.x = MEMORY * self.x + x
        self.y = MEMORY * self.y + y
        self.xx = MEMORY * self.xx + x * x
        self.xy = MEMORY * self.xy + x * y

    @property
    def known(self) -> bool:
        """Whether there was anything to learn from."""
        return self.weight > 0.0

    @property
    def slope(self) -> float:
        """b, at least 0 and at most what leaves a ≥ 0."""
        spread = self.weight * self.xx - self.x * self.x
        if self.weight < FEWEST or spread < 1e-3 * self.weight * self.weight or self.x <= 0.0:
            return 0.0
        return min(max(0.0, (self.weight * self.xy - self.x * self.y) / spread), self.y / self.x)

    def __call__(self, x: float) -> float:
        """The line at `x`; 0 before the first point."""
        if not self.known:
            return 0.0
        return max(0.0, (self.y - self.slope * self.x) / self.weight + self.slope * x)


@dataclass(slots=True)
class PassCost:
    """What a pass takes by the rows in it: what the verifier says, which has measured every pass of every session since it
    began; until it says something, what was seen here.
    """

    seen: Line = field(default_factory=Line)
    fixed_ms: float = 0.0
    row_ms: float = 0.0
    padded: int = 0
    """Rows that every session's block takes, however short it is; 0: those that it has."""

    def saw(self, rows: int, elapsed_ms: float) -> None:
        """A pass of so many rows took so long, its wait for the one before it included."""
        self.seen.saw(rows, elapsed_ms)

    def told(self, fixed_ms: float, row_ms: float, padded: int = 0) -> None:
        """The verifier's own figures."""
        self.fixed_ms, self.row_ms, self.padded = fixed_ms, row_ms, padded

    @property
    def known(self) -> bool:
        """Whether anything was seen or told."""
        return self.seen.known or self.fixed_ms + self.row_ms > 0.0

    def __call__(self, rows: float) -> float:
        """A pass of so many rows; 0 before anything is known."""
        told = self.fixed_ms + self.row_ms > 0.0
        return self.fixed_ms + self.row_ms * rows if told else self.seen(rows)


@dataclass(slots=True)
class Trial:
    """Whether something that costs is of use, by how often it was: used until that is known, and now and then to see
    whether it has changed."""

    useful: float = 0.0
    """The share of uses, of late."""
    seen: int = 0
    asked: int = 0

    def saw(self, *, useful: bool) -> None:
        """It was used once more."""
        self.seen += 1
        self.useful += (float(useful) - self.useful) / min(self.seen, REMEMBERED)

    def wanted(self) -> bool:
        """Whether to use it the next time."""
        if self.seen < TRIALS or self.useful >= LEAST_USE:
            return True
        self.asked += 1
        return self.asked % AGAIN == 0


@dataclass(slots=True)
class Rivals:
    """How fast tokens come by blocks, and how fast by the floor, which drafts as well: tokens a ms since the last ones were
    committed, whatever had to be waited for.

    A draft at the edge has to foresee what the floor says until it arrives, and is verified in rows that make the pass
    longer. Where the floor is often right itself, and the way is long, blocks can be the slower of the two.
    """

    blocks: Rate = field(default_factory=Rate)
    floor: Rate = field(default_factory=Rate)
    in_time: Mean = field(default_factory=Mean)
    """Share of drafts that were verified, at least in part: the floor had not said something else before."""
    drafts: int = 0

    def verified(self, tokens: int, elapsed_ms: float) -> None:
        """A block's round has ended."""
        self.drafts += 1
        self.in_time.saw(1.0)
        self.blocks.saw(tokens, elapsed_ms)

    def overtaken(self) -> None:
        """A draft came to nothing: the floor had left it."""
        self.drafts += 1
        self.in_time.saw(0.0)

    @property
    def better_alone(self) -> bool:
        """Whether blocks have been slower than the floor, or hardly ever there in time."""
        slower = self.blocks() < CLEARLY * self.floor() or self.in_time(1.0) < LEAST_USE
        return self.drafts >= TRIALS and slower


@dataclass(slots=True)
class Common:
    """What does not depend on the session: what a pass costs by the rows in it, a draft step by the lanes in it, how many
    share a pass, how often the draft is right, whether exits are of use, and blocks beside the floor. Sessions of a gateway
    learn it together, so that a new one knows it at once; a crowd that begins at the same time would be over before each had
    learned it alone.
    """

    pass_ms: PassCost = field(default_factory=PassCost)
    step_ms: Line = field(default_factory=Line)
    sharers: Mean = field(default_factory=lambda: Mean(memory=SOON))
    acceptance: Mean = field(default_factory=lambda: Mean(TYPICAL))
    exits: Trial = field(default_factory=Trial)
    rivals: Rivals = field(default_factory=Rivals)


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens a round of `length` draft tokens yields: (1 - α^(γ + 1)) / (1 - α) (Leviathan et al., arXiv 2211.17192)."""
    if acceptance >= 1.0:
        return length + 1.0
    return (1.0 - acceptance ** (length + 1)) / (1.0 - acceptance)


@dataclass(frozen=True, slots=True)
class Clocks:
    """What the choice of a block's length rests on."""

    acceptance: float
    """Probability that a draft token is accepted, given those before it were."""
    pass_ms: Callable[[float], float]
    """A pass by the rows in it, all sessions' together; 0 where it is not known yet."""
    sharers: float
    """Sessions that share a pass, this one included."""
    draft_ms: float
    """Drafting one token."""
    round_trip_ms: float
    missed: float
    """Share of rounds that no lane had foreseen: they wait for a draft and for the round trip."""
    floor: bool = False
    """Whether the target goes on by itself meanwhile."""
    padded: int = 0
    """Rows that each session's block takes at least."""

    def shared_ms(self, length: int) -> float:
        """A pass that all who share it verify a block of `length` in, or nothing; 0 where it is not known yet."""
        rows = max(length + 1, self.padded) if length else 1
        return self.pass_ms(self.sharers * rows)


def best_length(clocks: Clocks, longest: int) -> int:
    """The block length γ of 0 … `longest` at which tokens get committed fastest.

    With E(γ) tokens a round, a pass of `sharers` · (γ + 1) rows (every session that shares it does alike, so that nobody
    gains at the others' expense; `padded` rows each where blocks are shorter), and a share of rounds that were not
    foreseen, which wait for w = γ draft steps and the round trip,

        rate(γ) = (E(γ) + missed · w · f) / (pass(γ) + missed · w),        rate(0) = 1 / pass(0)

    f is the rate at which tokens come while a round waits: rate(0) where the floor goes on, else 0. Without a block the
    target goes on token by token. Under load passes grow with their rows, so that shorter blocks win, and at last none;
    on a long link or with a slow pass the fixed part is the larger one, and long blocks win.
    """
    if clocks.pass_ms(clocks.sharers) <= 0.0:
        return longest
    alone = _rate(clocks, 0)
    # A gain of less than a millionth is none: of equals the shortest costs least.
    best = max(range(longest + 1), key=lambda length: round(_rate(clocks, length) / alone, 6))
    return best if _rate(clocks, best) >= WORTH_WHILE * alone else 0


def thrifty_length(clocks: Clocks, longest: int) -> int:
    """The block length γ of 1 … `longest` at which a token takes least of the verifier, if the session waits for its drafts:
    E(γ) / pass(γ) is largest. That is the longest unless rows are dear beside what a pass takes anyway.

    Drafting takes no more than half of a round, so no longer than the round trip and the pass. E rests on the mean
    acceptance, which the draft's own confidences in its tokens outdo: which of them are worth their rows is known once they
    are there (`least_worth`).
    """
    if clocks.pass_ms(clocks.sharers) <= 0.0:
        return max(1, longest)

    def tokens_a_ms(length: int) -> float:
        return expected_tokens(clocks.acceptance, length) / clocks.shared_ms(length)

    def in_time(length: int) -> bool:
        return length * clocks.draft_ms <= clocks.round_trip_ms + clocks.shared_ms(length)

    return max(filter(in_time, range(1, longest + 1)), key=tokens_a_ms, default=1)


def least_worth(rate: float, pass_ms: Callable[[float], float], sharers: float) -> float:
    """How likely a draft token has to be accepted, and all before it, for its row to be worth verifying.

    A row makes the pass of every session that shares it longer. What they would have said in that time is what the row has
    to bring, if each gets `rate` tokens a ms: rate · sharers · (pass(n + 1) - pass(n)).
    """
    return rate * (pass_ms(2.0 * sharers) - pass_ms(sharers))


def _rate(clocks: Clocks, length: int) -> float:
    """Tokens a ms that a session gets with blocks of that length."""
    pass_ms = clocks.shared_ms(length)
    if not length:
        return 1.0 / max(pass_ms, 1e-3)
    waited_ms = clocks.missed * (length * clocks.draft_ms + clocks.round_trip_ms)
    tokens = expected_tokens(clocks.acceptance, length) + waited_ms * _rate(clocks, 0) * clocks.floor
    return tokens / max(pass_ms + waited_ms, 1e-3)


def lanes_in(window_ms: float, step_ms: Line, length: int, most: int) -> int:
    """How many lanes of `length` tokens, drafted as one batch, are ready within `window_ms`: 1 to `most`."""
    if not step_ms.known or length == 0:
        return most
    fitting = (lanes for lanes in range(most, 1, -1) if step_ms(lanes) * length <= window_ms)
    return next(fitting, min(1, most))
