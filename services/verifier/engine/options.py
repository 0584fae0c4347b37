"""What the engine's two processes must agree on: options, names of calls, the mark of a session.

The options travel inside vLLM's own configuration (`additional_config`), so that scheduler, model and worker find them
wherever vLLM builds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from shared.errors import EngineError
from shared.protocol import Sampling
from shared.sampling.rules import Rules

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

CONFIG_KEY: Final = "outrider"
SESSION_KEY: Final = "outrider_session"
"""In `SamplingParams.extra_args`: the request is a session, under this key. Other requests are plain."""

EAGER_KEY: Final = "outrider_eager"
"""In `extra_args` of a session: its next block follows its output at once, so that a step may wait for it."""

UNHEARD_KEY: Final = "outrider_unheard"
"""In `extra_args` of a session: nobody waits for what exits foresee of it."""

AHEAD_KEY: Final = "outrider_ahead"
"""In `extra_args` of a session: tokens that it may say by itself beyond those that the verifier has taken; 0 for none."""

ANSWERED: Final = "outrider_answered"
"""In the `kv_transfer_params` of such a session's outputs: the number of the last block that they answer."""

PASSES: Final = "outrider_passes"
"""Beside it: how many passes the session has had."""

DRAFTED: Final = "outrider_drafted"
"""Beside them, of any session: what the draft head says may follow, tokens each with its chance."""

RULES_KEY: Final = "outrider_rules"
"""In `extra_args` of a session or a plain request: how its tokens are drawn (`shared.sampling`); greedily without it."""

SCHEMA_KEY: Final = "outrider_schema"
"""In `extra_args`: the JSON schema that the answer has to satisfy, and how many tokens of the answer the request's prompt
holds."""

HEAD_DRAFTS: Final = "outrider_head_drafts"
"""An attribute that a step's `ModelRunnerOutput` gets: by request, what the draft head says may follow."""
SUBMIT_CALL: Final = "outrider_submit"
STATS_CALL: Final = "outrider_stats"
DESCRIBE_CALL: Final = "outrider_describe"
DRAFT_LEVELS: Final = "outrider_draft_levels"
"""An attribute that a step's `SchedulerOutput` gets: by request, how sure the draft was of each token of its block."""
DRAFT_ROWS: Final = "outrider_draft_rows"
"""Another one: what each of these tokens was drawn from, in ratio mode."""
DRAFT_LENGTHS: Final = "outrider_draft_lengths"
"""Another one: by request, how many tokens of its block are a draft's; padding follows them."""
EVEN_ROWS: Final = "outrider_even_rows"
"""Another one: how many rows every request of the step has, where all of them speak after as many, or where its prompts are
cut into parts of as many; else 0."""
GATHERED: Final = "outrider_gathered"
"""Another one, of steps with `EVEN_ROWS` that went the short way or have prompts: what they compute
(`session_table.Gathered`)."""
FOLLOWED: Final = "outrider_followed"
"""Another one, of the same steps: places in the pass of the sessions that say another token in the step after it, whatever
comes. Its pass may be launched at once."""
LAUNCHED: Final = "outrider_launched"
"""Another one: where the step's sessions are in the pass that was launched for it beforehand. None where none was."""
REHEARSED_S: Final = 0.005
"""Between two rehearsals of a step that waits."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of ours, beside vLLM's. `exit_address` is a ZMQ endpoint; `exit_modules` and `draft_head` are paths or empty.
    `uniform`: every block of a pass is padded to the longest there may be, unless nobody drafts, so that a pass of n
    sessions is always the same CUDA graph. `compact`: weights are read in the few bits that they are made of (`compact`).
    `own_drafts`: sessions that go on by themselves draft in the engine, and do so when they are told to. `early`: a pass of
    sessions that go on by themselves is launched before the one before it has ended; only where batches are uniform.
    `prompt_places`: room in an even pass for so many sessions more than there may be, in which prompts are computed; 0: they
    never are."""

    exit_address: str
    exit_layers: tuple[int, ...]
    exit_modules: str
    exit_outcomes: int
    threads: int
    draft_head: str = ""
    uniform: bool = False
    compact: bool = False
    own_drafts: bool = False
    early: bool = False
    prompt_places: int = 0

    def as_config(self) -> dict[str, Any]:
        """As a value for vLLM's `additional_config`."""
        return {CONFIG_KEY: {**asdict(self), "exit_layers": list(self.exit_layers)}}

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> EngineOptions:
        """The options in vLLM's configuration; `EngineError` when it was not made by `launch`."""
        extra = vllm_config.additional_config
        found = extra.get(CONFIG_KEY) if isinstance(extra, Mapping) else None
        if not isinstance(found, Mapping):
            raise EngineError(
                "this model class and scheduler are started by Outrider's verifier, not by vLLM alone"
            )
        return cls(**{**found, "exit_layers": tuple(found["exit_layers"])})


def session_key(extra_args: Mapping[str, Any] | None) -> str | None:
    """The session that a request stands for, or None for a plain request."""
    return extra_args.get(SESSION_KEY) if extra_args else None


def is_eager(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a session's blocks follow its outputs at once."""
    return bool(extra_args and extra_args.get(EAGER_KEY))


def is_unheard(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether nobody waits for a session's hints."""
    return bool(extra_args and extra_args.get(UNHEARD_KEY))


def ahead_of(extra_args: Mapping[str, Any] | None) -> int:
    """How many tokens a session may say by itself beyond those that the verifier has taken."""
    return int(extra_args.get(AHEAD_KEY, 0)) if extra_args else 0


def is_greedy(params: SamplingParams) -> bool:
    """Whether a request's tokens are the likeliest whatever they are, and nothing else is asked of them."""
    extra = params.extra_args or {}
    asked = (extra.get(RULES_KEY), extra.get(SCHEMA_KEY), params.logprobs, params.structured_outputs)
    return all(each is None for each in asked)


def schema_of(extra_args: Mapping[str, Any] | None) -> tuple[str, int] | None:
    """A request's JSON schema and how many tokens at its prompt's end are of the answer; None without a schema."""
    found = extra_args.get(SCHEMA_KEY) if extra_args else None
    return None if found is None else (str(found[0]), int(found[1]))


def rules_as_argument(rules: Rules) -> dict[str, Any]:
    """What `extra_args` say of how a request's tokens are drawn; nothing where vLLM's own greedy decoding does it."""
    if rules.plain:
        return {}
    return {
        RULES_KEY: {
            "sampling": rules.sampling.model_dump(mode="json"),
            "prompt_length": rules.prompt_length,
            "stop_tokens": list(rules.stop_tokens),
        }
    }


def rules_of(extra_args: Mapping[str, Any] | None) -> Rules | None:
    """The inverse of `rules_as_argument`."""
    found = extra_args.get(RULES_KEY) if extra_args else None
    if found is None:
        return None
    return Rules(
        Sampling.model_validate(found["sampling"]), found["prompt_length"], tuple(found["stop_tokens"])
    )
