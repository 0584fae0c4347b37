"""The replayed draft head: how often it is right, whether its chances are true, what it takes from a text, and bad input."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest

from loadtest.replay_head import ACCEPTANCE, HeadOptions, head_drafts, parse_head
from services.draft_gateway.drafting.replay import draws_of
from shared.errors import InvalidRequest
from shared.lookup import common_prefix

ANSWER = tuple(range(100, 6100))
PLACES = range(1, len(ANSWER) - len(ACCEPTANCE))


def right_up_to(options: HeadOptions) -> list[float]:
    """How often a draft is right up to its 1st, 2nd, … token."""
    agreed = [
        common_prefix(tuple(token for token, _ in head_drafts(options, 3, ANSWER, said)), ANSWER[said:])
        for said in PLACES
    ]
    return [sum(each > place for each in agreed) / len(PLACES) for place in range(len(options.acceptance))]


def test_it_is_right_as_often_as_it_is_told_to_be_up_to_each_token() -> None:
    assert right_up_to(HeadOptions()) == pytest.approx(list(ACCEPTANCE), abs=0.02)
    assert right_up_to(HeadOptions((0.9, 0.3), spread=0.2)) == pytest.approx([0.9, 0.3], abs=0.02)


def test_the_chance_that_it_tells_is_the_share_that_is_right() -> None:
    told: dict[int, list[float]] = defaultdict(list)
    came: dict[int, list[bool]] = defaultdict(list)
    for said in PLACES:
        for (token, chance), truth in zip(
            head_drafts(HeadOptions(), 3, ANSWER, said), ANSWER[said:], strict=False
        ):
            told[int(10 * chance)].append(chance)
            came[int(10 * chance)].append(token == truth)
            if token != truth:
                break
    assert set(told) == set(range(10)), "chances go from none to certain"
    for step, chances in told.items():
        assert sum(came[step]) / len(chances) == pytest.approx(sum(chances) / len(chances), abs=0.06)


def test_without_spread_every_token_of_a_place_has_the_same_chance() -> None:
    drafted = [chance for _, chance in head_drafts(HeadOptions(spread=0.0), 3, ANSWER, 5)]
    assert list(itertools.accumulate(drafted, lambda a, b: a * b)) == pytest.approx(list(ACCEPTANCE))


def test_what_is_hard_for_the_replayed_draft_is_hard_for_the_head() -> None:
    of_right, of_wrong = list[bool](), list[bool]()
    for said in PLACES:
        held = of_right if draws_of(0, 3, said).random() < 0.7 else of_wrong
        held.append(head_drafts(HeadOptions(), 3, ANSWER, said)[0][0] == ANSWER[said])
    assert sum(of_right) / len(of_right) > sum(of_wrong) / len(of_wrong) + 0.3


def test_the_same_place_gets_the_same_draft_and_another_seed_another_one() -> None:
    first = [head_drafts(HeadOptions(), 3, ANSWER, said) for said in range(1, 50)]
    assert first == [head_drafts(HeadOptions(), 3, ANSWER, said) for said in range(1, 50)]
    assert first != [head_drafts(HeadOptions(seed=1), 3, ANSWER, said) for said in range(1, 50)]


def test_it_ends_with_the_answer() -> None:
    assert len(head_drafts(HeadOptions(), 3, ANSWER[:10], 8)) == 2
    assert head_drafts(HeadOptions(), 3, ANSWER[:10], 10) == ()


def test_options_are_read_from_text() -> None:
    assert parse_head("acceptance=0.5,0.25&ms_per_pass=7") == HeadOptions((0.5, 0.25), ms_per_pass=7.0)
    assert parse_head("spread=0&seed=3") == HeadOptions(spread=0.0, seed=3)
    for none in ("none", "0", ""):
        assert parse_head(none) is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("accepted=0.5", "'accepted'"),
        ("acceptance=high", "numbers"),
        ("acceptance=0.4,0.5", "acceptance"),
        ("acceptance=1.5", "acceptance"),
        ("acceptance=0.5,0", "acceptance"),
        ("spread=1", "spread"),
        ("ms_per_pass=-1", "ms_per_pass"),
    ],
)
def test_what_can_not_be_is_named(text: str, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        parse_head(text)
