"""An engine without a model for tests of the verifier: it says what `truth` says, as strictly as the real one.

It refuses what the real engine refuses (a session too many, one that is open already), exits report in mid-pass, and a
test may hold its passes, kill it, and see what was asked of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from services.verifier.engine.types import (
    BlockStatus,
    EngineInfo,
    EngineOutput,
    EngineStats,
    ExitReport,
    OnExit,
)
from services.verifier.settings import VerifierSettings
from shared.errors import ContextLengthExceeded, EngineError, Overloaded
from shared.protocol import FinishReason, GenerationParams, Outcome, Tokens
from shared.sampling.sparse import SparseRow

LAYERS = (3, 5)


def truth(prompt: Tokens, length: int) -> Tokens:
    """The first `length` tokens that the target says after `prompt`."""
    return tuple(100 + (31 * sum(prompt) + 7 * position) % 1000 for position in range(length))


@dataclass
class _Open:
    prompt: Tokens
    said: list[int]
    params: GenerationParams
    outputs: asyncio.Queue[EngineOutput | EngineError] = field(default_factory=asyncio.Queue)
    passing: asyncio.Task[None] | None = None


class ScriptedEngine:
    """See `Engine`. A pass takes `pass_s`; while `go` is clear, passes run up to their exits and no further."""

    def __init__(self, settings: VerifierSettings, *, pass_s: float = 0.004) -> None:
        self._settings = settings
        self._open: dict[str, _Open] = {}
        self._on_exit: OnExit = lambda report: None
        self._passes = 0
        self._alive = False
        self.pass_s = pass_s
        self.go = asyncio.Event()
        self.go.set()
        self.prefills: list[tuple[str, int]] = []
        self.submitted: list[tuple[str, int, Tokens]] = []
        self.most_open = 0
        self.stopped = False

    @property
    def open_sessions(self) -> set[str]:
        """The sessions whose KV it holds."""
        return set(self._open)

    @property
    def in_mid_pass(self) -> int:
        """Passes that run."""
        return sum(each.passing is not None and not each.passing.done() for each in self._open.values())

    async def start(self, on_exit: OnExit) -> EngineInfo:
        """See `Engine.start`."""
        self._on_exit = on_exit
        self._alive = True
        return EngineInfo(
            model_name=self._settings.served_name,
            num_layers=8,
            vocab_size=1 << 16,
            max_model_len=self._settings.max_model_len,
            max_block=self._settings.max_block,
            max_sessions=self._settings.max_sessions,
            kv_capacity_tokens=1 << 20,
            exit_layers=LAYERS,
            exits="untrained",
            dtype="none",
            notes=("a script stands in for the model",),
        )

    def open(
        self, session: str, prompt: Tokens, committed: Tokens, params: GenerationParams
    ) -> AsyncIterator[EngineOutput]:
        """See `Engine.open`."""
        if session in self._open:
            raise EngineError(f"session {session} is open in the engine already")
        if len(self._open) >= self._settings.max_sessions:
            raise Overloaded(f"all {self._settings.max_sessions} sessions of the engine are taken")
        if len(prompt) + len(committed) >= self._settings.max_model_len:
            raise ContextLengthExceeded("the context is full")
        opened = self._open[session] = _Open(prompt, list(committed), params)
        self.most_open = max(self.most_open, len(self._open))
        self.prefills.append((session, len(committed)))
        opened.passing = asyncio.create_task(self._pass(session, opened, ()))
        return self._stream(session, opened)

    async def _stream(self, session: str, opened: _Open) -> AsyncIterator[EngineOutput]:
        try:
            while True:
                output = await opened.outputs.get()
                if isinstance(output, EngineError):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._forget(session, opened)

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
        self.submitted.append((session, base, tokens))
        opened = self._open.get(session)
        if opened is None:
            return BlockStatus.GONE
        if base != len(opened.said):
            return BlockStatus.STALE
        opened.passing = asyncio.create_task(self._pass(session, opened, tokens))
        return BlockStatus.ARMED

    async def _pass(self, session: str, opened: _Open, block: Tokens) -> None:
        base = len(opened.said)
        right = truth(opened.prompt, base + len(block) + 1)[base:]
        accepted = next((n for n, token in enumerate(block) if token != right[n]), len(block))
        for number, layer in enumerate(LAYERS):
            await asyncio.sleep(self.pass_s / 4)
            outcome = Outcome(accepted=accepted, next_token=right[accepted], confidence=0.5)
            self._on_exit(ExitReport(session, base, layer, (outcome,), self.pass_s * 250 * (number + 1)))
        await self.go.wait()
        await asyncio.sleep(self.pass_s / 2)
        tokens, reason = _ended(right[: accepted + 1], base, opened.params)
        opened.said += tokens
        self._passes += 1
        opened.outputs.put_nowait(EngineOutput(tokens, reason))

    async def close(self, session: str) -> None:
        """See `Engine.close`. Takes a moment, as a call of another process does."""
        opened = self._open.get(session)
        if opened is not None:
            self._forget(session, opened)
            await asyncio.sleep(0)

    def _forget(self, session: str, opened: _Open) -> None:
        if self._open.get(session) is opened:
            del self._open[session]
        if opened.passing is not None:
            opened.passing.cancel()

    async def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        if not self._alive:
            raise EngineError("the engine has died")
        return EngineStats(
            steps=self._passes,
            scheduled_tokens=0,
            prefill_tokens=0,
            recomputed_tokens=0,
            plain_tokens=0,
            blocks=self._passes,
            block_tokens=0,
            accepted_tokens=0,
            stale_blocks=0,
            preemptions=0,
            prefix_cache_hit_tokens=0,
            dropped_hints=0,
            parked=len(self._open),
            running=0,
            waiting=0,
            kv_usage=len(self._open) / self._settings.max_sessions,
            step_ms=self.pass_s * 1000,
        )

    async def stop(self) -> None:
        """See `Engine.stop`."""
        self._alive = False
        self.stopped = True

    def healthy(self) -> bool:
        """See `Engine.healthy`."""
        return self._alive

    def die(self) -> None:
        """As when the engine process is killed: every stream fails, nothing is answered any more."""
        self._alive = False
        for opened in self._open.values():
            opened.outputs.put_nowait(EngineError("the engine process has died"))


def _ended(tokens: Tokens, base: int, params: GenerationParams) -> tuple[Tokens, FinishReason | None]:
    """`tokens` as far as the parameters let the generation go, and how it ends there."""
    for number, token in enumerate(tokens):
        if token in params.stop_token_ids:
            return tokens[: number + 1], FinishReason.STOP
        if base + number + 1 >= params.max_tokens:
            return tokens[: number + 1], FinishReason.LENGTH
    return tokens, None
