"""A target of known shapes that always knows its mind: for measuring the whole system without a model's weights.

Answers that are replayed have to be what the target says in every batch and on every device. Random weights don't give that:
among tens of thousands of words two are often as likely to within a rounding. So here the word that follows is fixed by
the one before: words are random signs, the head holds for each word the signs of the one before it, and the layers between,
random too and as expensive as any, add too little to change which is likeliest (by some thirty standard deviations).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loadtest.engine_shapes import SHAPES
from shared.errors import InvalidRequest
from shared.models import MANIFEST

if TYPE_CHECKING:
    import torch

VOCABULARY: Final = 49152
"""That of the tokenizer of the target that ships."""
FIRST: Final = 64
"""Token ids below may be special: no answer holds one."""
TINY: Final = "tiny"
SYSTEM_SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    **SHAPES,
    TINY: {
        **SHAPES["llama-2-7b"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "torch_dtype": "float32",
    },
}
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")
SPREAD: Final = 0.02
"""Standard deviation of the layers' weights; what a layer adds to the residual stream is smaller by the number of layers."""
SHARED_MEMORY: Final = Path("/dev/shm")
SPARE: Final = 4 << 30


def config_of(shapes: str) -> dict[str, Any]:
    """The config.json of a target; `InvalidRequest` when there are no such shapes."""
    if shapes not in SYSTEM_SHAPES:
        raise InvalidRequest(f"--shapes: there are no {shapes!r}; there are {', '.join(SYSTEM_SHAPES)}")
    return {**SYSTEM_SHAPES[shapes], "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}


def weight_bytes(config: Mapping[str, Any]) -> int:
    """How much its weights take."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = 2 * hidden * hidden * (heads + kv_heads) // heads + 3 * hidden * inner + 2 * hidden
    parameters = layers * layer + 2 * VOCABULARY * hidden + hidden
    return int(parameters * (4 if config["torch_dtype"] == "float32" else 2))


def roomy_folder(size: int) -> Path:
    """Where so many bytes may go: memory where there is enough of it, since they are read again at once."""
    if SHARED_MEMORY.is_dir():
        found = os.statvfs(SHARED_MEMORY)
        if found.f_bavail * found.f_frsize > size + SPARE:
            return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def successors(vocabulary: int, first: int, seed: int = 0) -> list[int]:
    """What follows each word: all those from `first` on are one round trip; special ones lead into it."""
    from random import Random

    order = list(range(first, vocabulary))
    Random(seed).shuffle(order)
    found = [order[token % len(order)] for token in range(first)] + [0] * len(order)
    for at, token in enumerate(order):
        found[token] = order[(at + 1) % len(order)]
    return found


def write_target(config: Mapping[str, Any], tokenizer: Path, directory: Path) -> None:
    """Write a target whose next word is `successors`', with the tokenizer in the folder `tokenizer`."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy2(tokenizer / name, directory / name)
    text = json.dumps(config, indent=1)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    # Its checksum is that of its description: reading all weights once more would take as long as writing them.
    noted = {"target_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (directory / MANIFEST).write_text(json.dumps(noted) + "\n", encoding="utf-8")
    dtype = getattr(torch, config["torch_dtype"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    mapped: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(tensors, directory / name)
        mapped.update(dict.fromkeys(tensors, name))

    save(_ends(config, dtype, device, generator), "ends.safetensors")
    layer = _layer(config, dtype, device, generator)
    for number in range(config["num_hidden_layers"]):
        save(
            {f"model.layers.{number}.{name}": weight for name, weight in layer.items()},
            f"layer-{number}.safetensors",
        )
    index = {"metadata": {"total_size": weight_bytes(config)}, "weight_map": mapped}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _ends(
    config: Mapping[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Embeddings and head: a word's row of the head is the embedding of the one that it follows."""
    import torch

    hidden = config["hidden_size"]
    signs = torch.randint(0, 2, (VOCABULARY, hidden), device=device, generator=generator)
    embeddings = (2 * signs - 1).to(dtype)
    head = torch.zeros_like(embeddings)
    after = torch.tensor(successors(VOCABULARY, FIRST), device=device)
    head[after[FIRST:]] = embeddings[FIRST:]
    return {
        "model.embed_tokens.weight": embeddings.cpu(),
        "lm_head.weight": head.cpu(),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
    }


def _layer(
    config: Mapping[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """One layer's weights, for all of them: random numbers take longer to make than to write."""
    import torch

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    quiet = SPREAD / config["num_hidden_layers"]
    shapes: dict[str, tuple[int, int, float]] = {
        "self_attn.q_proj": (hidden, hidden, SPREAD),
        "self_attn.k_proj": (kv, hidden, SPREAD),
        "self_attn.v_proj": (kv, hidden, SPREAD),
        "self_attn.o_proj": (hidden, hidden, quiet),
        "mlp.gate_proj": (inner, hidden, SPREAD),
        "mlp.up_proj": (inner, hidden, SPREAD),
        "mlp.down_proj": (hidden, inner, quiet),
    }
    found = {
        f"{name}.weight": (torch.randn(rows, columns, device=device, generator=generator) * spread)
        .to(dtype)
        .cpu()
        for name, (rows, columns, spread) in shapes.items()
    }
    ones = torch.ones(hidden, dtype=dtype)
    return {**found, "input_layernorm.weight": ones, "post_attention_layernorm.weight": ones.clone()}
