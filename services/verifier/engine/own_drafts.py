"""What sessions verify that go on by themselves without asking the verifier's process: the floor's drafts, in the engine.

The way to the verifier's process and back takes as long as a good part of a pass on a CPU. A session that nobody drafts
for goes on at once, with what its draft head and prompt lookup say (`floor_drafts`), and learns from it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.verifier.floor_drafts import FloorDraft, FloorShares
from shared.speculation.pace import Mean, least_worth
from shared.speculation.verifier import Tail

if TYPE_CHECKING:
    from services.verifier.engine.sessions import Counters, Session


class OwnDrafts:
    """The floor's drafts of all sessions."""

    def __init__(self) -> None:
        self._shares = FloorShares()
        self._tokens = Mean()  # what a session gets by a pass
        self._floors: dict[str, FloorDraft] = {}

    def draft(self, session: Session, counters: Counters, sharers: int) -> list[int]:
        """What is worth verifying behind what a session has said, in a pass that so many sessions share; `counters` say what
        rows take."""

        def pass_ms(rows: float) -> float:
            return counters.fixed_ms + counters.row_ms * rows

        rate = self._tokens(1.0) / pass_ms(sharers) if counters.row_ms else 0.0
        least = least_worth(rate, pass_ms, sharers)
        text = tuple(session.request.all_token_ids)
        return list(self._floor(session).draft(text, Tail(), least))

    def heard(self, session: Session, said: Sequence[int]) -> None:
        """A pass has said these tokens, and the draft head what may follow (`Session.drafted`)."""
        self._tokens.saw(len(said))
        floor = self._floor(session)
        floor.judge(tuple(said))
        floor.hear(session.drafted or ())

    def forget(self, session: Session) -> None:
        """It has ended."""
        self._floors.pop(session.key, None)

    def _floor(self, session: Session) -> FloorDraft:
        return self._floors.setdefault(session.key, FloorDraft(self._shares))
