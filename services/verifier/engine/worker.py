"""The CPU worker: tells the exits, for each pass, which rows belong to which session.

Which rows of a batch are being verified is not in vLLM's forward context; the runner knows it when it has prepared its
inputs. The worker also ties the engine process to its verifier (`process`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from services.verifier.engine.channel import Sender
from services.verifier.engine.exits import Pass, VerifiedRows
from services.verifier.engine.model import ExitTap
from services.verifier.engine.options import DRAFT_LEVELS, EngineOptions, is_eager, session_key
from services.verifier.engine.process import report_failures, stay_with_parent
from shared.speculation.outcomes import confidence_at

if TYPE_CHECKING:
    import numpy as np
    from vllm.v1.core.sched.output import SchedulerOutput


class SessionRunner(CPUModelRunner):  # type: ignore[misc]
    """vLLM's runner, which lets the exits see the rows that it is about to compute."""

    exit_tap: ExitTap | None = None
    _pass_began = 0.0

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        """One pass; the exits see it while it runs and only then."""
        self._pass_began = time.monotonic()
        try:
            return super().execute_model(scheduler_output, intermediate_tensors)
        finally:
            if self.exit_tap is not None:
                self.exit_tap.current = None

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        if self.exit_tap is not None and self.exit_tap.layers:
            logits_indices, metadata = prepared[0], prepared[1]
            self.exit_tap.current = self._session_rows(
                scheduler_output, num_scheduled_tokens, logits_indices, metadata.num_draft_tokens
            )
        return prepared

    def _session_rows(
        self,
        scheduler_output: SchedulerOutput,
        num_scheduled_tokens: np.ndarray,
        logits_indices: torch.Tensor,
        num_draft_tokens: list[int],
    ) -> Pass | None:
        """The rows at which sessions are about to speak: a block's, or the last one of a prefill."""
        batch = self.input_batch
        sessions: list[VerifiedRows] = []
        positions: list[int] = []
        drafts: list[int] = []
        sure: list[float] = []
        offset = 0
        levels = getattr(scheduler_output, DRAFT_LEVELS, {})
        for index, request_id in enumerate(batch.req_ids):
            drafted, first = num_draft_tokens[index], offset
            offset += drafted + 1
            extra = self.requests[request_id].sampling_params.extra_args
            key = session_key(extra)
            if key is None or self.discard_request_mask.np[index]:
                continue
            if not drafted and is_eager(extra):  # the floor's pass: nobody waits for a hint
                continue
            known = int(batch.num_computed_tokens_cpu[index]) + int(num_scheduled_tokens[index]) - drafted
            block = tuple(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
            base = known - int(batch.num_prompt_tokens[index])
            sessions.append(VerifiedRows(key, base, len(positions), block))
            positions.extend(range(first, offset))
            drafts.extend((*block, 0))
            sure.extend((*_log_confidences(levels.get(request_id, ()), len(block)), math.nan))
        if not sessions:
            return None
        rows = logits_indices if len(positions) == offset else logits_indices[torch.tensor(positions)]
        return Pass(self._pass_began, rows, tuple(sessions), torch.tensor(drafts), torch.tensor(sure))


def _log_confidences(levels: Sequence[int], drafted: int) -> Iterable[float]:
    """Log-probabilities in the draft of a block's tokens, NaN where it said nothing."""
    if len(levels) != drafted:
        return itertools.repeat(math.nan, drafted)
    return (math.log(confidence_at(level)) for level in levels)


class SessionWorker(CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker with our runner. It lives in the engine process: there is no other worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = EngineOptions.of(self.vllm_config)
        self._sender = Sender(self._options.exit_address)
        stay_with_parent()
        report_failures(self._sender)
        torch.set_num_threads(self._options.threads)

    def init_device(self) -> None:
        """As vLLM's, with our runner in the place of its own, which it names itself."""
        vllms_own = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = SessionRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = vllms_own

    def load_model(self, **kwargs: Any) -> None:
        """Load the weights, then attach the exits."""
        super().load_model(**kwargs)
        model = self.model_runner.get_model()
        self.model_runner.exit_tap = model.attach_exits(self.vllm_config, self._sender)

    # --- called by name, from `plugin` ---

    def describe_exits(self) -> dict[str, Any]:
        """What `EngineInfo` says of the exits."""
        exits = self.model_runner.exit_tap.reader.exits
        return {
            "exit_layers": sorted(exits.modules),
            "exits": exits.label,
            "notes": list(exits.notes),
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
        }

    def dropped_hints(self) -> int:
        """Hints that the channel had no room for."""
        return self._sender.dropped
