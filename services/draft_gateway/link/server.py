"""The cloud's end of links: relays each to the uplink of this gateway and back.

A relay keeps what it needs to pass messages on and nothing else: which number means which session, where each is
placed, and who asked. What was committed is in Redis, what is in flight is sent again. A link sees the sessions that were
opened under its own key's name, no others: of those it is told that they don't exist.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from starlette.websockets import WebSocket, WebSocketDisconnect

from services.draft_gateway.link import metrics
from services.draft_gateway.link.channel import GOING_AWAY, Channel, Limits, LinkLost
from services.draft_gateway.link.client import GATEWAY_HEADER
from services.draft_gateway.link.codec import UnknownSession
from services.draft_gateway.link.frames import (
    SUBPROTOCOL,
    Answer,
    Ask,
    AskLogprobs,
    AskPrompt,
    AskState,
    AskTokens,
    AskTroubles,
    Bind,
    Done,
    Failed,
    Frame,
    LogprobsTold,
    Question,
    Release,
    Reply,
    StateTold,
    TokensTold,
    Troubles,
    Upward,
)
from services.draft_gateway.link.keys import Keys
from services.draft_gateway.link.metrics import Meter, Traffic
from services.draft_gateway.settings import GatewaySettings
from services.draft_gateway.uplink import RETRY_S, SessionMessage, Uplink
from shared.errors import (
    InvalidRequest,
    OutriderError,
    Overloaded,
    ProtocolError,
    SessionNotFound,
    Unavailable,
)
from shared.http import error_response
from shared.protocol import Cancel, CloseSession, OpenSession, Placed, Prompt, ReplyRoute
from shared.session import SessionState
from shared.telemetry import TraceContext

WATCH_S: Final = 1.0
STOP_S: Final = 3.0
MOST_QUESTIONS: Final = 256
"""Questions of one link that may wait for an answer."""
MOST_SESSIONS: Final = 4096
"""Sessions of one link at a time."""
MOST_SENDING: Final = 32
"""Messages of one session that Kafka may have yet to take; the edge sends again what is dropped beyond."""

_GATEWAY = re.compile(r"[A-Za-z0-9._-]{1,100}")

logger = logging.getLogger(__name__)


class LinkServer:
    """All links to this gateway."""

    def __init__(self, settings: GatewaySettings, uplink: Uplink) -> None:
        """Raises `OutriderError` when the keys aren't right."""
        self._settings = settings
        self._uplink = uplink
        self._keys = Keys(settings.link_keys.get_secret_value())
        self._meter: Final = Meter("cloud")
        self._relays: set[Relay] = set()
        self._orphans: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    def traffic(self) -> Traffic:
        """Frames and bytes of payload so far, over all links."""
        return self._meter.traffic()

    def notes(self) -> Sequence[str]:
        """How many are linked."""
        return (f"{len(self._relays)} linked from the edge",) if self._relays else ()

    async def serve(self, websocket: WebSocket) -> None:
        """One link's whole life. What speaks against it is answered in its place, as an HTTP status."""
        try:
            owner, gateway = self._admit(websocket)
        except OutriderError as error:
            logger.info("refused a link: %s", error)
            await websocket.send_denial_response(error_response(error))
            return
        await websocket.accept(subprotocol=SUBPROTOCOL)
        relay = Relay(self, self._uplink, _WebSocket(websocket), owner, gateway, self._limits(), self._meter)
        self._relays.add(relay)
        logger.info("linked from %s", gateway)
        try:
            with metrics.LINKS.labels("cloud").track_inprogress():
                lost = await relay.run()
            logger.info("the link from %s has ended: %s", gateway, lost.message)
        finally:
            metrics.LOST.labels("cloud").inc()
            self._relays.discard(relay)
            await relay.channel.close()

    def _admit(self, websocket: WebSocket) -> tuple[str, str]:
        """Whose link it is, and the name of the gateway at its other end."""
        if SUBPROTOCOL not in websocket.scope["subprotocols"]:
            raise InvalidRequest(f"a link speaks {SUBPROTOCOL} (Sec-WebSocket-Protocol)")
        peer = websocket.client.host if websocket.client is not None else None
        owner = self._keys.owner(websocket.headers.get("authorization"), peer)
        gateway = websocket.headers.get(GATEWAY_HEADER, "")
        if not _GATEWAY.fullmatch(gateway):
            raise InvalidRequest(
                f"{GATEWAY_HEADER} names the gateway at the edge: 1 to 100 of A-Z a-z 0-9 . _ -"
            )
        if self._stopping:
            raise Unavailable("this gateway is stopping; link to another", retry_after_s=RETRY_S)
        if troubles := self._uplink.troubles():
            raise Unavailable(f"not ready: {'; '.join(troubles)}", retry_after_s=RETRY_S)
        if len(self._relays) >= self._settings.max_links:
            raise Overloaded(
                f"{self._settings.max_links} links are up here, the most there may be", retry_after_s=RETRY_S
            )
        return owner, gateway

    def _limits(self) -> Limits:
        settings = self._settings
        return Limits(settings.link_queue, settings.link_slow_ms, settings.link_timeout_s)

    async def stop(self) -> None:
        """Take no more links and end those there are: their edges link to another gateway."""
        self._stopping = True
        for relay in tuple(self._relays):
            relay.channel.give_up("the gateway in the cloud stops", GOING_AWAY)
        for orphan in tuple(self._orphans.values()):
            orphan.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                while self._relays:
                    await asyncio.gather(*(relay.ended.wait() for relay in self._relays))
                    await asyncio.sleep(0)

    # --- sessions whose link was lost --------------------------------------------------------------

    def adopted(self, session: str) -> None:
        """A link drives the session (again)."""
        if (waiting := self._orphans.pop(session, None)) is not None:
            waiting.cancel()

    def orphaned(self, session: str, reply: ReplyRoute) -> None:
        """The link that drove the session is lost; unless somebody takes it up in time its KV is freed."""
        if not self._stopping:
            self.adopted(session)
            self._orphans[session] = asyncio.get_running_loop().create_task(self._detach(session, reply))

    async def _detach(self, session: str, reply: ReplyRoute) -> None:
        await asyncio.sleep(self._settings.link_grace_s)
        try:
            state = await self._uplink.state(session)
            if state is None or state.ended or state.reply != reply:
                return
            reason = "its link was lost"
            cancel = Cancel(session=session, epoch=state.epoch, reason=reason)
            close = CloseSession(session=session, epoch=state.epoch, reason=reason, detach=True)
            await self._uplink.close(close)
            await self._uplink.send(cancel, partition=state.partition)
        except OutriderError as error:
            logger.warning("%s keeps its KV until it expires: %s", session, error)
        finally:
            if self._orphans.get(session) is asyncio.current_task():
                del self._orphans[session]


@dataclass(slots=True)
class _Route:
    """A session that a link drives: its number there, its trace, where it is placed once it is, what is on its way."""

    number: int
    trace: TraceContext | None = None
    placed: Placed | None = None
    subscribed: bool = False
    sending: list[Upward] = field(default_factory=list)


class Relay:
    """One link's frames as the uplink's messages, and back."""

    def __init__(
        self,
        server: LinkServer,
        uplink: Uplink,
        socket: _WebSocket,
        owner: str,
        gateway: str,
        limits: Limits,
        meter: Meter,
    ) -> None:
        self._server = server
        self._uplink = uplink
        self._owner = owner
        self._gateway = gateway
        self._names: dict[int, str] = {}
        self._routes: dict[str, _Route] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._questions = 0
        self._troubles: tuple[str, ...] = ()
        self.ended: Final = asyncio.Event()
        self.channel: Final = Channel(socket, self, limits, meter)

    # --- what needs not travel ---------------------------------------------------------------------

    @property
    def reply(self) -> ReplyRoute:
        """Answers to the edge take this way now."""
        try:
            return ReplyRoute(gateway=self._gateway, partition=self._uplink.reply.partition)
        except Unavailable as error:
            raise LinkLost(error.message) from None

    def number(self, session: str) -> int:
        """The session's number."""
        route = self._routes.get(session)
        return route.number if route is not None else 0

    def session(self, number: int) -> str:
        """The session of a number."""
        try:
            return self._names[number]
        except KeyError:
            raise UnknownSession(f"{number} is no session of this link") from None

    # --- its life ----------------------------------------------------------------------------------

    async def run(self) -> LinkLost:
        """Relay until the link ends; why it did."""
        self._spawn(self._watch())
        try:
            return await self.channel.run(self._receive)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for session, route in self._routes.items():
                self._uplink.unsubscribe(session, self._pass_down)
                if route.placed is not None:
                    self._server.orphaned(session, route.placed.reply)
            self.ended.set()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Tell the edge when this gateway can't serve, and when it can again."""
        while True:
            troubles = tuple(self._uplink.troubles())
            if troubles != self._troubles:
                self._troubles = troubles
                self.channel.push(Troubles(troubles))
            await asyncio.sleep(WATCH_S)

    # --- up ----------------------------------------------------------------------------------------

    def _receive(self, frame: Frame) -> None:
        if isinstance(frame, Upward):
            self._pass_up(frame)
            return
        match frame:
            case Ask():
                self._asked(frame)
            case Bind(number, name):
                self._bind(number, name)
            case Release(number):
                self._release(number)
            case _:
                raise ProtocolError(f"a {type(frame).__name__} is nothing that goes up a link")

    def _bind(self, number: int, name: str) -> None:
        if number == 0 or number in self._names or name in self._routes:
            raise ProtocolError(f"the number {number} or its session is taken already")
        if len(self._routes) >= MOST_SESSIONS:
            raise ProtocolError(f"{MOST_SESSIONS} sessions have a number here, the most there may be")
        self._names[number] = name
        self._routes[name] = _Route(number)

    def _release(self, number: int) -> None:
        session = self.session(number)
        del self._names[number], self._routes[session]
        self._uplink.unsubscribe(session, self._pass_down)
        self.channel.forget(number)

    def _pass_up(self, message: Upward) -> None:
        """Send to the session's verifier. What can't be sent is dropped: its round is sent again."""
        route = self._routes.get(message.session)
        if route is None or route.placed is None:
            logger.warning("dropped a block of %s, which this link has not opened", message.session)
            return
        if message in route.sending or len(route.sending) >= MOST_SENDING:
            return
        route.sending.append(message)
        self._spawn(self._transmit(message, route, route.placed.partition))

    async def _transmit(self, message: Upward, route: _Route, partition: int) -> None:
        try:
            await self._uplink.send(message, partition=partition, trace=route.trace)
        except OutriderError as error:
            logger.warning("a block could not be sent: %s", error, extra={"session": message.session})
        finally:
            route.sending.remove(message)

    # --- down --------------------------------------------------------------------------------------

    def _pass_down(self, message: SessionMessage) -> None:
        route = self._routes.get(message.session)
        if route is None:
            return
        if isinstance(message, Placed) and message.reply.gateway == self._gateway:
            self._placed(route, message)
        try:
            self.channel.push(message, route.number)
        except (
            ProtocolError
        ) as error:  # it would say the same again: the session's owner has to see that it hangs
            logger.error(
                "a message for the edge can't be sent: %s", error, extra={"session": message.session}
            )

    def _placed(self, route: _Route, placed: Placed) -> None:
        if route.placed is None or placed.epoch > route.placed.epoch:
            route.placed = placed

    # --- questions ---------------------------------------------------------------------------------

    def _asked(self, ask: Ask) -> None:
        if self._questions >= MOST_QUESTIONS:
            failed = Failed(
                Overloaded.code, f"{MOST_QUESTIONS} questions wait for an answer already", RETRY_S
            )
            self.channel.push(Answer(ask.number, failed))
            return
        self._questions += 1
        self._spawn(self._answer(ask))

    async def _answer(self, ask: Ask) -> None:
        try:
            reply = await self._reply_to(ask.body, ask)
        except OutriderError as error:
            reply = Failed(error.code, error.message, error.retry_after_s)
        finally:
            self._questions -= 1
        self.channel.push(Answer(ask.number, reply))

    async def _reply_to(self, body: Question, ask: Ask) -> Reply:
        match body:
            case OpenSession():
                return await self._open(body, ask)
            case CloseSession():
                await self._own(body.session)
                await self._uplink.close(body)
                return Done()
            case Cancel():
                if (state := await self._own(body.session)) is not None:
                    await self._uplink.send(body, partition=state.partition)
                return Done()
            case AskState(session):
                with suppress(SessionNotFound):
                    return StateTold(await self._own(session))
                return StateTold(None)
            case AskPrompt(session):
                await self._own(session)
                return TokensTold(await self._uplink.prompt(session))
            case AskTokens(session, since):
                await self._own(session)
                return TokensTold(await self._uplink.tokens(session, since))
            case AskLogprobs(session, since):
                await self._own(session)
                return LogprobsTold(await self._uplink.logprobs(session, since))
            case AskTroubles():
                await self._uplink.probe()
                self._troubles = tuple(self._uplink.troubles())
                return Troubles(self._troubles)
        raise ProtocolError(f"a {type(body).__name__} is no question")

    async def _open(self, message: OpenSession, ask: Ask) -> Placed:
        """Open or resume a session. A new one's prompt follows at once: that saves its first token a round trip."""
        session = message.session
        route = self._routes.get(session)
        if route is None:
            raise ProtocolError(f"{session} has no number on this link")
        state = await self._own(session)
        if state is not None and state.reply.gateway == self._gateway:
            # Over a link that was lost before its answer the edge has opened this very session already.
            message = OpenSession(session=session, reply=self.reply, resume=True)
        if self._routes.get(session) is not route:
            raise SessionNotFound(f"{session} was given up before it was opened")
        self._server.adopted(session)
        self._uplink.subscribe(session, self._pass_down)
        message = message.model_copy(update={"reply": self.reply, "tenant": self._owner})
        route.trace = ask.trace
        placed = await self._uplink.open(message, timeout_s=max(ask.timeout_ms, 1) / 1000, trace=ask.trace)
        self._placed(route, placed)
        if message.resume or placed.base or self._routes.get(session) is not route:
            return placed
        self._pass_up(Prompt(session=session, epoch=placed.epoch, reply=message.reply))
        return placed.model_copy(update={"begun": True})

    async def _own(self, session: str) -> SessionState | None:
        """The session's record, None when there is none (yet). Raises `SessionNotFound` when it is another's."""
        state = await self._uplink.state(session)
        if state is not None and state.tenant != self._owner:
            raise SessionNotFound(f"there is no session {session}, or it has expired")
        return state


class _WebSocket:
    """The server's WebSocket as a channel wants it."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    async def send(self, payload: bytes) -> None:
        try:
            await self._websocket.send_bytes(payload)
        except (WebSocketDisconnect, RuntimeError):  # RuntimeError: closed before
            raise LinkLost("the connection broke") from None

    async def receive(self) -> bytes:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise LinkLost(message.get("reason") or "the connection broke")
        payload: bytes | None = message.get("bytes")
        if payload is None:
            raise ProtocolError("a link's frames are binary; this one is text")
        return payload

    async def close(self, code: int, reason: str) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            await self._websocket.close(code, reason)
