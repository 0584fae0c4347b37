"""One generation: the shell around the speculation core, which turns messages, drafts and time into its events and its
actions into messages, drafts and timers.

Messages are handed over by a plain call, so that a hint waits for nothing and a verdict for no hint; what the core
wants sent goes out before its tokens are handed to the reader. It knows neither HTTP nor how a session was opened, and
of text only where a stop string ends it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, Protocol

from services.draft_gateway.answer_text import AnswerText
from services.draft_gateway.drafting import EMPTY, Draft, Drafter, DraftRequest
from services.draft_gateway.metrics import Watch
from services.draft_gateway.openai_api import JsonObject
from services.draft_gateway.uplink import SessionMessage, Uplink
from shared import timeline
from shared.errors import OutriderError, SessionNotFound, SessionTaken, Unavailable, error_for
from shared.protocol import (
    Block,
    Cancel,
    Closed,
    CloseSession,
    Evicted,
    Fault,
    FinishReason,
    Floor,
    Forward,
    Hint,
    Placed,
    Prompt,
    Stale,
    TokenLogprobs,
    Tokens,
    Verdict,
)
from shared.sampling.rules import Rules
from shared.sampling.sparse import encode as encode_rows
from shared.session import SessionState, SessionStats
from shared.speculation.edge import (
    Abandoned,
    Deliver,
    Drafted,
    DropDraft,
    EdgeAction,
    EdgeConfig,
    EdgeEvent,
    EdgeSession,
    Fail,
    FaultArrived,
    Finish,
    FloorArrived,
    HintArrived,
    Opened,
    Phase,
    Relocated,
    SendBlock,
    SendForward,
    SendPrompt,
    SetTimer,
    StaleArrived,
    StartDraft,
    TimerFired,
    VerdictArrived,
)
from shared.telemetry import TraceContext

logger = logging.getLogger(__name__)

REPLAYED: Final = "replayed"
MOST_EARLY: Final = 64
"""Messages of a session kept that arrive before its driver has begun; what is lost beyond is told again."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Committed tokens for the client, the first at position `base`; `finish_reason` when nothing follows them.

    `stop` is the stop string that the last one completes, `logprobs` has one entry a token, or none.
    """

    base: int
    tokens: Tokens
    sources: tuple[str, ...]
    round: int
    finish_reason: FinishReason | None = None
    stop: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class TokenStream(Protocol):
    """What a client reads: deliveries in order, then an end or an error."""

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def length(self) -> int:
        """Committed tokens so far."""
        ...

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended; only after `next` gave None."""
        ...

    async def started(self, patience_s: float) -> None:
        """Wait for the first delivery, at most `patience_s`. Raises what the generation failed with before it."""
        ...

    async def next(self) -> Delivery | None:
        """The next delivery, or None at the end. Raises what the generation failed with."""
        ...

    def report(self) -> JsonObject:
        """What speculation did, for `usage`."""
        ...

    def leave(self, reason: str, *, detach: bool) -> None:
        """The client has gone: stop at once. With `detach` the session may be resumed."""
        ...


class Replay:
    """A finished session, read again from a position on.

    `tokens` are all that belong to its answer, `reason` and `stop` say how it ended, `logprobs` has one entry for each
    token or none.
    """

    def __init__(
        self,
        state: SessionState,
        tokens: Tokens,
        position: int,
        reason: FinishReason | None,
        stop: str | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        if reason is None or reason is FinishReason.CANCELLED:
            raise SessionNotFound(f"the session {state.session} was cancelled before it was complete")
        self._state = state
        self._finish_reason: Final = reason
        self._pending = [
            Delivery(
                position,
                tokens[position:],
                (REPLAYED,) * (len(tokens) - position),
                max(0, state.last_round),
                reason,
                stop,
                logprobs[position:],
            )
        ]
        if position == len(tokens):
            self._pending.clear()
        self.prompt_length: Final = state.prompt_length
        self.length: Final = len(tokens)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the session ended."""
        return self._finish_reason

    async def started(self, patience_s: float) -> None:
        """There is nothing to wait for."""

    async def next(self) -> Delivery | None:
        """All tokens at once, then None."""
        return self._pending.pop() if self._pending else None

    def report(self) -> JsonObject:
        """What Redis knows of the session's rounds; hits and leads were the business of who drove it."""
        return _report(self._state.session, self._state.stats, self.length)

    def leave(self, reason: str, *, detach: bool) -> None:
        """Nothing runs that would have to stop."""


class Generation:
    """A session that this gateway drives. `on_end` is called once, when it has ended in whatever way."""

    def __init__(
        self,
        session: str,
        prompt: Tokens,
        config: EdgeConfig,
        *,
        rules: Rules | None = None,
        uplink: Uplink,
        drafter: Drafter,
        trace: TraceContext,
        resumable: bool,
        on_end: Callable[[Generation], None],
        earlier: SessionStats | None = None,
        text: AnswerText | None = None,
        logprobs: bool = False,
    ) -> None:
        """`text` where a stop string may end the answer, `logprobs` where the reader is to have them."""
        self.session: Final = session
        self.prompt_length: Final = len(prompt)
        self._prompt = prompt
        self._rules = rules
        self._core = EdgeSession(config)
        self._uplink = uplink
        self._drafter = drafter
        self._trace = trace
        self._resumable = resumable
        self._on_end = on_end
        self._earlier = earlier or SessionStats()
        self._text = text
        self._logprobs: dict[int, TokenLogprobs] | None = {} if logprobs else None
        self._length: int | None = None  # of the answer, where a stop string has ended it
        self._hints_received = 0
        self._placed: Placed | None = None
        self._sending: asyncio.Task[None] | None = None
        self._sent: Prompt | Block | None = None
        self._drafts: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._outbox: deque[Delivery] = deque()  # bounded by max_tokens
        self._early: list[SessionMessage] = []
        self._news = asyncio.Event()
        self._ended = False
        self._error: OutriderError | None = None
        self._finish_reason: FinishReason | None = None
        self._watch = Watch(self._core.statistics)

    # --- the reader's side -------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Committed tokens so far, as far as they belong to the answer."""
        return self._core.base if self._length is None else self._length

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        assert self._finish_reason is not None, "read before the end"
        return self._finish_reason

    @property
    def _epoch(self) -> int:
        return max(self._core.epoch, self._placed.epoch if self._placed is not None else 0)

    async def started(self, patience_s: float) -> None:
        """Wait for the first delivery, at most `patience_s`; raises the `OutriderError` that came instead."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._something()

    async def next(self) -> Delivery | None:
        """The next delivery, or None at the end; raises the `OutriderError` that the generation failed with."""
        await self._something()
        return self._outbox.popleft() if self._outbox else None

    async def _something(self) -> None:
        while not self._outbox:
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()

    def report(self) -> JsonObject:
        """What speculation did; rounds, drafted and accepted include those before this gateway took over."""
        seen = self._core.statistics
        stats = SessionStats(
            rounds=self._earlier.rounds + seen.rounds,
            drafted=self._earlier.drafted + seen.drafted,
            accepted=self._earlier.accepted + seen.accepted,
        )
        return _report(self.session, stats, self.length) | {
            "passes": self._earlier.rounds + seen.passes,
            "hits": seen.hits,
            "hits_by_guess": seen.hits_by_guess,
            "hits_by_exit": seen.hits_by_exit,
            "taken": seen.taken,
            "misses": seen.misses,
            "late": seen.late,
            "lanes": seen.lanes,
            "forwards": seen.forwards,
            "floor_tokens": seen.floor_tokens,
            "drafted_in_all": seen.drafted_in_all,
            "verify_ms": round(seen.verify_ms, 3),
            "hints": self._hints_received,
            "hints_before_verdict": seen.hints,
            "hinted_rounds": seen.hinted_rounds,
            "resent": seen.resent,
            "tokens_per_round": round(seen.tokens_per_round, 3),
            "exit_lead_ms": {
                str(layer): {
                    "count": len(leads),
                    "p50": round(median(leads), 3),
                    "min": round(min(leads), 3),
                }
                for layer, leads in sorted(seen.exit_lead_ms.items())
            },
        }

    # --- its life ----------------------------------------------------------------------------------

    def place(self, placed: Placed) -> None:
        """The session has been placed; messages of its epoch will come."""
        if placed.epoch > self._epoch:
            self._placed = placed

    def begin(
        self,
        *,
        committed: Tokens = (),
        read: int = 0,
        next_round: int = 0,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """Start driving from `committed`, of which the client has read the first `read` tokens.

        No stop string is complete in them. `logprobs` has one entry for each, or none.
        """
        if self._ended:
            return
        if self._text is not None:
            self._text.ends_within(committed, None)
        if unread := committed[read:]:
            replayed = (REPLAYED,) * len(unread)
            self._outbox.append(
                Delivery(read, unread, replayed, max(0, next_round - 1), logprobs=logprobs[read:])
            )
        self._handle(Opened(self._epoch, committed, next_round))
        early, self._early = self._early, []
        for message in early:
            self.receive(message)

    def receive(self, message: SessionMessage) -> None:
        """A message for this session has arrived."""
        if self._core.phase is Phase.OPENING and isinstance(message, Verdict | Floor | Hint | Stale | Fault):
            if len(self._early) < MOST_EARLY:
                self._early.append(message)
            return
        match message:
            case Verdict():
                self._keep(message)
                self._handle(VerdictArrived(message))
            case Floor():
                self._keep(message)
                self._handle(FloorArrived(message))
            case Hint():
                self._hints_received += 1
                self._handle(HintArrived(message))
            case Stale() if self._logprobs is not None and message.tokens:
                self._spawn(self._catch_up(message, self._logprobs))
            case Stale():
                self._handle(StaleArrived(message))
            case Fault():
                self._handle(FaultArrived(message))
            case Placed():
                self._relocated(message)
            case Closed():
                self.fail(SessionNotFound(f"the session {self.session} was closed: {message.reason}"))
            case Evicted():
                logger.debug("KV evicted; the next block restores it", extra={"session": self.session})

    def leave(self, reason: str, *, detach: bool) -> None:
        """The client has gone, or the gateway stops: free the session's KV now, and keep its tokens if `detach`."""
        if not self._ended:
            self._stop(reason, detach=detach)

    def fail(self, error: OutriderError) -> None:
        """End with an error that the client sees."""
        if self._ended or self._error is not None:
            return
        self._error = error
        if isinstance(error, SessionTaken | SessionNotFound):
            self._end(error.code)
        else:
            self._stop(error.code, detach=error.status >= 429)

    def _stop(self, reason: str, *, detach: bool, how: str = "") -> None:
        self._handle(Abandoned())
        if self._placed is not None:
            cancel = Cancel(session=self.session, epoch=self._epoch, reason=reason)
            self._spawn(self._uplink.send(cancel, partition=self._placed.partition, trace=self._trace))
            self._close(reason, detach=detach and self._resumable)
        self._end(how or reason)

    def _close(self, reason: str, *, detach: bool) -> None:
        close = CloseSession(session=self.session, epoch=self._epoch, reason=reason, detach=detach)
        self._spawn(self._uplink.close(close))

    def _end(self, how: str) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._drafts.values():
            task.cancel()
        self._drafter.forget(self.session)
        self._watch.end(how)
        self._news.set()
        self._on_end(self)

    async def settled(self) -> None:
        """Wait for what was on its way when it ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- the core's side ---------------------------------------------------------------------------

    def _relocated(self, placed: Placed) -> None:
        if placed.reply.gateway != self._uplink.reply.gateway:
            self.fail(SessionTaken(f"the session was taken over by {placed.reply.gateway}"))
            return
        if placed.epoch > self._epoch:
            self._placed = placed
            self._handle(Relocated(placed.epoch))

    def _handle(self, event: EdgeEvent) -> None:
        if self._ended:
            return
        try:
            now_ms = time.monotonic() * 1000
            actions = self._core.handle(event, now_ms)
            timeline.note("edge", self.session, now_ms, event, actions)
            self._carry_out_all(actions)
        except Exception:  # whatever it is, this session ends clearly and the others go on
            logger.exception("the session failed on %s", event, extra={"session": self.session})
            self.fail(OutriderError("the gateway failed on this session; its log says why"))

    def _carry_out_all(self, actions: Sequence[EdgeAction]) -> None:
        delivery: Delivery | None = None
        reason: FinishReason | None = None
        for action in actions:
            if isinstance(action, Deliver):
                delivery = self._delivery(action)
            elif isinstance(action, Finish):
                reason = action.reason
            else:
                self._carry_out(action)
        if delivery is not None and (count := self._ends_within(delivery.tokens, reason)) is not None:
            self._stopped(delivery, count, finished=reason is not None)
        elif reason is not None:
            self._finished(reason, delivery)
        elif delivery is not None:
            self._put(delivery)

    def _keep(self, message: Verdict | Floor) -> None:
        """Log-probabilities wait here for the core to hand their tokens on."""
        if self._logprobs is not None:
            self._logprobs.update(enumerate(message.logprobs, message.base))

    async def _catch_up(self, stale: Stale, known: dict[int, TokenLogprobs]) -> None:
        """A stale block's answer tells missed tokens alone: their log-probabilities are in the store."""
        known.update(enumerate(await self._uplink.logprobs(self.session, stale.since), stale.since))
        self._handle(StaleArrived(stale))

    def _delivery(self, action: Deliver) -> Delivery:
        known = self._logprobs
        logprobs: tuple[TokenLogprobs, ...] = ()
        if known is not None:
            positions = range(action.base, action.base + len(action.tokens))
            logprobs = tuple(known.pop(position) for position in positions)
        return Delivery(action.base, action.tokens, action.sources, action.round, logprobs=logprobs)

    def _ends_within(self, tokens: Tokens, reason: FinishReason | None) -> int | None:
        return None if self._text is None else self._text.ends_within(tokens, reason)

    def _stopped(self, last: Delivery, count: int, *, finished: bool) -> None:
        """A stop string is complete with the first `count` tokens: the answer ends there, whatever follows."""
        assert self._text is not None
        self._length = last.base + count
        self._put(
            Delivery(
                last.base,
                last.tokens[:count],
                last.sources[:count],
                last.round,
                FinishReason.STOP,
                self._text.stop,
                last.logprobs[:count],
            )
        )
        self._finish_reason = FinishReason.STOP
        if finished:
            self._close("finished", detach=False)
            self._end(FinishReason.STOP.value)
        else:
            self._stop("a stop string", detach=False, how=FinishReason.STOP.value)

    def _carry_out(self, action: EdgeAction) -> None:
        match action:
            case SendBlock():
                self._send(
                    Block(
                        session=self.session,
                        epoch=action.epoch,
                        reply=self._uplink.reply,
                        round=action.round,
                        base=action.base,
                        tokens=action.tokens,
                        confidences=action.confidences,
                        q=encode_rows(action.rows, action.tokens),
                    )
                )
            case SendForward():
                forward = Forward(
                    session=self.session,
                    epoch=action.epoch,
                    reply=self._uplink.reply,
                    round=action.round,
                    base=action.base,
                    parent=action.parent,
                    accepted=action.accepted,
                    next_token=action.next_token,
                    tokens=action.tokens,
                    confidences=action.confidences,
                    q=encode_rows(action.rows, action.tokens),
                )
                self._spawn(self._transmit(forward))
            case SendPrompt(epoch, number, base):
                self._send(
                    Prompt(
                        session=self.session, epoch=epoch, reply=self._uplink.reply, round=number, base=base
                    )
                )
            case StartDraft(lane, base, assumed, length, beyond, threshold):
                context = (*self._prompt, *self._core.committed[:base], *assumed)
                request = DraftRequest(
                    session=self.session,
                    lane=lane,
                    context=context,
                    length=length,
                    beyond=beyond,
                    rules=self._rules,
                    threshold=threshold,
                )
                self._drafts[lane] = self._spawn(self._draft(request))
            case DropDraft(lane):
                if (task := self._drafts.pop(lane, None)) is not None:
                    task.cancel()
            case SetTimer(timer, delay_ms):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = asyncio.get_running_loop().call_later(
                    delay_ms / 1000, lambda: self._handle(TimerFired(timer))
                )
            case Fail(code, message, retry_after_s):
                self.fail(error_for(code, message, retry_after_s=retry_after_s))

    def _send(self, message: Prompt | Block) -> None:
        """Send without waiting. A message that the broker has yet to take is not sent a second time beside itself."""
        if self._sending is not None and not self._sending.done() and message == self._sent:
            return
        self._sent = message
        self._sending = self._spawn(self._transmit(message))

    async def _transmit(self, message: Prompt | Block | Forward) -> None:
        assert self._placed is not None
        try:
            await self._uplink.send(message, partition=self._placed.partition, trace=self._trace)
        except (
            Unavailable
        ) as error:  # the round's timer sends it again, until the generation counts as stalled
            logger.warning("a block could not be sent: %s", error, extra={"session": self.session})

    async def _draft(self, request: DraftRequest) -> None:
        try:
            draft = await self._drafter.draft(request, lambda draft: self._handle(_drafted(request, draft)))
        except asyncio.CancelledError:
            raise
        except Exception:  # a draft engine may fail in any way; without a draft the target goes on alone
            logger.exception("drafting failed; an empty block goes up", extra={"session": self.session})
            draft = EMPTY
        self._drafts.pop(request.lane, None)
        self._handle(_drafted(request, draft))

    def _finished(self, reason: FinishReason, last: Delivery | None) -> None:
        if last is not None:
            self._put(replace(last, finish_reason=reason))
        if reason is FinishReason.CANCELLED:
            self.fail(SessionNotFound(f"the session {self.session} was cancelled"))
            return
        self._finish_reason = reason
        self._close("finished", detach=False)
        self._end(reason.value)

    def _put(self, delivery: Delivery) -> None:
        self._outbox.append(delivery)
        self._watch.delivered(delivery.sources)
        self._news.set()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(
            lambda _: work.close()
        )  # cancelled before its first step, it would never be awaited
        return task


async def logged(work: Coroutine[object, object, None]) -> None:
    """Do work that nobody waits for; an error of ours ends in the log."""
    try:
        await work
    except OutriderError as error:
        logger.warning("%s", error)


def _drafted(request: DraftRequest, draft: Draft) -> Drafted:
    """What the core is told of a draft."""
    return Drafted(
        request.lane, draft.tokens, draft.confidences, draft.alternatives, draft.rows, draft.thresholds
    )


def _report(session: str, stats: SessionStats, tokens: int) -> JsonObject:
    return {
        "session": session,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "tokens_per_round": round(tokens / stats.rounds, 3) if stats.rounds else 0.0,
    }
