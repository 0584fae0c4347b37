"""The comparison's arithmetic: from answers to figures, ratios with their spread, a table, charts and `compare.json`.

Knows no socket, clock or process. Sums come before quotients: a figure "a token" is a sum over all answers of a run by
the sum of their tokens; times a token are the median and 95th percentile over answers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from loadtest.compare_clients import Answer
from training.charts import line_chart

RESAMPLES: Final = 2000
MS_PER_HOUR: Final = 3_600_000.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What one run holds fixed."""

    mode: str
    rtt_ms: float
    sessions: int
    policy: str
    gamma: int
    adaptive: bool
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """The answers of one mode to some prompts at a time (by their numbers), and what they cost.

    Bytes are payload, as the link's socket counted them, those of the prompt and of other questions apart
    (`bytes_opening`); `cpu_ms` is what the processes that hold the target computed.
    """

    prompts: tuple[int, ...]
    answers: tuple[Answer, ...]
    bytes_up: int
    bytes_down: int
    cpu_ms: float
    bytes_opening: int = 0


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of medians and where 95 % of its resampled values lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}–{self.high:.2f}]"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of them lie, interpolated."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def by_prompt(batches: Sequence[Batch]) -> dict[int, float]:
    """ms/token of each prompt, the mean where it was asked more than once; answers that came at once are left out."""
    found: dict[int, list[float]] = {}
    for batch in batches:
        for prompt, answer in zip(batch.prompts, batch.answers, strict=True):
            if (ms := answer.ms_per_token) is not None:
                found.setdefault(prompt, []).append(ms)
    return {prompt: statistics.fmean(times) for prompt, times in found.items()}


def ratio(own: Mapping[int, float], other: Mapping[int, float], *, seed: int = 0) -> Ratio | None:
    """Median of `own` by median of `other`, over the prompts of both; the spread resamples prompts, in pairs."""
    shared = sorted(set(own) & set(other))
    if not shared:
        return None
    random = Random(seed)

    def quotient(prompts: Sequence[int]) -> float:
        return statistics.median(own[n] for n in prompts) / statistics.median(other[n] for n in prompts)

    resampled = [quotient(random.choices(shared, k=len(shared))) for _ in range(RESAMPLES)]
    return Ratio(quotient(shared), percentile(resampled, 0.025), percentile(resampled, 0.975))


def differences(
    batches: Sequence[Batch], truth: Sequence[Sequence[int]], max_tokens: int
) -> list[dict[str, int]]:
    """Where answers are not the target's own: the prompt, and the first token (from 0) that is another."""
    found = []
    for batch in batches:
        for prompt, answer in zip(batch.prompts, batch.answers, strict=True):
            said = truth[prompt][:max_tokens]
            if answer.tokens != tuple(said):
                pairs = enumerate(zip(answer.tokens, said, strict=False))
                shorter = min(len(answer.tokens), len(said))
                first = next((n for n, (one, other) in pairs if one != other), shorter)
                found.append({"prompt": prompt, "token": first})
    return found


def figures(
    setting: Setting,
    batches: Sequence[Batch],
    truth: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    price: float,
) -> dict[str, Any]:
    """One entry of `runs` in compare.json. `price` is of an hour of the verifier."""
    answers = [answer for batch in batches for answer in batch.answers]
    times = sorted(by_prompt(batches).values())
    tokens = sum(len(answer.tokens) for answer in answers)

    def total(name: str) -> float:
        return float(sum(answer.usage.get(name, 0) for answer in answers))

    rounds, passes = total("rounds"), total("passes")
    foreseeable = total("hits") + total("late") + total("misses")
    cpu_ms = sum(batch.cpu_ms for batch in batches) / tokens
    after_prefill = tokens - len(answers)
    stock = not rounds and not total("drafted_in_all") and "rounds" not in answers[0].usage
    per_round = (
        after_prefill / passes
        if stock and passes
        else (after_prefill - total("floor_tokens")) / rounds
        if rounds
        else None
    )
    pass_ms = total("verify_ms") / rounds if rounds else None
    differing = differences(batches, truth, max_tokens)
    return {
        "mode": setting.mode,
        "rtt_ms": setting.rtt_ms,
        "sessions": setting.sessions,
        "policy": setting.policy,
        "gamma": setting.gamma,
        "adaptive": setting.adaptive,
        "synthetic": setting.synthetic,
        "answers": len(answers),
        "tokens": tokens,
        "ms_per_token": {
            "median": _rounded(statistics.median(times)) if times else None,
            "p95": _rounded(percentile(times, 0.95)) if times else None,
        },
        "ttft_ms": _rounded(statistics.median(answer.ttft_ms for answer in answers)),
        "tokens_per_round": _rounded(per_round),
        "pass_ms": _rounded(pass_ms),
        "limit_ms": _rounded(pass_ms / per_round if pass_ms and per_round else None),
        "hit_rate": {
            "guess": _rounded(total("hits_by_guess") / foreseeable) if foreseeable else None,
            "exit": _rounded(total("hits_by_exit") / foreseeable) if foreseeable else None,
            "forward": _rounded(total("taken") / foreseeable) if foreseeable else None,
            "late": _rounded(total("late") / foreseeable) if foreseeable else None,
        },
        "floor_share": _rounded(total("floor_tokens") / tokens),
        "passes_per_token": _rounded(passes / tokens),
        "acceptance": _rounded(total("accepted") / total("drafted")) if total("drafted") else None,
        "wasted_draft_tokens_per_token": _rounded((total("drafted_in_all") - total("accepted")) / tokens),
        "wasted_verify_tokens_per_token": _rounded((total("drafted") - total("accepted")) / tokens),
        "forwards_per_token": _rounded(total("forwards") / tokens),
        "uplink_bytes_per_token": _rounded(sum(batch.bytes_up for batch in batches) / tokens),
        "downlink_bytes_per_token": _rounded(sum(batch.bytes_down for batch in batches) / tokens),
        "opening_bytes_per_token": _rounded(sum(batch.bytes_opening for batch in batches) / tokens),
        "verifier_ms_per_token": _rounded(cpu_ms),
        "cost_per_million_tokens": _rounded(cpu_ms / MS_PER_HOUR * price * 1e6),
        "equal_to_target": not differing,
        "differences": differing,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


COLUMNS: Final = (
    ("mode", "mode"),
    ("rtt_ms", "RTT"),
    ("sessions", "sess."),
    ("median", "ms/token"),
    ("p95", "p95"),
    ("limit_ms", "limit"),
    ("vs", "× ar"),
    ("vs_sync", "× sync"),
    ("ttft_ms", "TTFT"),
    ("tokens_per_round", "tok/round"),
    ("pass_ms", "pass"),
    ("guess", "guess"),
    ("exit", "exit"),
    ("forward", "fwd"),
    ("floor_share", "floor"),
    ("passes_per_token", "pass/tok"),
    ("acceptance", "acc."),
    ("wasted_draft_tokens_per_token", "waste"),
    ("uplink_bytes_per_token", "up B"),
    ("downlink_bytes_per_token", "down B"),
    ("opening_bytes_per_token", "open B"),
    ("verifier_ms_per_token", "busy"),
    ("cost_per_million_tokens", "cost/M"),
    ("equal", "equal"),
)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs as a table in Markdown. Ratios are of ms/token, below 1 is faster."""
    rows = [[title for _, title in COLUMNS], ["---"] * len(COLUMNS)]
    rows += [[_cell(run, name) for name, _ in COLUMNS] for run in runs]
    widths = [max(len(row[n]) for row in rows) for n in range(len(COLUMNS))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def _cell(run: Mapping[str, Any], name: str) -> str:
    if name in ("vs", "vs_sync"):
        found = run["ratio_to"].get("ar" if name == "vs" else "sync")
        return "" if found is None else f"{found['value']:.2f} [{found['low']:.2f}–{found['high']:.2f}]"
    if name == "equal":
        return "yes" if run["equal_to_target"] else f"no: {len(run['differences'])} of {run['answers']}"
    value = {**run, **run["ms_per_token"], **run["hit_rate"]}[name]
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def charts(directory: Path, runs: Sequence[Mapping[str, Any]]) -> list[Path]:
    """ms/token against the round trip, a chart for each number of sessions that saw more than one; what was written."""
    written = []
    for sessions in sorted({run["sessions"] for run in runs}):
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            if run["sessions"] == sessions and run["ms_per_token"]["median"] is not None:
                lines.setdefault(run["mode"], []).append((run["rtt_ms"], run["ms_per_token"]["median"]))
        lines = {mode: sorted(points) for mode, points in lines.items()}
        if len({x for points in lines.values() for x, _ in points}) > 1:
            path = directory / f"ms-per-token-{sessions}.svg"
            noun = "session" if sessions == 1 else "sessions"
            line_chart(path, f"{sessions} {noun}", "round trip, ms", "ms/token (median)", lines)
            written.append(path)
    return written
