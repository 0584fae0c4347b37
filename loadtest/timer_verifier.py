"""A verifier whose model step is a timer: the real service around an engine that only waits, then accepts everything.

For measuring what the path around the model costs; it serves no model and must never serve users. Each pass is written
to `OUTRIDER_TIMER_LOG` (session, base, when it was submitted, when it ended; ms on the machine's monotonic clock), so
that whoever sent the block can tell where its time went. Run as `python -m loadtest.timer_verifier`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, TextIO

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
from shared.http import load_settings, run_loop, run_service
from shared.protocol import FinishReason, GenerationParams, Outcome, Tokens
from shared.sampling.sparse import SparseRow
from shared.telemetry import configure_logging

TIMER_LOG: Final = "OUTRIDER_TIMER_LOG"
TIMER_MS: Final = "OUTRIDER_TIMER_MS"
TOKEN: Final = 1
EXIT_LAYER: Final = 1


class TimerEngine:
    """An engine whose pass takes `step_ms` and accepts every draft token; the last token it says is always `TOKEN`."""

    def __init__(self, settings: VerifierSettings, *, step_ms: float, log: TextIO | None = None) -> None:
        self._settings = settings
        self._step_s = step_ms / 1000
        self._log = log
        self._sessions: dict[str, tuple[asyncio.Queue[EngineOutput], int, int]] = {}
        self._on_exit: OnExit | None = None
        self._passes = 0
        self._records: list[dict[str, float | str]] = []

    async def start(self, on_exit: OnExit) -> EngineInfo:
        """Nothing to load."""
        self._on_exit = on_exit
        return EngineInfo(
            model_name=self._settings.served_name,
            num_layers=2,
            vocab_size=1 << 16,
            max_model_len=self._settings.max_model_len,
            max_block=self._settings.max_block,
            max_sessions=self._settings.max_sessions,
            kv_capacity_tokens=1 << 20,
            exit_layers=(EXIT_LAYER,),
            exits="timer",
            dtype="none",
            notes=("a timer stands in for the model: for measurements only",),
        )

    async def open(
        self, session: str, prompt: Tokens, committed: Tokens, params: GenerationParams
    ) -> AsyncIterator[EngineOutput]:
        """One token after a step, then whatever blocks ask for."""
        outputs: asyncio.Queue[EngineOutput] = asyncio.Queue(maxsize=self._settings.session_queue)
        self._sessions[session] = (outputs, len(committed), params.max_tokens)
        self._schedule(session, len(committed), ())
        while True:
            output = await outputs.get()
            yield output
            if output.finish_reason is not None:
                return

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
        """Accept `tokens` after a step."""
        if session not in self._sessions:
            return BlockStatus.GONE
        self._schedule(session, base, tokens)
        return BlockStatus.ARMED

    def _schedule(self, session: str, base: int, tokens: Tokens) -> None:
        loop = asyncio.get_running_loop()
        submitted_s = time.monotonic()
        loop.call_later(self._step_s / 2, self._foresee, session, base, tokens)
        loop.call_later(self._step_s, self._end_pass, session, base, tokens, submitted_s)

    def _foresee(self, session: str, base: int, tokens: Tokens) -> None:
        if self._on_exit is not None and base > 0:
            outcome = Outcome(accepted=len(tokens), next_token=TOKEN, confidence=1.0)
            self._on_exit(ExitReport(session, base, EXIT_LAYER, (outcome,), self._step_s * 500))

    def _end_pass(self, session: str, base: int, tokens: Tokens, submitted_s: float) -> None:
        held = self._sessions.get(session)
        if held is None:
            return
        outputs, _, max_tokens = held
        said = (*tokens, TOKEN)[: max_tokens - base]
        reason = FinishReason.LENGTH if base + len(said) >= max_tokens else None
        self._passes += 1
        if self._log is not None:
            record: dict[str, float | str] = {
                "session": session,
                "base": base,
                "submitted_ms": submitted_s * 1000,
                "ended_ms": time.monotonic() * 1000,
            }
            self._records.append(record)
        outputs.put_nowait(EngineOutput(said, reason))

    async def close(self, session: str) -> None:
        """Forget the session."""
        self._sessions.pop(session, None)

    async def stats(self) -> EngineStats:
        """Passes so far; a timer has no other figures."""
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
            parked=len(self._sessions),
            running=0,
            waiting=0,
            kv_usage=0.0,
            step_ms=self._step_s * 1000,
        )

    async def stop(self) -> None:
        """Nothing to stop; write what was noted, so that no writing falls into a round."""
        if self._log is not None:
            self._log.writelines(json.dumps(record) + "\n" for record in self._records)
            self._log.flush()

    def healthy(self) -> bool:
        """A timer does not die."""
        return True


def main() -> int:
    """Run a verifier around a timer until SIGTERM."""
    settings = load_settings(VerifierSettings)
    configure_logging(settings.log_level, settings.log_format, settings.verifier_name)
    path = os.environ.get(TIMER_LOG)
    with Path(path or os.devnull).open("w", buffering=1) as log:
        engine = TimerEngine(
            settings, step_ms=float(os.environ.get(TIMER_MS, "20")), log=log if path else None
        )
        service = VerifierService(settings, engine)
        return run_loop(
            run_service(service.run, service.app, host=settings.verifier_host, port=settings.verifier_port)
        )


if __name__ == "__main__":
    sys.exit(main())
