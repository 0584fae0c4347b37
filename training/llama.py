"""A Llama small enough to read and plain enough to train: the target (frozen), the draft, and both with a KV cache.

It knows full-sequence causal passes (training), passes over a key-value cache at one common position (sampling) and
at a position per row (simulated rounds). It knows no tokenizer, no server, no sampling. Everything beside the
attention works on a flat list of tokens, so that one compiled graph serves every layer and every sequence length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from shared.errors import ModelFilesError


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a Llama; names follow Hugging Face's `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_size(self) -> int:
        """Width of the keys (and of the values) of one token in one layer."""
        return self.num_key_value_heads * self.head_dim

    def with_layers(self, count: int) -> LlamaConfig:
        """The same model with another depth."""
        return replace(self, num_hidden_layers=count)

    def as_json(self) -> dict[str, int | float]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LlamaConfig:
        """Reads a Hugging Face `config.json`; raises `ModelFilesError` when it describes something else."""
        rope = fields.get("rope_theta") or (fields.get("rope_parameters") or {}).get("rope_theta") or 10000.0
        try:
            config = cls(
                hidden_size=int(fields["hidden_size"]),
                intermediate_size=int(fields["intermediate_size"]),
                num_hidden_layers=int(fields["num_hidden_layers"]),
                num_attention_heads=int(fields["num_attention_heads"]),
                num_key_value_heads=int(fields.get("num_key_value_heads") or fields["num_attention_heads"]),
                vocab_size=int(fields["vocab_size"]),
                rope_theta=float(rope),
                rms_norm_eps=float(fields.get("rms_norm_eps", 1e-5)),
                max_position_embeddings=int(fields.get("max_position_embeddings", 2048)),
            )
        except KeyError as missing:
            raise ModelFilesError(
                f"config.json lacks {missing}: a Llama-family checkpoint is needed"
            ) from None
        if int(fields.get("head_dim") or config.head_dim) != config.head_dim:
            raise ModelFilesError("config.json: head_dim differs from hidden_size / num_attention_heads")
        return config


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """`weight` rounded to `bits` per value with one scale per row; gradients pass straight through.

    Frozen weights are left alone: they were rounded when they were written.
    """
    if not bits or not weight.requires_grad:
        return weight
    most = 2 ** (bits - 1) - 1
    scale = weight.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / most
    rounded = (weight / scale).round().clamp(-most, most) * scale
    straight: Tensor = weight + (rounded - weight).detach()
    return straight


def fake_quantize_activations(values: Tensor) -> Tensor:
    """`values` rounded to 8 bits a row (zero point included), as the CPU's dynamic int8 kernels do."""
    low = values.detach().amin(dim=-1, keepdim=True).clamp(max=0).float()
    high = values.detach().amax(dim=-1, keepdim=True).clamp(min=0).float()
    scale = ((high - low) / 255).clamp(min=1e-8)
    zero = (-low / scale).round()
    rounded = (((values.float() / scale).round() + zero).clamp(0, 255) - zero) * scale
    return values + (rounded - values).detach().to(values.dtype)


def linear(values: Tensor, weight: Tensor, bits: int) -> Tensor:
    """A matrix product; with `bits`, as the int8 runtime would compute it."""
    if bits:
        values = fake_quantize_activations(values)
        weight = fake_quantize(weight, bits)
    return F.linear(values, weight.to(values.dtype))


def rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[tokens, heads, head_dim]` by `[tokens, 1, head_dim / 2]` angles."""
    first, second = values.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_input(
    hidden: Tensor,
    norm: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    shape: tuple[int, int, int],
    eps: float,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, query-key-value projection and rotation of flat tokens; `shape` is (heads, key-value heads, width)."""
    heads, kv_heads, width = shape
    normed = F.rms_norm(hidden, (hidden.shape[-1],), norm.to(hidden.dtype), eps)
    mixed = linear(normed, weight, bits)
    parts = mixed.view(-1, heads + 2 * kv_heads, width)
    query, key, value = torch.split(parts, [heads, kv_heads, kv_heads], dim=1)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def attention_output(
    hidden: Tensor,
    attended: Tensor,
    out: Tensor,
    norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float,
    bits: int,
) -> Tensor:
    """Output projection, residual, and the gated MLP with its residual, over flat tokens."""
    hidden = hidden + linear(attended, out, bits)
    normed = F.rms_norm(hidden, (hidden.shape[-1],), norm.to(hidden.dtype), eps)
    gate, up = linear(normed, gate_up, bits).chunk(2, dim=-1)
    return hidden + linear(F.silu(gate) * up, down, bits)


def attend_by_products(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of few queries over many keys as two batched products: `[rows, heads, few or many, head_dim]`."""
    scores = query @ keys.transpose(-1, -2)
    shares = (scores.float() * query.shape[-1] ** -0.5).softmax(dim=-1).to(values.dtype)
    mixed: Tensor = shares @ values
    return mixed


@dataclass(slots=True)
class Kernels:
    """The two pointwise halves of a layer, eager or compiled, and attention with one new token a row."""

    before: Callable[..., tuple[Tensor, Tensor, Tensor]] = attention_input
    after: Callable[..., Tensor] = attention_output
    single: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    @classmethod
    def compiled(cls) -> Kernels:
        """Compiled for static shapes; one graph per distinct number of tokens."""
        torch._dynamo.config.recompile_limit = 64
        return cls(
            before=torch.compile(attention_input, dynamic=False),
            after=torch.compile(attention_output, dynamic=False),
        )


class KeyValueCache:
    """Keys and values of all layers, `[rows, key-value heads, positions, head_dim]` each."""

    def __init__(
        self, config: LlamaConfig, rows: int, positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (rows, config.num_key_value_heads, positions, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

    def rows(self, first: int, last: int) -> KeyValueCache:
        """A view on some rows, sharing the memory."""
        part = KeyValueCache.__new__(KeyValueCache)
        part.keys = [keys[first:last] for keys in self.keys]
        part.values = [values[first:last] for values in self.values]
        return part


class Layer(nn.Module):
    """One decoder layer with fused query-key-value and gate-up projections."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.config = config
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Parameter(torch.empty(hidden + 2 * config.key_value_size, hidden))
        self.out = nn.Parameter(torch.empty(hidden, hidden))
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Parameter(torch.empty(2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(hidden, inner))

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        kernels: Kernels,
        bits: int,
    ) -> Tensor:
        """Flat tokens in, flat tokens out; `attend` takes and returns `[tokens, heads, head_dim]`."""
        config = self.config
        shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        query, key, value = kernels.before(
            hidden, self.attention_norm, self.qkv, cos, sin, shape, config.rms_norm_eps, bits
        )
        attended = attend(query, key, value).reshape(hidden.shape)
        return kernels.after(
            hidden,
            attended,
            self.out,
            self.mlp_norm,
            self.gate_up,
            self.down,
            config.rms_norm_eps,
            bits,
        )


class Llama(nn.Module):
    """The decoder without embedding and head: hidden states in, hidden states (before the last norm) out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.kernels = Kernels()
        self.bits = 0

    def truncated(self, count: int) -> Llama:
        """The first `count` layers as a model of its own, sharing the weights."""
        part = Llama.__new__(Llama)
        nn.Module.__init__(part)
        part.config = self.config.with_layers(count)
        part.layers = nn.ModuleList(list(self.layers)[:count])
        part.norm, part.kernels, part.bits = self.norm, self.kernels, self.bits
        return part

    def normed(self, hidden: Tensor) -> Tensor:
        """The last norm: what the LM head reads."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.norm.to(hidden.dtype), self.config.rms_norm_eps)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[tokens, 1, head_dim / 2]` of flat positions."""
        width = self.config.head_dim
        steps = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
        frequencies = self.config.rope_theta ** (-steps / width)
        angles = positions.float()[:, None, None] * frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def full(self, embedded: Tensor, keep: Iterable[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """A causal pass over `[rows, length, hidden]` from position 0.

        Returns the last hidden state and, by number, those after the layers in `keep` (1 is the first layer).
        """
        rows, length, width = embedded.shape
        positions = torch.arange(length, device=embedded.device).repeat(rows)
        heads = self.config.num_attention_heads

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = (
                part.view(rows, length, -1, part.shape[-1]).transpose(1, 2) for part in (query, key, value)
            )
            query, key, value = parts
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return mixed.transpose(1, 2).reshape(rows * length, heads, -1)

        hidden, kept = self._run(embedded.reshape(-1, width), positions, lambda _: attend, keep)
        return hidden.view(embedded.shape), {at: state.view(embedded.shape) for at, state in kept.items()}

    def aligned(self, embedded: Tensor, start: int, cache: KeyValueCache) -> Tensor:
        """A pass over `[rows, new, hidden]` whose first new token sits at `start` in every row.

        `new` is 1, or `start` is 0 (a prefill).
        """
        rows, new, width = embedded.shape
        positions = torch.arange(start, start + new, device=embedded.device).repeat(rows)
        kv_heads = self.config.num_key_value_heads

        def at_layer(index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            keys, values = cache.keys[index], cache.values[index]

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                keys[:, :, start : start + new] = key.view(rows, new, kv_heads, -1).transpose(1, 2)
                values[:, :, start : start + new] = value.view(rows, new, kv_heads, -1).transpose(1, 2)
                if new == 1:  # the query heads of a group become rows of one attention: no copy of keys
                    grouped = query.view(rows, kv_heads, -1, query.shape[-1])
                    return self.kernels.single(
                        grouped, keys[:, :, : start + 1], values[:, :, : start + 1]
                    ).reshape(rows, -1, query.shape[-1])
                mixed = F.scaled_dot_product_attention(
                    query.view(rows, new, -1, query.shape[-1]).transpose(1, 2),
                    keys[:, :, :new],
                    values[:, :, :new],
                    is_causal=True,
                    enable_gqa=True,
                )
                return mixed.transpose(1, 2).reshape(rows * new, -1, query.shape[-1])

            return attend

        hidden, _ = self._run(embedded.reshape(-1, width), positions, at_layer, ())
        return hidden.view(embedded.shape)

    def ragged(
        self,
        embedded: Tensor,
        positions: Tensor,
        cache: KeyValueCache,
        keep: Iterable[int] = (),
        cache_rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """A pass over `[rows, new, hidden]` at `positions` `[rows, new]` (rising in a row), each row on its own.

        What the cache holds at and after a row's first new position is overwritten or not looked at. `cache_rows` says
        which rows of the cache these are, if not all.
        """
        rows, new, width = embedded.shape
        kv_heads = self.config.num_key_value_heads
        reach = int(positions.max()) + 1
        everyone = cache_rows is None
        row = torch.arange(rows, device=embedded.device) if cache_rows is None else cache_rows
        seen = torch.arange(reach, device=embedded.device) <= positions[:, None, :, None]

        def at_layer(index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            keys, values = cache.keys[index], cache.values[index]

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                keys[row[:, None], :, positions] = key.view(rows, new, kv_heads, -1)
                values[row[:, None], :, positions] = value.view(rows, new, kv_heads, -1)
                width = query.shape[-1]
                grouped = query.view(rows, new, kv_heads, -1, width).permute(0, 2, 3, 1, 4)
                mixed = F.scaled_dot_product_attention(
                    grouped.reshape(rows, kv_heads, -1, width),
                    keys[:, :, :reach] if everyone else keys[row, :, :reach],
                    values[:, :, :reach] if everyone else values[row, :, :reach],
                    attn_mask=seen.repeat(1, 1, grouped.shape[2], 1),
                )
                mixed = mixed.view(rows, kv_heads, -1, new, width).permute(0, 3, 1, 2, 4)
                return mixed.reshape(rows * new, -1, width)

            return attend

        hidden, kept = self._run(embedded.reshape(-1, width), positions.reshape(-1), at_layer, keep)
        return hidden.view(embedded.shape), {at: state.view(embedded.shape) for at, state in kept.items()}

    def _run(
        self,
        hidden: Tensor,
        positions: Tensor,
        at_layer: Callable[[int], Callable[[Tensor, Tensor, Tensor], Tensor]],
        keep: Iterable[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        wanted = frozenset(keep)
        kept: dict[int, Tensor] = {}
        cos, sin = self.angles(positions, hidden.dtype)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, cos, sin, at_layer(index), self.kernels, self.bits)
            if index + 1 in wanted:
                kept[index + 1] = hidden
        return hidden, kept


class Target(nn.Module):
    """The frozen target: embedding, decoder and LM head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.decoder = Llama(config)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states of token ids, before the first layer."""
        return F.embedding(tokens, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token after hidden states of the last layer."""
        return F.linear(self.decoder.normed(hidden), self.head)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory's safetensors files."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelFilesError(f"{directory} holds no *.safetensors: a Hugging Face model directory is needed")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


def load_target(directory: Path, *, device: str | torch.device, dtype: torch.dtype) -> Target:
    """Loads a Llama-family checkpoint, frozen; raises `ModelFilesError` when it is none."""
    try:
        fields = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{directory}/config.json can't be read ({error})") from None
    config = LlamaConfig.from_json(fields)
    tensors = read_tensors(directory)
    with torch.device("meta"):
        target = Target(config)
    state = _fused_state(tensors, config)
    target.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    if "lm_head.weight" not in tensors:
        target.head = target.embedding
    # cuDNN's attention builds a plan for every new length, which costs more than the attention itself
    torch.backends.cuda.enable_cudnn_sdp(False)
    return target.to(device).requires_grad_(False).eval()


def _fused_state(tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    def take(name: str) -> Tensor:
        if name not in tensors:
            raise ModelFilesError(f"the checkpoint lacks {name}: it is not a plain Llama")
        return tensors[name]

    embedding = take("model.embed_tokens.weight")
    state = {
        "embedding": embedding,
        "head": tensors.get("lm_head.weight", embedding),
        "decoder.norm": take("model.norm.weight"),
    }
    for index in range(config.num_hidden_layers):
        source, to = f"model.layers.{index}", f"decoder.layers.{index}"
        attention = [take(f"{source}.self_attn.{part}_proj.weight") for part in "qkv"]
        state[f"{to}.attention_norm"] = take(f"{source}.input_layernorm.weight")
        state[f"{to}.qkv"] = torch.cat(attention)
        state[f"{to}.out"] = take(f"{source}.self_attn.o_proj.weight")
        state[f"{to}.mlp_norm"] = take(f"{source}.post_attention_layernorm.weight")
        state[f"{to}.gate_up"] = torch.cat(
            [take(f"{source}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        )
        state[f"{to}.down"] = take(f"{source}.mlp.down_proj.weight")
    return state


def copy_layers(source: Llama, into: Llama, layers: Sequence[int]) -> None:
    """Starts `into`'s layers (and last norm) from chosen layers of `source`, counted from 0."""
    with torch.no_grad():
        for layer, index in zip(into.layers, layers, strict=True):
            layer.load_state_dict(source.layers[index].state_dict())
        into.norm.copy_(source.norm)
