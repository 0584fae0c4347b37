"""The CUDA worker: its exits are nodes of the full CUDA graphs that vLLM captures for uniform batches (`graph_exits`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from services.verifier.engine.channel import Sender
from services.verifier.engine.exits import VerifiedRows
from services.verifier.engine.graph_exits import Blocks, GraphExits
from services.verifier.engine.options import EngineOptions
from services.verifier.engine.process import report_failures, stay_with_parent
from services.verifier.engine.runner import RequestRows
from services.verifier.engine.steady import SteadySteps
from shared.speculation.outcomes import LEVELS, confidence_at

SWITCH_S: Final = 0.0005
"""How long the thread that turns what exits say into hints waits for the one that prepares and ends passes."""
UNTOLD: Final = LEVELS
"""The level of a token of which the draft said nothing."""
LOG_CONFIDENCES: Final = np.array(
    [*(math.log(confidence_at(level)) for level in range(LEVELS)), math.nan], np.float32
)
"""A level's log-probability in the draft."""


class CudaSessionRunner(SteadySteps, GPUModelRunner):  # type: ignore[misc]
    """vLLM's runner, which tells the exits in the graph what each pass verifies, and draws what its rows yield."""

    graph_exits: GraphExits | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        most = self.uniform_decode_query_len * self.scheduler_config.max_num_seqs
        self._drafts = torch.zeros(most, dtype=torch.int32, device=self.device)
        self._drafts_here = torch.zeros(most, dtype=torch.int32, device="cpu", pin_memory=True)

    def _without_padding(self, rows: Sequence[RequestRows], num_draft_tokens: list[int]) -> torch.Tensor:
        """As `SessionRows._without_padding`, through memory that is there already: the last pass has been waited for."""
        drafts = self._told_apart(rows, num_draft_tokens)
        self._drafts_here[: len(drafts)] = torch.from_numpy(drafts)
        self._drafts.copy_(self._drafts_here, non_blocking=True)
        return self._drafts[: len(drafts)]

    def _show_exits(
        self, rows: Sequence[RequestRows], logits_indices: torch.Tensor, levels: Mapping[str, Sequence[int]]
    ) -> None:
        if self.graph_exits is not None and self.graph_exits.layers:
            self.graph_exits.stage(self._blocks(rows, levels))

    def _blocks(self, rows: Sequence[RequestRows], levels: Mapping[str, Sequence[int]]) -> Blocks | None:
        """All blocks of the pass, in the batch's order; sessions are those whose gateways wait for hints.

        What is drawn at random is not foreseen here: its noise is not in the graph.
        """
        awaited = {own.request: (key, base) for own, key, base in self._awaited(rows, levels)}
        if not awaited:
            return None
        width = self.uniform_decode_query_len
        nothing, untold = (0,) * width, (UNTOLD,) * width
        starts = np.array([own.start for own in rows], dtype=np.int32)
        lengths = np.array([len(own.block) for own in rows], dtype=np.int32)
        places = starts[:, None] + np.minimum(np.arange(width, dtype=np.int32), lengths[:, None])
        drafts = np.array([own.block + nothing[len(own.block) :] for own in rows], dtype=np.int32)
        told = [tuple(levels.get(own.request, ())) for own in rows]
        sure = LOG_CONFIDENCES[
            [
                said + untold[len(said) :] if len(said) == len(own.block) else untold
                for own, said in zip(rows, told, strict=True)
            ]
        ]
        sessions = tuple(
            VerifiedRows(*awaited[own.request], at * width, own.block)
            for at, own in enumerate(rows)
            if own.request in awaited and own.request not in self._drawn
        )
        return Blocks(self.step_clock.began, places, drafts, sure, lengths, sessions)

    def _device_done(self) -> None:
        torch.cuda.current_stream().synchronize()
        if self.graph_exits is not None:
            self.graph_exits.drain()


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

    def describe_exits(self) -> dict[str, Any]:
        """What `EngineInfo` says of the exits."""
        found: dict[str, Any] = self.model_runner.graph_exits.exits.described(self.model_config.dtype)
        return found

    def dropped_hints(self) -> int:
        """Hints that the channel had no room for."""
        return self._sender.dropped
