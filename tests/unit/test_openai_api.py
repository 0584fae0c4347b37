"""Requests: what is taken, what is refused and how; answers: their shapes, against OpenAI's own client types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.draft_gateway.openai_api import (
    Api,
    GenerationRequest,
    OutriderOptions,
    Piece,
    ResponseForm,
    check_model,
    model_card,
    parse_chat,
    parse_completion,
    usage,
)
from shared.errors import InvalidRequest, ModelNotFound, OutriderError, UnsupportedParameter
from shared.protocol import FinishReason

USER = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> GenerationRequest:
    return parse_chat(json.dumps({"model": "m", "messages": USER} | fields).encode())


def completion(**fields: Any) -> GenerationRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hello"} | fields).encode())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "m",}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"model": NaN}', "not valid JSON"),
        (b'{"messages": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"seed": 1' + b"0" * 9000 + b"}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes, says: str) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(InvalidRequest, match=says) as caught:
            parse(body)
        assert (caught.value.status, caught.value.code) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [*USER, {"role": "user", "content": [{"type": "text"}]}]}, "messages[1].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"outrider": {"block_length": -1}}, "outrider.block_length"),
        ({"outrider": {"draft": "fast"}}, "outrider.draft"),
        ({"outrider": {"hints": "on"}}, "outrider.hints"),
        ({"outrider": {"unknown": 1}}, "outrider.unknown"),
        ({"outrider": True}, "outrider"),
    ],
)
def test_a_wrong_chat_parameter_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.as_openai()["error"]["type"] == "invalid_request_error"
    assert param in caught.value.message


@pytest.mark.parametrize(
    "prompt",
    [None, 5, [], [[]], ["a", "b"], [[1], [2]], [1, "a"], [-1], [1.5], [True], {"text": "a"}, [1 << 31]],
)
def test_a_prompt_that_is_not_one_text_or_one_list_of_tokens_is_refused(prompt: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.7),
        ("temperature", 1),
        ("temperature", "0"),
        ("temperature", True),
        ("top_p", 0.9),
        ("top_k", 5),
        ("min_p", 0.1),
        ("n", 2),
        ("best_of", 2),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": 1}),
        ("logprobs", True),
        ("logprobs", 0),
        ("top_logprobs", 3),
        ("stop", "\n"),
        ("stop", ["a"]),
        ("min_tokens", 1),
        ("echo", True),
        ("suffix", "end"),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("audio", {}),
        ("prediction", {}),
        ("store", True),
        ("use_beam_search", True),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("return_token_ids", True),
    ],
)
def test_a_parameter_that_is_not_served_is_refused_by_name(name: str, value: object) -> None:
    for ask in (chat, completion):
        with pytest.raises(UnsupportedParameter) as caught:
            ask(**{name: value})
        assert (caught.value.status, caught.value.code, caught.value.param) == (
            400,
            "unsupported_parameter",
            name,
        )
        assert "served" in caught.value.message or name in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": None},
        {"top_p": 1},
        {"n": 1, "best_of": 1},
        {"presence_penalty": 0.0, "frequency_penalty": 0},
        {"logit_bias": {}, "logprobs": False, "top_logprobs": 0},
        {"stop": None},
        {"stop": []},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"echo": False, "suffix": None},
        {"seed": 7, "user": "someone", "metadata": {"a": "b"}, "store": False},
        {"min_tokens": 0},
        {"a_field_of_tomorrow": {"x": 1}},
        {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}},
        {
            "outrider": {
                "trace": True,
                "block_length": 0,
                "hints": False,
                "draft": "none",
                "return_token_ids": True,
            }
        },
    ],
)
def test_what_changes_nothing_is_taken(fields: dict[str, Any]) -> None:
    chat(**fields)
    completion(**fields)


def test_content_may_be_a_list_of_text_parts_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    request = chat(
        messages=[{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    )
    assert request.messages == (
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello there"},
    )


@pytest.mark.parametrize(
    ("prompt", "text", "tokens"),
    [
        ("Hi", "Hi", None),
        (["Hi"], "Hi", None),
        ([1, 2], None, (1, 2)),
        ([[1, 2]], None, (1, 2)),
        ("", "", None),
    ],
)
def test_a_prompt_may_be_text_or_tokens(
    prompt: object, text: str | None, tokens: tuple[int, ...] | None
) -> None:
    request = completion(prompt=prompt)
    assert (request.text, request.tokens) == (text, tokens)


def test_either_name_of_the_token_limit_is_served() -> None:
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_completion_tokens=6).max_tokens == 6
    assert chat(max_tokens=5, max_completion_tokens=5).max_tokens == 5
    assert chat().max_tokens is None


def test_only_the_served_model_exists() -> None:
    check_model("m", "m")
    with pytest.raises(ModelNotFound) as caught:
        check_model("gpt-9", "m")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_a_long_wrong_value_is_not_repeated_in_full() -> None:
    with pytest.raises(OutriderError) as caught:
        chat(stop="x" * 10_000)
    assert len(caught.value.message) < 300


# --- answers ----------------------------------------------------------------------------------------------------


def form(api: Api, **fields: Any) -> ResponseForm:
    return ResponseForm(api=api, session=f"{api.id_prefix}1", created=5, model="m", **fields)


def test_the_form_of_an_answer_survives_as_metadata() -> None:
    options = OutriderOptions(trace=True, block_length=3, hints=False)
    known = form(Api.CHAT, include_usage=True, fingerprint="f", options=options)
    assert ResponseForm.from_metadata("chatcmpl-1", known.to_metadata()) == known
    with pytest.raises(InvalidRequest, match="not opened by this API"):
        ResponseForm.from_metadata("s", {})


def test_a_chat_is_what_openai_calls_one() -> None:
    total = usage(3, 2, {"session": "chatcmpl-1"})
    answer = form(Api.CHAT).whole("Hi", (1, 2), FinishReason.STOP, total)
    parsed = ChatCompletion.model_validate(answer, strict=True)
    assert parsed.choices[0].message.content == "Hi"
    assert parsed.usage is not None and parsed.usage.total_tokens == 5
    assert "token_ids" not in answer["choices"][0]


def test_a_completion_is_what_openai_calls_one() -> None:
    asked = form(Api.COMPLETION, options=OutriderOptions(return_token_ids=True))
    answer = asked.whole("Hi", (1, 2), FinishReason.LENGTH, usage(3, 2, {}))
    parsed = Completion.model_validate(answer, strict=True)
    assert (parsed.object, parsed.choices[0].text, parsed.choices[0].finish_reason) == (
        "text_completion",
        "Hi",
        "length",
    )
    assert answer["choices"][0]["token_ids"] == [1, 2]


def test_chat_chunks_are_what_openai_calls_chunks() -> None:
    asked = form(Api.CHAT, include_usage=True, options=OutriderOptions(trace=True))
    piece = Piece("Hi", (1,), (("Hi", "accepted"),), 4)
    chunks = [
        asked.role_chunk(),
        asked.text_chunk(piece),
        asked.finish_chunk(FinishReason.STOP, "!"),
        asked.usage_chunk(usage(1, 1, {})),
    ]
    role, text, finish, total = (ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks)
    assert (role.choices[0].delta.role, text.choices[0].delta.content) == ("assistant", "Hi")
    assert (finish.choices[0].finish_reason, finish.choices[0].delta.content) == ("stop", "!")
    assert (total.choices, total.usage is not None) == ([], True)
    assert chunks[1] is not None
    assert chunks[1]["usage"] is None
    assert chunks[1]["outrider"] == {"tokens": [{"text": "Hi", "source": "accepted"}], "round": 4}


def test_completion_chunks_have_no_role_and_no_usage_unless_asked_for() -> None:
    asked = form(Api.COMPLETION)
    assert asked.role_chunk() is None
    chunk = asked.text_chunk(Piece("Hi", (1,), (), 0))
    assert (chunk["object"], chunk["choices"]) == (
        "text_completion",
        [{"index": 0, "text": "Hi", "logprobs": None, "finish_reason": None}],
    )
    assert "usage" not in chunk and "outrider" not in chunk


def test_a_model_card_has_openais_fields() -> None:
    card = model_card("m", created=5, max_model_len=9)
    assert (card["id"], card["object"], card["created"], card["owned_by"]) == ("m", "model", 5, "outrider")
