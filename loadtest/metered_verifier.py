"""The verifier as it is, which also adds up how long its engine has been busy: for `scripts/bench system`.

What it adds is `outrider_bench_engine_busy_seconds_total`, `..._steps_total` and the like among its metrics. Its engine's
KV cache has the size that `OUTRIDER_KV_CACHE_MB` says, on CUDA too, since another engine is on the same GPU. Run as
`python -m loadtest.metered_verifier`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Final

from prometheus_client import Counter

from loadtest.exact_engine import adapted
from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.types import EngineInfo, EngineStats, OnExit
from services.verifier.service import VerifierService
from services.verifier.settings import VerifierSettings
from shared import timeline
from shared.http import build_service, load_settings, run_loop, run_service
from shared.telemetry import configure_logging

BUSY: Final = "outrider_bench_engine_busy_seconds"
STEPS: Final = "outrider_bench_engine_steps"
PASSES: Final = "outrider_bench_engine_passes"
EVEN_STEPS: Final = "outrider_bench_engine_even_steps"
PROMPT_STEPS: Final = "outrider_bench_engine_prompt_steps"
LOOK_S: Final = 0.1
"""Between two looks at the engine's counters."""

_BUSY: Final = Counter(BUSY, "Time that the engine's steps have taken.")
_STEPS: Final = Counter(STEPS, "Steps of the engine.")
_PASSES: Final = Counter(PASSES, "Passes of sessions, each session in a step being one.")
_EVEN_STEPS: Final = Counter(EVEN_STEPS, "Steps that verified blocks and computed nothing else.")
_PROMPT_STEPS: Final = Counter(PROMPT_STEPS, "Other steps whose prompts were rows beside the blocks.")


class MeteredEngine(VllmEngine):
    """Counts steps, what sessions had verified in them (nothing, too), and the time that they took."""

    def __init__(self, settings: VerifierSettings) -> None:
        super().__init__(settings)
        self._seen: EngineStats | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self, on_exit: OnExit) -> EngineInfo:
        """See `Engine.start`."""
        info = await super().start(on_exit)
        self._looking = asyncio.create_task(self._look())
        return info

    async def _look(self) -> None:
        while True:
            self._take(await self.stats())
            await asyncio.sleep(LOOK_S)

    def _take(self, stats: EngineStats) -> None:
        if (seen := self._seen) is not None:
            _STEPS.inc(stats.steps - seen.steps)
            _PASSES.inc(stats.blocks - seen.blocks)
            _EVEN_STEPS.inc(stats.steady_steps - seen.steady_steps)
            _PROMPT_STEPS.inc(stats.prompt_steps - seen.prompt_steps)
            _BUSY.inc((stats.busy_ms - seen.busy_ms) / 1000)
        self._seen = stats

    async def stop(self) -> None:
        """See `Engine.stop`."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._looking
        await super().stop()


def main() -> int:
    """Run until SIGTERM."""
    settings = load_settings(VerifierSettings)
    configure_logging(settings.log_level, settings.log_format, settings.verifier_name)
    timeline.start(settings.timeline, settings.verifier_name)
    with adapted(settings.kv_cache_mb):
        service = build_service(lambda: VerifierService(settings, MeteredEngine(settings)))
        return run_loop(
            run_service(service.run, service.app, host=settings.verifier_host, port=settings.verifier_port)
        )


if __name__ == "__main__":
    sys.exit(main())
