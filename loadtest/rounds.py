"""Where the time of a round goes, from the timelines that gateways and verifiers wrote (`shared.timeline`).

`scripts/bench compare --timeline` writes `rounds.md` (medians of each stretch, by how the next pass came about) and a
picture of one typical round of each kind. A round is followed at once by a *forward* that was in place, later by a
*block*, or meanwhile by the *floor*:

    up      from sending to the verifier having it (a forward may wait there for its turn)
    pass    the engine's pass, as the verifier sees it
    commit  compare and append in Redis, and handing the verdict to the broker
    down    the verdict's way back to the edge
    gap     from the end of the pass to the start of the session's next one: what speculation did not hide
    draft   from the verdict's arrival to sending the next block, where there was no forward
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from training.charts import Span, span_chart

STRETCHES: Final = ("up", "pass", "commit", "down", "draft", "gap")
KINDS: Final = ("forward", "block", "floor")

Line = Mapping[str, Any]


@dataclass(slots=True)
class Round:
    """One verified round; times in ms on the machine's clock, None where the timelines don't hold them."""

    session: str
    number: int
    rows: int
    began: float
    sent: float | None = None
    received: float | None = None
    ended: float | None = None
    committed: float | None = None
    arrived: float | None = None
    answered: float | None = None
    """When the edge sent the next block."""
    next_began: float | None = None
    followed_by: str = ""
    exits: dict[int, float] = field(default_factory=dict)
    hints: dict[int, float] = field(default_factory=dict)
    accepted: int = 0

    def stretches(self) -> dict[str, float]:
        """The lengths of its stretches, ms, as far as they are known."""
        edges = {
            "up": (self.sent, self.received),
            "pass": (self.began, self.ended),
            "commit": (self.ended, self.committed),
            "down": (self.committed, self.arrived),
            "draft": (self.arrived, self.answered if self.followed_by != "forward" else None),
            "gap": (self.ended, self.next_began),
        }
        return {
            name: end - start
            for name, (start, end) in edges.items()
            if start is not None and end is not None and end >= start
        }


def read(folder: Path) -> dict[str, list[Line]]:
    """The lines of all timelines in `folder`, in order, by session."""
    found: dict[str, list[Line]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            found[line["session"]].append(line)
    return {session: sorted(lines, key=lambda line: line["ms"]) for session, lines in found.items()}


def rounds_of(lines: Sequence[Line]) -> list[Round]:
    """The verified rounds of one session."""
    found: dict[int, Round] = {}
    sent: dict[int, float] = {}
    received: dict[int, float] = {}
    running: Round | None = None
    waiting: Round | None = None  # its pass has ended, and the next one has not begun
    heard: Round | None = None  # its verdict has reached the edge, and no block has gone up since
    for line in lines:
        event, now = line["event"], float(line["ms"])
        if line["side"] == "edge":
            told = found.get(event.get("round", -1))
            if event["kind"] == "HintArrived" and told is not None:
                told.hints.setdefault(event["layer"], now)
            if event["kind"] == "VerdictArrived" and told is not None:
                told.arrived, heard = now, told
            for action in line["actions"]:
                if action["kind"] in ("SendBlock", "SendForward"):
                    sent.setdefault(action["round"], now)
                if action["kind"] == "SendBlock" and heard is not None:
                    heard.answered, heard = now, None
            continue
        if event["kind"] == "Received" and event.get("message") in ("Block", "Forward"):
            received.setdefault(event["round"], now)
        if event["kind"] == "ExitSeen" and running is not None:
            running.exits.setdefault(event["layer"], now)
        if event["kind"] == "EngineAnswered":
            if running is not None:
                running.ended, waiting = now, running
            running = None
        for action in line["actions"]:
            if action["kind"] == "Verify":
                number = action["round"]
                if waiting is not None:
                    waiting.next_began = now
                    at_once = event["kind"] == "EngineAnswered"
                    waiting.followed_by = "floor" if number < 0 else "forward" if at_once else "block"
                    waiting = None
                running = None
                if number >= 0:
                    running = found[number] = Round(line["session"], number, 1 + action["tokens"], now)
                    running.sent, running.received = sent.get(number), received.get(number)
            if action["kind"] == "Publish" and action.get("message") == "Verdict":
                told = found.get(action["round"])
                if told is not None:
                    told.committed, told.accepted = now, action["accepted"]
    return list(found.values())


def medians(rounds: Iterable[Round]) -> dict[str, dict[str, float]]:
    """By how the next pass came about: how many rounds, and the median of each stretch, ms."""
    by_kind: dict[str, list[Round]] = defaultdict(list)
    for each in rounds:
        if each.followed_by:
            by_kind[each.followed_by].append(each)
    found = {}
    for kind in KINDS:
        if not by_kind[kind]:
            continue
        lengths = [each.stretches() for each in by_kind[kind]]
        found[kind] = {"rounds": float(len(lengths))} | {
            name: statistics.median(held)
            for name in STRETCHES
            if (held := [length[name] for length in lengths if name in length])
        }
    return found


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The medians as Markdown."""
    lines = [
        "| next pass by | rounds | " + " | ".join(STRETCHES) + " |",
        "| --- " * (len(STRETCHES) + 2) + "|",
    ]
    for kind, held in found.items():
        cells = [f"{held[name]:.1f}" if name in held else "" for name in STRETCHES]
        lines.append(f"| {kind} | {held['rounds']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def typical(rounds: Iterable[Round], kind: str) -> Round | None:
    """The round of the median length, from the start of its pass to the start of the next one."""
    whole = [
        each
        for each in rounds
        if each.followed_by == kind and None not in (each.sent, each.arrived, each.next_began)
    ]
    whole.sort(key=lambda each: (each.next_began or 0.0) - each.began)
    return whole[len(whole) // 2] if whole else None


# --- a picture ----------------------------------------------------------------------------------------------------


def draw(path: Path, title: str, shown: Round, lines: Sequence[Line]) -> None:
    """One round as an SVG: the edge's lanes, the link, the verifier's passes."""
    assert shown.sent is not None and shown.next_began is not None and shown.arrived is not None
    first = shown.sent - 5.0
    last = max(shown.next_began, shown.arrived, shown.answered or 0.0) + 15.0
    spans: list[Span] = []

    def add(name: str, start: float, end: float, colour: str, note: str = "") -> None:
        spans.append(Span(name, max(start, first) - first, min(end, last) - first, colour, note))

    for number, ((start, end), kept) in enumerate(_lanes(lines, first, last)):
        add(f"lane {number + 1}", start, end, "#2da44e" if kept else "#d0d7de")
    if shown.received is not None:
        add("link up", shown.sent, shown.received, "#8250df")
    if shown.ended is not None:
        add("pass", shown.began, shown.ended, "#1f6feb", f"{shown.rows} rows")
    for layer, seen in sorted(shown.exits.items()):
        add(f"hint of {layer}", seen, shown.hints.get(layer, seen), "#d29922")
    if shown.committed is not None and shown.ended is not None:
        add("commit", shown.ended, shown.committed, "#57606a")
        add("link down", shown.committed, shown.arrived, "#8250df")
    if shown.ended is not None:
        add("gap", shown.ended, shown.next_began, "#cf222e", f"{shown.next_began - shown.ended:.0f} ms")
    span_chart(path, title, spans, last=last - first)


def _lanes(lines: Sequence[Line], first: float, last: float) -> list[tuple[tuple[float, float], bool]]:
    """The drafts between `first` and `last`, and whether each was finished; of many, the longest."""
    began: dict[int, float] = {}
    found: list[tuple[tuple[float, float], bool]] = []
    for line in lines:
        if line["side"] != "edge":
            continue
        now = float(line["ms"])
        if (
            line["event"]["kind"] == "Drafted"
            and (start := began.pop(line["event"]["lane"], None)) is not None
        ):
            found.append(((start, now), True))
        for action in line["actions"]:
            if action["kind"] == "StartDraft":
                began[action["lane"]] = now
            if action["kind"] == "DropDraft" and (start := began.pop(action["lane"], None)) is not None:
                found.append(((start, now), False))
    seen = [each for each in found if each[0][1] > first and each[0][0] < last]
    seen.sort(key=lambda each: each[0][0] - each[0][1])
    return sorted(seen[:8])


def write(directory: Path, timelines: Path) -> str:
    """`rounds.md` and the pictures, of the sessions that forwarded; the table."""
    sessions = {
        session: lines
        for session, lines in read(timelines).items()
        if any(action["kind"] == "SendForward" for line in lines for action in line["actions"])
    }
    rounds = [each for lines in sessions.values() for each in rounds_of(lines)]
    shown = table(medians(rounds))
    directory.mkdir(parents=True, exist_ok=True)
    told = [shown]
    for kind in KINDS:
        chosen = typical(rounds, kind)
        if chosen is not None:
            name = f"round-{kind}.svg"
            title = f"A round of {chosen.rows} rows, {chosen.accepted} accepted; the next pass by {kind} (ms)"
            draw(directory / name, title, chosen, sessions[chosen.session])
            told.append(f"![{kind}]({name})")
    (directory / "rounds.md").write_text("\n\n".join(told) + "\n", encoding="utf-8")
    return shown
