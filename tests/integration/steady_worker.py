"""A CPU worker that runs uniform batches as CUDA does: padded, and prepared by `SteadySteps`; it looks at what that does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from services.verifier.engine import worker
from services.verifier.engine.options import EVEN_ROWS, FOLLOWED, GATHERED, LAUNCHED
from services.verifier.engine.steady import NO_SLOT, Enrolled, Graph, SteadySteps


class SteadyRunner(SteadySteps, worker.SessionRunner):
    """The runner of the CPU worker, which has no graphs: each uniform batch is its own, without padding."""

    def _find_graph(self, sessions: int, width: int) -> Graph | None:
        rows = sessions * width
        return Graph(CUDAGraphMode.NONE, BatchDescriptor(rows), sessions, rows, width)

    def _run(self, output: Any, graph: Graph) -> None:
        self._output = output
        super()._run(output, graph)

    rehearsals = 0

    def rehearse(self, output: Any) -> None:
        """See `SteadySteps.rehearse`."""
        self._output = output
        self.rehearsals += 1
        super().rehearse(output)

    _followed: Sequence[int] = ()

    def _launch_next(self, output: Any, gathered: Any) -> None:
        self._followed = getattr(output, FOLLOWED, ())
        super()._launch_next(output, gathered)
        self._followed = ()

    def _lay_out_gathered(self, gathered: Any, graph: Graph) -> None:
        assert getattr(self._output, LAUNCHED, None) is None, "a pass that was launched is computed again"
        super()._lay_out_gathered(gathered, graph)

    def _hand_over_early(self, graph: Graph) -> None:
        """What a pass before its time is laid out from: one more token of these sessions."""
        cached = self._output.scheduled_cached_reqs
        table = self.input_batch.block_table[0]
        for at, place in enumerate(self._followed):
            (ids,), new = self.requests[cached.req_ids[place]].block_ids, cached.new_block_ids[place]
            ids = ids if new is None else [*ids, *new[0]]
            computed, size = cached.num_computed_tokens[place] + 1, table.block_size
            assert (graph.width, self._places[at], self._lengths[at]) == (1, computed, computed + 1)
            assert table.slot_mapping.np[at] == ids[computed // size] * size + computed % size
            assert table.block_table.np[at, : len(ids)].tolist() == ids

    def _hand_over(self, sessions: int, graph: Graph) -> Any:
        output, batch = self._output, self.input_batch
        if self._followed:
            self._hand_over_early(graph)
            return super()._hand_over(sessions, graph)
        roster = self._roster if getattr(output, GATHERED, None) is None or batch.num_reqs else None
        cached = output.scheduled_cached_reqs
        requests = roster.requests if isinstance(roster, Enrolled) else cached.req_ids
        self._check_prompts(graph)
        assert sorted(batch.req_ids) == ([] if roster is None else sorted(requests))
        for request, computed, new in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            at, state = requests.index(request), self.requests[request]
            rows = slice(at * graph.width, at * graph.width + output.num_scheduled_tokens[request])
            tokens = [*state.prompt_token_ids, *state.output_token_ids]
            block = output.scheduled_spec_decode_tokens.get(request, [])
            (ids,) = state.block_ids
            if roster is None and new is not None:  # vLLM's state of it is brought up to date later
                ids = [*ids, *new[0]]
            assert computed == len(tokens) - 1
            assert self.input_ids.np[rows].tolist() == [tokens[-1], *block]
            if roster is not None:
                assert block == list(batch.spec_token_ids[at])
            places = self._places[rows].tolist()
            assert places == list(range(computed, computed + len(block) + 1))
            table = batch.block_table[0]
            size, slots = table.block_size, table.slot_mapping.np[rows].tolist()
            assert slots == [ids[place // size] * size + place % size for place in places]
            assert table.block_table.np[at, : len(ids)].tolist() == ids
        return super()._hand_over(sessions, graph)

    def _check_prompts(self, graph: Graph) -> None:
        """Prompts in parts of as many rows as blocks have; rows beyond them go nowhere."""
        output, table, width = self._output, self.input_batch.block_table[0], graph.width
        first = len(output.scheduled_cached_reqs.req_ids) * width
        for new in output.scheduled_new_reqs:
            count, computed, (ids,) = (
                output.num_scheduled_tokens[new.req_id],
                new.num_computed_tokens,
                new.block_ids,
            )
            parts = -(-count // width)
            rows, size = slice(first, first + count), table.block_size
            places = list(range(computed, computed + count))
            assert computed + count == len(new.prompt_token_ids)
            assert self.input_ids.np[rows].tolist() == new.prompt_token_ids[computed:]
            assert self._places[rows].tolist() == places
            slots = [ids[place // size] * size + place % size for place in places]
            slots += [NO_SLOT] * (parts * width - count)
            assert table.slot_mapping.np[first : first + parts * width].tolist() == slots
            at = slice(first // width, first // width + parts)
            assert self._lengths[at].tolist() == [computed + width * (part + 1) for part in range(parts)]
            assert all(row[: len(ids)].tolist() == ids for row in table.block_table.np[at])
            first += parts * width

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The end of the pass; what requests have said is written down once."""
        before = {request: list(state.output_token_ids) for request, state in self.requests.items()}
        output = super().sample_tokens(grammar_output)
        for request, at in output.req_id_to_index.items():
            said = [*before[request], *output.sampled_token_ids[at]]
            assert self.requests[request].output_token_ids == said
        return output

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        assert not getattr(scheduler_output, EVEN_ROWS), "an even batch was prepared like any other"
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)


class SteadyWorker(worker.SessionWorker):
    """The CPU worker with that runner."""

    def rehearse(self, output: Any) -> None:
        """As the CUDA worker's."""
        self.model_runner.rehearse(output)

    def dropped_hints(self) -> int:
        """In the place of hints, of which this engine drops none: how often a pass was rehearsed."""
        return int(self.model_runner.rehearsals)

    def init_device(self) -> None:
        """As the CPU worker's."""
        with mock.patch.object(worker, "SessionRunner", SteadyRunner):
            super().init_device()
