"""What the engine's benchmark adds to a worker, vLLM's or ours: it shares another engine's weights, and notes when the
parts of a step happen. What is computed stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

Weights = Mapping[str, Tensor]

FORWARDS: Final = ("_model_forward", "_replay")
"""What of a runner's, vLLM's or ours, runs a forward or launches it."""

_SHARED: Final[ContextVar[Weights | None]] = ContextVar("shared weights", default=None)


@contextmanager
def sharing(weights: Weights) -> Iterator[None]:
    """Engines that are built within take these parameters, by name, in the place of their own."""
    token = _SHARED.set(weights)
    try:
        yield
    finally:
        _SHARED.reset(token)


def weights_of(model: nn.Module) -> Weights:
    """A model's parameters by name."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


@dataclass(slots=True)
class Marks:
    """When parts of the last step happened, on the monotonic clock, seconds; 0 for what the runner does not show.

    On a device that runs by itself, `forward_ended` is the moment in which the forward had been handed to it.
    """

    forward_began: float = 0.0
    forward_ended: float = 0.0
    sampled: float = 0.0


class WatchedWorker:
    """Mixed into a worker, before it."""

    model_runner: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marks = Marks()

    def load_model(self, **kwargs: Any) -> None:
        """Load the weights, and give them up for those that are shared."""
        super().load_model(**kwargs)  # type: ignore[misc]
        self._take_weights(_SHARED.get() or {})
        for name in FORWARDS:
            if (forward := getattr(self.model_runner, name, None)) is not None:
                setattr(self.model_runner, name, self._watched(forward))

    def _take_weights(self, weights: Weights) -> None:
        for name, parameter in self.model_runner.get_model().named_parameters():
            shared = weights.get(name)
            if shared is not None and (shared.shape, shared.dtype) == (parameter.shape, parameter.dtype):
                parameter.data = shared

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.marks.forward_began = time.monotonic()
            output = forward(*args, **kwargs)
            self.marks.forward_ended = time.monotonic()
            return output

        return watched

    def execute_model(self, scheduler_output: Any) -> Any:
        """The forward, or its launch."""
        self.marks = Marks()
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        self.marks.forward_ended = self.marks.forward_ended or time.monotonic()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The end of a step's pass."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if not hasattr(output, "get_output"):  # else the tokens are still on the device
            self.marks.sampled = time.monotonic()
        return output

    def forward_s(self) -> float | None:
        """How long the last forward ran, seconds; None where it is not known."""
        marks = self.marks
        return marks.forward_ended - marks.forward_began if marks.forward_began else None
