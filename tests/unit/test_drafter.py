"""The asyncio face: batches, cancellation, failures and the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

import services.draft_gateway.drafting.drafter as drafter_module
from services.draft_gateway.drafting.drafter import QUEUE, Drafter
from services.draft_gateway.drafting.engine import (
    Draft,
    DraftRequest,
    Dropped,
    Ready,
    none_dropped,
    none_told,
)
from shared.errors import Overloaded


class GatedEngine:
    """Drafts the lane's number, once the gate is open; remembers its batches."""

    name = "gated"
    immediate = False

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        self.forgotten: list[str] = []
        self.dropped: list[bool] = []

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        self.entered.set()
        assert self.gate.wait(10)
        self.batches.append([request.lane for request in requests])
        self.dropped = [dropped(request) for request in requests]
        if any(request.lane == 13 for request in requests):
            raise ValueError("an unlucky lane")
        return [Draft((request.lane,), (1.0,)) for request in requests]

    def forget(self, session: str) -> None:
        self.forgotten.append(session)


def request(lane: int) -> DraftRequest:
    return DraftRequest("s", lane, (1,), 1)


async def started(engine: GatedEngine, drafter: Drafter) -> asyncio.Task[Draft]:
    """A first draft that the worker is busy with."""
    first = asyncio.create_task(drafter.draft(request(0)))
    assert await asyncio.to_thread(engine.entered.wait, 10)
    return first


async def test_what_waits_is_drafted_as_one_batch() -> None:
    engine = GatedEngine()
    drafter = Drafter(engine)
    first = await started(engine, drafter)
    waiting = [asyncio.create_task(drafter.draft(request(lane))) for lane in (1, 2, 3)]
    await asyncio.sleep(0)
    engine.gate.set()
    drafts = await asyncio.gather(first, *waiting)
    assert [draft.tokens for draft in drafts] == [(0,), (1,), (2,), (3,)]
    assert engine.batches == [[0], [1, 2, 3]]
    drafter.close()


async def test_what_follows_from_a_draft_is_in_the_next_batch_with_what_waited_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafter_module, "BREATH_S", 10.0)  # a busy machine's loop may be late
    engine = GatedEngine()
    drafter = Drafter(engine)

    async def draft_and_go_on() -> Draft:
        await drafter.draft(request(0))
        return await asyncio.create_task(drafter.draft(request(2)))

    following = asyncio.create_task(draft_and_go_on())
    assert await asyncio.to_thread(engine.entered.wait, 10)
    waiting = asyncio.create_task(drafter.draft(request(1)))
    await asyncio.sleep(0)
    engine.gate.set()
    await asyncio.gather(following, waiting)
    assert engine.batches == [[0], [1, 2]]
    drafter.close()


async def test_a_cancelled_draft_is_never_begun() -> None:
    engine = GatedEngine()
    drafter = Drafter(engine)
    first = await started(engine, drafter)
    second, third = (asyncio.create_task(drafter.draft(request(lane))) for lane in (1, 2))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    engine.gate.set()
    await asyncio.gather(first, third)
    assert engine.batches == [[0], [2]]
    drafter.close()


async def test_a_draft_that_is_cancelled_while_it_is_made_is_reported_as_dropped() -> None:
    engine = GatedEngine()
    drafter = Drafter(engine)
    first = await started(engine, drafter)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    engine.gate.set()
    await drafter.draft(request(1))
    drafter.close()
    assert engine.batches == [[0], [1]]


class SteppingEngine(GatedEngine):
    """Drafts one token after the other until its request is dropped."""

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        self.entered.set()
        deadline = time.monotonic() + 10
        while not dropped(requests[0]):
            assert time.monotonic() < deadline
        return [Draft((), ()) for _ in requests]


async def test_a_draft_that_is_cancelled_while_it_is_made_ends_early() -> None:
    engine = SteppingEngine()
    drafter = Drafter(engine)
    first = await started(engine, drafter)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    second = asyncio.create_task(drafter.draft(request(1)))
    await asyncio.sleep(0)
    await asyncio.to_thread(drafter.close)  # would wait for ever if the worker did not see that it is closed
    assert isinstance((await asyncio.gather(second, return_exceptions=True))[0], BaseException | Draft)


async def test_closing_from_another_thread_ends_the_drafts_that_wait() -> None:
    engine = GatedEngine()
    drafter = Drafter(engine)
    first = await started(engine, drafter)
    second = asyncio.create_task(drafter.draft(request(1)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(drafter.close))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(second, 10)
    engine.gate.set()
    await asyncio.gather(first, closing)


async def test_an_engine_that_fails_fails_its_batch_and_goes_on() -> None:
    engine = GatedEngine()
    engine.gate.set()
    drafter = Drafter(engine)
    with pytest.raises(ValueError, match="unlucky"):
        await drafter.draft(request(13))
    assert (await drafter.draft(request(1))).tokens == (1,)
    drafter.close()


async def test_forgetting_comes_after_the_drafts_before_it() -> None:
    engine = GatedEngine()
    drafter = Drafter(engine)
    first = await started(engine, drafter)
    drafter.forget("s")
    engine.gate.set()
    await first
    await drafter.draft(request(1))
    assert engine.forgotten == ["s"]
    drafter.close()


async def test_a_full_queue_refuses() -> None:
    engine = GatedEngine()
    drafter = Drafter(engine)
    first = await started(engine, drafter)
    waiting = [asyncio.create_task(drafter.draft(request(lane))) for lane in range(1, QUEUE + 1)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await drafter.draft(request(QUEUE + 1))
    drafter_closed = asyncio.to_thread(drafter.close)
    engine.gate.set()
    await drafter_closed
    await asyncio.gather(first, *waiting, return_exceptions=True)


async def test_closing_drops_what_waits_and_refuses_more() -> None:
    engine = GatedEngine()
    drafter = Drafter(engine)
    first = await started(engine, drafter)
    second = asyncio.create_task(drafter.draft(request(1)))
    await asyncio.sleep(0)
    engine.gate.set()
    await asyncio.to_thread(drafter.close)
    assert (await asyncio.gather(first, second, return_exceptions=True))[0] is not None
    with pytest.raises(Overloaded):
        await drafter.draft(request(2))


class StepwiseEngine(GatedEngine):
    """Has all tokens before the gate opens, and looks beyond them after it."""

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        for number, request in enumerate(requests):
            ready(number, Draft((request.lane,), (1.0,)))
        return super().draft(requests, dropped)


async def test_tokens_are_shown_while_the_engine_looks_beyond_them() -> None:
    engine = StepwiseEngine()
    drafter = Drafter(engine)
    seen: asyncio.Future[Draft] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(drafter.draft(request(7), seen.set_result))
    assert (await seen).tokens == (7,)
    assert not task.done()
    engine.gate.set()
    assert (await task).tokens == (7,)
    drafter.close()


async def test_a_draft_that_was_dropped_is_not_shown() -> None:
    engine = StepwiseEngine()
    drafter = Drafter(engine)
    seen: list[Draft] = []
    first = await started(engine, drafter)
    task = asyncio.create_task(drafter.draft(request(7), seen.append))
    await asyncio.sleep(0)
    task.cancel()
    engine.gate.set()
    await first
    await asyncio.gather(task, return_exceptions=True)
    assert seen == []
    drafter.close()
