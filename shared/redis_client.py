"""A lean asyncio client for one Redis or Valkey: commands, pipelines and Lua scripts that outlast a lost connection.

It uses redis-py's connections without its client layer, which costs a third of a round trip on loopback, and with a
writing and reading of its own (`redis_wire`). Whatever it runs is tried again over new connections until a deadline, so
callers hand it only steps that may run twice. It knows no keys; `store.py` does.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import TracebackType
from typing import Final, Self, TypeAlias, TypeVar
from urllib.parse import urlsplit

from prometheus_client import Counter
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    InvalidResponse,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import TimeoutError as AnswerTimeout

from shared.errors import StoreUnavailable
from shared.redis_wire import AnswerParser, pack

Argument: TypeAlias = bytes | str | int
Reply: TypeAlias = "bytes | int | list[Reply] | None"
Result = TypeVar("Result")

OLDEST_VERSION: Final = (7, 0)
ANSWER_TIMEOUT_S: Final = 5.0
FIRST_PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 0.5
# Answers of a server that is starting, failing over or moving slots: it will answer otherwise soon.
PASSING: Final = ("LOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS")

logger = logging.getLogger(__name__)

RETRIES = Counter(
    "outrider_store_retries", "Redis operations tried again after a lost connection or a passing refusal."
)


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the name under which the server keeps it."""

    name: str
    source: bytes
    sha: bytes

    @classmethod
    def load(cls, *names: str) -> Script:
        """The files `names` of this package, one after another, as one script; it is called like the last."""
        source = b"\n".join((files("shared") / name).read_bytes() for name in names)
        # SHA-1 is Redis' name for a script, no matter of security.
        return cls(names[-1], source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What answers: its name and version, and `warnings` about settings under which sessions may be lost."""

    name: str
    version: str
    warnings: tuple[str, ...]


def hide_password(url: str) -> str:
    """The URL as it may be shown in logs and errors."""
    parts = urlsplit(url)
    if parts.password is None:
        return re.sub(r"(password=)[^&]*", r"\1***", url)
    user = parts.username or ""
    place = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{user}:***@{place}").geturl()


@dataclass(slots=True, eq=False)
class _Call:
    """A script to be asked, with the arguments that follow its name; `answer` where others are asked with it."""

    script: Script
    arguments: tuple[Argument, ...]
    answer: asyncio.Future[Reply] | None = None

    @property
    def short(self) -> tuple[Argument, ...]:
        """The command for a server that knows the script."""
        return ("EVALSHA", self.script.sha, *self.arguments)

    @property
    def whole(self) -> tuple[Argument, ...]:
        """The command for a server that doesn't."""
        return ("EVAL", self.script.source, *self.arguments)

    @property
    def wanted(self) -> bool:
        """Somebody still waits for the answer."""
        return self.answer is not None and not self.answer.done()

    async def ask(self, connection: AbstractConnection) -> Reply:
        """Ask it alone."""
        try:
            return await _ask(connection, self.short)
        except NoScriptError:
            return await _ask(connection, self.whole)

    def settle(self, reply: Reply) -> None:
        """The answer is there."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(reply)

    def fail(self, error: Exception) -> None:
        """There will be none."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)


class RedisClient:
    """Commands, pipelines and scripts on one server, each retried until `deadline_s`.

    Answers are raw: bytes, integers, None and lists of these. Raises `StoreUnavailable` past the deadline, or at once
    where trying again can't help (wrong password, not a Redis, out of memory).
    """

    def __init__(self, url: str, *, deadline_s: float, max_connections: int = 64) -> None:
        self.address = hide_password(url)
        self._deadline_s = deadline_s
        try:
            self._factory: ConnectionPool = ConnectionPool.from_url(
                url,
                protocol=2,
                parser_class=AnswerParser,
                retry=Retry(NoBackoff(), 0),
                # redis-py's own timeouts cost a task a command, and swallow a cancellation now and then.
                socket_timeout=None,
                socket_connect_timeout=None,
            )
        except (ValueError, TypeError) as error:
            raise StoreUnavailable(
                f"{self.address!r} is no Redis address ({error}); write redis://[user:password@]host:port/database"
            ) from None
        self._idle: list[AbstractConnection] = []
        self._busy: set[AbstractConnection] = set()
        self._slots = asyncio.Semaphore(max_connections)
        self._stopped = False
        self._asking = False  # a script is being asked
        self._calls: list[_Call] = []  # that wait until it has been
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> ServerInfo:
        """Connect and check that the server is one that serves; says what it is."""
        self._stopped = False
        reply = await self.command("INFO")
        if not isinstance(reply, bytes):
            raise StoreUnavailable(
                f"{self.address} gives no INFO; a Redis or Valkey, 7.0 or newer, is needed"
            )
        info = dict(line.split(":", 1) for line in reply.decode(errors="replace").splitlines() if ":" in line)
        version = info.get("redis_version", "")
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if numbers < OLDEST_VERSION:
            raise StoreUnavailable(
                f"{self.address} is Redis {version or 'of an unknown version'}; 7.0 or newer (or Valkey) is needed"
            )
        if info.get("cluster_enabled") == "1":
            raise StoreUnavailable(
                f"{self.address} is a node of a Redis Cluster, which this client doesn't route for; "
                "give a single server, a Sentinel-managed address or a cluster proxy"
            )
        name = "Valkey" if info.get("server_name") == "valkey" else "Redis"
        return ServerInfo(name, info.get("valkey_version", version), _warnings(info))

    async def stop(self) -> None:
        """Close every connection."""
        self._stopped = True
        connections = [*self._idle, *self._busy]
        self._idle.clear()
        for connection in connections:
            await connection.disconnect(nowait=True)

    async def command(self, *arguments: Argument) -> Reply:
        """One command's answer."""

        async def run(connection: AbstractConnection) -> Reply:
            return await _ask(connection, arguments)

        return await self._insist(run)

    async def pipeline(self, commands: Sequence[Sequence[Argument]]) -> list[Reply]:
        """The answers of several commands sent at once (not as a transaction)."""
        if not commands:
            return []

        async def run(connection: AbstractConnection) -> list[Reply]:
            await connection.send_packed_command(pack(commands), check_health=False)
            replies: list[Reply] = []
            failure: ResponseError | None = None
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:  # the other answers must be read all the same
                    failure = failure or error
            if failure is not None:
                raise failure
            return replies

        return await self._insist(run)

    async def script(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Reply:
        """The script's answer; it is loaded anew when the server has forgotten it.

        Who asks while nobody else does is answered straight away. Who asks meanwhile goes with all others that do, in one
        pipeline, as soon as the answer is there: under load, when sessions commit together, a commit costs half the CPU.
        """
        call = _Call(script, (len(keys), *keys, *arguments))
        if self._asking:
            call.answer = asyncio.get_running_loop().create_future()
            self._calls.append(call)
            try:
                async with asyncio.timeout(self._deadline_s):
                    return await call.answer
            except TimeoutError:
                raise self._no_answer(None) from None
        self._asking = True
        try:
            return await self._insist(call.ask)
        finally:
            self._next_calls()

    def _next_calls(self) -> None:
        """Ask what has come up meanwhile."""
        calls = [call for call in self._calls if call.wanted]
        self._calls.clear()
        self._asking = bool(calls)
        if calls:
            task = asyncio.get_running_loop().create_task(self._ask_all(calls))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask_all(self, calls: Sequence[_Call]) -> None:
        async def run(connection: AbstractConnection) -> None:
            asked = [call for call in calls if call.wanted]
            await connection.send_packed_command(pack([call.short for call in asked]), check_health=False)
            forgotten: list[_Call] = []
            passing: ResponseError | None = None
            for call in asked:  # every answer must be read, whatever the others are
                try:
                    call.settle(await connection.read_response())
                except NoScriptError:
                    forgotten.append(call)
                except ResponseError as error:
                    if _passes(error):
                        passing = error
                    else:
                        call.fail(StoreUnavailable(self._explain(error)))
            if passing is not None:
                raise passing
            for call in forgotten:
                call.settle(await _ask(connection, call.whole))

        try:
            await self._insist(run)
        except Exception as error:
            for call in calls:
                call.fail(error)
        finally:
            self._next_calls()

    async def _insist(self, run: Callable[[AbstractConnection], Awaitable[Result]]) -> Result:
        """`run` on a connection, again after each passing failure, until the deadline."""
        pause_s = FIRST_PAUSE_S
        failure: BaseException | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    try:
                        return await self._attempt(run)
                    except (RedisError, OSError) as error:
                        if not _passes(error):
                            raise StoreUnavailable(self._explain(error)) from None
                        if failure is None:
                            logger.warning("Redis at %s: %s; trying again", self.address, error)
                        failure = error
                    RETRIES.inc()
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except TimeoutError:
            raise self._no_answer(failure) from None

    def _no_answer(self, failure: BaseException | None) -> StoreUnavailable:
        return StoreUnavailable(
            f"no answer from Redis at {self.address} within {self._deadline_s:g} s"
            f" ({failure or 'all connections are busy'}); start a Redis or Valkey, 7.0 or newer, there"
            " or set OUTRIDER_REDIS_URL"
        )

    async def _attempt(self, run: Callable[[AbstractConnection], Awaitable[Result]]) -> Result:
        if self._stopped:
            raise StoreUnavailable(f"the store at {self.address} has been stopped")
        async with self._slots:
            connection = self._idle.pop() if self._idle else self._connection()
            self._busy.add(connection)
            healthy = False
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    if not connection.is_connected:
                        await connection.connect()  # type: ignore[no-untyped-call]
                    result = await run(connection)
                healthy = True
                return result
            except ResponseError as error:
                # The server answered, so the connection is in order, unless it never let us in.
                healthy = connection.is_connected and not isinstance(error, AuthenticationError)
                raise
            finally:
                self._busy.discard(connection)
                if healthy and not self._stopped:
                    self._idle.append(connection)
                else:
                    await self._discard(connection)

    def _connection(self) -> AbstractConnection:
        made: AbstractConnection = self._factory.make_connection()  # type: ignore[no-untyped-call]
        return made

    async def _discard(self, broken: AbstractConnection) -> None:
        """Drop a connection that failed, and the idle ones, which most likely died with it."""
        connections = [broken, *self._idle]
        self._idle.clear()
        for connection in connections:
            await connection.disconnect(nowait=True)

    def _explain(self, error: Exception) -> str:
        match error:
            case AuthenticationError() | AuthorizationError():
                return (
                    f"Redis at {self.address} refuses the user or password ({error}); mend OUTRIDER_REDIS_URL"
                )
            case InvalidResponse():
                return (
                    f"what answers at {self.address} doesn't speak Redis' protocol; mend OUTRIDER_REDIS_URL"
                )
            case _:
                return f"Redis at {self.address} refuses: {error}"


async def _ask(connection: AbstractConnection, arguments: Sequence[Argument]) -> Reply:
    await connection.send_packed_command(pack([arguments]), check_health=False)
    reply: Reply = await connection.read_response()
    return reply


def _passes(error: Exception) -> bool:
    """Whether trying again may help."""
    match error:
        case AuthenticationError() | AuthorizationError() | InvalidResponse():
            return False
        case ConnectionLost() | AnswerTimeout() | BusyLoadingError() | ReadOnlyError() | OSError():
            return True
        case _:
            return str(error).startswith(PASSING)


def _warnings(info: dict[str, str]) -> tuple[str, ...]:
    warnings = []
    if info.get("aof_enabled") == "0":
        warnings.append(
            "Redis runs without an append-only file: a restart loses sessions; set appendonly yes"
        )
    if info.get("maxmemory", "0") != "0" and info.get("maxmemory_policy") != "noeviction":
        warnings.append(
            f"Redis may evict live sessions (maxmemory-policy {info.get('maxmemory_policy')}); set noeviction"
        )
    return tuple(warnings)
