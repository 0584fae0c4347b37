"""The sizes of a Llama-family model, as its config.json says them, and its rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shared.errors import ModelFilesError


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
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ModelFilesError(f"{heads} heads can't share {kv_heads} key-value heads evenly")
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            context=config.get("max_position_embeddings", 2048),
            epsilon=config.get("rms_norm_eps", 1e-5),
            rope_theta=config.get("rope_theta") or rope.get("rope_theta") or 10_000.0,
            rope_scaling=scaling,
        )


def check_weights(weights: Mapping[str, Tensor], shape: LlamaShape) -> None:
    """`ModelFilesError` when a Hugging Face checkpoint's weight has another size than its config.json says, or holds
    something that is no number, or an output vocabulary reaches beyond the target's."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    expected = {
        "embed_tokens": (shape.vocabulary, shape.hidden),
        "norm": (shape.hidden,),
        "q_proj": (query, shape.hidden),
        "k_proj": (kv, shape.hidden),
        "v_proj": (kv, shape.hidden),
        "o_proj": (shape.hidden, query),
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
    }
    for name, weight in weights.items():
        wanted = expected.get(name.split(".")[-2]) if name.endswith(".weight") else None
        if wanted is not None and tuple(weight.shape) != wanted:
            raise ModelFilesError(f"{name} is {list(weight.shape)}, config.json says {list(wanted)}")
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ModelFilesError(f"{name} holds values that are no finite numbers: the file is damaged")
    vocabulary = weights.get("draft_vocab")
    if vocabulary is not None and not bool(((vocabulary >= 0) & (vocabulary < shape.vocabulary)).all()):
        raise ModelFilesError(f"draft_vocab names tokens beyond the vocabulary of {shape.vocabulary}")


def rotary(shape: LlamaShape) -> tuple[Tensor, Tensor]:
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
