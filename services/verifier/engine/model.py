"""Llama-family models with early exits: vLLM's own, with a hook after every layer.

vLLM calls `_maybe_add_hidden_state` after each layer of a Llama forward; the subclass there hands the residual stream
to the exits. No forward is copied. On a CPU the models run eagerly, so that an exit speaks as soon as its layer is done; on
CUDA the hook is an operator in the compiled graph (`graph_exits`).

`config.json` stays as it is: the verifier names the architecture (see `launch`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.mistral import MistralForCausalLM, MistralModel

from services.verifier.engine import draft_head_files, graph_exits
from services.verifier.engine.channel import Sender
from services.verifier.engine.device_head import DeviceHead
from services.verifier.engine.exit_files import ExitSet, TargetFacts, load_exits
from services.verifier.engine.exit_head import ExactHead, ExitHead, Naming, NamingHead, best_head
from services.verifier.engine.exit_modules import TrainedExit, quickest
from services.verifier.engine.exits import ExitReader, Pass
from services.verifier.engine.floor_head import FloorHead, HeadTap
from services.verifier.engine.options import EngineOptions
from shared.errors import EngineError

if TYPE_CHECKING:
    from services.verifier.engine.fused_exits import FusedExit


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
    head_tap: HeadTap | None = None
    exits_in_graph: int | None = None
    """The number of the exits that the graph's operator calls (`graph_exits.register`), after the layers below."""
    hooked_layers: tuple[int, ...] = ()
    exit_order: Tensor

    def _maybe_add_hidden_state(
        self, aux_hidden_states: list[Tensor], layer_idx: int, hidden_states: Tensor, residual: Tensor | None
    ) -> list[Tensor]:
        if self.exit_tap is not None:
            self.exit_tap.layer_done(layer_idx, hidden_states, residual)
        elif self.exits_in_graph is not None and layer_idx in self.hooked_layers:
            torch.ops.vllm.outrider_exit(
                hidden_states, residual, self.exit_order, layer_idx, self.exits_in_graph
            )
        if self.head_tap is not None:
            self.head_tap.layer_done(layer_idx, hidden_states, residual)
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
        compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
        if compiled and vllm_config.device_config.device_type == "cpu":
            raise EngineError("early exits run in eager mode on a CPU: start vLLM with enforce_eager")
        backbone: nn.Module = self.backbone(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        return backbone

    def attach_exits(self, vllm_config: VllmConfig, sender: Sender) -> ExitTap:
        """Load the exit modules and tap the layers; to be called once, after the weights are loaded."""
        options, exits = EngineOptions.of(vllm_config), self._exits(vllm_config)
        modules = {
            layer: quickest(module) if isinstance(module, TrainedExit) else module
            for layer, module in exits.modules.items()
        }
        exits = replace(exits, modules=modules)
        weight, plain = self._head_weight()
        head = best_head(self.compute_logits, weight, exits.naming, plain=plain)
        tap = ExitTap(ExitReader(exits, self.model.norm, head, options.exit_outcomes), sender)
        self.model.exit_tap = tap
        return tap

    def attach_head(
        self, vllm_config: VllmConfig, naming: NamingHead
    ) -> tuple[draft_head_files.LoadedHead, FloorHead | None]:
        """Load the draft head, if there is one, and tap the layers that it reads; once, after the weights are loaded.
        `naming` finds the likeliest tokens, as for the exits."""
        options, config = EngineOptions.of(vllm_config), self.config
        file = Path(options.draft_head) if options.draft_head else None
        loaded = draft_head_files.load_head(file, self._facts(vllm_config), config.num_hidden_layers)
        if loaded.head is None:
            return loaded, None
        head = loaded.head.to(vllm_config.model_config.dtype)
        embedding = self.model.embed_tokens.weight[: config.vocab_size].detach()
        longest = vllm_config.model_config.max_model_len
        floor_head = FloorHead(head, self.model.norm, naming, embedding, longest=longest)
        self.model.head_tap = floor_head.tap
        return loaded, floor_head

    def attach_graph_exits(self, vllm_config: VllmConfig, sender: Sender) -> graph_exits.GraphExits:
        """As `attach_exits`, with exits that become nodes of CUDA graphs; before anything is compiled or captured.

        `EngineError` with more than one rank.
        """
        if vllm_config.parallel_config.world_size > 1:
            raise EngineError("early exits run on one GPU: start the verifier without tensor parallelism")
        options, exits = EngineOptions.of(vllm_config), self._exits(vllm_config)
        weight, plain = self._head_weight()
        exits = replace(
            exits, modules={layer: module.to(weight.device) for layer, module in exits.modules.items()}
        )
        head = self._graph_head(weight, exits.naming, plain=plain)
        attached = graph_exits.GraphExits(
            exits,
            self.model.norm,
            head,
            sender,
            fused=self._fused(exits, head, options.exit_outcomes),
            device=weight.device,
            most_blocks=vllm_config.scheduler_config.max_num_seqs,
            longest=vllm_config.num_speculative_tokens,
            outcomes=options.exit_outcomes,
        )
        if exits.modules:
            self.model.exit_order = torch.zeros(1, device=weight.device)
            self.model.hooked_layers = (*attached.layers, self.config.num_hidden_layers)
            self.model.exits_in_graph = graph_exits.register(attached)
        return attached

    def _fused(self, exits: ExitSet, head: ExitHead, outcomes: int) -> dict[int, FusedExit]:
        """The exits in few kernels, where kernels can be had and serve."""
        if not (isinstance(head, DeviceHead) and head.weight.is_cuda):
            return {}
        from services.verifier.engine.fused_exits import FusedExit

        if not FusedExit.serves(head, outcomes):
            return {}
        norm = self.model.norm
        return {
            layer: FusedExit(module, head, norm.weight.detach(), norm.variance_epsilon, outcomes)
            for layer, module in exits.modules.items()
        }

    def _exits(self, vllm_config: VllmConfig) -> ExitSet:
        options = EngineOptions.of(vllm_config)
        file = Path(options.exit_modules) if options.exit_modules else None
        return load_exits(options.exit_layers, file, self._facts(vllm_config))

    def _facts(self, vllm_config: VllmConfig) -> TargetFacts:
        return TargetFacts(
            directory=Path(vllm_config.model_config.model),
            hidden_size=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
            epsilon=self.config.rms_norm_eps,
            dtype=vllm_config.model_config.dtype,
        )

    def _head_weight(self) -> tuple[Tensor, bool]:
        """The head's weight `[vocabulary, hidden size]`, and whether logits are a product with it and nothing else."""
        weight: Tensor = self.lm_head.weight[: self.config.vocab_size].detach()
        plain = self.logits_processor.scale == 1.0 and self.logits_processor.soft_cap is None
        return weight, plain

    def _graph_head(self, weight: Tensor, naming: Naming, *, plain: bool) -> ExitHead:
        if plain:
            return DeviceHead(weight, naming)
        ids = None if naming.vocabulary is None else naming.vocabulary.to(weight.device)
        return ExactHead(self.compute_logits, weight, Naming(ids))


class OutriderLlamaForCausalLM(_WithExits, LlamaForCausalLM):  # type: ignore[misc]
    """LlamaForCausalLM with early exits."""


class OutriderMistralForCausalLM(_WithExits, MistralForCausalLM):  # type: ignore[misc]
    """MistralForCausalLM with early exits."""

    backbone = _TappedMistralModel
