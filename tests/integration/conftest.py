"""Fixtures of several integration tests."""

from __future__ import annotations

import pytest

from tests.integration.tiny_target import TinyTarget, make_tiny_target


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> TinyTarget:
    """A tiny random Llama, made once."""
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny-target")
