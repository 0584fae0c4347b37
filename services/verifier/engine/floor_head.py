"""The draft head at work: after a pass it drafts what sessions will say next, for their floor to verify.

It reads the states of the rows that were committed, keeps a key and a value of each (as many as it attends to, a few MB a
session at most), and drafts as long as the whole draft is likely enough. What it says of its own chances is close to true,
and the verifier learns what it is worth (`floor_drafts`). CPU: the head's matrices are kept in int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from services.verifier.engine.draft_head import MOST_DRAFTED, DraftHead
from services.verifier.engine.exit_head import ExitHead
from services.verifier.engine.int8 import Int8Matrix, has_int8

Drafted = list[tuple[int, float]]
"""Tokens, each with the chance that it is right if those before it are."""
LEAST_CHANCE: Final = 0.08
"""A draft that is likelier to fail than this is not gone on with: no row that it could have would be worth it."""


class CommittedRows(NamedTuple):
    """Rows of a pass that came to stay: `start` and one for each of `tokens`, those that follow them, among the rows whose
    states were kept; the first stands at `place` of the request's text. `speaks`: the last of these tokens is one that was
    said, and others may be drafted to follow it."""

    request: str
    start: int
    place: int
    tokens: Sequence[int]
    speaks: bool = True


class _Int8Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._matrix = Int8Matrix(weight, alone=True)

    def forward(self, values: Tensor) -> Tensor:
        return self._matrix(values)


def quickened(head: DraftHead) -> DraftHead:
    """The head with its matrices in the form that is quickest where they are."""
    for module in list(head.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and has_int8(child.weight):
                setattr(module, name, _Int8Linear(child.weight.detach()))
    return head


class HeadTap:
    """Where a model's layers leave the states that a head reads. The runner says which rows, for the time of a pass."""

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)
        self.rows: Tensor | None = None
        self.states: dict[int, Tensor] = {}

    def layer_done(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Keep the residual stream of the wanted rows."""
        if self.rows is not None and layer in self.layers and residual is not None:
            self.states[layer] = hidden[self.rows] + residual[self.rows]


@dataclass(slots=True)
class _Memory:
    """Keys and values `[key-value heads, room, head_dim]` of one text's places from `first` to `end`."""

    keys: Tensor
    values: Tensor
    first: int = 0
    end: int = 0


class FloorHead:
    """A head and what it remembers of the sessions it drafts for."""

    def __init__(
        self,
        head: DraftHead,
        norm: Callable[[Tensor], Tensor],
        naming: ExitHead,
        embedding: Tensor,
        *,
        longest: int,
    ) -> None:
        """`norm` is the model's last one, `naming` finds the likeliest tokens of what comes out of it, `embedding`
        [vocabulary, hidden size] is the model's; no text is longer than `longest`."""
        self.tap = HeadTap(head.shape.layers)
        self._head = quickened(head)
        self._norm, self._naming, self._embedding = norm, naming, embedding
        self._longest = longest
        self._memories: dict[str, _Memory] = {}

    @property
    def window(self) -> int:
        """Rows before the last one that are of any use."""
        return max(1, self._head.shape.window)

    def forget(self, requests: Iterable[str]) -> None:
        """These have ended."""
        for request in requests:
            self._memories.pop(request, None)

    @torch.inference_mode()
    def drafts(self, committed: Sequence[CommittedRows]) -> dict[str, Drafted]:
        """What follows the last row of each request, after a pass whose states the tap holds."""
        states, self.tap.states = self.tap.states, {}
        if not committed or len(states) < len(self.tap.layers):
            return {}
        head = self._head
        rows = torch.cat([torch.arange(each.start, each.start + len(each.tokens)) for each in committed])
        places = torch.cat([torch.arange(each.place, each.place + len(each.tokens)) for each in committed])
        tokens = torch.tensor([token for each in committed for token in each.tokens])
        entered = head.entered([states[layer][rows] for layer in head.shape.layers], self._embedding[tokens])
        if head.shape.window:
            self._remember_all(committed, *head.keys_values(entered, places))
        ends = torch.tensor([len(each.tokens) for each in committed]).cumsum(0) - 1
        speaking = [each for each in committed if each.speaks]
        if not speaking:
            return {}
        last = ends[torch.tensor([each.speaks for each in committed])]
        attended = (
            self._attended(speaking, head.queries(entered[last], places[last])) if head.shape.window else None
        )
        return self._chains(speaking, head.begin(entered[last], attended))

    def _remember_all(self, committed: Sequence[CommittedRows], keys: Tensor, values: Tensor) -> None:
        begin = 0
        for each in committed:
            end = begin + len(each.tokens)
            self._remember(each, keys[begin:end], values[begin:end])
            begin = end

    def _attended(self, speaking: Sequence[CommittedRows], queries: Tensor) -> Tensor:
        """The values that each request's last row attends to, mixed: `[requests, hidden size]`."""
        shape, mixed = self._head.shape, []
        for each, query in zip(speaking, queries, strict=True):
            memory = self._memories[each.request]
            seen = slice(max(memory.first, memory.end - shape.window), memory.end)
            grouped = query.view(shape.key_value_heads, -1, shape.head_dim)
            scores = grouped @ memory.keys[:, seen].transpose(1, 2) * shape.head_dim**-0.5
            mixed.append((scores.softmax(dim=-1) @ memory.values[:, seen]).reshape(-1))
        return torch.stack(mixed)

    def _remember(self, rows: CommittedRows, keys: Tensor, values: Tensor) -> None:
        """Put a request's rows behind those that came before; what lies before a gap is forgotten."""
        end = rows.place + len(rows.tokens)
        memory = self._memories.get(rows.request)
        if memory is None or memory.keys.shape[1] < end:
            room = min(self._longest, max(256, 2 * end))
            shape = (keys.shape[1], max(room, end), keys.shape[2])
            larger = _Memory(keys.new_zeros(shape), values.new_zeros(shape))
            if memory is not None:
                larger.keys[:, : memory.end] = memory.keys[:, : memory.end]
                larger.values[:, : memory.end] = memory.values[:, : memory.end]
                larger.first, larger.end = memory.first, memory.end
            memory = self._memories[rows.request] = larger
        if not memory.first <= rows.place <= memory.end:
            memory.first = rows.place
        memory.keys[:, rows.place : end] = keys.transpose(0, 1)
        memory.values[:, rows.place : end] = values.transpose(0, 1)
        memory.end = end

    def _chains(self, committed: Sequence[CommittedRows], guess: Tensor) -> dict[str, Drafted]:
        """The head's drafts from its first guesses `[requests, hidden size]`."""
        found: list[Drafted] = [[] for _ in committed]
        alive, chance = torch.arange(len(committed)), torch.ones(len(committed))
        for place in range(MOST_DRAFTED):
            scores = self._naming(self._norm(guess), torch.zeros(len(guess), dtype=torch.long), 1)
            token, sure = scores.tokens[:, 0], scores.log_probs[:, 0].exp()
            chance = chance * sure
            kept = chance >= LEAST_CHANCE
            for at, each, share in zip(
                alive[kept].tolist(), token[kept].tolist(), sure[kept].tolist(), strict=True
            ):
                found[at].append((each, share))
            if place + 1 == MOST_DRAFTED or not bool(kept.any()):
                break
            alive, chance = alive[kept], chance[kept]
            guess = self._head.go_on(guess[kept], self._embedding[token[kept]])
        return {each.request: drafted for each, drafted in zip(committed, found, strict=True) if drafted}
