"""The replayed draft: what it reads, how often it errs, what it says of itself, what it takes, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.draft_gateway.drafting.engine import DraftRequest
from services.draft_gateway.drafting.loading import load_draft_engine
from services.draft_gateway.drafting.replay import (
    ReplayDraft,
    Replayed,
    ReplayOptions,
    parse_replay,
    read_answers,
)
from services.draft_gateway.settings import GatewaySettings
from shared.errors import OutriderError
from shared.protocol import Tokens

PROMPT: Tokens = (1, 2, 3)
ANSWER: Tokens = tuple(range(100, 1100))


def request(said: Tokens, length: int, *, lane: int = 0, beyond: bool = False) -> DraftRequest:
    return DraftRequest("a", lane, (*PROMPT, *said), length, beyond)


def engine(options: ReplayOptions, slept: list[float] | None = None) -> ReplayDraft:
    steps = [] if slept is None else slept
    return ReplayDraft([Replayed(PROMPT, ANSWER)], options, sleep=steps.append)


@pytest.mark.parametrize(("acceptance", "right"), [(1.0, 5), (0.0, 0)])
def test_a_draft_that_never_or_always_errs(acceptance: float, right: int) -> None:
    (draft,) = engine(ReplayOptions(acceptance)).draft([request(ANSWER[:7], 5)])
    assert len(draft.tokens) == 5
    assert sum(a == b for a, b in zip(draft.tokens, ANSWER[7:12], strict=True)) == right


def test_it_errs_as_often_as_it_is_told_to_and_its_confidence_says_so() -> None:
    replay = engine(ReplayOptions(0.7))
    right = near = wrong = 0
    for at in range(len(ANSWER)):
        (draft,) = replay.draft([request(ANSWER[:at], 1)])
        assert draft.confidences == (0.7,)
        truth = ANSWER[at]
        ((first, _), (second, _)) = draft.alternatives[0]
        assert first == draft.tokens[0] != second
        right += first == truth
        wrong += first != truth
        near += first != truth and second == truth
    assert right / len(ANSWER) == pytest.approx(0.7, abs=0.05)
    assert near / wrong == pytest.approx(0.5, abs=0.1)


def test_behind_a_wrong_token_it_has_left_the_answer_until_it_says_its_token_again() -> None:
    for recovers, expected in ((0.0, 0.0), (0.2, 0.2), (1.0, 0.7)):
        replay = engine(ReplayOptions(0.7, recovers=recovers))
        behind = [
            draft.tokens[1] == ANSWER[at + 1]
            for at in range(len(ANSWER) - 2)
            for draft in replay.draft([request(ANSWER[:at], 2)])
            if draft.tokens[0] != ANSWER[at]
        ]
        assert sum(behind) / len(behind) == pytest.approx(expected, abs=0.07)
        (lane,) = replay.draft([request((*ANSWER[:7], ANSWER[7] ^ 1), 900)])
        right = [token == truth for token, truth in zip(lane.tokens, ANSWER[8:], strict=False)]
        first = right.index(True) if recovers else len(right)
        assert not any(right[:first])


def test_a_position_is_right_or_wrong_in_every_lane_alike() -> None:
    replay = engine(ReplayOptions(0.5))
    (whole,) = replay.draft([request((), 8)])
    (later,) = replay.draft([request(ANSWER[:3], 5)])
    assert whole.tokens[3:] == later.tokens


def test_it_drafts_no_further_than_the_answer_and_nothing_for_an_unknown_prompt() -> None:
    replay = engine(ReplayOptions(1.0))
    (draft,) = replay.draft([request(ANSWER[:-2], 5)])
    assert draft.tokens == ANSWER[-2:]
    (unknown,) = replay.draft([DraftRequest("b", 0, (9, 9), 5)])
    assert unknown.tokens == ()


def test_beyond_names_what_may_follow_the_last_token() -> None:
    (draft,) = engine(ReplayOptions(1.0)).draft([request((), 2, beyond=True)])
    assert len(draft.tokens) == len(draft.confidences) == 2
    assert draft.alternatives[2][0][0] == ANSWER[2]


def test_lanes_share_the_steps_of_a_batch() -> None:
    slept: list[float] = []
    replay = engine(ReplayOptions(1.0, ms_per_token=75, lane_cost=0.1), slept)
    replay.draft([request((), 4), request(ANSWER[:5], 2, lane=1, beyond=True)])
    assert slept == pytest.approx([0.0825, 0.0825, 0.0825, 0.075])


def test_a_dropped_lane_takes_no_more_steps() -> None:
    slept: list[float] = []
    replay = engine(ReplayOptions(1.0, ms_per_token=10), slept)
    (draft,) = replay.draft([request((), 5)], lambda request: len(slept) == 2)
    assert len(slept) == 2
    assert draft.tokens == ANSWER[:2]


def test_the_setting_names_file_and_options(tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({"answers": [{"prompt": PROMPT, "tokens": ANSWER}]}))
    setting = f"replay:{file}?acceptance=0.6&ms_per_token=75&seed=4"
    assert parse_replay(setting) == (file, ReplayOptions(0.6, ms_per_token=75.0, seed=4))
    assert read_answers(file) == (Replayed(PROMPT, ANSWER),)
    loaded = load_draft_engine(GatewaySettings(draft=setting))
    assert "synthetic" in loaded.notes[0]
    assert not loaded.engine.immediate


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("speed=3", "speed"),
        ("acceptance=much", "acceptance"),
        ("acceptance=2", "0 and 1"),
        ("seed=-1", "seed"),
    ],
)
def test_options_that_are_wrong_are_named(query: str, named: str) -> None:
    with pytest.raises(OutriderError, match=named):
        parse_replay(f"replay:file?{query}")


@pytest.mark.parametrize("text", ["", "{}", '{"answers": [{"prompt": [1]}]}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "answers.json"
    file.write_text(text)
    with pytest.raises(OutriderError, match=r"answers\.json"):
        read_answers(file)
    with pytest.raises(OutriderError, match="can't be read"):
        read_answers(tmp_path / "none.json")
