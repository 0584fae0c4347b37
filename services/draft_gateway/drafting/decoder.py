"""A Llama's forward pass over ragged batches: several sessions, several lanes each, every lane on a cache of its own.

Projections run once over all rows, attention once a segment. Lanes of a session may share a prefix, whose keys and values
exist once. What drafts with it, and how caches follow sessions, is `llama`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from services.draft_gateway.drafting.network import Network
from services.draft_gateway.drafting.shape import LlamaShape, rotary

GROWTH: Final = 256
"""A cache that grows has a capacity that is a multiple of this."""


class Cache:
    """Keys and values `[layers, lanes, kv heads, capacity, head dim]`; which of them hold something is its user's."""

    def __init__(self, shape: LlamaShape, lanes: int, capacity: int) -> None:
        self._shape = shape
        size = (shape.layers, lanes, shape.kv_heads, capacity, shape.head_dim)
        self.keys = torch.empty(size)
        self.values = torch.empty(size)

    @property
    def lanes(self) -> int:
        """How many lanes it holds."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Positions a lane."""
        return self.keys.shape[3]

    def reserve(self, capacity: int, keep: int) -> None:
        """Make room for `capacity` positions; the first `keep` stay."""
        if capacity <= self.capacity:
            return
        grown = Cache(self._shape, self.lanes, math.ceil(capacity / GROWTH) * GROWTH)
        grown.copy(self, slice(None), source=0, to=0, count=keep)
        self.keys, self.values = grown.keys, grown.values

    def copy(self, other: Cache, lanes: slice, *, source: int, to: int, count: int) -> None:
        """Take over `count` positions of `other`'s `lanes` from `source` on; they become those from `to` on here."""
        here, there = slice(to, to + count), slice(source, source + count)
        self.keys[:, :, :, here] = other.keys[:, lanes, :, there]
        self.values[:, :, :, here] = other.values[:, lanes, :, there]


@dataclass(frozen=True, slots=True)
class Segment:
    """New tokens `[lanes, count]` of one session.

    They go to `start` … in `cache`, behind the first `shared` positions of `prefix`, which all lanes see. Lane i sees
    nothing of the first `padding[i]` positions of `cache`: lanes of different lengths end at the same place.
    """

    tokens: Tensor
    cache: Cache
    start: int
    prefix: Cache | None = None
    shared: int = 0
    padding: Tensor | None = None

    @property
    def end(self) -> int:
        """Where in `cache` the last new token goes, plus one."""
        return self.start + self.tokens.shape[1]

    def positions(self) -> Tensor:
        """Where each token stands in its context `[lanes, count]`."""
        places = torch.arange(self.shared + self.start, self.shared + self.end).expand(self.tokens.shape)
        return places if self.padding is None else (places - self.padding[:, None]).clamp(min=0)

    def mask(self) -> Tensor | None:
        """What to add to the scores `[lanes or 1, 1, count, end]`; None when every token sees everything."""
        if self.padding is None and self.tokens.shape[1] == 1:
            return None
        columns, rows = torch.arange(self.end), torch.arange(self.start, self.end)[:, None]
        visible = (columns <= rows)[None]
        if self.padding is not None:  # padding sees itself: a row that saw nothing would not be a number
            visible = visible & (columns >= self.padding[:, None, None]) | (columns == rows)
        return torch.zeros(visible.shape).masked_fill_(~visible, -math.inf)[:, None]


class Decoder:
    """A network's weights, run."""

    def __init__(self, shape: LlamaShape, network: Network) -> None:
        self._shape = shape
        self._network = network
        self._cos, self._sin = rotary(shape)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Normed hidden states `[all lanes, hidden]` of each lane's last token; keys and values go into the caches."""
        shape = self._shape
        sizes = [segment.tokens.numel() for segment in segments]
        masks = [segment.mask() for segment in segments]
        positions = torch.cat([segment.positions().flatten() for segment in segments])
        positions = positions.clamp(max=shape.context - 1)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        hidden = self._network.embed(torch.cat([segment.tokens.flatten() for segment in segments]))
        for number, layer in enumerate(self._network.layers):
            normed = F.rms_norm(hidden, (shape.hidden,), layer.attention_norm, shape.epsilon)
            qkv = layer.qkv(normed).view(len(hidden), -1, shape.head_dim)
            turned = _rotate(qkv[:, : -shape.kv_heads], cos, sin)
            attended = [
                self._attend(number, *parts)
                for parts in zip(
                    segments,
                    masks,
                    torch.split(turned, sizes),
                    torch.split(qkv[:, -shape.kv_heads :], sizes),
                    strict=True,
                )
            ]
            hidden = hidden + layer.output(torch.cat(attended))
            normed = F.rms_norm(hidden, (shape.hidden,), layer.mlp_norm, shape.epsilon)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        last = [
            part.view(*segment.tokens.shape, -1)[:, -1]
            for segment, part in zip(segments, torch.split(hidden, sizes), strict=True)
        ]
        return F.rms_norm(torch.cat(last), (shape.hidden,), self._network.norm, shape.epsilon)

    def _attend(
        self, layer: int, segment: Segment, mask: Tensor | None, turned: Tensor, values: Tensor
    ) -> Tensor:
        """Attention of one segment's rows, whose keys and values are stored first. `[rows, heads × head dim]`."""
        shape = self._shape
        lanes, count = segment.tokens.shape
        heads = turned.view(lanes, count, -1, shape.head_dim).transpose(1, 2)
        cache_keys, cache_values = segment.cache.keys[layer], segment.cache.values[layer]
        cache_keys[:, :, segment.start : segment.end] = heads[:, shape.heads :]
        cache_values[:, :, segment.start : segment.end] = values.view(
            lanes, count, -1, shape.head_dim
        ).transpose(1, 2)
        query = heads[:, : shape.heads] * shape.head_dim**-0.5
        query = query.reshape(lanes, shape.kv_heads, -1, shape.head_dim)  # query heads of a kv head together
        own_values = cache_values[:, :, : segment.end]
        scores = query @ cache_keys[:, :, : segment.end].transpose(-1, -2)
        if mask is not None:
            scores = (scores.view(lanes, shape.heads, count, -1) + mask).view(scores.shape)
        if segment.prefix is None or segment.shared == 0:
            mixed = scores.softmax(dim=-1) @ own_values
        else:
            keys = segment.prefix.keys[layer, 0, :, : segment.shared]
            before = _unfolded(_folded(query) @ keys.transpose(-1, -2), lanes)
            weights = torch.cat((before, scores), dim=-1).softmax(dim=-1)
            before, own = torch.split(weights, [segment.shared, segment.end], dim=-1)
            shared_values = segment.prefix.values[layer, 0, :, : segment.shared]
            mixed = _unfolded(_folded(before) @ shared_values, lanes) + own @ own_values
        mixed = mixed.reshape(lanes, shape.heads, count, shape.head_dim)
        rows: Tensor = mixed.transpose(1, 2).reshape(lanes * count, -1)
        return rows


def _folded(lanes: Tensor) -> Tensor:
    """`[lanes, kv heads, rows, …]` as `[kv heads, lanes × rows, …]`: one product with what all lanes share."""
    return lanes.transpose(0, 1).flatten(1, 2)


def _unfolded(folded: Tensor, lanes: int) -> Tensor:
    """The inverse of `_folded`."""
    kv_heads, _, width = folded.shape
    return folded.view(kv_heads, lanes, -1, width).transpose(0, 1)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
