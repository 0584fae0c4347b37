"""The figures of `scripts/bench sampling` as a table and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from training.charts import line_chart

Figures = Mapping[str, Any]


def as_markdown(found: Figures) -> str:
    """The tables."""
    options = found["options"]
    families = ["all", *sorted(name for name in found["rows"] if name != "all")]
    parts = [
        f"{found['prompts']} prompts, {options['count']} of each family, answers of {options['most_tokens']} tokens at "
        f"temperature {options['temperature']}, top_p {options['top_p']}. Acceptance is that of a token that is tested.",
        "",
        "## Rounds of five drafted tokens",
        "",
        _table(
            ["", *families],
            [
                [f"{what}, {way}", *(form.format(tallies[family][name]) for family in families)]
                for what, name, form in (
                    ("tokens a round", "tokens_per_round", "{:.2f}"),
                    ("acceptance", "acceptance", "{:.3f}"),
                    ("tokens in a row of q", "tokens_per_row", "{:.1f}"),
                    ("bits of q a drafted token", "q_bits_per_drafted", "{:.1f}"),
                    ("bytes of q a committed token", "q_bytes_per_committed", "{:.1f}"),
                    ("bytes of frames a committed token", "frame_bytes_per_committed", "{:.1f}"),
                )
                for way, tallies in found["rounds"].items()
                if way != "keyed" or name in ("tokens_per_round", "acceptance", "frame_bytes_per_committed")
            ],
        ),
        "",
        "## The next token, on the same rows",
        "",
        _table(
            ["", *families],
            [
                [what, *(form.format(found["rows"][family][name]) for family in families)]
                for what, name, form in (
                    ("rows", "rows", "{}"),
                    ("keyed mode", "keyed", "{:.3f}"),
                    ("ratio mode, all of q (1 - TV)", "ratio", "{:.3f}"),
                    ("ratio mode, conformal", "ratio_conformal", "{:.3f}"),
                    ("(1 - TV) / (1 + TV)", "keyed_bound", "{:.3f}"),
                    ("keyed / ratio", "keyed_by_ratio", "{:.3f}"),
                    ("keyed / conformal", "keyed_by_conformal", "{:.3f}"),
                    ("bits of q a row, conformal", "bits_per_row", "{:.1f}"),
                )
            ],
        ),
        "",
        "## What acceptance costs",
        "",
        _prices("tokens a row, fixed", "count", found["prices"]["fixed"]),
        "",
        _prices("dropped on average, conformal", "target", found["prices"]["conformal"]),
        "",
        _table(
            ["acceptance", "bits a row, fixed", "bits a row, conformal"],
            [
                [f"{acceptance:.3f}", f"{fixed:.1f}", f"{conformal:.1f}"]
                for acceptance, fixed, conformal in found["at_equal_acceptance"]
            ],
        ),
        "",
        _prices("bits of a share, conformal", "bits", found["prices"]["share_bits"]),
        "",
    ]
    return "\n".join(parts)


def draw_chart(path: Path, found: Figures) -> None:
    """Bits against acceptance, for both ways to choose q."""
    lines = {
        name: [(each["bits_per_row"], each["acceptance"]) for each in found["prices"][name]]
        for name in ("fixed", "conformal")
    }
    title = "what acceptance costs"
    line_chart(path, title, "bits a drafted token", "acceptance", lines, from_zero=False)


def equal_acceptance(
    fixed: Sequence[Figures], conformal: Sequence[Figures]
) -> list[tuple[float, float, float]]:
    """For the acceptance of each fixed count within the conformal ones' range: its bits, and the conformal choice's
    between its two nearest."""
    curve = sorted((each["acceptance"], each["bits_per_row"]) for each in conformal)
    found = []
    for each in fixed:
        acceptance = each["acceptance"]
        for (low, low_bits), (high, high_bits) in pairwise(curve):
            if low <= acceptance <= high and high > low:
                share = (acceptance - low) / (high - low)
                found.append((acceptance, each["bits_per_row"], low_bits + share * (high_bits - low_bits)))
                break
    return found


def _prices(what: str, key: str, prices: Sequence[Figures]) -> str:
    rows = (
        ("acceptance", "acceptance", "{:.3f}"),
        ("tokens in a row", "tokens_per_row", "{:.1f}"),
        ("bits a row", "bits_per_row", "{:.1f}"),
        ("dropped", "dropped", "{:.4f}"),
    )
    return _table(
        [what, *(str(each[key]) for each in prices)],
        [[name, *(form.format(each[field]) for each in prices)] for name, field, form in rows],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
