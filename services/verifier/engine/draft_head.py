"""The draft head: what the target itself would say next, read off its own states, for the floor to verify.

A pass ends with states of several depths at the rows that were committed, and a token. From these the head guesses the
tokens that follow, one after the other: the first by one layer of attention over the last places, each further one from
the guess before and the token that it led to. That is a draft in a few million weights: heads that depend on one another
as in Hydra (Ankner et al. 2024), features of several layers as in EAGLE-3 (Li et al. 2025). `training` trains this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_DRAFTED: Final = 4
"""Tokens that a head is trained to draft."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of a head. `layers` (from 1) are those after which it reads the residual stream, the last one the target's
    last; `window` places are attended to, 0 for none but the one."""

    hidden_size: int
    layers: tuple[int, ...]
    window: int
    heads: int
    key_value_heads: int
    width: int
    further_width: int
    rope_theta: float
    eps: float

    @property
    def head_dim(self) -> int:
        """Of one attention head."""
        return self.hidden_size // self.heads


def normed(state: Tensor, eps: float) -> Tensor:
    """RMSNorm without weights: those are in the matrices that follow."""
    return F.rms_norm(state, (state.shape[-1],), eps=eps)


def turned(vectors: Tensor, places: Tensor, theta: float) -> Tensor:
    """`[rows, heads, head_dim]` by rotary embedding at `places` [rows]."""
    half = vectors.shape[-1] // 2
    steps = torch.arange(half, device=vectors.device, dtype=torch.float32) / half
    angles = places.float()[:, None, None] * theta**-steps
    cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    left, right = vectors[..., :half], vectors[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Gated(nn.Module):
    """s + down(silu(gate(n)) · up(n)) with n = norm(s)."""

    def __init__(self, hidden_size: int, width: int, eps: float) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)
        self.eps = eps
        nn.init.zeros_(self.down.weight)

    def forward(self, state: Tensor) -> Tensor:
        """`[rows, hidden]` to the same."""
        gate, up = self.gate_up(normed(state, self.eps)).chunk(2, dim=-1)
        said: Tensor = state + self.down(F.silu(gate) * up)
        return said


class DraftHead(nn.Module):
    """Drafts after the target's own rows. States and tokens come as vectors of the hidden size."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        hidden, pairs = shape.hidden_size, shape.key_value_heads * shape.head_dim
        self.enter = nn.Linear((len(shape.layers) + 1) * hidden, hidden, bias=False)
        if shape.window:
            self.query = nn.Linear(hidden, hidden, bias=False)
            self.key_value = nn.Linear(hidden, 2 * pairs, bias=False)
            self.out = nn.Linear(hidden, hidden, bias=False)
            nn.init.zeros_(self.out.weight)
        self.first = Gated(hidden, shape.width, shape.eps)
        self.enter_further = nn.Linear(2 * hidden, hidden, bias=False)
        self.further = Gated(hidden, shape.further_width, shape.eps)
        nn.init.zeros_(self.enter.weight)
        nn.init.zeros_(self.enter_further.weight)

    def entered(self, states: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """`[rows, hidden]`: what the head knows of rows whose `states` (one of each layer, `[rows, hidden]`) are given and
        which `tokens` followed (their embeddings)."""
        eps = self.shape.eps
        inputs = torch.cat([normed(each, eps) for each in (*states, tokens)], dim=-1)
        entered: Tensor = states[-1] + self.enter(inputs)
        return entered

    def keys_values(self, entered: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[rows, key-value heads, head_dim]` of rows at `places` of the text."""
        shape = self.shape
        both = self.key_value(normed(entered, shape.eps))
        keys, values = both.view(len(entered), 2, shape.key_value_heads, shape.head_dim).unbind(1)
        return turned(keys, places, shape.rope_theta), values

    def queries(self, entered: Tensor, places: Tensor) -> Tensor:
        """`[rows, heads, head_dim]`."""
        query = self.query(normed(entered, self.shape.eps)).view(len(entered), -1, self.shape.head_dim)
        return turned(query, places, self.shape.rope_theta)

    def begin(self, entered: Tensor, attended: Tensor | None) -> Tensor:
        """A guess of the last residual stream one place further `[rows, hidden]`; `attended` are the values mixed."""
        state = entered if attended is None else entered + self.out(attended.reshape(entered.shape))
        guess: Tensor = self.first(state)
        return guess

    def go_on(self, guess: Tensor, token: Tensor) -> Tensor:
        """The guess at the next place, where `token` stands."""
        eps = self.shape.eps
        inputs = torch.cat((normed(guess, eps), normed(token, eps)), dim=-1)
        further: Tensor = self.further(guess + self.enter_further(inputs))
        return further
