"""How the engine's tests use it: a bench around an engine, clients with all sorts of drafts, small questions."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.types import BlockStatus, EngineInfo, EngineOutput, EngineStats, ExitReport
from services.verifier.settings import VerifierSettings
from shared.protocol import GenerationParams, Policy, Tokens
from tests.integration.tiny_target import VOCABULARY, TinyTarget, random_prompt

MAX_MODEL_LEN = 256
MAX_BATCHED = 96
MAX_SESSIONS = 16
MAX_BLOCK = 8
DEADLINE_S = 20.0

Drafter = Callable[[Tokens, Tokens, random.Random], Tokens]
"""(the true answer, what is out, randomness) → a block."""


@dataclass
class Bench:
    """An engine, its exits' reports in the order of their sending with their arrival times, and the way a client uses it."""

    engine: VllmEngine
    info: EngineInfo
    reports: list[tuple[float, ExitReport]] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def over(cls, engine: VllmEngine) -> AsyncIterator[Bench]:
        """Start the engine, and stop it in the end."""
        reports: list[tuple[float, ExitReport]] = []
        info = await engine.start(lambda report: reports.append((time.monotonic(), report)))
        try:
            yield cls(engine, info, reports)
        finally:
            await engine.stop()

    async def answer(self, prompt: Tokens, params: GenerationParams) -> EngineOutput:
        return await asyncio.wait_for(self.engine.alone(prompt, params), DEADLINE_S)

    async def heard(self, base: int, layer: int) -> None:
        """Return when this exit's report on this base has arrived, and with it all that was sent before it."""
        deadline = time.monotonic() + DEADLINE_S
        while not any((report.base, report.layer) == (base, layer) for _, report in self.reports):
            assert time.monotonic() < deadline, f"the exit after layer {layer} said nothing on base {base}"
            await asyncio.sleep(0.001)

    def note_outcomes(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Tokens]]:
        """From now on, all that requests say, and when on the engine process' clock the pass that said it was over."""
        assert self.engine._llm is not None
        processor = self.engine._llm.output_processor
        honest, noted = processor.process_outputs, list[tuple[float, Tokens]]()

        def noting(outputs: list[Any], made_s: float, *rest: Any, **more: Any) -> Any:
            noted.extend((made_s, tuple(output.new_token_ids)) for output in outputs)
            return honest(outputs, made_s, *rest, **more)

        monkeypatch.setattr(processor, "process_outputs", noting)
        return noted

    async def speculate(
        self,
        session: str,
        prompt: Tokens,
        truth: Tokens,
        params: GenerationParams,
        drafter: Drafter,
        seed: int = 0,
    ) -> EngineOutput:
        """A whole session: blocks from `drafter` until it finishes; every block is answered by exactly one output."""
        rng = random.Random(seed)

        async def submit(tokens: Tokens) -> Tokens:
            block = drafter(truth, tokens, rng)
            status = await self.engine.submit(session, len(tokens), block)
            assert status in (BlockStatus.ARMED, BlockStatus.QUEUED)
            return block

        def is_answer(said: int, block: int, accepted: int) -> bool:
            return said == accepted + 1

        return await self._in_blocks(session, prompt, truth, params, submit, is_answer)

    async def follow(
        self,
        session: str,
        prompt: Tokens,
        truth: Tokens,
        params: GenerationParams,
        drafter: Drafter,
        seed: int,
        pause_s: float = 0.0,
    ) -> EngineOutput:
        """A whole session of a client that is sometimes slow: each of its blocks gets one answer, that goes on from it."""
        rng = random.Random(seed)

        async def submit(tokens: Tokens) -> Tokens:
            await asyncio.sleep(rng.random() * pause_s)
            block = drafter(truth, tokens, rng)
            await self.engine.submit(session, len(tokens), block)
            return block

        def is_answer(said: int, block: int, accepted: int) -> bool:
            return said >= max(1, accepted + (accepted < block))

        return await self._in_blocks(session, prompt, truth, params, submit, is_answer)

    async def _in_blocks(
        self,
        session: str,
        prompt: Tokens,
        truth: Tokens,
        params: GenerationParams,
        submit: Callable[[Tokens], Awaitable[Tokens]],
        is_answer: Callable[[int, int, int], bool],
    ) -> EngineOutput:
        """A whole session: `submit` sends a block after these tokens, and `is_answer` says whether so many tokens answer one
        of that length of which so many are right."""
        stream = self.engine.open(session, prompt, (), params)
        output = await next_output(stream)
        tokens = output.tokens
        while output.finish_reason is None:
            block = await submit(tokens)
            output = await next_output(stream)
            accepted = common_prefix(block, truth[len(tokens) :])
            if output.finish_reason is None:
                said = f"{session} after {len(tokens)} tokens: {output.tokens} of {block}"
                assert is_answer(len(output.tokens), len(block), accepted), said
            tokens += output.tokens
        await assert_ended(stream)
        return EngineOutput(tokens, output.finish_reason)


async def next_output(stream: AsyncIterator[EngineOutput]) -> EngineOutput:
    return await asyncio.wait_for(anext(stream), DEADLINE_S)


async def assert_ended(stream: AsyncIterator[EngineOutput]) -> None:
    with pytest.raises(StopAsyncIteration):
        await next_output(stream)


def common_prefix(left: Tokens, right: Tokens) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def change(since: EngineStats, until: EngineStats) -> dict[str, int]:
    names = (
        "steps",
        "scheduled_tokens",
        "prefill_tokens",
        "recomputed_tokens",
        "plain_tokens",
        "blocks",
        "block_tokens",
    )
    return {
        name: getattr(until, name) - getattr(since, name)
        for name in (*names, "preemptions", "accepted_tokens")
    }


def always_right(truth: Tokens, out: Tokens, rng: random.Random) -> Tokens:
    return truth[len(out) :][:MAX_BLOCK]


def always_wrong(truth: Tokens, out: Tokens, rng: random.Random) -> Tokens:
    return tuple((token + 1) % VOCABULARY for token in always_right(truth, out, rng))


def random_tokens(truth: Tokens, out: Tokens, rng: random.Random) -> Tokens:
    return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(0, MAX_BLOCK)))


def nothing(truth: Tokens, out: Tokens, rng: random.Random) -> Tokens:
    return ()


def partly_right(truth: Tokens, out: Tokens, rng: random.Random) -> Tokens:
    block = list(always_right(truth, out, rng)[: rng.randint(0, MAX_BLOCK)])
    if block and rng.random() < 0.7:
        spot = rng.randrange(len(block))
        block[spot] = (block[spot] + 1) % VOCABULARY
    return tuple(block)


DRAFTERS: dict[str, Drafter] = {
    "always right": always_right,
    "always wrong": always_wrong,
    "random": random_tokens,
    "empty": nothing,
    "partly right": partly_right,
}


def settings_for(target: TinyTarget, **changes: object) -> VerifierSettings:
    return VerifierSettings.model_validate(
        {
            "model": str(target.directory),
            "max_model_len": MAX_MODEL_LEN,
            "max_batched_tokens": MAX_BATCHED,
            "max_sessions": MAX_SESSIONS,
            "max_block": MAX_BLOCK,
            "kv_cache_mb": 32,
            "exit_layers": "4,6,7",
            "exit_modules": "none",
            **changes,
        }
    )


def endless(max_tokens: int = 40) -> GenerationParams:
    return GenerationParams(max_tokens=max_tokens, ignore_eos=True, policy=Policy.COST)


def eager(max_tokens: int = 40) -> GenerationParams:
    return GenerationParams(max_tokens=max_tokens, ignore_eos=True, policy=Policy.LATENCY)


def assert_accounted(since: EngineStats, until: EngineStats) -> None:
    """Every token scheduled is a first prefill, a recomputation, a block's or a plain request's."""
    spent = change(since, until)
    parts = ("prefill_tokens", "recomputed_tokens", "plain_tokens", "blocks", "block_tokens")
    assert spent["scheduled_tokens"] == sum(spent[part] for part in parts)


async def read_until(stream: AsyncIterator[EngineOutput], length: int) -> Tokens:
    out: Tokens = ()
    while len(out) < length:
        out += (await next_output(stream)).tokens
    return out


async def until_parked(bench: Bench) -> None:
    """The one session has gone as far ahead as it may."""
    deadline = time.monotonic() + DEADLINE_S
    while (stats := await bench.engine.stats()).running or not stats.parked:
        assert time.monotonic() < deadline, f"it goes on and on: {stats}"
        await asyncio.sleep(0.01)


async def until_idle(bench: Bench) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while (stats := await bench.engine.stats()).parked or stats.running or stats.kv_usage:
        assert time.monotonic() < deadline, f"KV is still held: {stats}"


async def flush_prefix_cache(bench: Bench) -> None:
    """Make the next prefill a real one: fill the cache with other prompts."""
    blocks = bench.info.kv_capacity_tokens // 128
    for n in range(blocks + 1):
        await bench.answer(random_prompt(1000 + n, 129), endless(1))


def engine_process() -> psutil.Process:
    (found,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if "EngineCore" in " ".join(process.cmdline()) or "EngineCore" in process.name()
    )
    return found
