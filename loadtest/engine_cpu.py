"""The workers of the engine's benchmark on a CPU: vLLM's and ours, watched (`engine_worker`). vLLM finds them by name."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from loadtest.engine_worker import WatchedWorker
from services.verifier.engine.worker import SessionWorker


class StockWorker(WatchedWorker, CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker."""


class OwnWorker(SessionWorker, StockWorker):
    """The verifier's CPU worker: its exits are attached to the weights that are shared."""
