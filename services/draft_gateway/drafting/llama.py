"""A small Llama-family model as draft engine: plain torch, a KV cache a session, lanes batched over their shared prefix.

Any Hugging Face directory of the family will do that has the target's tokenizer. A tensor `draft_vocab` in the checkpoint
reduces the output vocabulary: its head has as many rows, and row i stands for the target's token `draft_vocab[i]`.

A session's cache follows its context: what both have in common is kept, the rest is rolled back by forgetting it. One lane
alone drafts straight into that cache, so that an accepted draft need not be computed again. Several lanes attend to the
cache up to where their contexts part, which is computed once, and to a small cache of their own behind it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from services.draft_gateway.drafting.engine import (
    EMPTY,
    Draft,
    DraftRequest,
    Dropped,
    common_prefix,
    none_dropped,
)
from shared.errors import ModelFilesError
from shared.models import read_config, tokenizer_sha256, verify, weight_files
from shared.protocol import Tokens

PREFILL_CHUNK: Final = 256
GROWTH: Final = 256  # a cache's capacity is a multiple of this


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a Llama, and its rotary embedding."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlamaShape:
        """The shape in a config.json; `ModelFilesError` when it is not one of this family."""
        if config.get("model_type") not in ("llama", "mistral"):
            raise ModelFilesError(
                f"a draft model has to be of the Llama family, not {config.get('model_type')!r}"
            )
        rope: Mapping[str, Any] = config.get("rope_parameters") or {}
        scaling: Mapping[str, Any] = config.get("rope_scaling") or rope
        if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "llama3"):
            raise ModelFilesError(f"rotary scaling {scaling} is not known here; 'llama3' is")
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            context=config.get("max_position_embeddings", 2048),
            epsilon=config.get("rms_norm_eps", 1e-5),
            rope_theta=config.get("rope_theta") or rope.get("rope_theta") or 10_000.0,
            rope_scaling=scaling,
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class _Cache:
    """Keys and values `[layers, lanes, kv heads, capacity, head dim]` of `length` valid positions."""

    def __init__(self, shape: LlamaShape, lanes: int, capacity: int) -> None:
        self._shape = shape
        size = (shape.layers, lanes, shape.kv_heads, capacity, shape.head_dim)
        self.keys = torch.empty(size)
        self.values = torch.empty(size)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def reserve(self, capacity: int, keep: int) -> None:
        """Make room for `capacity` positions; the first `keep` stay."""
        if capacity <= self.capacity:
            return
        grown = _Cache(self._shape, self.keys.shape[1], math.ceil(capacity / GROWTH) * GROWTH)
        grown.keys[:, :, :, :keep] = self.keys[:, :, :, :keep]
        grown.values[:, :, :, :keep] = self.values[:, :, :, :keep]
        self.keys, self.values = grown.keys, grown.values


@dataclass(slots=True)
class _Session:
    cache: _Cache
    tokens: Tokens = ()  # what the cache's positions hold


class LlamaDraft:
    """A draft engine around a small Llama. Not thread-safe; `Drafter` gives it a thread."""

    immediate: Final = False

    def __init__(
        self, name: str, shape: LlamaShape, weights: Mapping[str, Tensor], *, cache_tokens: int = 65536
    ) -> None:
        """`weights` are named as Hugging Face names them; `ModelFilesError` when one is missing."""
        self.name: Final = name
        self._shape = shape
        self._cache_tokens = cache_tokens
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        try:
            self._embedding = weights["model.embed_tokens.weight"].float()
            self._layers = [_layer(weights, f"model.layers.{i}.") for i in range(shape.layers)]
            self._norm = weights["model.norm.weight"].float()
            self._head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()
        except KeyError as error:
            raise ModelFilesError(f"the draft model lacks the weight {error}") from None
        vocabulary = weights.get("draft_vocab")
        self._vocabulary = None if vocabulary is None else vocabulary.long()
        if self._vocabulary is not None and len(self._vocabulary) != len(self._head):
            raise ModelFilesError(
                f"draft_vocab has {len(self._vocabulary)} entries, the draft's head {len(self._head)} rows"
            )
        self._cos, self._sin = _rotary(shape)

    @classmethod
    def load(cls, directory: Path, *, target: Path, threads: int, cache_tokens: int) -> LlamaDraft:
        """Read a checkpoint; `ModelFilesError` when it is missing, damaged or has another tokenizer than `target`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        verify(directory)
        shape = LlamaShape.of(read_config(directory))
        if tokenizer_sha256(directory) != tokenizer_sha256(target):
            raise ModelFilesError(
                f"{directory.name} has another tokenizer than the target {target.name}: their token ids differ"
            )
        weights: dict[str, Tensor] = {}
        for path in weight_files(directory):
            try:
                weights |= load_file(path)
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelFilesError(f"{path} can't be read: {error}") from None
        torch.set_num_threads(threads)
        return cls(directory.name, shape, weights, cache_tokens=cache_tokens)

    # --- drafting -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def draft(self, requests: Sequence[DraftRequest], dropped: Dropped = none_dropped) -> list[Draft]:
        """Greedy drafts; the lanes of a session as one batch."""
        drafts: list[Draft] = [EMPTY] * len(requests)
        by_session: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            if request.context and request.length > 0 and not dropped(request):
                by_session.setdefault(request.session, []).append(index)
        for session, indexes in by_session.items():
            lanes = [requests[index] for index in indexes]
            found = (
                self._draft_one(lanes[0], dropped) if len(lanes) == 1 else self._draft_lanes(lanes, dropped)
            )
            for index, draft in zip(indexes, found, strict=True):
                drafts[index] = draft
            self._evict(session)
        return drafts

    def forget(self, session: str) -> None:
        """Drop the session's cache."""
        self._sessions.pop(session, None)

    def _draft_one(self, request: DraftRequest, dropped: Dropped) -> list[Draft]:
        """One lane: its tokens go straight into the session's cache."""
        context = request.context[: self._shape.context]
        length = min(request.length, self._shape.context - len(context))
        session = self._follow(request.session, context, len(context) - 1, room=length + 1)
        cache, tokens, confidences = session.cache, list(context), list[float]()
        for _ in range(length):
            position = len(tokens) - 1
            index = torch.tensor([[position]])
            hidden = self._forward(torch.tensor([tokens[-1:]]), index, cache, start=position)
            token, confidence = self._choose(hidden[:, -1])
            tokens.append(int(token[0]))
            confidences.append(float(confidence[0]))
            if dropped(request):
                break
        session.tokens = tuple(tokens[:-1])
        return [Draft(tuple(tokens[len(context) :]), tuple(confidences))]

    def _draft_lanes(self, requests: Sequence[DraftRequest], dropped: Dropped) -> list[Draft]:
        """Several lanes: the shared prefix from the session's cache, what follows from one of the lanes' own."""
        contexts = [request.context[: self._shape.context] for request in requests]
        shared = min(common_prefix(contexts[0], context) for context in contexts)
        shared = min(shared, *(len(context) - 1 for context in contexts))
        session = self._follow(requests[0].session, contexts[0][:shared], shared, room=0)
        suffixes = [context[shared:] for context in contexts]
        lengths = [
            min(request.length, self._shape.context - len(context))
            for request, context in zip(requests, contexts, strict=True)
        ]
        longest = max(map(len, suffixes))
        own = _Cache(self._shape, len(requests), longest + max(lengths))
        padded = torch.tensor([[*suffix, *[0] * (longest - len(suffix))] for suffix in suffixes])
        index = torch.arange(longest).expand(len(suffixes), -1)
        hidden = self._forward(padded, index, own, start=0, prefix=session.cache, shared=shared)
        ends = torch.tensor([len(suffix) - 1 for suffix in suffixes])
        last = hidden[torch.arange(len(suffixes)), ends]
        tokens: list[list[int]] = [[] for _ in requests]
        confidences: list[list[float]] = [[] for _ in requests]
        for step in range(max(lengths)):
            chosen, sure = self._choose(last)
            for lane, (token, confidence) in enumerate(zip(chosen.tolist(), sure.tolist(), strict=True)):
                if step < lengths[lane]:
                    tokens[lane].append(token)
                    confidences[lane].append(confidence)
            wanted = [
                step + 1 < lengths[lane] and not dropped(request) for lane, request in enumerate(requests)
            ]
            if not any(wanted):
                break
            index = (ends + 1 + step).clamp(max=own.capacity - 1)[:, None]
            last = self._forward(
                chosen[:, None], index, own, start=None, prefix=session.cache, shared=shared
            )[:, -1]
        return [Draft(tuple(t), tuple(c)) for t, c in zip(tokens, confidences, strict=True)]

    def _choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row and its probability."""
        logits = F.linear(hidden, self._head)
        best, row = logits.max(dim=-1)
        confidence = (best - logits.logsumexp(dim=-1)).exp()
        return (row if self._vocabulary is None else self._vocabulary[row]), confidence

    # --- caches ---------------------------------------------------------------------------------------

    def _follow(self, name: str, context: Tokens, upto: int, *, room: int) -> _Session:
        """The session's cache, holding the first `upto` tokens of `context`, with room for more."""
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = _Session(_Cache(self._shape, 1, GROWTH))
        self._sessions.move_to_end(name)
        known = common_prefix(session.tokens, context[:upto])
        session.cache.reserve(upto + room, known)
        for start in range(known, upto, PREFILL_CHUNK):
            chunk = context[start : min(start + PREFILL_CHUNK, upto)]
            index = torch.arange(start, start + len(chunk))[None]
            self._forward(torch.tensor([chunk]), index, session.cache, start=start)
        session.tokens = context[:upto]
        return session

    def _evict(self, keep: str) -> None:
        """Drop the caches that were used longest ago while all together hold too much."""
        total = sum(session.cache.capacity for session in self._sessions.values())
        while total > self._cache_tokens and len(self._sessions) > 1:
            oldest = next(iter(self._sessions))
            if oldest == keep:
                break
            total -= self._sessions.pop(oldest).cache.capacity

    # --- the model ------------------------------------------------------------------------------------

    def _forward(
        self,
        tokens: Tensor,
        index: Tensor,
        cache: _Cache,
        *,
        start: int | None,
        prefix: _Cache | None = None,
        shared: int = 0,
    ) -> Tensor:
        """Normed hidden states `[lanes, tokens, hidden]`; keys and values go into `cache` at `index`.

        A row sees its own cache up to its index, and all of the first `shared` positions of `prefix`. `start` is the
        first index where all rows have the same consecutive ones; else None.
        """
        shape = self._shape
        lanes, count = tokens.shape
        positions = (index + shared).clamp(max=shape.context - 1)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        upto = int(index.max()) + 1
        visible = torch.arange(upto) <= index[:, :, None]  # [lanes, tokens, upto]
        mask = torch.zeros(visible.shape).masked_fill_(~visible, -math.inf)[:, None]
        hidden = F.embedding(tokens, self._embedding)
        for number, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, (shape.hidden,), layer.attention_norm, shape.epsilon)
            qkv = (
                F.linear(normed, layer.qkv, layer.qkv_bias)
                .view(lanes, count, -1, shape.head_dim)
                .transpose(1, 2)
            )
            query, key = qkv[:, : shape.heads], qkv[:, shape.heads : -shape.kv_heads]
            value = qkv[:, -shape.kv_heads :]
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            keys, values = cache.keys[number], cache.values[number]
            if start is not None:
                keys[:, :, start : start + count] = key
                values[:, :, start : start + count] = value
            else:
                at = index[:, None, :, None].expand(-1, shape.kv_heads, -1, shape.head_dim)
                keys.scatter_(2, at, key)
                values.scatter_(2, at, value)
            attended = self._attend(
                query,
                keys[:, :, :upto],
                values[:, :, :upto],
                mask,
                (prefix.keys[number, 0, :, :shared], prefix.values[number, 0, :, :shared])
                if prefix
                else None,
            )
            hidden = hidden + F.linear(attended, layer.output, layer.output_bias)
            normed = F.rms_norm(hidden, (shape.hidden,), layer.mlp_norm, shape.epsilon)
            gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
        return F.rms_norm(hidden, (shape.hidden,), self._norm, shape.epsilon)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, prefix: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Attention over the lane's own positions and, before them, the shared ones. `[lanes, tokens, heads × dim]`."""
        shape = self._shape
        lanes, _, count, _ = query.shape
        group = shape.heads // shape.kv_heads
        query = query.reshape(lanes, shape.kv_heads, group * count, shape.head_dim) * shape.head_dim**-0.5
        scores = query @ keys.transpose(-1, -2)
        scores = (scores.view(lanes, shape.heads, count, -1) + mask).view(
            lanes, shape.kv_heads, group * count, -1
        )
        if prefix is None:
            mixed = scores.softmax(dim=-1) @ values
        else:
            scores = torch.cat((query @ prefix[0].transpose(-1, -2), scores), dim=-1)
            before, own = torch.split(scores.softmax(dim=-1), [prefix[0].shape[1], keys.shape[2]], dim=-1)
            mixed = before @ prefix[1] + own @ values
        mixed = mixed.view(lanes, shape.heads, count, shape.head_dim)
        return mixed.transpose(1, 2).reshape(lanes, count, -1)


def _layer(weights: Mapping[str, Tensor], prefix: str) -> _Layer:
    def fused(*names: str) -> Tensor:
        return torch.cat([weights[f"{prefix}{name}.weight"].float() for name in names]).contiguous()

    def fused_bias(*names: str) -> Tensor | None:
        found = [weights.get(f"{prefix}{name}.bias") for name in names]
        present = [bias.float() for bias in found if bias is not None]
        return torch.cat(present) if len(present) == len(names) else None

    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj")
    return _Layer(
        attention_norm=weights[f"{prefix}input_layernorm.weight"].float(),
        qkv=fused(*attention),
        qkv_bias=fused_bias(*attention),
        output=fused("self_attn.o_proj"),
        output_bias=fused_bias("self_attn.o_proj"),
        mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"].float(),
        gate_up=fused(*mlp),
        gate_up_bias=fused_bias(*mlp),
        down=fused("mlp.down_proj"),
        down_bias=fused_bias("mlp.down_proj"),
    )


def _rotary(shape: LlamaShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[context, head dim]` (Su et al., arXiv 2104.09864), with Llama 3's scaling where asked for."""
    exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    frequencies = torch.pow(torch.tensor(shape.rope_theta), -exponents)
    if shape.rope_scaling.get("rope_type", shape.rope_scaling.get("type")) == "llama3":
        frequencies = _llama3(frequencies, shape.rope_scaling)
    angles = torch.outer(torch.arange(shape.context).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long wavelengths stretched by `factor`, short ones kept, a smooth passage between (Llama 3.1's rule)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    stretched: Tensor = frequencies / scaling["factor"]
    return frequencies * kept + stretched * (1 - kept)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
