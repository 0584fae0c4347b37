"""Where an answer ends: at the character and the token at which vLLM ends one that grows by a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.draft_gateway.answer_text import AnswerText, Ending
from shared.protocol import FinishReason
from shared.text import StopStrings


class Pieces:
    """A decoder whose token n stands for the n-th of some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def push(self, tokens: Sequence[int]) -> str:
        return "".join(self._texts[token] for token in tokens)

    def flush(self) -> str:
        return ""


def as_vllm_does(
    texts: Sequence[str], strings: Sequence[str], *, included: bool, min_tokens: int
) -> tuple[str, int, str | None]:
    """Text, tokens and stop string of an answer, by the rule as vLLM's documentation and tests state it."""
    text = ""
    for count, piece in enumerate(texts, 1):
        before, text = len(text), text + piece
        if count <= min_tokens:
            continue
        ends = []
        for order, string in enumerate(strings):
            start = text.find(string)
            while start >= 0:
                if start + len(string) > before:
                    ends.append((start + len(string), order, start, string))
                    break
                start = text.find(string, start + 1)
        if ends:
            end, _, start, string = min(ends)
            return text[: end if included else start], count, string
    return text, len(texts), None


alphabet = st.text("ab☃", max_size=4)


@settings(max_examples=500, deadline=None)
@given(
    texts=st.lists(alphabet, min_size=1, max_size=12),
    strings=st.lists(st.text("ab☃", min_size=1, max_size=5), max_size=4),
    included=st.booleans(),
    min_tokens=st.integers(0, 5),
)
def test_an_answer_ends_where_vllm_ends_it_and_shows_no_part_of_a_stop_string(
    texts: list[str], strings: list[str], included: bool, min_tokens: int
) -> None:
    text, count, stop = as_vllm_does(texts, strings, included=included, min_tokens=min_tokens)
    answer = AnswerText(Pieces(texts), Ending(tuple(strings), included, min_tokens))
    shown, used = "", 0
    for token in range(len(texts)):
        shown += answer.push(token)
        used += 1
        assert text.startswith(shown)
        if answer.stop is not None:
            break
    assert (shown + answer.flush(), used, answer.stop) == (text, count, stop)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(alphabet, min_size=1, max_size=12),
    strings=st.lists(st.text("ab☃", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 12), max_size=5),
)
def test_blocks_do_not_change_where_an_answer_ends(
    texts: list[str], strings: list[str], cuts: list[int]
) -> None:
    _, count, stop = as_vllm_does(texts, strings, included=False, min_tokens=0)
    answer = AnswerText(Pieces(texts), Ending(tuple(strings)))
    edges = sorted({0, len(texts), *(cut for cut in cuts if cut < len(texts))})
    for low, high in pairwise(edges):
        ends = answer.ends_within(tuple(range(low, high)), None)
        if ends is not None:
            assert (low + ends, answer.stop) == (count, stop)
            return
    assert stop is None


def test_a_token_that_ends_the_sequence_is_not_shown_and_ends_no_stop_string() -> None:
    texts = ["one", " two", "."]
    answer = AnswerText(Pieces(texts), Ending((" two.",)))
    assert answer.ends_within((0, 1, 2), FinishReason.STOP) is None
    assert answer.flush() == " two"
    shown = AnswerText(Pieces(texts), Ending((" two.",), included=True))
    assert shown.ends_within((0, 1, 2), FinishReason.STOP) == 3


@pytest.mark.parametrize(
    ("pieces", "shown", "rest"),
    [
        (["xa", "b", "x"], ["x", "", "abx"], ""),
        (["ab", "ab", "ad"], ["", "", "ababad"], ""),
        (["xab", "aba"], ["x", "ab"], "aba"),
        (["no", "thing"], ["no", "thing"], ""),
    ],
)
def test_what_may_be_a_beginning_is_held_back_and_no_more(
    pieces: list[str], shown: list[str], rest: str
) -> None:
    stops = StopStrings(["ababc", "abc"])
    assert [stops.push(piece) for piece in pieces] == shown
    assert stops.flush() == rest


def test_the_string_that_is_complete_first_ends_the_text() -> None:
    stops = StopStrings(["bcd", "cd", "bc"])
    assert (stops.push("abcd"), stops.found) == ("a", "bc")
    tied = StopStrings(["bcd", "cd"])
    assert (tied.push("abcd"), tied.found) == ("a", "bcd")
    assert (tied.push("more"), tied.flush()) == ("", "")


def test_a_text_without_stop_strings_goes_through_as_it_is() -> None:
    stops = StopStrings([])
    assert [stops.push("ab"), stops.push(""), stops.flush()] == ["ab", "", ""]
