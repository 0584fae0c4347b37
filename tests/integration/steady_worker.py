"""A CPU worker that runs uniform batches as CUDA does: padded, and prepared by `SteadySteps`."""

from __future__ import annotations

from typing import Any
from unittest import mock

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from services.verifier.engine import worker
from services.verifier.engine.steady import Graph, SteadySteps


class SteadyRunner(SteadySteps, worker.SessionRunner):
    """The runner of the CPU worker, which has no graphs: each uniform batch is its own, without padding."""

    def _find_graph(self, sessions: int) -> Graph | None:
        rows = sessions * self.uniform_decode_query_len
        return Graph(CUDAGraphMode.NONE, BatchDescriptor(rows), sessions, rows)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        width = self.uniform_decode_query_len
        blocks = scheduler_output.scheduled_spec_decode_tokens.values()
        assert len(blocks) < len(num_scheduled_tokens) or any(len(block) + 1 != width for block in blocks), (
            "a uniform batch was prepared like any other"
        )
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)


class SteadyWorker(worker.SessionWorker):
    """The CPU worker with that runner."""

    def init_device(self) -> None:
        """As the CPU worker's."""
        with mock.patch.object(worker, "SessionRunner", SteadyRunner):
            super().init_device()
