"""What the verifier sees of an engine: its interface and the values that cross it.

No torch and no vLLM here, so that the service, its tests and other engines (a timer in place of a model, say) can be
written against this file alone. The engine that does the work is `engine.VllmEngine`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, runtime_checkable

from shared.protocol import FinishReason, GenerationParams, Outcome, TokenLogprobs, Tokens
from shared.sampling.sparse import SparseRow

UNHEARD: Final = -1
"""In the place of a draft's confidences: nobody waits for hints on this block."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was started. `notes` tell an operator what is not as it was asked for, one sentence each.

    Sizes are tokens. `exits` is `"untrained"`, `"trained: <file>"` or `"off"`; `exit_layers` counts layers from 1: an
    exit after layer 18 sees what the first 18 layers have computed. `draft_head` is a file's name, or `"off"`. `compact` is
    the share of the bytes of the weights' type that a pass of few rows reads. `own_drafts`: sessions that nobody drafts for
    do so themselves (`Engine.submit`). `padded` are the rows that every block takes in a pass, however short it is; 0: those
    that it has.
    """

    model_name: str
    num_layers: int
    vocab_size: int
    max_model_len: int
    max_block: int
    max_sessions: int
    kv_capacity_tokens: int
    exit_layers: tuple[int, ...]
    exits: str
    dtype: str
    draft_head: str = "off"
    compact: float = 1.0
    own_drafts: bool = False
    padded: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """The next output tokens of a session. Consecutive outputs may arrive merged: read them as one stream.

    `logprobs` are one for each token where they were asked for, otherwise none. `passes` have said them: one, unless the
    session went on by itself. `drafted` is what the engine itself expects to follow, tokens each with the chance that it is
    right if those before it are; nothing where it expects nothing.
    """

    tokens: Tokens
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    passes: int = 1
    drafted: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ExitReport:
    """What the exit after `layer` foresees for the block that a session is having verified.

    `base` counts the session's output tokens (committed ones included) before that block. `outcomes` are ranked, most
    likely first. `elapsed_ms` runs from the start of the pass; `sent_s` is when the engine sent it, on the monotonic clock
    of its machine, and 0 where an engine does not tell.
    """

    session: str
    base: int
    layer: int
    outcomes: tuple[Outcome, ...]
    elapsed_ms: float
    sent_s: float = 0.0


class BlockStatus(StrEnum):
    """What became of a submitted block."""

    ARMED = "armed"
    """The next engine step verifies it."""
    QUEUED = "queued"
    """A prefill or another pass of the session still runs; the block is applied, or found stale, when that ends."""
    STALE = "stale"
    """It does not continue the session's output; nothing happens."""
    GONE = "gone"
    """The engine does not hold the session (never opened, finished, closed)."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and gauges of now.

    In the steady state `scheduled_tokens == prefill_tokens + block_tokens + blocks`: one pass, 1 + K tokens a block,
    nothing computed twice. What a preemption makes the engine compute again is counted in `recomputed_tokens`, apart;
    `plain_tokens` are those that belong to requests which are not sessions.
    """

    steps: int
    scheduled_tokens: int
    prefill_tokens: int
    """Prompt (and restored) tokens computed for the first time."""
    recomputed_tokens: int
    """Tokens computed again after a preemption."""
    plain_tokens: int
    blocks: int
    """Blocks verified, empty ones too."""
    block_tokens: int
    """Draft tokens in them."""
    accepted_tokens: int
    stale_blocks: int
    preemptions: int
    prefix_cache_hit_tokens: int
    dropped_hints: int
    """Hints that the side channel had no room for."""
    parked: int
    """Sessions that hold KV and wait for a block."""
    running: int
    """Sessions and requests that the next step computes."""
    waiting: int
    kv_usage: float
    """Share of the KV cache in use, 0 to 1."""
    step_ms: float
    """Running mean of a step's duration."""
    busy_ms: float = 0.0
    """What all steps together have taken."""
    fixed_ms: float = 0.0
    row_ms: float = 0.0
    """What a step that computes no prompt takes by its rows: `fixed_ms + row_ms * rows`; 0 before it is known."""
    steady_steps: int = 0
    """Steps that computed nothing but blocks, and went the short way through the scheduler (`steady_schedule`)."""
    early_steps: int = 0
    """Those of them whose pass was launched before the one before it had ended."""
    prompt_steps: int = 0
    """Other steps that computed prompts, as rows of an even pass."""


OnExit = Callable[[ExitReport], None]


@runtime_checkable
class Engine(Protocol):
    """A target model that verifies blocks for many sessions at a time, each on its own live KV."""

    async def start(self, on_exit: OnExit) -> EngineInfo:
        """Load the model and be ready; `on_exit` is called in the event loop, while the pass still runs.

        Raises `EngineError` when this engine can't run here (a wrong vLLM version, a symbol that is not as expected, no
        memory, ...), and `ModelFilesError` when the checkpoint is missing or unreadable.
        """

    def open(
        self, session: str, prompt: Tokens, committed: Tokens, params: GenerationParams
    ) -> AsyncIterator[EngineOutput]:
        """Start a session after `prompt` and the `committed` tokens; its output stream.

        Prefills, yields one token, then parks until a block is submitted; the iterator ends after the output that
        carries a `finish_reason`, or when the session is closed. Leaving the iteration closes the session.
        `params.max_tokens` counts `committed` too, as do bases.

        Raised by the call itself: `ContextLengthExceeded` when prompt and committed tokens leave no room for another
        one, `InvalidRequest` when `committed` has used up `max_tokens` or ends in an end of sequence or stop token (the
        session has finished, there is nothing to open) or a token is not in the vocabulary, `Overloaded` when
        `max_sessions` are open, `EngineError` when the session is open already or the engine has died. The iterator
        raises `EngineError` when the engine dies later.
        """

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
        """Have a block verified: `tokens` continue the session's first `base` output tokens; may be empty.

        `alone`: nobody else drafts for the session for now, so an engine with `EngineInfo.own_drafts` may go on after this
        as far as its settings let it, without being asked for each pass.

        `confidences` are the draft's, as levels, one a token or none at all; early exits may listen to them (`UNHEARD` for
        each where no hints are wanted). `rows` are
        what each token was drawn from, in ratio mode, or nothing where none was.

        What was generated past `base` meanwhile is trimmed from the block's front where it agrees; otherwise the block
        is stale. An armed block is answered by exactly one output, also when the session is preempted over it; so is a
        queued one, unless a newer block takes its place or it proves stale. A session never speaks unasked.

        Raises `InvalidRequest` when the block is longer than `max_block` or holds a token outside the vocabulary,
        `EngineError` when the engine is dead.
        """

    async def close(self, session: str) -> None:
        """End a session at once, also in mid-pass, and free its KV. Does nothing when it is not open."""

    async def stats(self) -> EngineStats:
        """Counters and gauges; `EngineError` when the engine is dead."""

    async def stop(self) -> None:
        """End every session and the engine; idempotent."""

    def healthy(self) -> bool:
        """Whether the engine is started and alive."""
