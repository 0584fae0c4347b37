"""Sessions that go on by themselves, a few tokens ahead of what the verifier has taken: exact, bounded, never stuck."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.types import BlockStatus, EngineOutput
from shared.protocol import FinishReason, Policy, Sampling, Tokens
from tests.integration.engine_bench import (
    DEADLINE_S,
    DRAFTERS,
    MAX_SESSIONS,
    Bench,
    always_right,
    assert_ended,
    change,
    eager,
    next_output,
    nothing,
    settings_for,
    until_idle,
    until_parked,
)
from tests.integration.tiny_target import TinyTarget, random_prompt

AHEAD = 4

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tiny_target: TinyTarget) -> AsyncIterator[Bench]:
    async with Bench.over(VllmEngine(settings_for(tiny_target, floor_ahead=AHEAD))) as bench:
        yield bench


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cramped(tiny_target: TinyTarget) -> AsyncIterator[Bench]:
    """With KV for a few sessions only."""
    settings = settings_for(tiny_target, floor_ahead=AHEAD, kv_cache_mb=2, max_sessions=8, exit_layers="6")
    async with Bench.over(VllmEngine(settings)) as bench:
        yield bench


async def asked_while_waiting(
    bench: Bench, session: str, base: int, block: Tokens, stream: AsyncIterator[EngineOutput]
) -> EngineOutput:
    """What answers a block, read in the moment of asking: the engine may say more right after it."""
    waiting = asyncio.create_task(next_output(stream))
    await asyncio.sleep(0)
    await bench.engine.submit(session, base, block)
    return await waiting


@pytest.mark.parametrize("pause_s", [0.0, 0.05], ids=["quick", "slow"])
@pytest.mark.parametrize("drafter", DRAFTERS)
async def test_its_answer_is_the_plain_one(bench: Bench, drafter: str, pause_s: float) -> None:
    prompt, params = random_prompt(31, 20), eager()
    truth = await bench.answer(prompt, params)
    for seed in range(3):
        found = await bench.follow(
            f"one-{seed}", prompt, truth.tokens, params, DRAFTERS[drafter], seed, pause_s
        )
        assert found == truth


async def test_many_are_exact_beside_patient_and_drawn_ones(bench: Bench) -> None:
    prompts = [random_prompt(40 + n, 8 + 5 * n) for n in range(MAX_SESSIONS)]
    drawn = Sampling(temperature=0.9, top_p=0.9, seed=5)
    params = [
        eager().model_copy(update=[{}, {"policy": Policy.COST}, {"sampling": drawn}, {"logprobs": 2}][n % 4])
        for n in range(MAX_SESSIONS)
    ]
    truths = [await bench.answer(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    kinds = list(DRAFTERS.values())
    found = await asyncio.gather(
        *(
            bench.follow(f"m-{n}", prompts[n], truths[n].tokens, params[n], kinds[n % len(kinds)], n, 0.02)
            for n in range(MAX_SESSIONS)
        )
    )
    assert [each.tokens for each in found] == [each.tokens for each in truths]
    await until_idle(bench)


async def test_it_stops_a_few_tokens_ahead_and_tells_them_in_one_piece(bench: Bench) -> None:
    prompt, params = random_prompt(32, 12), eager()
    truth = (await bench.answer(prompt, params)).tokens
    before = await bench.engine.stats()
    stream = bench.engine.open("far", prompt, (), params)
    out = (await next_output(stream)).tokens
    await until_parked(bench)
    spent = change(before, await bench.engine.stats())
    assert spent["blocks"] == AHEAD - 1, "it has said the first token, and those that it may be ahead"
    output = await asked_while_waiting(bench, "far", len(out), (), stream)
    assert (output.tokens, output.passes) == (truth[1:AHEAD], AHEAD - 1)
    await bench.engine.submit("far", 1 + len(output.tokens), ())
    output = await next_output(stream)
    assert output.passes == len(output.tokens) >= 1
    await bench.engine.close("far")
    await until_idle(bench)


async def test_a_block_that_agrees_with_what_it_said_is_verified_from_there_on(bench: Bench) -> None:
    prompt, params = random_prompt(33, 12), eager()
    truth = (await bench.answer(prompt, params)).tokens
    stream = bench.engine.open("late", prompt, (), params)
    out = (await next_output(stream)).tokens
    await until_parked(bench)
    before = await bench.engine.stats()
    block = always_right(truth, out, random.Random(0))
    assert await bench.engine.submit("late", len(out), block) is BlockStatus.ARMED
    assert (await next_output(stream)).tokens == truth[1 : 2 + len(block)]
    assert change(before, await bench.engine.stats())["block_tokens"] == len(block) - (AHEAD - 1)
    await bench.engine.close("late")


async def test_what_was_said_already_answers_a_block_that_is_wrong(bench: Bench) -> None:
    prompt, params = random_prompt(34, 12), eager()
    truth = (await bench.answer(prompt, params)).tokens
    stream = bench.engine.open("wrong", prompt, (), params)
    out = (await next_output(stream)).tokens
    await until_parked(bench)
    output = await asked_while_waiting(bench, "wrong", len(out), (truth[1] + 1,), stream)
    assert output.tokens == truth[1:AHEAD]
    await bench.engine.close("wrong")


async def test_a_session_that_is_closed_meanwhile_says_no_more(bench: Bench) -> None:
    stream = bench.engine.open("closed", random_prompt(35, 12), (), eager())
    await next_output(stream)
    waiting = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0)
    await bench.engine.close("closed")
    assert await asyncio.wait_for(waiting, DEADLINE_S) is None
    await until_idle(bench)


async def test_one_that_has_come_to_its_end_is_stale_to_a_block_and_its_end_is_read(bench: Bench) -> None:
    prompt, params = random_prompt(36, 12), eager(AHEAD)
    truth = (await bench.answer(prompt, params)).tokens
    stream = bench.engine.open("ended", prompt, (), params)
    out = (await next_output(stream)).tokens
    await until_idle(bench)
    status = await bench.engine.submit("ended", len(out), (*truth[len(out) :], 1))
    assert status is BlockStatus.STALE
    output = await next_output(stream)
    assert (out + output.tokens, output.finish_reason) == (truth, FinishReason.LENGTH)
    await assert_ended(stream)


async def test_with_hardly_any_room_all_come_to_their_end(cramped: Bench) -> None:
    count, params = 8, eager(30)
    prompts = [random_prompt(60 + n, 110) for n in range(count)]
    truths = [await cramped.answer(prompt, params) for prompt in prompts]
    before = await cramped.engine.stats()
    kinds = [nothing, DRAFTERS["partly right"], DRAFTERS["random"]]
    found = await asyncio.gather(
        *(
            cramped.follow(f"r-{n}", prompts[n], truths[n].tokens, params, kinds[n % 3], n, 0.03)
            for n in range(count)
        )
    )
    assert found == truths
    assert change(before, await cramped.engine.stats())["preemptions"] > 0
    await until_idle(cramped)
