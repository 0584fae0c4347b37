"""Timelines: what a process writes down, and what is read off it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest import rounds
from shared import timeline
from shared.protocol import Verdict
from shared.speculation.edge import Drafted, SendBlock, VerdictArrived

SESSION = "cmpl-1"


@pytest.fixture
def lines() -> Iterator[logging.Logger]:
    logger = logging.getLogger("outrider.timeline")
    before = list(logger.handlers)
    yield logger
    for handler in set(logger.handlers) - set(before):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.CRITICAL)


def test_a_timeline_holds_numbers_and_never_tokens(tmp_path: Path, lines: logging.Logger) -> None:
    timeline.note("edge", SESSION, 0.5, Drafted(1, (7001, 7002), (0.5, 0.5)), [])
    timeline.start("", "gateway-0")
    assert not lines.isEnabledFor(logging.INFO)
    timeline.start(str(tmp_path / "new"), "gateway-0")
    verdict = Verdict(session=SESSION, epoch=1, round=3, base=9, accepted=2, tokens=(7001, 7002, 7003))
    timeline.note("edge", SESSION, 12.3456, VerdictArrived(verdict), [SendBlock(1, 4, 12, (7004,))])
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("gateway-0-")
    assert "700" not in path.read_text()
    assert json.loads(path.read_text()) == {
        "ms": 12.346,
        "side": "edge",
        "session": SESSION,
        "event": {
            "kind": "VerdictArrived", "message": "Verdict", "round": 3, "base": 9, "accepted": 2, "rows": 0, "tokens": 3,
        },
        "actions": [{"kind": "SendBlock", "round": 4, "base": 12, "tokens": 1}],
    }  # fmt: skip


def line(ms: float, side: str, event: dict[str, Any], *actions: dict[str, Any]) -> str:
    return json.dumps({"ms": ms, "side": side, "session": SESSION, "event": event, "actions": list(actions)})


EDGE = (
    line(0, "edge", {"kind": "Drafted", "lane": 0}, {"kind": "SendBlock", "round": 1, "base": 1, "tokens": 5},
         {"kind": "StartDraft", "lane": 1}),
    line(40, "edge", {"kind": "Drafted", "lane": 1}, {"kind": "SendForward", "round": 2, "parent": 1}),
    line(90, "edge", {"kind": "HintArrived", "message": "Hint", "round": 1, "layer": 24}),
    line(145, "edge", {"kind": "VerdictArrived", "message": "Verdict", "round": 1, "accepted": 3}),
    line(250, "edge", {"kind": "VerdictArrived", "message": "Verdict", "round": 2, "accepted": 1},
         {"kind": "StartDraft", "lane": 2}),
    line(280, "edge", {"kind": "Drafted", "lane": 2}, {"kind": "SendBlock", "round": 3, "base": 7, "tokens": 5}),
)  # fmt: skip
VERIFIER = (
    line(27, "verifier", {"kind": "Received", "message": "Block", "round": 1},
         {"kind": "Verify", "round": 1, "base": 1, "tokens": 5}),
    line(65, "verifier", {"kind": "ExitSeen", "layer": 24}),
    line(67, "verifier", {"kind": "Received", "message": "Forward", "round": 2}),
    line(117, "verifier", {"kind": "EngineAnswered", "tokens": 4},
         {"kind": "Commit", "round": 1}, {"kind": "Verify", "round": 2, "base": 5, "tokens": 5}),
    line(118, "verifier", {"kind": "Committed"}, {"kind": "Publish", "message": "Verdict", "round": 1, "accepted": 3}),
    line(217, "verifier", {"kind": "EngineAnswered", "tokens": 2}, {"kind": "Commit", "round": 2}),
    line(219, "verifier", {"kind": "Committed"}, {"kind": "Publish", "message": "Verdict", "round": 2, "accepted": 1}),
    line(307, "verifier", {"kind": "Received", "message": "Block", "round": 3},
         {"kind": "Verify", "round": 3, "base": 7, "tokens": 5}),
)  # fmt: skip


@pytest.fixture
def timelines(tmp_path: Path) -> Path:
    folder = tmp_path / "timelines"
    folder.mkdir()
    (folder / "edge-1.jsonl").write_text("\n".join(EDGE))
    (folder / "verifier-2.jsonl").write_text("\n".join(VERIFIER))
    return folder


def test_a_round_is_split_into_its_stretches(timelines: Path) -> None:
    first, second, third = rounds.rounds_of(rounds.read(timelines)[SESSION])
    assert (first.followed_by, second.followed_by, third.followed_by) == ("forward", "block", "")
    assert first.stretches() == {"up": 27, "pass": 90, "commit": 1, "down": 27, "gap": 0}
    assert second.stretches() == {"up": 27, "pass": 100, "commit": 2, "down": 31, "draft": 30, "gap": 90}
    assert first.exits == {24: 65}
    assert first.hints == {24: 90}


def test_what_is_shown_are_medians_and_a_picture_of_each_kind(timelines: Path, tmp_path: Path) -> None:
    shown = rounds.write(tmp_path / "out", timelines)
    assert "| forward | 1 | 27.0 | 90.0 | 1.0 | 27.0 |  | 0.0 |" in shown
    assert "| block | 1 | 27.0 | 100.0 | 2.0 | 31.0 | 30.0 | 90.0 |" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "rounds.md", "round-forward.svg", "round-block.svg",
    }  # fmt: skip
    assert "90 ms" in (tmp_path / "out" / "round-block.svg").read_text()
