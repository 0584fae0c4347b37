"""The engine's benchmark on a CPU, from a config.json to its figures: all of its engines, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_bench_engine import tiny

pytestmark = pytest.mark.engine
SESSIONS = 2


def test_every_mode_says_what_vllm_says_and_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest.bench", "engine", "--shapes", str(tiny(tmp_path / "tiny"))]
    command += [
        "--sessions",
        str(SESSIONS),
        "--k",
        "3",
        "--steps",
        "4",
        "--out",
        str(tmp_path / "out"),
        "--profile",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "out" / "engine.json").read_text())
    rows = {own["mode"]: own for own in held["rows"]}
    assert set(rows) == {"stock_ar", "stock_ngram", "verify", "verify_exits", "floor"}
    for own in rows.values():
        assert own["sessions"] == own["compared"] == SESSIONS
        assert own["differences"] == []
        assert own["step_ms"]["median"] > 0
    assert rows["stock_ar"]["tokens_per_step"] == rows["floor"]["tokens_per_step"] == 1.0
    assert rows["verify"]["tokens_per_step"] == rows["verify_exits"]["tokens_per_step"] > 1.0
    assert held["exits"] == [1, 2, 3]
    arrived = [rows["verify_exits"]["exit_on_host_ms"][str(layer)] for layer in held["exits"]]
    assert arrived == sorted(arrived)
    assert not rows["verify"]["exit_on_host_ms"]
    assert all(each["holds"] is None for each in held["ratios"])
    assert "exit after 2" in (tmp_path / "out" / "timeline.svg").read_text()
    assert "verify_exits" in (tmp_path / "out" / "engine.md").read_text()
    profiles = {own["mode"]: own for own in json.loads((tmp_path / "out" / "profile.json").read_text())}
    spent = profiles["verify_exits"]["host_ms"]
    assert profiles["verify_exits"]["step_ms"] > spent["execute_model"] > spent["_model_forward"] > 0
    assert "floor" in (tmp_path / "out" / "profile.md").read_text()
