"""What a small Llama is made of, whatever its weights are stored as: projections, embedding, choice of the next token.

`LlamaDraft` runs it: attention, caches and lanes are there. Here are weights in float32; those in few bits are in
`distilled`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import ModelFilesError

Projection = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer, with query, key and value as one projection, and gate and up as one."""

    attention_norm: Tensor
    qkv: Projection
    output: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class Words:
    """Tokens that may be said beside a draft's own vocabulary: their ids and output rows."""

    ids: Tensor
    rows: Tensor


class Network(Protocol):
    """Weights, and what depends on how they are stored."""

    layers: Sequence[Layer]
    norm: Tensor

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids `[…]` → hidden states `[…, hidden]`."""
        ...

    def words(self, tokens: Sequence[int]) -> Words | None:
        """What a context of `tokens` adds to the vocabulary."""
        ...

    def choose(self, hidden: Tensor, words: Words | None) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row of normed hidden states `[rows, hidden]`, and its probability."""
        ...


class FloatNetwork:
    """A Hugging Face checkpoint's weights in float32, perhaps with a reduced output vocabulary."""

    def __init__(self, weights: Mapping[str, Tensor], layers: int) -> None:
        """`weights` are named as Hugging Face names them; `ModelFilesError` when one is missing."""
        try:
            self._embedding = weights["model.embed_tokens.weight"].float()
            self.layers: Sequence[Layer] = [_layer(weights, f"model.layers.{i}.") for i in range(layers)]
            self.norm = weights["model.norm.weight"].float()
            self._head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()
        except KeyError as error:
            raise ModelFilesError(f"the draft model lacks the weight {error}") from None
        vocabulary = weights.get("draft_vocab")
        self._vocabulary = None if vocabulary is None else vocabulary.long()
        if self._vocabulary is not None and len(self._vocabulary) != len(self._head):
            raise ModelFilesError(
                f"draft_vocab has {len(self._vocabulary)} entries, the draft's head {len(self._head)} rows"
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """See `Network`."""
        return F.embedding(tokens, self._embedding)

    def words(self, tokens: Sequence[int]) -> Words | None:
        """None: the vocabulary is the same in every context."""
        return None

    def choose(self, hidden: Tensor, words: Words | None) -> tuple[Tensor, Tensor]:
        """See `Network`."""
        logits = F.linear(hidden, self._head)
        best, row = logits.max(dim=-1)
        confidence = (best - logits.logsumexp(dim=-1)).exp()
        return (row if self._vocabulary is None else self._vocabulary[row]), confidence


def _layer(weights: Mapping[str, Tensor], prefix: str) -> Layer:
    def fused(*names: str) -> Projection:
        weight = torch.cat([weights[f"{prefix}{name}.weight"].float() for name in names]).contiguous()
        found = [weights.get(f"{prefix}{name}.bias") for name in names]
        present = [bias.float() for bias in found if bias is not None]
        bias = torch.cat(present) if len(present) == len(names) else None
        return lambda values: F.linear(values, weight, bias)

    return Layer(
        attention_norm=weights[f"{prefix}input_layernorm.weight"].float(),
        qkv=fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=fused("self_attn.o_proj"),
        mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"].float(),
        gate_up=fused("mlp.gate_proj", "mlp.up_proj"),
        down=fused("mlp.down_proj"),
    )
