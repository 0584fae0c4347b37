"""Passes of even batches with next to no work on the host: a few copies, a graph's launch, one arg-max.

vLLM's runner prepares any batch: some sixty small copies and kernels before a launch, as many again to sample, and a
read of every request's state in between. Where each request has as many rows as every other, a block of K tokens
(padding included) or none, positions, slots of the KV cache and indices follow from how many tokens stand before the
rows; NumPy works them out in microseconds, and they go over from memory that is pinned once. What vLLM keeps of its
requests is kept as it does, so that the next pass may be any other.

    host     requests' states ─ places ─ copies ─ launch …………………………… wait ─ compare with the drafts
    device                                └▶ whole graph ─ LM head ─ arg-max ─┘
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.verifier.engine.options import DRAFT_LENGTHS, DRAFT_LEVELS, DRAFT_ROWS, EVEN_ROWS
from services.verifier.engine.runner import NO_TOKEN, RequestRows, SessionRows

if TYPE_CHECKING:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

Tokens = npt.NDArray[np.int32]
"""[sessions, K]: the blocks of a pass, `NO_TOKEN` where one is padded."""
ByLayer = dict[str, Any]
NO_SLOT: Final = -1
"""Where keys and values of a graph's padding go: nowhere."""


class Graph(NamedTuple):
    """What an even batch of `width` rows a session runs in: for so many sessions and rows, padding included."""

    mode: CUDAGraphMode
    batch: BatchDescriptor
    sessions: int
    rows: int
    width: int


class SteadySteps(SessionRows):
    """Mixed into a runner of vLLM's (before it), in the place of `SessionRows`."""

    # vLLM's
    vllm_config: Any
    kv_cache_config: Any
    attn_groups: Any
    cudagraph_dispatcher: Any
    num_prompt_logprobs: Any
    execute_model_state: Any
    kv_connector_output: Any
    max_num_reqs: int
    input_ids: Any
    positions: Tensor
    seq_lens: Tensor
    query_start_loc: Any
    optimistic_seq_lens_cpu: Tensor
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width, most = self.uniform_decode_query_len, self.max_num_reqs
        self._graphs: dict[tuple[int, int], Graph | None] = {}
        self._metadata: dict[tuple[int, int], SpecDecodeMetadata] = {}
        self._laid_out = (0, 0)
        self._verified: Tokens | None = None
        self._places_here = self._pinned(width * most, torch.int64)
        self._lengths_here = self._pinned(most, torch.int32)
        self._said_here = self._pinned(width * most, torch.int64)
        self._places, self._lengths = self._places_here.numpy(), self._lengths_here.numpy()
        self._offsets = np.arange(width, dtype=np.int64)
        self._batch_rows = np.arange(most, dtype=np.int64)[:, None]
        self._none_prefilling = torch.zeros(most, dtype=torch.bool, device="cpu")

    def _pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")

    # --- which passes these are -----------------------------------------------------------------------

    def _graph_for(self, output: SchedulerOutput) -> Graph | None:
        """The graph of a pass in which every request has as many rows; None for all other passes."""
        width: int = getattr(output, EVEN_ROWS, 0)
        if not width or self.num_prompt_logprobs:
            return None
        key = len(output.num_scheduled_tokens), width
        if key not in self._graphs:
            one_kind = len(self.attn_groups) == 1 and len(self.attn_groups[0]) == 1
            self._graphs[key] = self._find_graph(*key) if one_kind else None
        return self._graphs[key]

    def _find_graph(self, sessions: int, width: int) -> Graph | None:
        """Where so many sessions of so many rows each fit: vLLM's whole graphs are of K + 1 rows a session."""
        from vllm.config import CUDAGraphMode

        if width != self.uniform_decode_query_len:
            return None
        mode, batch = self.cudagraph_dispatcher.dispatch(num_tokens=sessions * width, uniform_decode=True)
        if mode != CUDAGraphMode.FULL or batch.num_reqs is None:
            return None
        return Graph(mode, batch, batch.num_reqs, batch.num_tokens, width)

    # --- before the forward ---------------------------------------------------------------------------

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        """One pass, up to the logits."""
        began = time.monotonic()
        graph = self._graph_for(scheduler_output)
        if graph is None:
            self._laid_out = (0, 0)
            return super().execute_model(scheduler_output, intermediate_tensors)
        self.step_clock.began = began
        with torch.inference_mode():
            self._run(scheduler_output, graph)
        return None

    def _run(self, output: SchedulerOutput, graph: Graph) -> None:
        from vllm.forward_context import set_forward_context
        from vllm.v1.worker.gpu_model_runner import ExecuteModelState

        self._update_states(output)  # type: ignore[attr-defined]
        sessions = self.input_batch.num_reqs
        self._lay_out(sessions, graph)
        self._show_blocks(output, sessions, graph.width)
        metadata, slots = self._hand_over(sessions, graph)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=graph.rows,
            cudagraph_runtime_mode=graph.mode,
            batch_descriptor=graph.batch,
            slot_mapping=slots,
        ):
            hidden = self._model_forward(
                input_ids=self.input_ids.gpu[: graph.rows],
                positions=self.positions[: graph.rows],
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        spoken = hidden[: sessions * graph.width]
        logits = self.model.compute_logits(spoken)
        self.kv_connector_output = None
        self.execute_model_state = ExecuteModelState(
            output, logits, None, None, hidden, spoken, None, None, None, slots
        )

    def _lay_out(self, sessions: int, graph: Graph) -> None:
        """Work out tokens, positions, lengths and slots of the KV cache, in memory that the device can read."""
        batch, width, rows = self.input_batch, graph.width, sessions * graph.width
        computed = batch.num_computed_tokens_cpu[:sessions]
        places = self._places[:rows].reshape(sessions, width)
        np.add(computed[:, None], self._offsets[:width], out=places)
        self._places[rows : graph.rows] = 0
        np.add(computed, width, out=self._lengths[:sessions])
        self._lengths[sessions : graph.sessions] = 0
        self.optimistic_seq_lens_cpu.numpy()[: graph.sessions] = self._lengths[: graph.sessions]
        self.discard_request_mask.np[:sessions] = False
        own = self._batch_rows[:sessions]
        self.input_ids.np[:rows].reshape(sessions, width)[:] = batch.token_ids_cpu[own, places]
        table = batch.block_table[0]
        size, slots = table.block_size, table.slot_mapping.np
        in_blocks = table.block_table.np[own, places // size]
        slots[:rows].reshape(sessions, width)[:] = in_blocks * np.int64(size) + places % size
        slots[rows : graph.rows] = NO_SLOT
        table.block_table.np[sessions : graph.sessions] = 0
        if self._laid_out != (sessions, width):
            starts = self.query_start_loc.np
            starts[: sessions + 1] = np.arange(sessions + 1) * width
            starts[sessions + 1 :] = rows
            self._laid_out = (sessions, width)

    def _hand_over(self, sessions: int, graph: Graph) -> tuple[ByLayer, ByLayer]:
        """Bring what is laid out to where the graph reads it; what attention is told, by layer, and where keys and values
        go."""
        self._copy(graph)
        return self._attention(graph, int(self._lengths[:sessions].max()))

    def _copy(self, graph: Graph) -> None:
        table = self.input_batch.block_table[0]
        for here, there, count in (
            (self.input_ids.cpu, self.input_ids.gpu, graph.rows),
            (self._places_here, self.positions, graph.rows),
            (self._lengths_here, self.seq_lens, graph.sessions),
            (table.slot_mapping.cpu, table.slot_mapping.gpu, graph.rows),
            (table.block_table.cpu, table.block_table.gpu, graph.sessions),
            (self.query_start_loc.cpu, self.query_start_loc.gpu, graph.sessions + 1),
        ):
            there[:count].copy_(here[:count], non_blocking=True)

    def _attention(self, graph: Graph, longest: int) -> tuple[ByLayer, ByLayer]:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        group = self.attn_groups[0][0]
        table = self.input_batch.block_table[0]
        slots = table.slot_mapping.gpu[: graph.rows]
        common = CommonAttentionMetadata(
            query_start_loc=self.query_start_loc.gpu[: graph.sessions + 1],
            query_start_loc_cpu=self.query_start_loc.cpu[: graph.sessions + 1],
            seq_lens=self.seq_lens[: graph.sessions],
            seq_lens_cpu_upper_bound=self.optimistic_seq_lens_cpu[: graph.sessions],
            num_reqs=graph.sessions,
            num_actual_tokens=graph.rows,
            max_query_len=graph.width,
            max_seq_len=longest,
            block_table_tensor=table.get_device_tensor(graph.sessions),
            slot_mapping=slots,
            causal=True,
            is_prefilling=self._none_prefilling[: graph.sessions],
            positions=self.positions[: graph.rows],
        )
        metadata = group.build_metadata(common, 0)
        layers = self.kv_cache_config.kv_cache_groups[0].layer_names
        return dict.fromkeys(group.layer_names, metadata), dict.fromkeys(layers, slots)

    def _show_blocks(self, output: SchedulerOutput, sessions: int, width: int) -> None:
        """Tell the exits and the sampler whose blocks are verified."""
        lengths: Mapping[str, int] = getattr(output, DRAFT_LENGTHS)
        requests: Sequence[str] = self.input_batch.req_ids
        blocks = self.input_ids.np[: sessions * width].reshape(sessions, width)[:, 1:]
        own = np.fromiter((lengths.get(request, 0) for request in requests), np.int64, sessions)
        self._verified = np.where(self._offsets[: width - 1] < own[:, None], blocks, NO_TOKEN)
        known = (self._lengths[:sessions] + (1 - width)).tolist()
        rows = [
            RequestRows(request, at, at * width, at * width, before, tuple(block[:length]))
            for at, (request, before, block, length) in enumerate(
                zip(requests, known, blocks.tolist(), own.tolist(), strict=True)
            )
        ]
        self._drawn = self._draws(rows, getattr(output, DRAFT_ROWS, {}))
        self._show_even(rows, own, getattr(output, DRAFT_LEVELS, {}))

    def _show_even(
        self,
        rows: Sequence[RequestRows],
        lengths: npt.NDArray[np.int64],
        levels: Mapping[str, Sequence[int]],
    ) -> None:
        """As `_show_exits`, for an even batch, whose blocks of `lengths` tokens are `self._verified`."""
        assert self._verified is not None
        self._show_exits(rows, torch.arange(len(rows) * (self._verified.shape[1] + 1)), levels)

    # --- after it -------------------------------------------------------------------------------------

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The end of the pass."""
        drafts, self._verified = self._verified, None
        if drafts is None:
            return super().sample_tokens(grammar_output)
        logprobs = self.input_batch.sampling_metadata.max_num_logprobs
        if grammar_output is not None or self._drawn or logprobs is not None:
            self.execute_model_state = self.execute_model_state._replace(
                spec_decode_metadata=replace(
                    self._indices(drafts),
                    draft_token_ids=torch.from_numpy(drafts.ravel()).to(self.device),
                )
            )
            return super().sample_tokens(grammar_output)
        with torch.inference_mode():
            said = self._end(drafts)
        self.step_clock.ended = time.monotonic()
        return said

    def _indices(self, drafts: Tokens) -> SpecDecodeMetadata:
        """Those of an even batch's rows, for vLLM's sampler."""
        sessions, drafted = drafts.shape
        found = self._metadata.get((sessions, drafted))
        if found is None:
            ends = np.arange(1, sessions + 1, dtype=np.int32) * (drafted + 1)
            counts = np.full(sessions, drafted, dtype=np.int32)
            found = self._metadata[sessions, drafted] = self._calc_spec_decode_metadata(counts, ends)  # type: ignore[attr-defined]
        return found

    def _end(self, drafts: Tokens) -> ModelRunnerOutput:
        """Greedy decoding: of each block what agrees with the target, and the target's next token."""
        from vllm.v1.outputs import ModelRunnerOutput

        state, self.execute_model_state = self.execute_model_state, None
        self._draft_token_ids = self._draft_token_req_ids = None
        chosen = self._said_here[: len(state.logits)]
        chosen.copy_(state.logits.argmax(dim=-1), non_blocking=True)
        self._device_done()
        self.step_clock.sampled = time.monotonic()
        tokens = chosen.numpy().reshape(len(drafts), -1)
        agreed = np.logical_and.accumulate(tokens[:, :-1] == drafts, axis=1).sum(axis=1) + 1
        said = [row[:count] for row, count in zip(tokens.tolist(), agreed.tolist(), strict=True)]
        self._keep(said)
        batch = self.input_batch
        return ModelRunnerOutput(
            req_ids=batch.req_ids.copy(),
            req_id_to_index=batch.req_id_to_index.copy(),
            sampled_token_ids=said,
            num_nans_in_logits={},
        )

    def _keep(self, said: Sequence[list[int]]) -> None:
        """Take down what requests have said, as vLLM does, whose scheduler doesn't send it again."""
        batch = self.input_batch
        for at, (request, tokens) in enumerate(zip(batch.req_ids, said, strict=True)):
            start = int(batch.num_tokens_no_spec[at])
            end = start + len(tokens)
            batch.token_ids_cpu[at, start:end] = tokens
            batch.is_token_ids[at, start:end] = True
            batch.num_tokens_no_spec[at] = end
            self.requests[request].output_token_ids.extend(tokens)
