"""From GGUF to Hugging Face, on a model that takes milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from shared.conversion import convert
from shared.errors import ModelFilesError
from shared.models import verify
from shared.text import Tokenizer
from tests.unit.tiny_gguf import KV_HEADS, make_tiny_model


def silent(what: str, share: float) -> None:
    pass


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_weights_come_out_as_they_were_before_llama_cpp_reordered_them(tmp_path: Path, untied: bool) -> None:
    model = make_tiny_model(tmp_path, untied=untied)
    convert(model.gguf, tmp_path / "out", silent)
    verify(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == model.weights.keys()
    for name, weight in found.items():
        assert weight.dtype == np.float32
        assert np.array_equal(weight, model.weights[name]), name


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0])
def test_dequantised_weights_need_all_of_float32(kind: gguf.GGMLQuantizationType) -> None:
    weight = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)
    exact = gguf.dequantize(gguf.quantize(weight, kind), kind)
    assert not np.array_equal(exact, exact.astype(np.float16).astype(np.float32))


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    for name in ("one", "two"):
        convert(model.gguf, tmp_path / name, silent)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_transformers_reads_what_comes_out(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_tiny_model(tmp_path)
    convert(model.gguf, tmp_path / "out", silent)
    loaded, faults = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not faults["missing_keys"] and not faults["unexpected_keys"]
    assert loaded.config.num_key_value_heads == KV_HEADS
    assert loaded.dtype == torch.float32
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.load(tmp_path / "out")
    for text in ("hi hi", "1212 x", "<|im_start|>hi<|im_end|>é"):
        assert tuple(tokenizer(text)["input_ids"]) == ours.encode(text)
    assert ours.stop_tokens == {2}


def test_digits_stand_alone_whatever_the_merges_say(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    convert(model.gguf, tmp_path / "out", silent)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert len(tokenizer.encode("12")) == 2
    assert len(tokenizer.encode("hi hi")) == 2


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre 'qwen2'; only 'smollm'"),
        ({"tokenizer.ggml.model": "llama"}, "only 'gpt2'"),
        ({"llama.block_count": None}, "lacks 'llama.block_count'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, metadata: dict[str, Any], says: str) -> None:
    model = make_tiny_model(tmp_path, **metadata)
    with pytest.raises(ModelFilesError, match=says):
        convert(model.gguf, tmp_path / "out", silent)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x00" * 64, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelFilesError, match=r"broken\.gguf"):
        convert(file, tmp_path / "out", silent)
