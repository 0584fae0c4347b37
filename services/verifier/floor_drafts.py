"""What the floor verifies beside the target's own next token, and how much of it is worth its rows.

Three things are there for next to nothing and cost a row each to verify: what the target's draft head says
(`engine.draft_head`), what followed the last time the text ended like this (prompt lookup), and what a draft that was
refused goes on with. How likely a token is right that was looked up or left over depends above all on how many tokens
of the text's end speak for it: that were found again, or that the draft had foreseen since. So that is what is learned:
for each such number how often the next token was the right one. A token that proves right makes the number larger by
one, so the second drafted token is judged as one for which one more speaks, and so on. A draft head tells each token's
chance itself; for each tenth of chance it is learned how often that is so. All drafts are compared with what the target
says, those that were not worth their rows too: figures that keep a draft from being verified can become better again.
"""

from __future__ import annotations

import math
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
BLOCKS: Final = (0.7, 0.7, 0.7, 0.7, 0.7)
"""How often a token of a block from the edge is right, by how many before it the block had foreseen."""
CHANCES: Final = 10
"""Steps in which a draft head's word is taken; at first it is believed."""


class Shares:
    """Shares of drafted tokens that were right, by a whole number that speaks for them; that and larger ones are one for the
    last figure."""

    def __init__(self, prior: Sequence[float]) -> None:
        self._right = [Mean(share) for share in prior]

    def right(self, evidence: int) -> float:
        """How often the token is right for which that speaks."""
        return self._right[min(evidence, len(self._right) - 1)](0.0)

    def saw(self, evidence: int, *, right: bool) -> None:
        """A token was right, or wrong, for which that spoke."""
        self._right[min(evidence, len(self._right) - 1)].saw(float(right))


class FloorShares:
    """What all sessions have learned of the floor's drafts."""

    def __init__(self) -> None:
        self.looked_up = Shares(LOOKED_UP)
        self.left_over = Shares(LEFT_OVER)
        self.blocks = Shares(BLOCKS)
        self.headed = Shares([(step + 0.5) / CHANCES for step in range(CHANCES)])


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow, and what speaks for each of them, if those before it are right."""

    shares: Shares
    tokens: Tokens
    evidence: Sequence[int]

    def worth(self, least: float, reached: float = 1.0) -> tuple[int, float]:
        """How many of the tokens are likely enough to be reached and right, `least` being what a row has to bring; and how
        many of these are right, up to the first that is not. `reached` is how likely their place is."""
        share, total = reached, 0.0
        for length, evidence in enumerate(self.evidence):
            share *= self.shares.right(evidence)
            if share < least:
                return length, total
            total += share
        return len(self.tokens), total

    def after(self, tokens: Tokens) -> Proposal:
        """What it says to follow `tokens`, nothing where it does not begin with them."""
        count = len(tokens) if self.tokens[: len(tokens)] == tokens else len(self.tokens)
        return Proposal(self.shares, self.tokens[count:], self.evidence[count:])

    @property
    def chance(self) -> float:
        """How likely all of its tokens are right."""
        return math.prod(map(self.shares.right, self.evidence))

    def judge(self, said: Sequence[int]) -> None:
        """Learn from what the target has said in their place."""
        for token, truth, evidence in zip(self.tokens, said, self.evidence, strict=False):
            self.shares.saw(evidence, right=token == truth)
            if token != truth:
                return


class FloorDraft:
    """One session's floor: drafts, and learns from what the target says instead."""

    def __init__(self, shares: FloorShares) -> None:
        self._shares = shares
        self._lookup = Lookup()
        self._headed: Sequence[tuple[int, float]] = ()
        self._proposals: list[Proposal] = []

    def hear(self, drafted: Sequence[tuple[int, float]]) -> None:
        """What the draft head says may follow the text as it is now, tokens each with its chance."""
        self._headed = drafted

    def draft(self, text: Tokens, tail: Tail, least: float, block: Tail = Tail()) -> Tokens:
        """What is likeliest to follow `text`, prompt included, as far as it is worth its rows; `least` is what each has to
        bring. `block` is what is left of an edge's draft: of equals it goes first, whole, with what may be likely enough to
        follow it."""
        self._lookup.follow(text)
        looked_up, _ = self._lookup.draft(LENGTH)
        headed, rest = self._headed[:LENGTH], tail.tokens[:LENGTH]
        self._proposals = [
            Proposal(self._shares.looked_up, looked_up, _rising(self._lookup.matched, looked_up)),
            Proposal(self._shares.left_over, rest, _rising(tail.foreseen, rest)),
            Proposal(
                self._shares.headed,
                tuple(token for token, _ in headed),
                [int(chance * CHANCES) for _, chance in headed],
            ),
        ]
        best, most = self._continued(block, least)
        for proposal in self._proposals:
            length, expected = proposal.worth(least)
            if expected - least * length > most:
                best, most = proposal.tokens[:length], expected - least * length
        return best

    def _continued(self, block: Tail, least: float) -> tuple[Tokens, float]:
        """A block with the best that is said to follow it, and what both promise beyond what their rows have to bring."""
        own = Proposal(self._shares.blocks, block.tokens, _rising(block.foreseen, block.tokens))
        _, promised = own.worth(0.0)
        more, most = Tokens(), 0.0
        for proposal in self._proposals:
            rest = proposal.after(block.tokens)
            length, expected = rest.worth(least, own.chance)
            if expected - least * length > most:
                more, most = rest.tokens[:length], expected - least * length
        self._proposals.append(own)
        return (*block.tokens, *more), promised - least * len(block.tokens) + most

    def judge(self, said: Tokens) -> None:
        """Learn from what the target has said where `draft` made its proposals, if it did. What the head had said is of no
        use any more."""
        for proposal in self._proposals:
            proposal.judge(said)
        self._proposals, self._headed = [], ()


def _rising(agreed: int, tokens: Tokens) -> Sequence[int]:
    """What speaks for tokens of which each that is right speaks for the next one."""
    return range(agreed, agreed + len(tokens))
