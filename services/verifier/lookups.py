"""How often the floor's looked-up tokens are right, and how many of them are worth their rows.

What is looked up costs nothing to find and a row to verify. How likely it is right depends above all on how many tokens
of the text's end were found again, so that is what is learned: for each such length how often the next token was the one
that had followed there. A token that proves right makes the match longer by one, so the second looked-up token is judged
as one after a longer match, and so on. All of them are compared with what the target says, those that were not worth
their rows too: figures that keep lookups from being verified can become better again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shared.lookup import LONGEST
from shared.speculation.pace import Mean

PRIOR: Final = (0.0, 0.2, 0.6, 0.75, 0.8, 0.8, 0.9)
"""How often the token after a match of so many is right: rounded from 1,805 places in answers of the target that ships
(dev prompts of Spec-Bench)."""


class Lookups:
    """Shares of looked-up tokens that were right, by matched length; `LONGEST` and more are one."""

    def __init__(self) -> None:
        self._right = [Mean(share) for share in PRIOR]

    def right(self, matched: int) -> float:
        """How often the token after a match of so many is right."""
        return self._right[min(matched, LONGEST)](0.0)

    def saw(self, matched: int, found: Sequence[int], said: Sequence[int]) -> None:
        """The target said so much where `found` had been looked up after a match of so many tokens."""
        for place, (token, truth) in enumerate(zip(found, said, strict=False), matched):
            self._right[min(place, LONGEST)].saw(float(token == truth))
            if token != truth:
                return

    def worth(self, matched: int, longest: int, least: float) -> int:
        """How many of `longest` tokens are likely enough to be reached and right, `least` being what a row has to bring."""
        share = 1.0
        for length in range(longest):
            share *= self.right(matched + length)
            if share < least:
                return length
        return longest
