"""The verifier that replays: what it accepts, what is stale, how it ends, what its exits foresee."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from loadtest.replay_head import HeadOptions, head_drafts
from loadtest.replay_verifier import ReplayEngine, parse_exits
from services.verifier.engine.types import BlockStatus, EngineOutput, ExitReport
from services.verifier.settings import VerifierSettings
from shared.errors import InvalidRequest
from shared.protocol import FinishReason, GenerationParams, Policy, Tokens

PROMPT: Tokens = (1, 2)
ANSWER: Tokens = (10, 11, 12, 13, 14, 15, 16, 17)


def engine(foresight: float = 1.0, *, stops: frozenset[int] = frozenset()) -> ReplayEngine:
    return ReplayEngine(
        VerifierSettings(), {PROMPT: ANSWER}, pass_ms=2.0, exits={60: foresight, 90: foresight}, stops=stops
    )


async def opened(
    replay: ReplayEngine, seen: list[ExitReport], most: int = 100
) -> AsyncIterator[EngineOutput]:
    await replay.start(seen.append)
    return replay.open("a", PROMPT, (), GenerationParams(max_tokens=most))


async def test_it_accepts_what_agrees_and_adds_the_next_token() -> None:
    replay, seen = engine(), list[ExitReport]()
    outputs = await opened(replay, seen)
    assert await anext(outputs) == EngineOutput((10,))
    assert await replay.submit("a", 1, (11, 12, 99)) is BlockStatus.ARMED
    assert await anext(outputs) == EngineOutput((11, 12, 13))
    assert await replay.submit("a", 4, ()) is BlockStatus.ARMED
    assert await anext(outputs) == EngineOutput((14,))
    for report, layer in zip(seen, (60, 90, 60, 90), strict=True):
        assert report.layer == layer
    first = seen[0].outcomes[0]
    assert (seen[0].base, first.accepted, first.next_token) == (1, 2, 13)


async def test_a_block_on_an_old_base_is_trimmed_where_it_agrees_and_stale_elsewhere() -> None:
    replay = engine()
    outputs = await opened(replay, [])
    await anext(outputs)
    await replay.submit("a", 1, ())
    assert await replay.submit("a", 1, (11, 12, 13)) is BlockStatus.QUEUED
    assert await anext(outputs) == EngineOutput((11,))
    assert await anext(outputs) == EngineOutput((12, 13, 14))
    assert await replay.submit("a", 1, (11, 99)) is BlockStatus.STALE
    assert await replay.submit("a", 9, ()) is BlockStatus.STALE
    assert await replay.submit("b", 0, ()) is BlockStatus.GONE


@pytest.mark.parametrize(
    ("stops", "most", "said", "reason"),
    [
        (frozenset[int](), 3, (11, 12), FinishReason.LENGTH),
        (frozenset({17}), 100, ANSWER[1:], FinishReason.STOP),
    ],
)
async def test_it_ends_at_the_limit_and_with_the_answer(
    stops: frozenset[int], most: int, said: Tokens, reason: FinishReason
) -> None:
    replay = engine(stops=stops)
    outputs = await opened(replay, [], most)
    await anext(outputs)
    await replay.submit("a", 1, ANSWER[1:])
    assert await anext(outputs) == EngineOutput(said, reason)
    async with asyncio.timeout(5):
        assert [output async for output in outputs] == []
    assert await replay.submit("a", 1, ()) is BlockStatus.GONE


async def test_its_head_drafts_behind_each_pass_for_sessions_that_go_on_by_themselves() -> None:
    head = HeadOptions(ms_per_pass=1.0)
    replay = ReplayEngine(VerifierSettings(), {PROMPT: ANSWER}, pass_ms=2.0, exits={}, head=head)
    assert (await replay.start(lambda _: None)).draft_head == "replayed"
    eager = replay.open("a", PROMPT, (), GenerationParams(max_tokens=100))
    assert (await anext(eager)).drafted == head_drafts(head, len(PROMPT), ANSWER, 1)
    await replay.submit("a", 1, (11, 99))
    assert (await anext(eager)).drafted == head_drafts(head, len(PROMPT), ANSWER, 3)
    patient = replay.open("b", PROMPT, (), GenerationParams(max_tokens=100, policy=Policy.COST))
    assert (await anext(patient)).drafted == ()


async def test_exits_without_foresight_name_something_else_first() -> None:
    replay, seen = engine(0.0), list[ExitReport]()
    outputs = await opened(replay, seen)
    await anext(outputs)
    for base in (1, 3, 5):
        await replay.submit("a", base, (ANSWER[base],))
        assert await anext(outputs) == EngineOutput(ANSWER[base : base + 2])
    assert len(seen) == 6
    for report in seen:
        first = report.outcomes[0]
        assert first.next_token not in ANSWER or ANSWER[report.base + first.accepted] != first.next_token


async def test_a_prompt_that_it_does_not_know_is_refused() -> None:
    replay = engine()
    with pytest.raises(InvalidRequest):
        await anext(replay.open("a", (5,), (), GenerationParams(max_tokens=5)))


def test_exits_are_read_from_text() -> None:
    assert parse_exits("0.6:0.5,0.9:1") == {60: 0.5, 90: 1.0}
    for text in ("0.6", "x:1", "1.5:0.5", "0.5:2"):
        with pytest.raises(InvalidRequest):
            parse_exits(text)
