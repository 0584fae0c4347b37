"""The engine with hardly any KV: sessions are preempted, rest, come back, and nobody can tell from what they say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.types import BlockStatus
from shared.protocol import Sampling, Tokens
from tests.integration.engine_bench import (
    Bench,
    assert_accounted,
    change,
    endless,
    next_output,
    partly_right,
    settings_for,
    until_idle,
)
from tests.integration.tiny_target import TinyTarget, random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

SESSIONS = 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tiny_target: TinyTarget) -> AsyncIterator[Bench]:
    """KV for three sessions at a time, at most."""
    engine = VllmEngine(settings_for(tiny_target, kv_cache_mb=2, max_sessions=SESSIONS, exit_layers="6"))
    async with Bench.over(engine) as bench:
        assert bench.info.kv_capacity_tokens < 4 * 128
        yield bench


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0, seed=4, repetition_penalty=1.2, frequency_penalty=0.3)],
    ids=["greedy", "sampled"],
)
async def test_sessions_that_need_more_kv_than_there_is_are_exact(bench: Bench, sampling: Sampling) -> None:
    prompts = [random_prompt(seed, 90 + 4 * seed) for seed in range(SESSIONS)]
    params = endless(30).model_copy(update={"sampling": sampling})
    truths = [await bench.answer(prompt, params) for prompt in prompts]
    before = await bench.engine.stats()
    found = await asyncio.gather(
        *(
            bench.speculate(f"tight-{n}", prompts[n], truths[n].tokens, params, partly_right, seed=n)
            for n in range(SESSIONS)
        )
    )
    after = await bench.engine.stats()
    assert found == truths
    assert change(before, after)["preemptions"] > 0
    assert_accounted(before, after)
    await until_idle(bench)


async def test_session_preempted_while_parked_says_nothing_until_its_next_block(bench: Bench) -> None:
    params = endless(30)
    prompts = [random_prompt(100 + seed, 120) for seed in range(SESSIONS)]
    truths = [(await bench.answer(prompt, params)).tokens for prompt in prompts]
    streams = [bench.engine.open(f"rest-{n}", prompt, (), params) for n, prompt in enumerate(prompts)]
    outs: list[Tokens] = [(await next_output(stream)).tokens for stream in streams]
    stats = await bench.engine.stats()
    assert stats.preemptions > 0
    assert stats.parked < SESSIONS
    assert (stats.running, stats.waiting) == (0, 0)
    for n in random.Random(0).sample(range(SESSIONS), SESSIONS):
        status = await bench.engine.submit(f"rest-{n}", 1, truths[n][1:5])
        assert status in (BlockStatus.ARMED, BlockStatus.QUEUED)
        outs[n] += (await next_output(streams[n])).tokens
        assert outs[n] == truths[n][:6]
    for n in range(SESSIONS):
        await bench.engine.close(f"rest-{n}")
    await until_idle(bench)


async def test_stale_block_does_not_bring_a_resting_session_back(bench: Bench) -> None:
    params = endless(30)
    streams = []
    for n in range(SESSIONS):
        streams.append(bench.engine.open(f"stale-{n}", random_prompt(200 + n, 120), (), params))
        await next_output(streams[-1])
    before = await bench.engine.stats()
    assert before.parked < SESSIONS
    assert await bench.engine.submit("stale-0", 5, (1, 2)) is BlockStatus.STALE
    assert change(before, await bench.engine.stats())["steps"] == 0
    for n in range(SESSIONS):
        await bench.engine.close(f"stale-{n}")
    await until_idle(bench)


async def test_resting_session_can_be_closed_and_opened_again(bench: Bench) -> None:
    params = endless(30)
    prompts = [random_prompt(300 + n, 120) for n in range(SESSIONS)]
    truth = (await bench.answer(prompts[0], params)).tokens
    for n, prompt in enumerate(prompts):
        await next_output(bench.engine.open(f"close-{n}", prompt, (), params))
    await bench.engine.close("close-0")
    stream = bench.engine.open("close-0", prompts[0], truth[:1], params)
    assert (await next_output(stream)).tokens == truth[1:2]
    for n in range(SESSIONS):
        await bench.engine.close(f"close-{n}")
    await until_idle(bench)


async def test_prefills_and_blocks_contend_for_kv_and_all_get_through(bench: Bench) -> None:
    """Long prompts arrive while short sessions keep verifying: neither starves the other."""
    params = endless(20)
    prompts = [random_prompt(400 + n, 200 if n % 2 else 40) for n in range(SESSIONS)]
    truths = [await bench.answer(prompt, params) for prompt in prompts]
    found = await asyncio.gather(
        *(
            bench.speculate(f"mixed-{n}", prompts[n], truths[n].tokens, params, partly_right, seed=n)
            for n in range(SESSIONS)
        )
    )
    assert found == truths
    await until_idle(bench)
