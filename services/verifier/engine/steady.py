"""Passes of even batches with next to no work on the host: a few copies, a graph's launch, one arg-max.

vLLM's runner prepares any batch: some sixty small copies and kernels before a launch, as many again to sample, and a
read of every request's state in between. Where each request has as many rows as every other, a block of K tokens
(padding included) or none, positions, slots of the KV cache and indices follow from how many tokens stand before the
rows; NumPy works them out in microseconds, and they go over from memory that is pinned once. What hints need is worked out
while the device computes.

Sessions take turns: whose blocks share a pass is another in most of them. vLLM's batch is made for requests that stay, and
costs some 30 µs for each that comes or goes. Where all decode greedily a pass does without it: what it needs of its sessions
is gathered from the scheduler's table (`session_table`). vLLM's states of the requests are brought up to date while the
device computes; its batch is left empty, and filled by vLLM itself, from those states, when a pass of another kind has need
of it.

    host     rows of the table ─ places ─ copies ─ launch ─ states ─ whom hints are for … wait ─ compare with the drafts
    device                                └▶ whole graph ─ LM head ─ arg-max ─┘

Where the scheduler says so (`FOLLOWED`) the pass after it is launched as well, of sessions that say one more token each: it
begins with the arg-max, which does not leave the device for that. The host takes the first pass's outcome in and schedules
the second while the device computes that one.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.verifier.engine.options import (
    DRAFT_LENGTHS,
    DRAFT_LEVELS,
    DRAFT_ROWS,
    EVEN_ROWS,
    FOLLOWED,
    GATHERED,
    LAUNCHED,
)
from services.verifier.engine.runner import NO_TOKEN, RequestRows, SessionRows, Speaker
from services.verifier.engine.session_table import Gathered, padded_levels

if TYPE_CHECKING:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

Tokens = npt.NDArray[np.int32]
"""[sessions, K]: the blocks of a pass, `NO_TOKEN` where one is padded."""
ByLayer = dict[str, Any]
SPEAKERS: Final = 4
"""Of how many passes' sessions it is kept who they are."""
NO_SLOT: Final = -1
"""Where keys and values of a graph's padding go: nowhere."""


class Graph(NamedTuple):
    """What an even batch of `width` rows a session runs in: for so many sessions and rows, padding included."""

    mode: CUDAGraphMode
    batch: BatchDescriptor
    sessions: int
    rows: int
    width: int


@dataclass(frozen=True, slots=True)
class Roster:
    """The requests of a pass. `order` is the scheduler's; `at` are their places in the pass, `states` vLLM's of them and
    `said` their output tokens, in that order."""

    order: list[str]
    at: npt.NDArray[np.int64]
    states: list[Any]
    said: list[list[int]]


@dataclass(frozen=True, slots=True)
class Enrolled(Roster):
    """Those that vLLM's batch consists of, the same in all passes that follow until one comes or goes.

    `requests` and `speakers` are in the batch's order, which is the pass's; `drawn` says whether any request's tokens are.
    `drafts` are those in the batch, in the scheduler's order.
    """

    requests: list[str]
    speakers: list[Speaker]
    drawn: bool
    drafts: list[list[int]]


@dataclass(frozen=True)
class EvenBlocks:
    """What an even pass verifies, in the pass's order: `computed` tokens and one more stand before each request's block,
    `lengths` of whose `tokens` are a draft's. `levels` are as `DRAFT_LEVELS`. `heard`: a gateway waits for hints on the
    block, and `told` are its levels, a byte each, `UNTOLD` where the draft said nothing, K + 1 whatever the pass's width.
    """

    requests: list[str]
    tokens: Tokens
    lengths: npt.NDArray[np.int64]
    computed: npt.NDArray[np.int32]
    levels: Mapping[str, Sequence[int]]
    told: list[bytes]
    heard: list[bool]

    @cached_property
    def rows(self) -> list[RequestRows]:
        """The same, a request at a time."""
        return [self.row(at) for at in range(len(self.requests))]

    def row(self, at: int) -> RequestRows:
        """That of one request."""
        first = at * (self.tokens.shape[1] + 1)
        block = self.tokens[at, : self.lengths[at]].tolist()
        return RequestRows(self.requests[at], at, first, first, int(self.computed[at]) + 1, tuple(block))


class Layout(NamedTuple):
    """Where a pass of so many sessions and rows each is laid out: `[sessions, rows]` or `[sessions]`, parts of the buffers
    that are handed over. `blocks` are the sessions' rows of the block table, which `table` holds one after the other;
    `table_rows` is where each begins there."""

    computed: npt.NDArray[np.int32]
    places: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    lengths_seen: npt.NDArray[np.int32]
    inputs: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int32]
    table: npt.NDArray[np.int32]
    table_rows: npt.NDArray[np.int64]
    block_size: int


class Launched(NamedTuple):
    """A pass without vLLM's batch that was launched. Its likeliest tokens, one a row, are `chosen` on the device and, after
    the mark `done`, `here`. `places`: rows of those that the step at hand is about; None for all. `ends`: rows after which
    prompts have been read."""

    chosen: Tensor
    here: Tensor
    done: Any
    places: list[int] | None = None
    ends: Sequence[int] = ()

    def rows(self, places: list[int]) -> list[int]:
        """In which rows of the pass these of the step are."""
        return places if self.places is None else [self.places[place] for place in places]


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
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._laid_out = (0, 0)
        self._roster: Roster | None = None
        self._verified: Tokens | None = None
        self._places_here = self._pinned(width * most, torch.int64)
        self._lengths_here = self._pinned(most, torch.int32)
        self._said_here = [self._pinned(width * most, torch.int64) for _ in range(2)]
        self._picked_here = self._pinned(most, torch.int64)
        self._current: Launched | None = None
        self._next: Launched | None = None
        self._handed_over: Any = None
        self._places, self._lengths = self._places_here.numpy(), self._lengths_here.numpy()
        self._offsets = np.arange(width, dtype=np.int64)
        self._batch_rows = np.arange(most, dtype=np.int64)[:, None]
        self._none_prefilling = torch.zeros(most, dtype=torch.bool, device="cpu")

    def _pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")

    # --- which passes these are -----------------------------------------------------------------------

    def _graph_for(self, output: SchedulerOutput) -> Graph | None:
        """The graph of a pass in which every request has as many rows, or parts of as many; None for all other passes."""
        width: int = getattr(output, EVEN_ROWS, 0)
        if not width or self.num_prompt_logprobs:
            return None
        sessions, gathered = len(output.num_scheduled_tokens), self._without_batch(output)
        if output.scheduled_new_reqs:
            if gathered is None:
                return None
            sessions = len(gathered.rows)
        return self._known_graph(sessions, width)

    def _known_graph(self, sessions: int, width: int) -> Graph | None:
        key = sessions, width
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
        self._settle()
        graph = self._graph_for(scheduler_output)
        if graph is None:
            self._roster, self._laid_out, self._next = None, (0, 0), None
            return super().execute_model(scheduler_output, intermediate_tensors)
        self.step_clock.began = began
        with torch.inference_mode():
            self._run(scheduler_output, graph)
        return None

    def _run(self, output: SchedulerOutput, graph: Graph) -> None:
        from vllm.v1.worker.gpu_model_runner import ExecuteModelState

        launched, self._next = self._next, None
        gathered = self._without_batch(output)
        sessions = len(output.num_scheduled_tokens) if gathered is None else len(gathered.rows)
        places: list[int] | None = getattr(output, LAUNCHED, None)
        if gathered is not None and launched is not None and places is not None:
            self._take_over(output, gathered, launched._replace(places=places))
            return
        if gathered is not None:
            if self.input_batch.num_reqs:
                self._leave_batch(set())
                self._laid_out = (0, 0)
            self._lay_out_gathered(gathered, graph)
            self._show_gathered(output, gathered, graph.width)
        else:
            roster = self._roster = self._in_batch(output)
            self._lay_out(output, roster, graph)
            self._show_blocks(output, roster, graph.width)
        graph = self._graph_of_pass(graph)
        metadata, slots = self._hand_over(sessions, graph)
        if getattr(output, FOLLOWED, None):
            self._handed_over = self._mark()
        hidden = self._forward(graph, metadata, slots)
        spoken = hidden[: sessions * graph.width]
        logits = self.model.compute_logits(spoken)
        self.kv_connector_output = None
        if gathered is not None:
            self._current = self._chosen(logits)._replace(ends=gathered.ends)
            self._launch_next(output, gathered)
            self._roster = self._brought_up(output)
        else:
            self.execute_model_state = ExecuteModelState(
                output, logits, None, None, hidden, spoken, None, None, None, slots
            )
        self._await_hints()

    def _forward(self, graph: Graph, metadata: ByLayer, slots: ByLayer) -> Tensor:
        """The model's last states `[rows, hidden size]` of a pass that is laid out."""
        from vllm.forward_context import set_forward_context

        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=graph.rows,
            cudagraph_runtime_mode=graph.mode,
            batch_descriptor=graph.batch,
            slot_mapping=slots,
        ):
            hidden: Tensor = self._model_forward(
                input_ids=self.input_ids.gpu[: graph.rows],
                positions=self.positions[: graph.rows],
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        return hidden

    # --- a pass without vLLM's batch ------------------------------------------------------------------

    def _without_batch(self, output: SchedulerOutput) -> Gathered | None:
        """What a pass verifies that needs nothing of vLLM's batch; None of one that does."""
        found: Gathered | None = getattr(output, GATHERED, None)
        return found if found is not None and found.greedy and not output.free_encoder_mm_hashes else None

    def _lay_out_gathered(self, gathered: Gathered, graph: Graph) -> None:
        """Lay out the pass from what the scheduler has gathered."""
        layout = self._lay_out_rows(gathered, gathered.rows, gathered.computed, graph)
        layout.inputs.reshape(-1)[:] = gathered.tokens
        if gathered.real is not None:  # what is nobody's has no place, and goes nowhere
            beyond = self._offsets[: graph.width] >= np.array(gathered.real)[:, None]
            layout.places[beyond] = 0
            layout.slots[beyond] = NO_SLOT

    def _lay_out_rows(self, gathered: Gathered, rows: list[int], computed: list[int], graph: Graph) -> Layout:
        """Lay out all but the tokens of a pass of the sessions in these rows of the table."""
        layout = self._laid_out_for(len(rows), graph)
        layout.computed[:] = computed
        layout.blocks[:, : gathered.held] = gathered.table.blocks[rows, : gathered.held]
        self._place(layout, graph.width)
        return layout

    def _show_gathered(self, output: SchedulerOutput, gathered: Gathered, width: int) -> None:
        """As `_show_blocks`, from what the scheduler has gathered."""
        layout, lengths = self._layout(len(gathered.rows), width), np.array(gathered.drafts, dtype=np.int64)
        requests = output.scheduled_cached_reqs.req_ids
        self._verified = self._drafts_of(layout, lengths)[: len(requests)]
        self._drawn = {}
        self._show_even(
            EvenBlocks(
                requests,
                self._verified,
                lengths[: len(requests)],
                layout.computed[: len(requests)],
                getattr(output, DRAFT_LEVELS),
                gathered.told,
                gathered.heard,
            )
        )

    def rehearse(self, output: SchedulerOutput) -> None:
        """Lay out a pass that is not to be run, as far as it is one without vLLM's batch; no other may be under way.
        What it writes is written again by the next pass."""
        self._settle()
        graph, gathered = self._graph_for(output), self._without_batch(output)
        if graph is None or gathered is None or self.input_batch.num_reqs:
            return
        with torch.inference_mode():
            self._lay_out_gathered(gathered, graph)
            self._drafts_of(self._layout(len(gathered.rows), graph.width), np.array(gathered.drafts))
            self._hand_over(len(gathered.rows), graph)

    def _brought_up(self, output: SchedulerOutput) -> Roster:
        """As vLLM's `_update_states`, of such a pass; while the device computes it."""
        cached = output.scheduled_cached_reqs
        if ended := output.finished_req_ids:
            self._leave_batch(ended)
        if output.scheduled_new_reqs:
            self._bring_in(output)
        order = cached.req_ids + [new.req_id for new in output.scheduled_new_reqs]
        states = [self.requests[request] for request in order]
        said = [state.output_token_ids for state in states]
        roster = Roster(order, self._batch_rows[: len(states), 0], states, said)
        assert not self._took_back(cached, roster), "tokens were taken back"
        for state, more in zip(states, cached.new_block_ids, strict=False):  # new ones come last
            if more is not None:
                _extend_blocks(state, more)
        return roster

    def _bring_in(self, output: SchedulerOutput) -> None:
        """As vLLM's `_update_states`, of a pass's new requests; its batch is empty then, as before."""
        from vllm.v1.core.sched.output import SchedulerOutput

        entering = SchedulerOutput.make_empty()
        entering.scheduled_new_reqs = output.scheduled_new_reqs
        entering.num_scheduled_tokens = {
            new.req_id: output.num_scheduled_tokens[new.req_id] for new in output.scheduled_new_reqs
        }
        entering.total_num_scheduled_tokens = sum(entering.num_scheduled_tokens.values())
        self._update_states(entering)  # type: ignore[attr-defined]
        self._leave_batch(set())

    def _took_back(self, cached: CachedRequestData, roster: Roster) -> bool:
        """Whether vLLM has taken back what a request has said: it does so in few cases, none of ours."""
        return any(map(operator.lt, cached.num_output_tokens, map(len, roster.said)))

    def _leave_batch(self, ended: set[str]) -> None:
        """As vLLM's `_update_states`, of a pass of nobody after some requests have ended: its batch is empty then."""
        from vllm.v1.core.sched.output import SchedulerOutput

        nobody = SchedulerOutput.make_empty()
        nobody.finished_req_ids = ended
        self._update_states(nobody)  # type: ignore[attr-defined]

    # --- a pass before its time -----------------------------------------------------------------------

    def _take_over(self, output: SchedulerOutput, gathered: Gathered, launched: Launched) -> None:
        """The step's pass was launched in the one before."""
        self.step_clock.launched = time.monotonic()
        self._verified, self._drawn = np.empty((len(gathered.rows), 0), dtype=np.int32), {}
        self._current = launched
        self._launch_next(output, gathered)
        self._roster = self._brought_up(output)

    def _launch_next(self, output: SchedulerOutput, gathered: Gathered) -> None:
        """Launch the pass that follows the current one, if it is known by now."""
        followed: list[int] = getattr(output, FOLLOWED, None) or []
        graph = self._known_graph(len(followed), 1) if followed else None
        if graph is None or self._current is None:
            return
        sessions = len(followed)
        self._settle()
        rows = [gathered.rows[place] for place in followed]
        computed = [gathered.computed[place] + 1 for place in followed]
        self._lay_out_rows(gathered, rows, computed, graph)
        metadata, slots = self._hand_over(sessions, graph)
        self._feed(self._current, self._current.rows(followed))
        self._handed_over = self._mark()
        hidden = self._forward(graph, metadata, slots)
        self._next = self._chosen(self.model.compute_logits(hidden[:sessions]))

    def _feed(self, launched: Launched, rows: list[int]) -> None:
        """A pass begins with what these rows of another have yielded."""
        inputs, count = self.input_ids.gpu[: len(rows)], len(rows)
        if count == len(launched.chosen):
            inputs.copy_(launched.chosen)
            return
        self._picked_here[:count] = torch.tensor(rows, device="cpu")
        inputs.copy_(launched.chosen[self._picked_here[:count].to(self.device, non_blocking=True)])

    def _settle(self) -> None:
        """Wait until the device has what passes were laid out from: it is going to be written anew."""
        if self._handed_over is not None:
            self._wait_for(self._handed_over)
            self._handed_over = None

    def _mark(self) -> Any:
        """The end of all that the device has been given so far."""

    def _wait_for(self, mark: Any) -> None:
        """Return when the device has come to a mark."""

    # --- a pass in it ---------------------------------------------------------------------------------

    def _same_as_known(self, output: SchedulerOutput, roster: Roster) -> bool:
        """Whether all that vLLM keeps of a pass's requests, but for what this one changes, is what the roster says."""
        cached = output.scheduled_cached_reqs
        if (
            output.scheduled_new_reqs
            or cached.resumed_req_ids
            or output.new_block_ids_to_zero
            or output.kv_cache_block_copies
            or output.free_encoder_mm_hashes
        ):
            return False
        return not self._took_back(cached, roster)

    def _in_batch(self, output: SchedulerOutput) -> Enrolled:
        """The roster of a pass whose requests are made vLLM's batch."""
        order, known = output.scheduled_cached_reqs.req_ids, self._roster
        if isinstance(known, Enrolled) and not output.finished_req_ids:
            roster = known if known.order == order else self._enrolled(order)
            if roster is not None and self._same_as_known(output, roster):
                self._advance(output, roster)
                return roster
        self._laid_out = (0, 0)
        self._update_states(output)  # type: ignore[attr-defined]
        roster = self._enrolled(list(output.num_scheduled_tokens))
        assert roster is not None, "a pass has other requests than its batch"
        return roster

    def _enrolled(self, order: list[str]) -> Enrolled | None:
        """The roster of the batch as it is; None where others are in it than `order` names."""
        batch = self.input_batch
        places: Mapping[str, int] = batch.req_id_to_index
        if len(order) != batch.num_reqs or any(request not in places for request in order):
            return None
        requests: list[str] = list(batch.req_ids)
        speakers: list[Speaker] = [self._speaker(request) for request in requests]
        self._speakers = dict(zip(requests, speakers, strict=True))
        at = [places[request] for request in order]
        states = [self.requests[request] for request in order]
        return Enrolled(
            order=order,
            at=np.array(at, dtype=np.int64),
            states=states,
            said=[state.output_token_ids for state in states],
            requests=requests,
            speakers=speakers,
            drawn=any(speaker.rules is not None for speaker in speakers),
            drafts=[batch.spec_token_ids[place] for place in at],
        )

    def _advance(self, output: SchedulerOutput, roster: Enrolled) -> None:
        """As vLLM's `_update_states`, of an even pass of the same requests. Drafts go where the pass reads them, and not
        among what the requests have said."""
        batch, cached = self.input_batch, output.scheduled_cached_reqs
        batch.num_computed_tokens_cpu[roster.at] = cached.num_computed_tokens
        blocks = output.scheduled_spec_decode_tokens
        for own, state, drafts, computed in zip(
            roster.order, roster.states, roster.drafts, cached.num_computed_tokens, strict=True
        ):
            drafts[:] = blocks.get(own, ())
            state.num_computed_tokens = computed
            state.prev_num_draft_len = len(drafts)
        for at, new in enumerate(cached.new_block_ids):
            if new is not None:
                _extend_blocks(roster.states[at], new)
                batch.block_table.append_row(new, roster.at[at])
        batch.refresh_metadata()

    # --- where its rows are ---------------------------------------------------------------------------

    def _lay_out(self, output: SchedulerOutput, roster: Roster, graph: Graph) -> None:
        """Work out tokens, positions, lengths and slots of the KV cache, in memory that the device can read."""
        sessions = len(roster.order)
        layout = self._laid_out_for(sessions, graph)
        layout.inputs[roster.at, 0] = [said[-1] for said in roster.said]
        if graph.width > 1:
            blocks = itertools.chain.from_iterable(output.scheduled_spec_decode_tokens.values())
            tokens = np.fromiter(blocks, np.int32, sessions * (graph.width - 1))
            layout.inputs[roster.at, 1:] = tokens.reshape(sessions, -1)
        self._place(layout, graph.width)

    def _laid_out_for(self, sessions: int, graph: Graph) -> Layout:
        """Where the pass is laid out; what follows from its size is there."""
        key = sessions, graph.width
        if self._laid_out != key:
            self._pad(sessions, graph)
            self._laid_out = key
        return self._layout(*key)

    def _place(self, layout: Layout, width: int) -> None:
        """Work out positions, lengths and slots of the KV cache, from how many tokens are computed and where."""
        places, size = layout.places, layout.block_size
        np.add(layout.computed[:, None], self._offsets[:width], out=places)
        np.add(layout.computed, width, out=layout.lengths)
        layout.lengths_seen[:] = layout.lengths
        columns, rest = np.divmod(places, size)
        np.multiply(layout.table[layout.table_rows + columns], size, out=columns, dtype=np.int64)
        np.add(columns, rest, out=layout.slots)

    def _layout(self, sessions: int, width: int) -> Layout:
        found = self._layouts.get((sessions, width))
        if found is None:
            found = self._layouts[sessions, width] = self._new_layout(sessions, width)
        return found

    def _new_layout(self, sessions: int, width: int) -> Layout:
        batch, rows = self.input_batch, sessions * width
        table, own = batch.block_table[0], self._batch_rows[:sessions]
        shape = sessions, width
        return Layout(
            computed=batch.num_computed_tokens_cpu[:sessions],
            places=self._places[:rows].reshape(shape),
            lengths=self._lengths[:sessions],
            lengths_seen=self.optimistic_seq_lens_cpu.numpy()[:sessions],
            inputs=self.input_ids.np[:rows].reshape(shape),
            slots=table.slot_mapping.np[:rows].reshape(shape),
            blocks=table.block_table.np[:sessions],
            table=table.block_table.np.reshape(-1),
            table_rows=own * table.block_table.np.shape[1],
            block_size=table.block_size,
        )

    def _pad(self, sessions: int, graph: Graph) -> None:
        """Fill up what the graph has beyond the pass's rows, and what is the same as long as their number is."""
        table, rows = self.input_batch.block_table[0], sessions * graph.width
        self._places[rows : graph.rows] = 0
        self._lengths[sessions : graph.sessions] = 0
        self.optimistic_seq_lens_cpu.numpy()[sessions : graph.sessions] = 0
        self.discard_request_mask.np[:sessions] = False
        table.slot_mapping.np[rows : graph.rows] = NO_SLOT
        table.block_table.np[sessions : graph.sessions] = 0
        starts = self.query_start_loc.np
        starts[: sessions + 1] = np.arange(sessions + 1) * graph.width
        starts[sessions + 1 :] = rows

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

    def _show_blocks(self, output: SchedulerOutput, roster: Enrolled, width: int) -> None:
        """Tell the exits and the sampler whose blocks are verified."""
        lengths: Mapping[str, int] = getattr(output, DRAFT_LENGTHS)
        levels: Mapping[str, Sequence[int]] = getattr(output, DRAFT_LEVELS, {})
        sessions = len(roster.order)
        layout = self._layout(sessions, width)
        own = np.zeros(sessions, dtype=np.int64)
        if lengths:
            own[roster.at] = list(lengths.values())
        self._verified = self._drafts_of(layout, own)
        said = [levels.get(request, ()) for request in roster.requests]
        told = [padded_levels(each, self.uniform_decode_query_len) for each in said]
        heard = [
            self._is_heard(speaker, each, length)
            for speaker, each, length in zip(roster.speakers, said, own.tolist(), strict=True)
        ]
        even = EvenBlocks(roster.requests, self._verified, own, layout.computed, levels, told, heard)
        self._drawn = self._draws(even.rows, getattr(output, DRAFT_ROWS, {})) if roster.drawn else {}
        self._show_even(even)

    def _drafts_of(self, layout: Layout, lengths: npt.NDArray[np.int64]) -> Tokens:
        """The blocks as the sampler sees them, padding as `NO_TOKEN`."""
        inside = self._offsets[: layout.inputs.shape[1] - 1] < lengths[:, None]
        return np.where(inside, layout.inputs[:, 1:], NO_TOKEN)

    def _show_even(self, even: EvenBlocks) -> None:
        """As `_show_exits`, for an even batch."""
        self._speakers_of(even.requests)
        self._show_exits(even.rows, torch.arange(even.tokens.size + len(even.tokens)), even.levels)

    def _speakers_of(self, requests: Sequence[str]) -> list[Speaker]:
        """Who speaks for these requests."""
        found = [self._speaker(request) for request in requests]
        if len(self._speakers) > SPEAKERS * self.max_num_reqs:
            self._speakers = {}
        self._speakers.update(zip(requests, found, strict=True))
        return found

    def _graph_of_pass(self, graph: Graph) -> Graph:
        """The graph for the blocks that were shown, of as many sessions and rows."""
        return graph

    def _await_hints(self) -> None:
        """The pass is launched: what exits need to know only once they speak."""

    # --- after it -------------------------------------------------------------------------------------

    def _chosen(self, logits: Tensor) -> Launched:
        """The likeliest tokens of a pass, on their way to the host."""
        chosen = logits.argmax(dim=-1)
        self._said_here.reverse()  # the pass before may still have to be read
        here = self._said_here[0][: len(chosen)]
        here.copy_(chosen, non_blocking=True)
        return Launched(chosen, here, self._mark())

    def _pass_done(self) -> None:
        """What a pass has said is here."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The end of the pass."""
        drafts, self._verified = self._verified, None
        if drafts is None:
            return super().sample_tokens(grammar_output)
        roster = self._roster
        assert roster is not None, "a pass ends that none has begun"
        if isinstance(roster, Enrolled):
            self.execute_model_state = self.execute_model_state._replace(
                spec_decode_metadata=replace(
                    self._indices(drafts),
                    draft_token_ids=torch.from_numpy(drafts.ravel()).to(self.device),
                )
            )
            return super().sample_tokens(grammar_output)
        assert grammar_output is None, "a pass without vLLM's batch knows no grammar"
        with torch.inference_mode():
            said = self._end(drafts, roster)
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

    def _end(self, drafts: Tokens, roster: Roster) -> ModelRunnerOutput:
        """Greedy decoding: of each block what agrees with the target, and the target's next token."""
        from vllm.v1.outputs import ModelRunnerOutput

        launched, self._current = self._current, None
        assert launched is not None, "a pass ends that none has begun"
        self._draft_token_ids = self._draft_token_req_ids = None
        self._wait_for(launched.done)
        self._pass_done()
        self.step_clock.sampled = time.monotonic()
        chosen, width = launched.here.numpy(), drafts.shape[1] + 1
        tokens = chosen if launched.places is None else chosen[launched.places]
        tokens = tokens[: len(drafts) * width].reshape(len(drafts), width)
        differ = np.ones(tokens.shape, dtype=np.bool_)  # the first that does is the target's own
        np.not_equal(tokens[:, :-1], drafts, out=differ[:, :-1])
        counts = differ.argmax(axis=1) + 1
        said = [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
        said += [[int(chosen[end])] for end in launched.ends]
        for own, more in zip(
            roster.said, said, strict=True
        ):  # as vLLM does: its scheduler doesn't send it again
            own.extend(more)
        return ModelRunnerOutput(
            req_ids=roster.order,
            req_id_to_index=dict(zip(roster.order, range(len(said)), strict=True)),
            sampled_token_ids=said,
            num_nans_in_logits={},
        )


def _extend_blocks(state: Any, new: Sequence[Sequence[int]]) -> None:
    """A request has got `new` blocks of the KV cache, of each kind."""
    for ids, more in zip(state.block_ids, new, strict=True):
        ids.extend(more)
