"""Even batches as CUDA runs them, on a CPU: padded to K + 1 rows a session, or of one row each, prepared by `SteadySteps`.

The worker refuses to prepare an even batch as any other, so that each of these answers went that way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import pytest_asyncio

from services.verifier.engine import launch
from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.options import EngineOptions
from services.verifier.settings import VerifierSettings
from shared.protocol import GenerationParams, Policy, Sampling, Tokens
from tests.integration.engine_bench import (
    DRAFTERS,
    MAX_BLOCK,
    MAX_SESSIONS,
    Bench,
    Drafter,
    change,
    eager,
    endless,
    next_output,
    nothing,
    partly_right,
    settings_for,
)
from tests.integration.tiny_target import TinyTarget, random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

AHEAD = 6
PAUSE_S = 0.01
ROOM = MAX_SESSIONS * (MAX_BLOCK + 1)
"""Rows of a step: as on CUDA, all sessions' blocks fit, padding included."""
PLACES = 6
"""Prompts of up to so many blocks' worth of rows fit into an even pass of all sessions there may be."""
WORKER = "tests.integration.steady_worker.SteadyWorker"


@pytest.fixture(scope="module")
def even_batches() -> Iterator[None]:
    """Engines on the CPU run uniform batches, and look at what they do."""
    on_cpu = launch._on_cpu

    def even(settings: VerifierSettings, options: EngineOptions) -> dict[str, Any]:
        config = replace(options, uniform=True).as_config()
        places = settings.max_sessions + options.prompt_places
        made = {"worker_cls": WORKER, "additional_config": config, "max_num_seqs": places}
        return {**on_cpu(settings, options), **made}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_on_cpu", even)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def early(tiny_target: TinyTarget, even_batches: None) -> AsyncIterator[Bench]:
    """Passes of sessions that go on by themselves are launched before those before them have ended."""
    settings = settings_for(tiny_target, max_batched_tokens=ROOM, floor_ahead=AHEAD, early_passes=True)
    async with Bench.over(VllmEngine(settings)) as bench:
        yield bench


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[0, PLACES], ids=["", "prompts"])
async def bench(tiny_target: TinyTarget, even_batches: None, request: Any) -> AsyncIterator[Bench]:
    """With prompts as ever, and as rows of even passes."""
    settings = settings_for(tiny_target, max_batched_tokens=ROOM, prompt_places=request.param)
    async with Bench.over(VllmEngine(settings)) as bench:
        yield bench


def mixed(number: int) -> GenerationParams:
    """Greedy, greedy with log-probabilities, and drawn, in turn."""
    if number % 3 == 2:
        sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=number)
        return GenerationParams(max_tokens=30, ignore_eos=True, policy=Policy.COST, sampling=sampling)
    return endless(30).model_copy(update={"logprobs": 3}) if number % 3 else endless(30)


@pytest.mark.parametrize("drafter", DRAFTERS)
async def test_a_session_says_what_the_target_says_by_itself(bench: Bench, drafter: str) -> None:
    prompt, params = random_prompt(70, 20), endless()
    truth = await bench.answer(prompt, params)
    assert await bench.speculate("one", prompt, truth.tokens, params, DRAFTERS[drafter]) == truth


async def test_sessions_of_every_kind_share_even_passes_and_are_exact(bench: Bench) -> None:
    prompts = [random_prompt(700 + n, 8 + 3 * n) for n in range(MAX_SESSIONS)]
    params = [mixed(n) for n in range(MAX_SESSIONS)]
    truths = [await bench.answer(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    before = await bench.engine.stats()
    drafters = list(DRAFTERS.values())
    found = await asyncio.gather(
        *(
            bench.speculate(f"s{n}", prompts[n], truths[n].tokens, params[n], drafters[n % len(drafters)], n)
            for n in range(MAX_SESSIONS)
        )
    )
    after = await bench.engine.stats()
    spent = change(before, after)
    assert after.steady_steps > before.steady_steps
    assert [own.tokens for own in found] == [truth.tokens for truth in truths]
    assert spent["steps"] < spent["blocks"], "sessions are not batched"
    assert spent["scheduled_tokens"] == spent["prefill_tokens"] + spent["blocks"] + spent["block_tokens"]


async def test_padding_is_never_committed_and_is_not_counted(bench: Bench) -> None:
    prompt, params = random_prompt(71, 12), endless(24)
    truth = (await bench.answer(prompt, params)).tokens
    before = await bench.engine.stats()
    stream = bench.engine.open("short", prompt, (), params)
    out = (await next_output(stream)).tokens
    for length in (0, 1, MAX_BLOCK, 0, 2):
        await bench.engine.submit("short", len(out), truth[len(out) :][:length])
        said = (await next_output(stream)).tokens
        assert len(said) == length + 1
        out += said
    assert out == truth[: len(out)]
    spent = change(before, await bench.engine.stats())
    assert (spent["blocks"], spent["block_tokens"]) == (5, MAX_BLOCK + 3)
    assert spent["scheduled_tokens"] == len(prompt) + 5 + MAX_BLOCK + 3
    await bench.engine.close("short")


async def test_sessions_that_nobody_drafts_for_are_exact_beside_each_other(bench: Bench) -> None:
    prompts = [random_prompt(720 + n, 10) for n in range(4)]
    params = endless(20)
    truths = [await bench.answer(prompt, params) for prompt in prompts]
    found = await asyncio.gather(
        *(bench.speculate(f"f{n}", prompts[n], truths[n].tokens, params, nothing, n) for n in range(4))
    )
    assert found == truths


async def test_sessions_that_take_turns_come_go_and_are_drawn_now_and_then_are_exact(bench: Bench) -> None:
    """Whose blocks share a pass is another every time: passes go from vLLM's batch to none and back."""
    random, drawn = Random(5), mixed(2).model_copy(update={"policy": Policy.LATENCY})
    kinds = [eager(60), drawn]  # a step waits for none of those that skip a turn
    prompts = [random_prompt(740 + n, 6 + 3 * n) for n in range(12)]
    params = [kinds[n % 4 == 3] for n in range(12)]
    truths = [(await bench.answer(prompt, each)).tokens for prompt, each in zip(prompts, params, strict=True)]
    streams: dict[int, AsyncIterator[Any]] = {}
    outs: dict[int, tuple[int, ...]] = {}
    waiting = list(range(12))
    before = await bench.engine.stats()

    async def turn(n: int, block: tuple[int, ...]) -> None:
        await bench.engine.submit(f"t{n}", len(outs[n]), block)
        outs[n] += (await next_output(streams[n])).tokens

    for _ in range(40):
        if waiting and (len(streams) < 3 or random.random() < 0.3):
            n = waiting.pop(0)
            streams[n] = bench.engine.open(f"t{n}", prompts[n], (), params[n])
            outs[n] = (await next_output(streams[n])).tokens
        greedy_only = random.random() < 0.7
        able = [n for n in streams if len(outs[n]) < 20 and not (greedy_only and n % 4 == 3)]
        chosen = random.sample(able, random.randint(0, len(able)))
        await asyncio.gather(*(turn(n, partly_right(truths[n], outs[n], random)) for n in chosen))
        for n in [n for n in streams if len(outs[n]) >= 20 or random.random() < 0.02]:
            del streams[n]
            await bench.engine.close(f"t{n}")
    after = await bench.engine.stats()
    assert after.steady_steps > before.steady_steps + 10
    assert (after.prompt_steps - before.prompt_steps > 5) == bool(bench.engine._settings.prompt_places)
    assert bench.info.padded == 1 + bench.info.max_block
    assert len(outs) > 6
    assert all(out == truths[n][: len(out)] for n, out in outs.items())
    for n in streams:
        await bench.engine.close(f"t{n}")


async def test_steps_that_wait_for_patient_sessions_are_rehearsed_and_say_the_same(bench: Bench) -> None:
    prompts = [random_prompt(760 + n, 10 + n) for n in range(4)]
    params = endless(40).model_copy(update={"policy": Policy.COST})
    truths = [(await bench.answer(prompt, params)).tokens for prompt in prompts]
    before = await bench.engine.stats()

    async def answer(n: int) -> tuple[int, ...]:
        random, stream = Random(n), bench.engine.open(f"p{n}", prompts[n], (), params)
        out = (await next_output(stream)).tokens
        while len(out) < len(truths[n]):
            await asyncio.sleep(random.uniform(0.0, 0.05))
            await bench.engine.submit(f"p{n}", len(out), partly_right(truths[n], out, random))
            out += (await next_output(stream)).tokens
        return out

    found = await asyncio.gather(*(answer(n) for n in range(4)))
    after = await bench.engine.stats()
    assert found == truths
    assert after.steady_steps > before.steady_steps
    assert after.dropped_hints > before.dropped_hints, "no step was rehearsed"


# --- passes before their time -------------------------------------------------------------------------------------


def now_and_then(share: float) -> Drafter:
    """One that is partly right, that often."""
    return lambda truth, out, rng: partly_right(truth, out, rng) if rng.random() < share else ()


@pytest.mark.parametrize("count", [1, 3, MAX_SESSIONS])
@pytest.mark.parametrize("drafts", [0.0, 0.1, 0.5])
async def test_passes_that_are_launched_early_say_the_same(early: Bench, count: int, drafts: float) -> None:
    prompts = [random_prompt(800 + n, 8 + 7 * n) for n in range(count)]
    params = [eager(20 + n) for n in range(count)]
    truths = [await early.answer(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    before = await early.engine.stats()
    drafter = now_and_then(drafts)
    found = await asyncio.gather(
        *(
            early.follow(f"e{n}", prompts[n], truths[n].tokens, params[n], drafter, n, PAUSE_S)
            for n in range(count)
        )
    )
    assert found == truths
    spent = await early.engine.stats()
    if not drafts:
        assert spent.early_steps - before.early_steps > 10
    assert spent.kv_usage == 0.0


async def test_early_passes_are_exact_beside_sessions_of_every_kind(early: Bench) -> None:
    """Patient ones, drawn ones and those with log-probabilities come while passes are under way, and others leave."""
    prompts = [random_prompt(850 + n, 8 + 5 * n) for n in range(MAX_SESSIONS)]
    own = {n: endless(30) if n % 4 else mixed(n // 4) for n in range(MAX_SESSIONS)}
    truths = [(await early.answer(prompts[n], own[n])).tokens for n in own]
    before = await early.engine.stats()

    async def other(n: int) -> Tokens:
        await asyncio.sleep(0.02 * n)
        said = await early.speculate(f"k{n}", prompts[n], truths[n], own[n], partly_right, n)
        return said.tokens

    async def leave(n: int) -> Tokens:
        stream = early.engine.open(f"l{n}", prompts[n], (), GenerationParams(max_tokens=99, ignore_eos=True))
        await next_output(stream)
        await asyncio.sleep(0.01 * n)
        await early.engine.close(f"l{n}")
        return truths[n]

    async def session(n: int) -> Tokens:
        if n % 4 < 2:
            return await (leave(n) if n % 4 else other(n))
        params = eager(len(truths[n]))
        return (await early.follow(f"k{n}", prompts[n], truths[n], params, nothing, n, PAUSE_S)).tokens

    assert await asyncio.gather(*(session(n) for n in own)) == truths
    assert (await early.engine.stats()).early_steps > before.early_steps


async def test_sessions_that_are_computed_anew_between_early_passes_are_exact(
    tiny_target: TinyTarget, even_batches: None
) -> None:
    """There is room for their prompts, and not for all that they say."""
    settings = cramped(tiny_target, kv_cache_mb=4, floor_ahead=AHEAD, early_passes=True)
    async with Bench.over(VllmEngine(settings)) as bench:
        count, length = 8, 60
        prompts = [random_prompt(seed, bench.info.kv_capacity_tokens // count - 40) for seed in range(count)]
        params = eager(length)
        truths = [await bench.answer(prompt, params) for prompt in prompts]
        before = await bench.engine.stats()
        found = await asyncio.gather(
            *(
                bench.follow(f"s{n}", prompts[n], truths[n].tokens, params, nothing, n, PAUSE_S)
                for n in range(count)
            )
        )
        stats = await bench.engine.stats()
    assert found == truths
    assert stats.preemptions > before.preemptions
    assert stats.early_steps > before.early_steps


# --- hardly any room ----------------------------------------------------------------------------------------------


def cramped(target: TinyTarget, **more: object) -> VerifierSettings:
    """KV for a part of the sessions: they come back with other blocks than they had."""
    wanted = {"kv_cache_mb": 2, "max_sessions": 8, "exit_layers": "6", **more}
    return settings_for(target, max_batched_tokens=ROOM, **wanted)


async def test_sessions_that_are_computed_anew_between_even_passes_are_exact(
    tiny_target: TinyTarget, even_batches: None
) -> None:
    async with Bench.over(VllmEngine(cramped(tiny_target))) as bench:
        prompts, params = [random_prompt(seed, 60 + 4 * seed) for seed in range(8)], endless(30)
        truths = [await bench.answer(prompt, params) for prompt in prompts]
        found = await asyncio.gather(
            *(
                bench.speculate(f"s{n}", prompts[n], truths[n].tokens, params, partly_right, n)
                for n in range(8)
            )
        )
        stats = await bench.engine.stats()
    assert found == truths
    assert stats.preemptions > 0
    assert stats.steady_steps > 0
