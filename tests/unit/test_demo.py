"""What the demo shows of an answer, told by a gateway of the test's own."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from shared.errors import OutriderError, Unavailable
from shared.stack.demo import Paint, curl_line, openai_snippet, pieces, stream_chat, summary

USAGE = {
    "completion_tokens": 12,
    "outrider": {
        "passes": 6, "floor_tokens": 1, "rounds": 5, "drafted": 20, "accepted": 7, "tokens_per_round": 2.4,
        "hits": 3, "misses": 1, "late": 0,
        "exit_lead_ms": {"18": {"count": 5, "p50": 40.4, "min": 31.0}, "27": {"count": 5, "p50": 9.6, "min": 8.0}},
    },
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def a_gateway(status: int, body: bytes) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def sse(*chunks: object) -> bytes:
    return b"".join(b"id: 1\ndata: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def test_an_answer_is_streamed_to_its_end_with_the_origin_of_each_token_asked_for() -> None:
    body = b": keep-alive\n\n" + sse({"n": 1}, {"n": 2}) + b"data: [DONE]\n\n"
    with a_gateway(200, body) as (url, asked):
        assert [chunk["n"] for chunk in stream_chat(url, "m", "hello", 5)] == [1, 2]
    assert asked[0]["outrider"] == {"trace": True}
    assert asked[0]["max_tokens"] == 5
    assert asked[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (429, b'{"error": {"message": "no room; try again"}}', "no room; try again"),
        (500, b"oops", "the gateway answered 500"),
        (200, sse({"n": 1}, {"error": {"message": "the verifier is gone"}}), "the verifier is gone"),
        (200, sse({"n": 1}), "the answer broke off"),
    ],
)
def test_an_answer_that_fails_says_why(status: int, body: bytes, said: str) -> None:
    with a_gateway(status, body) as (url, _), pytest.raises(OutriderError, match=said):
        list(stream_chat(url, "m", "hello", 5))


def test_a_gateway_that_is_not_there_is_named() -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 can't be reached"):
        list(stream_chat("http://127.0.0.1:1", "m", "hello", 5))


def test_pieces_are_the_traced_tokens_or_else_the_plain_text() -> None:
    traced = {
        "outrider": {"tokens": [{"text": "a", "source": "accepted"}, {"text": "b", "source": "corrected"}]}
    }
    assert list(pieces(traced)) == [("a", "accepted"), ("b", "corrected")]
    assert list(pieces({"choices": [{"delta": {"content": "ab"}}]})) == [("ab", "")]
    assert list(pieces({"choices": []})) == []


def test_the_summary_tells_tokens_a_round_hits_and_every_layers_lead() -> None:
    text = "\n".join(summary(USAGE))
    assert "12 tokens in 6 passes of the target, 2.00 a pass; it said 1 by itself" in text
    assert "5 rounds of the edge's drafts: 2.40 tokens a round; 7 of 20 drafted tokens accepted" in text
    assert "3 hits, 1 misses, 0 too late" in text
    assert "layer 18: 40 ms (at least 31), layer 27: 10 ms (at least 8)" in text
    assert summary({}) == []
    alone = {**USAGE["outrider"], "rounds": 0, "exit_lead_ms": {}}
    assert len(summary(USAGE | {"outrider": alone})) == 1, (
        "where the target did it all there is no more to tell"
    )


def test_colour_is_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Paint(Terminal())("x", "32") == "\033[32mx\033[0m"
    assert Paint(io.StringIO())("x", "32") == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Paint(Terminal())("x", "32") == "x"


def test_what_is_there_to_paste_is_right() -> None:
    line = curl_line("http://h:1", "a-model")
    body = re.search(r"-d '(.*)'", line)
    assert body is not None
    assert json.loads(body[1])["model"] == "a-model"
    assert line.startswith("curl -N http://h:1/v1/chat/completions ")
    compile(openai_snippet("http://h:1", "a-model"), "snippet", "exec")
