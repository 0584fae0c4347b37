"""Prompt lookup as a draft engine: an index a session, see `shared.lookup`.

Strong where an answer repeats its prompt (summaries, code, translation), weak elsewhere.
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
    Ready,
    none_dropped,
    none_told,
)
from shared.lookup import Lookup

MOST_SESSIONS: Final = 1024


class PromptLookup:
    """A draft engine that copies from the context."""

    name: Final = "prompt lookup"
    immediate: Final = True

    def __init__(self) -> None:
        self._indexes: OrderedDict[str, Lookup] = OrderedDict()

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        """What followed the newest earlier occurrence of the longest suffix that has one."""
        return [EMPTY if dropped(request) else self._draft(request) for request in requests]

    def _draft(self, request: DraftRequest) -> Draft:
        index = self._index(request.session)
        index.follow(request.context)
        return Draft(*index.draft(request.length))

    def _index(self, session: str) -> Lookup:
        index = self._indexes.setdefault(session, Lookup())
        self._indexes.move_to_end(session)
        while len(self._indexes) > MOST_SESSIONS:
            self._indexes.popitem(last=False)
        return index

    def matched(self, session: str) -> int:
        """How many tokens of the context's end the session's last draft had found earlier."""
        return self._index(session).matched

    def forget(self, session: str) -> None:
        """Drop the session's index."""
        self._indexes.pop(session, None)
