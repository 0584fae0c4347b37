"""One answer in virtual time: the real cores of edge and verifier, and everything around them a timer.

Drafts are recorded beforehand, so that no model runs: a lane that assumes what the target says gets what the draft model
said there; any other gets the same, which costs its time and is never used. Passes, draft steps, the link and commits take
set times. No exits, no noise, one session: rules are compared in seconds, and what they are worth is measured elsewhere.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.draft_gateway.drafting.engine import EMPTY, Draft
from services.verifier.floor_drafts import FloorDraft
from services.verifier.session_shell import Passes
from shared.errors import EngineError
from shared.lookup import common_prefix
from shared.protocol import (
    Block,
    ExitsMessage,
    FinishReason,
    Floor,
    Forward,
    Policy,
    Prompt,
    ReplyRoute,
    Tokens,
    Verdict,
    VerdictsMessage,
)
from shared.speculation import edge as e
from shared.speculation import verifier as v
from shared.speculation.pace import Common

ROUTE: Final = ReplyRoute(gateway="g", partition=0)
SESSION: Final = "s"
CLAIM_MS: Final = 1.0
LONGEST_MS: Final = 1e7
"""An answer that takes longer has got stuck."""


@dataclass(frozen=True, slots=True)
class Timings:
    """What everything takes, ms."""

    rtt: float = 50.0
    message: float = 6.0
    """What a message takes beside the link: encoding, Kafka, event loops."""
    fixed: float = 68.0
    row: float = 1.4
    """A pass takes `fixed` and `row` for each of its rows."""
    commit: float = 2.5
    step: float = 8.0
    lane: float = 1.2
    """A draft step takes `step` and `lane` for each further lane."""
    turn: float = 0.3
    """A turn of the edge's event loop."""
    head: float = 5.0
    """What the draft head takes behind each pass of policy `latency`, where there is one."""

    def pass_of(self, rows: int) -> float:
        """A pass of so many rows."""
        return self.fixed + self.row * rows


@dataclass(frozen=True, slots=True)
class Recorded:
    """A prompt, what the target says after it, and what the draft model says after each of its tokens but the last."""

    family: str
    prompt: Tokens
    said: Tokens
    drafts: tuple[Draft, ...]
    headed: tuple[tuple[tuple[int, float], ...], ...] = ()
    """What the target's draft head says after each of its tokens but the last; nothing where there is none."""

    def draft(self, at: int, length: int) -> Draft:
        """`length` tokens from position `at` on, as if those before it were right; one look beyond them."""
        tokens: list[int] = []
        confidences: list[float] = []
        alternatives: list[tuple[tuple[int, float], ...]] = []
        while len(tokens) < length and 0 < at + len(tokens) <= len(self.drafts):
            held = self.drafts[at + len(tokens) - 1]
            count = min(length - len(tokens), len(held.tokens))
            if not count:
                break
            tokens += held.tokens[:count]
            confidences += held.confidences[:count]
            alternatives = [*alternatives[: len(tokens) - count], *held.alternatives[: count + 1]]
        return Draft(tuple(tokens), tuple(confidences), tuple(alternatives)) if tokens else EMPTY


@dataclass(slots=True)
class Outcome:
    """What became of an answer."""

    tokens_ms: list[float] = field(default_factory=list)
    """When the client was shown each token."""
    blocks: int = 0
    floors: int = 0
    floor_tokens: int = 0

    @property
    def ms_per_token(self) -> float:
        """From the first token to the last."""
        return (self.tokens_ms[-1] - self.tokens_ms[0]) / max(1, len(self.tokens_ms) - 1)


@dataclass(slots=True)
class _Lane:
    """A draft that is being made: `done` of its steps are."""

    request: e.StartDraft
    draft: Draft
    done: int = 0

    @property
    def steps(self) -> int:
        return len(self.draft.tokens) + (self.request.beyond and bool(self.draft.tokens))


class VirtualAnswer:
    """Plays one answer; `common` and `passes` are what earlier ones have taught edge and verifier."""

    def __init__(
        self, text: Recorded, timings: Timings, config: e.EdgeConfig, common: Common, passes: Passes
    ) -> None:
        self.outcome = Outcome()
        self.edge = e.EdgeSession(config)
        self._text, self._timings, self._config = text, timings, config
        self._passes = passes
        passes.fixed_ms, passes.row_ms = timings.fixed, timings.row
        self._floor = FloorDraft(passes.floor)
        self._verifier = v.VerifierSession(SESSION, max_block=8, floor_draft=self._floor_draft)
        self._now_ms = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._ended = False
        self._edge_timer = self._verifier_timer = -1
        self._waiting: list[e.StartDraft] = []
        self._dropped: set[int] = set()
        self._drafting = False
        self._said = 0
        self._ran: list[tuple[int, float]] = []
        """Rows and time of each pass whose tokens are still to be committed."""

    def play(self) -> Outcome:
        """Play it to its end; `EngineError` when it has none."""
        self._tell_edge(e.Opened(1))
        while self._due and not self._ended:
            self._now_ms, _, happen = heapq.heappop(self._due)
            if self._now_ms > LONGEST_MS:
                break
            happen()
        if not self._ended:
            raise EngineError(f"the answer got stuck after {len(self.outcome.tokens_ms)} tokens")
        return self.outcome

    def _after(self, delay_ms: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self._now_ms + delay_ms, next(self._count), happen))

    @property
    def _way_ms(self) -> float:
        return self._timings.rtt / 2 + self._timings.message

    # --- the edge -------------------------------------------------------------------------------------

    def _tell_edge(self, event: e.EdgeEvent) -> None:
        if self._ended:
            return
        for action in self.edge.handle(event, self._now_ms):
            self._do_at_edge(action)

    def _do_at_edge(self, action: e.EdgeAction) -> None:
        match action:
            case e.SendPrompt(epoch, number, base):
                self._send(Prompt(session=SESSION, epoch=epoch, reply=ROUTE, round=number, base=base))
            case e.SendBlock(epoch, number, base, tokens):
                self._send(
                    Block(session=SESSION, epoch=epoch, reply=ROUTE, round=number, base=base, tokens=tokens)
                )
            case e.SendForward():
                self._send(
                    Forward(
                        session=SESSION,
                        epoch=action.epoch,
                        reply=ROUTE,
                        round=action.round,
                        base=action.base,
                        parent=action.parent,
                        accepted=action.accepted,
                        next_token=action.next_token,
                        tokens=action.tokens,
                    )
                )
            case e.StartDraft():
                self._after(self._timings.turn, lambda: self._ask_drafter(action))
            case e.DropDraft(lane):
                self._dropped.add(lane)
            case e.Deliver():
                self.outcome.tokens_ms += [self._now_ms] * len(action.tokens)
            case e.SetTimer(timer, delay_ms):
                self._edge_timer = timer
                self._after(delay_ms, lambda: self._edge_fires(timer))
            case e.Finish():
                self._ended = True
            case e.Fail(code, message):
                raise EngineError(f"the edge gave up ({code}): {message}")

    def _send(self, message: Prompt | Block | Forward) -> None:
        self._after(self._way_ms, lambda: self._tell_verifier(v.Received(message)))

    def _edge_fires(self, timer: int) -> None:
        if timer == self._edge_timer:
            self._tell_edge(e.TimerFired(timer))

    # --- the drafter ----------------------------------------------------------------------------------

    def _ask_drafter(self, request: e.StartDraft) -> None:
        self._waiting.append(request)
        if not self._drafting:
            self._drafting = True
            self._after(0.0, self._begin_batch)

    def _begin_batch(self) -> None:
        requests = [each for each in self._waiting if each.lane not in self._dropped]
        self._waiting.clear()
        self._drafting = bool(requests)
        batch = [
            _Lane(each, self._text.draft(each.base + len(each.assumed), each.length)) for each in requests
        ]
        for lane in batch:
            if not lane.draft.tokens:
                self._report(lane, EMPTY)
        if batch:
            self._step(batch)

    def _step(self, batch: list[_Lane]) -> None:
        going = [lane for lane in batch if lane.done < lane.steps and lane.request.lane not in self._dropped]
        if going:
            cost_ms = self._timings.step + self._timings.lane * (len(going) - 1)
            self._after(cost_ms, lambda: self._stepped(batch, going))
            return
        for lane in batch:
            if lane.request.beyond and lane.draft.tokens:
                self._report(lane, lane.draft)
        self._after(3 * self._timings.turn, self._begin_batch)

    def _stepped(self, batch: list[_Lane], going: list[_Lane]) -> None:
        for lane in going:
            lane.done += 1
            count = len(lane.draft.tokens)
            if lane.done == count:
                self._report(
                    lane, Draft(lane.draft.tokens, lane.draft.confidences, lane.draft.alternatives[:count])
                )
        self._step(batch)

    def _report(self, lane: _Lane, draft: Draft) -> None:
        event = e.Drafted(lane.request.lane, draft.tokens, draft.confidences, draft.alternatives)
        self._after(self._timings.turn, lambda: self._tell_edge(event))

    # --- the verifier ---------------------------------------------------------------------------------

    def _tell_verifier(self, event: v.VerifierEvent) -> None:
        if self._ended:
            return
        for action in self._verifier.handle(event, self._now_ms):
            self._do_at_verifier(action)

    def _do_at_verifier(self, action: v.VerifierAction) -> None:
        timings = self._timings
        match action:
            case v.Claim():
                claimed = v.Claimed(1, (), ROUTE.gateway, policy=self._config.policy)
                self._after(CLAIM_MS, lambda: self._tell_verifier(claimed))
            case v.OpenEngine():
                self._run(1, lambda: self._text.said[:1])
            case v.Verify(number, _, tokens):
                self._run(len(tokens) + 1, lambda: self._verified(number, tokens))
            case v.Commit(base=base):
                self._after(timings.commit, lambda: self._tell_verifier(v.Committed(base)))
            case v.Publish(message):
                told = self._with_times(message)
                self._after(self._way_ms, lambda: self._tell_edge(e.arrived(told)))
            case v.SetTimer(timer, delay_ms):
                self._verifier_timer = timer
                self._after(delay_ms, lambda: self._verifier_fires(timer))
            case v.CloseEngine() | v.Release() | v.Forget():
                pass

    def _verifier_fires(self, timer: int) -> None:
        if timer == self._verifier_timer:
            self._tell_verifier(v.TimerFired(timer))

    def _run(self, rows: int, outcome: Callable[[], Tokens]) -> None:
        took_ms = self._timings.pass_of(rows)
        if self._text.headed and self._config.policy is Policy.LATENCY:
            took_ms += self._timings.head
        self._ran.append((rows, took_ms))
        self._after(took_ms, lambda: self._answer(outcome()))

    def _verified(self, number: int, tokens: Tokens) -> Tokens:
        rest = self._text.said[self._said :]
        said = rest[: common_prefix(tokens, rest) + 1]
        if number == v.NO_ROUND:
            self.outcome.floors += 1
            self.outcome.floor_tokens += len(said)
        else:
            self.outcome.blocks += 1
        self._floor.judge(said)
        return said

    def _answer(self, said: Tokens) -> None:
        most = self._config.max_tokens
        said = said[: most - self._said]
        self._said += len(said)
        self._passes.tokens.saw(len(said))
        if self._config.policy is Policy.LATENCY:
            self._floor.hear(next(iter(self._text.headed[self._said - 1 : self._said]), ()))
        self._tell_verifier(v.EngineAnswered(said, FinishReason.LENGTH if self._said >= most else None))

    def _with_times(self, message: VerdictsMessage | ExitsMessage) -> VerdictsMessage | ExitsMessage:
        """What the service around the core adds to an answer."""
        if not isinstance(message, Verdict | Floor):
            return message
        rows, took_ms = self._ran.pop(0) if self._ran else (1, 0.0)
        times = {
            "verify_ms": took_ms,
            "commit_ms": self._timings.commit,
            "rows": rows,
            "sessions": 1,
            "fixed_ms": self._timings.fixed,
            "row_ms": self._timings.row,
        }
        return message.model_copy(update=times)

    def _floor_draft(self, said: Sequence[int], tail: v.Tail, block: v.Tail) -> Tokens:
        return self._floor.draft((*self._text.prompt, *said), tail, self._passes.least_worth(), block)
