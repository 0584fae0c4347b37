"""A world in one process: gateways, verifiers, engines and store as plain objects, a network that misbehaves.

One stream of choices drives everything, so that a seed is a schedule. Messages are lost, doubled, reordered and delayed;
gateways and verifiers crash at any step, or live on after another has taken their place; every party has a clock of its
own; sessions move and are evicted; Redis' answers get lost; drafts are right, wrong or missing; the engine now and then
says a token nobody asked for.

What must hold, whatever happens:

    the client gets exactly what the target says, without a gap or a repetition, and the session ends
    nothing is shown or published that is not committed
    epochs never shrink, and only who holds the newest one commits
    no message of a gateway that drives the session no more is verified
    what is sent up as a draft was drafted for that place
    a pass verifies a draft at its own place, a forward only when its outcome has come true
    a verdict counts what was accepted of the block as it was sent, and so do hints
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Final
from zlib import crc32

from shared.protocol import (
    Block,
    Cancel,
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
    Tokens,
    Verdict,
)
from shared.speculation import edge as e
from shared.speculation import verifier as v
from tests.simulation.choices import Choices

VOCABULARY: Final = 7
END: Final = 0
MAX_BLOCK: Final = 3
LONGEST: Final = 40
"""Tokens of the longest answer."""
STEPS: Final = 20_000
"""A schedule that takes more is one that never ends."""
STRAYS: Final = 0.1
"""How often a message reaches a verifier that holds the partition no more."""

Upward = Prompt | Block | Forward | Cancel
Downward = Verdict | Floor | Stale | Fault | Hint


def target(prefix: Sequence[int]) -> int:
    """The target's next token: a fixed function of all tokens before it."""
    value = crc32(bytes(prefix)) >> 5
    return END if value % 61 == 0 else 1 + value % (VOCABULARY - 1)


def target_output(max_tokens: int, salt: int) -> tuple[Tokens, FinishReason]:
    """What the target alone would say."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(target((salt, *tokens)))
        if tokens[-1] == END:
            return tuple(tokens), FinishReason.STOP
    return tuple(tokens), FinishReason.LENGTH


@dataclass(frozen=True)
class Record:
    """The session in Redis."""

    epoch: int = 1
    owner: str = ""
    gateway: str = "g0"
    tokens: Tokens = ()
    finish_reason: FinishReason | None = None
    last_round: int = -1
    last_base: int = -1


@dataclass(frozen=True)
class Faults:
    """How often the world misbehaves, as probabilities a step or a message. `skew` is how far clocks differ at most."""

    lose: float = 0.1
    double: float = 0.1
    reorder: float = 0.3
    crash_verifier: float = 0.005
    crash_gateway: float = 0.005
    take_over: float = 0.005
    unasked: float = 0.02
    move: float = 0.01
    evict: float = 0.01
    redis_fails: float = 0.01
    skew: float = 0.3
    wrong_draft: float = 0.4


@dataclass(frozen=True)
class _Path:
    """What a message stands for: its `own` tokens from position `start` on, after the `assumed` ones from `base` on."""

    gateway: str
    base: int
    assumed: Tokens
    own: Tokens
    follows_forward: bool = False

    @property
    def start(self) -> int:
        return self.base + len(self.assumed)


@dataclass
class _Clock:
    """Runs at its own rate, from its own beginning."""

    beginning: float
    rate: float

    def at(self, now: float) -> float:
        return self.beginning + self.rate * now

    def when(self, reading: float) -> float:
        return (reading - self.beginning) / self.rate


class _End(Enum):
    """How a gateway stops driving the session."""

    CRASHES = "crashes"
    LEAVES = "leaves"
    LINGERS = "lingers"


@dataclass(eq=False)
class _Gateway:
    name: str
    edge: e.EdgeSession
    clock: _Clock
    shown: list[int]
    drafts: dict[int, e.StartDraft | e.Drafted] = field(default_factory=dict)
    """What is being drafted, or has been but for what may follow it."""
    lanes: dict[int, tuple[int, Tokens]] = field(default_factory=dict)
    paths: dict[int, _Path] = field(default_factory=dict)
    timer: tuple[float, int] | None = None

    @property
    def reply(self) -> ReplyRoute:
        return ReplyRoute.model_construct(gateway=self.name, partition=0)


@dataclass(eq=False)
class _Session:
    """A session's state at a verifier."""

    core: v.VerifierSession
    heard: dict[int, list[_Path]] = field(default_factory=dict)
    """What messages of a round that were received stand for."""
    engine: list[int] | None = None
    verified: set[int] = field(default_factory=set)
    """Rounds that had a pass."""
    timer: int | None = None


@dataclass(eq=False)
class _Verifier:
    name: str
    clock: _Clock
    alive: bool = True
    session: _Session | None = None
    passes: list[tuple[_Session, int, Tokens]] = field(default_factory=list)
    redis: deque[tuple[_Session, v.Claim | v.Commit | v.Release]] = field(default_factory=deque)


@dataclass
class Counts:
    """What has happened, so that one can see what a search has covered."""

    schedules: int = 0
    steps: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    forwards: int = 0
    taken: int = 0
    chains: int = 0
    beside: int = 0
    floors: int = 0
    trims: int = 0
    stales: int = 0
    faults: int = 0
    resent: int = 0
    hints: int = 0
    refused_commits: int = 0
    crashes: int = 0
    takeovers: int = 0

    def add(self, other: Counts) -> None:
        """Take another's in."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class World:
    """One session and everybody who has to do with it. `trace` collects what happens, in words."""

    def __init__(
        self,
        choices: Choices,
        faults: Faults,
        *,
        max_tokens: int | None = None,
        trace: list[str] | None = None,
    ) -> None:
        self.choices = choices
        self.faults = faults
        self.trace = trace
        self.counts = Counts(schedules=1)
        self.record = Record()
        self.salt = 7 + choices.below(200)
        self.max_tokens = max_tokens or 1 + int(LONGEST * choices.draw() ** 2)  # most are short
        self.expected, self.expected_reason = target_output(self.max_tokens, self.salt)
        self.policy = choices.pick(list(Policy))
        self.slowness = choices.pick([0.0, 0.5, 0.9])
        self.now = 0.0
        self.finished: FinishReason | None = None
        self.published: list[Verdict | Floor] = []
        self.uplink: list[Upward] = []
        self.downlink: list[tuple[str, Downward]] = []
        self.gateways: list[_Gateway] = []
        self.verifiers: list[_Verifier] = []
        self._born = 0
        self._new_verifier()
        self._new_gateway()
        self._edge_event(self.gateway, e.Opened(epoch=1))

    @property
    def gateway(self) -> _Gateway:
        """The one that the client reads from."""
        return self.gateways[0]

    @property
    def verifier(self) -> _Verifier:
        """The one that holds the session's partition."""
        return self.verifiers[0]

    @property
    def shown(self) -> Tokens:
        """What the client has read."""
        return tuple(self.gateway.shown)

    def _note(self, who: str, what: object) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:8.1f}  {who:<4}{what}")

    def _new_clock(self) -> _Clock:
        skew = self.faults.skew
        if skew == 0.0:
            return _Clock(0.0, 1.0)
        return _Clock(1000.0 * self.choices.draw(), 1.0 + skew * (2.0 * self.choices.draw() - 1.0))

    # --- gateways -------------------------------------------------------------------------------------

    def _new_gateway(self) -> None:
        """A gateway drives the session from now on."""
        choices, name = self.choices, self.record.gateway
        config = e.EdgeConfig(
            gateway=name,
            max_tokens=self.max_tokens,
            block_length=choices.below(6),
            adaptive=choices.chance(0.5),
            stop_tokens=frozenset({END}),
            policy=self.policy,
            hints=choices.chance(0.7),
            guesses=choices.chance(0.8),
            forwards=choices.chance(0.8),
            lane_threshold=choices.pick([0.0, 0.05, 0.3]),
            max_lanes=choices.below(6),
            round_timeout_ms=80,
            stall_timeout_ms=1e9,
            round_trip_ms=choices.pick([None, 0.0, 5.0]),
        )
        self.gateways.insert(
            0, _Gateway(name, e.EdgeSession(config), self._new_clock(), list(self.record.tokens))
        )

    def _edge_event(self, gateway: _Gateway, event: e.EdgeEvent) -> None:
        epoch = gateway.edge.epoch
        actions = gateway.edge.handle(event, gateway.clock.at(self.now))
        assert gateway.edge.epoch >= epoch, "an epoch shrank at the edge"
        for action in actions:
            self._edge_action(gateway, action)

    def _edge_action(self, gateway: _Gateway, action: e.EdgeAction) -> None:
        match action:
            case e.SendPrompt(epoch=epoch, round=number, base=base):
                gateway.paths[number] = _Path(gateway.name, base, (), ())
                self._send_up(
                    gateway,
                    Prompt.model_construct(
                        session="s", epoch=epoch, reply=gateway.reply, round=number, base=base
                    ),
                )
            case e.SendBlock(epoch=epoch, round=number, base=base, tokens=tokens):
                self._check_drafted(gateway, base, tokens)
                gateway.paths.setdefault(number, _Path(gateway.name, base, (), tokens))
                self._send_up(
                    gateway,
                    Block.model_construct(
                        session="s",
                        epoch=epoch,
                        reply=gateway.reply,
                        round=number,
                        base=base,
                        tokens=tokens,
                        confidences=action.confidences,
                    ),
                )
            case e.SendForward():
                self._forward(gateway, action)
            case e.StartDraft():
                gateway.drafts[action.lane] = action
            case e.DropDraft(lane=lane):
                gateway.drafts.pop(lane, None)
            case e.Deliver(base=base, tokens=tokens, sources=sources):
                self._note(gateway.name, f"shows {tokens} from {base} on")
                assert len(sources) == len(tokens)
                assert base == len(gateway.shown), "a gap or a repetition towards the client"
                gateway.shown.extend(tokens)
                assert tuple(gateway.shown) == self.record.tokens[: len(gateway.shown)], (
                    "shown, not committed"
                )
            case e.SetTimer(timer=timer, delay_ms=delay_ms):
                gateway.timer = gateway.clock.at(self.now) + delay_ms, timer
            case e.Finish(reason=reason):
                self._gone(gateway)
                if gateway is self.gateway:
                    self.finished = reason
            case e.Fail():
                self._note(gateway.name, action)
                if gateway is not self.gateway:
                    self._gone(gateway)
                else:
                    assert action.retry_after_s is not None, f"failed: {action}"
                    self._resume(_End.CRASHES)  # the client was told to come again, and does

    def _forward(self, gateway: _Gateway, action: e.SendForward) -> None:
        parent = self._parent(gateway, action)
        assumed = (*parent.assumed, *parent.own[: action.accepted], action.next_token)
        path = _Path(gateway.name, parent.base, assumed, action.tokens, follows_forward=bool(parent.assumed))
        assert action.accepted <= len(parent.own), "a forward of an outcome that can't be"
        assert action.round not in gateway.paths, "two messages of one round"
        self._check_drafted(gateway, path.start, action.tokens)
        gateway.paths[action.round] = path
        self._send_up(
            gateway,
            Forward.model_construct(
                session="s",
                epoch=action.epoch,
                reply=gateway.reply,
                round=action.round,
                base=action.base,
                parent=action.parent,
                accepted=action.accepted,
                next_token=action.next_token,
                tokens=action.tokens,
                confidences=action.confidences,
            ),
        )

    def _parent(self, gateway: _Gateway, action: e.SendForward) -> _Path:
        """What a forward follows: a message sent before, or a pass that a verifier has told that it runs by itself."""
        if action.parent != action.round:
            return gateway.paths[action.parent]
        told = [
            message.following
            for message in self.published
            if isinstance(message, Verdict | Floor) and message.following
            if (message.epoch, message.base + len(message.tokens)) == (action.epoch, action.base)
        ]
        assert told, "a forward of a pass that nobody runs"
        self.counts.beside += 1
        return _Path(gateway.name, action.base, (), told[-1])

    def _measured(self) -> dict[str, float]:
        """What a verifier may say of its passes: nothing, or figures that change what the edge finds worth its while."""
        if self.choices.chance(0.5):
            return {}
        rows = 1 + self.choices.below(16)
        return {
            "verify_ms": 1.0 + self.choices.below(self.choices.pick([100, 5000])),
            "rows": rows,
            "sessions": 1 + self.choices.below(rows),
            "fixed_ms": float(self.choices.below(60)),
            "row_ms": float(self.choices.below(6)),
            "padded": 6 * (rows % 2),
        }

    def _check_drafted(self, gateway: _Gateway, base: int, tokens: Tokens) -> None:
        """What is sent up is what some lane drafted for that place."""
        assert not tokens or any(
            base >= start and path[base - start : base - start + len(tokens)] == tokens
            for start, path in gateway.lanes.values()
        ), "sent up what nobody drafted for that place"

    def _draft(self, gateway: _Gateway) -> None:
        lane = self.choices.pick(list(gateway.drafts))
        draft = gateway.drafts.pop(lane)
        if isinstance(draft, e.Drafted):
            self._note(gateway.name, f"has looked beyond lane {lane}")
            self._edge_event(gateway, draft)
            return
        context = [self.salt, *gateway.edge.committed[: draft.base], *draft.assumed]
        drafted: list[int] = []
        alternatives: list[tuple[tuple[int, float], ...]] = []
        length = draft.length - self.choices.below(draft.length + 1)
        for place in range(length + draft.beyond):
            token = target(context)
            alternatives.append(((token, 0.5), (self.choices.below(VOCABULARY), 0.4)))
            if place < length:
                if self.choices.chance(self.faults.wrong_draft):
                    token = self.choices.below(VOCABULARY)
                drafted.append(token)
                context.append(token)
        confidences = tuple(1.0 - self.choices.draw() for _ in drafted)
        gateway.lanes[lane] = draft.base, (*draft.assumed, *drafted)
        self._note(gateway.name, f"drafted {tuple(drafted)} after {draft.base} + {draft.assumed}")
        finished = e.Drafted(lane, tuple(drafted), confidences, tuple(alternatives))
        if drafted and draft.beyond and self.choices.chance(0.5):
            gateway.drafts[lane] = finished
            finished = replace(finished, alternatives=finished.alternatives[: len(drafted)])
        self._edge_event(gateway, finished)

    def _ring(self, gateway: _Gateway) -> None:
        assert gateway.timer is not None
        (_, timer), gateway.timer = gateway.timer, None
        self._note(gateway.name, "has waited long enough")
        self._edge_event(gateway, e.TimerFired(timer))

    def _crash_gateway(self) -> None:
        self._resume(self.choices.pick(list(_End)))

    def _resume(self, end: _End) -> None:
        """The client resumes on another gateway, from what is committed."""
        old = self.gateway
        self._note(old.name, end.value)
        self.counts.crashes += 1
        if end is _End.LEAVES:
            self._edge_event(old, e.Abandoned())
            self._send_up(
                old, Cancel.model_construct(session="s", epoch=old.edge.epoch, reason="the gateway stops")
            )
        if end is not _End.LINGERS:
            self._gone(old)
        for forgotten in self.gateways[1:]:
            self._count(forgotten)
        del self.gateways[1:]
        self._born += 1
        self.record = replace(self.record, epoch=self.record.epoch + 1, gateway=f"g{self._born}")
        self._new_gateway()
        if self.record.finish_reason is not None:
            self.finished = self.record.finish_reason  # replayed from Redis
            return
        record = self.record
        self._edge_event(
            self.gateway, e.Opened(epoch=record.epoch, committed=record.tokens, round=record.last_round + 1)
        )

    def _gone(self, gateway: _Gateway) -> None:
        gateway.drafts.clear()
        gateway.timer = None

    def _count(self, gateway: _Gateway) -> None:
        seen = gateway.edge.statistics
        self.counts.hits += seen.hits
        self.counts.late += seen.late
        self.counts.misses += seen.misses
        self.counts.forwards += seen.forwards
        self.counts.resent += seen.resent

    # --- the network ----------------------------------------------------------------------------------

    def _copies(self) -> int:
        drawn = self.choices.draw()
        if drawn >= 1.0 - self.faults.lose:
            return 0
        return 2 if drawn >= 1.0 - self.faults.lose - self.faults.double else 1

    def _send_up(self, gateway: _Gateway, message: Upward) -> None:
        copies = self._copies()
        if self.trace is not None:
            self._note(gateway.name, f"sends {_worded(message)}{_FATES[copies]}")
        self.uplink.extend([message] * copies)

    def _send_down(self, verifier: _Verifier, message: Downward, route: ReplyRoute) -> None:
        copies = self._copies()
        if self.trace is not None:
            self._note(verifier.name, f"tells {route.gateway} {_worded(message)}{_FATES[copies]}")
        self.downlink.extend([(route.gateway, message)] * copies)

    def _next_of(self, queue: list[object]) -> object:
        out_of_order = self.choices.chance(self.faults.reorder)
        return queue.pop(self.choices.below(len(queue)) if out_of_order else 0)

    def _deliver_up(self) -> None:
        message = self._next_of(self.uplink)  # type: ignore[arg-type]
        assert isinstance(message, Upward)
        verifier = self.verifier
        if len(self.verifiers) > 1 and self.verifiers[1].alive and self.choices.chance(STRAYS):
            verifier = self.verifiers[1]
        if verifier.session is None:
            if isinstance(message, Cancel):
                return
            core = v.VerifierSession("s", max_block=MAX_BLOCK, floor_draft=self._floor_draft)
            verifier.session = _Session(core)
        session = verifier.session
        if not isinstance(message, Cancel):
            sender = next((each for each in self.gateways if each.name == message.reply.gateway), None)
            if sender is None:
                return  # from long ago
            session.heard.setdefault(message.round, []).append(sender.paths[message.round])
        if self.trace is not None:
            self._note(verifier.name, f"reads {_worded(message)}")
        self._verifier_event(verifier, session, v.Received(message))

    def _deliver_down(self) -> None:
        name, message = self._next_of(self.downlink)  # type: ignore[arg-type, misc]
        gateway = next((each for each in self.gateways if each.name == name), None)
        if gateway is None or (gateway is not self.gateway and gateway.timer is None):
            return
        if self.trace is not None:
            self._note(gateway.name, f"reads {_worded(message)}")
        if isinstance(message, Verdict | Floor):
            message = message.model_copy(update=self._measured())
        self._edge_event(gateway, e.arrived(message))

    # --- verifiers ------------------------------------------------------------------------------------

    def _new_verifier(self) -> None:
        self._born += 1
        self.verifiers.insert(0, _Verifier(f"v{self._born}", self._new_clock()))

    def _floor_draft(self, said: Sequence[int], tail: v.Tail, block: v.Tail) -> Tokens:
        if block.tokens and self.choices.below(4):
            more = self.choices.pick([0, 0, 2])
            return (*block.tokens, *(self.choices.below(VOCABULARY) for _ in range(more)))
        if tail.tokens and self.choices.below(2):
            return tail.tokens
        length = self.choices.pick([0, 2, 3])
        right = self.expected[len(said) : len(said) + self.choices.below(length + 1)]
        return (*right, *(self.choices.below(VOCABULARY) for _ in range(length - len(right))))

    def _verifier_event(self, verifier: _Verifier, session: _Session, event: v.VerifierEvent) -> None:
        for action in session.core.handle(event, verifier.clock.at(self.now)):
            self._verifier_action(verifier, session, action)

    def _verifier_action(self, verifier: _Verifier, session: _Session, action: v.VerifierAction) -> None:
        match action:
            case v.Claim() | v.Commit() | v.Release():
                verifier.redis.append((session, action))
            case v.OpenEngine(committed=committed):
                session.engine = list(committed)
                verifier.passes.append((session, len(committed), ()))
            case v.Verify(base=base, tokens=tokens):
                self._note(verifier.name, action)
                self._check_pass(session, action)
                session.verified.add(action.round)
                verifier.passes.append((session, base, tokens))
            case v.SetTimer(timer=timer):
                session.timer = timer
            case v.Publish(message=message, route=route):
                self._check_published(session, message)
                self._send_down(verifier, message, route)
            case v.CloseEngine():
                session.engine = None
            case v.Forget():
                if verifier.session is session:
                    verifier.session = None

    def _check_pass(self, session: _Session, action: v.Verify) -> None:
        """A draft is verified at its own place and whole, maybe with more behind it, once all that it assumes is said."""
        assert action.base <= len(self.expected)
        if action.round == v.NO_ROUND:
            return
        heard = session.heard[action.round]
        paths = [path for path in heard if path.gateway == session.core._gateway]
        assert paths, "verified a draft of a gateway that drives the session no more"
        assert all(
            path.start <= action.base and path.assumed == self.expected[path.base : path.start]
            for path in paths
        ), "verified a forward of another outcome"
        rests = [path.own[action.base - path.start :][:MAX_BLOCK] for path in paths]
        assert all(rest == action.tokens[: len(rest)] for rest in rests), (
            "verified a draft at another place than its own"
        )
        self.counts.trims += any(path.start < action.base and path.own for path in paths)

    def _check_published(self, session: _Session, message: Downward) -> None:
        match message:
            case Verdict() | Floor():
                end = message.base + len(message.tokens)
                assert self.record.tokens[message.base : end] == message.tokens, "published, not committed"
                self.published.append(message)
                if message.taken is not None:
                    self._count_taken(session, message.taken)
                if isinstance(message, Floor):
                    self.counts.floors += 1
                else:
                    self._check_counted(
                        session, message.round, message.base, message.accepted, message.tokens
                    )
            case Stale():
                self.counts.stales += 1
            case Fault():
                self.counts.faults += 1
            case Hint(outcomes=(truth, *_)):
                self.counts.hints += 1
                said = self.expected[: self.max_tokens]
                for path in session.heard[message.round]:
                    if path.gateway != session.core._gateway:
                        continue
                    place = path.start + truth.accepted
                    assert said[path.start : place] == path.own[: truth.accepted], (
                        "a hint counts from another place than its block's"
                    )
                    assert said[place : place + 1] == (truth.next_token,), "a hint of another place"

    def _check_counted(self, session: _Session, number: int, base: int, accepted: int, said: Tokens) -> None:
        """`accepted` is how many of the draft's tokens the verdict holds, its last one being the target's own."""
        for path in session.heard[number]:
            if path.gateway != session.core._gateway or not path.start <= base:
                continue
            own = path.own[base - path.start :]
            agreed = 0
            while agreed < min(len(own), len(said) - 1) and own[agreed] == said[agreed]:
                agreed += 1
            assert accepted == agreed, "a verdict that counts wrongly"

    def _count_taken(self, session: _Session, number: int) -> None:
        assert number in session.verified, "said to have taken what was not verified"
        self.counts.taken += 1
        self.counts.chains += any(path.follows_forward for path in session.heard[number])

    def _run_pass(self, verifier: _Verifier) -> None:
        session, base, tokens = verifier.passes.pop(self.choices.below(len(verifier.passes)))
        output = session.engine
        if output is None or output[-1:] == [END] or len(output) >= self.max_tokens:
            return
        since = tuple(output[base:])
        block = tokens[len(since) :] if tokens[: len(since)] == since else ()
        if since and not block:
            return  # stale: the engine went on by itself, and that output is on its way
        if self.choices.chance(0.7):
            self._foresee(verifier, session, base, block)
        self._extend(verifier, session, output, block)

    def _extend(self, verifier: _Verifier, session: _Session, output: list[int], block: Tokens) -> None:
        said: list[int] = []
        reason: FinishReason | None = None
        for expected in (*block, None):
            said.append(target((self.salt, *output, *said)))
            if said[-1] == END:
                reason = FinishReason.STOP
            elif len(output) + len(said) == self.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None or said[-1] != expected:
                break
        output.extend(said)
        self._note(verifier.name, f"the engine says {tuple(said)}")
        self._verifier_event(verifier, session, v.EngineAnswered(tuple(said), reason))

    def _foresee(self, verifier: _Verifier, session: _Session, base: int, block: Tokens) -> None:
        accepted = self.choices.below(len(block) + 1)
        outcome = Outcome.model_construct(
            accepted=accepted, next_token=self.choices.below(VOCABULARY), confidence=0.5
        )
        right: list[int] = []
        for token in (*block, None):
            right.append(target((self.salt, *(session.engine or ()), *right)))
            if right[-1] != token or right[-1] == END or base + len(right) == self.max_tokens:
                break
        truth = Outcome.model_construct(accepted=len(right) - 1, next_token=right[-1], confidence=0.5)
        self._verifier_event(verifier, session, v.ExitSeen(base, 3, (truth, outcome), 1.0))

    def _run_out_of_patience(self, verifier: _Verifier) -> None:
        session = verifier.session
        assert session is not None and session.timer is not None
        timer, session.timer = session.timer, None
        self._verifier_event(verifier, session, v.TimerFired(timer))

    def _crash_verifier(self) -> None:
        """The process dies with its KV; its successor holds the partition."""
        self.counts.crashes += 1
        old = self.verifier
        self._note(old.name, "crashes")
        self._bury(old)
        del self.verifiers[2:]
        self._new_verifier()

    def _bury(self, verifier: _Verifier) -> None:
        """Nobody is there any more. What was under way to Redis may still be carried out."""
        verifier.alive = False
        verifier.session = None
        verifier.passes.clear()
        while len(verifier.redis) > 1:
            verifier.redis.pop()

    def _take_over(self) -> None:
        """Another verifier gets the partition while this one lives on: it is told, or frozen and finds out."""
        self.counts.takeovers += 1
        old = self.verifier
        self._note(old.name, "loses its partition")
        for older in self.verifiers[1:]:
            self._bury(older)
        del self.verifiers[2:]
        self._new_verifier()
        if self.choices.chance(0.5) and old.session is not None:
            self._verifier_event(old, old.session, v.Evict("its partition went to another"))

    def _unasked(self) -> None:
        verifier = self.verifier
        session = verifier.session
        if session is None or session.engine is None or not session.core.idle:
            return
        if session.engine[-1:] != [END] and len(session.engine) < self.max_tokens:
            self._extend(verifier, session, session.engine, ())

    def _evict(self) -> None:
        if self.verifier.session is not None:
            self._note(self.verifier.name, "evicts")
            self._verifier_event(self.verifier, self.verifier.session, v.Evict("idle"))

    # --- Redis ----------------------------------------------------------------------------------------

    def _run_redis(self, verifier: _Verifier) -> None:
        session, action = verifier.redis.popleft()
        before = self.record
        answer: v.VerifierEvent | None = None
        match action:
            case v.Claim(epoch=epoch):
                answer = self._claim(epoch, verifier.name)
            case v.Commit():
                answer = self._commit(action)
            case v.Release(epoch=epoch):
                self._release(epoch, verifier.name)
        self._note(verifier.name, f"Redis: {action} → {type(answer).__name__}")
        assert self.record.epoch >= before.epoch, "an epoch shrank"
        if isinstance(action, v.Commit) and self.record.tokens != before.tokens:
            assert action.epoch == before.epoch, "committed in an epoch that is over"
            assert self.record.tokens[: len(before.tokens)] == before.tokens, "took back what was committed"
            assert self.record.tokens == self.expected[: len(self.record.tokens)], (
                "committed what the target would not have said"
            )
        if answer is None or not verifier.alive:
            return
        if isinstance(answer, v.Claimed) and session.core.phase is v.Phase.ENDED:  # cancelled meanwhile
            self._release(answer.epoch, verifier.name)
            return
        if self.choices.chance(self.faults.redis_fails):
            answer = v.Failed("store_unavailable", "the answer was lost", 0.005)
        self._verifier_event(verifier, session, answer)

    def _release(self, epoch: int, owner: str) -> None:
        if (self.record.epoch, self.record.owner) == (epoch, owner):
            self.record = replace(self.record, owner="")

    def _claim(self, epoch: int, owner: str) -> v.VerifierEvent:
        record = self.record
        if epoch < record.epoch:
            return self._refusal(0)
        if record.owner not in ("", owner):
            record = replace(record, epoch=record.epoch + 1)
        self.record = replace(record, owner=owner)
        return v.Claimed(
            epoch=self.record.epoch,
            committed=record.tokens,
            gateway=record.gateway,
            last_round=record.last_round,
            last_base=record.last_base,
            finish_reason=record.finish_reason,
            policy=self.policy,
        )

    def _commit(self, commit: v.Commit) -> v.VerifierEvent:
        record = self.record
        if (commit.epoch, commit.base) != (record.epoch, len(record.tokens)) or record.finish_reason:
            self.counts.refused_commits += 1
            return self._refusal(commit.base)
        return self._append(commit)

    def _append(self, commit: v.Commit) -> v.VerifierEvent:
        self.record = replace(
            self.record,
            tokens=(*self.record.tokens, *commit.tokens),
            finish_reason=commit.finish_reason,
            last_round=commit.round,
            last_base=commit.base,
        )
        return v.Committed(len(self.record.tokens))

    def _refusal(self, since: int) -> v.Refused:
        record = self.record
        return v.Refused(
            epoch=record.epoch,
            base=len(record.tokens),
            since=min(since, len(record.tokens)),
            tokens=record.tokens[since:],
            gateway=record.gateway,
            finish_reason=record.finish_reason,
        )

    def _move(self) -> None:
        """kv-session places the session anew."""
        if self.record.finish_reason is None:
            self.record = replace(self.record, epoch=self.record.epoch + 1, owner="")
            self._note("kv", f"places the session anew, epoch {self.record.epoch}")
            if not self.choices.chance(self.faults.lose):
                self._edge_event(self.gateway, e.Relocated(self.record.epoch))

    # --- time -----------------------------------------------------------------------------------------

    def step(self) -> None:
        """One thing happens."""
        self.counts.steps += 1
        self.now += self.choices.draw() * 4
        drawn = 1.0 - self.choices.draw()
        faults = self.faults
        for probability, happen in (
            (faults.crash_verifier, self._crash_verifier),
            (faults.crash_gateway, self._crash_gateway),
            (faults.take_over, self._take_over),
            (faults.unasked, self._unasked),
            (faults.move, self._move),
            (faults.evict, self._evict),
        ):
            if drawn <= probability:
                happen()
                return
            drawn -= probability
        patient = not self.choices.chance(self.slowness)
        if possible := self._possible(patient=patient) or self._possible(patient=True):
            self.choices.pick(possible)()
        else:
            waiting = [each.clock.when(each.timer[0]) for each in self.gateways if each.timer is not None]
            assert waiting, "nobody waits for anything"
            self.now = max(self.now, min(waiting) + 1e-6)

    def _possible(self, *, patient: bool) -> list[Callable[[], None]]:
        possible: list[Callable[[], None]] = []
        if self.uplink:
            possible.append(self._deliver_up)
        if self.downlink:
            possible.append(self._deliver_down)
        for gateway in self.gateways:
            if gateway.drafts:
                possible.append(partial(self._draft, gateway))
            if gateway.timer is not None and gateway.timer[0] <= gateway.clock.at(self.now):
                possible.append(partial(self._ring, gateway))
        for verifier in self.verifiers:
            if verifier.passes and patient:
                possible.append(partial(self._run_pass, verifier))
            if verifier.redis:
                possible.append(partial(self._run_redis, verifier))
            if verifier.session is not None and verifier.session.timer is not None:
                possible.append(partial(self._run_out_of_patience, verifier))
        return possible

    def run(self, steps: int = STEPS) -> None:
        """Until the client has its answer; AssertionError when an invariant breaks or nothing comes of it."""
        while self.finished is None:
            assert self.counts.steps < steps, (
                f"not finished after {steps} steps: {self.gateway.edge.phase}, {len(self.shown)} tokens"
            )
            self.step()
        for gateway in self.gateways:
            self._count(gateway)
        assert self.finished is self.expected_reason
        assert self.shown == self.expected
        assert self.record.tokens == self.expected


_FATES: Final = (" (lost)", "", " (twice)")


def _worded(message: Upward | Downward) -> str:
    fields = [
        f"{name}={value}"
        for name, value in message.__dict__.items()
        if name not in ("session", "reply", "confidences", "elapsed_ms", "verify_ms", "commit_ms", "rows")
        and value is not None
    ]
    return f"{type(message).__name__}({', '.join(fields)})"
