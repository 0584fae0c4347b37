"""Every message that the services exchange: what it says, on which topic it travels, how it becomes bytes.

Messages are frozen pydantic models, told apart by `kind` and encoded as JSON. A reader accepts fields that it
does not know and refuses a major version that it does not know (`ProtocolError`, which the bus sends to the
dead letters). Token ids are plain integers; times are milliseconds; sizes are tokens unless a name says otherwise.

The words (session, block, round, outcome, verdict, hint, lane, epoch) are those of the README.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shared.errors import ProtocolError

SCHEMA_MAJOR: Final = 1
SCHEMA_MINOR: Final = 0
SCHEMA_VERSION: Final = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"

SessionId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = tuple[TokenId, ...]
Epoch = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Confidence = Annotated[float, Field(ge=0.0, le=1.0)]
Level = Annotated[int, Field(ge=0, le=99)]
"""A confidence as a small number, see `shared.speculation.outcomes.level`."""


class Topic(StrEnum):
    """The Kafka topics, without the deployment's prefix."""

    SESSIONS = "outrider.sessions"
    PLACEMENTS = "outrider.placements"
    DRAFTS = "outrider.drafts"
    EXITS = "outrider.exits"
    VERDICTS = "outrider.verdicts"
    HEARTBEATS = "outrider.heartbeats"
    DEAD_LETTERS = "outrider.dead-letters"


class FinishReason(StrEnum):
    """Why a generation ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Policy(StrEnum):
    """What a verifier does with a session that has nothing to verify."""

    LATENCY = "latency"
    """It goes on by itself (the AR floor), so that no draft and no link makes the session slower than the target alone."""
    COST = "cost"
    """It waits for a block: fewer passes a token."""


class SamplingMode(StrEnum):
    """How a drafted token is judged where tokens are drawn at random."""

    KEYED = "keyed"
    """Draft and target draw with the same noise, so that verification is equality; the answer is a function of target,
    prompt and seed alone."""
    RATIO = "ratio"
    """Accepted with probability min(1, p/q), else drawn from the residual; the draft's distribution travels with it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="ignore", ser_json_inf_nan="null", ser_json_bytes="base64", val_json_bytes="base64"
    )


class Message(_Frozen):
    """What every message has: the session and the epoch in which it was written."""

    topic: ClassVar[Topic]

    session: SessionId
    epoch: Epoch


class ReplyRoute(_Frozen):
    """Where hints and verdicts for a session go: a gateway process and its partition of the reply topics."""

    gateway: str
    partition: Count


class Sampling(_Frozen):
    """How a token is chosen from the target's logits; the defaults are greedy decoding.

    The names and their meaning are those of vLLM. `top_k` 0 keeps all tokens. `choice` tells apart the answers to one
    request (`n`), which share its seed.
    """

    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    choice: Count = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    logit_bias: tuple[tuple[TokenId, float], ...] = ()
    min_tokens: Count = 0
    mode: SamplingMode = SamplingMode.KEYED


class GenerationParams(_Frozen):
    """What the target needs to know to generate.

    `stop` are strings that end the answer where they appear in its text; only a gateway knows text. `logprobs` asks for
    the log-probability of each token and of so many likeliest ones. `json_schema` is one that the answer must satisfy,
    as JSON; `{}` asks for any JSON object. `unheard` says that nobody waits for what early exits foresee, so that they need
    not foresee anything.
    """

    max_tokens: Annotated[int, Field(ge=1)]
    stop_token_ids: Tokens = ()
    ignore_eos: bool = False
    policy: Policy = Policy.LATENCY
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: Count | None = None
    json_schema: str = ""
    unheard: bool = False


class TokenLogprobs(_Frozen):
    """The target's log-probability of a token (before temperature, penalties and truncation), its rank (1 is the
    likeliest), and the likeliest tokens with theirs."""

    logprob: float
    rank: Count
    top: tuple[tuple[TokenId, float], ...] = ()


class Outcome(_Frozen):
    """A possible result of a verification: `accepted` draft tokens hold and `next_token` follows them.

    `confidence` is the estimated probability that this outcome is the verdict.
    """

    accepted: Count
    next_token: TokenId
    confidence: Confidence = 1.0


# --- outrider.sessions: gateway → kv-session -------------------------------------------------------


class OpenSession(Message):
    """Open a session, or take an existing one up again (`resume`), with replies to `reply`.

    A resume names the session only: prompt and parameters come from Redis.
    """

    topic: ClassVar[Topic] = Topic.SESSIONS
    kind: Literal["open"] = "open"
    epoch: Epoch = 0
    reply: ReplyRoute
    model: str = ""
    prompt: Tokens = ()
    params: GenerationParams | None = None
    resume: bool = False
    tenant: str = ""
    metadata: Mapping[str, str] = Field(default_factory=dict)


class CloseSession(Message):
    """The gateway is done with a session.

    `detach` frees its KV but keeps the session, so that a client may take it up again; otherwise it has ended.
    """

    topic: ClassVar[Topic] = Topic.SESSIONS
    kind: Literal["close"] = "close"
    reason: str
    detach: bool = False


class TouchSession(Message):
    """The session is in use: put its expiry off."""

    topic: ClassVar[Topic] = Topic.SESSIONS
    kind: Literal["touch"] = "touch"


# --- outrider.placements: kv-session → gateway, verifier -------------------------------------------


class Placed(Message):
    """The session lives on the verifier that holds `partition` of the drafts topic, from `epoch` on.

    Sent when a session is opened, resumed or moved (`reason` says which). `base` is what was committed then. `begun`: who
    passes it on has sent the session's `Prompt` already, of round 0.
    """

    topic: ClassVar[Topic] = Topic.PLACEMENTS
    kind: Literal["placed"] = "placed"
    verifier: str
    partition: Count
    base: Count = 0
    reply: ReplyRoute
    reason: Literal["opened", "resumed", "moved"] = "opened"
    begun: bool = False


class Evicted(Message):
    """The session's KV is to be freed (its tokens stay in Redis); the next block restores it."""

    topic: ClassVar[Topic] = Topic.PLACEMENTS
    kind: Literal["evicted"] = "evicted"
    reason: str


class Closed(Message):
    """The session has ended: closed by its gateway, by the operator or because it expired."""

    topic: ClassVar[Topic] = Topic.PLACEMENTS
    kind: Literal["closed"] = "closed"
    reason: str


class Refused(Message):
    """The session was not opened. `code` is that of an `OutriderError`."""

    topic: ClassVar[Topic] = Topic.PLACEMENTS
    kind: Literal["refused"] = "refused"
    reply: ReplyRoute
    code: str
    message: str
    retry_after_s: float | None = None


# --- outrider.drafts: gateway → verifier -----------------------------------------------------------


class Prompt(Message):
    """Start generating: prompt and parameters are in Redis. Answered by the verdict of round 0 (an empty block)."""

    topic: ClassVar[Topic] = Topic.DRAFTS
    kind: Literal["prompt"] = "prompt"
    reply: ReplyRoute
    round: Count = 0
    base: Count = 0


class Block(Message):
    """Draft tokens that continue the first `base` committed tokens; verified in one pass. May be empty.

    `confidences` say how sure the draft was of each, or nothing: early exits make use of them. `q` is what each was
    drawn from, where the session's sampling mode needs it (`shared.sampling.sparse`); nothing where none was drawn.
    """

    topic: ClassVar[Topic] = Topic.DRAFTS
    kind: Literal["block"] = "block"
    reply: ReplyRoute
    round: Count
    base: Count
    tokens: Tokens
    confidences: tuple[Level, ...] = ()
    q: bytes = b""


class Forward(Message):
    """A block for a verdict that is still to come: what follows if `parent`'s outcome is (`accepted`, `next_token`).

    `parent` is the round of a block, or of a forward, sent before; `round` is this one's own number. The verifier that
    ends `parent` with that outcome goes on with it at once; otherwise it is dropped without an answer. A forward that names
    itself as its parent follows the pass that the verifier runs by itself on `base` (`Floor.following`). `base` is what
    the sender knew to be committed. `confidences` and `q` are as a block's.
    """

    topic: ClassVar[Topic] = Topic.DRAFTS
    kind: Literal["forward"] = "forward"
    reply: ReplyRoute
    round: Count
    base: Count
    parent: Count
    accepted: Count
    next_token: TokenId
    tokens: Tokens
    confidences: tuple[Level, ...] = ()
    q: bytes = b""


class Cancel(Message):
    """Stop at once, also in mid-pass, and free the session's KV."""

    topic: ClassVar[Topic] = Topic.DRAFTS
    kind: Literal["cancel"] = "cancel"
    reason: str


# --- outrider.exits: verifier → gateway ------------------------------------------------------------


class Hint(Message):
    """What the exit after `layer` foresees for a round, most likely first. Advice: it may be lost or wrong."""

    topic: ClassVar[Topic] = Topic.EXITS
    kind: Literal["hint"] = "hint"
    round: Count
    base: Count
    layer: Count
    outcomes: tuple[Outcome, ...]
    elapsed_ms: float = 0.0


# --- outrider.verdicts: verifier → gateway ---------------------------------------------------------


class Verdict(Message):
    """A round's outcome, already committed: `tokens` follow the first `base` committed tokens.

    `tokens` are the `accepted` draft tokens and then the target's own next token; an end of sequence, a stop token or
    a limit may cut them short (`finish_reason` says so). `taken` is the round of the forward that the verifier has gone
    on with already. `verify_ms` is from the block's arrival at the verifier (or the start of its pass, if it had to
    wait) to the engine's answer, `commit_ms` the commit; `rows` are those of all sessions' passes that ran then, and
    `sessions` how many these were. `fixed_ms` and `row_ms` are what a pass of so many rows takes by the verifier's own
    measurement, over all that it has run: `fixed_ms + row_ms * rows`. 0 where it doesn't say. `padded` are the rows that
    every block takes there, however short; 0: those that it has. `passes` are those of this session that said the tokens:
    more than one where the target went on by itself meanwhile. `following` is what the verifier drafted itself for the
    pass that it runs behind these tokens, if it does.
    """

    topic: ClassVar[Topic] = Topic.VERDICTS
    kind: Literal["verdict"] = "verdict"
    round: Count
    base: Count
    accepted: Count
    tokens: Tokens
    finish_reason: FinishReason | None = None
    taken: Count | None = None
    following: Tokens = ()
    verify_ms: float = 0.0
    commit_ms: float = 0.0
    rows: Count = 0
    sessions: Count = 0
    fixed_ms: float = 0.0
    row_ms: float = 0.0
    padded: Count = 0
    passes: Count = 1
    logprobs: tuple[TokenLogprobs, ...] = ()


class Floor(Message):
    """What the target went on to say by itself, already committed: `tokens` follow the first `base` committed tokens."""

    topic: ClassVar[Topic] = Topic.VERDICTS
    kind: Literal["floor"] = "floor"
    base: Count
    tokens: Tokens
    finish_reason: FinishReason | None = None
    taken: Count | None = None
    following: Tokens = ()
    verify_ms: float = 0.0
    commit_ms: float = 0.0
    rows: Count = 0
    sessions: Count = 0
    fixed_ms: float = 0.0
    row_ms: float = 0.0
    padded: Count = 0
    passes: Count = 1
    logprobs: tuple[TokenLogprobs, ...] = ()


class Stale(Message):
    """The block changed nothing: it was written in an older epoch or on another base.

    `base` and `epoch` are the session's own, `tokens` what was committed since the block's base (`since`), so that
    the reader catches up and drafts anew. `gateway` is who drives the session now.
    """

    topic: ClassVar[Topic] = Topic.VERDICTS
    kind: Literal["stale"] = "stale"
    round: Count
    base: Count
    since: Count
    tokens: Tokens
    gateway: str = ""
    finish_reason: FinishReason | None = None


class Fault(Message):
    """The round can't be answered. `code` is that of an `OutriderError`."""

    topic: ClassVar[Topic] = Topic.VERDICTS
    kind: Literal["fault"] = "fault"
    round: Count
    code: str
    message: str
    retry_after_s: float | None = None


# --- outrider.heartbeats: verifier → kv-session ----------------------------------------------------


class Heartbeat(_Frozen):
    """A verifier's load. `incarnation` is new with every process, `partitions` are those of drafts that it holds."""

    topic: ClassVar[Topic] = Topic.HEARTBEATS
    kind: Literal["heartbeat"] = "heartbeat"
    verifier: str
    incarnation: str
    model: str
    ready: bool
    partitions: tuple[int, ...]
    sessions: Count
    max_sessions: Count
    kv_usage: Annotated[float, Field(ge=0.0)]
    kv_capacity_tokens: Count
    max_model_len: Count
    step_ms: float = 0.0
    stopping: bool = False


# --- outrider.dead-letters -------------------------------------------------------------------------


class DeadLetter(_Frozen):
    """A message that could not be read, kept whole (`payload` is base64), with where it came from and why."""

    topic: ClassVar[Topic] = Topic.DEAD_LETTERS
    kind: Literal["dead-letter"] = "dead-letter"
    source: str
    partition: Count
    offset: Count
    reader: str
    reason: str
    payload: str
    headers: Mapping[str, str] = Field(default_factory=dict)


SessionsMessage = OpenSession | CloseSession | TouchSession
PlacementsMessage = Placed | Evicted | Closed | Refused
DraftsMessage = Prompt | Block | Forward | Cancel
ExitsMessage = Hint
VerdictsMessage = Verdict | Floor | Stale | Fault
AnyMessage = (
    SessionsMessage
    | PlacementsMessage
    | DraftsMessage
    | ExitsMessage
    | VerdictsMessage
    | Heartbeat
    | DeadLetter
)


class _Reader(Protocol):
    def validate_json(self, data: bytes, /) -> AnyMessage: ...


_READERS: Final[Mapping[Topic, _Reader]] = {
    Topic.SESSIONS: TypeAdapter(Annotated[SessionsMessage, Field(discriminator="kind")]),
    Topic.PLACEMENTS: TypeAdapter(Annotated[PlacementsMessage, Field(discriminator="kind")]),
    Topic.DRAFTS: TypeAdapter(Annotated[DraftsMessage, Field(discriminator="kind")]),
    Topic.EXITS: TypeAdapter(Hint),
    Topic.VERDICTS: TypeAdapter(Annotated[VerdictsMessage, Field(discriminator="kind")]),
    Topic.HEARTBEATS: TypeAdapter(Heartbeat),
    Topic.DEAD_LETTERS: TypeAdapter(DeadLetter),
}


def encode(message: AnyMessage) -> bytes:
    """The message as JSON bytes (its schema version travels beside it, in a header)."""
    return message.model_dump_json().encode()


def decode(topic: Topic, payload: bytes, *, version: str = SCHEMA_VERSION) -> AnyMessage:
    """The message in `payload`.

    Raises `ProtocolError` when the version's major number is not ours, or when the bytes are not such a message; the
    text names the field and what would be right.
    """
    major, _, minor = version.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise ProtocolError(
            f"schema version {version!r} is not MAJOR.MINOR; this reader speaks {SCHEMA_VERSION}"
        )
    if int(major) != SCHEMA_MAJOR:
        raise ProtocolError(
            f"schema version {version} is not readable here; this reader speaks {SCHEMA_MAJOR}.x"
        )
    try:
        return _READERS[topic].validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        raise ProtocolError(
            f"not a message of {topic}: {where}: {first['msg']} ({error.error_count()} faults in all)"
        ) from None
    except ValueError as error:
        raise ProtocolError(f"not a message of {topic}: {error}") from None
