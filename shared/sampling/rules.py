"""How a session's tokens are drawn, said once for target, exits and draft. Arithmetic is in `logits`; nothing heavy here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from shared.protocol import Sampling, SamplingMode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

GREEDY_BELOW: Final = 1e-5
"""Temperatures below are none (vLLM's own figure)."""
LOWEST_TEMPERATURE: Final = 1e-2
"""Others are at least this (vLLM's own figure)."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How a session's tokens are drawn. `stop_tokens` are those that would end its answer, as far as they are known."""

    sampling: Sampling
    prompt_length: int
    stop_tokens: tuple[int, ...] = ()

    @property
    def temperature(self) -> float:
        """The temperature, 0.0 for greedy decoding."""
        asked = self.sampling.temperature
        return 0.0 if asked < GREEDY_BELOW else max(asked, LOWEST_TEMPERATURE)

    @property
    def ratio(self) -> bool:
        """Whether drafts are judged by the ratio of probabilities; at temperature 0 there is none."""
        return self.sampling.mode is SamplingMode.RATIO and self.temperature > 0.0

    @property
    def penalised(self) -> bool:
        """Whether what was said before changes what is said."""
        sampling = self.sampling
        return (
            sampling.repetition_penalty != 1.0
            or sampling.frequency_penalty != 0.0
            or sampling.presence_penalty != 0.0
        )

    @property
    def plain(self) -> bool:
        """Greedy decoding of the logits as they are."""
        return not (
            self.temperature or self.penalised or self.sampling.logit_bias or self.sampling.min_tokens
        )


class Row(NamedTuple):
    """What a row of logits is the continuation of: the prompt's tokens and then the output's."""

    rules: Rules
    tokens: Sequence[int] | npt.NDArray[np.int64]

    @property
    def position(self) -> int:
        """Output tokens before it."""
        return len(self.tokens) - self.rules.prompt_length
