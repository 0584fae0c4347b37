"""One session's I/O: makes events of messages, engine output and Redis' answers, and calls of the core's actions.

Decides nothing. What takes time (claims, commits, submits, closes) runs in order, one at a time a session, in a `Chain`
that outlives the session's state, so that a session opened anew never overtakes the closing of its former self.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.verifier import metrics
from services.verifier.engine.types import UNHEARD, BlockStatus, Engine, EngineOutput, ExitReport
from services.verifier.floor_drafts import FloorDraft, FloorShares
from shared import timeline
from shared.bus import Bus, Received
from shared.errors import OutriderError
from shared.protocol import (
    Block,
    Cancel,
    DraftsMessage,
    ExitsMessage,
    Floor,
    Forward,
    GenerationParams,
    Hint,
    ReplyRoute,
    Tokens,
    Verdict,
    VerdictsMessage,
)
from shared.session import SessionState
from shared.speculation import verifier as core
from shared.speculation.pace import Mean, least_worth
from shared.store import CommitConflict, StaleClaim, Store
from shared.telemetry import TraceContext

log = logging.getLogger(__name__)

Step = Callable[[], Coroutine[None, None, None]]
RETRY_AFTER_S = 0.5
ALONE_AFTER = 4
"""Passes of the floor in a row after which nobody is taken to draft for a session, until a draft comes."""
NOTE_AFTER_S = 0.1
"""A round that has been open for so long is noted for operators: most end before."""


@dataclass(slots=True)
class Passes:
    """The passes of all sessions that are under way, and what the engine says that one takes by its rows, ms."""

    rows: int = 0
    sessions: int = 0
    fixed_ms: float = 0.0
    row_ms: float = 0.0
    padded: int = 0
    """Rows that every block takes, however short; 0: those that it has."""
    tokens: Mean = field(default_factory=Mean)
    """What a session gets by a pass."""
    floor: FloorShares = field(default_factory=FloorShares)
    """How often the floor's own drafts are right."""

    def usual_ms(self, rows: int) -> float | None:
        """What a pass of so many rows takes; None before the engine knows."""
        return self._line(rows) if self.row_ms > 0.0 else None

    def least_worth(self) -> float:
        """Tokens that a row of one more session has to bring, to be worth it: those that all who share the pass would get
        in the time that it takes. 0 before the engine knows that."""
        pass_ms = self.usual_ms(self.rows + 1)
        if not pass_ms:
            return 0.0
        return least_worth(self.tokens(1.0) / pass_ms, self._line, self.sessions + 1)

    def _line(self, rows: float) -> float:
        return self.fixed_ms + self.row_ms * rows


class Host(Protocol):
    """What a session needs of the service around it."""

    engine: Engine
    store: Store
    bus: Bus
    incarnation: str
    passes: Passes

    async def take_place(self, shell: SessionShell) -> bool:
        """Whether this session may hold KV; an idle one may have to go first."""

    def leave_place(self, shell: SessionShell) -> None:
        """The engine holds nothing of this session any more."""

    def forget(self, session: str) -> None:
        """The session's state here has ended."""

    def done(self, received: Received[DraftsMessage]) -> None:
        """The message needs no reading again."""

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Run something that nobody waits for."""


class Chain:
    """Runs what is put into it in order, one at a time."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque()
        self._task: asyncio.Task[None] | None = None

    def put(self, step: Step) -> None:
        """Run `step` after all that was put in before."""
        self._steps.append(step)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def drained(self) -> None:
        """Return when nothing is left to run."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while self._steps:
                await self._steps.popleft()()
        finally:
            self._task = None
            if (
                self._steps
            ):  # a step was cancelled or failed in a way nobody foresaw: the rest still has to run
                self._task = asyncio.create_task(self._run())


@dataclass(slots=True)
class _Clock:
    """When a pass began and ended, and its tokens were committed; `rows` are those of all `sessions` at its end."""

    began_s: float
    rows: int
    sessions: int = 1
    answered_s: float = 0.0
    committed_s: float = 0.0
    passes: int = 1

    @property
    def pass_ms(self) -> float:
        return max(0.0, self.answered_s - self.began_s) * 1000

    @property
    def commit_ms(self) -> float:
        return max(0.0, self.committed_s - self.answered_s) * 1000


class SessionShell:
    """Carries out what `core.VerifierSession` decides for one session."""

    def __init__(
        self,
        session: str,
        host: Host,
        *,
        max_block: int,
        chain: Chain,
        floor_drafts: bool = True,
        own_drafts: bool = False,
    ) -> None:
        """`own_drafts` is what `EngineInfo` says."""
        self.session = session
        self.chain = chain
        self.partition = -1
        self.last_active_s = time.monotonic()
        self.kv_free = asyncio.Event()
        self._host = host
        self._core = core.VerifierSession(
            session, max_block=max_block, floor_draft=self._draft if floor_drafts else core.no_draft
        )
        self._floor = FloorDraft(host.passes.floor)
        self._own_drafts = own_drafts
        self._floor_passes = 0  # since a draft came
        self._state: SessionState | None = None
        self._prompt: Tokens = ()
        self._reader: asyncio.Task[None] | None = None
        self._trace: TraceContext | None = None
        self._unanswered: list[Received[DraftsMessage]] = []
        self._answers: list[tuple[VerdictsMessage, ReplyRoute]] = []
        self._round: core.Verify | None = None
        self._noting = False
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._pass: _Clock | None = None
        self._answered: deque[_Clock] = deque()  # passes whose tokens are still to be committed
        self._published: _Clock | None = None

    @property
    def idle(self) -> bool:
        """Parked, waiting for a block."""
        return self._core.idle

    @property
    def epoch(self) -> int:
        """The epoch in which the session is held here."""
        return self._core.epoch

    @property
    def unanswered(self) -> int:
        """Messages whose answer is still to come."""
        return len(self._unanswered)

    # --- events ---------------------------------------------------------------------------------------

    def receive(self, received: Received[DraftsMessage]) -> None:
        """Take in a message of the drafts topic."""
        self.last_active_s = time.monotonic()
        self.partition = received.partition
        self._trace = received.trace or self._trace
        self._unanswered.append(received)
        if isinstance(received.message, Block | Forward) and received.message.tokens:
            self._floor_passes = 0
        self.handle(core.Received(received.message))

    def exit_seen(self, report: ExitReport) -> None:
        """Take in what an early exit foresees, while the pass runs."""
        self.handle(core.ExitSeen(report.base, report.layer, report.outcomes, report.elapsed_ms))

    def handle(self, event: core.VerifierEvent) -> None:
        """Feed the core and do what it says."""
        now_ms = time.monotonic() * 1000
        actions = self._core.handle(event, now_ms)
        timeline.note("verifier", self.session, now_ms, event, actions)
        for action in actions:
            self._act(action)
        answers, self._answers = self._answers, []
        answered = [each for each in self._unanswered if not self._waits_for(each.message)]
        if answered:
            self._unanswered = [each for each in self._unanswered if self._waits_for(each.message)]
        if answers:
            self._host.background(self._send(answers, answered))
        else:
            self._done(answered)

    def _waits_for(self, message: DraftsMessage) -> bool:
        return not isinstance(message, Cancel) and self._core.waits_for(message.round)

    def _done(self, answered: Sequence[Received[DraftsMessage]]) -> None:
        for received in answered:
            self._host.done(received)

    def _later(self, step: Step) -> None:
        """Run `step` after all others of this session; a defect in it costs the session its round and no more."""

        async def guarded() -> None:
            try:
                await step()
            except Exception:
                self._fail_by_defect()

        self.chain.put(guarded)

    def _fail_by_defect(self) -> None:
        log.exception("a defect in handling %s", self.session)
        self.handle(core.Failed("internal_error", "the verifier failed on this session; its log says why"))

    # --- actions --------------------------------------------------------------------------------------

    def _act(self, action: core.VerifierAction) -> None:
        match action:
            case core.Publish(message=message, route=route):
                self._publish(message, route)
            case core.Verify():
                self._clock(1 + len(action.tokens))
                self._host.background(self._verify(action))
            case core.SetTimer(timer=timer, delay_ms=delay_ms):
                self._stop_timer()
                self._timer = asyncio.get_running_loop().call_later(
                    delay_ms / 1000, lambda: self.handle(core.TimerFired(timer))
                )
            case core.Commit():
                self._later(lambda: self._commit(action))
            case core.Claim():
                self._later(lambda: self._claim(action))
            case core.OpenEngine(committed=committed):
                self._later(lambda: self._open_engine(committed))
            case core.CloseEngine():
                self._closing = True
                self._stop_reading()
                self._later(self._close_engine)
            case core.Release(epoch=epoch):
                self._later(lambda: self._release(epoch))
            case core.Forget():
                self._stop_reading()
                self._stop_timer()
                self._stop_clock()
                if not self._closing:  # the engine has let go of it by itself, or never held it
                    self._host.leave_place(self)
                self._host.forget(self.session)

    def _publish(self, message: VerdictsMessage | ExitsMessage, route: ReplyRoute) -> None:
        if isinstance(message, Hint):
            self._host.bus.post(message, partition=route.partition, trace=self._child_trace())
            metrics.HINTS.inc()
            return
        clock = self._published
        if isinstance(message, Verdict | Floor) and clock is not None:
            message = message.model_copy(
                update={
                    "verify_ms": round(clock.pass_ms, 3),
                    "commit_ms": round(clock.commit_ms, 3),
                    "rows": clock.rows,
                    "sessions": clock.sessions,
                    "fixed_ms": round(self._host.passes.fixed_ms, 2),
                    "row_ms": round(self._host.passes.row_ms, 4),
                    "padded": self._host.passes.padded,
                    "passes": clock.passes,
                }
            )
        metrics.ANSWERS.labels(message.kind).inc()
        self._answers.append((message, route))

    async def _send(
        self,
        answers: Sequence[tuple[VerdictsMessage, ReplyRoute]],
        answered: Sequence[Received[DraftsMessage]],
    ) -> None:
        """Publish the answers; only then the messages that they answer need no reading again."""
        trace = self._child_trace()
        for message, route in answers:
            try:
                await self._host.bus.send(message, partition=route.partition, trace=trace)
            except OutriderError as error:  # it is committed: the gateway asks again and gets the same answer
                log.warning("could not publish a %s for %s: %s", message.kind, self.session, error)
        self._done(answered)

    def _child_trace(self) -> TraceContext | None:
        return self._trace.child() if self._trace is not None else None

    async def _claim(self, action: core.Claim) -> None:
        try:
            claim = await self._host.store.claim(
                self.session, epoch=action.epoch, owner=self._host.incarnation
            )
        except StaleClaim as stale:
            tokens = await self._tokens_or_none()
            self.handle(_refused_by(stale.state, tokens))
        except OutriderError as error:
            self.handle(_failed(error))
        else:
            state = claim.state
            if claim.took_over:
                log.info(
                    "took over %s at %d committed tokens, epoch %d", self.session, state.base, state.epoch
                )
                metrics.TAKEOVERS.inc()
            if self._core.phase is core.Phase.ENDED:  # cancelled meanwhile
                await self._release(state.epoch)
                return
            self._state, self._prompt = state, claim.prompt
            self.handle(
                core.Claimed(
                    epoch=state.epoch,
                    committed=claim.tokens,
                    gateway=state.reply.gateway,
                    last_round=state.last_round,
                    last_base=state.last_base,
                    finish_reason=state.finish_reason,
                    policy=state.params.policy,
                    logprobs=claim.logprobs,
                )
            )

    async def _tokens_or_none(self) -> Tokens:
        try:
            return await self._host.store.tokens(self.session)
        except OutriderError:
            return ()

    async def _commit(self, action: core.Commit) -> None:
        clock = self._answered.popleft() if self._answered else None
        if self._round is not None and self._round.base <= action.base:
            self._round = None
        try:
            result = await self._host.store.commit(
                self.session,
                epoch=action.epoch,
                round=action.round,
                base=action.base,
                tokens=action.tokens,
                finish_reason=action.finish_reason,
                drafted=action.drafted,
                accepted=action.accepted,
                logprobs=action.logprobs,
            )
        except CommitConflict as conflict:
            log.info("commit of %s at %d refused: %s", self.session, action.base, conflict)
            metrics.CONFLICTS.inc()
            self.handle(
                core.Refused(
                    epoch=conflict.epoch,
                    base=conflict.base,
                    since=min(action.base, conflict.base),
                    tokens=conflict.tokens,
                    gateway=conflict.gateway,
                    finish_reason=conflict.finish_reason,
                )
            )
        except OutriderError as error:
            self.handle(_failed(error))
        else:
            if clock is not None:
                clock.committed_s = time.monotonic()
                metrics.VERIFY_SECONDS.observe(clock.pass_ms / 1000)
                metrics.COMMIT_SECONDS.observe(clock.commit_ms / 1000)
            self._published = clock
            metrics.COMMITTED_TOKENS.inc(len(action.tokens))
            metrics.DRAFTED_TOKENS.inc(action.drafted)
            metrics.ACCEPTED_TOKENS.inc(action.accepted)
            self.handle(core.Committed(result.base))

    async def _verify(self, action: core.Verify) -> None:
        confidences = action.confidences
        alone = action.round == core.NO_ROUND and self._alone
        if action.round == core.NO_ROUND:  # the floor's: no gateway knows of it
            confidences = (UNHEARD,) * len(action.tokens)
            self._floor_passes += 1
        try:
            status = await self._host.engine.submit(
                self.session, action.base, action.tokens, confidences, action.rows, alone=alone
            )
        except OutriderError as error:
            self.handle(_failed(error))
            return
        if status is BlockStatus.GONE:
            self.handle(core.Failed("unavailable", "the engine let go of the session", RETRY_AFTER_S))
            return
        # A stale block needs no answer of its own: the engine went on by itself, and what it said is on its way.
        if action.round == core.NO_ROUND:
            return
        self._round = action
        if not self._noting:
            self._noting = True
            self._host.background(self._note_rounds())

    async def _note_rounds(self) -> None:
        """Note a round that stays in flight, for operators; nothing waits for it. One at a time: of several, the newest.

        Hints are not noted: at 0.25 ms of CPU each they would cost more than the commit.
        """
        try:
            while self._round is not None:
                await asyncio.sleep(NOTE_AFTER_S)
                noted, self._round = self._round, None
                if noted is None:
                    return
                await self._host.store.set_round(
                    self.session,
                    epoch=self._core.epoch,
                    round=noted.round,
                    base=noted.base,
                    block=noted.tokens,
                )
        except OutriderError as error:
            log.debug("could not note a round of %s: %s", self.session, error)
        finally:
            self._noting = False

    # --- the engine's stream --------------------------------------------------------------------------

    async def _open_engine(self, committed: Tokens) -> None:
        if self._core.phase is not core.Phase.PREFILLING:
            return
        if not await self._host.take_place(self):
            text = "every place on this verifier is taken; try again later"
            self.handle(core.Failed("overloaded", text, RETRY_AFTER_S))
            return
        if self._core.phase is core.Phase.PREFILLING and self._state is not None:
            self._start_reading(committed, self._state.params)

    def _start_reading(self, committed: Tokens, params: GenerationParams) -> None:
        try:
            stream = self._host.engine.open(self.session, self._prompt, committed, params)
        except OutriderError as error:
            self.handle(_failed(error))
            return
        self._reader = asyncio.create_task(self._read(stream))

    async def _read(self, stream: AsyncIterator[EngineOutput]) -> None:
        try:
            async for output in stream:
                self._stop_clock(answered=True)
                self._answered[-1].passes = output.passes
                self._judge(output.tokens)
                self._floor.hear(output.drafted)
                usual_ms = self._host.passes.usual_ms(self._answered[-1].rows)
                self.handle(
                    core.EngineAnswered(output.tokens, output.finish_reason, output.logprobs, usual_ms)
                )
        except OutriderError as error:
            self.handle(_failed(error))
        except Exception:
            self._fail_by_defect()

    def _stop_reading(self) -> None:
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._reader = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- clocks ---------------------------------------------------------------------------------------

    def _clock(self, rows: int) -> None:
        """A pass of so many rows begins. The rows that share it are those that are under way now."""
        self._stop_clock()
        self._host.passes.rows += rows
        self._host.passes.sessions += 1
        self._pass = _Clock(time.monotonic(), rows)

    def _stop_clock(self, *, answered: bool = False) -> None:
        """The pass has ended, with an answer or without."""
        clock, self._pass = self._pass, None
        if clock is not None:
            passes = self._host.passes
            own, clock.rows, clock.sessions = clock.rows, passes.rows, passes.sessions
            passes.rows -= own
            passes.sessions -= 1
        if answered:
            now_s = time.monotonic()
            clock = clock or _Clock(now_s, 1)
            clock.answered_s = now_s
            self._answered.append(clock)

    def _draft(self, said: Sequence[int], tail: core.Tail, block: core.Tail) -> Tokens:
        """What is verified beside the target's next token; nothing where the engine sees to that."""
        if self._own_drafts and self._alone and not block.tokens:
            return ()
        return self._floor.draft((*self._prompt, *said), tail, self._host.passes.least_worth(), block)

    @property
    def _alone(self) -> bool:
        """Whether nobody else drafts for the session."""
        return self._floor_passes >= ALONE_AFTER

    def _judge(self, said: Tokens) -> None:
        """Learn from what a pass said: how much that is, and what the floor's drafts were worth."""
        self._host.passes.tokens.saw(len(said))
        self._floor.judge(said)

    async def _close_engine(self) -> None:
        try:
            await self._host.engine.close(self.session)
        except OutriderError as error:
            log.debug("closing %s in the engine: %s", self.session, error)
        finally:
            self._closing = False
            self._host.leave_place(self)

    async def _release(self, epoch: int) -> None:
        try:
            await self._host.store.release(self.session, epoch=epoch, owner=self._host.incarnation)
        except OutriderError as error:  # another verifier then takes over with a new epoch
            log.warning("could not release %s: %s", self.session, error)


def _failed(error: OutriderError) -> core.Failed:
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.status >= 500:
        retry_after_s = RETRY_AFTER_S
    return core.Failed(error.code, error.message, retry_after_s)


def _refused_by(state: SessionState, tokens: Tokens) -> core.Refused:
    return core.Refused(
        epoch=state.epoch,
        base=len(tokens),
        since=0,
        tokens=tokens,
        gateway=state.reply.gateway,
        finish_reason=state.finish_reason,
    )
