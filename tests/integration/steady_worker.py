"""A CPU worker that runs uniform batches as CUDA does: padded, and prepared by `SteadySteps`; it looks at what that does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
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

    def _lay_out(self, output: Any, roster: Any, graph: Graph) -> None:
        super()._lay_out(output, roster, graph)
        batch, cached = self.input_batch, output.scheduled_cached_reqs
        assert sorted(batch.req_ids) == sorted(output.num_scheduled_tokens)
        for request, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            at, state = batch.req_id_to_index[request], self.requests[request]
            rows = slice(at * graph.width, (at + 1) * graph.width)
            tokens = [*state.prompt_token_ids, *state.output_token_ids]
            block = output.scheduled_spec_decode_tokens.get(request, [])
            (ids,) = state.block_ids
            assert computed == state.num_computed_tokens == len(tokens) - 1
            assert (
                self.input_ids.np[rows].tolist()
                == [tokens[-1], *block]
                == [tokens[-1], *batch.spec_token_ids[at]]
            )
            assert self._places[rows].tolist() == list(range(computed, computed + graph.width))
            size, slots = batch.block_table[0].block_size, batch.block_table[0].slot_mapping.np[rows].tolist()
            assert slots == [
                ids[place // size] * size + place % size for place in self._places[rows].tolist()
            ]

    def _keep(self, tokens: Any, counts: Any, said: Sequence[list[int]]) -> None:
        super()._keep(tokens, counts, said)
        batch = self.input_batch
        for at, request in enumerate(batch.req_ids):
            state = self.requests[request]
            known = [*state.prompt_token_ids, *state.output_token_ids]
            assert known[-len(said[at]) :] == said[at]
            assert batch.num_tokens_no_spec[at] == len(known)
            assert batch.token_ids_cpu[at, : len(known)].tolist() == known
            assert np.all(batch.is_token_ids[at, : len(known)])

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        assert not getattr(scheduler_output, EVEN_ROWS), "an even batch was prepared like any other"
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)


class SteadyWorker(worker.SessionWorker):
    """The CPU worker with that runner."""

    def init_device(self) -> None:
        """As the CPU worker's."""
        with mock.patch.object(worker, "SessionRunner", SteadyRunner):
            super().init_device()
