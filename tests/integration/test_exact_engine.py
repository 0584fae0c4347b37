"""The exactness run's engine on real vLLM: answers that are right are found equal, one that is not is found and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.exact_engine import Plan, run
from tests.integration.tiny_target import TinyTarget

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]


async def test_answers_are_compared_token_by_token_while_blocks_of_all_kinds_are_fed(
    tiny_target: TinyTarget, tmp_path: Path
) -> None:
    wrong = list(tiny_target.answer)
    wrong[20] = (wrong[20] + 1) % 512
    (tmp_path / "truths.json").write_text(json.dumps([tiny_target.answer, tiny_target.answer, wrong]))
    plan = Plan(
        model=str(tiny_target.directory),
        dtype="float32",
        eager=False,
        prompts=(tiny_target.prompt,) * 3,
        sessions=(1, 3),
        max_tokens=64,
        max_block=5,
        kv_cache_mb=64,
        truths=str(tmp_path / "truths.json"),
        out=str(tmp_path / "found.json"),
    )
    await run(plan)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["sessions"] for one in found["runs"]] == [1, 3]
    for one in found["runs"]:
        assert one["answers"] == 3 and one["tokens"] == 3 * len(tiny_target.answer)
        assert sum(one["blocks"].values()) > 10
        (difference,) = one["differences"]
        assert (difference["prompt"], difference["position"]) == (2, 20)
        assert (difference["expected"], difference["found"]) == (wrong[20], tiny_target.answer[20])
        assert difference["gap"] is None or difference["gap"] < 0
    layers = {layer for _, _, layer, _ in found["reports"]}
    assert layers == set(found["exit_layers"])
