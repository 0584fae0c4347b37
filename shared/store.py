"""What Redis holds of a session, and the atomic steps that change it: create, place, claim, commit, close.

Every change of more than one key is one Lua function (`store_*.lua` beside this file) over keys of one session, which
share a hash slot, so that it holds on Redis Cluster too. The store knows nothing of Kafka, placement policy or the
engine; it keeps the two promises that the rest is built on: an epoch only grows, and tokens are only appended, by whom
the epoch allows, where the base says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from prometheus_client import Histogram
from pydantic import TypeAdapter

from shared.errors import InvalidRequest, SessionNotFound, SessionTaken, StaleEpoch, StoreUnavailable
from shared.protocol import (
    FinishReason,
    GenerationParams,
    OpenSession,
    Outcome,
    ReplyRoute,
    TokenLogprobs,
    Tokens,
)
from shared.redis_client import Argument, RedisClient, Reply, Script, ServerInfo
from shared.session import SessionState, SessionStats, SessionStatus
from shared.settings import CommonSettings

TOKEN_BYTES: Final = 4
LONGEST_GRACE_S: Final = 30.0
PAGE: Final = 100
MOST_EXPIRED: Final = 1000

logger = logging.getLogger(__name__)

COMMIT_SECONDS = Histogram(
    "outrider_store_commit_seconds",
    "Time of a commit, from the call to Redis' answer.",
    buckets=(0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 20),
)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a verifier needs to restore a session's KV; `took_over` when another incarnation owned it (epoch + 1).

    `logprobs` are one for each of the committed `tokens` where the session tells them, otherwise none.
    """

    state: SessionState
    prompt: Tokens
    tokens: Tokens
    took_over: bool
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitResult:
    """`base` after the commit; `repeated` when this very commit had been made before."""

    base: int
    repeated: bool


@dataclass(frozen=True, slots=True)
class Speculation:
    """What is in flight for a session: the round's block and the outcomes hinted, by exit layer. May be out of date."""

    epoch: int
    round: int
    base: int
    block: Tokens
    hints: Mapping[int, tuple[Outcome, ...]]


@dataclass(frozen=True, slots=True)
class SessionPage:
    """Some sessions, newest first, and the cursor of those that follow, if any."""

    sessions: tuple[SessionState, ...]
    cursor: str | None


class StaleState(StaleEpoch):
    """The step was meant for another epoch than the session's; `state` is the session as it stands."""

    def __init__(self, message: str, *, state: SessionState) -> None:
        super().__init__(message)
        self.state = state


class StaleClaim(StaleState):
    """The claim's epoch is older than the session's."""


class CommitConflict(StaleEpoch):
    """The commit changed nothing: the session has another epoch (`fenced`), another base, or has ended.

    `epoch`, `base`, `finish_reason` and `gateway` are the session's own, `tokens` what is committed since the base that
    the commit was built on (none when that base lies ahead).
    """

    def __init__(
        self,
        message: str,
        *,
        epoch: int,
        base: int,
        tokens: Tokens,
        finish_reason: FinishReason | None,
        gateway: str,
        fenced: bool,
    ) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.base = base
        self.tokens = tokens
        self.finish_reason = finish_reason
        self.gateway = gateway
        self.fenced = fenced


def pack(tokens: Tokens) -> bytes:
    """Token ids as packed unsigned 32-bit integers, little endian."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> Tokens:
    """The token ids in `packed`; ValueError when its length isn't a multiple of four bytes."""
    if len(packed) % TOKEN_BYTES:
        raise ValueError(
            f"{len(packed)} bytes are no whole number of packed tokens ({TOKEN_BYTES} bytes each)"
        )
    tokens = array("I")
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)


class Store:
    """Sessions in Redis.

    Every method may raise `StoreUnavailable`, after `store_deadline_s` of trying; until then it outlasts lost
    connections and restarts. A step whose answer was lost is recognised when it is tried again, so each takes effect
    once. Methods that need a session raise `SessionNotFound` where there is none.

    Beside the sessions' own keys there are indexes (by creation, last touch and partition) in other hash slots. They
    are advisory: written before the record changes, checked against it whenever read, and mended then.
    """

    def __init__(self, settings: CommonSettings) -> None:
        self._redis = RedisClient(settings.redis_url.get_secret_value(), deadline_s=settings.store_deadline_s)
        self._prefix = settings.redis_prefix
        self._ttl_ms = int(settings.session_ttl_s * 1000)
        # Redis drops a session a little after its time, so that the sweep can see it going and tell its verifier.
        self._life_ms = self._ttl_ms + int(min(LONGEST_GRACE_S, settings.session_ttl_s) * 1000)
        self._scripts = _Scripts()
        self._info: ServerInfo | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Connect; `StoreUnavailable` if no Redis 7.0 or newer answers there."""
        self._info = await self._redis.start()
        logger.info("store: %s %s at %s", self._info.name, self._info.version, self._redis.address)
        for warning in self._info.warnings:
            logger.warning("store: %s", warning)

    async def stop(self) -> None:
        """Close every connection."""
        await self._redis.stop()

    @property
    def info(self) -> ServerInfo:
        """What answers; known once started."""
        if self._info is None:
            raise StoreUnavailable("the store has not been started")
        return self._info

    async def ping(self) -> None:
        """Ask for a sign of life."""
        await self._redis.command("PING")

    # --- sessions ---------------------------------------------------------------------------------------------

    async def create(self, message: OpenSession, *, verifier: str, partition: int) -> SessionState:
        """Open a session in epoch 1; the same open again changes nothing and gives the session as it stands.

        Raises `SessionTaken` when the session was opened otherwise, `InvalidRequest` without prompt or parameters.
        """
        if message.params is None or not message.prompt:
            raise InvalidRequest(
                f"session {message.session}: an open needs a prompt of one token or more and parameters",
                param="prompt" if message.params else "params",
            )
        prompt = pack(message.prompt)
        await self._index(message.session, partition, new=True)
        verdict, record = _pair(
            await self._run(
                self._scripts.create,
                message.session,
                _digest(message, prompt),
                prompt,
                *_new_record(message, message.params, verifier, partition),
            )
        )
        if verdict == b"taken":
            raise SessionTaken(f"session {message.session} exists with another prompt; choose another id")
        await self._index(message.session, partition)
        return _state(message.session, record)

    async def place(
        self,
        session: str,
        *,
        verifier: str,
        partition: int,
        reply: ReplyRoute | None = None,
        expected_epoch: int | None = None,
        reopen: bool = False,
        request: str | None = None,
    ) -> SessionState:
        """Place the session anew, in the next epoch; its KV stays owned where the partition stays the same.

        `reply` makes another gateway its driver, `reopen` opens a detached session again. A `request` that was the
        last to place the session changes nothing, so that a message read twice acts once. Raises `StaleState` when
        the session is not in `expected_epoch`.
        """
        await self._index(session, partition)
        verdict, record = _pair(
            await self._run(
                self._scripts.place,
                session,
                request or uuid.uuid4().hex,
                "" if expected_epoch is None else expected_epoch,
                int(reopen),
                verifier,
                partition,
                reply.gateway if reply else "",
                reply.partition if reply else 0,
            )
        )
        state = _found(session, verdict, record)
        if verdict == b"stale":
            raise StaleState(
                f"session {session} is in epoch {state.epoch}, not {expected_epoch}", state=state
            )
        await self._index(session, partition)
        return state

    async def claim(self, session: str, *, epoch: int, owner: str) -> Claim:
        """Take the session's KV upon the verifier process `owner`: what it needs to restore it.

        The epoch grows by one if another process owned it, which fences that one off. A session that has ended is
        shown but not owned: restore nothing. Raises `StaleClaim` when `epoch` is older than the session's.
        """
        reply = _list(await self._run(self._scripts.claim, session, epoch, owner))
        verdict = _bytes(reply[0])
        state = _found(session, verdict, reply[1])
        if verdict == b"stale":
            raise StaleClaim(
                f"session {session} is in epoch {state.epoch}; a claim in epoch {epoch} is too old",
                state=state,
            )
        if verdict == b"damaged":
            raise _damaged(session)
        return Claim(
            state,
            unpack(_bytes(reply[2])),
            unpack(_bytes(reply[3])),
            verdict == b"taken",
            _told(reply[4]),
        )

    async def commit(
        self,
        session: str,
        *,
        epoch: int,
        round: int,
        base: int,
        tokens: Tokens,
        finish_reason: FinishReason | None = None,
        drafted: int = 0,
        accepted: int = 0,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> CommitResult:
        """Append `tokens` to the first `base` committed ones, for good; with a finish reason nothing may follow.

        `logprobs` are one for each token, in every commit of a session or in none.
        The same commit again is recognised. Raises `CommitConflict` when the session has another epoch or base, or has
        ended: then nothing has changed.
        """
        with COMMIT_SECONDS.time():
            reply = _list(
                await self._run(
                    self._scripts.commit,
                    session,
                    epoch,
                    round,
                    base,
                    pack(tokens),
                    finish_reason or "",
                    drafted,
                    accepted,
                    *(told.model_dump_json() for told in logprobs),
                )
            )
        match reply:
            case [b"committed" | b"repeated" as verdict, int(grown)]:
                return CommitResult(grown, verdict == b"repeated")
            case [b"conflict", int(epoch_now), int(base_now), bytes(reason), bytes(gateway), bytes(since)]:
                raise CommitConflict(
                    f"session {session} is in epoch {epoch_now} at base {base_now}"
                    f"{', ended (' + reason.decode() + ')' if reason else ''};"
                    f" a commit in epoch {epoch} at base {base} changes nothing",
                    epoch=epoch_now,
                    base=base_now,
                    tokens=unpack(since),
                    finish_reason=FinishReason(reason.decode()) if reason else None,
                    gateway=gateway.decode(),
                    fenced=epoch_now != epoch,
                )
            case [b"damaged", *_]:
                raise _damaged(session)
            case _:
                raise _missing(session)

    async def release(self, session: str, *, epoch: int, owner: str) -> bool:
        """The verifier process `owner`, which claimed in `epoch`, has given the KV up; False if it was not its own."""
        return await self._run(self._scripts.release, session, epoch, owner) == 1

    async def close(
        self, session: str, *, status: SessionStatus, reason: str, epoch: int | None = None
    ) -> SessionState:
        """End (`CLOSED`) or detach (`DETACHED`) the session; one that has finished stays finished.

        Its tokens stay until it expires. With an `epoch`, raises `StaleState` when another gateway has resumed the
        session since (a move by kv-session or a verifier's claim in between doesn't matter).
        """
        if status not in (SessionStatus.CLOSED, SessionStatus.DETACHED):
            raise ValueError(f"a session is closed or detached, not {status}")
        bound: Argument = "" if epoch is None else max(epoch, 1)
        verdict, record = _pair(await self._run(self._scripts.close, session, status, reason, bound))
        state = _found(session, verdict, record)
        if verdict == b"stale":
            raise StaleState(
                f"session {session} is driven by {state.reply.gateway} since epoch {epoch}", state=state
            )
        await self._unindex([session], state.partition)
        return state

    async def touch(self, session: str) -> bool:
        """Put the session's expiry off; False where there is none."""
        return await self._run(self._scripts.touch, session) == 1

    async def erase(self, session: str) -> SessionState:
        """Delete the session with its tokens, at once; gives what it was."""
        verdict, record = _pair(await self._run(self._scripts.expire, session, 0))
        await self._forget([session])
        return _found(session, verdict, record)

    async def state(self, session: str) -> SessionState | None:
        """The session's record, or None."""
        record = await self._redis.command("HGETALL", self._key(session, "state"))
        return _state(session, record) if record else None

    async def prompt(self, session: str) -> Tokens:
        """The prompt; `SessionNotFound` where there is none."""
        packed = await self._redis.command("GET", self._key(session, "prompt"))
        if packed is None:
            raise _missing(session)
        return unpack(_bytes(packed))

    async def tokens(self, session: str, since: int = 0) -> Tokens:
        """The committed tokens after the first `since`; empty too where there is no such session."""
        key = self._key(session, "tokens")
        return unpack(_bytes(await self._redis.command("GETRANGE", key, since * TOKEN_BYTES, -1)))

    async def logprobs(self, session: str, since: int = 0) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of the committed tokens after the first `since`; empty where the session does not tell them."""
        return _told(await self._redis.command("LRANGE", self._key(session, "logprobs"), since, -1))

    # --- speculative state: best effort, for operators and for a gateway that resumes -------------------------

    async def set_round(self, session: str, *, epoch: int, round: int, base: int, block: Tokens) -> bool:
        """Note the round in flight; False when the session is in another epoch. A commit clears it."""
        fields = ("base", base, "block", pack(block))
        return await self._run(self._scripts.speculate, session, epoch, round, 1, *fields) == 1

    async def add_hint(
        self, session: str, *, epoch: int, round: int, layer: int, outcomes: Sequence[Outcome]
    ) -> bool:
        """Note what the exit after `layer` foresees for the round in flight; False when that is another."""
        fields = (f"hint:{layer}", _OUTCOMES.dump_json(tuple(outcomes)))
        return await self._run(self._scripts.speculate, session, epoch, round, 0, *fields) == 1

    async def speculation(self, session: str) -> Speculation | None:
        """What is noted as in flight, or None."""
        record = _fields(await self._redis.command("HGETALL", self._key(session, "spec")))
        if not record:
            return None
        hints = {
            int(name.removeprefix("hint:")): _OUTCOMES.validate_json(value)
            for name, value in record.items()
            if name.startswith("hint:")
        }
        return Speculation(
            int(record["epoch"]), int(record["round"]), int(record["base"]), unpack(record["block"]), hints
        )

    # --- indexes ----------------------------------------------------------------------------------------------

    async def sessions(
        self,
        *,
        cursor: str | None = None,
        limit: int = PAGE,
        status: SessionStatus | None = None,
        verifier: str | None = None,
    ) -> SessionPage:
        """Up to `limit` sessions, newest first, of a status or a verifier if given, from `cursor` on."""
        chosen: list[SessionState] = []
        while entries := await self._newest(cursor):
            states = {state.session: state for state in await self._states(name for name, _ in entries)}
            for name, here in entries:
                cursor = here
                state = states.get(name)
                if state and status in (None, state.status) and verifier in (None, state.verifier):
                    chosen.append(state)
                    if len(chosen) == limit:
                        return SessionPage(tuple(chosen), cursor)
        return SessionPage(tuple(chosen), None)

    async def sessions_on(self, partition: int) -> list[SessionState]:
        """The open sessions that are placed on a partition of the drafts topic."""
        key = self._partition_key(partition)
        names = [_bytes(name).decode() for name in _list(await self._redis.command("SMEMBERS", key))]
        here = await self._open_on(partition, names)
        gone = set(names).difference(state.session for state in here)
        if gone:
            await self._unindex(sorted(gone), partition)
        return here

    async def expire(self, limit: int = MOST_EXPIRED) -> list[SessionState]:
        """Erase sessions untouched for `session_ttl_s`, at most `limit` looked at; gives those erased.

        Of several callers only one gets a session.
        """
        seconds, microseconds = _list(await self._redis.command("TIME"))
        now_ms = int(_bytes(seconds)) * 1000 + int(_bytes(microseconds)) // 1000
        due = await self._redis.command(
            "ZRANGEBYSCORE", self._touched_key, "-inf", now_ms - self._ttl_ms, "LIMIT", 0, limit
        )
        expired: list[SessionState] = []
        gone: list[str] = []
        for name in _list(due):
            session = _bytes(name).decode()
            verdict, record = _pair(await self._run(self._scripts.expire, session, self._ttl_ms))
            if verdict == b"alive":
                touched_ms = _state(session, record).touched_ms
                await self._redis.command("ZADD", self._touched_key, "XX", touched_ms, session)
                continue
            gone.append(session)
            if verdict == b"erased":
                expired.append(_state(session, record))
        await self._forget(gone)
        return expired

    # --- moves under way: what was placed anew but perhaps not announced yet ---------------------------------

    async def begin_move(self, session: str) -> None:
        """Note that the session is about to be moved, so that a move is announced even if its mover dies."""
        await self._redis.command("SADD", f"{self._prefix}index:moving", session)

    async def end_move(self, session: str) -> None:
        """The move has been announced, or has not come about."""
        await self._redis.command("SREM", f"{self._prefix}index:moving", session)

    async def open_moves(self) -> list[str]:
        """The sessions whose move was begun and not ended."""
        names = _list(await self._redis.command("SMEMBERS", f"{self._prefix}index:moving"))
        return [_bytes(name).decode() for name in names]

    # --- leases and drained verifiers -------------------------------------------------------------------------

    async def acquire(self, name: str, holder: str, ttl_s: float) -> bool:
        """Take the lease `name` for `ttl_s`, or renew it; False while another holds it."""
        return await self._lease("acquire", name, holder, ttl_s)

    async def renew(self, name: str, holder: str, ttl_s: float) -> bool:
        """Keep the lease for another `ttl_s`; False if it has lapsed or is another's."""
        return await self._lease("renew", name, holder, ttl_s)

    async def free(self, name: str, holder: str) -> bool:
        """Give the lease up; False if it was not this holder's."""
        return await self._lease("free", name, holder, 0)

    async def holder(self, name: str) -> str | None:
        """Who holds the lease now."""
        holder = await self._redis.command("GET", f"{self._prefix}lease:{name}")
        return None if holder is None else _bytes(holder).decode()

    async def drain(self, verifier: str) -> None:
        """Mark a verifier as drained: it gets no sessions."""
        await self._redis.command("SADD", f"{self._prefix}drained", verifier)

    async def undrain(self, verifier: str) -> None:
        """Let a verifier have sessions again."""
        await self._redis.command("SREM", f"{self._prefix}drained", verifier)

    async def drained(self) -> frozenset[str]:
        """The verifiers that are marked as drained."""
        names = _list(await self._redis.command("SMEMBERS", f"{self._prefix}drained"))
        return frozenset(_bytes(name).decode() for name in names)

    # --- keys and plumbing ------------------------------------------------------------------------------------

    def _key(self, session: str, part: str) -> str:
        return f"{self._prefix}{{{session}}}:{part}"

    def _partition_key(self, partition: int) -> str:
        return f"{self._prefix}index:partition:{partition}"

    @property
    def _created_key(self) -> str:
        return f"{self._prefix}index:created"

    @property
    def _touched_key(self) -> str:
        return f"{self._prefix}index:touched"

    async def _run(self, script: Script, session: str, *arguments: Argument) -> Reply:
        stem = f"{self._prefix}{{{session}}}:"
        keys = (f"{stem}state", f"{stem}prompt", f"{stem}tokens", f"{stem}spec", f"{stem}logprobs")
        return await self._redis.script(script, keys, (self._life_ms, *arguments))

    async def _lease(self, step: str, name: str, holder: str, ttl_s: float) -> bool:
        key = f"{self._prefix}lease:{name}"
        return await self._redis.script(self._scripts.lease, (key,), (step, holder, int(ttl_s * 1000))) == 1

    async def _index(self, session: str, partition: int, *, new: bool = False) -> None:
        """Enter a session in the indexes: before it comes to the partition, so that none is there that isn't entered, and
        once more after it, for who has looked in between has taken it out (`_unindex`)."""
        now_ms = int(time.time() * 1000)
        commands: list[tuple[Argument, ...]] = [("SADD", self._partition_key(partition), session)]
        if new:
            commands.append(("ZADD", self._created_key, "NX", now_ms, session))
            commands.append(("ZADD", self._touched_key, "NX", now_ms, session))
        await self._redis.pipeline(commands)

    async def _unindex(self, sessions: Sequence[str], partition: int) -> None:
        """Take sessions out of a partition's index that aren't open there. Who comes there before that is seen by a second
        look and put back, who comes later enters itself."""
        key = self._partition_key(partition)
        await self._redis.command("SREM", key, *sessions)
        if back := await self._open_on(partition, sessions):
            await self._redis.command("SADD", key, *(state.session for state in back))

    async def _open_on(self, partition: int, sessions: Iterable[str]) -> list[SessionState]:
        """Those of the sessions that are open on the partition."""
        found = await self._states(sessions)
        return [state for state in found if state.partition == partition and _live(state)]

    async def _forget(self, sessions: Sequence[str]) -> None:
        if sessions:
            await self._redis.pipeline(
                [("ZREM", self._created_key, *sessions), ("ZREM", self._touched_key, *sessions)]
            )

    async def _states(self, sessions: Iterable[str]) -> list[SessionState]:
        names = list(sessions)
        records = await self._redis.pipeline([("HGETALL", self._key(name, "state")) for name in names])
        return [_state(name, record) for name, record in zip(names, records, strict=True) if record]

    async def _newest(self, cursor: str | None) -> list[tuple[str, str]]:
        """The next entries of the index by creation after `cursor`: each name, and the cursor that stands at it."""
        newest, skipped_from = _parse_cursor(cursor)
        offset = 0
        while True:
            reply = _list(
                await self._redis.command(
                    "ZREVRANGEBYSCORE", self._created_key, newest, "-inf", "WITHSCORES", "LIMIT", offset, PAGE
                )
            )
            scored = [
                (_bytes(name).decode(), _bytes(score).decode())
                for name, score in zip(reply[::2], reply[1::2], strict=True)
            ]
            entries = [
                (name, f"{score}.{name}")
                for name, score in scored
                if skipped_from is None or score != newest or name < skipped_from
            ]
            if entries or len(scored) < PAGE:
                return entries
            offset += PAGE


class _Scripts:
    """The store's Lua functions."""

    def __init__(self) -> None:
        self.create = self._of_session("create")
        self.place = self._of_session("place")
        self.claim = self._of_session("claim")
        self.commit = self._of_session("commit")
        self.release = self._of_session("release")
        self.close = self._of_session("close")
        self.touch = self._of_session("touch")
        self.expire = self._of_session("expire")
        self.speculate = self._of_session("speculate")
        self.lease = Script.load("store_lease.lua")

    @staticmethod
    def _of_session(name: str) -> Script:
        return Script.load("store_prelude.lua", f"store_{name}.lua")


_OUTCOMES: Final = TypeAdapter(tuple[Outcome, ...])


def _digest(message: OpenSession, prompt: bytes) -> str:
    """What tells one open of a session from another: all that it asks for."""
    digest = hashlib.sha256(prompt)
    asked = message.model_dump_json(include={"params", "reply", "tenant", "metadata"})
    digest.update(asked.encode())
    return digest.hexdigest()


def _new_record(
    message: OpenSession, params: GenerationParams, verifier: str, partition: int
) -> Iterator[Argument]:
    """The fields of a new session's record, each followed by its value."""
    fields: dict[str, Argument] = {
        "status": SessionStatus.OPEN,
        "epoch": 1,
        "base": 0,
        "prompt_length": len(message.prompt),
        "params": params.model_dump_json(),
        "model": message.model,
        "verifier": verifier,
        "partition": partition,
        "owner": "",
        "gateway": message.reply.gateway,
        "reply_partition": message.reply.partition,
        "finish_reason": "",
        "last_round": -1,
        "last_base": -1,
        "tenant": message.tenant,
        "metadata": json.dumps(dict(message.metadata)),
        "rounds": 0,
        "drafted": 0,
        "accepted": 0,
        "close_reason": "",
        # Fencing: who placed it last, since when its gateway drives it, when its owner claimed it and from which epoch.
        "placed_by": "",
        "driven_since": 1,
        "claimed_epoch": 0,
        "taken_from": "",
    }
    for name, value in fields.items():
        yield name
        yield value


def _state(session: str, reply: Reply) -> SessionState:
    record = _fields(reply)
    text = {name: value.decode() for name, value in record.items()}
    return SessionState(
        session=session,
        status=SessionStatus(text["status"]),
        epoch=int(text["epoch"]),
        base=int(text["base"]),
        prompt_length=int(text["prompt_length"]),
        params=GenerationParams.model_validate_json(text["params"]),
        model=text["model"],
        verifier=text["verifier"],
        partition=int(text["partition"]),
        owner=text["owner"],
        reply=ReplyRoute(gateway=text["gateway"], partition=int(text["reply_partition"])),
        finish_reason=FinishReason(text["finish_reason"]) if text["finish_reason"] else None,
        last_round=int(text["last_round"]),
        last_base=int(text["last_base"]),
        created_ms=int(text["created_ms"]),
        touched_ms=int(text["touched_ms"]),
        tenant=text["tenant"],
        metadata=json.loads(text["metadata"]),
        stats=SessionStats(int(text["rounds"]), int(text["drafted"]), int(text["accepted"])),
        close_reason=text["close_reason"],
    )


def _live(state: SessionState) -> bool:
    return state.status is SessionStatus.OPEN and not state.ended


def _found(session: str, verdict: bytes, record: Reply) -> SessionState:
    if verdict == b"missing":
        raise _missing(session)
    return _state(session, record)


def _missing(session: str) -> SessionNotFound:
    return SessionNotFound(f"there is no session {session}, or it has expired")


def _damaged(session: str) -> SessionNotFound:
    return SessionNotFound(
        f"session {session} has lost tokens in Redis; its maxmemory-policy must be noeviction and no other program may"
        " write its keys"
    )


def _told(reply: Reply) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs.model_validate_json(_bytes(item)) for item in _list(reply))


def _parse_cursor(cursor: str | None) -> tuple[str, str | None]:
    """The score to start at, and the name before which to start there."""
    if cursor is None:
        return "+inf", None
    score, dot, name = cursor.partition(".")
    if not (score.isdigit() and dot):
        raise InvalidRequest(f"{cursor!r} is no cursor; pass on that of the page before", param="cursor")
    return score, name


def _bytes(reply: Reply) -> bytes:
    assert isinstance(reply, bytes), reply
    return reply


def _list(reply: Reply) -> list[Reply]:
    assert isinstance(reply, list), reply
    return reply


def _pair(reply: Reply) -> tuple[bytes, Reply]:
    verdict, record = _list(reply)
    return _bytes(verdict), record


def _fields(reply: Reply) -> dict[str, bytes]:
    """A hash, as HGETALL gives it."""
    flat = [_bytes(item) for item in _list(reply)]
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
