"""Fixtures of several integration tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.byte_model import MODEL, write_byte_model
from tests.integration.tiny_target import TinyTarget, make_tiny_target


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> TinyTarget:
    """A tiny random Llama, made once."""
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny-target")


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory whose tokens are bytes, made once."""
    return write_byte_model(tmp_path_factory.mktemp("models") / MODEL)
