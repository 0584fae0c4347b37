"""What a small Llama is made of, whatever its weights are stored as: projections, embedding, choice of the next token.

`LlamaDraft` runs it: attention, caches and lanes are there. Here are weights in float32; those in few bits are in
`distilled`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import ModelFilesError
from shared.sampling import logits as sampling
from shared.sampling.logits import Vocabulary
from shared.sampling.ratio import Drawn, Truncation, draft_token
from shared.sampling.rules import Row

Projection = Callable[[Tensor], Tensor]

CHOICES: Final = 8
"""How many of the likeliest tokens of a position are told."""


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


@dataclass(frozen=True, slots=True)
class Choices:
    """The likeliest tokens `[rows, n]`, best first, and their probabilities. In ratio mode the token that was drawn comes
    first, whatever its probability, with that of the likeliest one, and `sparse` says what it was drawn from (None for
    rows where none was)."""

    tokens: Tensor
    probabilities: Tensor
    sparse: tuple[Drawn | None, ...] = ()

    @classmethod
    def of(cls, logits: Tensor, ids: Tensor | None) -> Choices:
        """From logits `[rows, columns]`; `ids` are the columns' tokens, None where a column is its token."""
        best, columns = logits.topk(min(CHOICES, logits.shape[-1]), dim=-1)
        probabilities = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
        return cls(columns if ids is None else ids[columns], probabilities)

    @classmethod
    def drawn(
        cls,
        logits: Tensor,
        vocabulary: Vocabulary | None,
        draws: Sequence[Row | None],
        truncations: Sequence[Truncation | None] = (),
    ) -> Choices:
        """The same where some rows' tokens are drawn: likelihood is that of perturbed logits, the draw comes first.

        In ratio mode the noise is the residual's: what the target is likely to say where the drafted token is rejected, or
        none was drafted. The token itself is drawn from what the row's truncation keeps, with noise of its own.
        """
        ids = None if vocabulary is None else torch.from_numpy(vocabulary.ids)
        choices = cls.of(logits, ids)
        numbers = [number for number, row in enumerate(draws) if row is not None]
        rows = [row for row in draws if row is not None]
        count = choices.tokens.shape[1]
        found = sampling.best(logits[numbers].float().numpy(), rows, count, vocabulary)
        tokens = found.columns if vocabulary is None else vocabulary.ids[found.columns]
        choices.tokens[numbers] = torch.from_numpy(tokens)
        sure = np.minimum(np.exp(found.values - found.total[:, None]), 1.0)
        choices.probabilities[numbers] = torch.from_numpy(sure).to(choices.probabilities)
        if not any(truncations):
            return choices
        sparse = tuple(
            None if row is None or kept is None else draft_token(values, row, vocabulary, kept)
            for values, row, kept in zip(logits.float().numpy(), draws, truncations, strict=True)
        )
        for number, drawn in enumerate(sparse):
            if drawn is not None:
                choices._put_first(number, drawn)
        return cls(choices.tokens, choices.probabilities, sparse)

    def _put_first(self, number: int, drawn: Drawn) -> None:
        """Make a token the first of its row; the others are what might stand in its place."""
        pairs = zip(self.tokens[number].tolist(), self.probabilities[number].tolist(), strict=True)
        others = [(token, share) for token, share in pairs if token != drawn.token]
        ranked = [(drawn.token, drawn.sure), *others][: self.tokens.shape[1]]
        self.tokens[number] = torch.tensor([token for token, _ in ranked])
        self.probabilities[number] = torch.tensor([share for _, share in ranked])

    def split(self, sizes: Sequence[int]) -> list[Choices]:
        """Those of so many rows each."""
        sections = list(sizes)
        parts = zip(
            torch.split(self.tokens, sections), torch.split(self.probabilities, sections), strict=True
        )
        sparse = iter(self.sparse or [None] * len(self.tokens))
        return [
            Choices(tokens, probabilities, tuple(itertools.islice(sparse, size)))
            for (tokens, probabilities), size in zip(parts, sections, strict=True)
        ]


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

    def choose(
        self,
        hidden: Tensor,
        words: Words | None,
        draws: Sequence[Row | None] = (),
        truncations: Sequence[Truncation | None] = (),
    ) -> Choices:
        """The `CHOICES` likeliest tokens after each row of normed hidden states `[rows, hidden]`.

        `draws` say of each row how its token is drawn, None for greedy decoding; it is empty where all decode greedily.
        `truncations` say of each what ratio mode keeps to draw from, None for rows without such a draw.
        """
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
        self._columns = None if self._vocabulary is None else Vocabulary(self._vocabulary.numpy())
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

    def choose(
        self,
        hidden: Tensor,
        words: Words | None,
        draws: Sequence[Row | None] = (),
        truncations: Sequence[Truncation | None] = (),
    ) -> Choices:
        """See `Network`."""
        logits = F.linear(hidden, self._head)
        if draws:
            return Choices.drawn(logits, self._columns, draws, truncations)
        return Choices.of(logits, self._vocabulary)


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
