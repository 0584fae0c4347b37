"""The draft head at work: after a pass it drafts what sessions will say next, for their floor to verify.

It reads the states of the rows that were committed, keeps a key and a value of each (a few MB a session at most), and drafts
as long as the whole draft is likely enough. Where vLLM has found the beginning of a text in its prefix cache no states of it
are computed: keys and values are then taken from a text that began alike. What it says of its own chances is close to true,
and the verifier learns what it is worth (`floor_drafts`). CPU: the head's matrices are kept in int8.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from services.verifier.engine.draft_head import MOST_DRAFTED, DraftHead, Gated, turned
from services.verifier.engine.exit_head import NamingHead
from services.verifier.engine.int8 import QuickMatrix, has_int8

Drafted = list[tuple[int, float]]
"""Tokens, each with the chance that it is right if those before it are."""
PAST_PLACES: Final = 65_536
"""Places of texts that have ended, of which keys and values are kept: some 100 MB for a hidden size of 576."""
MOST_SESSIONS: Final = 8
"""More in a pass are not drafted for. Rows are what such a pass is made of: a draft has to be as good as certain to be worth
one, and the head takes longer than what is left of its use (a row takes a fifteenth of a pass of one on a CPU; with sixteen
sessions the head a seventh of theirs)."""
LEAST_CHANCE: Final = 0.08
"""A draft that is likelier to fail than this is not gone on with: no row that it could have would be worth it."""


class CommittedRows(NamedTuple):
    """Rows of a pass that came to stay: `start` and one for each of `tokens`, those that follow them, among the rows whose
    states were kept; the first stands at `place` of the request's `text`, of which as much is there. `speaks`: the last of
    these tokens is one that was said, and others may be drafted to follow it."""

    request: str
    start: int
    place: int
    tokens: Sequence[int]
    text: Sequence[int] | npt.NDArray[np.int32]
    speaks: bool = True


class QuickHead:
    """`DraftHead`'s arithmetic in few calls: on a CPU each call costs about as much as the arithmetic in it.

    Matrices are kept in int8 where there are kernels for it. Vectors of the hidden size are normed without the little that
    RMSNorm adds to their squares, which is nothing beside them.
    """

    def __init__(self, head: DraftHead, longest: int) -> None:
        """No text is longer than `longest`."""
        self.shape = head.shape
        self._scale = head.shape.hidden_size**0.5
        self._enter = _matrix(head.enter.weight)
        self._enter_further = _matrix(head.enter_further.weight)
        self._first, self._further = _Gated(head.first), _Gated(head.further)
        if head.shape.window:
            self._attention = _matrix(torch.cat((head.query.weight, head.key_value.weight)))
            self._out = _matrix(head.out.weight, alone=True)
            ones = torch.ones(longest, 1, head.shape.head_dim)
            half = head.shape.head_dim // 2
            ones[..., half:] = 0.0  # turned, a one in the first half shows its cosine and sine
            both = turned(ones, torch.arange(longest), head.shape.rope_theta)
            self._cos, self._sin = both[..., :half].repeat(1, 1, 2), both[..., half:].repeat(1, 1, 2)
            self._sin[..., :half] *= -1.0

    def normed(self, vectors: Tensor) -> Tensor:
        """`[…, hidden]` to a mean square of one."""
        sizes: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        found: Tensor = vectors * (self._scale / sizes)
        return found

    def entered(self, states: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """See `DraftHead.entered`."""
        inputs = self.normed(torch.stack((*states, tokens), dim=1)).flatten(1)
        return states[-1] + self._enter(inputs)

    def attention_inputs(self, entered: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[rows, heads, head_dim]`, keys and values `[rows, key-value heads, head_dim]` of rows at `places`."""
        shape = self.shape
        groups = (shape.heads, shape.key_value_heads, shape.key_value_heads)
        found = self._attention(self.normed(entered)).view(len(entered), sum(groups), shape.head_dim)
        both, values = found[:, : -groups[2]], found[:, -groups[2] :]
        swapped = both.roll(shape.head_dim // 2, dims=-1)
        placed = (both * self._cos[places] + swapped * self._sin[places]).to(values.dtype)
        return placed[:, : groups[0]], placed[:, groups[0] :], values

    def begin(self, entered: Tensor, attended: Tensor | None) -> Tensor:
        """See `DraftHead.begin`."""
        return self._first(self, entered if attended is None else entered + self._out(attended))

    def go_on(self, guess: Tensor, token: Tensor) -> Tensor:
        """See `DraftHead.go_on`."""
        inputs = self.normed(torch.stack((guess, token), dim=1)).flatten(1)
        return self._further(self, guess + self._enter_further(inputs))


class _Gated:
    def __init__(self, gated: Gated) -> None:
        self._gate_up = _matrix(gated.gate_up.weight)
        self._down = _matrix(gated.down.weight, alone=True)

    def __call__(self, head: QuickHead, state: Tensor) -> Tensor:
        gate, up = self._gate_up(head.normed(state)).chunk(2, dim=-1)
        return state + self._down(functional.silu(gate).mul_(up))


def _matrix(weight: Tensor, *, alone: bool = False) -> Callable[[Tensor], Tensor]:
    """A product with a matrix, in int8 where that goes; `alone` as for `QuickMatrix`."""
    weight = weight.detach()
    if has_int8(weight):
        return QuickMatrix(weight, alone=alone)
    return lambda values: functional.linear(values, weight)


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
    """Keys and values `[key-value heads, room, head_dim]` of one text's places from `first` to `end`, and its tokens."""

    keys: Tensor
    values: Tensor
    text: list[int]
    first: int = 0
    end: int = 0

    def cut(self) -> _Memory:
        """Without room for more."""
        keys, values = (each[:, : self.end].clone() for each in (self.keys, self.values))
        return _Memory(keys, values, self.text, self.first, self.end)

    def began_like(self, text: Sequence[int], places: int) -> bool:
        """Whether it has keys and values for the last of so many places of a text."""
        return self.first < places <= self.end and self.text[:places] == text[:places]


class FloorHead:
    """A head and what it remembers of the sessions it drafts for."""

    def __init__(
        self,
        head: DraftHead,
        norm: Callable[[Tensor], Tensor],
        naming: NamingHead,
        embedding: Tensor,
        *,
        longest: int,
    ) -> None:
        """`norm` is the model's last one, `naming` finds the likeliest tokens of what comes out of it, `embedding`
        [vocabulary, hidden size] is the model's; no text is longer than `longest`."""
        self.tap = HeadTap(head.shape.layers)
        self._head = QuickHead(head, longest)
        self._norm, self._naming, self._embedding = norm, naming, embedding
        self._longest = longest
        self._memories: dict[str, _Memory] = {}
        self._past: deque[_Memory] = deque()
        """Of texts that have ended, the last ones at the end."""

    @property
    def window(self) -> int:
        """Rows before the last one that are of any use."""
        return max(1, self._head.shape.window)

    @staticmethod
    def serves(sessions: int) -> bool:
        """Whether a pass with so many is drafted for."""
        return 0 < sessions <= MOST_SESSIONS

    def forget(self, requests: Iterable[str]) -> None:
        """These have ended; what is remembered of them serves texts that begin alike, as long as there is room."""
        for request in requests:
            memory = self._memories.pop(request, None)
            if memory is not None:
                self._past.append(memory.cut())
        while sum(memory.end for memory in self._past) > PAST_PLACES:
            self._past.popleft()

    @torch.inference_mode()
    def drafts(self, committed: Sequence[CommittedRows]) -> dict[str, Drafted]:
        """What follows the last row of each request, after a pass whose states the tap holds."""
        states, self.tap.states = self.tap.states, {}
        if not self.serves(len(committed)) or len(states) < len(self.tap.layers):
            return {}
        head = self._head
        rows = torch.cat([torch.arange(each.start, each.start + len(each.tokens)) for each in committed])
        places = torch.cat([torch.arange(each.place, each.place + len(each.tokens)) for each in committed])
        tokens = torch.tensor([token for each in committed for token in each.tokens])
        entered = head.entered([states[layer][rows] for layer in head.shape.layers], self._embedding[tokens])
        ends = torch.tensor([len(each.tokens) for each in committed]).cumsum(0) - 1
        speaking = [each for each in committed if each.speaks]
        last = ends[torch.tensor([each.speaks for each in committed])]
        attended = None
        if head.shape.window:
            queries, keys, values = head.attention_inputs(entered, places)
            begin = 0
            for each in committed:
                end = begin + len(each.tokens)
                self._remember(each, keys[begin:end], values[begin:end])
                begin = end
            attended = self._attended(speaking, queries[last])
        return self._chains(speaking, head.begin(entered[last], attended)) if speaking else {}

    def _attended(self, speaking: Sequence[CommittedRows], queries: Tensor) -> Tensor:
        """The values that each request's last row attends to, mixed: `[requests, hidden size]`."""
        shape = self._head.shape
        mixed = queries.new_empty(len(speaking), shape.hidden_size)
        for at, each in enumerate(speaking):
            memory = self._memories[each.request]
            seen = slice(max(memory.first, memory.end - shape.window), memory.end)
            grouped = queries[at].view(shape.key_value_heads, -1, shape.head_dim)
            scores = grouped @ memory.keys[:, seen].transpose(1, 2) * shape.head_dim**-0.5
            mixed[at] = (scores.softmax(dim=-1) @ memory.values[:, seen]).view(-1)
        return mixed

    def _remember(self, rows: CommittedRows, keys: Tensor, values: Tensor) -> None:
        """Put a request's rows behind those that came before; what lies before a gap is forgotten."""
        place, end = rows.place, rows.place + len(rows.tokens)
        memory = self._memories.get(rows.request)
        goes_on = memory is not None and memory.first <= place <= memory.end
        if memory is None or not goes_on or memory.keys.shape[1] < end:
            text = [int(token) for token in rows.text[: place + 1]]
            before = memory if goes_on else self._alike(text, place)
            room = min(self._longest, max(256, 2 * end))
            shape = (keys.shape[1], max(room, end), keys.shape[2])
            memory = _Memory(keys.new_zeros(shape), values.new_zeros(shape), text, place, place)
            if before is not None:
                memory.keys[:, :place] = before.keys[:, :place]
                memory.values[:, :place] = before.values[:, :place]
                memory.first = before.first
            self._memories[rows.request] = memory
        memory.keys[:, place:end] = keys.transpose(0, 1)
        memory.values[:, place:end] = values.transpose(0, 1)
        memory.text[place + 1 :] = rows.tokens
        memory.end = end

    def _alike(self, text: list[int], places: int) -> _Memory | None:
        """What is remembered of a text that began with the same `places` tokens, most of it first."""
        candidates = (*reversed(self._past), *self._memories.values())
        alike = (memory for memory in candidates if memory.began_like(text, places))
        return min(alike, key=lambda memory: memory.first, default=None)

    def _chains(self, committed: Sequence[CommittedRows], guess: Tensor) -> dict[str, Drafted]:
        """The head's drafts from its first guesses `[requests, hidden size]`."""
        found: list[Drafted] = [[] for _ in committed]
        alive, chances = list(range(len(committed))), [1.0] * len(committed)
        for place in range(MOST_DRAFTED):
            token, sure = self._naming.likeliest(self._norm(guess))
            tokens, shares = token.tolist(), sure.tolist()
            kept = []
            for at, (request, each, share) in enumerate(zip(alive, tokens, shares, strict=True)):
                chances[request] *= share
                if chances[request] >= LEAST_CHANCE:
                    found[request].append((each, share))
                    kept.append(at)
            if place + 1 == MOST_DRAFTED or not kept:
                break
            if len(kept) < len(alive):
                alive, guess, token = [alive[at] for at in kept], guess[kept], token[kept]
            guess = self._head.go_on(guess, self._embedding[token])
        return {each.request: drafted for each, drafted in zip(committed, found, strict=True) if drafted}
