"""The engine on the target that ships: exact in a full batch and after a restore, with exits that come early."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.launch import FLOOR_AHEAD_WITH_DRAFTS
from services.verifier.floor_drafts import LENGTH
from services.verifier.settings import VerifierSettings
from shared.protocol import FinishReason, GenerationParams, Policy, Tokens
from shared.text import Tokenizer
from tests.integration.engine_bench import (
    Bench,
    assert_accounted,
    change,
    endless,
    next_output,
    until_parked,
)
from tests.prompts import real_prompts

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

SESSIONS = 16
PROMPT_TOKENS = 40
ANSWER = 16
EXITS = (18, 21, 24)
"""After which layers: those that are chosen where nothing is said."""
VOCABULARY = 49152


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(target_model: Path) -> AsyncIterator[Bench]:
    settings = VerifierSettings.model_validate(
        {"model": str(target_model), "max_model_len": 512, "max_sessions": SESSIONS, "kv_cache_mb": 256}
    )
    async with Bench.over(VllmEngine(settings)) as bench:
        yield bench


@pytest.fixture(scope="module")
def prompts(target_model: Path) -> list[Tokens]:
    tokenizer = Tokenizer.load(target_model)
    return [tokenizer.encode(text)[:PROMPT_TOKENS] for text in real_prompts(SESSIONS)]


def mixed(truth: Tokens, out: Tokens, rng: random.Random) -> Tokens:
    block = list(truth[len(out) :][: rng.randint(0, 6)])
    if block and rng.random() < 0.5:
        block[rng.randrange(len(block))] = rng.randrange(VOCABULARY)
    return tuple(block)


async def test_full_batch_is_exact_and_costs_one_pass_a_block(bench: Bench, prompts: list[Tokens]) -> None:
    params = endless(ANSWER)
    truths = await asyncio.gather(*(bench.answer(prompt, params) for prompt in prompts))
    before = await bench.engine.stats()
    found = await asyncio.gather(
        *(
            bench.speculate(f"batch-{n}", prompt, truths[n].tokens, params, mixed, seed=n)
            for n, prompt in enumerate(prompts)
        )
    )
    after = await bench.engine.stats()
    assert found == truths
    assert_accounted(before, after)
    spent = change(before, after)
    assert spent["recomputed_tokens"] == spent["plain_tokens"] == 0
    assert spent["prefill_tokens"] <= sum(map(len, prompts))


@pytest.mark.parametrize("committed", [1, 9])
async def test_restored_session_goes_on_exactly(bench: Bench, prompts: list[Tokens], committed: int) -> None:
    truth = (await bench.answer(prompts[0], endless(ANSWER))).tokens
    stream = bench.engine.open("restored", prompts[0], truth[:committed], endless(ANSWER))
    out, finish_reason, rng = truth[:committed], None, random.Random(committed)
    while finish_reason is None:
        output = await next_output(stream)
        out, finish_reason = out + output.tokens, output.finish_reason
        if finish_reason is None:
            await bench.engine.submit("restored", len(out), mixed(truth, out, rng))
    assert (out, finish_reason) == (truth, FinishReason.LENGTH)


async def test_every_exit_speaks_before_the_outcome_and_the_deeper_the_surer(
    bench: Bench, prompts: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last exit should name what comes more often than the first. Leads are those at the engine process."""
    outcomes = bench.note_outcomes(monkeypatch)
    leads: dict[int, list[float]] = defaultdict(list)
    named: dict[int, int] = defaultdict(int)
    for n, prompt in enumerate(prompts[:6]):
        truth = (await bench.answer(prompt, endless(ANSWER))).tokens
        bench.reports.clear()
        stream = bench.engine.open(f"lead-{n}", prompt, (), endless(2 * ANSWER))
        out: Tokens = ()
        while len(out) < ANSWER:
            base = len(out)
            if base:
                await bench.engine.submit(f"lead-{n}", base, mixed(truth, out, random.Random(base)))
            output = await next_output(stream)
            over_s, _ = outcomes[-1]
            await bench.heard(base, EXITS[-1])
            out += output.tokens
            for _, report in bench.reports:
                if report.base == base:
                    leads[report.layer].append((over_s - report.sent_s) * 1000)
                    best = report.outcomes[0]
                    named[report.layer] += (best.accepted + 1, best.next_token) == (
                        len(output.tokens),
                        output.tokens[-1],
                    )
        await bench.engine.close(f"lead-{n}")
    assert sorted(leads) == list(EXITS)
    rounds = {len(found) for found in leads.values()}
    assert len(rounds) == 1, "an exit was silent"
    assert all(lead > 0 for found in leads.values() for lead in found)
    medians = [statistics.median(leads[layer]) for layer in EXITS]
    print({layer: (round(statistics.median(leads[layer]), 1), named[layer]) for layer in leads}, "of", rounds)
    assert medians == sorted(medians, reverse=True)
    assert named[24] > named[18]


async def drafted_along(
    bench: Bench, session: str, prompt: Tokens, policy: Policy
) -> tuple[Tokens, list[tuple[int, tuple[tuple[int, float], ...]]]]:
    """An answer token by token, and what the draft head said might follow, with how many tokens stood before."""
    params = endless(3 * ANSWER).model_copy(update={"policy": policy, "unheard": True})
    said, found = Tokens(), list[tuple[int, tuple[tuple[int, float], ...]]]()
    async for output in bench.engine.open(session, prompt, (), params):
        said += output.tokens
        if output.finish_reason is None:
            found.append((len(said), output.drafted))
            await bench.engine.submit(session, len(said), ())
    return said, found


async def test_the_targets_weights_are_read_in_a_fifth_of_their_bytes(bench: Bench) -> None:
    assert bench.info.compact < 0.2


async def test_the_draft_head_foresees_what_is_said_next(bench: Bench, prompts: list[Tokens]) -> None:
    assert bench.info.draft_head == "draft-head.safetensors"
    right: list[bool] = []
    for number, prompt in enumerate(prompts[:6]):
        said, found = await drafted_along(bench, f"head-{number}", prompt, Policy.LATENCY)
        right += [drafted[0][0] == said[at] for at, drafted in found if drafted and at < len(said)]
        assert all(0.0 < chance <= 1.0 for _, drafted in found for _, chance in drafted)
    assert len(right) > 150, "it has something to say after nearly every token"
    assert statistics.mean(right) > 0.45, "and about two thirds of it are right"


async def test_behind_a_cached_beginning_the_draft_head_goes_on(bench: Bench, prompts: list[Tokens]) -> None:
    """No states of what comes out of the prefix cache are computed; what is taken instead is in the unit tests."""
    prompt = tuple(token for each in prompts[6:14] for token in each)
    said, first = await drafted_along(bench, "first", prompt, Policy.LATENCY)
    before = await bench.engine.stats()
    again, second = await drafted_along(bench, "again", prompt, Policy.LATENCY)
    after = await bench.engine.stats()
    assert after.prefix_cache_hit_tokens - before.prefix_cache_hit_tokens >= len(prompt) // 2
    assert again == said
    for found in (first, second):
        right = [drafted[0][0] == said[at] for at, drafted in found if drafted and at < len(said)]
        assert len(right) > ANSWER and statistics.mean(right) > 0.25


async def alone(bench: Bench, session: str, prompt: Tokens, params: GenerationParams) -> tuple[Tokens, int]:
    """What a session says that goes on by itself, and in how many passes."""
    said, passes = Tokens(), 0
    async for output in bench.engine.open(session, prompt, (), params):
        said, passes = said + output.tokens, passes + output.passes
        if output.finish_reason is None:
            await bench.engine.submit(session, len(said), (), alone=True)
    return said, passes


async def test_sessions_that_nobody_drafts_for_go_on_with_drafts_of_their_own(
    bench: Bench, prompts: list[Tokens]
) -> None:
    assert bench.info.own_drafts
    params = endless(3 * ANSWER).model_copy(update={"policy": Policy.LATENCY, "unheard": True})
    truths = await asyncio.gather(*(bench.answer(prompt, params) for prompt in prompts[:4]))
    found = await asyncio.gather(*(alone(bench, f"own-{n}", prompts[n], params) for n in range(4)))
    assert [said for said, _ in found] == [truth.tokens for truth in truths]
    assert sum(passes for _, passes in found) < 0.8 * 4 * 3 * ANSWER, "drafts save passes"


async def test_it_goes_no_further_than_it_may_and_not_at_all_once_a_block_comes(
    bench: Bench, prompts: list[Tokens]
) -> None:
    params = endless(4 * ANSWER).model_copy(update={"policy": Policy.LATENCY, "unheard": True})
    truth = (await bench.answer(prompts[0], params)).tokens
    stream = bench.engine.open("bound", prompts[0], (), params)
    said = (await next_output(stream)).tokens
    await bench.engine.submit("bound", len(said), (), alone=True)
    said += (await next_output(stream)).tokens
    await until_parked(bench)
    block = truth[len(said) :][:3]
    await bench.engine.submit("bound", len(said), block)
    output = await next_output(stream)
    assert len(block) < len(output.tokens) <= FLOOR_AHEAD_WITH_DRAFTS + LENGTH + 1
    said += output.tokens
    before = await bench.engine.stats()
    await bench.engine.submit("bound", len(said), ())
    said += (await next_output(stream)).tokens
    await until_parked(bench)
    assert change(before, await bench.engine.stats())["blocks"] == 1, "it was asked for one"
    assert said == truth[: len(said)]
    await bench.engine.close("bound")


async def test_nothing_is_drafted_for_sessions_that_wait_for_blocks(
    bench: Bench, prompts: list[Tokens]
) -> None:
    _, found = await drafted_along(bench, "waits", prompts[0], Policy.COST)
    assert not any(drafted for _, drafted in found)
