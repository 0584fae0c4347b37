"""The figures of the engine's benchmark: from steps to rows, ratios, `engine.json`, a table, and a picture of one step.

Knows no engine and no clock. Medians and 90th percentiles are over all steps of a row that count; `spread` is the lowest and
the highest median of a turn (some steps of one mode in a row, between turns of the others). Times are ms from the beginning
of a step.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from training.charts import COLOURS, Span, span_chart

SETTLING: Final = 1
"""Steps at the beginning of a turn that don't count: they pay for the change of the engine."""
SHOWN_SESSIONS: Final = 16
"""The picture is of a step with so many, where they were measured."""


@dataclass(slots=True)
class Step:
    """One engine step. What is None is not known of it."""

    turn: int
    ms: float
    tokens: int = 0
    """Said by all sessions together."""
    submit_ms: float = 0.0
    """Handing in the blocks, before it."""
    launched_ms: float | None = None
    """When the forward had been handed to the device; on a CPU, when it began."""
    launch_ms: float = 0.0
    """How long handing it over took; the work before the launch was done by then."""
    forward_from_ms: float | None = None
    forward_ms: float | None = None
    """How long it ran, on the device where there is one."""
    sampled_ms: float | None = None
    """When the sampled tokens were on the host; of vLLM as it comes, when its worker had returned."""
    exits_ms: dict[int, float] = field(default_factory=dict)
    """When what the exit after a layer foresees was on the host, as hints."""
    heard_ms: dict[int, float] = field(default_factory=dict)
    """When another process, or thread, had heard them."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The steps of one mode with so many sessions, and how its tokens compare with those of vLLM as it comes.

    `differences` are (session, first token that is another) of each stream that isn't the same; `compared` counts streams.
    """

    mode: str
    sessions: int
    steps: Sequence[Step]
    compared: int = 0
    differences: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run holds fixed. `facts` are kept as they are: dtype, commit, date, versions and so on."""

    device: str
    shapes: str
    k: int
    exits: Sequence[int]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a ratio may be at most, by the number of sessions; of others it says nothing."""

    at_most: Mapping[int, float]

    def of(self, sessions: int) -> float | None:
        """The bound for so many sessions."""
        return self.at_most.get(sessions)


RATIOS: Final[Mapping[str, tuple[str, str, Bound]]] = {
    "verify with exits ÷ verify without": (
        "verify_exits",
        "verify",
        Bound({1: 1.04, 4: 1.04, 16: 1.04, 64: 1.04}),
    ),
    "verify with exits ÷ stock AR": ("verify_exits", "stock_ar", Bound({1: 1.12, 4: 1.15, 16: 1.20})),
    "floor ÷ stock AR": ("floor", "stock_ar", Bound({1: 1.10, 4: 1.10, 16: 1.10, 64: 1.10})),
    "verify with exits ÷ stock AR, vLLM's default scheduling": ("verify_exits", "stock_ar_async", Bound({})),
}
"""Ratios of median steps: which, by which, and what is asked of them, in the setting `ASKED`."""
ASKED: Final = {"shapes": "llama-2-7b", "dtype": "bfloat16", "k": 5, "exits": 3}
EXIT_SHARES: Final = (0.27, 0.50, 0.72)
"""The share of a step after which the first, second and third exit have to be on the host, at most."""
HOST_MS: Final = (16, 1.0)
"""Work before the launch and after sampling together: with so many sessions, at most so many ms."""


# --- figures ------------------------------------------------------------------------------------------------------


def counted(steps: Iterable[Step]) -> list[Step]:
    """The steps that count: all of a turn but the first; all, where a turn has no more."""
    return [step for own in _by_turn(steps).values() for step in own[SETTLING:] or own]


def _by_turn(steps: Iterable[Step]) -> dict[int, list[Step]]:
    found: dict[int, list[Step]] = defaultdict(list)
    for step in steps:
        found[step.turn].append(step)
    return found


def _turn_medians(steps: Iterable[Step]) -> dict[int, float]:
    return {
        turn: statistics.median(step.ms for step in own[SETTLING:] or own)
        for turn, own in _by_turn(steps).items()
    }


def percentile_90(values: Sequence[float]) -> float:
    """The value below which nine tenths of them lie, interpolated."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=10, method="inclusive")[8]


def row(measured: Measured) -> dict[str, Any]:
    """A row of `engine.json`."""
    steps = counted(measured.steps)
    times = [step.ms for step in steps]
    medians = _turn_medians(measured.steps).values()
    tokens = statistics.fmean(step.tokens for step in steps)
    found: dict[str, Any] = {
        "mode": measured.mode,
        "sessions": measured.sessions,
        "step_ms": {
            "median": _rounded(statistics.median(times)),
            "p90": _rounded(percentile_90(times)),
            "spread": [_rounded(min(medians)), _rounded(max(medians))],
        },
        "steps": len(times),
        "tokens_per_step": _rounded(tokens / measured.sessions),
        "tokens_per_s": round(1000 * tokens / statistics.fmean(times), 1),
        "exit_on_host_ms": _arrivals(step.exits_ms for step in steps),
        "exit_heard_ms": _arrivals(step.heard_ms for step in steps),
        "submit_ms": _rounded(statistics.median(step.submit_ms for step in steps)),
        "compared": measured.compared,
        "differences": [{"session": session, "token": token} for session, token in measured.differences],
    }
    before = _known(
        steps, lambda step: None if step.launched_ms is None else step.launched_ms - step.launch_ms
    )
    after = _known(steps, lambda step: None if step.sampled_ms is None else step.ms - step.sampled_ms)
    if before is not None and after is not None:
        launch = _known(steps, lambda step: step.launch_ms) or 0.0
        found["host_ms"] = {
            "before_launch": _rounded(before),
            "launch": _rounded(launch),
            "after_sampling": _rounded(after),
        }
    if (forward := _known(steps, lambda step: step.forward_ms)) is not None:
        found["forward_ms"] = _rounded(forward)
    return found


def _arrivals(steps: Iterable[Mapping[int, float]]) -> dict[str, float]:
    """The median by layer."""
    found: dict[int, list[float]] = defaultdict(list)
    for arrivals in steps:
        for layer, arrived in arrivals.items():
            found[layer].append(arrived)
    return {str(layer): _rounded(statistics.median(arrived)) for layer, arrived in sorted(found.items())}


def _known(steps: Iterable[Step], value: Callable[[Step], float | None]) -> float | None:
    """The median of what is known of steps; None where nothing is."""
    found = [known for step in steps if (known := value(step)) is not None]
    return statistics.median(found) if found else None


def _rounded(value: float) -> float:
    return round(value, 3)


def ratios(measured: Sequence[Measured], *, asked: bool = True) -> list[dict[str, Any]]:
    """What is asked of the engine, as far as it was measured: each ratio with its spread over turns, and its bound where
    the setting is the one that it is `asked` of."""
    by_name = {(own.mode, own.sessions): own for own in measured}
    counts = sorted({own.sessions for own in measured})
    found: list[dict[str, Any]] = []
    for name, (upper, lower, bound) in RATIOS.items():
        for sessions in counts:
            above, below = by_name.get((upper, sessions)), by_name.get((lower, sessions))
            if above is not None and below is not None:
                found.append(_ratio(name, above, below, bound.of(sessions)))
    for sessions in counts:
        own = by_name.get(("verify_exits", sessions))
        if own is not None:
            found.extend(_exit_shares(own))
            found.extend(_host(own))
    return found if asked else [each | {"at_most": None, "holds": None} for each in found]


def _judged(name: str, sessions: int, value: float, bound: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "sessions": sessions,
        "value": _rounded(value),
        "at_most": bound,
        "holds": None if bound is None else value <= bound,
    }


def _ratio(name: str, above: Measured, below: Measured, bound: float | None) -> dict[str, Any]:
    value = statistics.median(step.ms for step in counted(above.steps)) / statistics.median(
        step.ms for step in counted(below.steps)
    )
    one, other = _turn_medians(above.steps), _turn_medians(below.steps)
    by_turn = [one[turn] / other[turn] for turn in one.keys() & other.keys()]
    spread = [_rounded(min(by_turn)), _rounded(max(by_turn))] if by_turn else []
    return _judged(name, above.sessions, value, bound) | {"spread": spread}


def _exit_shares(own: Measured) -> list[dict[str, Any]]:
    """After which share of its step each exit was on the host, the median."""
    shares: dict[int, list[float]] = defaultdict(list)
    for step in counted(own.steps):
        for layer, arrived in step.exits_ms.items():
            shares[layer].append(arrived / step.ms)
    bounds = EXIT_SHARES if len(shares) == len(EXIT_SHARES) else [None] * len(shares)
    return [
        _judged(f"exit after layer {layer} on the host ÷ step", own.sessions, statistics.median(found), bound)
        for (layer, found), bound in zip(sorted(shares.items()), bounds, strict=True)
    ]


def _host(own: Measured) -> list[dict[str, Any]]:
    host = [
        step.launched_ms - step.launch_ms + step.ms - step.sampled_ms
        for step in counted(own.steps)
        if step.launched_ms is not None and step.sampled_ms is not None
    ]
    if not host:
        return []
    sessions, bound = HOST_MS
    name = "host before launch and after sampling, ms"
    asked = bound if own.sessions <= sessions else None
    return [_judged(name, own.sessions, statistics.median(host), asked)]


def report(setting: Setting, measured: Sequence[Measured]) -> dict[str, Any]:
    """What `engine.json` holds."""
    return {
        "device": setting.device,
        "shapes": setting.shapes,
        "k": setting.k,
        "exits": list(setting.exits),
        **setting.facts,
        "rows": [row(own) for own in measured],
        "ratios": ratios(measured, asked=_is_asked(setting)),
    }


def _is_asked(setting: Setting) -> bool:
    """Whether it is the setting that bounds are given for, on whichever GPU."""
    own = {"shapes": setting.shapes, "k": setting.k, "exits": len(setting.exits)}
    return own | {"dtype": setting.facts.get("dtype")} == ASKED


# --- for a reader -------------------------------------------------------------------------------------------------


def table(held: Mapping[str, Any]) -> str:
    """`engine.md`: a report as tables."""
    exits = [str(layer) for layer in held["exits"]]
    described = f"{held['shapes']}, {held.get('dtype', '?')}, K = {held['k']}, on {held['device']}"
    heading = ["mode", "sessions", "step ms", "p90", "spread", "tokens a step", "tokens a s"]
    heading += [f"exit {layer} ms" for layer in exits]
    heading += ["forward ms", "host before + launch + after ms", "other streams"]
    lines = [f"# Engine steps: {described}", "", _line(heading), _line(["---"] * len(heading))]
    for own in held["rows"]:
        step, host = own["step_ms"], own.get("host_ms")
        cells = [own["mode"], str(own["sessions"]), f"{step['median']:.2f}", f"{step['p90']:.2f}"]
        cells += ["–".join(f"{edge:.2f}" for edge in step["spread"]), f"{own['tokens_per_step']:.2f}"]
        cells += [f"{own['tokens_per_s']:.0f}"]
        cells += [_shown(own["exit_on_host_ms"].get(layer)) for layer in exits]
        cells += [_shown(own.get("forward_ms"))]
        cells += [" + ".join(f"{spent:.2f}" for spent in host.values()) if host else ""]
        cells += [f"{len(own['differences'])} of {own['compared']}"]
        lines.append(_line(cells))
    lines += ["", _line(["ratio", "sessions", "is", "over turns", "asked", ""]), _line(["---"] * 6)]
    for own in held["ratios"]:
        spread = "–".join(f"{edge:.3f}" for edge in own.get("spread", ()))
        asked = "" if own["at_most"] is None else f"≤ {own['at_most']:g}"
        holds = {None: "", True: "holds", False: "does not hold"}[own["holds"]]
        lines.append(_line([own["name"], str(own["sessions"]), f"{own['value']:.3f}", spread, asked, holds]))
    lines += [
        "",
        "Bounds are asked of an H100, with the shapes of Llama-2-7B in bfloat16, three exits and K = 5.",
    ]
    lines += [f"\n{note}" for note in held.get("notes", ())]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# --- a picture ----------------------------------------------------------------------------------------------------


def shown_step(measured: Sequence[Measured]) -> tuple[int, Step] | None:
    """The step of the median length of `verify_exits`, and its number of sessions: `SHOWN_SESSIONS`, else the most."""
    found = {own.sessions: own for own in measured if own.mode == "verify_exits"}
    if not found:
        return None
    sessions = SHOWN_SESSIONS if SHOWN_SESSIONS in found else max(found)
    steps = counted(found[sessions].steps)
    whole = [step for step in steps if step.exits_ms and step.launched_ms is not None] or steps
    whole.sort(key=lambda step: step.ms)
    return sessions, whole[len(whole) // 2]


def draw(path: Path, title: str, step: Step) -> None:
    """One step: the host's work, the device's, and when the exits' hints arrived."""
    blue, yellow, green, _, violet, grey = COLOURS
    spans: list[Span] = []
    forward_end = None
    if step.launched_ms is not None:
        spans.append(Span("host before launch", 0.0, step.launched_ms, grey, _ms(step.launched_ms)))
    if step.forward_from_ms is not None and step.forward_ms is not None:
        forward_end = step.forward_from_ms + step.forward_ms
        spans.append(Span("forward", step.forward_from_ms, forward_end, blue, _ms(step.forward_ms)))
    for layer, arrived in sorted(step.exits_ms.items()):
        spans.append(Span(f"exit after {layer}", arrived, arrived, yellow, f"on the host at {arrived:.2f}"))
    if step.sampled_ms is not None:
        began = step.launched_ms or 0.0 if forward_end is None else min(forward_end, step.sampled_ms)
        name = "sampling" if forward_end is not None else "forward and sampling"
        spans.append(Span(name, began, step.sampled_ms, green, _ms(step.sampled_ms - began)))
        spans.append(Span("host after", step.sampled_ms, step.ms, grey, _ms(step.ms - step.sampled_ms)))
    spans.append(Span("step", 0.0, step.ms, violet, _ms(step.ms)))
    span_chart(path, title, spans)


def _ms(value: float) -> str:
    return f"{value:.2f} ms"
