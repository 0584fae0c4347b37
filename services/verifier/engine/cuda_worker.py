"""The CUDA worker: its exits are nodes of the full CUDA graphs that vLLM captures for uniform batches (`graph_exits`)."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from services.verifier.engine.channel import Sender
from services.verifier.engine.exits import VerifiedRows
from services.verifier.engine.graph_exits import Blocks, GraphExits
from services.verifier.engine.launch import captured_sessions
from services.verifier.engine.options import EngineOptions
from services.verifier.engine.process import report_failures, stay_with_parent
from services.verifier.engine.runner import RequestRows
from services.verifier.engine.session_table import padded_levels
from services.verifier.engine.steady import ByLayer, EvenBlocks, Graph, SteadySteps
from shared.speculation.outcomes import LEVELS, confidence_at

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

SWITCH_S: Final = 0.0005
"""How long the thread that turns what exits say into hints waits for the one that prepares and ends passes."""
LOG_CONFIDENCES: Final = np.array(
    [*(math.log(confidence_at(level)) for level in range(LEVELS)), math.nan], np.float32
)
"""A level's log-probability in the draft."""


class Prelude(NamedTuple):
    """What an even batch needs before its forward, as a graph of its own: copies to the device, and attention's schedule.

    `metadata` and `slots` are what attention is told of it, by layer.
    """

    graph: torch.cuda.CUDAGraph
    metadata: ByLayer
    slots: ByLayer


class CudaSessionRunner(SteadySteps, GPUModelRunner):  # type: ignore[misc]
    """vLLM's runner, which tells the exits in the graph what each pass verifies, and draws what its rows yield.

    vLLM captures whole graphs of K + 1 rows a session. Beside these there are some without exits: of as many rows, for
    passes in which nobody waits for hints, and of one row a session, for those in which nobody drafts.
    """

    graph_exits: GraphExits | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._floor_graphs: list[int] = []
        self._silent_graphs: frozenset[int] = frozenset()
        self._preludes: dict[tuple[int, int], Prelude] = {}
        self._prelude_pool = torch.cuda.graph_pool_handle()
        self._prelude_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        width = self.uniform_decode_query_len
        self._width_offsets = np.arange(width, dtype=np.int32)
        self._starts = np.arange(self.max_num_reqs, dtype=np.int32)[:, None] * np.int32(width)
        self._hinted: EvenBlocks | None = None

    # --- graphs ---------------------------------------------------------------------------------------

    def _capture_cudagraphs(
        self, batch_descriptors: Any, cudagraph_runtime_mode: CUDAGraphMode, profiler: Any = None
    ) -> None:
        """As vLLM's, and after its whole graphs those without exits."""
        super()._capture_cudagraphs(batch_descriptors, cudagraph_runtime_mode, profiler)
        if cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return
        sizes, width = captured_sessions(self.max_num_reqs), self.uniform_decode_query_len
        if self.graph_exits is not None and self.graph_exits.layers and width > 1:
            self._capture_silent([_silent_batch(sessions, width) for sessions in sizes])
            self._silent_graphs = frozenset(sizes)
        with mock.patch.object(self, "uniform_decode_query_len", 1):
            self._capture_silent([_floor_batch(sessions) for sessions in sizes])
        self._floor_graphs = sizes

    def capture_model(self) -> int:
        """As vLLM's, and what precedes the passes of its whole graphs, so that no session waits for that."""
        taken: int = super().capture_model()
        with torch.inference_mode():
            for width in sorted({1, self.uniform_decode_query_len}):
                for sessions in captured_sessions(self.max_num_reqs):
                    graph = self._known_graph(sessions, width)
                    if graph is not None:
                        self._prelude(graph)
        return taken

    def _capture_silent(self, batches: Sequence[BatchDescriptor]) -> None:
        """Capture whole graphs of these batches, as vLLM does its own, under the names that they have here."""
        exits, named = self.graph_exits, {batch.num_tokens: batch for batch in batches}

        def dispatched(
            num_tokens: int, valid_modes: Any = None, **_: Any
        ) -> tuple[CUDAGraphMode, BatchDescriptor]:
            if valid_modes is not None and CUDAGraphMode.FULL not in valid_modes:
                return CUDAGraphMode.NONE, BatchDescriptor(num_tokens)
            return CUDAGraphMode.FULL, named[num_tokens]

        with (
            mock.patch.object(self.cudagraph_dispatcher, "dispatch", dispatched),
            mock.patch.object(exits, "silent", True) if exits is not None else nullcontext(),
        ):
            for batch in reversed(batches):
                self._warmup_and_capture(replace(batch, uniform=True), CUDAGraphMode.FULL)

    def _graph_of_pass(self, graph: Graph) -> Graph:
        if self._hinted is None and graph.width > 1 and graph.sessions in self._silent_graphs:
            return graph._replace(batch=_silent_batch(graph.sessions, graph.width))
        return graph

    def _find_graph(self, sessions: int, width: int) -> Graph | None:
        if width != 1:
            return super()._find_graph(sessions, width)
        fitting = next((size for size in self._floor_graphs if size >= sessions), None)
        if fitting is None:
            return None
        return Graph(CUDAGraphMode.FULL, _floor_batch(fitting), fitting, fitting, width)

    def _forward(self, graph: Graph, metadata: ByLayer, slots: ByLayer) -> torch.Tensor:
        """As the base class's: vLLM's wrapper of the model would come to the same graph."""
        entry = self.model.concrete_cudagraph_entries.get(graph.batch)
        if entry is None or entry.cudagraph is None:
            return super()._forward(graph, metadata, slots)
        return self._replay(entry)

    def _replay(self, entry: Any) -> torch.Tensor:
        entry.cudagraph.replay()
        self.step_clock.launched = time.monotonic()
        states: torch.Tensor = entry.output
        return states

    def _hand_over(self, sessions: int, graph: Graph) -> tuple[ByLayer, ByLayer]:
        prelude = self._prelude(graph)
        prelude.graph.replay()
        return prelude.metadata, prelude.slots

    def _prelude(self, graph: Graph) -> Prelude:
        key = graph.sessions, graph.width
        found = self._preludes.get(key)
        if found is None:
            found = self._preludes[key] = self._captured_prelude(graph)
        return found

    def _captured_prelude(self, graph: Graph) -> Prelude:
        """The copies and the kernels that precede the forward; lengths are read on the device, as they will be then."""
        prelude = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._prelude_stream):
            prelude.capture_begin(pool=self._prelude_pool, capture_error_mode="thread_local")
            try:
                self._copy(graph)
                if self.graph_exits is not None:
                    self.graph_exits.hand_over()
                metadata, slots = self._attention(graph, self.max_model_len)
            finally:
                prelude.capture_end()
        return Prelude(prelude, metadata, slots)

    # --- exits ----------------------------------------------------------------------------------------

    def _show_exits(
        self, rows: Sequence[RequestRows], logits_indices: torch.Tensor, levels: Mapping[str, Sequence[int]]
    ) -> None:
        """What is drawn at random is not foreseen: its noise is not in the graph."""
        exits = self.graph_exits
        if exits is None or not exits.layers:
            return
        awaited = list(self._awaited(rows, levels))
        if not awaited:
            exits.stage(None)
            return
        width = self.uniform_decode_query_len
        places_of = {own.request: at * width for at, own in enumerate(rows)}
        sessions = tuple(
            VerifiedRows(key, base, places_of[own.request], own.block)
            for own, key, base in awaited
            if own.request not in self._drawn
        )
        starts = np.array([own.start for own in rows], dtype=np.int32)
        lengths = np.array([len(own.block) for own in rows], dtype=np.int32)
        drafts = np.zeros((len(rows), width), dtype=np.int32)
        for at, own in enumerate(rows):
            drafts[at, : len(own.block)] = own.block
        told = [padded_levels(levels.get(own.request, ()), width) for own in rows]
        places = starts[:, None] + np.minimum(self._width_offsets, lengths[:, None])
        exits.stage(Blocks(self.step_clock.began, places, drafts, _log_confidences(told), lengths, sessions))

    def _show_even(self, even: EvenBlocks) -> None:
        exits, self._hinted = self.graph_exits, None
        if exits is None or not exits.layers:
            return
        if not (even.tokens.size and any(even.heard)):
            exits.stage(None, hand_over=False)
            return
        count, width = len(even.tokens), self.uniform_decode_query_len
        lengths = even.lengths.astype(np.int32)
        places = self._starts[:count] + np.minimum(self._width_offsets, lengths[:, None])
        drafts = np.zeros((count, width), dtype=np.int32)
        np.maximum(even.tokens, 0, out=drafts[:, :-1])
        sure = _log_confidences(even.told)
        exits.stage(Blocks(self.step_clock.began, places, drafts, sure, lengths), hand_over=False)
        self._hinted = even

    def _await_hints(self) -> None:
        even, self._hinted = self._hinted, None
        if even is None or self.graph_exits is None:
            return
        rows = [even.row(at) for at, heard in enumerate(even.heard) if heard]
        sessions = tuple(
            VerifiedRows(speaker.key, own.known - speaker.prompt, own.start, own.block)
            for speaker, own in zip(self._speakers_of([own.request for own in rows]), rows, strict=True)
            if speaker.key is not None and own.request not in self._drawn
        )
        if sessions:
            self.graph_exits.expect(self.step_clock.began, sessions)

    def _device_done(self) -> None:
        torch.cuda.current_stream().synchronize()
        self._pass_done()

    def _pass_done(self) -> None:
        if self.graph_exits is not None:
            self.graph_exits.drain()

    def _mark(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record()
        return mark

    def _wait_for(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()


def _log_confidences(levels: Sequence[bytes]) -> npt.NDArray[np.float32]:
    """[blocks, K + 1]: log-probabilities in the draft, of padded levels."""
    return LOG_CONFIDENCES[np.frombuffer(b"".join(levels), dtype=np.uint8)].reshape(len(levels), -1)


def _floor_batch(sessions: int) -> BatchDescriptor:
    return BatchDescriptor(num_tokens=sessions, num_reqs=sessions, uniform=True)


def _silent_batch(sessions: int, width: int) -> BatchDescriptor:
    """It is as uniform as any: that it doesn't say so tells it from the one whose graph has exits."""
    return BatchDescriptor(num_tokens=sessions * width, num_reqs=sessions, uniform=False)


class CudaSessionWorker(Worker):  # type: ignore[misc]
    """vLLM's GPU worker with our runner. It lives in the engine process: there is no other worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = EngineOptions.of(self.vllm_config)
        self._sender = Sender(self._options.exit_address)
        sys.setswitchinterval(SWITCH_S)
        stay_with_parent()
        report_failures(Sender(self._options.exit_address))

    def _make_model_runner(self) -> CudaSessionRunner:
        return CudaSessionRunner(self.vllm_config, self.device)

    def load_model(self, **kwargs: Any) -> None:
        """Load the weights, then attach the exits: the forward is compiled and captured with them."""
        super().load_model(**kwargs)
        model = self.model_runner.get_model()
        self.model_runner.graph_exits = model.attach_graph_exits(self.vllm_config, self._sender)

    # --- called by name, from `plugin` ---

    def rehearse(self, output: SchedulerOutput) -> None:
        """See `SteadySteps.rehearse`."""
        self.model_runner.rehearse(output)

    def describe_exits(self) -> dict[str, Any]:
        """What `EngineInfo` says of the exits."""
        found: dict[str, Any] = self.model_runner.graph_exits.exits.described(self.model_config.dtype)
        return found

    def dropped_hints(self) -> int:
        """Hints that the channel had no room for."""
        return self._sender.dropped
