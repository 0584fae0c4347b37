"""Users of the load test chat with a whole stack, and their figures are those of streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.stack.stack import Stack

ROOT = Path(__file__).parents[2]


@pytest.mark.stack
@pytest.mark.timeout(240)
def test_a_short_run_of_locust_measures_streams_without_a_failure(stack: Stack, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    prompts.write_text(json.dumps({"turns": ["Count from one to ten.", "And back again."]}) + "\n")
    options = ["--users=2", "--rate=2", "--time=6s", "--max-tokens=24", "--think=0.1"]
    files = [f"--prompts={prompts}", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.load", f"--url={stack.gateway_url}", *files, *options],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)

    figures = json.loads(out.read_text())
    times, counts = figures["times_ms"], figures["counts"]
    assert figures["failures"] == []
    assert counts["answers"] == times["whole answer"]["count"] == times["ttft"]["count"] >= 2
    # Every token is of a pass that verified a block, or that the target made alone; the first may share its prefill.
    assert counts["passes"] >= counts["answers"]
    # The first text of an answer may stand for several tokens; each token after it has a time of its own.
    assert 0 < times["inter-token"]["count"] <= counts["tokens"]
    assert 0 < times["ttft"]["mean"] < times["whole answer"]["mean"]
    assert "time to first token" in done.stdout
    assert "tokens a pass" in done.stdout
