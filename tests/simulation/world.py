"""A world in one process: gateways, verifiers, engine and store as plain objects, a network that misbehaves.

Everything is driven by one seeded random generator, so that a seed is a schedule. Messages are lost, doubled,
reordered and delayed; gateways and verifiers crash at any step; sessions move and are evicted; Redis' answers get lost;
drafts are right, wrong or missing; the engine now and then says a token nobody asked for. What is checked: the client
gets exactly what the target says, nothing is published before it is committed, epochs never shrink, and the session
ends.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from hashlib import blake2b

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

VOCABULARY = 7
END = 0


def target(prefix: Tokens) -> int:
    """The target's next token: a fixed function of all tokens before it."""
    value = int.from_bytes(blake2b(bytes(prefix), digest_size=4).digest())
    return END if value % 23 == 0 else 1 + value % (VOCABULARY - 1)


def target_output(max_tokens: int, salt: int) -> tuple[Tokens, FinishReason]:
    """What the target alone would say."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(target((salt, *tokens)))
        if tokens[-1] == END:
            return tuple(tokens), FinishReason.STOP
    return tuple(tokens), FinishReason.LENGTH


@dataclass
class Record:
    """The session in Redis."""

    epoch: int = 1
    owner: str = ""
    gateway: str = "g0"
    tokens: Tokens = ()
    finish_reason: FinishReason | None = None
    last_round: int = -1
    last_base: int = -1


@dataclass
class Faults:
    """How often the world misbehaves, as probabilities a step or a message."""

    lose: float = 0.1
    double: float = 0.1
    reorder: float = 0.3
    crash_verifier: float = 0.01
    crash_gateway: float = 0.01
    unasked: float = 0.02
    move: float = 0.01
    evict: float = 0.01
    redis_fails: float = 0.01
    wrong_draft: float = 0.4


@dataclass
class _Pass:
    owner: v.VerifierSession
    base: int
    tokens: Tokens


@dataclass
class World:
    """One session and everybody who has to do with it."""

    seed: int
    faults: Faults
    max_tokens: int = 12
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.salt = self.seed % 200 + 7
        self.expected, self.expected_reason = target_output(self.max_tokens, self.salt)
        self.now = 0.0
        self.gateway = 0
        self.verifier = 0
        self.shown: list[int] = []
        self.finished: FinishReason | None = None
        self.failed: e.Fail | None = None
        self.published: list[Verdict | Floor] = []
        self.forwards: dict[tuple[int, int], Forward] = {}
        self.blocks: dict[tuple[int, int], Block] = {}
        self.taken = 0
        self.policy = self.random.choice(list(Policy))
        self.slowness = self.random.choice([0.0, 0.5, 0.95])
        self.uplink: list[Prompt | Block | Forward | Cancel] = []
        self.downlink: list[Verdict | Floor | Stale | Fault | Hint] = []
        self.drafts: list[e.StartDraft] = []
        self.timers: list[tuple[float, int]] = []
        self.verifier_timers: list[tuple[v.VerifierSession, int]] = []
        self.session: v.VerifierSession | None = None
        self.redis: list[tuple[v.VerifierSession, str, v.Claim | v.Commit | v.Release]] = []
        self.passes: list[_Pass] = []
        self.engine: dict[v.VerifierSession, list[int]] = {}
        self.crashes = 0
        self.edge = self._new_edge()
        self._edge_event(e.Opened(epoch=1))

    # --- the gateway ----------------------------------------------------------------------------------

    @property
    def _gateway_name(self) -> str:
        return f"g{self.gateway}"

    def _new_edge(self) -> e.EdgeSession:
        return e.EdgeSession(
            e.EdgeConfig(
                gateway=self._gateway_name,
                max_tokens=self.max_tokens,
                block_length=self.random.randrange(5),
                adaptive=self.random.random() < 0.5,
                stop_tokens=frozenset({END}),
                policy=self.policy,
                hints=self.random.random() < 0.7,
                guesses=self.random.random() < 0.7,
                forwards=self.random.random() < 0.7,
                lane_threshold=self.random.choice([0.0, 0.05, 0.3]),
                max_lanes=self.random.randrange(6),
                round_timeout_ms=50,
                stall_timeout_ms=1e9,
            )
        )

    def _edge_event(self, event: e.EdgeEvent) -> None:
        for action in self.edge.handle(event, self.now):
            self._edge_action(action)

    def _edge_action(self, action: e.EdgeAction) -> None:
        reply = ReplyRoute(gateway=self._gateway_name, partition=0)
        match action:
            case e.SendPrompt(epoch=epoch, round=number, base=base):
                self._send_up(Prompt(session="s", epoch=epoch, reply=reply, round=number, base=base))
            case e.SendBlock(epoch=epoch, round=number, base=base, tokens=tokens):
                block = Block(session="s", epoch=epoch, reply=reply, round=number, base=base, tokens=tokens)
                self.blocks.setdefault((epoch, number), block)
                self._send_up(block)
            case e.SendForward():
                forward = Forward(
                    session="s",
                    epoch=action.epoch,
                    reply=reply,
                    round=action.round,
                    base=action.base,
                    parent=action.parent,
                    accepted=action.accepted,
                    next_token=action.next_token,
                    tokens=action.tokens,
                )
                self.forwards[action.epoch, action.round] = forward
                self._send_up(forward)
            case e.StartDraft():
                self.drafts.append(action)
            case e.DropDraft(lane=lane):
                self.drafts = [draft for draft in self.drafts if draft.lane != lane]
            case e.Deliver(base=base, tokens=tokens, sources=sources):
                assert len(sources) == len(tokens)
                assert base == len(self.shown), "a gap or a repetition towards the client"
                self.shown.extend(tokens)
                assert tuple(self.shown) == self.record.tokens[: len(self.shown)], "shown, not committed"
            case e.SetTimer(timer=timer, delay_ms=delay_ms):
                self.timers = [(self.now + delay_ms, timer)]
            case e.Finish(reason=reason):
                self.finished = reason
            case e.Fail(retry_after_s=retry) if retry is not None:
                self._crash_gateway()  # the client was told to come again, and does
            case e.Fail():
                self.failed = action

    def _draft(self) -> None:
        draft = self.drafts.pop(self.random.randrange(len(self.drafts)))
        context = [*self.edge.committed[: draft.base], *draft.assumed]
        drafted: list[int] = []
        for _ in range(self.random.randint(0, draft.length)):
            token = target((self.salt, *context, *drafted))
            if self.random.random() < self.faults.wrong_draft:
                token = self.random.randrange(VOCABULARY)
            drafted.append(token)
        alternatives = tuple(
            ((target((self.salt, *context, *drafted[:place])), 0.5), (self.random.randrange(VOCABULARY), 0.4))
            for place in range(len(drafted) + draft.beyond)
        )
        confidences = tuple(self.random.random() for _ in drafted)
        self._edge_event(e.Drafted(draft.lane, tuple(drafted), confidences, alternatives))

    def _crash_gateway(self) -> None:
        """The client resumes on another gateway, from what it has been shown."""
        self.crashes += 1
        self.gateway += 1
        self.record = replace(self.record, epoch=self.record.epoch + 1, gateway=self._gateway_name)
        self.drafts, self.timers = [], []
        self.shown = list(self.record.tokens)  # replayed from Redis
        if self.record.finish_reason is not None:
            self.finished = self.record.finish_reason
            return
        self.edge = self._new_edge()
        self._edge_event(
            e.Opened(epoch=self.record.epoch, committed=self.record.tokens, round=self.record.last_round + 1)
        )

    # --- the network ----------------------------------------------------------------------------------

    def _send_up(self, message: Prompt | Block | Forward | Cancel) -> None:
        if self.random.random() < self.faults.lose:
            return
        self.uplink.extend([message] * (2 if self.random.random() < self.faults.double else 1))

    def _send_down(self, message: Verdict | Floor | Stale | Fault | Hint) -> None:
        if self.random.random() < self.faults.lose:
            return
        self.downlink.extend([message] * (2 if self.random.random() < self.faults.double else 1))

    def _take(self, queue: list[object]) -> object:
        return queue.pop(
            self.random.randrange(len(queue)) if self.random.random() < self.faults.reorder else 0
        )

    def _deliver_up(self) -> None:
        message = self._take(self.uplink)  # type: ignore[arg-type]
        assert isinstance(message, Prompt | Block | Forward | Cancel)
        if self.session is None:
            self.session = v.VerifierSession("s", max_block=3, floor_draft=self._floor_draft)
        self._verifier_event(self.session, v.Received(message))

    def _deliver_down(self) -> None:
        match self._take(self.downlink):  # type: ignore[arg-type]
            case Verdict() as verdict:
                self._edge_event(e.VerdictArrived(verdict))
            case Floor() as floor:
                self._edge_event(e.FloorArrived(floor))
            case Stale() as stale:
                self._edge_event(e.StaleArrived(stale))
            case Fault() as fault:
                self._edge_event(e.FaultArrived(fault))
            case Hint() as hint:
                self._edge_event(e.HintArrived(hint))

    # --- the verifier ---------------------------------------------------------------------------------

    @property
    def _owner(self) -> str:
        return f"v{self.verifier}"

    def _floor_draft(self, said: object) -> Tokens:
        return tuple(self.random.randrange(VOCABULARY) for _ in range(self.random.choice([0, 0, 2])))

    def _verifier_event(self, session: v.VerifierSession, event: v.VerifierEvent) -> None:
        for action in session.handle(event, self.now):
            self._verifier_action(session, action)

    def _verifier_action(self, session: v.VerifierSession, action: v.VerifierAction) -> None:
        match action:
            case v.Claim() | v.Commit() | v.Release():
                self.redis.append((session, self._owner, action))
            case v.OpenEngine(committed=committed):
                self.engine[session] = list(committed)
                self.passes.append(_Pass(session, len(committed), ()))
            case v.Verify(round=number, base=base, tokens=tokens):
                self._check_forward(session, number, base)
                self.passes.append(_Pass(session, base, tokens))
            case v.SetTimer(timer=timer):
                self.verifier_timers = [(session, timer)]
            case v.Publish(message=message):
                if isinstance(message, Verdict | Floor):
                    self.taken += message.taken is not None
                    end = message.base + len(message.tokens)
                    assert self.record.tokens[message.base : end] == message.tokens, (
                        "published, not committed"
                    )
                    self.published.append(message)
                self._send_down(message)
            case v.CloseEngine():
                self.engine.pop(session, None)
            case v.Forget():
                if self.session is session:
                    self.session = None

    def _check_forward(self, session: v.VerifierSession, number: int, base: int) -> None:
        """A forward is verified only if the outcome that it assumes came true: no pass is spent on another."""
        forward = self.forwards.get((session.epoch, number))
        if forward is None:
            return
        chain = [forward]
        while (parent := self.forwards.get((forward.epoch, chain[-1].parent))) is not None:
            chain.append(parent)
        if (session.epoch, chain[-1].parent) not in self.blocks or base > len(self.expected):
            return
        root = self.blocks[session.epoch, chain[-1].parent]
        path, own = list(self.expected[: root.base]), root.tokens
        for link in reversed(chain):
            path += [*own[: link.accepted], link.next_token]
            own = link.tokens
        assert tuple(path) == self.expected[: len(path)], "verified a forward of another outcome"

    def _run_pass(self) -> None:
        ran = self.passes.pop(self.random.randrange(len(self.passes)))
        output = self.engine.get(ran.owner)
        if output is None or output[-1:] == [END] or len(output) >= self.max_tokens:
            return
        since = tuple(output[ran.base :])
        block = ran.tokens[len(since) :] if ran.tokens[: len(since)] == since else ()
        if since and not block:
            return  # stale: the engine went on by itself, and that output is on its way
        if self.random.random() < 0.7:
            self._foresee(ran, block)
        self._extend(ran.owner, output, block)

    def _extend(self, session: v.VerifierSession, output: list[int], block: Tokens) -> None:
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
        self._verifier_event(session, v.EngineAnswered(tuple(said), reason))

    def _foresee(self, ran: _Pass, block: Tokens) -> None:
        accepted = self.random.randint(0, len(block))
        outcome = Outcome(accepted=accepted, next_token=self.random.randrange(VOCABULARY), confidence=0.5)
        right, output = [], self.engine[ran.owner]
        for token in (*block, None):
            right.append(target((self.salt, *output, *right)))
            if right[-1] != token:
                break
        truth = Outcome(accepted=len(right) - 1, next_token=right[-1], confidence=0.5)
        self._verifier_event(ran.owner, v.ExitSeen(ran.base, 3, (truth, outcome), 1.0))

    def _crash_verifier(self) -> None:
        """The process dies with its KV; its successor holds the partition."""
        self.crashes += 1
        self.verifier += 1
        self.session = None
        self.passes, self.engine, self.verifier_timers = [], {}, []
        # What had been sent to Redis may still be carried out, but nobody hears the answer.

    def _unasked(self) -> None:
        session = self.session
        output = self.engine.get(session) if session is not None else None
        if session is None or output is None or not session.idle:
            return
        if output[-1:] != [END] and len(output) < self.max_tokens:
            self._extend(session, output, ())

    def _evict(self) -> None:
        if self.session is not None:
            self._verifier_event(self.session, v.Evict("idle"))

    def _run_out_of_patience(self) -> None:
        ((session, timer),) = self.verifier_timers
        self.verifier_timers = []
        self._verifier_event(session, v.TimerFired(timer))

    # --- Redis ----------------------------------------------------------------------------------------

    def _run_redis(self) -> None:
        firsts: dict[int, int] = {}
        for index, (session, _, _) in enumerate(self.redis):
            firsts.setdefault(id(session), index)
        session, owner, action = self.redis.pop(self.random.choice(list(firsts.values())))
        record = self.record
        answer: v.VerifierEvent | None = None
        match action:
            case v.Claim(epoch=epoch):
                answer = self._claim(epoch, owner)
            case v.Commit():
                answer = self._commit(action)
            case v.Release(epoch=epoch):
                if (record.epoch, record.owner) == (epoch, owner):
                    self.record = replace(record, owner="")
        assert self.record.epoch >= record.epoch
        if answer is not None and self.random.random() < self.faults.redis_fails:
            answer = v.Failed("store_unavailable", "the answer was lost", 0.005)
        if answer is not None and owner == self._owner:
            self._verifier_event(session, answer)

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
            return self._refusal(commit.base)
        tokens = (*record.tokens, *commit.tokens)
        assert tokens == self.expected[: len(tokens)], "committed what the target would not have said"
        self.record = replace(
            record,
            tokens=tokens,
            finish_reason=commit.finish_reason,
            last_round=commit.round,
            last_base=commit.base,
        )
        return v.Committed(len(tokens))

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
            if self.random.random() > self.faults.lose:
                self._edge_event(e.Relocated(self.record.epoch))

    # --- time -----------------------------------------------------------------------------------------

    def step(self) -> None:
        """One thing happens."""
        self.now += self.random.random() * 4
        rare = [
            (self.faults.crash_verifier, self._crash_verifier),
            (self.faults.crash_gateway, self._crash_gateway),
            (self.faults.unasked, self._unasked),
            (self.faults.move, self._move),
            (self.faults.evict, self._evict),
        ]
        for probability, happen in rare:
            if self.random.random() < probability:
                happen()
                return
        due = [timer for at, timer in self.timers if at <= self.now]
        slow = self.random.random() < self.slowness
        possible = [
            *([self._deliver_up] if self.uplink else []),
            *([self._deliver_down] if self.downlink else []),
            *([self._draft] if self.drafts else []),
            *([self._run_pass] if self.passes and not slow else []),
            *([self._run_redis] if self.redis else []),
            *([self._run_out_of_patience] if self.verifier_timers else []),
            *([lambda: self._edge_event(e.TimerFired(due[0]))] if due else []),
        ]
        if possible:
            self.random.choice(possible)()
        elif self.passes:
            self._run_pass()
        else:
            self.now = max(self.now, min((at for at, _ in self.timers), default=self.now))

    def run(self, steps: int = 5_000) -> None:
        """Until the client has its answer; AssertionError when an invariant breaks or nothing comes of it."""
        for _ in range(steps):
            if self.finished is not None:
                break
            assert self.failed is None, self.failed
            self.step()
        assert self.finished is self.expected_reason, (
            f"not finished: {self.edge.phase}, {len(self.shown)} tokens"
        )
        assert tuple(self.shown) == self.expected
        assert self.record.tokens == self.expected
