"""Load from users who chat: `scripts/load`. Runs locust and prints a short table of what its users saw.

The gateway is the one of `--url`, else that of the stack that runs in this working directory (`outrider up`), else one of
a stack that is started for this run, with the target that ships, and stopped after it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from shared.errors import OutriderError
from shared.models import fetch
from shared.stack import record
from shared.stack.health import ask
from shared.stack.settings import StackSettings
from shared.stack.stack import Progress, Stack, StackOptions

LOCUSTFILE: Final = Path(__file__).with_name("locustfile.py")
STOP_S: Final = 30
LABELS: Final = {
    "ttft": "time to first token",
    "inter-token": "time between tokens",
    "whole answer": "whole answer",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load; the exit status is 1 when anything failed or no answer came."""
    asked = _parser().parse_args(arguments)
    try:
        with _gateway(asked.url) as url:
            print(f"{asked.users} users at {url} for {asked.time}", flush=True)
            figures = run(asked, url)
    except OutriderError as error:
        print(f"load: {error.message}", file=sys.stderr)
        return 1
    print(table(figures))
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["counts"].get("answers") and not figures["failures"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/load", description=__doc__)
    parser.add_argument("--url", help="the gateway, such as http://127.0.0.1:8100")
    parser.add_argument("--users", type=_positive, default=4, help="users at a time (4)")
    parser.add_argument("--rate", type=_positive, default=2, help="users that start a second (2)")
    parser.add_argument("--time", default="30s", help="how long, such as 30s or 5m (30s)")
    parser.add_argument("--prompts", type=Path, help='what they say: JSON Lines of {"turns": ["...", ...]}')
    parser.add_argument("--max-tokens", type=_positive, help="longest answer, tokens (64)")
    parser.add_argument("--turns", type=_positive, help="turns of a conversation at most (2)")
    parser.add_argument("--think", type=float, help="mean pause between conversations, seconds (0.5)")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} should be 1 or more")
    return number


@contextmanager
def _gateway(url: str | None) -> Iterator[str]:
    """The URL of a gateway that is ready. Raises `OutriderError` when there is none and none can be started."""
    if url is not None:
        health = ask(url)
        if not health.ready:
            raise OutriderError(f"the gateway at {url} is not ready: {'; '.join(health.reasons)}")
        yield url
    elif (running := record.read(StackSettings().run_dir.resolve())) is not None and running.alive:
        yield running.gateway_url
    else:
        print("no stack runs here; starting one for this run", flush=True)
        with tempfile.TemporaryDirectory(prefix="outrider-load-") as directory:
            settings = StackSettings(run_dir=Path(directory))
            options = StackOptions(target=fetch(_say), die_with_parent=True)
            with Stack(options, settings=settings, report=_tell) as stack:
                yield stack.gateway_url


def _say(what: str, share: float) -> None:
    print(f"  model: {what} {share:.0%}", flush=True)


def _tell(progress: Progress) -> None:
    print(f"  {progress.seconds:5.1f} s  {progress.part}: {progress.state} {progress.text}", flush=True)


def run(asked: argparse.Namespace, url: str) -> dict[str, Any]:
    """Run locust against the gateway at `url`; the figures that it leaves. Raises `OutriderError` when it leaves none."""
    with tempfile.TemporaryDirectory(prefix="outrider-load-") as directory:
        path, log = Path(directory) / "figures.json", Path(directory) / "log"
        options: Mapping[str, object] = {
            "--locustfile": LOCUSTFILE,
            "--host": url,
            "--users": asked.users,
            "--spawn-rate": asked.rate,
            "--run-time": asked.time,
            "--stop-timeout": STOP_S,  # answers that have begun are read to their end
            "--loglevel": "WARNING",
            "--prompts": asked.prompts and asked.prompts.resolve(),
            "--max-tokens": asked.max_tokens,
            "--turns": asked.turns,
            "--think": asked.think,
            "--figures": path,
        }
        command = [sys.executable, "-m", "locust", "--headless", "--only-summary"]
        command += [f"{name}={value}" for name, value in options.items() if value is not None]
        root = LOCUSTFILE.parents[1]
        environment = os.environ | {"PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            _wait(subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output))
        if not path.exists():
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [
                "it said nothing"
            ]
            raise OutriderError(f"locust ended without figures: {said[-1]}")
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return figures


def _wait(locust: subprocess.Popen[bytes]) -> None:
    """Wait for its end. Ctrl-C reaches locust too, which then ends with what it has."""
    try:
        locust.wait()
    except KeyboardInterrupt:
        try:
            locust.wait(STOP_S + 5)
        except subprocess.TimeoutExpired:
            locust.send_signal(signal.SIGKILL)
            locust.wait()


def table(figures: Mapping[str, Any]) -> str:
    """The figures of a run as a few lines of text."""
    rows = [f"{'ms':<22}{'p50':>9}{'p95':>9}{'p99':>9}{'mean':>9}{'count':>9}{'failed':>9}"]
    for name, label in LABELS.items():
        if (times := figures["times_ms"].get(name)) is not None:
            numbers = "".join(f"{times[column]:>9.5g}" for column in ("p50", "p95", "p99", "mean"))
            rows.append(f"{label:<22}{numbers}{times['count']:>9}{times['failures']:>9}")
    counts = figures["counts"]
    rows += [
        "",
        f"{counts.get('answers', 0)} answers, {figures['tokens_per_second']} tokens/s over all users",
    ]
    if passes := counts.get("passes"):
        accepted, drafted = counts.get("accepted", 0), counts.get("drafted", 0)
        rows.append(
            f"{counts['tokens'] / passes:.2f} tokens a pass, {accepted} of {drafted} draft tokens accepted, "
            f"{counts.get('floor_tokens', 0)} tokens said by the target alone"
        )
    rows += [f"{fault['occurrences']} × {fault['name']}: {fault['error']}" for fault in figures["failures"]]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
