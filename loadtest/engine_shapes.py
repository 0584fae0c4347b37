"""The target whose steps are measured: one that exists, or only a model's shapes with random weights, and its exits.

A step's time does not depend on what the weights are, so a `config.json` will do. Such a target gets random exits of the
trained form, in a file as `training` writes it, and large enough to cost what trained ones would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from services.verifier.engine.checkpoint import ARCHITECTURES, Checkpoint, read_checkpoint
from shared.errors import InvalidRequest
from shared.models import MANIFEST, fetch, read_config, target_sha256
from shared.speculation.outcomes import Calibration, Line

SMOLLM2: Final = "smollm2-135m"
LLAMA: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama-2-7b": {
        **LLAMA,
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama-3-8b": {
        **LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}
DEPTHS: Final = (0.25, 0.5, 0.75)
AUTO: Final = "auto"
NONE: Final = "none"

EXITS_SHARE: Final = 0.015
"""What all exits together have of the target's parameters: about what the trained ones of SmolLM2 have."""
JUDGE: Final = 64
HEAD_RANK: Final = 16
"""Hidden size by rank of the exits' head."""
WIDTH_STEP: Final = 16
LEAST_WIDTH: Final = 16
CALIBRATION: Final = Calibration(
    Line(0.7, -1.0), Line(1.1, 0.3), (-0.5, 2.3, 0.2, 1.8, 0.1, -0.2, 0.2, -0.5, 0.6)
)
"""Of the size of what training finds."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured. `dummy`: its weights are random. `trained` exits come with it; `vocabulary` and so on are its
    config.json's, `kv_elements` the values that a token has in the KV cache."""

    name: str
    checkpoint: Checkpoint
    dummy: bool
    trained: bool
    hidden: int
    epsilon: float
    dtype: str
    parameters: int
    kv_elements: int

    @property
    def directory(self) -> Path:
        """Where its config.json lies."""
        return self.checkpoint.directory


def find_target(shapes: str, folder: Path) -> Target:
    """The target that `--shapes` names; a config.json for it is written into `folder` where only shapes are known.

    `InvalidRequest` when there is no such target, `ModelFilesError` when it can't be read.
    """
    if shapes == SMOLLM2:
        return _described(shapes, fetch(), trained=True)
    if shapes in SHAPES:
        return _described(shapes, _written(SHAPES[shapes], folder / shapes))
    directory = Path(shapes)
    if not (directory / "config.json").is_file():
        raise InvalidRequest(
            f"--shapes: {shapes!r} is neither a folder with a config.json nor one of {', '.join((*SHAPES, SMOLLM2))}"
        )
    if any(directory.glob("*.safetensors")):
        return _described(directory.name, directory)
    return _described(directory.name, _written(read_config(directory), folder / "target"))


def _written(config: Mapping[str, Any], directory: Path) -> Path:
    """A target without weights: its config.json, and a checksum for its exits to name."""
    directory.mkdir()
    text = json.dumps(config, indent=1)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    noted = {"target_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (directory / MANIFEST).write_text(json.dumps(noted) + "\n", encoding="utf-8")
    return directory


def _described(name: str, directory: Path, *, trained: bool = False) -> Target:
    config = read_config(directory)
    dummy = not any(directory.glob("*.safetensors"))
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        layers, vocabulary = int(config["num_hidden_layers"]), int(config["vocab_size"])
        inner = int(config["intermediate_size"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("head_dim") or hidden // heads)
        architecture = config["architectures"][0]
        context = int(config["max_position_embeddings"])
        if not config.get("model_type"):
            raise KeyError("model_type")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidRequest(f"--shapes: {directory / 'config.json'} lacks a usable {error}") from None
    if architecture not in ARCHITECTURES:
        raise InvalidRequest(f"--shapes: {name} is a {architecture}; served are {', '.join(ARCHITECTURES)}")
    layer = 2 * hidden * head * (heads + kv_heads) + 3 * hidden * inner + 2 * hidden
    heads_rows = vocabulary if config.get("tie_word_embeddings", False) else 2 * vocabulary
    return Target(
        name=name,
        checkpoint=(
            Checkpoint(directory, architecture, layers, vocabulary, context, ())
            if dummy
            else read_checkpoint(str(directory))
        ),
        dummy=dummy,
        trained=trained,
        hidden=hidden,
        epsilon=float(config.get("rms_norm_eps", 1e-5)),
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        parameters=layers * layer + heads_rows * hidden + hidden,
        kv_elements=2 * layers * kv_heads * head,
    )


# --- exits --------------------------------------------------------------------------------------------------------


def exit_layers(asked: str, target: Target) -> tuple[int, ...]:
    """The layers of `--exits`: depths below 1 or layers, with commas; `InvalidRequest` for others.

    `auto` is a quarter, a half and three quarters of the layers (a target with trained exits is asked for its own).
    """
    if asked == NONE:
        return ()
    layers = target.checkpoint.num_layers
    try:
        named = DEPTHS if asked == AUTO else tuple(float(part) for part in asked.split(","))
    except ValueError:
        named = ()
    found = sorted({round(depth * layers) if 0 < depth < 1 else depth for depth in named})
    if not found or any(layer != int(layer) or not 1 <= layer < layers for layer in found):
        raise InvalidRequest(
            f"--exits: {asked!r} should be 'auto', 'none', depths such as 0.25,0.5,0.75 or layers from 1 to {layers - 1}, "
            f"of which {target.name} has {layers}"
        )
    return tuple(int(layer) for layer in found)


def exit_width(target: Target, exits: int) -> int:
    """The width of each of so many exits' adapters, so that all have `EXITS_SHARE` of the target's parameters."""
    hidden = target.hidden
    head = 2 * hidden * (hidden // HEAD_RANK)
    judge = 2 * hidden * JUDGE + (3 * JUDGE + 8) * JUDGE
    each = (EXITS_SHARE * target.parameters - head) / exits - judge
    return max(LEAST_WIDTH, round(each / (3 * hidden) / WIDTH_STEP) * WIDTH_STEP)


def write_exits(target: Target, layers: Sequence[int], file: Path) -> None:
    """Random exits after `layers`, as `services.verifier.engine.exit_files` reads them."""
    import torch
    from safetensors.torch import save_file

    from services.verifier.engine.exit_files import FILE_FORMAT
    from services.verifier.engine.exit_modules import TrainedExit

    torch.manual_seed(0)
    hidden = target.hidden
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        module = TrainedExit(
            hidden,
            width=exit_width(target, len(layers)),
            judge_rank=JUDGE,
            judge_width=JUDGE,
            eps=target.epsilon,
        )
        torch.nn.init.normal_(module.down.weight, std=0.01)
        tensors |= {f"{layer}.{name}": value.bfloat16() for name, value in module.state_dict().items()}
    rank = max(1, hidden // HEAD_RANK)
    restore, _ = torch.linalg.qr(torch.randn(hidden, rank))
    tensors["head.restore"] = restore.contiguous().bfloat16()
    tensors["head.reduce"] = restore.T.contiguous().bfloat16()
    tensors["head.tail"] = torch.zeros(1)
    tensors["exit_vocab"] = torch.arange(target.checkpoint.vocab_size, dtype=torch.int32)
    header = {
        "format": FILE_FORMAT,
        "target_sha256": target_sha256(target.directory),
        "hidden_size": str(hidden),
        "layers": ",".join(str(layer) for layer in layers),
        "calibration": json.dumps({str(layer): asdict(CALIBRATION) for layer in layers}),
    }
    save_file(tensors, file, metadata=header)
