"""What our model runners add to vLLM's, on any device: which rows belong to which session, and what the rows yield.

Which rows of a batch are being verified is not in vLLM's forward context; the runner knows it when it has prepared its
inputs. Where batches are uniform (`EngineOptions.uniform`), blocks come padded: padding is hidden from the sampler, which
then refuses it, so that it is never committed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.verifier.engine.draws import DrawnRows, Mark, raw_logprobs
from services.verifier.engine.options import (
    DRAFT_LENGTHS,
    DRAFT_LEVELS,
    DRAFT_ROWS,
    is_eager,
    is_unheard,
    rules_of,
    session_key,
)
from services.verifier.engine.session_table import is_heard
from shared.sampling.rules import Rules
from shared.sampling.sparse import SparseRow
from shared.speculation.outcomes import confidence_at

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

NO_TOKEN: Final = -1
"""What padding is to the sampler: no token that a target could say."""


@dataclass(slots=True)
class StepClock:
    """When the parts of the last step began or ended, on the monotonic clock, seconds: the runner was called, the forward
    was launched, the sampled tokens were on the host, the runner returned."""

    began: float = 0.0
    launched: float = 0.0
    sampled: float = 0.0
    ended: float = 0.0


class RequestRows(NamedTuple):
    """A request's rows among those whose logits are computed: `first` and one for each token of `block`, and one more.

    `known` tokens, prompt and output, stand before them; `start` is the first one's place among all rows of the pass.
    `at` is the request's in the batch.
    """

    request: str
    at: int
    first: int
    start: int
    known: int
    block: tuple[int, ...]


class Speaker(NamedTuple):
    """What a pass has to know of a request besides its rows; `state` is vLLM's own of it, `prompt` counts tokens."""

    state: Any
    rules: Rules | None
    key: str | None
    eager: bool
    unheard: bool
    prompt: int


class SessionRows:
    """Mixed into a runner of vLLM's (before it): hands sessions' rows to the exits, and draws what rows yield."""

    # vLLM's
    requests: Any
    input_batch: Any
    discard_request_mask: Any
    device: torch.device
    uniform_decode_query_len: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_clock = StepClock()
        self._speakers: dict[str, Speaker] = {}
        self._drawn: dict[str, DrawnRows] = {}

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        """One pass."""
        self.step_clock.began = time.monotonic()
        return super().execute_model(scheduler_output, intermediate_tensors)  # type: ignore[misc]

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._model_forward(*args, **kwargs)  # type: ignore[misc]
        self.step_clock.launched = time.monotonic()
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        self._device_done()
        self.step_clock.sampled = time.monotonic()
        return super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]

    def _device_done(self) -> None:
        """Wait until the device has computed the pass, and what was sampled."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The end of the pass."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        self.step_clock.ended = time.monotonic()
        return output

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: npt.NDArray[np.int32]
    ) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        logits_indices, metadata = prepared[0], prepared[1]
        rows = self._rows(scheduler_output, num_scheduled_tokens, metadata.num_draft_tokens)
        if getattr(scheduler_output, DRAFT_LENGTHS, None):
            metadata.draft_token_ids = self._without_padding(rows, metadata.num_draft_tokens)
        self._drawn = self._draws(rows, getattr(scheduler_output, DRAFT_ROWS, {}))
        self._show_exits(rows, logits_indices, getattr(scheduler_output, DRAFT_LEVELS, {}))
        return prepared

    def _show_exits(
        self, rows: Sequence[RequestRows], logits_indices: Tensor, levels: Mapping[str, Sequence[int]]
    ) -> None:
        """Tell the exits, where there are any, what the pass that is about to begin verifies."""

    def _rows(
        self,
        scheduler_output: SchedulerOutput,
        num_scheduled_tokens: npt.NDArray[np.int32],
        num_draft_tokens: list[int],
    ) -> list[RequestRows]:
        """The rows at which requests are about to speak: a block's, or the last one of a prefill."""
        batch = self.input_batch
        scheduled, lengths = num_scheduled_tokens.tolist(), getattr(scheduler_output, DRAFT_LENGTHS, {})
        computed = batch.num_computed_tokens_cpu[: len(scheduled)].tolist()
        discarded = self.discard_request_mask.np[: len(scheduled)].tolist()
        blocks = scheduler_output.scheduled_spec_decode_tokens
        rows: list[RequestRows] = []
        first = end = 0
        for index, request_id in enumerate(batch.req_ids):
            drafted = num_draft_tokens[index]
            end += scheduled[index]
            if not discarded[index]:
                known = computed[index] + scheduled[index] - drafted
                block = tuple(blocks.get(request_id, ()))[: lengths.get(request_id)]
                rows.append(RequestRows(request_id, index, first, end - drafted - 1, known, block))
            first += drafted + 1
        return rows

    def _without_padding(self, rows: Sequence[RequestRows], num_draft_tokens: list[int]) -> Tensor:
        """The draft tokens of all requests as the sampler sees them, padding as `NO_TOKEN`."""
        starts = [0, *itertools.accumulate(num_draft_tokens)]
        drafts = np.full(starts[-1], NO_TOKEN, dtype=np.int32)
        for own in rows:
            drafts[starts[own.at] : starts[own.at] + len(own.block)] = own.block
        return torch.from_numpy(drafts).to(self.device)

    # --- what the rows yield --------------------------------------------------------------------------

    def _draws(
        self, rows: Sequence[RequestRows], drawn_from: Mapping[str, Sequence[SparseRow]]
    ) -> dict[str, DrawnRows]:
        """Rows whose tokens are drawn otherwise than by vLLM's greedy decoding, by request."""
        speakers = {own.request: self._speaker(own.request) for own in rows}
        self._speakers = speakers
        return {
            own.request: DrawnRows(
                rules,
                own.first,
                self.input_batch.token_ids_cpu[own.at, : own.known].astype(np.int64),
                own.block,
                drawn_from.get(own.request, ()),
            )
            for own in rows
            if (rules := speakers[own.request].rules) is not None
        }

    def _speaker(self, request: str) -> Speaker:
        state, known = self.requests[request], self._speakers.get(request)
        if known is not None and known.state is state:
            return known
        extra = state.sampling_params.extra_args
        return Speaker(
            state,
            rules_of(extra),
            session_key(extra),
            is_eager(extra),
            is_unheard(extra),
            state.num_prompt_tokens,
        )

    def _sample(
        self, logits: Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        """vLLM's sampling, of logits whose largest are the tokens drawn."""
        drawn, self._drawn = self._drawn, {}
        metadata = self.input_batch.sampling_metadata
        most = metadata.max_num_logprobs
        sample = super()._sample  # type: ignore[misc]
        if logits is None or spec_decode_metadata is None or not (drawn or most is not None):
            return sample(logits, spec_decode_metadata)
        mark = Mark(logits, list(drawn.values())) if drawn else None
        metadata.max_num_logprobs = (
            None  # vLLM would compute them from the marked logits, and for every request
        )
        try:
            output = sample(logits, spec_decode_metadata)
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

    def _awaited(
        self, rows: Sequence[RequestRows], levels: Mapping[str, Sequence[int]]
    ) -> Iterable[tuple[RequestRows, str, int]]:
        """The rows of sessions whose gateways wait for hints, with the session's key and its base."""
        for own in rows:
            speaker = self._speakers[own.request]
            heard = self._is_heard(speaker, levels.get(own.request, ()), len(own.block))
            if speaker.key is not None and heard:
                yield own, speaker.key, own.known - speaker.prompt

    @staticmethod
    def _is_heard(speaker: Speaker, levels: Sequence[int], drafted: int) -> bool:
        """Whether a gateway waits for hints on a block of `drafted` tokens."""
        return speaker.key is not None and is_heard(
            levels, drafted, eager=speaker.eager, unheard=speaker.unheard
        )


def log_confidences(levels: Sequence[int], drafted: int) -> Iterable[float]:
    """Log-probabilities in the draft of a block's tokens, NaN where it said nothing."""
    if len(levels) != drafted:
        return itertools.repeat(math.nan, drafted)
    return (math.log(confidence_at(level)) for level in levels)
