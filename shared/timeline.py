"""Where the time of a round goes: what a process's sessions were told and what they did about it, line by line.

Off unless `OUTRIDER_TIMELINE` names a folder. Then each process appends to a file of its own there, one JSON object for
every event that a session's core was handed:

    {"ms": 1234.5, "side": "edge", "session": "...", "event": {"kind": "VerdictArrived", "round": 3, ...}, "actions": [...]}

`ms` are those of the machine's monotonic clock, which all processes of a machine share. Of events and actions their small
numbers are kept (round, base, lane, ...) and how many tokens they hold, never the tokens: a timeline holds nobody's text.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

NUMBERS: Final = ("round", "base", "parent", "accepted", "lane", "length", "layer", "taken", "rows")

_lines = logging.getLogger("outrider.timeline")
_lines.propagate = False
_lines.setLevel(logging.CRITICAL)


def start(folder: str, process: str) -> None:
    """Write to a file of this process in `folder` from now on; nothing happens when `folder` is empty."""
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(Path(folder) / f"{process}-{os.getpid()}.jsonl")
    handler.setFormatter(logging.Formatter("%(message)s"))
    _lines.addHandler(handler)
    _lines.setLevel(logging.INFO)


def note(side: str, session: str, now_ms: float, event: object, actions: Sequence[object]) -> None:
    """Write down what the core of a session was handed and what it did."""
    if not _lines.isEnabledFor(logging.INFO):
        return
    line = {
        "ms": round(now_ms, 3),
        "side": side,
        "session": session,
        "event": _brief(event),
        "actions": [_brief(action) for action in actions],
    }
    _lines.info("%s", json.dumps(line, separators=(",", ":")))


def _brief(thing: object) -> dict[str, Any]:
    """The kind of an event or action, or of the message in it, and its numbers."""
    fields = (
        (getattr(thing, field.name) for field in dataclasses.fields(thing))
        if dataclasses.is_dataclass(thing)
        else ()
    )
    told: object = next((value for value in fields if isinstance(value, BaseModel)), thing)
    found: dict[str, Any] = {"kind": type(thing).__name__}
    if told is not thing:
        found["message"] = type(told).__name__
    for name in NUMBERS:
        value = getattr(told, name, None)
        if isinstance(value, int):
            found[name] = value
    tokens = getattr(told, "tokens", None)
    if tokens is not None:
        found["tokens"] = len(tokens)
    return found
