"""What travels on a link, as tables: the messages of `shared/protocol.py`, and the link's own few.

    up      Bind, Release             a session gets a number on this connection, and loses it
            Prompt, Block, Forward    as on the drafts topic, without the reply route: the relay fills it in
            Ask                       a question with a number: OpenSession, CloseSession, Cancel, AskState, …
    down    Hint, Verdict, Floor,     as on the topics
            Stale, Fault, Placed, Evicted, Closed
            Answer                    to the question of that number: Placed, StateTold, TokensTold, …
            Troubles                  why the gateway in the cloud can't serve now
    both    Ping, Pong                measure the round trip, and tell how much has arrived

A new kind or a new optional field is a line here. Numbers are never used for anything else again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter

from services.draft_gateway.link.codec import (
    Bytes,
    Choice,
    Codec,
    Driver,
    Flag,
    Json,
    Layout,
    Names,
    Number,
    Outcomes,
    Pairs,
    Reader,
    Record,
    Route,
    Scaled,
    Session,
    SmallNumbers,
    Text,
    Texts,
    TokenList,
    Trace,
    UnknownKind,
    UnknownSession,
    Writer,
)
from services.draft_gateway.uplink import SessionMessage
from shared.errors import ProtocolError
from shared.protocol import (
    Block,
    Cancel,
    Closed,
    CloseSession,
    DraftsMessage,
    Evicted,
    Fault,
    FinishReason,
    Floor,
    Forward,
    GenerationParams,
    Hint,
    OpenSession,
    Placed,
    Policy,
    Prompt,
    Sampling,
    Stale,
    TokenLogprobs,
    Tokens,
    Verdict,
)
from shared.session import SessionState
from shared.telemetry import TraceContext

SUBPROTOCOL: Final = "outrider-link-1"
LONGEST_FRAME: Final = 4 << 20
"""Bytes; the longest prompt of a context of a million tokens still fits."""

_KIND: Final = "kind of frame"


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a sign of life."""

    number: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers a ping: it, and all that was sent before it, has arrived."""

    number: int


@dataclass(frozen=True, slots=True)
class Bind:
    """From here on `number` means `name`, a session."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class Release:
    """The number means nothing any more, and nobody at the edge waits for messages of its session."""

    number: int


@dataclass(frozen=True, slots=True)
class AskState:
    """What is known of a session?"""

    session: str


@dataclass(frozen=True, slots=True)
class AskPrompt:
    """What is a session's prompt?"""

    session: str


@dataclass(frozen=True, slots=True)
class AskTokens:
    """What was committed, from position `since` on?"""

    session: str
    since: int


@dataclass(frozen=True, slots=True)
class AskLogprobs:
    """What are the log-probabilities of what was committed, from position `since` on?"""

    session: str
    since: int


@dataclass(frozen=True, slots=True)
class AskTroubles:
    """Why can't you serve now? Look closely."""


@dataclass(frozen=True, slots=True)
class StateTold:
    """A session's record, or that there is none."""

    state: SessionState | None


@dataclass(frozen=True, slots=True)
class TokensTold:
    """Tokens of a session."""

    tokens: Tokens


@dataclass(frozen=True, slots=True)
class LogprobsTold:
    """Log-probabilities of a session's tokens."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """What was asked for has been done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """What was asked for can't be done; `code` is that of an `OutriderError`."""

    code: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Troubles:
    """Why the gateway in the cloud can't serve now; none when it can."""

    texts: tuple[str, ...]


Upward = Prompt | Block | Forward
"""What the relay sends on to the verifier of its session, as it comes."""

Question = OpenSession | CloseSession | Cancel | AskState | AskPrompt | AskTokens | AskLogprobs | AskTroubles
Reply = Placed | StateTold | TokensTold | LogprobsTold | Troubles | Done | Failed


@dataclass(frozen=True, slots=True)
class Ask:
    """A question. The asker gives up after `timeout_ms` (0: it doesn't say)."""

    number: int
    body: Question
    timeout_ms: int = 0
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to the question of that number."""

    number: int
    body: Reply


Frame = (
    DraftsMessage | SessionMessage | OpenSession | CloseSession
    | Ping | Pong | Bind | Release | Ask | Answer | Troubles
    | AskState | AskPrompt | AskTokens | AskLogprobs | AskTroubles | StateTold
    | TokensTold | LogprobsTold | Done | Failed
)  # fmt: skip


class Inner:
    """A frame within a frame."""

    form = 1

    def put(self, out: Writer, value: Frame) -> None:
        out.chunk(encode(value, out.names))

    def take(self, data: Reader) -> Any:
        return decode(data.chunk(), data.names)


NUMBER, FLAG, TEXT, TEXTS, TOKENS, SESSION = Number(), Flag(), Text(), Texts(), TokenList(), Session()
MILLISECONDS = SECONDS = Scaled(100)
ROW_MILLISECONDS = Scaled(10_000)
"""Of one row: on a large GPU some hundredths."""
FINISH = Choice((FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED))
LEVELS = SmallNumbers()
POLICY = Choice((Policy.LATENCY, Policy.COST))
LOGPROBS = Json(TypeAdapter(tuple[TokenLogprobs, ...]))
REASON = Choice(("opened", "resumed", "moved"))

PARAMS: Final = Layout(
    GenerationParams,
    {"max_tokens": NUMBER},
    {
        "stop_token_ids": (1, TOKENS),
        "ignore_eos": (2, FLAG),
        "policy": (5, POLICY),
        "sampling": (6, Json(TypeAdapter(Sampling))),
        "stop": (7, TEXTS),
        "logprobs": (8, NUMBER),
        "json_schema": (9, TEXT),
        "unheard": (10, FLAG),
    },
)

HEAD: Final[Mapping[str, Codec]] = {"session": SESSION, "epoch": NUMBER}
ROUND: Final[Mapping[str, Codec]] = {**HEAD, "round": NUMBER, "base": NUMBER}

DRAFTED: Final[Mapping[str, tuple[int, Codec]]] = {"confidences": (1, LEVELS), "q": (2, Bytes())}

MEASURED: Final[Mapping[str, tuple[int, Codec]]] = {
    "finish_reason": (1, FINISH),
    "verify_ms": (2, MILLISECONDS),
    "commit_ms": (3, MILLISECONDS),
    "taken": (4, NUMBER),
    "rows": (5, NUMBER),
    "logprobs": (6, LOGPROBS),
    "sessions": (7, NUMBER),
    "fixed_ms": (8, MILLISECONDS),
    "passes": (10, NUMBER),  # 9 was `row_ms` in hundredths
    "following": (11, TOKENS),
    "padded": (12, NUMBER),
    "row_ms": (13, ROW_MILLISECONDS),
}

LAYOUTS: Final[Mapping[int, Layout]] = {
    1: Layout(Prompt, {**ROUND, "reply": Route()}),
    2: Layout(Block, {**ROUND, "reply": Route(), "tokens": TOKENS}, DRAFTED),
    3: Layout(Cancel, {**HEAD, "reason": TEXT}),
    4: Layout(Hint, {**ROUND, "layer": NUMBER, "outcomes": Outcomes()}, {"elapsed_ms": (1, MILLISECONDS)}),
    5: Layout(
        Verdict,
        {**ROUND, "accepted": NUMBER, "tokens": TOKENS},
        MEASURED,
    ),
    6: Layout(
        Stale,
        {**ROUND, "since": NUMBER, "tokens": TOKENS},
        {"finish_reason": (1, FINISH), "gateway": (2, TEXT)},
    ),
    7: Layout(
        Fault, {**HEAD, "round": NUMBER, "code": TEXT, "message": TEXT}, {"retry_after_s": (1, SECONDS)}
    ),
    8: Layout(
        Forward,
        {
            **ROUND,
            "reply": Route(),
            "parent": NUMBER,
            "accepted": NUMBER,
            "next_token": NUMBER,
            "tokens": TOKENS,
        },
        DRAFTED,
    ),
    9: Layout(Floor, {**HEAD, "base": NUMBER, "tokens": TOKENS}, MEASURED),
    16: Layout(
        OpenSession,
        {**HEAD, "reply": Route()},
        {
            "model": (1, TEXT),
            "prompt": (2, TOKENS),
            "params": (3, Record(PARAMS)),
            "resume": (4, FLAG),
            "tenant": (5, TEXT),
            "metadata": (6, Pairs()),
        },
    ),
    17: Layout(CloseSession, {**HEAD, "reason": TEXT}, {"detach": (1, FLAG)}),
    18: Layout(
        Placed,
        {**HEAD, "reply": Driver(), "verifier": TEXT, "partition": NUMBER},
        {"base": (1, NUMBER), "reason": (2, REASON), "begun": (3, FLAG)},
    ),
    19: Layout(Evicted, {**HEAD, "reason": TEXT}),
    20: Layout(Closed, {**HEAD, "reason": TEXT}),
    32: Layout(Ping, {"number": NUMBER}),
    33: Layout(Pong, {"number": NUMBER}),
    34: Layout(Bind, {"number": NUMBER, "name": TEXT}),
    35: Layout(Release, {"number": NUMBER}),
    36: Layout(Ask, {"number": NUMBER, "body": Inner()}, {"timeout_ms": (1, NUMBER), "trace": (2, Trace())}),
    37: Layout(Answer, {"number": NUMBER, "body": Inner()}),
    38: Layout(Troubles, {"texts": TEXTS}),
    40: Layout(AskState, {"session": SESSION}),
    41: Layout(AskPrompt, {"session": SESSION}),
    42: Layout(AskTokens, {"session": SESSION, "since": NUMBER}),
    43: Layout(AskTroubles, {}),
    44: Layout(AskLogprobs, {"session": SESSION, "since": NUMBER}),
    48: Layout(StateTold, {"state": Json(TypeAdapter(SessionState | None))}),
    49: Layout(TokensTold, {"tokens": TOKENS}),
    50: Layout(Done, {}),
    51: Layout(Failed, {"code": TEXT, "message": TEXT}, {"retry_after_s": (1, SECONDS)}),
    52: Layout(LogprobsTold, {"logprobs": LOGPROBS}),
}

ADVICE: Final = (Hint, Forward)
"""What a slow link drops: it may be lost, and is worth nothing when it is late."""

_OPENING_KINDS: Final = 16
"""Kinds below are messages of a round."""

_KINDS: Final = {layout.model: kind for kind, layout in LAYOUTS.items()}


def encode(frame: Frame, names: Names) -> bytes:
    """The frame as bytes. Raises `ProtocolError` when a value has no place in it."""
    kind = _KINDS[type(frame)]
    out = Writer(names)
    out.varint(kind)
    LAYOUTS[kind].put(out, frame)
    return bytes(out.data)


def of_round(payload: bytes) -> bool:
    """Whether an encoded frame is a message of a round: what speculation costs the link, beside the prompt."""
    return payload[:1] < bytes((_OPENING_KINDS,))


def decode(data: bytes, names: Names) -> Frame:
    """The frame in `data`.

    Raises `UnknownKind` and `UnknownSession` for what may be passed over, any other `ProtocolError` for what can only be
    a fault of the peer.
    """
    reader = Reader(data, names)
    kind = reader.varint()
    layout = LAYOUTS.get(kind)
    if layout is None:
        raise UnknownKind(f"{kind} is no {_KIND} known here")
    try:
        frame: Frame = layout.take(reader)
    except (UnknownKind, UnknownSession):
        raise
    except ProtocolError as error:
        raise ProtocolError(f"{layout.model.__name__}: {error.message}") from None
    return frame
