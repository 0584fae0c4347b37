"""Llama-family models with early exits: vLLM's own, with a hook after every layer.

vLLM calls `_maybe_add_hidden_state` after each layer of a Llama forward; the subclass there hands the residual stream
to the exits. No forward is copied. The models run eagerly, so that an exit speaks as soon as its layer is done.

`config.json` stays as it is: the verifier names the architecture (see `launch`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.mistral import MistralForCausalLM, MistralModel

from services.verifier.engine.channel import Sender
from services.verifier.engine.exit_files import TargetFacts, load_exits
from services.verifier.engine.exit_head import ExitHead, Naming, best_head
from services.verifier.engine.exit_modules import TrainedExit, quickest
from services.verifier.engine.exits import ExitReader, Pass
from services.verifier.engine.options import EngineOptions
from shared.errors import EngineError


class ExitTap:
    """Where a model's layers meet its exits. The runner sets `current` for the time of a pass."""

    def __init__(self, reader: ExitReader, sender: Sender) -> None:
        self.reader = reader
        self.layers = frozenset(reader.exits.modules)
        self.current: Pass | None = None
        self._sender = sender

    def layer_done(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Read the exit after `layer`, if there is one, and send what it says at once."""
        current = self.current
        if current is None or layer not in self.layers or residual is None:
            return
        rows = hidden[current.rows] + residual[current.rows]
        elapsed_ms = lambda: (time.monotonic() - current.began) * 1000  # noqa: E731
        self._sender.send(self.reader.read(layer, rows, current, elapsed_ms))


class _TappedModel(LlamaModel):  # type: ignore[misc]
    exit_tap: ExitTap | None = None

    def _maybe_add_hidden_state(
        self, aux_hidden_states: list[Tensor], layer_idx: int, hidden_states: Tensor, residual: Tensor | None
    ) -> list[Tensor]:
        if self.exit_tap is not None:
            self.exit_tap.layer_done(layer_idx, hidden_states, residual)
        found: list[Tensor] = super()._maybe_add_hidden_state(
            aux_hidden_states, layer_idx, hidden_states, residual
        )
        return found


class _TappedMistralModel(_TappedModel, MistralModel):  # type: ignore[misc]
    pass


class _WithExits:
    """Mixed into a causal model: builds the tapped backbone, and attaches the exits once the weights are there."""

    model: _TappedModel
    config: Any
    lm_head: Any
    logits_processor: Any
    compute_logits: Any
    backbone: type[LlamaModel] = _TappedModel

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> nn.Module:
        if vllm_config.compilation_config.mode != CompilationMode.NONE:
            raise EngineError("early exits run in eager mode: start vLLM with enforce_eager")
        backbone: nn.Module = self.backbone(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        return backbone

    def attach_exits(self, vllm_config: VllmConfig, sender: Sender) -> ExitTap:
        """Load the exit modules and tap the layers; to be called once, after the weights are loaded."""
        options = EngineOptions.of(vllm_config)
        target = TargetFacts(
            directory=Path(vllm_config.model_config.model),
            hidden_size=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
            epsilon=self.config.rms_norm_eps,
            dtype=vllm_config.model_config.dtype,
        )
        file = Path(options.exit_modules) if options.exit_modules else None
        exits = load_exits(options.exit_layers, file, target)
        modules = {
            layer: quickest(module) if isinstance(module, TrainedExit) else module
            for layer, module in exits.modules.items()
        }
        exits = replace(exits, modules=modules)
        head = self._exit_head(exits.naming)
        tap = ExitTap(ExitReader(exits, self.model.norm, head, options.exit_outcomes), sender)
        self.model.exit_tap = tap
        return tap

    def _exit_head(self, naming: Naming) -> ExitHead:
        weight = self.lm_head.weight[: self.config.vocab_size]
        plain = self.logits_processor.scale == 1.0 and self.logits_processor.soft_cap is None
        return best_head(self.compute_logits, weight, naming, plain=plain)


class OutriderLlamaForCausalLM(_WithExits, LlamaForCausalLM):  # type: ignore[misc]
    """LlamaForCausalLM with early exits."""


class OutriderMistralForCausalLM(_WithExits, MistralForCausalLM):  # type: ignore[misc]
    """MistralForCausalLM with early exits."""

    backbone = _TappedMistralModel
