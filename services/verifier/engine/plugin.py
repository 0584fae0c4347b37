"""What vLLM gets from us in every process that it starts: our models, and calls that reach our scheduler.

The calls become methods of `EngineCore`, where vLLM's front-end finds them by name (`call_utility_async`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from services.verifier.engine.options import DESCRIBE_CALL, STATS_CALL, SUBMIT_CALL

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

MODELS: Final = {
    "OutriderLlamaForCausalLM": "services.verifier.engine.model:OutriderLlamaForCausalLM",
    "OutriderMistralForCausalLM": "services.verifier.engine.model:OutriderMistralForCausalLM",
}
"""Our architectures and their classes, imported only where a model is built."""


def register() -> None:
    """Register models and calls; may be called more than once."""
    from vllm import ModelRegistry
    from vllm.v1.engine.core import EngineCore

    known = ModelRegistry.get_supported_archs()
    for architecture, where in MODELS.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, where)
    setattr(EngineCore, SUBMIT_CALL, _submit)
    setattr(EngineCore, STATS_CALL, _stats)
    setattr(EngineCore, DESCRIBE_CALL, _describe)


def _submit(core: EngineCore, key: str, base: int, tokens: list[int], levels: list[int]) -> str:
    return str(core.scheduler.submit_block(key, base, tokens, levels))


def _stats(core: EngineCore) -> dict[str, Any]:
    (dropped,) = core.collective_rpc("dropped_hints")
    return {**core.scheduler.session_stats(), "dropped_hints": dropped}


def _describe(core: EngineCore) -> dict[str, Any]:
    (exits,) = core.collective_rpc("describe_exits")
    return {**exits, "kv_capacity_tokens": core.scheduler.kv_capacity_tokens}
