"""What vLLM gets from us in every process that it starts: our models, calls that reach our scheduler, and a moment's
patience before a step.

The calls become methods of `EngineCore`, where vLLM's front-end finds them by name (`call_utility_async`).
"""

from __future__ import annotations

import functools
import queue
from typing import TYPE_CHECKING, Any, Final

from services.verifier.engine.options import DESCRIBE_CALL, REHEARSED_S, STATS_CALL, SUBMIT_CALL

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.engine.core import EngineCore, EngineCoreProc

MODELS: Final = {
    "OutriderLlamaForCausalLM": "services.verifier.engine.model:OutriderLlamaForCausalLM",
    "OutriderMistralForCausalLM": "services.verifier.engine.model:OutriderMistralForCausalLM",
}
"""Our architectures and their classes, imported only where a model is built."""


def register() -> None:
    """Register models and calls; may be called more than once."""
    from vllm import ModelRegistry
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    known = ModelRegistry.get_supported_archs()
    for architecture, where in MODELS.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, where)
    setattr(EngineCore, SUBMIT_CALL, _submit)
    setattr(EngineCore, STATS_CALL, _stats)
    setattr(EngineCore, DESCRIBE_CALL, _describe)
    if not hasattr(EngineCoreProc._process_input_queue, "__wrapped__"):
        EngineCoreProc._process_input_queue = _gathering(EngineCoreProc._process_input_queue)


def _gathering(process_input_queue: Callable[[EngineCoreProc], None]) -> Callable[[EngineCoreProc], None]:
    """vLLM's look at what came in, and then a moment for blocks that are on their way (`gather_s`), in which a step is
    rehearsed."""

    @functools.wraps(process_input_queue)
    def gathered(core: EngineCoreProc) -> None:
        process_input_queue(core)
        gather_s = getattr(core.scheduler, "gather_s", None)  # a stock scheduler has no sessions
        while gather_s is not None and core.has_work() and (left_s := gather_s()) > 0.0:
            if core.scheduler.uniform:
                left_s = min(left_s, REHEARSED_S)
                if (rehearsal := core.scheduler.rehearsal()) is not None:
                    core.model_executor.collective_rpc("rehearse", args=(rehearsal,))
            try:
                request = core.input_queue.get(timeout=left_s)
            except queue.Empty:
                continue
            core._handle_client_request(*request)

    return gathered


def _submit(core: EngineCore, blocks: list[list[Any]]) -> list[str]:
    """The status of each block, given as the arguments of `SessionScheduler.submit_block`."""
    return [str(core.scheduler.submit_block(*block)) for block in blocks]


def _stats(core: EngineCore) -> dict[str, Any]:
    (dropped,) = core.collective_rpc("dropped_hints")
    return {**core.scheduler.session_stats(), "dropped_hints": dropped}


def _describe(core: EngineCore) -> dict[str, Any]:
    (exits,) = core.collective_rpc("describe_exits")
    scheduler = core.scheduler
    return {**exits, "kv_capacity_tokens": scheduler.kv_capacity_tokens, "padded": scheduler.padded}
