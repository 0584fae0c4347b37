"""From GGUF to Hugging Face: a Llama and its tokenizer, as llama.cpp stores them, become a plain model directory.

Weights are dequantised to float32, the type in which that is exact: anything shorter would round them and be another
model. Of tokenizers it knows the one of SmolLM. The same GGUF gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import ModelFilesError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

Report = Callable[[str, float], None]

_PARTS: Final[Mapping[str, str]] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
LAYER_WEIGHTS: Final = tuple(_PARTS.values())
"""The matrices and norms of a layer, as Hugging Face names them."""
_SPECIAL: Final = 3  # GGUF's type of control tokens
_EXPECTED: Final[Mapping[str, str]] = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}


def convert(gguf: Path, directory: Path, tell: Report) -> None:
    """Write the Llama in `gguf` as a Hugging Face directory, which must not exist.

    Raises `ModelFilesError` when it is no Llama, or one whose tokenizer is not SmolLM's.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelFilesError(f'converting needs {error.name}: pip install "outrider[demo]"') from None
    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, OverflowError) as error:
        raise ModelFilesError(f"{gguf.name} can't be read as GGUF: {error}") from None
    try:
        _convert(reader, gguf, directory, tell)
    except KeyError as error:
        raise ModelFilesError(
            f"{gguf.name} lacks {error}, or has it in a form that is not known here"
        ) from None


def _convert(reader: GGUFReader, gguf: Path, directory: Path, tell: Report) -> None:
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    for name, expected in _EXPECTED.items():
        if (found := fields[name].contents()) != expected:
            raise ModelFilesError(f"{gguf.name} has {name} {found!r}; only {expected!r} is converted")
    config = _config(fields, untied=any(tensor.name == "output.weight" for tensor in reader.tensors))
    directory.mkdir()
    _write_weights(reader.tensors, config, directory / "model.safetensors", tell)
    tell("writing the tokenizer", 0.0)
    write_json(directory / "config.json", config)
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": False},
    )
    _write_tokenizer(fields, directory)


def write_json(path: Path, content: object) -> None:
    """Write `content` so that the same content is the same bytes."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(fields: Mapping[str, Any], *, untied: bool) -> dict[str, Any]:
    def read(name: str) -> Any:
        return fields[name].contents()

    hidden, heads = read("llama.embedding_length"), read("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": read("llama.feed_forward_length"),
        "num_hidden_layers": read("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "vocab_size": read("llama.vocab_size"),
        "max_position_embeddings": read("llama.context_length"),
        "rope_theta": read("llama.rope.freq_base"),
        "rms_norm_eps": float(f"{read('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not untied,
        "bos_token_id": read("tokenizer.ggml.bos_token_id"),
        "eos_token_id": read("tokenizer.ggml.eos_token_id"),
        "pad_token_id": read("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _write_weights(tensors: Sequence[Any], config: Mapping[str, Any], path: Path, tell: Report) -> None:
    import numpy as np
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    for done, tensor in enumerate(tensors):
        tell("converting", done / len(tensors))
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        layer, part = _place(tensor.name)
        if part in heads:
            weight = _unpermuted(weight, heads[part])
        weights[_hf_name(layer, part)] = weight
    save_file(weights, path, metadata={"format": "pt"})
    tell("converting", 1.0)


def _place(name: str) -> tuple[int | None, str]:
    parts = name.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blk" else (None, parts[0])


def _hf_name(layer: int | None, part: str) -> str:
    if layer is not None:
        return f"model.layers.{layer}.{_PARTS[part]}.weight"
    return {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[
        part
    ] + ".weight"


def _unpermuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows in Hugging Face's order again: llama.cpp interleaves the two halves that rotary embedding pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(fields: Mapping[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs)
    )
    # llama.cpp's name for it is "smollm": every digit by itself, then GPT-2's split.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))

    def token(name: str) -> str:
        number: int = fields[f"tokenizer.ggml.{name}_token_id"].contents()
        return tokens[number]

    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "unk_token": token("unknown"),
            "pad_token": token("padding"),
            "additional_special_tokens": special,
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"].contents(),
            "chat_template": fields["tokenizer.chat_template"].contents(),
        },
    )
