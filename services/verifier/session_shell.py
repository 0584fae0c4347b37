"""One session's I/O: makes events of messages, engine output and Redis' answers, and calls of the core's actions.

Decides nothing. What takes time (claims, commits, submits, closes) runs in order, one at a time a session, in a `Chain`
that outlives the session's state, so that a session opened anew never overtakes the closing of its former self.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Protocol

from services.verifier import metrics
from services.verifier.engine.types import BlockStatus, Engine, EngineOutput, ExitReport
from shared.bus import Bus, Received
from shared.errors import OutriderError, SessionNotFound
from shared.protocol import (
    DraftsMessage,
    ExitsMessage,
    GenerationParams,
    Hint,
    ReplyRoute,
    Tokens,
    Verdict,
    VerdictsMessage,
)
from shared.speculation import verifier as core
from shared.store import CommitConflict, SessionState, SessionStatus, StaleClaim, Store
from shared.telemetry import TraceContext

log = logging.getLogger(__name__)

Step = Callable[[], Coroutine[None, None, None]]
RETRY_AFTER_S = 0.5


class Host(Protocol):
    """What a session needs of the service around it."""

    engine: Engine
    store: Store
    bus: Bus
    incarnation: str

    def make_room(self, session: str) -> bool:
        """Whether one more session may hold KV (an idle one may have to go)."""

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


class SessionShell:
    """Carries out what `core.VerifierSession` decides for one session."""

    def __init__(self, session: str, host: Host, *, max_block: int, chain: Chain) -> None:
        self.session = session
        self.chain = chain
        self.partition = -1
        self.last_active_s = time.monotonic()
        self._host = host
        self._core = core.VerifierSession(session, max_block=max_block)
        self._state: SessionState | None = None
        self._prompt: Tokens = ()
        self._reader: asyncio.Task[None] | None = None
        self._trace: TraceContext | None = None
        self._unanswered: list[Received[DraftsMessage]] = []
        self._arrived_s = self._answered_s = self._committed_s = 0.0

    @property
    def idle(self) -> bool:
        """Parked, waiting for a block."""
        return self._core.idle

    @property
    def holds_kv(self) -> bool:
        """Whether the engine holds the session."""
        return self._reader is not None

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
        self.last_active_s = self._arrived_s = time.monotonic()
        self.partition = received.partition
        self._trace = received.trace
        self._unanswered.append(received)
        self.handle(core.Received(received.message))

    def exit_seen(self, report: ExitReport) -> None:
        """Take in what an early exit foresees, while the pass runs."""
        self.handle(core.ExitSeen(report.base, report.layer, report.outcomes, report.elapsed_ms))

    def handle(self, event: core.VerifierEvent) -> None:
        """Feed the core and do what it says."""
        for action in self._core.handle(event):
            self._act(action)
        if self._core.settled:
            for received in self._unanswered:
                self._host.done(received)
            self._unanswered.clear()

    # --- actions --------------------------------------------------------------------------------------

    def _act(self, action: core.VerifierAction) -> None:
        match action:
            case core.Publish(message=message, route=route):
                self._publish(message, route)
            case core.Verify():
                self.chain.put(lambda: self._verify(action))
            case core.Commit():
                self.chain.put(lambda: self._commit(action))
            case core.Claim():
                self.chain.put(lambda: self._claim(action))
            case core.OpenEngine(committed=committed):
                self._open_engine(committed)
            case core.CloseEngine():
                self._stop_reading()
                self.chain.put(self._close_engine)
            case core.Release(epoch=epoch):
                self.chain.put(lambda: self._release(epoch))
            case core.Forget():
                self._stop_reading()
                self._host.forget(self.session)

    def _publish(self, message: VerdictsMessage | ExitsMessage, route: ReplyRoute) -> None:
        trace = self._trace.child() if self._trace is not None else None
        if isinstance(message, Hint):
            self._host.bus.post(message, partition=route.partition, trace=trace)
            metrics.HINTS.inc()
            return
        if isinstance(message, Verdict):
            verify_ms = (self._answered_s - self._arrived_s) * 1000
            commit_ms = (self._committed_s - self._answered_s) * 1000
            message = message.model_copy(
                update={
                    "verify_ms": round(max(0.0, verify_ms), 3),
                    "commit_ms": round(max(0.0, commit_ms), 3),
                }
            )
        metrics.ANSWERS.labels(message.kind).inc()
        self._host.background(self._send(message, route, trace))

    async def _send(self, message: VerdictsMessage, route: ReplyRoute, trace: TraceContext | None) -> None:
        try:
            await self._host.bus.send(message, partition=route.partition, trace=trace)
        except OutriderError as error:  # it is committed: the gateway asks again and gets the same answer
            log.warning("could not publish a %s for %s: %s", message.kind, self.session, error)

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
            if state.status is SessionStatus.CLOSED and state.finish_reason is None:
                self.handle(_failed(SessionNotFound(f"session {self.session} has been closed")))
                return
            if claim.took_over:
                log.info(
                    "took over %s at %d committed tokens, epoch %d", self.session, state.base, state.epoch
                )
                metrics.TAKEOVERS.inc()
            self._state, self._prompt = state, claim.prompt
            self.handle(
                core.Claimed(
                    epoch=state.epoch,
                    committed=claim.tokens,
                    gateway=state.reply.gateway,
                    last_round=state.last_round,
                    last_base=state.last_base,
                    finish_reason=state.finish_reason,
                )
            )

    async def _tokens_or_none(self) -> Tokens:
        try:
            return await self._host.store.tokens(self.session)
        except OutriderError:
            return ()

    async def _commit(self, action: core.Commit) -> None:
        metrics.VERIFY_SECONDS.observe(max(0.0, self._answered_s - self._arrived_s))
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
            self._committed_s = time.monotonic()
            metrics.COMMIT_SECONDS.observe(self._committed_s - self._answered_s)
            metrics.COMMITTED_TOKENS.inc(len(action.tokens))
            metrics.DRAFTED_TOKENS.inc(action.drafted)
            metrics.ACCEPTED_TOKENS.inc(action.accepted)
            self.handle(core.Committed(result.base))

    async def _verify(self, action: core.Verify) -> None:
        try:
            status = await self._host.engine.submit(self.session, action.base, action.tokens)
        except OutriderError as error:
            self.handle(_failed(error))
            return
        if status is BlockStatus.GONE:
            self.handle(core.Failed("unavailable", "the engine let go of the session", RETRY_AFTER_S))
            return
        # A stale block needs no answer of its own: the engine went on by itself, and what it said is on its way.
        self._host.background(self._note_round(action))

    async def _note_round(self, action: core.Verify) -> None:
        """The round in flight, for operators and for whoever takes over; nothing waits for it."""
        try:
            await self._host.store.set_round(
                self.session,
                epoch=self._core.epoch,
                round=action.round,
                base=action.base,
                block=action.tokens,
            )
        except OutriderError as error:
            log.debug("could not note a round of %s: %s", self.session, error)

    # --- the engine's stream --------------------------------------------------------------------------

    def _open_engine(self, committed: Tokens) -> None:
        if not self._host.make_room(self.session):
            self.chain.put(self._refuse_for_room)
            return
        assert self._state is not None
        params = self._state.params

        async def start() -> None:
            if self._core.phase is core.Phase.PREFILLING:
                self._start_reading(committed, params)

        self.chain.put(start)

    async def _refuse_for_room(self) -> None:
        self.handle(
            core.Failed("overloaded", "every place on this verifier is taken; try again later", RETRY_AFTER_S)
        )

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
                self._answered_s = time.monotonic()
                self.handle(core.EngineAnswered(output.tokens, output.finish_reason))
        except OutriderError as error:
            self.handle(_failed(error))

    def _stop_reading(self) -> None:
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._reader = None

    async def _close_engine(self) -> None:
        try:
            await self._host.engine.close(self.session)
        except OutriderError as error:
            log.debug("closing %s in the engine: %s", self.session, error)

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
