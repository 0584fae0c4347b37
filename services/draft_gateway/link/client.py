"""The edge's end of a link: an `Uplink` over a WebSocket to a gateway in the cloud, or to the next one when that is lost.

Over a new connection every session that somebody here drives is resumed, as a client resumes a stream: it is placed
anew with replies to the new relay, its core is told of the new epoch and sends its open round again, and what was
committed meanwhile is read and handed over. Questions are asked again until they are answered or their time is up; all of
them may be asked twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from services.draft_gateway.link import metrics
from services.draft_gateway.link.channel import Channel, Limits, LinkLost
from services.draft_gateway.link.codec import UnknownSession
from services.draft_gateway.link.frames import (
    LONGEST_FRAME,
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
)
from services.draft_gateway.link.metrics import Meter, Traffic
from services.draft_gateway.settings import GatewaySettings
from services.draft_gateway.uplink import RETRY_S, Receiver, RoundTrip, SessionMessage
from shared.errors import OutriderError, ProtocolError, Unavailable, error_for
from shared.protocol import (
    Cancel,
    Closed,
    CloseSession,
    DraftsMessage,
    Evicted,
    Fault,
    Floor,
    Hint,
    OpenSession,
    Placed,
    Prompt,
    ReplyRoute,
    Stale,
    TokenLogprobs,
    Tokens,
    Verdict,
)
from shared.session import SessionState
from shared.telemetry import TraceContext

GATEWAY_HEADER: Final = "outrider-gateway"
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 5.0
PROBE_S: Final = 2.0
LINK_WAIT_S: Final = 1.0
"""How long a question waits for a link while there is none."""

logger = logging.getLogger(__name__)

_Told = TypeVar("_Told", bound=Reply)


class _WebSocket:
    """The client's WebSocket as a channel wants it."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    async def send(self, payload: bytes) -> None:
        try:
            await self._connection.send(payload)
        except ConnectionClosed as closed:
            raise LinkLost(_why(closed)) from None

    async def receive(self) -> bytes:
        try:
            payload = await self._connection.recv(decode=False)
        except ConnectionClosed as closed:
            raise LinkLost(_why(closed)) from None
        return bytes(payload)

    async def close(self, code: int, reason: str) -> None:
        await self._connection.close(code, reason)


def _why(closed: ConnectionClosed) -> str:
    told = closed.rcvd.reason if closed.rcvd is not None else ""
    return told or "the connection broke"


class _Link:
    """One connection: its channel, the numbers of its sessions, the questions that wait for an answer."""

    def __init__(self, url: str, socket: _WebSocket, reply: ReplyRoute, limits: Limits, meter: Meter) -> None:
        self.url: Final = url
        self._reply = reply
        self._numbers: dict[str, int] = {}
        self._sessions: dict[int, str] = {}
        self._last_number = 0
        self._questions: dict[int, asyncio.Future[Reply]] = {}
        self._last_question = 0
        self.channel: Final = Channel(socket, self, limits, meter)

    @property
    def reply(self) -> ReplyRoute:
        """Answers come here."""
        return self._reply

    def number(self, session: str) -> int:
        """The session's number, 0 when it has none."""
        return self._numbers.get(session, 0)

    def session(self, number: int) -> str:
        """The session of a number."""
        try:
            return self._sessions[number]
        except KeyError:
            raise UnknownSession(f"{number} is no session of this link") from None

    def bind(self, session: str) -> None:
        """Give the session a number, once. Numbers are not used again: a late verdict must not find another session."""
        if session not in self._numbers:
            self._last_number += 1
            self._numbers[session] = self._last_number
            self._sessions[self._last_number] = session
            self.channel.push(Bind(self._last_number, session))

    def release(self, session: str) -> None:
        """Take its number away."""
        if (number := self._numbers.pop(session, None)) is not None:
            del self._sessions[number]
            self.channel.forget(number)
            self.channel.push(Release(number))

    async def ask(self, body: Question, *, timeout_s: float, trace: TraceContext | None = None) -> Reply:
        """The answer to a question. Raises `LinkLost` when the connection ends first."""
        if self.channel.lost:
            raise LinkLost("the link is lost")
        if isinstance(body, OpenSession):
            self.bind(body.session)
        self._last_question += 1
        number = self._last_question
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        try:
            self.channel.push(Ask(number, body, round(timeout_s * 1000), trace))
            return await answer
        finally:
            del self._questions[number]

    def answered(self, answer: Answer) -> None:
        """An answer has come; perhaps too late."""
        question = self._questions.get(answer.number)
        if question is not None and not question.done():
            question.set_result(answer.body)

    def end(self, lost: LinkLost) -> None:
        """The connection has ended."""
        for question in self._questions.values():
            if not question.done():
                question.set_exception(LinkLost(lost.message))


@dataclass(slots=True)
class _Driven:
    """A session that somebody here drives: on which connection it was placed, and what is known of it. `begun` is the epoch
    in which the relay has sent its prompt; that is not sent a second time beside it."""

    receiver: Receiver
    link: _Link | None = None
    epoch: int = 0
    base: int = 0
    begun: int | None = None
    resuming: asyncio.Task[None] | None = None


class LinkUplink:
    """The uplink at the edge."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._check_secrecy()
        # A process of its own, whatever its name: a session's driver is told apart from its predecessor by this.
        gateway = f"{settings.gateway_name}.{secrets.token_hex(4)}"
        self._reply: Final = ReplyRoute(gateway=gateway, partition=0)
        self._limits: Final = Limits(
            queue=settings.link_queue, slow_ms=settings.link_slow_ms, timeout_s=settings.link_timeout_s
        )
        self._meter: Final = Meter("edge")
        self._driven: dict[str, _Driven] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._link: _Link | None = None
        self._up = asyncio.Event()
        self._troubles: dict[str, str] = {"link": "the link has not been made yet"}

    def _check_secrecy(self) -> None:
        open_links = [url for url in self._settings.link_urls if not _is_private(url)]
        if self._settings.link_key.get_secret_value() and open_links:
            logger.warning("the key travels in the clear to %s; use wss://", ", ".join(open_links))

    # --- what is known of it -----------------------------------------------------------------------

    @property
    def reply(self) -> ReplyRoute:
        """This gateway's name; the relay fills in the partition on which answers arrive."""
        return self._reply

    @property
    def round_trip(self) -> RoundTrip | None:
        """The round trip of the link that is up."""
        return self._link.channel.round_trip if self._link is not None else None

    def traffic(self) -> Traffic:
        """Frames and bytes of payload so far, over all connections."""
        return self._meter.traffic()

    def troubles(self) -> Sequence[str]:
        """Why it can't serve now."""
        return tuple(self._troubles.values())

    def notes(self) -> Sequence[str]:
        """Where the link leads, and how long the way is."""
        if self._link is None:
            return ()
        trip = self.round_trip
        measured = f", round trip {trip.smoothed_ms:.1f} ms" if trip is not None else ""
        return (f"linked to {self._link.url}{measured}",)

    async def probe(self) -> None:
        """Ask the gateway in the cloud how it is."""
        if (link := self._link) is None:
            return
        try:
            async with asyncio.timeout(PROBE_S):
                told = await link.ask(AskTroubles(), timeout_s=PROBE_S)
        except (LinkLost, TimeoutError):
            self._troubles["cloud"] = f"the gateway at {link.url} is silent"
        else:
            self._cloud_told(_expect(Troubles, told))

    # --- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Link to the first gateway that takes us. Unavailable says why none does."""
        try:
            link = await self._connect_any()
        except Unavailable as error:
            self._troubles["link"] = error.message
            raise
        self._adopt(link)
        self._spawn(self._keep(link))

    async def stop(self) -> None:
        """Close the link, after what was asked for has been answered."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._troubles["link"] = "the link has been closed"
        if self._link is not None:
            await self._link.channel.close()

    async def _keep(self, link: _Link) -> None:
        """Live through one connection after another."""
        while True:
            with metrics.LINKS.labels("edge").track_inprogress():
                lost = await link.channel.run(partial(self._receive, link))
            metrics.LOST.labels("edge").inc()
            self._link = None
            self._up.clear()
            self._troubles.pop("cloud", None)
            self._troubles["link"] = f"the link to {link.url} was lost: {lost.message}"
            logger.warning("%s", self._troubles["link"])
            link.end(lost)
            self._spawn(link.channel.close())
            link = await self._reconnect(link.url)
            self._adopt(link)

    async def _reconnect(self, last: str) -> _Link:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._connect_any(last)
            except Unavailable as error:
                self._troubles["link"] = error.message
            except Exception:  # whatever it is, the edge has to come back
                logger.exception("linking failed")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    def _adopt(self, link: _Link) -> None:
        self._link = link
        self._troubles.pop("link", None)
        self._up.set()
        logger.info("linked to %s", link.url)
        for session, driven in list(self._driven.items()):
            if driven.link is not None:
                self._take_up(session, driven)

    async def _connect_any(self, first: str = "") -> _Link:
        """Try every gateway once, the one that was linked to last first."""
        reasons = []
        for url in sorted(self._settings.link_urls, key=lambda url: url != first):
            try:
                return await self._connect(url)
            except Unavailable as error:
                reasons.append(error.message)
        raise Unavailable(f"no link: {'; '.join(reasons)}", retry_after_s=RETRY_S)

    async def _connect(self, url: str) -> _Link:
        headers = {GATEWAY_HEADER: self._reply.gateway}
        if key := self._settings.link_key.get_secret_value():
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection = await connect(
                url,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                compression=None,  # frames are a few bytes; waiting for more of them to compress would cost time
                additional_headers=headers,
                proxy=None if _is_local(url) else True,
                open_timeout=self._limits.timeout_s,
                ping_interval=None,  # the channel's own pings also tell what has arrived
                close_timeout=1.0,
                max_size=LONGEST_FRAME,
            )
        except InvalidStatus as refused:
            raise Unavailable(f"{url} answered {_told(refused)}") from None
        except TimeoutError:
            raise Unavailable(f"{url} did not answer within {self._limits.timeout_s:g} s") from None
        except (
            OSError,
            WebSocketException,
        ) as error:  # refused, cut in mid-handshake, or no WebSocket at all
            raise Unavailable(f"{url} can't be linked to: {error}") from None
        return _Link(url, _WebSocket(connection), self._reply, self._limits, self._meter)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- taking sessions up again ------------------------------------------------------------------

    def _take_up(self, session: str, driven: _Driven) -> None:
        if driven.resuming is not None:
            driven.resuming.cancel()
        driven.resuming = self._spawn(self._resume(session, driven))

    async def _resume(self, session: str, driven: _Driven) -> None:
        """Resume a session over the link that is up, however often that takes."""
        pause_s = FIRST_PAUSE_S
        while self._driven.get(session) is driven:
            try:
                for message in await self._resumed(session, driven):
                    self._hand_over(message)
                return
            except Unavailable as error:
                logger.warning("%s is not resumed yet: %s", session, error)
            except OutriderError as error:  # Overloaded, or gone meanwhile, which the next look at it tells
                logger.warning("%s can't be resumed: %s", session, error)
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    async def _resumed(self, session: str, driven: _Driven) -> list[SessionMessage]:
        """Resume a session; what its driver has to be told."""
        state = await self.state(session)
        if state is None:
            return [Closed(session=session, epoch=driven.epoch, reason="it has expired")]
        if state.ended:
            return [await self._missed(state, driven, state.epoch)]
        if state.reply.gateway != self._reply.gateway:
            return [_placement(state)]
        again = OpenSession(session=session, reply=self._reply, resume=True)
        placed = await self._placed(again, timeout_s=self._settings.open_timeout_s)
        metrics.RESUMED.inc()
        told: list[SessionMessage] = [placed]
        if placed.base > driven.base:
            told.append(await self._missed(state, driven, placed.epoch))
        return told

    async def _missed(self, state: SessionState, driven: _Driven, epoch: int) -> SessionMessage:
        """What was committed since the driver heard last, as the verifier would tell it."""
        tokens = await self.tokens(state.session, driven.base)
        if state.ended and state.finish_reason is None:
            return Closed(session=state.session, epoch=epoch, reason=state.close_reason)
        return Stale(
            session=state.session,
            epoch=epoch,
            round=max(0, state.last_round),
            base=driven.base + len(tokens),
            since=driven.base,
            tokens=tokens,
            gateway=self._reply.gateway,
            finish_reason=state.finish_reason,
        )

    # --- receiving ---------------------------------------------------------------------------------

    def _receive(self, link: _Link, frame: Frame) -> None:
        match frame:
            case Answer():
                link.answered(frame)
            case Troubles():
                self._cloud_told(frame)
            case Hint() | Verdict() | Floor() | Stale() | Fault() | Placed() | Evicted() | Closed():
                self._hand_over(frame)
            case _:
                raise ProtocolError(f"a {type(frame).__name__} is nothing that comes down a link")

    def _hand_over(self, message: SessionMessage) -> None:
        driven = self._driven.get(message.session)
        if driven is None:
            return
        driven.epoch = max(driven.epoch, message.epoch)
        if isinstance(message, Verdict | Floor):
            driven.base = max(driven.base, message.base + len(message.tokens))
        elif isinstance(message, Stale):
            driven.base = max(driven.base, message.since + len(message.tokens))
        driven.receiver(message)

    def _cloud_told(self, told: Troubles) -> None:
        if told.texts:
            self._troubles["cloud"] = "; ".join(told.texts)
        else:
            self._troubles.pop("cloud", None)

    def subscribe(self, session: str, receiver: Receiver) -> None:
        """Hand every message for the session to `receiver`; there is one at a time."""
        self._forget(self._driven.pop(session, None))
        self._driven[session] = _Driven(receiver)

    def unsubscribe(self, session: str, receiver: Receiver) -> None:
        """Stop that, unless somebody else has subscribed since."""
        driven = self._driven.get(session)
        if driven is not None and driven.receiver == receiver:
            self._forget(self._driven.pop(session))
            if self._link is not None:
                self._link.release(session)

    def _forget(self, driven: _Driven | None) -> None:
        if driven is not None and driven.resuming is not None:
            driven.resuming.cancel()

    # --- sending and asking ------------------------------------------------------------------------

    async def open(
        self, message: OpenSession, *, timeout_s: float, trace: TraceContext | None = None
    ) -> Placed:
        """Open or resume a session, for who then reads what was committed until now."""
        placed = await self._placed(message, timeout_s=timeout_s, trace=trace)
        if (driven := self._driven.get(message.session)) is not None:
            driven.base = max(driven.base, placed.base)
        return placed

    async def _placed(
        self, message: OpenSession, *, timeout_s: float, trace: TraceContext | None = None
    ) -> Placed:
        link, told = await self._ask(message, timeout_s, timeout_s, trace)
        placed = _expect(Placed, told)
        driven = self._driven.get(message.session)
        if driven is not None:
            driven.link, driven.epoch = link, max(driven.epoch, placed.epoch)
            driven.begun = placed.epoch if placed.begun else None
            if link is not self._link and self._link is not None:
                self._take_up(message.session, driven)
        return placed

    async def send(
        self, message: DraftsMessage, *, partition: int, trace: TraceContext | None = None
    ) -> None:
        """Send to the verifier that holds the session: the relay knows which, and the trace that it was opened with.

        Raises `Unavailable` while there is no link that knows the session; once there is, the open round is sent again.
        """
        if isinstance(message, Cancel):
            await self._do(message)
            return
        driven, link = self._driven.get(message.session), self._link
        if link is None or driven is None or driven.link is not link:
            raise Unavailable(self._troubles.get("link", "the session is being taken up over a new link"))
        if isinstance(message, Prompt) and not message.round and driven.begun == message.epoch:
            driven.begun = None  # should nothing come of it, the next one is sent
            return
        await link.channel.put(message, link.number(message.session))

    async def close(self, message: CloseSession) -> None:
        """Tell that this gateway is done with a session."""
        await self._do(message)

    async def state(self, session: str) -> SessionState | None:
        """A session's record, if it is one of ours."""
        return _expect(StateTold, await self._look_up(AskState(session))).state

    async def prompt(self, session: str) -> Tokens:
        """A session's prompt."""
        return _expect(TokensTold, await self._look_up(AskPrompt(session))).tokens

    async def tokens(self, session: str, since: int = 0) -> Tokens:
        """A session's committed tokens from position `since` on."""
        return _expect(TokensTold, await self._look_up(AskTokens(session, since))).tokens

    async def logprobs(self, session: str, since: int = 0) -> tuple[TokenLogprobs, ...]:
        """The log-probabilities of a session's committed tokens from position `since` on."""
        return _expect(LogprobsTold, await self._look_up(AskLogprobs(session, since))).logprobs

    async def _do(self, body: Question) -> None:
        """Have something done that nobody waits for, and that has to be done also when the link is away just now."""
        timeout_s = self._settings.store_deadline_s
        _, told = await self._ask(body, timeout_s, timeout_s)
        _expect(Done, told)

    async def _look_up(self, body: Question) -> Reply:
        """Ask what somebody waits for, who had better be told soon when there is no link."""
        _, told = await self._ask(body, self._settings.store_deadline_s, LINK_WAIT_S)
        return told

    async def _ask(
        self, body: Question, timeout_s: float, patience_s: float, trace: TraceContext | None = None
    ) -> tuple[_Link, Reply]:
        """The answer, and the connection over which it came.

        Raises what the answer says; `Unavailable` when there is no link for `patience_s` or no answer in `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    link = await self._linked(patience_s)
                    try:
                        told = await link.ask(body, timeout_s=timeout_s, trace=trace)
                    except LinkLost:
                        await asyncio.sleep(0)  # until the loss is known here too
                        continue
                    return link, told
        except TimeoutError:
            reasons = (
                "; ".join(self.troubles()) or f"the gateway in the cloud did not answer in {timeout_s:g} s"
            )
            raise Unavailable(reasons, retry_after_s=RETRY_S) from None

    async def _linked(self, patience_s: float) -> _Link:
        """The connection that is up, or will be soon."""
        async with asyncio.timeout(patience_s):
            await self._up.wait()
        assert self._link is not None
        return self._link


def _is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")


def _is_private(url: str) -> bool:
    """Nobody else reads what passes."""
    return url.startswith("wss:") or _is_local(url)


def _expect(kind: type[_Told], told: Reply) -> _Told:
    """`told`, if it is of the kind that was asked for. Raises what a `Failed` says."""
    if isinstance(told, Failed):
        raise error_for(told.code, told.message, retry_after_s=told.retry_after_s)
    if not isinstance(told, kind):
        raise ProtocolError(f"a {type(told).__name__} is no answer to that; {kind.__name__} would be one")
    return told


def _placement(state: SessionState) -> Placed:
    """Where a session is, as its record tells."""
    return Placed(
        session=state.session,
        epoch=state.epoch,
        verifier=state.verifier,
        partition=state.partition,
        base=state.base,
        reply=state.reply,
        reason="resumed",
    )


def _told(refused: InvalidStatus) -> str:
    """What a gateway answered in place of a link."""
    response = refused.response
    try:
        return f"{response.status_code}: {json.loads(response.body or b'')['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return str(response.status_code)
