"""A CPU worker that runs uniform batches as CUDA does: padded, and prepared by `SteadySteps`."""

from __future__ import annotations

from typing import Any
from unittest import mock

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from services.verifier.engine import worker
from services.verifier.engine.options import EVEN_ROWS
from services.verifier.engine.steady import Graph, SteadySteps


class SteadyRunner(SteadySteps, worker.SessionRunner):
    """The runner of the CPU worker, which has no graphs: each uniform batch is its own, without padding."""

    def _find_graph(self, sessions: int, width: int) -> Graph | None:
        rows = sessions * width
        return Graph(CUDAGraphMode.NONE, BatchDescriptor(rows), sessions, rows, width)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        assert not getattr(scheduler_output, EVEN_ROWS), "an even batch was prepared like any other"
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)


class SteadyWorker(worker.SessionWorker):
    """The CPU worker with that runner."""

    def init_device(self) -> None:
        """As the CPU worker's."""
        with mock.patch.object(worker, "SessionRunner", SteadyRunner):
            super().init_device()
