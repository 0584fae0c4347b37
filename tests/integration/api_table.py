"""Requests that vLLM's own server and ours answer alike, good ones and bad ones; and the few that differ, with the reason.

`test_stock_api.py` sends each to both. What is compared: the status, and of answers each choice's text, finish reason and
stop reason, and the tokens counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MODEL = "target"
CONTEXT = 512
END = 2  # <|im_end|>
VOCABULARY = 49152

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Row:
    """One request. `why` is set where the two differ, and then `theirs` and `ours` are the statuses.

    `body` may be bytes, as they are.
    """

    path: str
    body: dict[str, Any] | bytes | list[Any]
    why: str = ""
    ours: int = 0
    theirs: int = 0
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})

    def __str__(self) -> str:
        """What tells it from the others."""
        body = (
            self.body
            if isinstance(self.body, bytes | list)
            else {name: value for name, value in self.body.items() if name != "model"}
        )
        return f"{self.method} {self.path.removeprefix('/v1/')} {body!r:.150}"


def text(prompt: Any = "The river runs through", **fields: Any) -> Row:
    """A completion, of 20 tokens unless said otherwise."""
    return Row(TEXT, {"model": MODEL, "prompt": prompt, "max_tokens": 20, **fields})


def chat(content: Any = "Name three colours.", **fields: Any) -> Row:
    """A chat, answered with 20 tokens unless said otherwise."""
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    return Row(CHAT, {"model": MODEL, "messages": messages, "max_tokens": 20, **fields})


def differs(row: Row, why: str, *, ours: int, theirs: int) -> Row:
    """The row, where the two are right to differ."""
    return Row(row.path, row.body, why, ours, theirs, row.method, row.headers)


ENDS = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
"""A prompt whose answer ends by itself, after 13 tokens."""
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


def schema(schema: Any, **fields: Any) -> dict[str, Any]:
    """A response format."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


GOOD = [
    text(),
    text([504, 8405, 3, 1194]),
    text([[504, 8405, 3, 1194]]),
    text(["Once upon a time"]),
    text("def add(a, b):\n", max_tokens=40),
    text("😀 emoji, naïve café ☃:", max_tokens=40),
    text(max_tokens=1),
    text(ENDS, max_tokens=60),
    text(temperature=0, top_p=0.5, top_k=3, min_p=0.2, seed=7),
    text(temperature=None, top_p=None, seed=None, stop=None, logprobs=None, max_tokens=10),
    text(seed=-(1 << 63), top_k=-1, n=1, user="someone", a_field_of_tomorrow=1),
    # where answers end
    text(stop="the"),
    text(stop=["nowhere to be found"]),
    text("1 2 3 4 5 6 7", stop=["11 1", "10 11 12"]),
    text("1 2 3 4 5 6 7", stop="9 10 1", max_tokens=30),
    text("1 2 3 4 5 6 7", stop="9 10 1", include_stop_str_in_output=True, max_tokens=30),
    text("1 2 3 4 5 6 7", stop=" "),
    text("1 2 3 4 5 6 7", stop=" ", min_tokens=5),
    text("1 2 3 4 5 6 7", stop=["0 1", " 1"], min_tokens=4, include_stop_str_in_output=True),
    text("1 2 3 4 5 6 7", stop=" 11", max_tokens=30, **USAGE),
    text("1 2 3 4 5 6 7", stop_token_ids=[33]),
    text("1 2 3 4 5 6 7", stop_token_ids=[33], include_stop_str_in_output=True),
    text("1 2 3 4 5 6 7", stop_token_ids=[33], min_tokens=15),
    text("1 2 3 4 5 6 7", stop_token_ids=[33], stop=["8 9 10"]),
    text(ENDS, stop_token_ids=[END], max_tokens=60),
    text(ENDS, ignore_eos=True, max_tokens=30),
    text(ENDS, ignore_eos=True, stop_token_ids=[END], max_tokens=30),
    text(ENDS, min_tokens=20, max_tokens=30),
    text(ENDS, stop="?", include_stop_str_in_output=True, max_tokens=60),
    text(ENDS, stop=["request?", "quest"], max_tokens=60, **USAGE),
    chat("What is two and two?", max_completion_tokens=30, max_tokens=None),
    # how tokens are chosen
    text(logit_bias={"253": -100}),
    text(logit_bias={"260": 100}, max_tokens=6),
    text(logit_bias={"260": 3.5, "28": -2}),
    text(logit_bias={}),
    text(presence_penalty=1.5, max_tokens=40),
    text(frequency_penalty=1.2, max_tokens=40),
    text(repetition_penalty=1.3, max_tokens=40),
    text(repetition_penalty=0.8, frequency_penalty=-0.5, presence_penalty=0.3, max_tokens=30),
    text("and and and and", presence_penalty=2, logit_bias={"284": -5}, min_tokens=8, max_tokens=30),
    chat(frequency_penalty=0.7, stop=["\n\n"], max_tokens=40),
    chat("Tell me about Rome.", repetition_penalty=1.2, logit_bias={"28": -50}, max_tokens=40),
    # chats
    chat(),
    chat([{"type": "text", "text": "Name three "}, {"type": "text", "text": "colours."}]),
    chat(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why is the sky blue?"},
        ]
    ),
    chat(
        messages=[
            {"role": "user", "content": "I am Ann."},
            {"role": "assistant", "content": "Hello Ann."},
            {"role": "user", "content": "Who am I?", "name": "ann"},
        ]
    ),
    chat(stream=True),
    chat("List the numbers from 1 to 20.", stop=["5,", "6\n7", "5\n"], max_tokens=60, **USAGE),
    chat(logprobs=True, top_logprobs=2),
    chat(logprobs=True, max_tokens=5, **USAGE),
    text(logprobs=3),
    text(logprobs=0, max_tokens=5, **USAGE),
    # the rest
    text(echo=True),
    text([504, 8405, 3, 1194], echo=True, stop="the"),
    text(echo=True, **USAGE),
    text(response_format={"type": "text"}),
    chat("Describe a city as JSON.", response_format=schema(SCHEMA), max_tokens=60),
    text("A city as JSON:", response_format=schema(SCHEMA, strict=True), max_tokens=60, **USAGE),
]

BAD = [
    Row(CHAT, b"{"),
    Row(TEXT, b""),
    Row(TEXT, [1]),
    Row(CHAT, {"model": MODEL}),
    Row(TEXT, {"model": MODEL}),
    Row("/v1/nothing", b"", method="GET"),
    Row(CHAT, b"", method="GET"),
    chat(model="gpt-9"),
    text(model="gpt-9"),
    chat(messages="Hello"),
    chat(messages=[{"content": "no role"}]),
    chat(messages=[{"role": "user", "content": 5}]),
    text(5),
    text(""),
    text([]),
    text([1, "a"]),
    text([-1]),
    text([VOCABULARY]),
    text("word " * 600),
    text(max_tokens=600),
    chat("word " * 600),
    text(max_tokens=0),
    text(max_tokens=-1),
    text(max_tokens="many"),
    chat(max_completion_tokens=0),
    text(min_tokens=-1),
    text(min_tokens=21),
    text(temperature=-0.5),
    text(temperature=2.5),
    text(temperature="hot"),
    text(top_p=0),
    text(top_p=1.5),
    chat(top_k=-2),
    text(top_k="few"),
    text(min_p=1.5),
    text(seed=1.5),
    text(seed=1 << 63),
    text(n=0),
    text(n=2),
    chat(n="two"),
    text(presence_penalty=2.5),
    text(frequency_penalty=-2.5),
    text(repetition_penalty=0),
    text(repetition_penalty=-1),
    text(logit_bias={"a": 1}),
    text(logit_bias={str(VOCABULARY): 1}),
    text(logit_bias={"-1": 1}),
    text(logit_bias={"5": "much"}),
    text(logit_bias=[5]),
    text(stop=""),
    text(stop=["a", ""]),
    text(stop=["a", "b", "c", "d", "e"]),
    text(stop=5),
    text(stop_token_ids=[VOCABULARY]),
    text(stop_token_ids="all"),
    text(logprobs=21),
    text(logprobs="all"),
    chat(logprobs=True, top_logprobs=21),
    chat(top_logprobs=2),
    chat(logprobs=True, top_logprobs=-2),
    text(echo="please"),
    chat(stream_options={"include_usage": True}),
    chat(stream="please"),
    chat(response_format={"type": "xml"}),
    chat(response_format={"type": "json_schema"}),
    chat(response_format=schema({"type": "strin"})),
    chat(tools=[]),
    chat(tool_choice="required"),
    text(suffix="the end"),
]

DIFFERENT = [
    differs(
        Row(CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        "vLLM takes any model for none; OpenAI and we want to be told",
        ours=400,
        theirs=200,
    ),
    differs(text(max_tokens="5"), "numbers in strings are refused, as OpenAI does", ours=400, theirs=200),
    differs(text(["One", "Two"], max_tokens=2), "one prompt a request is served", ours=400, theirs=200),
    differs(text(best_of=2), "what is not served is refused by name; vLLM ignores it", ours=400, theirs=200),
    differs(
        text(echo=True, logprobs=1), "log-probabilities of a prompt are not served", ours=400, theirs=200
    ),
]

ROWS = [*GOOD, *BAD, *DIFFERENT]
