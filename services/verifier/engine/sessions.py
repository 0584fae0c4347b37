"""What the scheduler knows of its sessions, and of the step under way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from services.verifier.engine.options import ANSWERED, DRAFTED, PASSES
from shared.sampling.sparse import SparseRow

if TYPE_CHECKING:
    from vllm.v1.request import Request

PADDING: Final = 0
"""The token that fills up a block where batches are uniform."""


class Block(NamedTuple):
    """Draft tokens, how sure the draft was of them (`levels`, or nothing), and what they were drawn from (`rows`, tokens
    and counts of each, or nothing; one more if the next token was refused); the base counts the request's own output
    tokens. `number` counts the session's blocks; 0 for one that nobody has submitted."""

    base: int
    tokens: list[int]
    levels: list[int]
    rows: list[tuple[list[int], list[int]]]
    number: int = 0


class Need(NamedTuple):
    """For how many tokens a session needs room in the KV cache, and how many blocks that is beyond those that it holds: more
    than there are where its context ends before."""

    tokens: int
    missing: int


NOTHING: Final = Need(0, 0)


@dataclass(slots=True)
class Session:
    """What the scheduler knows of a session beyond vLLM's request."""

    key: str
    request: Request
    opened_s: float = 0.0
    parked_at: int | None = None
    """The step in which it parked; None while it has something to compute."""
    resting: bool = False
    """Preempted while it had nothing to compute: in no queue, without KV."""
    armed: Block | None = None
    """To be verified in the next step."""
    armed_s: float = 0.0
    """Since when."""
    drafts: int = 0
    """How many of the tokens to be verified are a draft's; padding follows them."""
    pending: Block | None = None
    """To be looked at when what runs now has ended."""
    eager: bool = False
    """Its next block follows at once: the verifier lets it go on by itself where no client's block is there."""
    unheard: bool = False
    """Nobody waits for what exits foresee of it."""
    ahead: int = 0
    """Tokens that it may say by itself beyond those that the verifier has taken, whenever it may do so."""
    permitted: int = 0
    """The same for now."""
    taken: int = 0
    """Output tokens that the verifier has taken, as far as it has said."""
    verified: int = 0
    """The number of the block under way."""
    answered: int = 0
    """The number of the last block whose outcome is known; those before it are answered, too."""
    passes: int = 0
    """In which it has spoken."""
    reached: int = 0
    """Prompt tokens whose KV was computed, or found in the prefix cache, at some time."""
    plain: bool = False
    """It has neither a grammar nor anything but tokens in its prompt, and does not go on after its end."""
    greedy: bool = False
    """Its tokens are the likeliest whatever they are, and nothing else is asked of them."""
    row: int = -1
    """Its row in the `SessionTable`."""
    held: int = 0
    """How many blocks of the KV cache are written down there."""
    block: list[int] = field(default_factory=list)
    """What is to be verified, padded to the longest block there may be."""
    levels: list[int] = field(default_factory=list)
    """How sure the draft was of its tokens."""
    heard: bool = False
    """A gateway waits for hints on it."""
    padded_levels: bytes = b""
    """The levels, a byte each, padded like the block."""
    need: Need = NOTHING
    """What of the KV cache it needs for it."""
    stops: frozenset[int] | None = None
    """Tokens that end it; None where vLLM has to be asked."""
    drafted: list[tuple[int, float]] | None = None
    """What the draft head says may follow what it has just said."""

    @property
    def goes_on(self) -> bool:
        """Whether it may say another token by itself."""
        return bool(self.request.num_output_tokens - self.taken < self.permitted)

    def spoke(self) -> None:
        """A pass of it has ended, and with it the block under way."""
        self.passes += 1
        self.answered = max(self.answered, self.verified)

    @property
    def told(self) -> dict[str, Any] | None:
        """What its outputs say of the blocks that they answer, and of its passes, where not all were asked for, and what may
        follow; in a place of theirs that vLLM hands on."""
        told: dict[str, Any] = {ANSWERED: self.answered, PASSES: self.passes} if self.ahead else {}
        if self.drafted:
            told[DRAFTED] = self.drafted
        return told or None


@dataclass(slots=True)
class Counters:
    """See `EngineStats`."""

    steps: int = 0
    scheduled_tokens: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    plain_tokens: int = 0
    blocks: int = 0
    block_tokens: int = 0
    accepted_tokens: int = 0
    stale_blocks: int = 0
    preemptions: int = 0
    prefix_cache_hit_tokens: int = 0
    step_ms: float = 0.0
    busy_ms: float = 0.0
    fixed_ms: float = 0.0
    row_ms: float = 0.0
    steady_steps: int = 0
    early_steps: int = 0
    prompt_steps: int = 0


@dataclass(slots=True)
class Step:
    """The step under way: when it began, and the draft tokens of each session (by request) that it verifies."""

    began: float = 0.0
    verified: dict[str, int] = field(default_factory=dict)
    prefills: bool = False


def is_bare(sessions: Iterable[Session]) -> bool:
    """Whether nobody drafts for any of these sessions, which have something to compute, or waits for what exits foresee."""
    return all(not session.drafts and (session.eager or session.unheard) for session in sessions)


def only_on(session: Session) -> Block:
    """A block without a draft: the session says another token."""
    return Block(session.request.num_output_tokens, [], [], [])


def drawn_from(session: Session, block: Block, drafts: int) -> list[SparseRow]:
    """What the tokens that the step verifies were drawn from; one more for a token that a grammar refused."""
    first = session.request.num_output_tokens - block.base  # what was said since was cut from its front
    rows = block.rows[first : first + drafts + (len(block.rows) > len(block.tokens))]
    return [SparseRow(tuple(ids), tuple(counts)) for ids, counts in rows]


def stops_of(request: Request) -> frozenset[int] | None:
    """A request's tokens that end it; None where vLLM's check looks at more than these and its length."""
    params = request.sampling_params
    if params is None or params.repetition_detection is not None:
        return None
    return frozenset(
        token for token in (params.eos_token_id, *(params.stop_token_ids or ())) if token is not None
    )
