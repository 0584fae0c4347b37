"""The CPU worker: tells the exits, for each pass, which rows belong to which session, and draws what the rows yield.

Which rows of a batch are being verified is not in vLLM's forward context; the runner knows it when it has prepared its
inputs. The worker also ties the engine process to its verifier (`process`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from services.verifier.engine.channel import Sender
from services.verifier.engine.draws import DrawnRows, Mark, raw_logprobs
from services.verifier.engine.exits import Pass, VerifiedRows
from services.verifier.engine.model import ExitTap
from services.verifier.engine.options import (
    DRAFT_LEVELS,
    DRAFT_ROWS,
    EngineOptions,
    is_eager,
    rules_of,
    session_key,
)
from services.verifier.engine.process import report_failures, stay_with_parent
from shared.sampling.rules import Row, Rules
from shared.sampling.sparse import SparseRow
from shared.speculation.outcomes import confidence_at

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


@dataclass(frozen=True, slots=True)
class _Rows:
    """A request's rows among those whose logits are computed: `first` and one for each token of `block`, and one more.

    `known` tokens, prompt and output, stand before them.
    """

    request: str
    index: int
    first: int
    known: int
    block: tuple[int, ...]


class SessionRunner(CPUModelRunner):  # type: ignore[misc]
    """vLLM's runner, which lets the exits see the rows that it is about to compute, and draws what they yield."""

    exit_tap: ExitTap | None = None
    _pass_began = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rules: dict[str, Rules | None] = {}
        self._drawn: dict[str, DrawnRows] = {}

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
        logits_indices, metadata = prepared[0], prepared[1]
        rows = self._rows(scheduler_output, num_scheduled_tokens, metadata.num_draft_tokens)
        self._drawn = self._draws(rows, getattr(scheduler_output, DRAFT_ROWS, {}))
        if self.exit_tap is not None and self.exit_tap.layers:
            levels = getattr(scheduler_output, DRAFT_LEVELS, {})
            self.exit_tap.current = self._session_rows(rows, logits_indices, levels)
        return prepared

    def _rows(
        self,
        scheduler_output: SchedulerOutput,
        num_scheduled_tokens: np.ndarray,
        num_draft_tokens: list[int],
    ) -> list[_Rows]:
        """The rows at which requests are about to speak: a block's, or the last one of a prefill."""
        batch = self.input_batch
        rows: list[_Rows] = []
        first = 0
        for index, request_id in enumerate(batch.req_ids):
            drafted = num_draft_tokens[index]
            if not self.discard_request_mask.np[index]:
                known = int(batch.num_computed_tokens_cpu[index]) + int(num_scheduled_tokens[index]) - drafted
                block = tuple(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
                rows.append(_Rows(request_id, index, first, known, block))
            first += drafted + 1
        return rows

    # --- what the rows yield --------------------------------------------------------------------------

    def _draws(
        self, rows: Sequence[_Rows], drawn_from: Mapping[str, Sequence[SparseRow]]
    ) -> dict[str, DrawnRows]:
        """Rows whose tokens are drawn otherwise than by vLLM's greedy decoding, by request."""
        requests = [own.request for own in rows]
        self._rules = {
            request: self._rules[request] if request in self._rules else self._rules_of(request)
            for request in requests
        }
        return {
            own.request: DrawnRows(
                rules,
                own.first,
                self.input_batch.token_ids_cpu[own.index, : own.known].astype(np.int64),
                own.block,
                drawn_from.get(own.request, ()),
            )
            for own in rows
            if (rules := self._rules[own.request]) is not None
        }

    def _rules_of(self, request: str) -> Rules | None:
        return rules_of(self.requests[request].sampling_params.extra_args)

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        """vLLM's sampling, of logits whose largest are the tokens drawn."""
        drawn, self._drawn = self._drawn, {}
        metadata = self.input_batch.sampling_metadata
        most = metadata.max_num_logprobs
        if logits is None or spec_decode_metadata is None or not (drawn or most is not None):
            return super()._sample(logits, spec_decode_metadata)
        mark = Mark(logits, list(drawn.values())) if drawn else None
        metadata.max_num_logprobs = (
            None  # vLLM would compute them from the marked logits, and for every request
        )
        try:
            output = super()._sample(logits, spec_decode_metadata)
        finally:
            metadata.max_num_logprobs = most
        if most is not None:
            if mark is not None:
                mark.undo()
            output.logprobs_tensors = raw_logprobs(
                logits,
                output.sampled_token_ids,
                [drafted + 1 for drafted in spec_decode_metadata.num_draft_tokens],
                [self.requests[request].sampling_params.num_logprobs for request in self.input_batch.req_ids],
            )
        return output

    # --- what the exits look at -----------------------------------------------------------------------

    def _session_rows(
        self, rows: Sequence[_Rows], logits_indices: torch.Tensor, levels: dict[str, list[int]]
    ) -> Pass | None:
        """The rows at which sessions are about to speak whose gateways wait for hints."""
        sessions: list[VerifiedRows] = []
        positions: list[int] = []
        drafts: list[int] = []
        sure: list[float] = []
        draws: list[Row | None] = []
        for own in rows:
            extra = self.requests[own.request].sampling_params.extra_args
            key = session_key(extra)
            if key is None or (
                not own.block and is_eager(extra)
            ):  # the floor's pass: nobody waits for a hint
                continue
            base = own.known - int(self.input_batch.num_prompt_tokens[own.index])
            sessions.append(VerifiedRows(key, base, len(positions), own.block))
            positions.extend(range(own.first, own.first + len(own.block) + 1))
            drafts.extend((*own.block, 0))
            sure.extend((*_log_confidences(levels.get(own.request, ()), len(own.block)), math.nan))
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
            self._pass_began,
            chosen,
            tuple(sessions),
            torch.tensor(drafts),
            torch.tensor(sure),
            tuple(draws) if any(draws) else (),
        )


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
