"""Real prompts to test with: Spec-Bench's dev prompts where they lie beside the project, a few of our own elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

SPEC_BENCH = Path(__file__).resolve().parents[2] / "shared" / "data" / "spec_bench_dev.jsonl"

OWN = (
    "Explain to a child why the sky is blue during the day and red in the evening.",
    "Write a short story that begins with an old lighthouse keeper finding a letter in a bottle.",
    "Translate into plain words: photosynthesis converts light energy into chemical energy stored in glucose.",
    "A train leaves at nine and travels at eighty kilometres an hour. When has it gone two hundred kilometres?",
    "Summarise the following: the committee met twice, agreed on the budget, and postponed the vote on the new bridge.",
    "List five things that a traveller should pack for a week in the mountains, and say why each matters.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite letter that declines an invitation to a wedding.",
    "Give three reasons for and three against school uniforms.",
    "How does a refrigerator keep food cold?",
)


def real_prompts(count: int) -> list[str]:
    """`count` different prompts, spread over the task families."""
    if SPEC_BENCH.exists():
        lines = SPEC_BENCH.read_text(encoding="utf-8").splitlines()
        texts = [str(json.loads(line)["turns"][0]) for line in lines]
        return texts[:: max(1, len(texts) // count)][:count]
    return [f"{OWN[n % len(OWN)]} Answer in about {10 * (n // len(OWN) + 1)} words." for n in range(count)]
