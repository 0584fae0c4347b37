"""What drawn answers send over the link, by the whole system: `scripts/bench drawn`.

A gateway at the edge, 50 ms away, answers prompts at a temperature above 0, in keyed and in ratio mode, under both policies;
lanes, forwards and hints as they are by default. `drawn.json` holds for each of the four what rounds sent up and down by
committed token (payload of the link's frames, without the prompt), tokens a round, and the share of verified draft tokens
that were accepted. `scripts/bench sampling` compares the modes on equal rows; here they draw different answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loadtest.compare import PROMPTS, Question, questions
from loadtest.compare_clients import Answer, GatewayReader
from loadtest.compare_modes import Place
from loadtest.compare_parts import Carried, Parts, Wanted
from shared.errors import InvalidRequest
from shared.models import fetch
from shared.stack.delay import precise_loop

RTT_MS: Final = 50.0
MODES: Final = ("keyed", "ratio")
POLICIES: Final = ("latency", "cost")


async def measure(
    asked: Sequence[Question], target: Path, folder: Path, temperature: float, most: int
) -> list[dict[str, Any]]:
    """A run for each mode and policy; every prompt is asked in all of them before the next one is."""
    wanted = Wanted(target, frozenset({Place.EDGE}))
    settings = [(mode, policy) for mode in MODES for policy in POLICIES]
    answers: dict[tuple[str, str], list[Answer]] = {setting: [] for setting in settings}
    carried: dict[tuple[str, str], list[Carried]] = {setting: [] for setting in settings}
    async with Parts(folder, wanted) as parts:
        await parts.start_edges({Place.EDGE: "hybrid"})
        await parts.set_round_trip(RTT_MS)
        reader = parts.places[Place.EDGE].reader
        assert isinstance(reader, GatewayReader)
        for number, question in enumerate(asked):
            for mode, policy in settings:
                before = await parts.link_bytes(Place.EDGE)
                drawn = {"temperature": temperature, "seed": number}
                answer = await reader.ask(question.tokens, most, {"sampling": mode, "policy": policy}, drawn)
                answers[mode, policy].append(answer)
                carried[mode, policy].append((await parts.link_bytes(Place.EDGE)).since(before))
            print(f"  {number + 1}/{len(asked)}", flush=True)
    return [figures(mode, policy, answers[mode, policy], carried[mode, policy]) for mode, policy in settings]


def figures(mode: str, policy: str, answers: Sequence[Answer], carried: Sequence[Carried]) -> dict[str, Any]:
    """What one mode and policy gave."""
    tokens = sum(len(answer.tokens) for answer in answers)

    def total(name: str) -> int:
        return sum(int(answer.usage.get(name, 0)) for answer in answers)

    return {
        "mode": mode,
        "policy": policy,
        "answers": len(answers),
        "tokens": tokens,
        "uplink_bytes_per_token": round(sum(each.up for each in carried) / tokens, 3),
        "downlink_bytes_per_token": round(sum(each.down for each in carried) / tokens, 3),
        "tokens_per_pass": round(tokens / max(1, total("passes")), 3),
        "forwards_per_token": round(total("forwards") / tokens, 3),
        "acceptance": round(total("accepted") / max(1, total("drafted")), 3),
    }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs as Markdown."""
    names = list(runs[0])
    rows = [names, ["---"] * len(names), *([str(run[name]) for name in names] for run in runs)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON Lines of category and turns")
    parser.add_argument("--out", type=Path, help="folder for drawn.json and drawn.md")
    parser.add_argument("--count", type=int, default=12, help="prompts, balanced over families (default: 12)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="default: 0.8")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    if arguments.count < 1 or arguments.max_tokens < 2 or not 0 < arguments.temperature <= 2:
        raise InvalidRequest(
            "--count should be positive, --max-tokens at least 2, --temperature above 0 and at most 2"
        )
    target = fetch()
    asked = questions(arguments.prompts, target, arguments.count, 256)
    with (
        tempfile.TemporaryDirectory(prefix="outrider-drawn-") as folder,
        asyncio.Runner(loop_factory=precise_loop) as runner,
    ):
        runs = runner.run(measure(asked, target, Path(folder), arguments.temperature, arguments.max_tokens))
    print(table(runs))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        held = {"prompts": len(asked), "temperature": arguments.temperature, "rtt_ms": RTT_MS, "runs": runs}
        (arguments.out / "drawn.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "drawn.md").write_text(table(runs) + "\n", encoding="utf-8")
    return 0
