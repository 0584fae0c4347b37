"""The CPU worker: its exits run eagerly, each in the moment in which its layer is done, its draft head after the pass.

The worker also ties the engine process to its verifier (`process`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from services.verifier.engine.channel import Sender
from services.verifier.engine.compact import share_of
from services.verifier.engine.compact_layers import compacting, run_compact
from services.verifier.engine.exits import Pass, VerifiedRows
from services.verifier.engine.floor_head import CommittedRows, FloorHead
from services.verifier.engine.model import ExitTap
from services.verifier.engine.options import HEAD_DRAFTS, EngineOptions
from services.verifier.engine.process import report_failures, stay_with_parent
from services.verifier.engine.runner import RequestRows, SessionRows, log_confidences
from shared.sampling.rules import Row

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class ComputedRows(NamedTuple):
    """A request's rows in a pass, from `start` on among those that the head sees: `rows`, the last `drafted` of them a
    block's; the first stands at `place` of the text. `at` is the request's in the batch."""

    request: str
    at: int
    start: int
    place: int
    rows: int
    drafted: int


class SessionRunner(SessionRows, CPUModelRunner):  # type: ignore[misc]
    """vLLM's runner, which lets the exits see the rows that it is about to compute, and draws what they yield."""

    exit_tap: ExitTap | None = None
    floor_head: FloorHead | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._computed: list[ComputedRows] = []

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        """One pass; the exits see it while it runs and only then."""
        try:
            return super().execute_model(scheduler_output, intermediate_tensors)
        finally:
            if self.exit_tap is not None:
                self.exit_tap.current = None
            if self.floor_head is not None:
                self.floor_head.tap.rows = None

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The end of the pass; what was said may then be drafted upon."""
        output = super().sample_tokens(grammar_output)
        if self.floor_head is not None:
            computed, self._computed = self._computed, []
            setattr(output, HEAD_DRAFTS, self.floor_head.drafts(self._committed(computed, output)))
        return output

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: npt.NDArray[np.int32]
    ) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        if self.floor_head is not None:
            self.floor_head.forget(scheduler_output.finished_req_ids)
            self._show_head(self.floor_head, num_scheduled_tokens.tolist(), prepared[1].num_draft_tokens)
        return prepared

    def _show_head(self, head: FloorHead, scheduled: Sequence[int], drafted: Sequence[int]) -> None:
        """Tell the head which rows of the pass that is about to begin belong to sessions that may go on by themselves."""
        computed: list[ComputedRows] = []
        rows: list[int] = []
        first = 0
        before = self.input_batch.num_computed_tokens_cpu[: len(scheduled)].tolist()
        for at, request in enumerate(self.input_batch.req_ids):
            speaker = self._speaker(request)
            if speaker.key is not None and speaker.eager:
                skipped = max(0, scheduled[at] - drafted[at] - head.window)
                place, count = before[at] + skipped, scheduled[at] - skipped
                computed.append(ComputedRows(request, at, len(rows), place, count, drafted[at]))
                rows.extend(range(first + skipped, first + scheduled[at]))
            first += scheduled[at]
        served = head.serves(len(computed))
        self._computed = computed if served else []
        head.tap.rows = torch.tensor(rows) if served else None

    def _committed(self, computed: Sequence[ComputedRows], output: Any) -> list[CommittedRows]:
        """Which of these rows came to stay, and the tokens that follow them, by what the pass has said. A request whose
        prompt goes on has no draft, but is remembered all the same."""
        found = []
        for request, at, start, place, count, drafted in computed:
            known = count - drafted
            said = output.sampled_token_ids[output.req_id_to_index[request]]
            text = self.input_batch.token_ids_cpu[at]
            end = place + known + (not said)  # of a prompt that goes on, the next token is known as well
            tokens = [*text[place + 1 : end].tolist(), *said]
            found.append(CommittedRows(request, start, place, tokens, text, speaks=bool(said)))
        return found

    def _show_exits(
        self, rows: Sequence[RequestRows], logits_indices: torch.Tensor, levels: Mapping[str, Sequence[int]]
    ) -> None:
        if self.exit_tap is not None and self.exit_tap.layers:
            self.exit_tap.current = self._pass(rows, logits_indices, levels)

    def _pass(
        self, rows: Sequence[RequestRows], logits_indices: torch.Tensor, levels: Mapping[str, Sequence[int]]
    ) -> Pass | None:
        """The rows at which sessions are about to speak whose gateways wait for hints."""
        sessions: list[VerifiedRows] = []
        positions: list[int] = []
        drafts: list[int] = []
        sure: list[float] = []
        draws: list[Row | None] = []
        for own, key, base in self._awaited(rows, levels):
            sessions.append(VerifiedRows(key, base, len(positions), own.block))
            positions.extend(range(own.first, own.first + len(own.block) + 1))
            drafts.extend((*own.block, 0))
            sure.extend((*log_confidences(levels.get(own.request, ()), len(own.block)), math.nan))
            drawn = self._drawn.get(own.request)
            draws.extend([None] * (len(own.block) + 1) if drawn is None else drawn.rows())
        if not sessions:
            return None
        chosen = (
            logits_indices
            if len(positions) == len(logits_indices)
            else logits_indices[torch.tensor(positions)]
        )
        return Pass(
            self.step_clock.began,
            chosen,
            tuple(sessions),
            torch.tensor(drafts),
            torch.tensor(sure),
            tuple(draws) if any(draws) else (),
        )


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
        """Load the weights, in few bits where they are made of few, then attach the exits."""
        with compacting(self._options.compact) as compacted:
            super().load_model(**kwargs)
        self._compact = share_of(compacted) if compacted else 1.0
        model = self.model_runner.get_model()
        run_compact(model)
        self.model_runner.exit_tap = tap = model.attach_exits(self.vllm_config, self._sender)
        self._loaded_head, self.model_runner.floor_head = model.attach_head(self.vllm_config, tap.reader.head)

    # --- called by name, from `plugin` ---

    def describe_exits(self) -> dict[str, Any]:
        """What `EngineInfo` says of the exits."""
        found: dict[str, Any] = self.model_runner.exit_tap.reader.exits.described(self.model_config.dtype)
        head = self._loaded_head
        return {
            **found,
            "draft_head": head.label,
            "compact": self._compact,
            "notes": [*found["notes"], *head.notes],
        }

    def dropped_hints(self) -> int:
        """Hints that the channel had no room for."""
        return self._sender.dropped
