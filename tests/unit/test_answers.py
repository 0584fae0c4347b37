"""A streamed answer becomes times and counts; the conversations of a file are read or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.answers import Answer, BrokenStream, lines
from loadtest.conversations import BUILT_IN, load


def read(*events: tuple[float, str]) -> Answer:
    answer = Answer()
    for now_ms, line in events:
        answer.line(line, now_ms)
    return answer


def text(content: str) -> str:
    return "data: " + json.dumps(
        {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]}
    )


FINISH = 'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}'
DONE = "data: [DONE]"


def test_tokens_that_come_together_share_the_time_since_the_event_before() -> None:
    answer = read(
        (5, "id: chat-1:0"), (5, text("")),
        (100, "id: chat-1:3"), (100, text("The sky")),
        (130, "id: chat-1:6"), (130, text(" is blue")),
        (140, "id: chat-1:7"), (140, text(".")),
        (141, "id: chat-1:7:finish"), (141, FINISH), (141, DONE),
    )  # fmt: skip
    answer.check()
    assert answer.first_ms == 100
    assert answer.between_ms == [10, 10, 10, 10]
    assert (answer.text, answer.tokens, answer.finish_reason) == ("The sky is blue.", 7, "stop")


def test_without_ids_an_event_counts_as_a_token() -> None:
    answer = read((10, text("a")), (30, text("b")), (31, FINISH), (31, DONE))
    assert answer.between_ms == [20]
    assert answer.tokens == 2


def test_usage_tells_what_speculation_did() -> None:
    usage = {
        "completion_tokens": 9,
        "outrider": {"rounds": 3, "accepted": 6, "session": "x", "tokens_per_round": 3.0},
    }
    answer = read((1, "data: " + json.dumps({"choices": [], "usage": usage})))
    assert answer.speculation() == {"rounds": 3, "accepted": 6}
    assert Answer().speculation() == {}


@pytest.mark.parametrize(
    "events", [[], [(1, text("a"))], [(1, text("a")), (2, FINISH)], [(1, text("a")), (2, DONE)]]
)
def test_an_answer_that_breaks_off_is_none(events: list[tuple[float, str]]) -> None:
    with pytest.raises(BrokenStream, match="broke off"):
        read(*events).check()


def test_an_error_in_the_stream_is_raised_with_its_message() -> None:
    with pytest.raises(BrokenStream, match="the verifier is gone"):
        read((1, 'data: {"error": {"message": "the verifier is gone"}}'))


@pytest.mark.parametrize("data", ["nonsense", "[1]"])
def test_what_is_no_chunk_is_refused(data: str) -> None:
    with pytest.raises(BrokenStream, match="not a chunk"):
        read((1, f"data: {data}"))


def test_lines_come_whole_however_the_body_is_cut() -> None:
    body = "id: a:1\r\ndata: é\n\n".encode()
    for cut in range(len(body)):
        assert list(lines(iter([body[:cut], body[cut:]]))) == ["id: a:1", "data: é", ""]


def test_conversations_come_from_a_file_and_are_cut_to_a_length(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["Hello!", "Bye!"], "category": "x"}\n\n{"turns": ["abcdef"]}\n')
    assert load(path, longest=5) == [("Hello", "Bye!"), ("abcde",)]
    assert load(None) is BUILT_IN


@pytest.mark.parametrize(
    "line", ["Hello", '"Hello"', "{}", '{"turns": []}', '{"turns": "Hello"}', '{"turns": [""]}']
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["Hello!"]}\n' + line)
    with pytest.raises(ValueError, match="line 2"):
        load(path)


def test_a_file_without_a_conversation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no conversation"):
        load(path)
