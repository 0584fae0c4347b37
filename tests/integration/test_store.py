"""The store against a real server: fencing, exactly-once commits, restarts, expiry, indexes, leases, clear errors."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot

from shared.errors import InvalidRequest, SessionNotFound, SessionTaken, StoreUnavailable
from shared.protocol import FinishReason, GenerationParams, OpenSession, Outcome, ReplyRoute, TokenLogprobs
from shared.redis_client import RedisClient, Script
from shared.session import SessionState, SessionStatus
from shared.settings import CommonSettings
from shared.stack.ports import free_port
from shared.stack.redis import RedisServer
from shared.store import CommitConflict, CommitResult, StaleClaim, StaleState, Store

HERE = ReplyRoute(gateway="gateway-0", partition=0)
THERE = ReplyRoute(gateway="gateway-1", partition=1)


def settings_for(url: str, **changes: object) -> CommonSettings:
    values: dict[str, object] = {"redis_prefix": f"test-{uuid.uuid4().hex}:", "store_deadline_s": 10.0}
    return CommonSettings.model_validate({**values, "redis_url": SecretStr(url), **changes})


@asynccontextmanager
async def a_store(url: str, **changes: object) -> AsyncIterator[Store]:
    async with Store(settings_for(url, **changes)) as store:
        yield store


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    async with a_store(redis_url) as store:
        yield store


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_url)
    yield client
    await client.aclose()


def an_open(
    session: str = "s", *, prompt: tuple[int, ...] = (1, 2, 3), reply: ReplyRoute = HERE
) -> OpenSession:
    params = GenerationParams(max_tokens=1000, stop_token_ids=(7,), seed=5)
    return OpenSession(
        session=session, reply=reply, prompt=prompt, params=params, model="m", metadata={"user": "ü"}
    )


async def opened(store: Store, session: str = "s", *, partition: int = 3) -> str:
    await store.create(an_open(session), verifier="v", partition=partition)
    return session


async def until(condition: object, *, deadline_s: float = 10.0) -> None:
    """Poll an async condition."""
    end_s = time.monotonic() + deadline_s
    while not await condition():  # type: ignore[operator]
        assert time.monotonic() < end_s, "the condition did not come true in time"
        await asyncio.sleep(0.02)


# --- open ---------------------------------------------------------------------------------------------------------


async def test_a_session_opened_is_kept_whole(store: Store) -> None:
    state = await store.create(an_open(), verifier="v", partition=3)
    assert state == await store.state("s")
    assert (state.epoch, state.base, state.status, state.owner) == (1, 0, SessionStatus.OPEN, "")
    assert (state.model, state.verifier, state.partition, state.reply) == ("m", "v", 3, HERE)
    assert (state.params, state.metadata) == (an_open().params, {"user": "ü"})
    assert (state.prompt_length, state.last_round, state.finish_reason) == (3, -1, None)
    assert await store.prompt("s") == (1, 2, 3)
    assert await store.tokens("s") == ()


async def test_the_same_open_again_changes_nothing(store: Store) -> None:
    session = await opened(store)
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5,))
    again = await store.create(an_open(), verifier="another", partition=9)
    assert (again.verifier, again.partition, again.base, again.epoch) == ("v", 3, 1, 1)
    assert await store.tokens(session) == (5,)


async def test_another_open_of_a_session_that_exists_is_refused(store: Store) -> None:
    await opened(store)
    with pytest.raises(SessionTaken, match="choose another id"):
        await store.create(an_open(prompt=(9,)), verifier="v", partition=3)


async def test_an_open_without_prompt_or_parameters_is_refused(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        await store.create(OpenSession(session="s", reply=HERE), verifier="v", partition=0)
    assert await store.state("s") is None


async def test_steps_on_a_session_that_does_not_exist_say_so(store: Store) -> None:
    with pytest.raises(SessionNotFound, match="expired"):
        await store.claim("none", epoch=1, owner="a")
    with pytest.raises(SessionNotFound):
        await store.commit("none", epoch=1, round=0, base=0, tokens=(1,))
    with pytest.raises(SessionNotFound):
        await store.place("none", verifier="v", partition=0)
    with pytest.raises(SessionNotFound):
        await store.close("none", status=SessionStatus.CLOSED, reason="")
    with pytest.raises(SessionNotFound):
        await store.prompt("none")
    with pytest.raises(SessionNotFound):
        await store.erase("none")
    assert await store.state("none") is None
    assert await store.tokens("none") == ()
    assert not await store.touch("none")
    assert not await store.release("none", epoch=1, owner="a")


# --- commit -------------------------------------------------------------------------------------------------------


async def test_commits_append_and_count(store: Store) -> None:
    session = await opened(store)
    assert await store.commit(session, epoch=1, round=0, base=0, tokens=(5,)) == CommitResult(1, False)
    result = await store.commit(session, epoch=1, round=1, base=1, tokens=(6, 7), drafted=4, accepted=1)
    assert result == CommitResult(3, False)
    state = await store.state(session)
    assert state is not None
    assert (state.base, state.last_round, state.last_base) == (3, 1, 1)
    assert (state.stats.rounds, state.stats.drafted, state.stats.accepted) == (2, 4, 1)
    assert await store.tokens(session) == (5, 6, 7)
    assert await store.tokens(session, since=2) == (7,)
    assert await store.tokens(session, since=3) == ()
    assert await store.tokens(session, since=99) == ()


async def test_a_commit_made_twice_counts_once(store: Store) -> None:
    session = await opened(store)
    for expected in (False, True, True):
        result = await store.commit(session, epoch=1, round=0, base=0, tokens=(5, 6), drafted=2, accepted=1)
        assert result == CommitResult(2, expected)
    state = await store.state(session)
    assert state is not None
    assert (state.base, state.stats.rounds, state.stats.drafted) == (2, 1, 2)


async def test_a_commit_on_another_base_changes_nothing_and_tells_what_is_there(store: Store) -> None:
    session = await opened(store)
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5, 6, 7))
    with pytest.raises(CommitConflict) as caught:
        await store.commit(session, epoch=1, round=1, base=1, tokens=(9,))
    conflict = caught.value
    assert (conflict.epoch, conflict.base, conflict.tokens, conflict.fenced) == (1, 3, (6, 7), False)
    assert conflict.gateway == "gateway-0"
    with pytest.raises(CommitConflict) as caught:
        await store.commit(session, epoch=1, round=1, base=4, tokens=(9,))
    assert caught.value.tokens == ()
    assert await store.tokens(session) == (5, 6, 7)


async def test_a_commit_in_an_older_epoch_changes_nothing(store: Store) -> None:
    session = await opened(store)
    await store.place(session, verifier="w", partition=4)
    with pytest.raises(CommitConflict) as caught:
        await store.commit(session, epoch=1, round=0, base=0, tokens=(5,))
    assert (caught.value.fenced, caught.value.epoch) == (True, 2)
    assert await store.tokens(session) == ()


async def test_nothing_follows_a_finish(store: Store) -> None:
    session = await opened(store)
    finish = FinishReason.STOP
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5,), finish_reason=finish)
    repeated = await store.commit(session, epoch=1, round=0, base=0, tokens=(5,), finish_reason=finish)
    assert repeated.repeated
    with pytest.raises(CommitConflict) as caught:
        await store.commit(session, epoch=1, round=1, base=1, tokens=(6,))
    assert (caught.value.finish_reason, caught.value.fenced) == (FinishReason.STOP, False)
    state = await store.state(session)
    assert state is not None
    assert (state.status, state.ended, state.base) == (SessionStatus.FINISHED, True, 1)


async def test_a_finish_may_bring_no_tokens(store: Store) -> None:
    session = await opened(store)
    finish = FinishReason.LENGTH
    for expected in (False, True):
        result = await store.commit(session, epoch=1, round=0, base=0, tokens=(), finish_reason=finish)
        assert result == CommitResult(0, expected)


async def test_of_commits_that_race_on_a_base_one_wins(store: Store) -> None:
    session = await opened(store)
    for base in range(20):
        tries = [store.commit(session, epoch=1, round=base, base=base, tokens=(n,)) for n in range(8)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        winners = [n for n, result in enumerate(results) if isinstance(result, CommitResult)]
        assert len(winners) == 1
        assert sum(isinstance(result, CommitConflict) for result in results) == 7
        assert await store.tokens(session, since=base) == (winners[0],)


# --- claim, release, place ----------------------------------------------------------------------------------------


async def test_a_claim_brings_everything_and_keeps_the_epoch(store: Store) -> None:
    session = await opened(store)
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5, 6))
    for _ in range(2):
        claim = await store.claim(session, epoch=1, owner="a")
        assert (claim.prompt, claim.tokens, claim.took_over) == ((1, 2, 3), (5, 6), False)
        assert (claim.state.epoch, claim.state.owner) == (1, "a")


async def test_taking_a_session_over_fences_its_old_owner_off(store: Store) -> None:
    session = await opened(store)
    await store.claim(session, epoch=1, owner="a")
    claim = await store.claim(session, epoch=1, owner="b")
    assert (claim.took_over, claim.state.epoch, claim.state.owner) == (True, 2, "b")
    with pytest.raises(CommitConflict) as caught:
        await store.commit(session, epoch=1, round=0, base=0, tokens=(5,))
    assert caught.value.fenced
    with pytest.raises(StaleClaim) as stale:
        await store.claim(session, epoch=1, owner="a")
    assert (stale.value.state.epoch, stale.value.state.owner) == (2, "b")


async def test_a_takeover_whose_answer_was_lost_is_recognised(store: Store) -> None:
    session = await opened(store)
    await store.claim(session, epoch=1, owner="a")
    first = await store.claim(session, epoch=1, owner="b")
    again = await store.claim(session, epoch=1, owner="b")
    assert again.took_over
    assert again.state.epoch == first.state.epoch == 2


async def test_of_verifiers_that_race_for_a_session_the_last_to_claim_holds_it_alone(store: Store) -> None:
    session = await opened(store)
    claims = await asyncio.gather(
        *(store.claim(session, epoch=1, owner=name) for name in "abcdef"), return_exceptions=True
    )
    held = [claim for claim in claims if not isinstance(claim, BaseException)]
    assert all(isinstance(claim, StaleClaim) for claim in claims if isinstance(claim, BaseException))
    state = await store.state(session)
    assert state is not None
    assert state.epoch == max(claim.state.epoch for claim in held)
    outcomes = await asyncio.gather(
        *(
            store.commit(session, epoch=claim.state.epoch, round=0, base=0, tokens=(n,))
            for n, claim in enumerate(held)
        ),
        return_exceptions=True,
    )
    winners = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, CommitResult)]
    assert [held[n].state.owner for n in winners] == [state.owner]


async def test_a_released_session_is_claimed_by_another_in_the_same_epoch(store: Store) -> None:
    session = await opened(store)
    await store.claim(session, epoch=1, owner="a")
    assert not await store.release(session, epoch=1, owner="b")
    assert await store.release(session, epoch=1, owner="a")
    claim = await store.claim(session, epoch=1, owner="b")
    assert (claim.took_over, claim.state.epoch) == (False, 1)


async def test_a_release_from_before_the_last_claim_changes_nothing(store: Store) -> None:
    session = await opened(store)
    await store.claim(session, epoch=1, owner="a")
    await store.place(session, verifier="v", partition=3)
    await store.claim(session, epoch=2, owner="a")
    assert not await store.release(session, epoch=1, owner="a")
    state = await store.state(session)
    assert state is not None
    assert state.owner == "a"


async def test_a_session_that_ended_is_shown_but_not_owned(store: Store) -> None:
    session = await opened(store)
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5,), finish_reason=FinishReason.STOP)
    claim = await store.claim(session, epoch=1, owner="a")
    assert (claim.tokens, claim.state.owner, claim.state.finish_reason) == ((5,), "", FinishReason.STOP)


async def test_a_placement_on_the_same_partition_keeps_the_owner_and_on_another_does_not(
    store: Store,
) -> None:
    session = await opened(store, partition=3)
    await store.claim(session, epoch=1, owner="a")
    same = await store.place(session, verifier="v", partition=3, reply=THERE)
    assert (same.epoch, same.owner, same.reply) == (2, "a", THERE)
    other = await store.place(session, verifier="w", partition=4)
    assert (other.epoch, other.owner, other.verifier, other.reply) == (3, "", "w", THERE)


async def test_a_placement_asked_for_twice_is_made_once(store: Store) -> None:
    session = await opened(store)
    for _ in range(2):
        state = await store.place(session, verifier="v", partition=3, request="0@17")
        assert state.epoch == 2
    assert (await store.place(session, verifier="v", partition=3, request="0@18")).epoch == 3


async def test_of_movers_that_expect_the_same_epoch_one_moves(store: Store) -> None:
    session = await opened(store)
    moves = await asyncio.gather(
        *(store.place(session, verifier=f"w{n}", partition=n, expected_epoch=1) for n in range(6)),
        return_exceptions=True,
    )
    moved = [move for move in moves if not isinstance(move, BaseException)]
    stale = [move for move in moves if isinstance(move, StaleState)]
    assert (len(moved), len(stale)) == (1, 5)
    assert await store.state(session) == stale[0].state == moved[0]


# --- log-probabilities --------------------------------------------------------------------------------------------


def told(*tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(logprob=-token / 3, rank=2, top=((9, -0.1), (token, -0.2))) for token in tokens
    )


async def test_what_a_commit_tells_of_its_tokens_is_given_again(store: Store) -> None:
    session = await opened(store)
    first = {"epoch": 1, "round": 0, "base": 0, "tokens": (5, 6), "logprobs": told(5, 6)}
    for _ in range(2):  # the same commit again adds nothing
        await store.commit(session, **first)  # type: ignore[arg-type]
    await store.commit(session, epoch=1, round=1, base=2, tokens=(7,), logprobs=told(7))
    with pytest.raises(CommitConflict):
        await store.commit(session, epoch=1, round=2, base=2, tokens=(8,), logprobs=told(8))
    assert await store.logprobs(session) == told(5, 6, 7)
    assert await store.logprobs(session, 2) == told(7)
    assert (await store.claim(session, epoch=1, owner="a")).logprobs == told(5, 6, 7)


async def test_a_session_that_tells_nothing_of_its_tokens_keeps_nothing(store: Store, redis: Redis) -> None:
    session = await opened(store)
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5,))
    assert await store.logprobs(session) == ()
    assert (await store.claim(session, epoch=1, owner="a")).logprobs == ()
    assert not await redis.exists(store._key(session, "logprobs"))


async def test_what_is_told_goes_with_its_session(store: Store, redis: Redis) -> None:
    session = await opened(store)
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5,), logprobs=told(5))
    key = store._key(session, "logprobs")
    assert 0 < await redis.pttl(key) <= await redis.pttl(store._key(session, "tokens")) + 10
    await store.erase(session)
    assert not await redis.exists(key)


# --- close --------------------------------------------------------------------------------------------------------


async def test_a_closed_session_takes_no_commits_and_keeps_its_tokens(store: Store) -> None:
    session = await opened(store)
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5,))
    state = await store.close(session, status=SessionStatus.CLOSED, reason="client left", epoch=1)
    assert (state.status, state.finish_reason) == (SessionStatus.CLOSED, FinishReason.CANCELLED)
    assert state.close_reason == "client left"
    with pytest.raises(CommitConflict) as caught:
        await store.commit(session, epoch=1, round=1, base=1, tokens=(6,))
    assert caught.value.finish_reason is FinishReason.CANCELLED
    assert await store.tokens(session) == (5,)


async def test_a_detached_session_can_be_reopened_and_a_closed_one_not(store: Store) -> None:
    session = await opened(store)
    assert (await store.close(session, status=SessionStatus.DETACHED, reason="")).status == "detached"
    assert (await store.place(session, verifier="v", partition=3, reopen=True)).status == "open"
    await store.close(session, status=SessionStatus.CLOSED, reason="")
    assert (await store.place(session, verifier="v", partition=3, reopen=True)).status == "closed"


async def test_a_finished_session_stays_finished_when_closed(store: Store) -> None:
    session = await opened(store)
    await store.commit(session, epoch=1, round=0, base=0, tokens=(5,), finish_reason=FinishReason.LENGTH)
    state = await store.close(session, status=SessionStatus.CLOSED, reason="done")
    assert (state.status, state.finish_reason) == (SessionStatus.FINISHED, FinishReason.LENGTH)


async def test_a_gateway_that_was_superseded_cannot_close(store: Store) -> None:
    session = await opened(store)
    await store.place(session, verifier="v", partition=3, reply=THERE)
    for epoch in (0, 1):
        with pytest.raises(StaleState, match="gateway-1"):
            await store.close(session, status=SessionStatus.DETACHED, reason="", epoch=epoch)
    state = await store.state(session)
    assert state is not None
    assert state.status is SessionStatus.OPEN


async def test_a_gateway_that_has_not_heard_of_a_move_can_still_close(store: Store) -> None:
    session = await opened(store)
    await store.place(session, verifier="w", partition=4)
    state = await store.close(session, status=SessionStatus.CLOSED, reason="", epoch=1)
    assert state.status is SessionStatus.CLOSED


# --- against a model ----------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A session as plain Python would keep it."""

    epoch: int = 1
    owner: str = ""
    claimed_epoch: int = 0
    taken: tuple[str, int] | None = None
    partition: int = 0
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    last: tuple[int, int, int, tuple[int, ...], bool] | None = None

    def claim(self, epoch: int, owner: str) -> str:
        repeated = self.taken == (owner, epoch) and self.owner == owner and self.epoch == epoch + 1
        if epoch < self.epoch and not repeated:
            return "stale"
        if self.finished:
            return "taken" if repeated else "kept"
        if repeated:
            return "taken"
        self.epoch = max(self.epoch, epoch)
        took = self.owner not in ("", owner)
        if took:
            self.epoch += 1
            self.taken = (owner, epoch)
        self.owner, self.claimed_epoch = owner, self.epoch
        return "taken" if took else "kept"

    def release(self, epoch: int, owner: str) -> bool:
        if self.owner != owner or epoch < self.claimed_epoch:
            return False
        self.owner = ""
        return True

    def place(self, partition: int, expected: int | None) -> str:
        if expected is not None and expected != self.epoch:
            return "stale"
        self.epoch += 1
        if partition != self.partition:
            self.owner = ""
        self.partition = partition
        return "placed"

    def commit(self, epoch: int, round: int, base: int, tokens: tuple[int, ...], finish: bool) -> str:
        if epoch == self.epoch and self.last == (round, base, len(self.tokens), tokens, finish):
            return "repeated"
        if epoch != self.epoch or base != len(self.tokens) or self.finished:
            return "conflict"
        self.tokens += tokens
        self.finished = finish
        self.last = (round, base, len(self.tokens), tokens, finish)
        return "committed"


EPOCHS = st.integers(1, 5)
STEPS = st.one_of(
    st.tuples(st.just("claim"), EPOCHS, st.sampled_from("ab")),
    st.tuples(st.just("claim now"), st.sampled_from("ab")),
    st.tuples(st.just("release"), EPOCHS, st.sampled_from("ab")),
    st.tuples(st.just("place"), st.integers(0, 1), st.none() | EPOCHS),
    st.tuples(
        st.just("commit"),
        EPOCHS,
        st.integers(0, 3),
        st.integers(0, 5),
        st.lists(st.integers(0, 1), max_size=2).map(tuple),
        st.booleans(),
    ),
    st.tuples(st.just("commit now"), st.lists(st.integers(0, 1), min_size=1, max_size=2).map(tuple)),
    st.tuples(st.just("commit again")),
)


async def take(store: Store, session: str, model: Model, step: tuple[object, ...]) -> tuple[object, object]:
    """What the store says to a step and what the model says."""
    match step:
        case ("claim", int(epoch), str(owner)):
            return await _claim(store, session, epoch, owner), model.claim(epoch, owner)
        case ("claim now", str(owner)):
            epoch = model.epoch
            return await _claim(store, session, epoch, owner), model.claim(epoch, owner)
        case ("release", int(epoch), str(owner)):
            return await store.release(session, epoch=epoch, owner=owner), model.release(epoch, owner)
        case ("place", int(partition), int() | None as expected):
            try:
                await store.place(session, verifier="v", partition=partition, expected_epoch=expected)
                said = "placed"
            except StaleState:
                said = "stale"
            return said, model.place(partition, expected)
        case ("commit", int(epoch), int(round), int(base), tuple(tokens), bool(finish)):
            return await _commit(store, session, model, (epoch, round, base, tokens, finish))
        case ("commit now", tuple(tokens)):
            base = len(model.tokens)
            return await _commit(store, session, model, (model.epoch, base, base, tokens, False))
        case ("commit again",) if model.last is not None:
            round, base, _, tokens, finish = model.last
            return await _commit(store, session, model, (model.epoch, round, base, tokens, finish))
        case _:
            return None, None


async def _claim(store: Store, session: str, epoch: int, owner: str) -> str:
    try:
        claim = await store.claim(session, epoch=epoch, owner=owner)
    except StaleClaim:
        return "stale"
    return "taken" if claim.took_over else "kept"


async def _commit(
    store: Store, session: str, model: Model, commit: tuple[int, int, int, tuple[int, ...], bool]
) -> tuple[str, str]:
    epoch, round, base, tokens, finish = commit
    reason = FinishReason.STOP if finish else None
    expected_tokens = tuple(model.tokens[base:])
    try:
        result = await store.commit(
            session, epoch=epoch, round=round, base=base, tokens=tokens, finish_reason=reason
        )
        said = "repeated" if result.repeated else "committed"
    except CommitConflict as conflict:
        said = "conflict"
        assert conflict.tokens == expected_tokens
        assert (conflict.epoch, conflict.base) == (model.epoch, len(model.tokens))
        assert conflict.fenced == (epoch != model.epoch)
    return said, model.commit(epoch, round, base, tokens, finish)


_numbers = itertools.count()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=25))
async def test_any_sequence_of_steps_does_what_a_plain_model_does(
    redis_url: str, steps: list[tuple[object, ...]]
) -> None:
    async with a_store(redis_url, redis_prefix=f"model-{next(_numbers)}:") as store:
        session = await opened(store, partition=0)
        model = Model()
        highest = 1
        for step in steps:
            said, expected = await take(store, session, model, step)
            assert said == expected, step
            state = await store.state(session)
            assert state is not None
            assert (state.epoch, state.owner, state.base) == (model.epoch, model.owner, len(model.tokens))
            assert await store.tokens(session) == tuple(model.tokens)
            assert state.epoch >= highest
            highest = state.epoch


# --- lost connections and restarts --------------------------------------------------------------------------------


class LossyProxy:
    """Passes bytes to a server, and cuts the connection instead of handing on every `every`-th answer."""

    def __init__(self, url: str, *, every: int) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._every = every
        self._answers = 0
        self.cuts = 0
        self.port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> LossyProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, client: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection(self._host, self._port)
        onward = asyncio.create_task(self._onward(client, server))
        while data := await answers.read(65536):
            self._answers += 1
            if self._answers % self._every == 0:
                self.cuts += 1
                break
            out.write(data)
        onward.cancel()
        out.close()
        server.close()

    @staticmethod
    async def _onward(client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await client.read(65536):
            server.write(data)


async def test_every_step_whose_answer_is_lost_takes_effect_once(redis_url: str) -> None:
    async with (
        LossyProxy(redis_url, every=3) as proxy,
        a_store(f"redis://127.0.0.1:{proxy.port}/0") as store,
    ):
        epoch = 1
        session = await opened(store)
        for number in range(12):
            owner = f"owner-{number}"
            claim = await store.claim(session, epoch=epoch, owner=owner)
            assert claim.state.epoch == epoch + (number % 2)  # placed on another partition each second time
            epoch = claim.state.epoch
            await store.commit(session, epoch=epoch, round=number, base=number, tokens=(number,), drafted=1)
            if number % 2:
                epoch = (await store.place(session, verifier="v", partition=100 + number)).epoch
        state = await store.state(session)
        assert state is not None
        assert await store.tokens(session) == tuple(range(12))
        assert (state.stats.rounds, state.stats.drafted) == (12, 12)
        assert state.epoch == 1 + 6 + 6
        assert proxy.cuts > 10


async def test_commits_outlast_kill_9_and_restart_and_count_once(own_redis: RedisServer) -> None:
    async with a_store(own_redis.url) as store:
        sessions = [await opened(store, f"s{n}") for n in range(4)]
        progress: asyncio.Queue[int] = asyncio.Queue()

        async def write(session: str) -> None:
            for number in range(150):
                result = await store.commit(
                    session, epoch=1, round=number, base=2 * number, tokens=(number, number + 1)
                )
                assert result.base == 2 * number + 2
                progress.put_nowait(number)

        writers = [asyncio.create_task(write(session)) for session in sessions]
        for _ in range(3):
            for _ in range(120):
                await progress.get()
            own_redis.kill()
            await asyncio.sleep(0)
            own_redis.start()
        await asyncio.gather(*writers)
        for session in sessions:
            state = await store.state(session)
            assert state is not None
            assert await store.tokens(session) == tuple(n + d for n in range(150) for d in (0, 1))
            assert (state.base, state.stats.rounds) == (300, 150)


async def test_an_operation_waits_for_a_server_that_comes_back(own_redis: RedisServer) -> None:
    async with a_store(own_redis.url) as store:
        session = await opened(store)
        own_redis.kill()
        waiting = asyncio.create_task(store.commit(session, epoch=1, round=0, base=0, tokens=(5,)))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        own_redis.start()
        assert (await waiting).base == 1


async def test_an_operation_gives_up_past_its_deadline(own_redis: RedisServer) -> None:
    async with a_store(own_redis.url, store_deadline_s=0.5) as store:
        own_redis.kill()
        started_s = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"within 0\.5 s"):
            await store.state("s")
        assert 0.4 < time.monotonic() - started_s < 3
        own_redis.start()
        assert await store.state("s") is None


async def test_scripts_that_the_server_has_forgotten_are_loaded_again(store: Store, redis: Redis) -> None:
    session = await opened(store)
    await redis.script_flush()
    assert (await store.commit(session, epoch=1, round=0, base=0, tokens=(5,))).base == 1


async def test_scripts_asked_together_share_round_trips_and_each_gets_its_own_answer(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = b"if ARGV[1] == 'bad' then return redis.error_reply('BAD luck') end return ARGV[1]"
    echo = Script("echo", source, hashlib.sha1(source).hexdigest().encode())
    sends = 0
    send = AbstractConnection.send_packed_command

    async def counted(connection: AbstractConnection, *arguments: Any, **options: Any) -> None:
        nonlocal sends
        sends += 1
        await send(connection, *arguments, **options)

    async with RedisClient(redis_url, deadline_s=5.0) as client:
        assert await client.script(echo, ["key"], ["first"]) == b"first"
        monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
        asked = [asyncio.create_task(client.script(echo, ["key"], [f"word-{n}"])) for n in range(40)]
        refused = asyncio.create_task(client.script(echo, ["key"], ["bad"]))
        cancelled = asyncio.create_task(client.script(echo, ["key"], ["cancelled"]))
        await asyncio.sleep(0)
        cancelled.cancel()
        assert await asyncio.gather(*asked) == [f"word-{n}".encode() for n in range(40)]
        with pytest.raises(StoreUnavailable, match="BAD luck"):
            await refused
        assert cancelled.cancelled()
        assert sends == 2, "the first alone, then all others"
        await redis.script_flush()
        assert await asyncio.gather(*(client.script(echo, ["key"], [f"again-{n}"]) for n in range(3))) == [
            b"again-0",
            b"again-1",
            b"again-2",
        ]


async def test_a_cancelled_operation_leaves_the_store_usable(store: Store) -> None:
    session = await opened(store)
    for _ in range(20):
        task = asyncio.create_task(store.tokens(session))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await store.prompt(session) == (1, 2, 3)


async def test_many_operations_at_once_share_the_connections(store: Store) -> None:
    sessions = [await opened(store, f"s{n}") for n in range(300)]
    await asyncio.gather(*(store.commit(s, epoch=1, round=0, base=0, tokens=(5,)) for s in sessions))
    assert await asyncio.gather(*(store.tokens(s) for s in sessions)) == [(5,)] * 300


async def test_a_commit_takes_well_under_a_millisecond(store: Store) -> None:
    session = await opened(store)
    numbers = itertools.count()

    async def median_ms() -> float:
        times = []
        for _ in range(60):
            number = next(numbers)
            started_s = time.perf_counter()
            await store.commit(session, epoch=1, round=number, base=4 * number, tokens=(1, 2, 3, 4))
            times.append(time.perf_counter() - started_s)
        return statistics.median(times) * 1000

    # The quietest of many short spells: other programs on the machine are not what is measured.
    assert min([await median_ms() for _ in range(25)]) < 0.8


# --- expiry -------------------------------------------------------------------------------------------------------


async def test_every_change_puts_the_expiry_of_all_of_a_sessions_keys_off(
    redis_url: str, redis: Redis
) -> None:
    settings = settings_for(redis_url, session_ttl_s=1000.0)
    async with Store(settings) as store:
        session = await opened(store)
        await store.commit(session, epoch=1, round=0, base=0, tokens=(5,))
        stem = f"{settings.redis_prefix}{{{session}}}"
        keys = [f"{stem}:{part}" for part in ("state", "prompt", "tokens")]

        async def refreshed() -> bool:
            lives = [await redis.pttl(key) for key in keys]
            for key in keys:
                await redis.pexpire(key, 500_000)
            return all(1_000_000 < life <= 1_030_000 for life in lives)

        assert await refreshed()
        await store.commit(session, epoch=1, round=1, base=1, tokens=(6,))
        assert await refreshed()
        await store.commit(session, epoch=1, round=1, base=1, tokens=(6,))
        assert await refreshed()
        await store.claim(session, epoch=1, owner="a")
        assert await refreshed()
        await store.place(session, verifier="w", partition=9)
        assert await refreshed()
        await store.touch(session)
        assert await refreshed()
        await store.close(session, status=SessionStatus.CLOSED, reason="")
        assert await refreshed()


async def test_all_keys_of_a_session_share_a_hash_slot(redis_url: str, redis: Redis) -> None:
    settings = settings_for(redis_url)
    async with Store(settings) as store:
        for name in ("one", "two", "three"):
            await opened(store, name)
            await store.commit(name, epoch=1, round=0, base=0, tokens=(5,))
            assert await store.set_round(name, epoch=1, round=1, base=1, block=(1,))
            stem = f"{settings.redis_prefix}{{{name}}}:*"
            keys = [key async for key in redis.scan_iter(match=stem.replace("[", "?"), count=1000)]
            assert len(keys) == 4
            assert len({key_slot(key) for key in keys}) == 1


async def test_sessions_nobody_uses_expire_once_and_those_in_use_stay(redis_url: str) -> None:
    async with a_store(redis_url, session_ttl_s=0.4) as store:
        await opened(store, "idle")
        await opened(store, "busy")
        seen: list[str] = []

        async def gone() -> bool:
            await store.touch("busy")
            for batch in await asyncio.gather(*(store.expire() for _ in range(3))):
                seen.extend(state.session for state in batch)
            return await store.state("idle") is None

        await until(gone)
        assert seen == ["idle"]
        assert await store.state("busy") is not None
        assert await store.tokens("idle") == ()
        assert [state.session for state in (await store.sessions()).sessions] == ["busy"]


async def test_a_session_that_redis_dropped_by_itself_leaves_the_indexes(
    redis_url: str, redis: Redis
) -> None:
    settings = settings_for(redis_url, session_ttl_s=0.1)
    async with Store(settings) as store:
        await opened(store)
        await until(lambda: _is(store.state("s"), None))
        assert await store.expire() == []
        assert await redis.zcard(f"{settings.redis_prefix}index:touched") == 0
        assert await redis.zcard(f"{settings.redis_prefix}index:created") == 0


async def _is(value: object, expected: object) -> bool:
    return await value is expected  # type: ignore[misc]


async def test_erasing_a_session_leaves_nothing_of_it(redis_url: str, redis: Redis) -> None:
    settings = settings_for(redis_url)
    async with Store(settings) as store:
        await opened(store)
        assert (await store.erase("s")).session == "s"
        assert await store.state("s") is None
        assert (await store.sessions()).sessions == ()
        assert await store.sessions_on(3) == []
        assert [key async for key in redis.scan_iter(match=f"{settings.redis_prefix}*")] == []


# --- indexes, speculation, leases ---------------------------------------------------------------------------------


async def test_sessions_are_listed_newest_first_page_by_page(store: Store) -> None:
    names = [f"s{n:03}" for n in range(230)]
    for name in names:
        await opened(store, name)
    listed: list[str] = []
    cursor = None
    while True:
        page = await store.sessions(cursor=cursor, limit=7)
        listed += [state.session for state in page.sessions]
        cursor = page.cursor
        if cursor is None:
            break
    assert sorted(listed) == names
    created = [(await _state(store, name)).created_ms for name in listed]
    assert (
        sum(later > earlier for earlier, later in itertools.pairwise(created)) <= 20
    )  # clocks of two processes


async def _state(store: Store, session: str):  # type: ignore[no-untyped-def]
    state = await store.state(session)
    assert state is not None
    return state


async def test_sessions_are_listed_by_status_and_verifier(store: Store) -> None:
    for name in "abcd":
        await opened(store, name)
    await store.place("b", verifier="w", partition=9)
    await store.close("c", status=SessionStatus.DETACHED, reason="")

    async def listed(**filters: object) -> set[str]:
        page = await store.sessions(**filters)  # type: ignore[arg-type]
        return {state.session for state in page.sessions}

    assert await listed() == set("abcd")
    assert await listed(status=SessionStatus.DETACHED) == {"c"}
    assert await listed(verifier="w") == {"b"}
    assert await listed(status=SessionStatus.OPEN, verifier="v") == {"a", "d"}


async def test_a_cursor_that_is_none_is_refused(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        await store.sessions(cursor="nonsense")


async def test_the_open_sessions_of_a_partition_are_found_wherever_they_moved(store: Store) -> None:
    for name in "abc":
        await opened(store, name, partition=3)
    await store.place("a", verifier="w", partition=4)
    await store.close("b", status=SessionStatus.CLOSED, reason="")
    assert [state.session for state in await store.sessions_on(3)] == ["c"]
    assert [state.session for state in await store.sessions_on(4)] == ["a"]
    await store.commit("c", epoch=1, round=0, base=0, tokens=(5,), finish_reason=FinishReason.STOP)
    assert await store.sessions_on(3) == []


@pytest.mark.parametrize("look", [1, 2])
@pytest.mark.parametrize("comes", ["opened", "moved", "reopened"])
async def test_a_session_that_comes_while_its_partition_is_looked_through_is_found_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, comes: str, look: int
) -> None:
    """It is entered in the index before it is there, and who sees that takes it out."""
    if comes == "moved":
        await opened(store, "late", partition=4)
    elif comes == "reopened":
        await opened(store, "late", partition=3)
        await store.close("late", status=SessionStatus.DETACHED, reason="")
    await store._index("late", 3, new=comes == "opened")
    states, looks = store._states, 0

    async def between(sessions: Iterable[str]) -> list[SessionState]:
        nonlocal looks
        found, looks = await states(sessions), looks + 1
        if looks == look:
            if comes == "opened":
                await opened(store, "late", partition=3)
            else:
                await store.place("late", verifier="v", partition=3, reopen=comes == "reopened")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(store, "_states", between)
        assert await store.sessions_on(3) == []
    assert [state.session for state in await store.sessions_on(3)] == ["late"]


async def test_a_session_that_is_opened_again_while_it_closes_is_found_on_its_partition(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened(store, "s", partition=3)
    unindex = store._unindex

    async def between(sessions: Sequence[str], partition: int) -> None:
        await store.place("s", verifier="v", partition=3, reopen=True)
        await unindex(sessions, partition)

    monkeypatch.setattr(store, "_unindex", between)
    await store.close("s", status=SessionStatus.DETACHED, reason="")
    assert [state.session for state in await store.sessions_on(3)] == ["s"]


async def test_speculative_state_is_of_one_round_and_epoch_and_ends_with_the_commit(store: Store) -> None:
    session = await opened(store)
    outcomes = (Outcome(accepted=1, next_token=9, confidence=0.5), Outcome(accepted=0, next_token=8))
    assert await store.speculation(session) is None
    assert await store.set_round(session, epoch=1, round=1, base=0, block=(4, 5))
    assert await store.add_hint(session, epoch=1, round=1, layer=18, outcomes=outcomes)
    assert not await store.add_hint(session, epoch=1, round=2, layer=18, outcomes=outcomes)
    assert not await store.set_round(session, epoch=2, round=2, base=0, block=())
    noted = await store.speculation(session)
    assert noted is not None
    assert (noted.epoch, noted.round, noted.base, noted.block) == (1, 1, 0, (4, 5))
    assert noted.hints == {18: outcomes}
    await store.commit(session, epoch=1, round=1, base=0, tokens=(9,))
    assert await store.speculation(session) is None


async def test_a_lease_has_one_holder_until_it_is_freed_or_lapses(store: Store) -> None:
    assert await store.acquire("seat", "a", 10)
    assert await store.acquire("seat", "a", 10)
    assert not await store.acquire("seat", "b", 10)
    assert not await store.renew("seat", "b", 10)
    assert not await store.free("seat", "b")
    assert await store.holder("seat") == "a"
    assert await store.free("seat", "a")
    assert await store.acquire("seat", "b", 0.05)
    await until(lambda: store.acquire("seat", "c", 10))
    assert not await store.renew("seat", "b", 10)


async def test_drained_verifiers_are_remembered(store: Store) -> None:
    await store.drain("v")
    await store.drain("w")
    await store.undrain("v")
    assert await store.drained() == {"w"}


# --- clear errors -------------------------------------------------------------------------------------------------


async def test_a_missing_redis_is_named_with_its_address_but_not_its_password() -> None:
    port = free_port()
    store = Store(settings_for(f"redis://:hush@127.0.0.1:{port}/0", store_deadline_s=0.3))
    with pytest.raises(StoreUnavailable) as caught:
        await store.start()
    assert f"127.0.0.1:{port}" in caught.value.message
    assert "OUTRIDER_REDIS_URL" in caught.value.message
    assert "hush" not in caught.value.message


async def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(StoreUnavailable, match=r"nonsense.*redis://"):
        Store(settings_for("nonsense"))


async def test_a_wrong_password_is_said_at_once(own_redis: RedisServer) -> None:
    async with Redis.from_url(own_redis.url) as redis:
        await redis.config_set("requirepass", "right")
    place = own_redis.url.removeprefix("redis://")
    for user in (":wrong@", ""):
        store = Store(settings_for(f"redis://{user}{place}"))
        with pytest.raises(StoreUnavailable, match="password"):
            await asyncio.wait_for(store.start(), 5)
    async with a_store(f"redis://:right@{place}") as store:
        assert await store.state("s") is None


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """A server that says the same to every command it hears."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while heard := await reader.read(65536):
            writer.write(answer * len(re.findall(rb"\*\d+\r\n", heard)))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_what_is_no_redis_is_said_to_be_none() -> None:
    async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        with pytest.raises(StoreUnavailable, match="doesn't speak Redis' protocol"):
            await asyncio.wait_for(Store(settings_for(f"redis://127.0.0.1:{port}/0")).start(), 5)


@pytest.mark.parametrize("version", ["6.2.14", "5.0"])
async def test_an_old_redis_is_refused_with_its_version(version: str) -> None:
    info = f"# Server\r\nredis_version:{version}\r\n".encode()
    async with answering(b"$%d\r\n%s\r\n" % (len(info), info)) as port:
        with pytest.raises(StoreUnavailable, match=rf"{version}.*7\.0 or newer"):
            await asyncio.wait_for(Store(settings_for(f"redis://127.0.0.1:{port}/0")).start(), 5)


async def test_a_redis_cluster_node_is_refused() -> None:
    info = b"redis_version:7.2.4\r\ncluster_enabled:1\r\n"
    async with answering(b"$%d\r\n%s\r\n" % (len(info), info)) as port:
        with pytest.raises(StoreUnavailable, match="Cluster"):
            await asyncio.wait_for(Store(settings_for(f"redis://127.0.0.1:{port}/0")).start(), 5)


async def test_a_server_that_may_lose_sessions_is_warned_of(own_redis: RedisServer) -> None:
    async with a_store(own_redis.url) as store:
        assert store.info.warnings == ()
    async with Redis.from_url(own_redis.url) as redis:
        await redis.config_set("appendonly", "no")
        await redis.config_set("maxmemory", "100mb")
        await redis.config_set("maxmemory-policy", "allkeys-lru")
    async with a_store(own_redis.url) as store:
        assert any("appendonly" in warning for warning in store.info.warnings)
        assert any("noeviction" in warning for warning in store.info.warnings)


async def test_lost_tokens_are_noticed_not_built_upon(redis_url: str, redis: Redis) -> None:
    settings = settings_for(redis_url)
    async with Store(settings) as store:
        session = await opened(store)
        await store.commit(session, epoch=1, round=0, base=0, tokens=(5, 6))
        await redis.delete(f"{settings.redis_prefix}{{{session}}}:tokens")
        with pytest.raises(SessionNotFound, match="lost tokens"):
            await store.commit(session, epoch=1, round=1, base=2, tokens=(7,))
        with pytest.raises(SessionNotFound, match="lost tokens"):
            await store.claim(session, epoch=1, owner="a")
