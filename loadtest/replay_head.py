"""A draft head that is replayed, for measurements: it drafts from the target's own answers behind each pass, as the real one
does from the target's states (`services.verifier.engine.floor_head`), and errs with set probabilities. Synthetic.

    OUTRIDER_REPLAY_HEAD=acceptance=0.68,0.44,0.28,0.16&ms_per_pass=40

`none` or `0` is no head. Parameters:

    acceptance      probability that the draft is right up to its 1st, 2nd, … token; it has as many tokens (those of the head
                    that ships, on answers that it was not trained on)
    spread          how far the chance that a token is right goes apart from place to place, as a share of the most that it
                    can, which is to be certain either way (0.65: a deviation of 0.3, as the head's that ships)
    ms_per_pass     what it adds to each pass of a session that goes on by itself (40, of 522: about its share of a pass of
                    the target that ships, where it is 6 to 10 of 70 to 110 ms)
    seed            that of the replayed draft (0)

Each token comes with its chance, and that is the truth: of those with chance c, a share c is right. The draw that decides it
is the one that decides the replayed draft at that place, since what is hard for one is hard for the other. So they are no
more independent than the pair that ships: there the head's first token was right 79 times of 100 where the draft's was, and
34 where that was not (184 places); here it comes out as about 80 and 40.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from random import Random
from typing import Final
from urllib.parse import parse_qsl

from services.draft_gateway.drafting.replay import draws_of
from shared.errors import InvalidRequest
from shared.protocol import Tokens

HEAD: Final = "OUTRIDER_REPLAY_HEAD"
ACCEPTANCE: Final = (0.68, 0.44, 0.28, 0.16)
NONE: Final = ("", "none", "0")


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the head errs, and what it takes; see the module."""

    acceptance: tuple[float, ...] = ACCEPTANCE
    spread: float = 0.65
    ms_per_pass: float = 40.0
    seed: int = 0


def parse_head(text: str) -> HeadOptions | None:
    """The options in a text, None where it says that there is no head; InvalidRequest names what is wrong with it."""
    if text in NONE:
        return None
    found: dict[str, str] = dict(parse_qsl(text, keep_blank_values=True))
    for name in found:
        if name not in HeadOptions.__dataclass_fields__:
            raise InvalidRequest(
                f"{HEAD}={text!r}: {name!r} is no option of a replayed head; there are "
                f"{', '.join(HeadOptions.__dataclass_fields__)}"
            )
    usual = HeadOptions()
    try:
        acceptance = found.get("acceptance")
        options = HeadOptions(
            usual.acceptance if acceptance is None else tuple(map(float, acceptance.split(","))),
            float(found.get("spread", usual.spread)),
            float(found.get("ms_per_pass", usual.ms_per_pass)),
            int(found.get("seed", usual.seed)),
        )
    except ValueError:
        raise InvalidRequest(
            f"{HEAD}={text!r}: values should be numbers, with commas in acceptance"
        ) from None
    falling = (1.0, *options.acceptance)
    if any(not 0 < later <= earlier for earlier, later in itertools.pairwise(falling)):
        raise InvalidRequest(f"{HEAD}={text!r}: acceptance should be above 0, at most 1, and never rise")
    if not 0 <= options.spread < 1 or options.ms_per_pass < 0:
        raise InvalidRequest(f"{HEAD}={text!r}: spread should be from 0 to below 1, ms_per_pass not negative")
    return options


def head_drafts(
    options: HeadOptions, prompt_length: int, answer: Tokens, said: int
) -> tuple[tuple[int, float], ...]:
    """What the head says may follow the first `said` tokens of an answer: tokens, each with the chance that it is right if
    those before it are."""
    drafted: list[tuple[int, float]] = []
    right, reached = True, 1.0
    chances = Random(f"head:{options.seed}:{prompt_length}:{said}")
    for place, share in enumerate(options.acceptance):
        at = said + place
        if at >= len(answer):
            break
        chance = _spread(chances, share / reached, options.spread)
        right = right and draws_of(options.seed, prompt_length, at).random() < chance
        drafted.append((answer[at] if right else answer[at] ^ 1, chance))
        reached = share
    return tuple(drafted)


def _spread(random: Random, mean: float, spread: float) -> float:
    """A chance: a draw of the beta distribution with that mean, its deviation a share of √(mean (1 - mean))."""
    if spread == 0.0 or mean in (0.0, 1.0):
        return mean
    weight = 1.0 / spread**2 - 1.0
    return min(1.0 - math.ulp(1.0), random.betavariate(mean * weight, (1.0 - mean) * weight))
