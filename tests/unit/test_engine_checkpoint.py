"""What is found wrong with a target's directory before anything is started."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from services.verifier.engine.checkpoint import LAYER_TENSORS, exit_layers, read_checkpoint
from shared.errors import EngineError, ModelFilesError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
NAMES = [
    "model.embed_tokens",
    "model.norm",
    *(f"model.layers.{n}.{name}" for n in range(2) for name in LAYER_TENSORS),
]


def write(folder: Path, *, config: dict[str, Any] | None = None, names: list[str] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    listed = NAMES if names is None else names
    header = json.dumps(
        {
            f"{name}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]}
            for n, name in enumerate(listed)
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(4 * len(listed))
    )
    return folder


def test_shape_and_ends_of_sequence_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    found = read_checkpoint(str(tmp_path))
    assert (found.num_layers, found.vocab_size, found.context, found.stop_ids) == (2, 10, 64, (2, 7))


def test_model_that_is_not_named_is_refused() -> None:
    with pytest.raises(ModelFilesError, match=r"no target model is named.*OUTRIDER_MODEL"):
        read_checkpoint("")


def test_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="absent does not exist"):
        read_checkpoint(str(tmp_path / "absent"))


def test_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"config.json can't be read"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_config_that_is_not_a_json_object_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelFilesError, match=r"config.json (is not JSON|does not hold)"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "field", ["architectures", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
)
def test_config_without_its_shape_is_refused(tmp_path: Path, field: str) -> None:
    write(tmp_path, config={name: value for name, value in CONFIG.items() if name != field})
    with pytest.raises(ModelFilesError, match=field):
        read_checkpoint(str(tmp_path))


def test_other_architecture_is_refused_with_those_served(tmp_path: Path) -> None:
    write(tmp_path, config={**CONFIG, "architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(EngineError, match="is a GPT2LMHeadModel; served are LlamaForCausalLM"):
        read_checkpoint(str(tmp_path))


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=r"no \*.safetensors"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_truncated_weights_are_refused(tmp_path: Path, cut: int) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelFilesError, match=r"damaged.*fetch it again"):
        read_checkpoint(str(tmp_path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    write(tmp_path, names=[name for name in NAMES if "1.self_attn.k_proj" not in name])
    with pytest.raises(ModelFilesError, match=r"lacks the weights model.layers.1.self_attn.k_proj.weight"):
        read_checkpoint(str(tmp_path))


def test_untied_model_needs_its_head(tmp_path: Path) -> None:
    write(tmp_path, config={**CONFIG, "tie_word_embeddings": False})
    with pytest.raises(ModelFilesError, match=r"lm_head.weight"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "layers", "expected"),
    [
        ("auto", 30, (18, 24, 27)),
        ("auto", 8, (5, 6, 7)),
        ("auto", 2, (1,)),
        ("auto", 1, ()),
        ("none", 30, ()),
        ("27, 18,18", 30, (18, 27)),
    ],
)
def test_exit_layers_are_what_the_setting_says(setting: str, layers: int, expected: tuple[int, ...]) -> None:
    assert exit_layers(setting, layers) == expected


@pytest.mark.parametrize("setting", ["", "0", "30", "18,31", "-1", "all", "1.5"])
def test_layers_that_cannot_have_an_exit_are_refused(setting: str) -> None:
    with pytest.raises(EngineError, match=r"OUTRIDER_EXIT_LAYERS.*layers from 1 to 29"):
        exit_layers(setting, 30)
