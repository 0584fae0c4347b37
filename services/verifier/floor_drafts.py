"""What the floor verifies beside the target's own next token, and how much of it is worth its rows.

Two things cost nothing to find and a row each to verify: what followed the last time the text ended like this (prompt
lookup), and what a draft that was refused goes on with. How likely either is right depends above all on how many tokens of
the text's end speak for it: that were found again, or that the draft had foreseen since. So that is what is learned: for
each such number how often the next token was the right one. A token that proves right makes the number larger by one, so
the second drafted token is judged as one for which one more speaks, and so on. All of them are compared with what the
target says, those that were not worth their rows too: figures that keep a draft from being verified can become better
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shared.lookup import Lookup
from shared.protocol import Tokens
from shared.speculation.pace import Mean
from shared.speculation.verifier import Tail

LENGTH: Final = 8
"""Tokens that the floor drafts at a time."""
LOOKED_UP: Final = (0.0, 0.2, 0.6, 0.75, 0.8, 0.8, 0.9)
"""How often the token after a match of so many is right: rounded from 1,805 places in answers of the target that ships
(dev prompts of Spec-Bench)."""
LEFT_OVER: Final = (0.2, 0.55, 0.65, 0.7, 0.75)
"""How often what a refused draft goes on with is right, by how many tokens since it had foreseen: rounded from some 900
places, likewise."""


class Shares:
    """Shares of drafted tokens that were right, by how many tokens spoke for them; as many as there are figures for, and
    more, are one."""

    def __init__(self, prior: Sequence[float]) -> None:
        self._right = [Mean(share) for share in prior]

    def right(self, agreed: int) -> float:
        """How often the token is right for which so many speak."""
        return self._right[min(agreed, len(self._right) - 1)](0.0)

    def saw(self, agreed: int, drafted: Sequence[int], said: Sequence[int]) -> None:
        """The target said so much where `drafted` was what so many tokens spoke for."""
        for place, (token, truth) in enumerate(zip(drafted, said, strict=False), agreed):
            self._right[min(place, len(self._right) - 1)].saw(float(token == truth))
            if token != truth:
                return

    def worth(self, agreed: int, longest: int, least: float) -> int:
        """How many of `longest` tokens are likely enough to be reached and right, `least` being what a row has to bring."""
        share = 1.0
        for length in range(longest):
            share *= self.right(agreed + length)
            if share < least:
                return length
        return longest

    def expected(self, agreed: int, length: int) -> float:
        """How many of `length` tokens are right, up to the first that is not."""
        share, total = 1.0, 0.0
        for place in range(length):
            share *= self.right(agreed + place)
            total += share
        return total


class FloorShares:
    """What all sessions have learned of the floor's drafts."""

    def __init__(self) -> None:
        self.looked_up = Shares(LOOKED_UP)
        self.left_over = Shares(LEFT_OVER)


@dataclass(frozen=True, slots=True)
class _Found:
    """Tokens that may follow, and how many of those before them speak for it."""

    shares: Shares
    agreed: int
    tokens: Tokens


class FloorDraft:
    """One session's floor: drafts, and learns from what the target says instead."""

    def __init__(self, shares: FloorShares) -> None:
        self._shares = shares
        self._lookup = Lookup()
        self._found: list[_Found] = []

    def draft(self, text: Tokens, tail: Tail, least: float) -> Tokens:
        """What is likeliest to follow `text`, prompt included, as far as it is worth its rows; `least` is what each has to
        bring."""
        self._lookup.follow(text)
        looked_up, _ = self._lookup.draft(LENGTH)
        self._found = [
            _Found(self._shares.looked_up, self._lookup.matched, looked_up),
            _Found(self._shares.left_over, tail.foreseen, tail.tokens[:LENGTH]),
        ]
        best, most = Tokens(), 0.0
        for found in self._found:
            length = found.shares.worth(found.agreed, len(found.tokens), least)
            expected = found.shares.expected(found.agreed, length)
            if expected > most:
                best, most = found.tokens[:length], expected
        return best

    def judge(self, said: Tokens) -> None:
        """Learn from what the target has said where `draft` made its proposals, if it did."""
        for found in self._found:
            found.shares.saw(found.agreed, found.tokens, said)
        self._found = []
