"""A draft that is replayed, for measurements: it reads the target's own answers from a file, errs with a set probability
and takes a set time. What is measured with it is synthetic and has to be labelled so.

    OUTRIDER_DRAFT=replay:FILE?acceptance=0.7&ms_per_token=75

FILE holds `{"answers": [{"prompt": [ids], "tokens": [ids]}, ...]}`. Parameters:

    acceptance      probability that a drafted token is the target's, token by token (default 0.7)
    confidence      what the draft says of itself (default: the acceptance, so that it is calibrated)
    second          how often the target's token is the second likeliest where the first is wrong (0.5)
    recovers        how often the next token is the target's all the same, behind one that was not (0.2: what drafts of the
                    pair that ships do, rounded, see `services.verifier.floor_drafts.LEFT_OVER`)
    ms_per_token    time of a step of the draft model (0)
    lane_cost       what every further lane of a batch adds to a step, as a share of it (0.1)
    seed            which tokens are wrong; a position of an answer is right or wrong in every lane alike (0)

Behind a token of its own that is wrong, or in a lane that assumed one, it has left the answer's path until it says the
answer's token again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final
from urllib.parse import parse_qsl

from services.draft_gateway.drafting.engine import (
    EMPTY,
    Alternative,
    Draft,
    DraftRequest,
    Dropped,
    Ready,
    none_dropped,
    none_told,
)
from shared.errors import OutriderError
from shared.protocol import Tokens

PREFIX: Final = "replay:"


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """How the draft errs and how fast it is. Shares are 0 to 1; `ms_per_token` is a step's time."""

    acceptance: float = 0.7
    confidence: float | None = None
    second: float = 0.5
    recovers: float = 0.2
    ms_per_token: float = 0.0
    lane_cost: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Replayed:
    """One answer of the target."""

    prompt: Tokens
    tokens: Tokens


def read_answers(path: Path) -> tuple[Replayed, ...]:
    """The answers in a file; `OutriderError` when it can't be read or holds something else."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))["answers"]
        return tuple(Replayed(tuple(map(int, one["prompt"])), tuple(map(int, one["tokens"]))) for one in held)
    except OSError as error:
        raise OutriderError(f"{path} can't be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutriderError(
            f'{path} should hold {{"answers": [{{"prompt": [ids], "tokens": [ids]}}]}}: {error}'
        ) from error


def draws_of(seed: int, prompt_length: int, at: int) -> Random:
    """What decides a place of an answer: the first draw from it is how hard the place is, 0 to 1, so that a draft which is
    right with probability p is right where it is below p."""
    return Random(f"{seed}:{prompt_length}:{at}")


def parse_replay(draft: str) -> tuple[Path, ReplayOptions]:
    """File and options of a `replay:` draft; `OutriderError` that names what is wrong with it."""
    file, _, query = draft.removeprefix(PREFIX).partition("?")
    found: dict[str, float] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in ReplayOptions.__dataclass_fields__:
            raise OutriderError(
                f"{draft!r}: {name!r} is no option of a replayed draft; there are "
                f"{', '.join(ReplayOptions.__dataclass_fields__)}"
            )
        try:
            found[name] = float(value)
        except ValueError:
            raise OutriderError(f"{draft!r}: {name} should be a number, not {value!r}") from None
        if name in ("acceptance", "confidence", "second", "recovers") and not 0 <= found[name] <= 1:
            raise OutriderError(f"{draft!r}: {name} should be between 0 and 1")
        if found[name] < 0:
            raise OutriderError(f"{draft!r}: {name} should not be negative")
    seed = int(found.pop("seed", 0))
    return Path(file), ReplayOptions(**found, seed=seed)


class ReplayDraft:
    """A draft engine that reads from answers that are known."""

    def __init__(
        self,
        answers: Sequence[Replayed],
        options: ReplayOptions,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._by_prompt = {answer.prompt: answer.tokens for answer in answers}
        self._lengths = sorted({len(answer.prompt) for answer in answers}, reverse=True)
        self._options = options
        self._sleep = sleep
        self._sessions: dict[str, tuple[int, Tokens]] = {}
        self.immediate: Final = options.ms_per_token == 0
        self.name: Final = f"a replayed draft (synthetic: {options})"

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        """See `DraftEngine`: one step a token for all requests together, as a batch has it."""
        steps = [request.length + request.beyond for request in requests]
        done = [0] * len(requests)
        for step in range(max(steps, default=0)):
            going = [n for n, most in enumerate(steps) if step < most and not dropped(requests[n])]
            if not going:
                break
            if self._options.ms_per_token:
                share = 1 + self._options.lane_cost * (len(going) - 1)
                self._sleep(self._options.ms_per_token * share / 1000)
            for n in going:
                done[n] = step + 1
                if done[n] == requests[n].length:
                    ready(n, self._draft(replace(requests[n], beyond=False), done[n]))
        return [self._draft(request, count) for request, count in zip(requests, done, strict=True)]

    def _draft(self, request: DraftRequest, steps: int) -> Draft:
        known = self._answer(request)
        if known is None:
            return EMPTY
        prompt_length, answer = known
        at = len(request.context) - prompt_length
        on_path = at == 0 or request.context[-1] == answer[min(at, len(answer)) - 1]
        places: list[tuple[Alternative, ...]] = []
        for n in range(at, min(at + steps, len(answer))):
            places.append(self._place(prompt_length, answer, n, on_path=on_path))
            on_path = places[-1][0][0] == answer[n]
        tokens = tuple(place[0][0] for place in places[: request.length])
        return Draft(tokens, tuple(place[0][1] for place in places[: len(tokens)]), tuple(places))

    def _place(
        self, prompt_length: int, answer: Tokens, at: int, *, on_path: bool
    ) -> tuple[Alternative, ...]:
        """What the draft thinks of a position: its token and the next likeliest."""
        options = self._options
        random = draws_of(options.seed, prompt_length, at)
        truth, wrong = answer[at], answer[at] ^ 1
        share = options.acceptance if on_path else min(options.recovers, options.acceptance)
        right = random.random() < share
        near = random.random() < options.second
        first = truth if right else wrong
        next_best = truth if near and not right else truth ^ 2
        sure = options.acceptance if options.confidence is None else options.confidence
        return ((first, sure), (next_best, (1 - sure) * options.second))

    def _answer(self, request: DraftRequest) -> tuple[int, Tokens] | None:
        held = self._sessions.get(request.session)
        if held is None:
            for length in self._lengths:
                answer = self._by_prompt.get(request.context[:length])
                if answer is not None and length <= len(request.context):
                    held = self._sessions[request.session] = (length, answer)
                    break
        return held

    def forget(self, session: str) -> None:
        """See `DraftEngine`."""
        self._sessions.pop(session, None)
