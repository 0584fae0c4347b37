"""Rounds as the system plays them, on text that the target has already said.

A round starts at a position, a drafter proposes a block, the longest agreeing prefix is accepted and the target's own
next token follows. At temperature 0 the text is the same whatever is drafted, so rounds need no target to be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Drafter = Callable[[int, int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Tally:
    """Rounds, tokens committed and, per place in the block, how often it was reached and accepted."""

    rounds: int
    tokens: int
    reached: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def tokens_per_round(self) -> float:
        """Tokens committed a round, the target's own included."""
        return self.tokens / max(1, self.rounds)

    def acceptance(self, place: int = 0) -> float:
        """How often the draft token at `place` is accepted when all before it were."""
        return self.accepted[place] / max(1, self.reached[place])

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rounds + other.rounds,
            self.tokens + other.tokens,
            tuple(a + b for a, b in zip(self.reached, other.reached, strict=True)),
            tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True)),
        )


def empty(block: int) -> Tally:
    """A tally of nothing."""
    return Tally(0, 0, (0,) * block, (0,) * block)


def agreeing(draft: Sequence[int], truth: Sequence[int]) -> int:
    """How many tokens of `draft` hold."""
    for index, (said, true) in enumerate(zip(draft, truth, strict=False)):
        if said != true:
            return index
    return min(len(draft), len(truth))


def play(text: Sequence[int], start: int, block: int, drafter: Drafter) -> Tally:
    """Plays rounds over `text` from `start` (the first position the drafter answers for) to its end.

    `drafter(position, block)` proposes tokens for `position`, `position + 1`, …
    """
    rounds = tokens = 0
    reached, accepted = [0] * block, [0] * block
    position = start
    while position < len(text):
        truth = text[position : position + block]
        held = agreeing(drafter(position, block), truth)
        for place in range(min(held + 1, len(truth))):
            reached[place] += 1
        for place in range(held):
            accepted[place] += 1
        gained = min(held + 1, len(text) - position)
        rounds, tokens, position = rounds + 1, tokens + gained, position + gained
    return Tally(rounds, tokens, tuple(reached), tuple(accepted))
