"""The draft that ships as a Hugging Face checkpoint in float32, so that stock vLLM can run it beside the target.

Its few-bit weights are unpacked, nothing is rounded again. Tokens outside the draft's output vocabulary get a row of
zeros in the LM head: vLLM's greedy draft says one of them only where no token of the vocabulary has a positive logit,
which they have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shared.errors import ModelFilesError
from shared.pair import shipped_draft

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def export_draft(target: Path, directory: Path) -> None:
    """Write the draft of `target` to `directory`; `ModelFilesError` when none came with Outrider for it."""
    from safetensors.torch import save_file

    from services.draft_gateway.drafting.distilled import config_of, read_distilled

    header, tensors = read_distilled(shipped_draft(target))
    config = config_of(header) | {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    read = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config |= {name: read[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in read}
    directory.mkdir(parents=True, exist_ok=True)
    try:
        weights = checkpoint(tensors, config["num_hidden_layers"], config["vocab_size"])
    except KeyError as error:
        raise ModelFilesError(f"the draft lacks the tensor {error}") from None
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (target / name).exists():
            (directory / name).write_bytes((target / name).read_bytes())


def checkpoint(tensors: Mapping[str, Tensor], layers: int, vocab_size: int) -> dict[str, Tensor]:
    """The tensors of a Hugging Face Llama from those of a distilled draft; KeyError names one that is missing."""
    import torch

    from services.draft_gateway.drafting.packed import product_rows, unpack

    def matrix(name: str) -> Tensor:
        return unpack(tensors[f"{name}.packed"]).float() * tensors[f"{name}.scales"][:, None]

    vocabulary, head = tensors["draft_vocab"].long(), matrix("head")
    rare = torch.ones(vocab_size, dtype=torch.bool)
    rare[vocabulary] = False
    embedding, spoken = torch.zeros(vocab_size, head.shape[1]), torch.zeros(vocab_size, head.shape[1])
    embedding[vocabulary] = spoken[vocabulary] = head
    embedding[rare] = product_rows(tensors["rare_codes"], tensors["rare_books"].float())
    found = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": spoken,
        "model.norm.weight": tensors["norm"].float(),
    }
    for number in range(layers):
        own, theirs = f"layers.{number}.", f"model.layers.{number}."
        qkv, gate_up = matrix(f"{own}qkv"), matrix(f"{own}gate_up")
        width = head.shape[1]
        shared = (len(qkv) - width) // 2  # keys and values have fewer heads than queries
        query, key, value = qkv[:width], qkv[width : width + shared], qkv[width + shared :]
        gate, up = gate_up.chunk(2)
        found |= {
            f"{theirs}self_attn.q_proj.weight": query,
            f"{theirs}self_attn.k_proj.weight": key,
            f"{theirs}self_attn.v_proj.weight": value,
            f"{theirs}self_attn.o_proj.weight": matrix(f"{own}out"),
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": matrix(f"{own}down"),
            f"{theirs}input_layernorm.weight": tensors[f"{own}attention_norm"].float(),
            f"{theirs}post_attention_layernorm.weight": tensors[f"{own}mlp_norm"].float(),
        }
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}
