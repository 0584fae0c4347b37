"""The promise itself, on real prompts: streamed tokens are the target's own, hints come early, nothing is computed twice.

The yardstick is the same engine's plain greedy decoding. Prompts are the first sentences of Spec-Bench's dev prompts where
that file is beside the project, and of this file's own otherwise.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from services.draft_gateway.drafting import load_draft_engine
from services.draft_gateway.drafting.engine import (
    Draft,
    DraftEngine,
    DraftRequest,
    Dropped,
    Ready,
    none_dropped,
    none_told,
)
from services.draft_gateway.drafting.llama import LlamaDraft
from services.draft_gateway.drafting.lookup import PromptLookup
from services.draft_gateway.settings import GatewaySettings
from services.verifier.engine.types import EngineStats
from shared.protocol import GenerationParams, Tokens
from shared.text import Tokenizer
from tests.integration.whole import Answer, Whole, whole
from tests.prompts import real_prompts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.kafka,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

PROMPTS = 40
PROMPT_TOKENS = 48
MAX_TOKENS = 10
EARLY = 0.95


@dataclass
class ReferenceDraft:
    """Drafts from the target's own answers: rightly, wrongly, or at random."""

    name: str
    answers: dict[Tokens, Tokens]
    immediate: bool = True

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def _draft(self, request: DraftRequest) -> Draft:
        for size in range(len(request.context), 0, -1):
            answer = self.answers.get(request.context[:size])
            if answer is not None:
                at = len(request.context) - size
                right = answer[at : at + request.length]
                break
        else:
            right = (0,) * request.length
        random = Random(hash(request.context))
        tokens = {
            "right": right,
            "wrong": tuple((token + 1) % 49152 for token in right),
            "random": tuple(token if random.random() < 0.6 else random.randrange(49152) for token in right),
        }[self.name]
        return Draft(tokens, (0.5,) * len(tokens))

    def forget(self, session: str) -> None:
        return


def shallow_draft(target: Path, directory: Path) -> LlamaDraft:
    """A draft model made of the target's own first two layers: bad, but a real model."""
    directory.mkdir()
    config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(target / "tokenizer.json", directory / "tokenizer.json")
    weights = load_file(target / "model.safetensors")
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("model.layers.") or name.split(".")[2] in ("0", "1")
    }
    save_file(kept, directory / "model.safetensors")
    return LlamaDraft.load(directory, target=target, threads=1, cache_tokens=65536)


@dataclass
class Bench:
    """Everything running, the prompts, and what the target says to them by itself."""

    whole: Whole
    prompts: list[Tokens]
    truth: list[Tokens]
    rounds: int = 0
    hinted: int = 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(
    kafka: str, redis_url: str, target_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Bench]:
    tokenizer = Tokenizer.load(target_model)
    prompts = [
        tokenizer.encode_chat(
            [{"role": "user", "content": tokenizer.decode(tokenizer.encode(text)[:PROMPT_TOKENS])}]
        )
        for text in real_prompts(PROMPTS)
    ]
    answers: dict[Tokens, Tokens] = {}
    drafts: dict[str, DraftEngine] = {
        "lookup": PromptLookup(),
        "model": shallow_draft(target_model, tmp_path_factory.mktemp("draft") / "shallow"),
        "pair": load_draft_engine(GatewaySettings(model=str(target_model))).engine,
        **{name: ReferenceDraft(name, answers) for name in ("right", "wrong", "random")},
    }
    environment = {
        "OUTRIDER_KAFKA": kafka,
        "OUTRIDER_REDIS_URL": redis_url,
        "OUTRIDER_TOPIC_PREFIX": "exact-",
        "OUTRIDER_REDIS_PREFIX": "exact:",
    }
    async with whole(environment, target_model, drafts) as running:
        params = GenerationParams(max_tokens=MAX_TOKENS)
        said = await asyncio.gather(*(running.engine.alone(prompt, params) for prompt in prompts))
        truth = [output.tokens for output in said]
        answers.update(zip(prompts, truth, strict=True))
        yield Bench(running, prompts, truth)


def assert_exact(bench: Bench, answers: Sequence[Answer], what: str) -> None:
    for number, (answer, truth) in enumerate(zip(answers, bench.truth, strict=True)):
        assert answer.tokens == truth, f"{what}, prompt {number}: {answer.outrider['session']}"


def note_hints(bench: Bench, answers: Sequence[Answer], what: str) -> None:
    """Count the rounds whose hints were at the gateway before the verdict; print by how much each exit led."""
    rounds = sum(answer.outrider["rounds"] for answer in answers)
    hinted = sum(answer.outrider["hinted_rounds"] for answer in answers)
    leads: Mapping[str, list[float]] = defaultdict(list)
    for answer in answers:
        for layer, lead in answer.outrider["exit_lead_ms"].items():
            leads[layer].append(lead["p50"])
    shown = ", ".join(f"layer {layer}: {sorted(p50)[len(p50) // 2]:.1f} ms" for layer, p50 in leads.items())
    print(f"\n{what}: hints before the verdict in {hinted} of {rounds} rounds; median lead {shown}")
    bench.rounds += rounds
    bench.hinted += hinted


RUNS = [
    ("lookup", True, "cost"),
    ("lookup", False, "cost"),
    ("model", True, "cost"),
    ("pair", True, "cost"),
    ("right", True, "cost"),
    ("wrong", True, "cost"),
    ("random", True, "cost"),
    ("pair", True, "latency"),
    ("wrong", True, "latency"),
]


@pytest.mark.parametrize(
    ("draft", "lanes", "policy"), RUNS, ids=[f"{d}-{'lanes' if x else 'no lanes'}-{p}" for d, x, p in RUNS]
)
async def test_sixteen_sessions_at_a_time_stream_what_the_target_says_and_compute_it_once(
    bench: Bench, draft: str, lanes: bool, policy: str
) -> None:
    options = {"hints": lanes, "guesses": lanes, "forwards": lanes, "policy": policy}
    before = await bench.whole.engine.stats()
    answers = await bench.whole.stream_all(draft, bench.prompts, MAX_TOKENS, at_a_time=16, **options)
    after = await bench.whole.engine.stats()
    assert_exact(bench, answers, f"{draft}, {policy}")
    report = [answer.outrider for answer in answers]
    if policy == "cost":
        if lanes:
            note_hints(bench, answers, f"{draft}, 16 sessions")
        assert_once(bench, answers, before, after)
        assert sum(usage["floor_tokens"] for usage in report) == 0
    else:
        assert sum(usage["floor_tokens"] for usage in report) > 0
    if not lanes:
        assert sum(usage["hits"] + usage["forwards"] + usage["hints"] for usage in report) == 0
    if draft == "right":
        assert all(usage["accepted"] >= usage["drafted"] - usage["rounds"] for usage in report)
    if draft == "wrong":
        assert sum(usage["accepted"] for usage in report) == 0


def assert_once(bench: Bench, answers: Sequence[Answer], before: EngineStats, after: EngineStats) -> None:
    """Scheduled tokens are those of the first prefills and, for every round, its block and one more."""
    rounds = sum(answer.outrider["rounds"] for answer in answers)
    drafted = sum(answer.outrider["drafted"] for answer in answers)
    prompt_tokens = sum(len(prompt) for prompt in bench.prompts)
    cached = after.prefix_cache_hit_tokens - before.prefix_cache_hit_tokens
    assert after.blocks - before.blocks == rounds
    assert after.block_tokens - before.block_tokens == drafted
    assert after.prefill_tokens - before.prefill_tokens == prompt_tokens - cached
    assert after.recomputed_tokens == before.recomputed_tokens
    assert after.scheduled_tokens - before.scheduled_tokens == prompt_tokens - cached + rounds + drafted


async def test_one_session_at_a_time_streams_what_the_target_says(bench: Bench) -> None:
    """Each prompt by itself, the drafts taking turns."""
    drafts = ["lookup", "model", "pair", "right", "wrong", "random"]
    answers = [
        await bench.whole.stream(drafts[number % len(drafts)], prompt, MAX_TOKENS)
        for number, prompt in enumerate(bench.prompts)
    ]
    assert_exact(bench, answers, "one session")


async def test_all_this_was_said_with_the_pair_that_comes_with_the_target(bench: Bench) -> None:
    (answer,) = await bench.whole.stream_all(
        "pair", bench.prompts[:1], MAX_TOKENS, at_a_time=1, policy="cost", hints=True
    )
    assert set(answer.outrider["exit_lead_ms"]) == {"18", "21", "24"}
    assert list((await bench.whole.verifier.readiness()).notes) == []


async def test_the_text_of_a_stream_is_the_text_of_its_tokens(bench: Bench, target_model: Path) -> None:
    tokenizer = Tokenizer.load(target_model)
    (answer,) = await bench.whole.stream_all("lookup", bench.prompts[:1], 40, at_a_time=1)
    assert answer.text == tokenizer.decode(answer.tokens)


async def test_in_all_these_runs_hints_came_before_the_verdict(bench: Bench) -> None:
    print(f"\nhints before the verdict in {bench.hinted} of {bench.rounds} rounds")
    assert bench.hinted >= EARLY * bench.rounds
