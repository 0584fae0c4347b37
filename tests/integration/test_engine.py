"""The engine on real vLLM: sessions, blocks, exits, limits. One engine for the module, on a tiny random Llama."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.types import UNHEARD, BlockStatus, EngineOutput
from shared.errors import ContextLengthExceeded, EngineError, InvalidRequest, Overloaded
from shared.protocol import FinishReason, GenerationParams
from tests.integration.engine_bench import (
    DEADLINE_S,
    DRAFTERS,
    MAX_BATCHED,
    MAX_BLOCK,
    MAX_MODEL_LEN,
    MAX_SESSIONS,
    Bench,
    always_right,
    change,
    endless,
    engine_process,
    flush_prefix_cache,
    next_output,
    nothing,
    partly_right,
    read_until,
    settings_for,
    until_idle,
)
from tests.integration.tiny_target import VOCABULARY, TinyTarget, random_prompt

EXITS = (4, 6, 7)
"""After which layers; see `settings_for`."""

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tiny_target: TinyTarget) -> AsyncIterator[Bench]:
    async with Bench.over(VllmEngine(settings_for(tiny_target))) as bench:
        yield bench


async def test_engine_says_what_it_runs(bench: Bench) -> None:
    info = bench.info
    assert info.padded == 0
    assert (info.num_layers, info.vocab_size, info.max_model_len) == (8, VOCABULARY, MAX_MODEL_LEN)
    assert (info.max_block, info.max_sessions, info.dtype) == (MAX_BLOCK, MAX_SESSIONS, "float32")
    assert (info.exit_layers, info.exits, info.notes) == (EXITS, "untrained", ())
    assert info.kv_capacity_tokens > MAX_MODEL_LEN
    assert bench.engine.healthy()


async def test_plain_answer_is_that_of_transformers(bench: Bench, tiny_target: TinyTarget) -> None:
    found = await bench.answer(tiny_target.prompt, GenerationParams(max_tokens=64))
    assert found == EngineOutput(tiny_target.answer, FinishReason.STOP)


@pytest.mark.parametrize("drafter", DRAFTERS)
async def test_output_is_the_plain_answer_whatever_is_drafted(bench: Bench, drafter: str) -> None:
    prompt, params = random_prompt(7, 20), endless()
    truth = await bench.answer(prompt, params)
    found = await bench.speculate("one", prompt, truth.tokens, params, DRAFTERS[drafter])
    assert found == truth


async def test_sixteen_sessions_at_a_time_are_exact_and_cost_one_pass_a_block(bench: Bench) -> None:
    prompts = [random_prompt(seed, 8 + 5 * seed) for seed in range(MAX_SESSIONS)]
    params = endless()
    truths = [await bench.answer(prompt, params) for prompt in prompts]
    before = await bench.engine.stats()
    kinds = list(DRAFTERS.values())
    found = await asyncio.gather(
        *(
            bench.speculate(f"many-{n}", prompts[n], truths[n].tokens, params, kinds[n % len(kinds)], seed=n)
            for n in range(MAX_SESSIONS)
        )
    )
    after = await bench.engine.stats()
    assert found == truths
    spent = change(before, after)
    assert spent["prefill_tokens"] + after.prefix_cache_hit_tokens - before.prefix_cache_hit_tokens == sum(
        map(len, prompts)
    )
    assert spent["scheduled_tokens"] == spent["prefill_tokens"] + spent["blocks"] + spent["block_tokens"]
    assert spent["recomputed_tokens"] == spent["preemptions"] == spent["plain_tokens"] == 0
    assert spent["steps"] < spent["blocks"], "sessions are not batched"
    assert (after.parked, after.running, after.waiting, after.kv_usage) == (0, 0, 0, 0.0)


async def test_stats_count_blocks_and_their_tokens(bench: Bench) -> None:
    prompt, params = random_prompt(3, 10), endless(30)
    truth = (await bench.answer(prompt, params)).tokens
    before = await bench.engine.stats()
    stream = bench.engine.open("counted", prompt, (), params)
    out = (await next_output(stream)).tokens
    for length in (0, 3, 5):
        assert await bench.engine.submit("counted", len(out), truth[len(out) :][:length]) is BlockStatus.ARMED
        out += (await next_output(stream)).tokens
    spent = change(before, await bench.engine.stats())
    assert (spent["blocks"], spent["block_tokens"], spent["accepted_tokens"]) == (3, 8, 8)
    assert spent["scheduled_tokens"] == len(prompt) + 3 + 8
    assert spent["steps"] == 4
    await bench.engine.close("counted")


async def test_every_exit_speaks_once_in_the_order_of_layers_before_the_outcome_of_its_pass(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the prompt and on every block. Times are those at which the engine process sent a hint and had an outcome."""
    prompt, params = random_prompt(4, 16), endless(64)
    truth = (await bench.answer(prompt, params)).tokens
    outcomes = bench.note_outcomes(monkeypatch)
    bench.reports.clear()
    stream = bench.engine.open("early", prompt, (), params)
    bases = [0]
    out = (await next_output(stream)).tokens
    rng = random.Random(5)
    while len(out) < 48:
        bases.append(len(out))
        await bench.engine.submit("early", len(out), partly_right(truth, out, rng))
        out += (await next_output(stream)).tokens
    await bench.heard(bases[-1], EXITS[-1])
    await bench.engine.close("early")
    reports = [report for _, report in bench.reports]
    assert [(report.session, report.base, report.layer) for report in reports] == [
        ("early", base, layer) for base in bases for layer in EXITS
    ]
    assert sum((tokens for _, tokens in outcomes), ()) == out
    assert len(outcomes) == len(bases)
    hints = [reports[first : first + len(EXITS)] for first in range(0, len(reports), len(EXITS))]
    emitted = []
    for own, (over_s, _) in zip(hints, outcomes, strict=True):
        assert 0 < own[0].elapsed_ms < own[1].elapsed_ms < own[2].elapsed_ms
        emitted += [*(report.sent_s for report in own), over_s]
    assert emitted == sorted(emitted)


async def test_an_exit_ranks_different_outcomes_by_their_confidence(bench: Bench) -> None:
    prompt, params = random_prompt(4, 16), endless(64)
    truth = (await bench.answer(prompt, params)).tokens
    bench.reports.clear()
    stream = bench.engine.open("ranked", prompt, (), params)
    out = (await next_output(stream)).tokens
    rng = random.Random(5)
    for _ in range(8):
        base = len(out)
        await bench.engine.submit("ranked", base, partly_right(truth, out, rng))
        out += (await next_output(stream)).tokens
    await bench.heard(base, EXITS[-1])
    await bench.engine.close("ranked")
    for _, report in bench.reports:
        confidences = [outcome.confidence for outcome in report.outcomes]
        assert 1 <= len(report.outcomes) <= 8
        assert confidences == sorted(confidences, reverse=True)
        assert sum(confidences) <= 1.0001
        assert len({(outcome.accepted, outcome.next_token) for outcome in report.outcomes}) == len(
            report.outcomes
        )


async def test_exits_are_silent_on_a_block_whose_hints_nobody_waits_for(bench: Bench) -> None:
    prompt, params = random_prompt(4, 16), endless()
    truth = (await bench.answer(prompt, params)).tokens
    bench.reports.clear()
    stream = bench.engine.open("unheard", prompt, (), params)
    out = (await next_output(stream)).tokens
    heard = [0]
    for number in range(6):
        base, block = len(out), always_right(truth, out, random.Random())[:3]
        unheard = number % 2 == 0
        await bench.engine.submit("unheard", base, block, (UNHEARD,) * 3 if unheard else ())
        out += (await next_output(stream)).tokens
        heard += [] if unheard else [base]
    await bench.heard(heard[-1], EXITS[-1])
    await bench.engine.close("unheard")
    assert [(report.base, report.layer) for _, report in bench.reports] == [
        (base, layer) for base in heard for layer in EXITS
    ]


async def test_exits_foresee_nothing_for_a_session_that_nobody_listens_for(bench: Bench) -> None:
    prompts, params = [random_prompt(14, 16), random_prompt(15, 16)], endless(40)
    truths = [await bench.answer(prompt, params) for prompt in prompts]
    bench.reports.clear()
    deaf = params.model_copy(update={"unheard": True})
    found = await asyncio.gather(
        bench.speculate("deaf", prompts[0], truths[0].tokens, deaf, always_right),
        bench.speculate("hearing", prompts[1], truths[1].tokens, params, always_right),
    )
    assert found == truths
    assert {report.session for _, report in bench.reports} == {"hearing"}


async def test_eos_inside_an_accepted_block_ends_the_answer(bench: Bench, tiny_target: TinyTarget) -> None:
    truth = (await bench.answer(tiny_target.prompt, endless(64))).tokens
    assert truth[: len(tiny_target.answer)] == tiny_target.answer
    found = await bench.speculate(
        "eos", tiny_target.prompt, truth, GenerationParams(max_tokens=64), always_right
    )
    assert found == EngineOutput(tiny_target.answer, FinishReason.STOP)


async def test_ignore_eos_goes_past_it(bench: Bench, tiny_target: TinyTarget) -> None:
    found = await bench.speculate(
        "past", tiny_target.prompt, tiny_target.answer, endless(len(tiny_target.answer) + 9), nothing
    )
    assert len(found.tokens) == len(tiny_target.answer) + 9
    assert found.tokens[: len(tiny_target.answer)] == tiny_target.answer
    assert found.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("spot", [0, 1, 5, 8, 9])
async def test_stop_token_anywhere_in_a_block_ends_the_answer(bench: Bench, spot: int) -> None:
    prompt = random_prompt(9, 14)
    truth = (await bench.answer(prompt, endless())).tokens
    stop = truth[spot]
    params = GenerationParams(max_tokens=40, ignore_eos=True, stop_token_ids=(stop,))
    found = await bench.speculate("stop", prompt, truth, params, always_right)
    assert found == EngineOutput(truth[: truth.index(stop) + 1], FinishReason.STOP)


@pytest.mark.parametrize("max_tokens", [1, 2, 9, 10, 11])
async def test_max_tokens_is_met_exactly_inside_a_block(bench: Bench, max_tokens: int) -> None:
    prompt = random_prompt(10, 14)
    truth = (await bench.answer(prompt, endless())).tokens
    found = await bench.speculate("cut", prompt, truth, endless(max_tokens), always_right)
    assert found == EngineOutput(truth[:max_tokens], FinishReason.LENGTH)


async def test_answer_ends_at_the_context_limit(bench: Bench) -> None:
    prompt = random_prompt(11, MAX_MODEL_LEN - 20)
    truth = await bench.answer(prompt, endless(100))
    assert (len(truth.tokens), truth.finish_reason) == (20, FinishReason.LENGTH)
    assert await bench.speculate("limit", prompt, truth.tokens, endless(100), always_right) == truth


async def test_prompt_that_fills_the_context_is_refused(bench: Bench) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"256 tokens.*at most 255"):
        bench.engine.open("long", random_prompt(1, MAX_MODEL_LEN), (), endless())


async def test_prompt_longer_than_a_step_is_prefilled_in_chunks(bench: Bench) -> None:
    prompt = random_prompt(12, 2 * MAX_BATCHED + 10)
    truth = await bench.answer(prompt, endless(20))
    before = await bench.engine.stats()
    assert await bench.speculate("chunks", prompt, truth.tokens, endless(20), partly_right) == truth
    spent = change(before, await bench.engine.stats())
    assert spent["scheduled_tokens"] == spent["prefill_tokens"] + spent["blocks"] + spent["block_tokens"]


async def test_block_during_the_prefill_is_verified_after_it(bench: Bench) -> None:
    prompt = random_prompt(13, 2 * MAX_BATCHED + 30)
    truth = (await bench.answer(prompt, endless(20))).tokens
    await flush_prefix_cache(bench)
    stream = bench.engine.open("eager", prompt, (), endless(20))
    reading = asyncio.create_task(read_until(stream, 6))
    statuses = []
    deadline = time.monotonic() + DEADLINE_S
    while not statuses or statuses[-1] is BlockStatus.GONE:
        assert time.monotonic() < deadline
        statuses.append(await bench.engine.submit("eager", 0, truth[:5]))
    assert statuses[-1] is BlockStatus.QUEUED
    assert await asyncio.wait_for(reading, DEADLINE_S) == truth[:6]
    await bench.engine.close("eager")


async def test_block_during_the_prefill_that_proves_wrong_changes_nothing(bench: Bench) -> None:
    prompt = random_prompt(14, 2 * MAX_BATCHED + 30)
    truth = (await bench.answer(prompt, endless(20))).tokens
    await flush_prefix_cache(bench)
    stream = bench.engine.open("hasty", prompt, (), endless(20))
    reading = asyncio.create_task(read_until(stream, 1))
    wrong = tuple((token + 1) % VOCABULARY for token in truth[:4])
    deadline = time.monotonic() + DEADLINE_S
    while await bench.engine.submit("hasty", 0, wrong) is BlockStatus.GONE:
        assert time.monotonic() < deadline
    out = await asyncio.wait_for(reading, DEADLINE_S)
    assert await bench.engine.submit("hasty", len(out), truth[1:5]) is BlockStatus.ARMED
    assert (await next_output(stream)).tokens == truth[1:6]
    await bench.engine.close("hasty")


async def test_stale_and_duplicate_blocks_change_nothing(bench: Bench) -> None:
    prompt = random_prompt(15, 12)
    truth = (await bench.answer(prompt, endless())).tokens
    stream = bench.engine.open("stale", prompt, (), endless())
    out = (await next_output(stream)).tokens
    for _ in range(2):
        block = truth[len(out) :][:3]
        assert await bench.engine.submit("stale", len(out), block) is BlockStatus.ARMED
        out += (await next_output(stream)).tokens
        assert await bench.engine.submit("stale", len(out) - 4, block) is BlockStatus.STALE
    assert await bench.engine.submit("stale", len(out) + 1, truth[:2]) is BlockStatus.STALE
    assert (
        await bench.engine.submit("stale", len(out) - 1, ((out[-1] + 1) % VOCABULARY, 5)) is BlockStatus.STALE
    )
    assert await bench.engine.submit("stale", len(out), ()) is BlockStatus.ARMED
    out += (await next_output(stream)).tokens
    assert out == truth[: len(out)]
    await bench.engine.close("stale")


async def test_same_block_twice_at_once_is_verified_once(bench: Bench) -> None:
    prompt = random_prompt(16, 12)
    truth = (await bench.answer(prompt, endless())).tokens
    stream = bench.engine.open("twice", prompt, (), endless())
    await next_output(stream)
    before = await bench.engine.stats()
    statuses = await asyncio.gather(*(bench.engine.submit("twice", 1, truth[1:4]) for _ in range(3)))
    assert statuses[0] is BlockStatus.ARMED
    assert (await next_output(stream)).tokens == truth[1:5]
    assert await bench.engine.submit("twice", 5, truth[5:7]) is BlockStatus.ARMED
    assert (await next_output(stream)).tokens == truth[5:8]
    spent = change(before, await bench.engine.stats())
    assert (spent["blocks"], spent["block_tokens"]) == (2, 5)
    await bench.engine.close("twice")


async def test_block_on_an_older_base_is_trimmed_where_it_agrees(bench: Bench) -> None:
    prompt = random_prompt(17, 12)
    truth = (await bench.answer(prompt, endless())).tokens
    stream = bench.engine.open("trim", prompt, (), endless())
    await next_output(stream)
    assert await bench.engine.submit("trim", 0, truth[:6]) is BlockStatus.ARMED
    assert (await next_output(stream)).tokens == truth[1:7]
    await bench.engine.close("trim")


async def test_close_in_mid_pass_frees_the_kv_and_leaves_others_alone(bench: Bench) -> None:
    prompts = [random_prompt(20 + n, 60) for n in range(4)]
    truths = [(await bench.answer(prompt, endless())).tokens for prompt in prompts]
    streams = [bench.engine.open(f"abort-{n}", prompt, (), endless()) for n, prompt in enumerate(prompts)]
    for stream in streams:
        await next_output(stream)
    for n in range(4):
        await bench.engine.submit(f"abort-{n}", 1, truths[n][1:9])
    await asyncio.gather(bench.engine.close("abort-0"), bench.engine.close("abort-1"))
    assert await bench.engine.submit("abort-0", 1, ()) is BlockStatus.GONE
    for n in (2, 3):
        assert (await next_output(streams[n])).tokens == truths[n][1:10]
    for n in (0, 1):
        remaining = [output async for output in streams[n]]
        assert all(output.finish_reason is None for output in remaining)
    assert (await bench.engine.stats()).parked == 2
    again = bench.engine.open("abort-0", prompts[0], (), endless())
    assert (await next_output(again)).tokens == truths[0][:1]
    for n in range(4):
        await bench.engine.close(f"abort-{n}")
        await bench.engine.close(f"abort-{n}")
    await until_idle(bench)


async def test_leaving_the_iteration_closes_the_session(bench: Bench) -> None:
    stream = bench.engine.open("left", random_prompt(2, 10), (), endless())
    await next_output(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await until_idle(bench)
    assert await bench.engine.submit("left", 1, ()) is BlockStatus.GONE


@pytest.mark.parametrize("committed", [1, 2, 13, 30])
async def test_restored_session_goes_on_exactly(bench: Bench, committed: int) -> None:
    prompt, params = random_prompt(30, 25), endless(40)
    truth = (await bench.answer(prompt, params)).tokens
    stream = bench.engine.open("again", prompt, truth[:committed], params)
    out = truth[:committed] + (await next_output(stream)).tokens
    finish_reason = None
    rng = random.Random(committed)
    while finish_reason is None:
        status = await bench.engine.submit("again", len(out), partly_right(truth, out, rng))
        assert status is BlockStatus.ARMED
        output = await next_output(stream)
        out, finish_reason = out + output.tokens, output.finish_reason
    assert (out, finish_reason) == (truth, FinishReason.LENGTH)


async def test_restored_session_reports_exits_with_the_sessions_base(bench: Bench) -> None:
    prompt = random_prompt(31, 25)
    truth = (await bench.answer(prompt, endless())).tokens
    bench.reports.clear()
    stream = bench.engine.open("bases", prompt, truth[:10], endless())
    await next_output(stream)
    await bench.engine.submit("bases", 11, truth[11:14])
    await next_output(stream)
    await bench.heard(11, EXITS[-1])
    assert {report.base for _, report in bench.reports} == {10, 11}
    assert await bench.engine.submit("bases", 9, truth[9:14]) is BlockStatus.STALE
    await bench.engine.close("bases")


async def test_finished_session_cannot_be_opened(bench: Bench, tiny_target: TinyTarget) -> None:
    with pytest.raises(InvalidRequest, match="finished: 5 tokens are committed, max_tokens is 5"):
        bench.engine.open("done", tiny_target.prompt, tiny_target.answer[:5], GenerationParams(max_tokens=5))
    with pytest.raises(InvalidRequest, match="finished: its last committed token"):
        bench.engine.open("done", tiny_target.prompt, tiny_target.answer, GenerationParams(max_tokens=50))


async def test_shared_prefix_is_found_in_the_cache_and_exact(bench: Bench) -> None:
    shared = random_prompt(40, 140)
    params = endless(12)
    truths = [await bench.answer((*shared, n), params) for n in (5, 6)]
    before = await bench.engine.stats()
    for n, truth in zip((5, 6), truths, strict=True):
        found = await bench.speculate(f"shared-{n}", (*shared, n), truth.tokens, params, partly_right, seed=n)
        assert found == truth
    after = await bench.engine.stats()
    hits = after.prefix_cache_hit_tokens - before.prefix_cache_hit_tokens
    assert hits >= 2 * 128
    assert change(before, after)["prefill_tokens"] == 2 * len(shared) + 2 - hits


async def test_parked_sessions_leave_the_engine_asleep(bench: Bench) -> None:
    streams = [bench.engine.open(f"idle-{n}", random_prompt(n, 10), (), endless()) for n in range(3)]
    for stream in streams:
        await next_output(stream)
    steps = (await bench.engine.stats()).steps
    process = engine_process()
    began = sum(process.cpu_times()[:2])
    await asyncio.sleep(1.0)
    assert sum(process.cpu_times()[:2]) - began < 0.1
    stats = await bench.engine.stats()
    assert (stats.steps, stats.parked, stats.running) == (steps, 3, 0)
    for n in range(3):
        await bench.engine.close(f"idle-{n}")


async def test_more_sessions_than_there_is_room_for_are_refused(bench: Bench) -> None:
    prompt = random_prompt(1, 10)
    streams = [bench.engine.open(f"full-{n}", prompt, (), endless()) for n in range(MAX_SESSIONS)]
    with pytest.raises(Overloaded, match="all 16 sessions"):
        bench.engine.open("one-more", prompt, (), endless())
    await asyncio.gather(*(next_output(stream) for stream in streams))
    for n in range(MAX_SESSIONS):
        await bench.engine.close(f"full-{n}")
    assert (await next_output(bench.engine.open("one-more", prompt, (), endless(1)))).tokens
    await until_idle(bench)


async def test_plain_request_gets_in_among_sessions_that_fill_the_engine(bench: Bench) -> None:
    prompt, params = random_prompt(50, 10), endless(10)
    truth = await bench.answer(prompt, params)
    streams = [
        bench.engine.open(f"seat-{n}", random_prompt(60 + n, 10), (), params) for n in range(MAX_SESSIONS)
    ]
    firsts = [(await next_output(stream)).tokens for stream in streams]
    assert await bench.answer(prompt, params) == truth
    for n, stream in enumerate(streams):
        await bench.engine.submit(f"seat-{n}", 1, ())
        second = (await next_output(stream)).tokens
        plain = await bench.answer(random_prompt(60 + n, 10), endless(2))
        assert firsts[n] + second == plain.tokens
        await bench.engine.close(f"seat-{n}")


async def test_bad_input_is_refused_with_its_reason(bench: Bench) -> None:
    prompt = random_prompt(1, 10)
    with pytest.raises(InvalidRequest, match=f"prompt holds token {VOCABULARY}"):
        bench.engine.open("bad", (5, VOCABULARY), (), endless())
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        bench.engine.open("bad", (), (), endless())
    stream = bench.engine.open("bad", prompt, (), endless())
    with pytest.raises(EngineError, match="bad is open"):
        bench.engine.open("bad", prompt, (), endless())
    await next_output(stream)
    with pytest.raises(InvalidRequest, match="block of 9 tokens is longer than 8"):
        await bench.engine.submit("bad", 1, (3,) * 9)
    with pytest.raises(InvalidRequest, match="block holds token 600"):
        await bench.engine.submit("bad", 1, (600,))
    assert await bench.engine.submit("unknown", 0, ()) is BlockStatus.GONE
    await bench.engine.close("bad")
