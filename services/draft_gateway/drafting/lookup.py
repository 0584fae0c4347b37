"""Prompt lookup: what followed the last time the same few tokens stood in prompt or output (n-gram speculation).

No model, no training, some 10 µs a draft; strong where an answer repeats its prompt (summaries, code, translation), weak
elsewhere. The index grows with the context and is rolled back where a lane assumed what did not come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from services.draft_gateway.drafting.engine import (
    EMPTY,
    Draft,
    DraftRequest,
    Dropped,
    common_prefix,
    none_dropped,
)
from shared.protocol import Tokens

LONGEST: Final = 6
"""Tokens of the longest suffix that is looked up."""
WITNESSES: Final = 8
"""Earlier occurrences that are asked how sure a token is."""
MOST_SESSIONS: Final = 1024


class _Index:
    """Where each n-gram of a growing sequence has ended, newest last."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[Tokens, list[int]] = {}

    def follow(self, context: Tokens) -> None:
        """Make the indexed sequence `context`, from where the two part on."""
        common = common_prefix(tuple(self.tokens), context)
        while len(self.tokens) > common:
            for gram in self._grams():
                ends = self._ends[gram]
                ends.pop()
                if not ends:
                    del self._ends[gram]
            self.tokens.pop()
        for token in context[common:]:
            self.tokens.append(token)
            for gram in self._grams():
                self._ends.setdefault(gram, []).append(len(self.tokens))

    def _grams(self) -> list[Tokens]:
        """The n-grams that end at the last token, longest first."""
        longest = min(LONGEST, len(self.tokens))
        return [tuple(self.tokens[-size:]) for size in range(longest, 0, -1)]

    def earlier(self) -> Sequence[int]:
        """Where the longest suffix that occurred before had ended, newest last; empty when none did."""
        for gram in self._grams():
            ends = self._ends[gram]
            if len(ends) > 1:
                return ends[-1 - WITNESSES : -1]
        return ()


class PromptLookup:
    """A draft engine that copies from the context."""

    name: Final = "prompt lookup"
    immediate: Final = True

    def __init__(self) -> None:
        self._indexes: OrderedDict[str, _Index] = OrderedDict()

    def draft(self, requests: Sequence[DraftRequest], dropped: Dropped = none_dropped) -> list[Draft]:
        """What followed the newest earlier occurrence of the longest suffix that has one."""
        return [EMPTY if dropped(request) else self._draft(request) for request in requests]

    def _draft(self, request: DraftRequest) -> Draft:
        index = self._index(request.session)
        index.follow(request.context)
        ends = index.earlier()
        if not ends:
            return EMPTY
        sequence, witnesses = list(request.context), list(ends)
        confidences: list[float] = []
        source, certainty = ends[-1], 1.0
        for _ in range(request.length):
            token = sequence[source]  # may run into what was just copied: repetition goes on repeating
            agreeing = [end for end in witnesses if end < len(sequence) and sequence[end] == token]
            certainty *= (len(agreeing) + 1) / (len(witnesses) + 2)  # Laplace's rule of succession
            confidences.append(certainty)
            sequence.append(token)
            source += 1
            witnesses = [end + 1 for end in agreeing]
        return Draft(tuple(sequence[len(request.context) :]), tuple(confidences))

    def _index(self, session: str) -> _Index:
        index = self._indexes.setdefault(session, _Index())
        self._indexes.move_to_end(session)
        while len(self._indexes) > MOST_SESSIONS:
            self._indexes.popitem(last=False)
        return index

    def forget(self, session: str) -> None:
        """Drop the session's index."""
        self._indexes.pop(session, None)
