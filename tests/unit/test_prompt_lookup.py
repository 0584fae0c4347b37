"""Prompt lookup: what it copies, how sure it is, and that rolling back leaves nothing behind."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.draft_gateway.drafting.engine import Draft, DraftRequest
from services.draft_gateway.drafting.lookup import PromptLookup
from shared.lookup import LONGEST, common_prefix

TOKENS = st.lists(st.integers(0, 3), max_size=60).map(tuple)


def draft(engine: PromptLookup, *context: int, length: int = 3, session: str = "s") -> Draft:
    return engine.draft([DraftRequest(session, 0, context, length)])[0]


def straightforward(context: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The definition: the newest earlier occurrence of the longest suffix that has one, copied on."""
    for size in range(min(LONGEST, len(context)), 0, -1):
        suffix = context[-size:]
        for end in range(len(context) - 1, size - 1, -1):
            if context[end - size : end] == suffix:
                copied = list(context)
                for step in range(length):
                    copied.append(copied[end + step])
                return tuple(copied[len(context) :])
    return ()


def test_it_copies_what_followed_the_longest_suffix_last_time() -> None:
    assert draft(PromptLookup(), 1, 2, 3, 9, 2, 3, 4, 5, 6, 1, 2, 3).tokens == (9, 2, 3)


def test_without_an_earlier_occurrence_it_drafts_nothing() -> None:
    assert draft(PromptLookup(), 1, 2, 3) == Draft((), ())


def test_a_repetition_goes_on_repeating_beyond_the_end_of_the_context() -> None:
    assert draft(PromptLookup(), 7, 8, 7, 8, length=5).tokens == (7, 8, 7, 8, 7)


def test_it_is_surer_where_earlier_occurrences_agree() -> None:
    agreed = draft(PromptLookup(), 1, 2, 5, 1, 2, 5, 1, 2).confidences[0]
    divided = draft(PromptLookup(), 1, 2, 5, 1, 2, 6, 1, 2).confidences[0]
    assert agreed > divided


def test_a_draft_that_is_of_no_more_use_is_not_made() -> None:
    request = DraftRequest("s", 0, (1, 2, 1), 3)
    assert PromptLookup().draft([request], lambda _: True) == [Draft((), ())]


@given(st.lists(TOKENS, min_size=1, max_size=6), st.integers(0, 6))
def test_whatever_was_asked_before_the_draft_is_the_definitions(
    contexts: list[tuple[int, ...]], length: int
) -> None:
    engine = PromptLookup()
    for context in contexts:
        found = draft(engine, *context, length=length)
        assert found.tokens == straightforward(context, length)
        assert len(found.confidences) == len(found.tokens)
        assert all(0 < confidence <= 1 for confidence in found.confidences)


@given(TOKENS, TOKENS)
def test_the_common_prefix_is_the_longest(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    common = common_prefix(one, other)
    assert one[:common] == other[:common]
    assert common == min(len(one), len(other)) or one[common] != other[common]
