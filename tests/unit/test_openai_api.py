"""Requests: what is taken, what is refused and how; answers: their shapes, against OpenAI's own client types."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.draft_gateway.openai_api import (
    Api,
    GenerationRequest,
    Likelihood,
    OutriderOptions,
    Piece,
    ResponseForm,
    Told,
    check_model,
    choice_session,
    model_card,
    parse_chat,
    parse_completion,
    usage,
)
from shared.errors import InvalidRequest, ModelNotFound, OutriderError, UnsupportedParameter
from shared.protocol import FinishReason, Sampling, SamplingMode

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
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 1 << 63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strin"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"outrider": {"sampling": "magic"}}, "outrider.sampling"),
    ],
)
def test_a_wrong_way_of_sampling_or_ending_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    for ask in (chat, completion):
        with pytest.raises(InvalidRequest) as caught:
            ask(**fields)
        assert (caught.value.status, caught.value.param) == (400, param)
        assert param in caught.value.message


@pytest.mark.parametrize(
    ("ask", "fields", "param"),
    [
        (chat, {"logprobs": 1}, "logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (chat, {"top_logprobs": 1}, "top_logprobs"),
        (chat, {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        (chat, {"echo": True}, "echo"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"logprobs": 1, "echo": True}, "logprobs"),
        (completion, {"top_logprobs": 1}, "top_logprobs"),
        (completion, {"echo": "yes"}, "echo"),
    ],
)
def test_what_one_api_has_and_the_other_has_not_is_refused_there(
    ask: Callable[..., GenerationRequest], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("use_beam_search", True),
        ("length_penalty", 1.5),
        ("prompt_logprobs", 1),
        ("allowed_token_ids", [1]),
        ("bad_words", ["x"]),
        ("suffix", "end"),
        ("tools", [{"type": "function"}]),
        ("tools", []),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("structured_outputs", {"regex": "a"}),
        ("modalities", ["audio"]),
        ("audio", {}),
        ("prediction", {}),
        ("store", True),
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
        {"n": 1, "best_of": 1},
        {"stop": None},
        {"stop": []},
        {"tools": None, "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"echo": False, "suffix": None},
        {"top_logprobs": 0, "logprobs": None},
        {"seed": 7, "user": "someone", "metadata": {"a": "b"}, "store": False},
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
    for ask in (chat, completion):
        plain, asked = ask(), ask(**fields)
        assert (asked.sampling, asked.stop, asked.n, asked.logprobs, asked.json_schema) == (
            plain.sampling,
            plain.stop,
            plain.n,
            plain.logprobs,
            plain.json_schema,
        )


def test_every_way_of_sampling_is_taken_over() -> None:
    for ask in (chat, completion):
        request = ask(
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            min_p=0.05,
            seed=-5,
            n=3,
            presence_penalty=0.5,
            frequency_penalty=-1,
            repetition_penalty=1.1,
            logit_bias={"7": 1000, "5": -2.5},
            min_tokens=2,
            stop="end",
            include_stop_str_in_output=True,
            outrider={"sampling": "ratio"},
        )
        assert request.sampling == Sampling(
            top_p=0.9,
            top_k=40,
            min_p=0.05,
            presence_penalty=0.5,
            frequency_penalty=-1.0,
            repetition_penalty=1.1,
            logit_bias=((5, -2.5), (7, 100.0)),
            min_tokens=2,
            mode=SamplingMode.RATIO,
        )
        assert (request.temperature, request.seed, request.n) == (0.7, -5, 3)
        assert (request.stop, request.include_stop) == (("end",), True)


@pytest.mark.parametrize("top_k", [0, -1, None])
def test_no_top_k_keeps_every_token(top_k: int | None) -> None:
    assert chat(top_k=top_k).sampling.top_k == 0


def test_a_temperature_and_a_seed_that_are_left_out_are_the_gateways_to_choose() -> None:
    for fields in ({}, {"temperature": None, "seed": None}):
        request = chat(**fields)
        assert (request.temperature, request.seed) == (None, None)


def test_log_probabilities_are_asked_for_as_each_api_does() -> None:
    assert [chat(**fields).logprobs for fields in ({}, {"logprobs": False}, {"logprobs": True})] == [
        None,
        None,
        0,
    ]
    assert chat(logprobs=True, top_logprobs=20).logprobs == 20
    assert [completion(logprobs=count).logprobs for count in (None, 0, 5)] == [None, 0, 5]


def test_a_schema_goes_on_as_json() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert json.loads(chat(response_format=asked).json_schema) == schema
    assert chat(response_format={"type": "json_object"}).json_schema == "{}"
    assert chat().json_schema == ""


def test_content_may_be_a_list_of_text_parts_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    request = chat(
        messages=[{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    )
    assert request.messages == (
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello\nthere"},
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
        chat(audio="x" * 10_000)
    assert len(caught.value.message) < 300


# --- answers ----------------------------------------------------------------------------------------------------


def form(api: Api, **fields: Any) -> ResponseForm:
    return ResponseForm(api=api, session=f"{api.id_prefix}1", created=5, model="m", **fields)


def test_the_form_of_an_answer_survives_as_metadata() -> None:
    options = OutriderOptions(trace=True, block_length=3, hints=False)
    known = form(
        Api.CHAT,
        include_usage=True,
        fingerprint="f",
        options=options,
        response="chatcmpl-0",
        index=1,
        echo=True,
        include_stop=True,
    )
    assert ResponseForm.from_metadata("chatcmpl-1", known.to_metadata()) == known
    with pytest.raises(InvalidRequest, match="not opened by this API"):
        ResponseForm.from_metadata("s", {})


TOLD = (Told(Likelihood("Hi", b"Hi", -0.5), (Likelihood("\ufffd", b"\xe2", -float("inf")),), 0),)


def test_a_chat_is_what_openai_calls_one() -> None:
    total = usage(3, 2, {"session": "chatcmpl-1"})
    first, second = form(Api.CHAT), form(Api.CHAT, index=1)
    choices = [
        first.choice(Piece("Hi", (1, 2)), FinishReason.STOP),
        second.choice(Piece("Hi", (1, 2), told=TOLD), FinishReason.STOP, "\n"),
    ]
    answer = first.whole(choices, total)
    parsed = ChatCompletion.model_validate(answer, strict=True)
    assert [choice.index for choice in parsed.choices] == [0, 1]
    assert parsed.choices[0].message.content == "Hi"
    assert parsed.usage is not None and parsed.usage.total_tokens == 5
    assert "token_ids" not in answer["choices"][0]
    assert [choice["stop_reason"] for choice in answer["choices"]] == [None, "\n"]
    assert parsed.choices[0].logprobs is None
    told = parsed.choices[1].logprobs
    assert told is not None and told.content is not None
    assert (told.content[0].token, told.content[0].bytes, told.content[0].logprob) == ("Hi", [72, 105], -0.5)
    top = told.content[0].top_logprobs[0]
    assert (top.bytes, top.logprob) == ([0xE2], -9999.0)


def test_a_completion_is_what_openai_calls_one() -> None:
    asked = form(Api.COMPLETION, options=OutriderOptions(return_token_ids=True))
    choice = asked.choice(Piece("Hi", (1, 2), told=TOLD), FinishReason.LENGTH)
    parsed = Completion.model_validate(asked.whole([choice], usage(3, 2, {})), strict=True)
    assert (parsed.object, parsed.choices[0].text, parsed.choices[0].finish_reason) == (
        "text_completion",
        "Hi",
        "length",
    )
    assert choice["token_ids"] == [1, 2]
    told = parsed.choices[0].logprobs
    assert told is not None
    assert (told.tokens, told.token_logprobs, told.text_offset) == (["Hi"], [-0.5], [0])
    assert told.top_logprobs == [{"Hi": -0.5, "\ufffd": -9999.0}]


def test_chat_chunks_are_what_openai_calls_chunks() -> None:
    asked = form(Api.CHAT, include_usage=True, options=OutriderOptions(trace=True), index=2)
    piece = Piece("Hi", (1,), (("Hi", "accepted"),), 4, TOLD)
    chunks = [
        asked.role_chunk(),
        asked.text_chunk(piece),
        asked.finish_chunk(FinishReason.STOP, "!", 7),
        asked.usage_chunk(usage(1, 1, {})),
    ]
    role, text, finish, total = (ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks)
    assert (role.choices[0].delta.role, text.choices[0].delta.content) == ("assistant", "Hi")
    assert [chunk.choices[0].index for chunk in (role, text, finish)] == [2, 2, 2]
    assert text.choices[0].logprobs is not None
    assert (finish.choices[0].finish_reason, finish.choices[0].delta.content) == ("stop", "!")
    assert (total.choices, total.usage is not None) == ([], True)
    assert chunks[1] is not None and chunks[2] is not None
    assert chunks[1]["usage"] is None
    assert chunks[1]["outrider"] == {"tokens": [{"text": "Hi", "source": "accepted"}], "round": 4}
    assert chunks[2]["choices"][0]["stop_reason"] == 7


def test_completion_chunks_have_no_role_and_no_usage_unless_asked_for() -> None:
    asked = form(Api.COMPLETION)
    assert asked.role_chunk() is None
    chunk = asked.text_chunk(Piece("Hi", (1,), (), 0))
    assert (chunk["object"], chunk["choices"]) == (
        "text_completion",
        [{"index": 0, "text": "Hi", "logprobs": None, "finish_reason": None}],
    )
    assert "usage" not in chunk and "outrider" not in chunk


def test_each_choice_is_a_session_of_its_own_under_the_id_of_the_response() -> None:
    request = chat(n=3)
    forms = [ResponseForm.of(request, "chatcmpl-9", index) for index in range(3)]
    assert [each.session for each in forms] == ["chatcmpl-9", "chatcmpl-9-1", "chatcmpl-9-2"]
    assert [choice_session("chatcmpl-9", index) for index in range(3)] == [each.session for each in forms]
    assert {each.text_chunk(Piece("x", (1,)))["id"] for each in forms} == {"chatcmpl-9"}


def test_a_model_card_has_openais_fields() -> None:
    card = model_card("m", created=5, max_model_len=9)
    assert (card["id"], card["object"], card["created"], card["owned_by"]) == ("m", "model", 5, "outrider")
