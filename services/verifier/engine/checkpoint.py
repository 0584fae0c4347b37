"""What a target's directory says about itself, read before vLLM is started: cheap checks with clear errors.

Reads `config.json`, `generation_config.json` and the safetensors headers; no weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.errors import EngineError, ModelFilesError

ARCHITECTURES: Final[Mapping[str, str]] = {
    "LlamaForCausalLM": "OutriderLlamaForCausalLM",
    "LLaMAForCausalLM": "OutriderLlamaForCausalLM",
    "MistralForCausalLM": "OutriderMistralForCausalLM",
}
"""Checkpoint's architecture → the class of ours that serves it."""

LAYER_TENSORS: Final = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
AUTO: Final = "auto"
AUTO_DEPTHS: Final = (0.6, 0.8, 0.9)
MEND: Final = (
    "name a Hugging Face directory of a Llama-family model in OUTRIDER_MODEL, or run `outrider models fetch`"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A target's shape. `stop_ids` end a generation unless `ignore_eos`; sizes are tokens."""

    directory: Path
    architecture: str
    num_layers: int
    vocab_size: int
    context: int
    stop_ids: tuple[int, ...]


def read_checkpoint(directory: str) -> Checkpoint:
    """The checkpoint in `directory`.

    Raises `ModelFilesError` when files are missing or damaged, `EngineError` when the architecture is not served.
    """
    if not directory:
        raise ModelFilesError(f"no target model is named: {MEND}")
    root = Path(directory)
    if not root.is_dir():
        raise ModelFilesError(f"the target model's directory {root} does not exist: {MEND}")
    config = _json(root / "config.json")
    tensors = _tensors(root)
    try:
        architecture = config["architectures"][0]
        shape = (
            int(config["num_hidden_layers"]),
            int(config["vocab_size"]),
            int(config["max_position_embeddings"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelFilesError(f"{root / 'config.json'} lacks a usable {error}: {MEND}") from error
    if architecture not in ARCHITECTURES:
        raise EngineError(f"{root} is a {architecture}; served are {', '.join(ARCHITECTURES)}: {MEND}")
    if "quantization_config" not in config:
        _check_complete(
            root, tensors, num_layers=shape[0], tied=bool(config.get("tie_word_embeddings", False))
        )
    generation_file = root / "generation_config.json"
    generation = _json(generation_file) if generation_file.exists() else {}
    stop_ids = sorted({*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))})
    return Checkpoint(root, architecture, *shape, tuple(stop_ids))


def exit_layers(setting: str, num_layers: int) -> tuple[int, ...]:
    """The layers after which exits stand: 'auto', 'none' or a list. `EngineError` when there are no such layers."""
    if setting.strip() == "none":
        return ()
    if setting.strip() == AUTO:
        return tuple(
            sorted({min(max(round(depth * num_layers), 1), num_layers - 1) for depth in AUTO_DEPTHS} - {0})
        )
    try:
        layers = sorted({int(layer) for layer in setting.split(",")})
    except ValueError:
        layers = []
    if not layers or layers[0] < 1 or layers[-1] >= num_layers:
        raise EngineError(
            f"OUTRIDER_EXIT_LAYERS is {setting!r}; it must be 'auto', 'none' or layers from 1 to {num_layers - 1} of "
            "this target, such as '18,24,27'"
        )
    return tuple(layers)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFilesError(f"{file} can't be read ({error.strerror}): {MEND}") from error
    except ValueError as error:
        raise ModelFilesError(f"{file} is not JSON ({error}): {MEND}") from error
    if not isinstance(found, dict):
        raise ModelFilesError(f"{file} does not hold a JSON object: {MEND}")
    return found


def _ids(value: object) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [token for token in listed if isinstance(token, int)]


def _tensors(root: Path) -> set[str]:
    """Names of the tensors in a checkpoint's safetensors files, each of which is checked for damage."""
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise ModelFilesError(f"{root} holds no *.safetensors: {MEND}")
    return {name for file in files for name in _header(file)}


def _header(file: Path) -> dict[str, Any]:
    """A safetensors header: must be JSON, and the file as long as it says (not what a broken download leaves)."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = opened.read(length) if 0 < length <= size - 8 else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelFilesError(
            f"{file} is not a safetensors file, or its header is damaged: fetch it again"
        ) from None
    if size != expected:
        raise ModelFilesError(f"{file} is damaged: {size} bytes instead of {expected}: fetch it again")
    return tensors


def _check_complete(root: Path, tensors: set[str], *, num_layers: int, tied: bool) -> None:
    """vLLM serves random numbers where a matrix is missing, so look for all of a Llama's."""
    expected = ["model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])]
    expected += [
        f"model.layers.{layer}.{name}.weight" for layer in range(num_layers) for name in LAYER_TENSORS
    ]
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelFilesError(f"{root} lacks the weights {', '.join(missing[:3])}{more}: fetch it again")
