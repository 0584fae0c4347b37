"""Prompt lookup: what followed the last time the same few tokens stood in a text (n-gram speculation).

No model, no training, some 10 µs a draft. The index grows with the text and is rolled back where the text turns out
otherwise. A gateway drafts with it, and a verifier where nobody else does.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from typing import Final

from shared.protocol import Tokens

LONGEST: Final = 6
"""Tokens of the longest suffix that is looked up."""
WITNESSES: Final = 8
"""Earlier occurrences that are asked how sure a token is."""
MOST_COMPARED: Final = 256
"""Earlier places of the last two tokens that are compared, newest first."""


class _Chain:
    """Where each key has occurred in a sequence, newest first. An occurrence is known by its end, 1 or more."""

    def __init__(self) -> None:
        self._newest: dict[Hashable, int] = {}
        self._previous = array("I")  # for each end, that of the occurrence before; 0 for none

    def push(self, key: Hashable) -> None:
        """`key` occurs at the next end."""
        self._previous.append(self._newest.get(key, 0))
        self._newest[key] = len(self._previous)

    def pop(self, key: Hashable) -> None:
        """Take the last `push` back; its key was `key`."""
        if previous := self._previous.pop():
            self._newest[key] = previous
        else:
            del self._newest[key]

    def before(self, end: int) -> Iterator[int]:
        """The ends of the earlier occurrences of the key that occurs at `end`."""
        while end := self._previous[end - 1]:
            yield end


class Lookup:
    """A growing text, and where its tokens and its pairs of tokens have occurred."""

    def __init__(self) -> None:
        self._tokens: Tokens = ()
        self.matched = 0
        """Tokens of the suffix that `earlier` found last."""
        self._singles = _Chain()
        self._pairs = _Chain()

    def follow(self, context: Tokens) -> None:
        """Make the indexed sequence `context`, from where the two part on."""
        common = common_prefix(self._tokens, context)
        for end in range(len(self._tokens), common, -1):
            self._singles.pop(self._tokens[end - 1])
            self._pairs.pop(self._tokens[max(end - 2, 0) : end])
        for end in range(common + 1, len(context) + 1):
            self._singles.push(context[end - 1])
            self._pairs.push(context[max(end - 2, 0) : end])
        self._tokens = context

    def earlier(self) -> list[int]:
        """Where the longest suffix that occurred before had ended, newest first; empty when none did."""
        end, best, found = len(self._tokens), 2, list[int]()
        for compared, earlier in enumerate(self._pairs.before(end) if end > 1 else ()):
            if compared == MOST_COMPARED or (best == LONGEST and len(found) == WITNESSES):
                break
            agreeing = self._agreeing(earlier)
            if agreeing > best:
                best, found = agreeing, []
            if agreeing == best:
                found.append(earlier)
        if not found and end:
            best = 1
            found = [earlier for earlier, _ in zip(self._singles.before(end), range(WITNESSES), strict=False)]
        self.matched = best if found else 0
        return found[:WITNESSES]

    def _agreeing(self, end: int) -> int:
        """How many tokens before `end` are those at the end of the sequence, `LONGEST` at most; two are known to be."""
        tokens, last = self._tokens, len(self._tokens)
        agreeing = 2
        while (
            agreeing < LONGEST
            and agreeing < end
            and tokens[end - agreeing - 1] == tokens[last - agreeing - 1]
        ):
            agreeing += 1
        return agreeing

    def draft(self, length: int) -> tuple[Tokens, tuple[float, ...]]:
        """What followed the newest earlier occurrence of the longest suffix that has one: at most `length` tokens, and
        how sure each is if those before it are right, as far as the other occurrences agree."""
        witnesses = self.earlier()
        if not witnesses:
            return (), ()
        context, drafted = self._tokens, list[int]()

        def at(
            position: int,
        ) -> int | None:  # may run into what was just copied: repetition goes on repeating
            if position < len(context):
                return context[position]
            return drafted[position - len(context)] if position < len(context) + len(drafted) else None

        confidences: list[float] = []
        source = witnesses[0]
        while len(drafted) < length and (token := at(source)) is not None:
            agreeing = [end for end in witnesses if at(end) == token]
            confidences.append((len(agreeing) + 1) / (len(witnesses) + 2))  # Laplace's rule of succession
            drafted.append(token)
            source += 1
            witnesses = [end + 1 for end in agreeing]
        return tuple(drafted), tuple(confidences)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences of the same type have in common at their start."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high - 1:  # one[:low] agrees, one[:high] does not
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
