"""The hybrid learns which of its two engines is worth more, and asks the model only where it is."""

from __future__ import annotations

from collections.abc import Sequence

from services.draft_gateway.drafting.engine import (
    Draft,
    DraftRequest,
    Dropped,
    Ready,
    none_dropped,
    none_told,
)
from services.draft_gateway.drafting.hybrid import HybridDraft
from services.draft_gateway.drafting.lookup import PromptLookup

LOOP = tuple(range(10, 18))


class Model:
    """Knows the text by heart, or says nothing but 1; counts how often it is asked."""

    name = "model"
    immediate = False

    def __init__(self, text: tuple[int, ...] = ()) -> None:
        self._text = text
        self.asked = 0
        self.forgotten: list[str] = []

    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        self.asked += len(requests)
        drafts = []
        for request in requests:
            at = len(request.context)
            tokens = self._text[at : at + request.length] or (1,) * request.length
            drafts.append(Draft(tokens, (0.5,) * len(tokens)))
        return drafts

    def forget(self, session: str) -> None:
        self.forgotten.append(session)


def drafted(engine: HybridDraft, text: tuple[int, ...], start: int, step: int = 3) -> list[tuple[int, ...]]:
    """What the engine says as the text grows."""
    return [
        engine.draft([DraftRequest("s", 0, text[:position], 5)])[0].tokens
        for position in range(start, len(text) - 5, step)
    ]


def test_where_the_model_is_always_wrong_and_text_repeats_the_lookup_takes_over() -> None:
    text = LOOP * 40
    engine = HybridDraft(PromptLookup(), Model())
    said = drafted(engine, text, 20)
    assert said[0] == (1,) * 5
    assert all(tokens != (1,) * 5 for tokens in said[-10:])


def test_where_the_model_is_always_right_it_is_asked_to_the_end() -> None:
    text = tuple((7 * place * place + place) % 23 for place in range(200))
    model = Model(text)
    said = drafted(HybridDraft(PromptLookup(), model), text, 8)
    assert model.asked == len(said)


def test_a_lane_whose_assumption_failed_teaches_nothing() -> None:
    text = LOOP * 40
    engine = HybridDraft(PromptLookup(), Model())
    for position in range(20, 200, 3):
        assumed = (*text[:position], 9, 9, 9)  # never comes true
        engine.draft([DraftRequest("s", 1, assumed, 5), DraftRequest("s", 0, text[:position], 5)])
    tokens = engine.draft([DraftRequest("s", 0, text[:200], 5)])[0].tokens
    assert tokens == text[200:205]


def test_forgetting_a_session_forgets_it_everywhere() -> None:
    model = Model()
    engine = HybridDraft(PromptLookup(), model)
    engine.draft([DraftRequest("s", 0, LOOP, 5)])
    engine.forget("s")
    assert model.forgotten == ["s"]
