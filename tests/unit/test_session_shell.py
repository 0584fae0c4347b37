"""A session's I/O around the core: order, what is done when, and what a failure costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from services.verifier import session_shell
from services.verifier.engine.types import BlockStatus, Engine, EngineOutput
from services.verifier.floor_drafts import LOOKED_UP
from services.verifier.session_shell import Chain, Passes, SessionShell
from shared.bus import Bus, Received
from shared.errors import BrokerUnavailable, StoreUnavailable
from shared.protocol import (
    Block,
    Cancel,
    DraftsMessage,
    Fault,
    GenerationParams,
    Policy,
    Prompt,
    ReplyRoute,
    Tokens,
    Topic,
    Verdict,
    VerdictsMessage,
)
from shared.sampling.sparse import SparseRow
from shared.session import SessionState, SessionStatus
from shared.store import Claim, CommitResult, Store

ROUTE = ReplyRoute(gateway="g", partition=0)


# --- the chain ----------------------------------------------------------------------------------------------------


async def test_steps_run_in_order_one_at_a_time() -> None:
    chain, ran = Chain(), list[str]()

    async def step(name: str) -> None:
        ran.append(f"{name} begins")
        await asyncio.sleep(0)
        ran.append(f"{name} ends")

    chain.put(lambda: step("first"))
    chain.put(lambda: step("second"))
    await chain.drained()
    assert ran == ["first begins", "first ends", "second begins", "second ends"]


async def test_a_step_may_put_another_which_is_waited_for() -> None:
    chain, ran = Chain(), list[str]()

    async def inner() -> None:
        ran.append("inner")

    async def outer() -> None:
        chain.put(inner)
        ran.append("outer")

    chain.put(outer)
    await chain.drained()
    assert ran == ["outer", "inner"]


async def test_a_step_that_is_cancelled_does_not_take_the_rest_along() -> None:
    chain, ran = Chain(), list[str]()

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def closing() -> None:
        ran.append("closed")

    chain.put(cancelled)
    chain.put(closing)
    await chain.drained()
    assert ran == ["closed"]


# --- a shell among stand-ins --------------------------------------------------------------------------------------


@dataclass
class _Store:
    """Redis, of which a test decides when it answers."""

    committed: list[int] = field(default_factory=list)
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    notes: int = 0
    most_notes: int = 0
    released: list[int] = field(default_factory=list)
    away: bool = False
    policy: Policy = Policy.COST
    prompt: Tokens = (1,)

    async def claim(self, session: str, *, epoch: int, owner: str) -> Claim:
        if self.away:
            raise StoreUnavailable("no answer from Redis")
        state = SessionState(
            session=session,
            status=SessionStatus.OPEN,
            epoch=epoch,
            base=0,
            prompt_length=1,
            params=GenerationParams(max_tokens=100, policy=self.policy),
            model="m",
            verifier="v",
            partition=0,
            owner=owner,
            reply=ROUTE,
            finish_reason=None,
            last_round=-1,
            last_base=-1,
            created_ms=0,
            touched_ms=0,
        )
        return Claim(state, self.prompt, (), False)

    async def commit(self, session: str, *, base: int, tokens: Tokens, **_: object) -> CommitResult:
        self.committed[base:] = tokens
        return CommitResult(len(self.committed), False)

    async def set_round(self, session: str, **_: object) -> bool:
        self.notes += 1
        self.most_notes = max(self.most_notes, self.notes)
        await self.answers.wait()
        self.notes -= 1
        return True

    async def release(self, session: str, *, epoch: int, owner: str) -> bool:
        self.released.append(epoch)
        return True


@dataclass
class _Bus:
    """Kafka, which acknowledges when a test lets it."""

    sent: list[VerdictsMessage] = field(default_factory=list)
    acknowledges: asyncio.Event = field(default_factory=asyncio.Event)
    away: bool = False

    async def send(self, message: VerdictsMessage, **_: object) -> None:
        self.sent.append(message)
        await self.acknowledges.wait()
        if self.away:
            raise BrokerUnavailable("Kafka did not take a message")


@dataclass
class _Engine:
    """Says the next number for whatever is asked."""

    outputs: asyncio.Queue[EngineOutput] = field(default_factory=asyncio.Queue)
    closed: list[str] = field(default_factory=list)
    submitted: list[Tokens] = field(default_factory=list)
    silent: bool = False

    async def open(
        self, session: str, prompt: Tokens, committed: Tokens, params: GenerationParams
    ) -> AsyncIterator[EngineOutput]:
        yield EngineOutput((10,))
        while True:
            yield await self.outputs.get()

    async def submit(
        self,
        session: str,
        base: int,
        tokens: Tokens,
        confidences: Sequence[int] = (),
        rows: Sequence[SparseRow] = (),
        *,
        alone: bool = False,
    ) -> BlockStatus:
        self.submitted.append(tokens)
        if not self.silent:
            self.outputs.put_nowait(EngineOutput((10 + base,)))
        return BlockStatus.ARMED

    async def close(self, session: str) -> None:
        self.closed.append(session)


class _Host:
    """The service around a shell."""

    incarnation = "v/1"

    def __init__(self) -> None:
        self.redis, self.kafka, self.model = _Store(), _Bus(), _Engine()
        self.engine = cast(Engine, self.model)
        self.store = cast(Store, self.redis)
        self.bus = cast(Bus, self.kafka)
        self.passes = Passes()
        self.read: list[int] = []
        self.held: set[str] = set()
        self.forgotten: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def take_place(self, shell: SessionShell) -> bool:
        self.held.add(shell.session)
        return True

    def leave_place(self, shell: SessionShell) -> None:
        self.held.discard(shell.session)

    def forget(self, session: str) -> None:
        self.forgotten.append(session)

    def done(self, received: Received[DraftsMessage]) -> None:
        self.read.append(received.offset)

    def background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Dialogue:
    """A shell that is fed messages."""

    def __init__(self) -> None:
        self.host = _Host()
        self.shell = SessionShell("s", self.host, max_block=4, chain=Chain())
        self._offset = 0

    def receive(self, message: DraftsMessage) -> None:
        self.shell.receive(Received(message, Topic.DRAFTS, 0, self._offset, None, 0))
        self._offset += 1

    def prompt(self) -> None:
        self.receive(Prompt(session="s", epoch=1, reply=ROUTE))

    def block(self, number: int, base: int, *tokens: int) -> None:
        self.receive(Block(session="s", epoch=1, reply=ROUTE, round=number, base=base, tokens=tokens))

    async def sent(self, count: int) -> Any:
        """The `count`-th answer."""
        await until(lambda: len(self.host.kafka.sent) >= count)
        return self.host.kafka.sent[count - 1]


async def until(holds: Any) -> None:
    end_s = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end_s, "not in time"
        await asyncio.sleep(0)


@pytest.fixture
async def dialogue() -> AsyncIterator[Dialogue]:
    dialogue = Dialogue()
    yield dialogue
    dialogue.host.redis.answers.set()
    dialogue.host.kafka.acknowledges.set()
    dialogue.receive(Cancel(session="s", epoch=9, reason="end"))
    await dialogue.shell.chain.drained()
    await asyncio.gather(*dialogue.host.tasks)


async def test_a_message_is_done_when_its_answer_is_acknowledged_and_not_before(dialogue: Dialogue) -> None:
    dialogue.prompt()
    assert isinstance(await dialogue.sent(1), Verdict)
    assert dialogue.host.read == []
    dialogue.host.kafka.acknowledges.set()
    await until(lambda: dialogue.host.read == [0])


async def test_a_round_that_begins_before_the_last_answer_is_acknowledged_does_not_hold_it_up(
    dialogue: Dialogue,
) -> None:
    dialogue.prompt()
    await dialogue.sent(1)
    dialogue.host.model.silent = True
    dialogue.block(1, 1, 7)
    dialogue.host.kafka.acknowledges.set()
    await until(lambda: dialogue.host.read == [0])
    assert dialogue.shell.unanswered == 1


async def test_an_answer_that_kafka_did_not_take_is_left_to_be_asked_for_again(dialogue: Dialogue) -> None:
    dialogue.host.kafka.away = True
    dialogue.host.kafka.acknowledges.set()
    dialogue.prompt()
    first = await dialogue.sent(1)
    await until(lambda: dialogue.host.read == [0])
    dialogue.host.kafka.away = False
    dialogue.prompt()
    again = await dialogue.sent(2)
    assert (again.round, again.tokens) == (first.round, first.tokens)


async def test_of_the_notes_of_rounds_one_is_under_way_at_a_time(
    dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_shell, "NOTE_AFTER_S", 0.0)
    dialogue.host.kafka.acknowledges.set()
    dialogue.prompt()
    await dialogue.sent(1)
    dialogue.host.model.silent = True
    for number in range(1, 20):
        dialogue.block(number, number, 7)
        if number == 1:
            await until(lambda: dialogue.host.redis.notes == 1)
        dialogue.host.model.outputs.put_nowait(EngineOutput((10 + number,)))
        await dialogue.sent(number + 1)
    assert dialogue.host.redis.most_notes == 1
    dialogue.host.redis.answers.set()
    await until(lambda: not dialogue.host.tasks)


async def test_a_round_that_ends_at_once_is_not_noted(
    dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_shell, "NOTE_AFTER_S", 0.05)
    dialogue.host.kafka.acknowledges.set()
    dialogue.host.redis.answers.set()
    dialogue.prompt()
    await dialogue.sent(1)
    dialogue.block(1, 1, 7)
    await dialogue.sent(2)
    await until(lambda: not dialogue.host.tasks)
    assert dialogue.host.redis.most_notes == 0


async def test_a_place_is_left_once_the_engine_has_let_go(dialogue: Dialogue) -> None:
    dialogue.prompt()
    await dialogue.sent(1)
    assert dialogue.host.held == {"s"}
    dialogue.receive(Cancel(session="s", epoch=1, reason="client left"))
    assert dialogue.host.forgotten == ["s"]
    assert dialogue.host.held == {"s"}
    await dialogue.shell.chain.drained()
    assert dialogue.host.model.closed == ["s"]
    assert dialogue.host.held == set()
    assert dialogue.host.redis.released == [1]


async def test_a_store_that_is_away_is_a_fault_with_when_to_try_again(dialogue: Dialogue) -> None:
    dialogue.host.redis.away = True
    dialogue.prompt()
    fault = await dialogue.sent(1)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.retry_after_s) == ("store_unavailable", 0.5)


async def test_a_defect_in_the_stream_is_a_fault_that_keeps_the_log_to_itself(
    dialogue: Dialogue, caplog: pytest.LogCaptureFixture
) -> None:
    dialogue.prompt()
    await dialogue.sent(1)
    dialogue.host.model.outputs.put_nowait(cast(EngineOutput, None))
    dialogue.block(1, 1, 7)
    fault = await dialogue.sent(2)
    assert isinstance(fault, Fault)
    assert fault.code == "internal_error"
    assert "NoneType" not in fault.message
    assert "NoneType" in caplog.text


# --- what passes take ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 6, 96])
def test_what_a_pass_usually_takes_is_the_engines_line_at_its_rows(rows: int) -> None:
    assert Passes(fixed_ms=20.0, row_ms=1.5).usual_ms(rows) == 20.0 + 1.5 * rows


def test_what_a_pass_usually_takes_is_not_known_before_the_engine_says_it() -> None:
    assert Passes().usual_ms(3) is None
    assert Passes(fixed_ms=20.0).usual_ms(3) is None, "the engine has seen no passes of different rows yet"


async def test_an_answer_says_what_passes_take(dialogue: Dialogue) -> None:
    passes = dialogue.host.passes
    passes.fixed_ms, passes.row_ms, passes.padded = 6.3, 0.0143, 6
    dialogue.prompt()
    told = await dialogue.sent(1)
    assert isinstance(told, Verdict)
    assert (told.fixed_ms, told.row_ms, told.padded) == (6.3, 0.0143, 6)


# --- what the floor looks up --------------------------------------------------------------------------------------


def test_a_row_has_to_bring_what_all_who_share_the_pass_would_get_meanwhile() -> None:
    passes = Passes()
    assert passes.least_worth() == 0.0
    passes.fixed_ms, passes.row_ms = 50.0, 5.0
    assert passes.least_worth() == pytest.approx(5 / 55)
    passes.tokens.saw(2.0)
    assert passes.least_worth() == pytest.approx(2 * 5 / 55)
    passes.sessions, passes.rows = 15, 29
    assert passes.least_worth() == pytest.approx(16 * 2 * 5 / 200)


@pytest.mark.parametrize(
    ("row_ms", "looked_up"), [(0.0, (11, 12, 13, 14)), (5.0, (11, 12)), (50.0, ())], ids=str
)
async def test_the_floor_looks_up_what_is_worth_its_rows_and_learns_from_all_that_was_found(
    dialogue: Dialogue, row_ms: float, looked_up: Tokens
) -> None:
    """The engine says 10, which 11, 12, 13 and 14 have followed: one token is found again, and blocks have four."""
    host = dialogue.host
    host.redis.policy, host.redis.prompt = Policy.LATENCY, (5, 10, 11, 12, 13, 14)
    host.passes.fixed_ms, host.passes.row_ms = 50.0, row_ms
    host.model.silent = True
    dialogue.prompt()
    await until(lambda: host.model.submitted)
    assert host.model.submitted == [looked_up]
    assert host.passes.floor.looked_up.right(1) == LOOKED_UP[1]
    host.model.outputs.put_nowait(EngineOutput((11,)))
    await until(lambda: host.passes.floor.looked_up.right(1) > LOOKED_UP[1])
