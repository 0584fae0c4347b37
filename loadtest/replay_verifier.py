"""A verifier that knows the target's answers and takes a set time: the real service around an engine that looks them up.

For comparing ways to speculate in timings that no machine here has, such as a paper's. What is measured with it is
synthetic; it must never serve users. A pass accepts what agrees with the answer and adds the answer's next token. Its
exits speak at set depths of the pass and name the outcome rightly with a set probability; where they don't, they name it
second half of the time, which is also the confidence that they show.

    OUTRIDER_REPLAY_ANSWERS   the file (see `services.draft_gateway.drafting.replay`)
    OUTRIDER_REPLAY_PASS_MS   what a pass takes
    OUTRIDER_REPLAY_EXITS     depth:foresight,… (default 0.6:0.55,0.8:0.75,0.9:0.83)
    OUTRIDER_REPLAY_HEAD      its draft head (default none; see `loadtest.replay_head`)

Run as `python -m loadtest.replay_verifier`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from loadtest.replay_head import HEAD, HeadOptions, head_drafts, parse_head
from services.draft_gateway.drafting.replay import read_answers
from services.verifier.engine.types import (
    BlockStatus,
    EngineInfo,
    EngineOutput,
    EngineStats,
    ExitReport,
    OnExit,
)
from services.verifier.service import VerifierService
from services.verifier.settings import VerifierSettings
from shared import timeline
from shared.errors import EngineError, InvalidRequest
from shared.http import build_service, load_settings, run_loop, run_service
from shared.lookup import common_prefix
from shared.protocol import FinishReason, GenerationParams, Outcome, Policy, Tokens
from shared.sampling.sparse import SparseRow
from shared.telemetry import configure_logging

ANSWERS: Final = "OUTRIDER_REPLAY_ANSWERS"
PASS_MS: Final = "OUTRIDER_REPLAY_PASS_MS"
EXITS: Final = "OUTRIDER_REPLAY_EXITS"
DEFAULT_EXITS: Final = "0.6:0.55,0.8:0.75,0.9:0.83"
LAYERS: Final = 100
VOCABULARY: Final = 1 << 17
SECOND: Final = 0.5


@dataclass(slots=True)
class _Session:
    """`said` are output tokens so far; `running` while a pass is under way; `pending` waits for its end. `headed`: the head
    drafts for it."""

    prompt_length: int
    answer: Tokens
    most: int
    said: Tokens
    outputs: asyncio.Queue[EngineOutput]
    headed: bool
    running: bool = False
    pending: tuple[int, Tokens] | None = None
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


class ReplayEngine:
    """An engine that verifies against answers that are known; see the module. Sessions don't slow each other."""

    def __init__(
        self,
        settings: VerifierSettings,
        answers: Mapping[Tokens, Tokens],
        *,
        pass_ms: float,
        exits: Mapping[int, float],
        stops: frozenset[int] = frozenset(),
        head: HeadOptions | None = None,
    ) -> None:
        """`exits` are layers of `LAYERS` and how often each is right; `head` drafts for sessions under policy latency."""
        self._settings = settings
        self._answers = answers
        self._pass_s = pass_ms / 1000
        self._exits = exits
        self._stops = stops
        self._head = head
        self._sessions: dict[str, _Session] = {}
        self._on_exit: OnExit | None = None
        self._blocks = self._drafted = self._accepted = self._stale = 0

    async def start(self, on_exit: OnExit) -> EngineInfo:
        """Nothing to load."""
        self._on_exit = on_exit
        settings = self._settings
        return EngineInfo(
            model_name=settings.served_name,
            num_layers=LAYERS,
            vocab_size=VOCABULARY,
            max_model_len=settings.max_model_len,
            max_block=settings.max_block,
            max_sessions=settings.max_sessions,
            kv_capacity_tokens=1 << 20,
            exit_layers=tuple(self._exits),
            exits="replayed",
            dtype="none",
            draft_head="off" if self._head is None else "replayed",
            notes=("answers are replayed with set times: for measurements only",),
        )

    async def open(
        self, session: str, prompt: Tokens, committed: Tokens, params: GenerationParams
    ) -> AsyncIterator[EngineOutput]:
        """One token after a pass, then whatever blocks ask for."""
        answer = self._answers.get(prompt)
        if answer is None:
            raise InvalidRequest("the answers that are replayed hold no such prompt", param="prompt")
        if session in self._sessions:
            raise EngineError(f"{session} is open already")
        queue: asyncio.Queue[EngineOutput] = asyncio.Queue(maxsize=self._settings.session_queue)
        headed = self._head is not None and params.policy is Policy.LATENCY
        held = _Session(
            len(prompt), answer, min(params.max_tokens, len(answer)), committed, queue, headed=headed
        )
        self._sessions[session] = held
        self._begin(session, held, ())
        try:
            while True:
                output = await queue.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            await self.close(session)

    async def submit(
        self,
        session: str,
        base: int,
        tokens: Tokens,
        confidences: Sequence[int] = (),
        rows: Sequence[SparseRow] = (),
        *,
        alone: bool = False,
    ) -> BlockStatus:
        """See `Engine.submit`."""
        held = self._sessions.get(session)
        if held is None:
            return BlockStatus.GONE
        if held.running:
            held.pending = (base, tokens)
            return BlockStatus.QUEUED
        return BlockStatus.ARMED if self._arm(session, held, base, tokens) else BlockStatus.STALE

    def _arm(self, session: str, held: _Session, base: int, tokens: Tokens) -> bool:
        since = held.said[base:]
        if base > len(held.said) or tokens[: len(since)] != since:
            self._stale += 1
            return False
        self._begin(session, held, tokens[len(since) :])
        return True

    def _begin(self, session: str, held: _Session, block: Tokens) -> None:
        loop = asyncio.get_running_loop()
        held.running = True
        accepted = common_prefix(block, held.answer[len(held.said) :])
        held.timers = [
            loop.call_later(self._pass_s * layer / LAYERS, self._foresee, session, held, accepted, layer)
            for layer in self._exits
            if held.said
        ]
        head_s = self._head.ms_per_pass / 1000 if self._head is not None and held.headed else 0.0
        held.timers.append(loop.call_later(self._pass_s + head_s, self._end, session, held, block, accepted))

    def _foresee(self, session: str, held: _Session, accepted: int, layer: int) -> None:
        at = len(held.said) + accepted
        if self._on_exit is None or at >= held.most:
            return
        foresight = self._exits[layer]
        truth, other = held.answer[at], held.answer[at] ^ 1
        random = Random(f"{layer}:{len(held.answer)}:{at}")
        right, near = random.random() < foresight, random.random() < SECOND
        # What is wrong is the token, or the length by one: an exit that mistrusts the block's last token.
        wrong = (accepted - 1, other) if accepted and random.random() < SECOND else (accepted, other)
        first, second = ((accepted, truth), wrong) if right else (wrong, (accepted, truth))
        outcomes = [Outcome(accepted=first[0], next_token=first[1], confidence=foresight)]
        if right or near:
            share = (1 - foresight) * SECOND
            outcomes.append(Outcome(accepted=second[0], next_token=second[1], confidence=share))
        elapsed_ms = self._pass_s * 1000 * layer / LAYERS
        self._on_exit(ExitReport(session, len(held.said), layer, tuple(outcomes), elapsed_ms))

    def _end(self, session: str, held: _Session, block: Tokens, accepted: int) -> None:
        if held.said:
            self._blocks += 1
            self._drafted += len(block)
            self._accepted += accepted
        at = len(held.said)
        new = held.answer[at : min(at + accepted + 1, held.most)]
        held.said += new
        held.running = False
        reason = None
        if held.said and held.said[-1] in self._stops:
            reason = FinishReason.STOP
        elif len(held.said) >= held.most:
            reason = FinishReason.LENGTH
        held.outputs.put_nowait(EngineOutput(new, reason, drafted=self._foreseen(held)))
        pending, held.pending = held.pending, None
        if pending is not None and reason is None:
            self._arm(session, held, *pending)

    def _foreseen(self, held: _Session) -> tuple[tuple[int, float], ...]:
        """What the head says may follow."""
        if self._head is None or not held.headed:
            return ()
        return head_drafts(self._head, held.prompt_length, held.answer, len(held.said))

    async def close(self, session: str) -> None:
        """Forget the session."""
        held = self._sessions.pop(session, None)
        for timer in held.timers if held is not None else ():
            timer.cancel()

    async def stats(self) -> EngineStats:
        """Blocks so far; there are no other figures."""
        running = sum(held.running for held in self._sessions.values())
        return EngineStats(
            steps=self._blocks,
            scheduled_tokens=self._blocks + self._drafted,
            prefill_tokens=0,
            recomputed_tokens=0,
            plain_tokens=0,
            blocks=self._blocks,
            block_tokens=self._drafted,
            accepted_tokens=self._accepted,
            stale_blocks=self._stale,
            preemptions=0,
            prefix_cache_hit_tokens=0,
            dropped_hints=0,
            parked=len(self._sessions) - running,
            running=running,
            waiting=0,
            kv_usage=0.0,
            step_ms=self._pass_s * 1000,
        )

    async def stop(self) -> None:
        """End every session."""
        for session in list(self._sessions):
            await self.close(session)

    def healthy(self) -> bool:
        """Nothing here dies."""
        return True


def parse_exits(text: str) -> dict[int, float]:
    """Layers (of `LAYERS`) and foresight from `depth:foresight,…`; InvalidRequest when it is something else."""
    found: dict[int, float] = {}
    try:
        for part in filter(None, text.split(",")):
            depth, _, foresight = part.partition(":")
            found[round(float(depth) * LAYERS)] = float(foresight)
    except ValueError:
        raise InvalidRequest(f"{EXITS}={text!r} should be depth:foresight with commas between") from None
    if any(not 0 < layer < LAYERS or not 0 <= share <= 1 for layer, share in found.items()):
        raise InvalidRequest(f"{EXITS}={text!r}: depths and foresights should be between 0 and 1")
    return found


def _build(settings: VerifierSettings) -> VerifierService:
    from shared.text import Tokenizer

    answers = {held.prompt: held.tokens for held in read_answers(Path(os.environ.get(ANSWERS, "")))}
    engine = ReplayEngine(
        settings,
        answers,
        pass_ms=float(os.environ.get(PASS_MS, "50")),
        exits=parse_exits(os.environ.get(EXITS, DEFAULT_EXITS)),
        stops=Tokenizer.load(settings.model).stop_tokens,
        head=parse_head(os.environ.get(HEAD, "none")),
    )
    return VerifierService(settings, engine)


def main() -> int:
    """Run until SIGTERM."""
    settings = load_settings(VerifierSettings)
    configure_logging(settings.log_level, settings.log_format, settings.verifier_name)
    timeline.start(settings.timeline, settings.verifier_name)
    service = build_service(lambda: _build(settings))
    return run_loop(
        run_service(service.run, service.app, host=settings.verifier_host, port=settings.verifier_port)
    )


if __name__ == "__main__":
    sys.exit(main())
