"""Prompt lookup where its match is long, a draft model elsewhere, chosen by what each has been worth so far.

A lookup is free, a model's draft is not, so the choice is made before the model runs: by how many tokens of the suffix
the lookup found again. For every such length it keeps the accepted tokens that lookups and the model's drafts have
earned (both are worth more where text repeats itself). What was accepted is read off later contexts of the session, far
enough back that nothing there is still an assumption. New sessions start from what all sessions have taught, and that
from figures measured with the pair that ships.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from services.draft_gateway.drafting.engine import (
    EMPTY,
    Draft,
    DraftEngine,
    DraftRequest,
    Dropped,
    Ready,
    none_dropped,
    none_told,
)
from services.draft_gateway.drafting.lookup import PromptLookup
from shared.lookup import LONGEST, common_prefix
from shared.protocol import Tokens

PRIOR_LOOKUP: Final = (0.0, 0.7, 1.6, 2.1, 2.4, 2.7, 3.9)
"""Accepted tokens of a five-token lookup, by matched length, measured with the pair that ships."""
PRIOR_MODEL: Final = (2.0, 2.0, 2.4, 2.7, 3.0, 3.1, 4.1)
"""The same of the draft model's blocks."""
PRIOR_DRAFTS: Final = 30.0
SESSION_DRAFTS: Final = 12.0
FORGETTING: Final = 0.98
MOST_SESSIONS: Final = 1024
MOST_GUESSES: Final = 32
ASSUMED: Final = 24
"""A context's last tokens may be assumed by its lane; before so many it holds what was committed."""


@dataclass(slots=True)
class _Worth:
    """A running mean of accepted tokens, as a share of those drafted."""

    accepted: float
    drafts: float

    @property
    def mean(self) -> float:
        return self.accepted / self.drafts

    def saw(self, accepted: float) -> None:
        self.accepted = self.accepted * FORGETTING + accepted
        self.drafts = self.drafts * FORGETTING + 1

    def child(self) -> _Worth:
        """What a new session starts from."""
        return _Worth(self.mean * SESSION_DRAFTS, SESSION_DRAFTS)


class Worths:
    """What lookups of each matched length, and the model, have been worth."""

    def __init__(self, parent: Worths | None = None) -> None:
        if parent is None:
            self._lookup = [_Worth(prior * PRIOR_DRAFTS, PRIOR_DRAFTS) for prior in PRIOR_LOOKUP]
            self._model = [_Worth(prior * PRIOR_DRAFTS, PRIOR_DRAFTS) for prior in PRIOR_MODEL]
        else:
            self._lookup = [worth.child() for worth in parent._lookup]
            self._model = [worth.child() for worth in parent._model]
        self._parent = parent

    def prefers_lookup(self, matched: int) -> bool:
        """Whether a lookup with a match of so many tokens promises more than the model."""
        place = min(matched, LONGEST)
        return matched > 0 and self._lookup[place].mean >= self._model[place].mean

    def saw_lookup(self, matched: int, accepted: float) -> None:
        """A lookup was worth so much."""
        self._lookup[min(matched, LONGEST)].saw(accepted)
        if self._parent is not None:
            self._parent.saw_lookup(matched, accepted)

    def saw_model(self, matched: int, accepted: float) -> None:
        """A draft of the model was worth so much, where a lookup had found so many tokens again."""
        self._model[min(matched, LONGEST)].saw(accepted)
        if self._parent is not None:
            self._parent.saw_model(matched, accepted)


@dataclass(slots=True)
class _Guess:
    """A block proposed after `context`: what the lookup said, and the model where it was asked."""

    context: Tokens
    matched: int
    looked_up: Tokens
    modelled: Tokens | None


@dataclass(slots=True)
class _Session:
    worths: Worths
    guesses: deque[_Guess] = field(default_factory=deque)


class HybridDraft:
    """A draft engine that chooses between two for every draft."""

    immediate: Final = False

    def __init__(self, lookup: PromptLookup, model: DraftEngine, worths: Worths | None = None) -> None:
        """`worths` is what is known beforehand of both; what they turn out to be worth goes there too."""
        self._lookup = lookup
        self._model = model
        self._worths = worths or Worths()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self.name: Final = f"{model.name} and prompt lookup"

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        """See `DraftEngine`."""
        drafts: list[Draft] = [EMPTY] * len(requests)
        asked: list[int] = []
        guesses: list[_Guess] = []
        for index, request in enumerate(requests):
            session = self._session(request.session)
            self._learn(session, request.context)
            found = EMPTY if dropped(request) else self._lookup.draft([request])[0]
            matched = self._lookup.matched(request.session) if found.tokens else 0
            if session.worths.prefers_lookup(matched):
                drafts[index] = found
                ready(index, found)
            else:
                asked.append(index)
            guess = _Guess(request.context, matched, found.tokens, None)
            guesses.append(guess)
            session.guesses.append(guess)
        modelled = self._model.draft(
            [requests[index] for index in asked], dropped, lambda number, draft: ready(asked[number], draft)
        )
        for index, draft in zip(asked, modelled, strict=True):
            drafts[index] = draft
            guesses[index].modelled = draft.tokens
        return drafts

    def forget(self, session: str) -> None:
        """See `DraftEngine`."""
        self._sessions.pop(session, None)
        self._lookup.forget(session)
        self._model.forget(session)

    def _session(self, name: str) -> _Session:
        session = self._sessions.setdefault(name, _Session(Worths(self._worths)))
        self._sessions.move_to_end(name)
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return session

    @staticmethod
    def _learn(session: _Session, context: Tokens) -> None:
        """Compare old guesses with what followed; forget those whose context was an assumption that failed."""
        kept: deque[_Guess] = deque(maxlen=MOST_GUESSES)
        for guess in session.guesses:
            start = len(guess.context)
            if context[:start] != guess.context:
                continue
            if len(context) < start + ASSUMED:
                kept.append(guess)
                continue
            truth = context[start:]
            if guess.matched:
                session.worths.saw_lookup(guess.matched, common_prefix(guess.looked_up, truth))
            if guess.modelled is not None:
                session.worths.saw_model(guess.matched, common_prefix(guess.modelled, truth))
        session.guesses = kept
