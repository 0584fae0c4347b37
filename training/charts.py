"""Charts as plain SVG: enough for the figures that an evaluation or a benchmark shows, with no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

COLOURS: Final = ("#1f6feb", "#d29922", "#2da44e", "#cf222e", "#8250df", "#57606a")
WIDTH: Final = 560
HEIGHT: Final = 340
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 40, 48
SPAN_ROW: Final = 22
SPAN_LEFT, SPAN_RIGHT, SPAN_TOP, SPAN_BOTTOM = 150, 130, 46, 28
TICKS: Final = 8
"""Marks of a time axis, about."""

Points = Sequence[tuple[float, float]]


def line_chart(
    path: Path, title: str, across: str, up: str, lines: Mapping[str, Points], *, from_zero: bool = True
) -> None:
    """Writes one chart: named lines of (x, y) points, with axes labelled `across` and `up`."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low = 0.0 if from_zero else min(y for _, y in points)
    high = max(y for _, y in points) * 1.05 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - left) / ((right - left) or 1) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(across)}</text>',
        f'<text x="14" y="{HEIGHT / 2:.0f}" transform="rotate(-90 14 {HEIGHT / 2:.0f})" text-anchor="middle">'
        f"{escape(up)}</text>",
    ]
    for step in range(5):
        y = low + (high - low) * step / 4
        x_at, y_at = place(left, y)
        parts.append(
            f'<line x1="{x_at}" x2="{WIDTH - RIGHT}" y1="{y_at:.1f}" y2="{y_at:.1f}" stroke="#d0d7de"/>'
            f'<text x="{x_at - 6}" y="{y_at + 4:.1f}" text-anchor="end">{y:.2g}</text>'
        )
    for x in sorted({x for x, _ in points})[:12]:
        x_at, y_at = place(x, low)
        parts.append(f'<text x="{x_at:.1f}" y="{y_at + 16:.1f}" text-anchor="middle">{x:g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{TOP + 16 * number + 10}" fill="{colour}">{escape(name)}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Span:
    """A bar of a chart of times: from `start` to `end` in ms, with its name before and a note after it."""

    name: str
    start: float
    end: float
    colour: str
    note: str = ""


def span_chart(
    path: Path, title: str, spans: Sequence[Span], *, last: float | None = None, width: int = 900
) -> None:
    """Writes one chart: bars one below the other on a time axis from 0 to `last` ms, by default the end of the latest."""
    last = last or max((span.end for span in spans), default=0.0) or 1.0
    scale = (width - SPAN_LEFT - SPAN_RIGHT) / last
    height = SPAN_TOP + SPAN_ROW * len(spans) + SPAN_BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/><text x="10" y="22" font-size="14">{escape(title)}'
        "</text>"
    ]
    step = tick(last / TICKS)
    for number in range(int(last / step) + 1):
        x = SPAN_LEFT + number * step * scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{SPAN_TOP - 6}" y2="{height - 22}" stroke="#eaeef2"/>'
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{number * step:g}</text>'
        )
    for place, span in enumerate(spans):
        y = SPAN_TOP + SPAN_ROW * place
        x, long = SPAN_LEFT + span.start * scale, max(2.0, (span.end - span.start) * scale)
        parts.append(
            f'<text x="{SPAN_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(span.name)}</text>'
            f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="{SPAN_ROW - 6}" fill="{span.colour}"/>'
            f'<text x="{x + long + 4:.1f}" y="{y + 13}" fill="#57606a">{escape(span.note)}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def tick(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, … and their tenths, hundredths, … that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))
