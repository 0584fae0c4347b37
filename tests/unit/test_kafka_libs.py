"""Where Kafka's libraries come from: the order, and what is resolved into the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.stack import kafka
from shared.stack.kafka import CORE_JAR, find_libs, resolve_libs
from shared.stack.processes import StackError
from shared.stack.settings import StackSettings


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with nothing beside it."""
    root = tmp_path / "work" / "project"
    root.mkdir(parents=True)
    monkeypatch.setattr(kafka, "PROJECT_ROOT", root)
    return root


def filled(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CORE_JAR).touch()
    return folder


def resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A jgo of the test's own."""
    package = tmp_path / "packages" / "jgo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(code)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def test_the_folder_set_is_taken_before_the_one_beside_the_project_and_that_before_the_cache(
    project: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cached = filled(cache / f"kafka-{kafka.KAFKA_VERSION}")
    assert find_libs(StackSettings(cache=cache)) == cached
    beside = filled(project.parent / "shared" / "kafka" / "libs")
    assert find_libs(StackSettings(cache=cache)) == beside
    named = filled(tmp_path / "named")
    assert find_libs(StackSettings(cache=cache, kafka_libs=named)) == named


def test_a_folder_set_that_holds_no_kafka_is_refused_rather_than_passed_over(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=f"holds no {CORE_JAR}"):
        find_libs(StackSettings(kafka_libs=tmp_path, cache=tmp_path / "cache"))


def test_what_the_resolver_names_is_copied_into_the_cache_once(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jars = [filled(tmp_path / "repository") / CORE_JAR, tmp_path / "repository" / "other.jar"]
    jars[1].touch()
    resolver(tmp_path, monkeypatch, f"print({':'.join(map(str, jars))!r})")
    settings = StackSettings(cache=tmp_path / "cache")
    said: list[str] = []
    libs = find_libs(settings, said.append)
    assert libs is not None
    assert {path.name for path in libs.iterdir()} == {CORE_JAR, "other.jar"}
    assert any("fetching" in text for text in said)
    assert find_libs(settings, pytest.fail) == libs


@pytest.mark.parametrize("code", ["raise SystemExit(1)", "print('nothing.jar')"])
def test_a_repository_that_gives_no_kafka_leaves_no_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    resolver(tmp_path, monkeypatch, code)
    said: list[str] = []
    assert not resolve_libs(tmp_path / "cache" / "kafka", said.append)
    assert said[-1] == "Maven's repository can't be reached"
    assert not (tmp_path / "cache").exists()
