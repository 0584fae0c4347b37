"""The workers of the engine's benchmark on CUDA: vLLM's and ours, watched (`engine_worker`). vLLM finds them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

from loadtest.engine_worker import WatchedWorker, Weights
from services.verifier.engine.cuda_worker import CudaSessionWorker


class StockWorker(WatchedWorker, Worker):  # type: ignore[misc]
    """vLLM's GPU worker. The device itself says how long a forward ran."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._spans: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def _take_weights(self, weights: Weights) -> None:
        super()._take_weights(weights)
        torch.cuda.empty_cache()

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def spanned(*args: Any, **kwargs: Any) -> Any:
            began.record()
            output = forward(*args, **kwargs)
            ended.record()
            self._spans = began, ended
            return output

        return super()._watched(spanned)

    def forward_s(self) -> float | None:
        """How long the last forward ran on the device, seconds; None where it is not known."""
        if self._spans is None:
            return None
        began, ended = self._spans
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000


class OwnWorker(CudaSessionWorker, StockWorker):
    """The verifier's GPU worker: its graphs are captured over the weights that are shared."""
