"""`scripts/gpu run`: every figure of a GPU machine, one part after the other, whatever becomes of the ones before.

    engine   steps of vLLM and of ours side by side, in the shapes of Llama-2-7B and Llama-3-8B    DIR/engine-<shapes>/
    exact    every answer on real weights equal to what vLLM says by itself; exits in graphs and eagerly    DIR/exact/
    system   brokers, services, a replayed draft behind a delaying proxy, beside vLLM as it comes    DIR/system/

Each part's output goes to DIR/<part>.log and to the terminal as well. DIR/run.json says what ran, for how long, and with
which status; the exit status is 1 when any part failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from shared.errors import InvalidRequest

ROOT: Final = Path(__file__).resolve().parents[2]
ENGINE: Final = "engine"
EXACT: Final = "exact"
SYSTEM: Final = "system"
GROUPS: Final = (ENGINE, EXACT, SYSTEM)
SHAPES: Final = ("llama-2-7b", "llama-3-8b")
EXITS: Final = "0.25,0.5,0.75"


@dataclass(frozen=True, slots=True)
class Part:
    """One benchmark: its name, and its arguments behind `scripts/bench`."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a part."""

    name: str
    arguments: tuple[str, ...]
    status: int
    seconds: float


def parts_of(out: Path, *, only: Sequence[str], quick: bool, prompts: Path | None) -> list[Part]:
    """What is run. `InvalidRequest` names a part that there isn't."""
    if unknown := [name for name in only if name not in GROUPS]:
        raise InvalidRequest(f"--only: there is no part {unknown[0]!r}; there are {', '.join(GROUPS)}")
    asked = ("--prompts", str(prompts)) if prompts is not None else ()
    shortened: dict[str, tuple[str, ...]] = {
        ENGINE: ("--sessions", "1,16", "--steps", "16"),
        EXACT: ("--count", "8", "--max-tokens", "24"),
        SYSTEM: ("--sessions", "1,16", "--answers", "16", "--max-tokens", "48"),
    }
    found = [
        Part(f"{ENGINE}-{shapes}", (ENGINE, "--shapes", shapes, "--k", "5", "--exits", EXITS))
        for shapes in (SHAPES[:1] if quick else SHAPES)
    ]
    found += [Part(EXACT, (EXACT, *asked)), Part(SYSTEM, (SYSTEM, "--shapes", SHAPES[0], *asked))]
    return [
        Part(
            part.name,
            (
                *part.arguments,
                *(shortened[part.arguments[0]] if quick else ()),
                "--out",
                str(out / part.name),
            ),
        )
        for part in found
        if part.arguments[0] in only
    ]


def run(out: Path, *, only: Sequence[str] = GROUPS, quick: bool = False, prompts: Path | None = None) -> int:
    """Run the parts; the exit status."""
    out = out.resolve()
    parts = parts_of(out, only=only, quick=quick, prompts=prompts)
    out.mkdir(parents=True, exist_ok=True)
    ran: list[Ran] = []
    for part in parts:
        print(f"=== {part.name}", flush=True)
        began_s = time.monotonic()
        status = _teed([sys.executable, "-m", "loadtest.bench", *part.arguments], out / f"{part.name}.log")
        ran.append(Ran(part.name, part.arguments, status, round(time.monotonic() - began_s, 1)))
        print(
            f"=== {part.name}: {'done' if not status else f'FAILED ({status})'} after {ran[-1].seconds:.0f} s"
        )
        (out / "run.json").write_text(json.dumps([asdict(one) for one in ran], indent=1) + "\n")
    return int(any(one.status for one in ran))


def _teed(command: Sequence[str], log: Path) -> int:
    """Run a command, its output shown and kept; its exit status."""
    with (
        log.open("wb") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
    return process.returncode
