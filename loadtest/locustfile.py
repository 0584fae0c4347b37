"""Locust users who chat with a gateway over streams: `scripts/load`, or `locust -f loadtest/locustfile.py`.

Beside the requests themselves, locust's tables get three figures, all in ms: `ttft`, from a request to the first text
of its answer; `inter-token`, the time of each later token (see `Answer.between_ms`); and `whole answer`. An answer that
fails or breaks off is a failure of `whole answer`. With `--figures FILE` a run leaves its figures behind as JSON.
"""

from __future__ import annotations

import json
import random
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from locust import HttpUser, events
from locust.exception import StopUser

from loadtest.answers import Answer, BrokenStream, lines
from loadtest.conversations import Conversation, load

CHAT: Final = "/v1/chat/completions"
MODELS: Final = "/v1/models"
FIGURES: Final = ("ttft", "inter-token", "whole answer")
CONNECT_S: Final = 5.0
QUIET_S: Final = 150.0
LONGEST_PAUSE_S: Final = 10.0


def add_arguments(parser: ArgumentParser) -> None:
    """What a run may be told, beside locust's own options."""
    own = parser.add_argument_group("Outrider")
    own.add_argument(
        "--prompts",
        default="",
        env_var="OUTRIDER_LOAD_PROMPTS",
        metavar="FILE",
        help='What the users say: JSON Lines of {"turns": [...]}; a built-in few without.',
    )
    own.add_argument(
        "--max-tokens",
        type=int,
        default=64,
        env_var="OUTRIDER_LOAD_MAX_TOKENS",
        help="Longest answer, tokens (64).",
    )
    own.add_argument("--turns", type=int, default=2, help="Turns of a conversation at most (2).")
    own.add_argument(
        "--think", type=float, default=0.5, metavar="SECONDS", help="Mean pause between conversations (0.5)."
    )
    own.add_argument("--figures", default="", metavar="FILE", help="Where the run's figures go, as JSON.")


def prepare(environment: Any, **_: Any) -> None:
    """Read the conversations once, for all users; a file that can't be read ends the run with its fault."""
    options = environment.parsed_options
    try:
        environment.conversations = load(Path(options.prompts) if options.prompts else None)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--prompts: {error}") from None
    environment.counts = Counter[str]()


def leave_figures(environment: Any, **_: Any) -> None:
    """Write what the run measured to where `--figures` says."""
    if environment.parsed_options.figures:
        text = json.dumps(figures(environment), indent=2) + "\n"
        Path(environment.parsed_options.figures).write_text(text, encoding="utf-8")


def figures(environment: Any) -> dict[str, Any]:
    """What the run measured: times in ms by name, and counts of tokens and of what speculation did."""
    total = environment.stats.total
    seconds = max(1e-3, (total.last_request_timestamp or 0.0) - total.start_time)
    entries = {entry.name: entry for entry in environment.stats.entries.values()}
    times = {
        name: {
            "count": entry.num_requests,
            "failures": entry.num_failures,
            "mean": round(entry.avg_response_time, 2),
            **{f"p{percent}": entry.get_response_time_percentile(percent / 100) for percent in (50, 95, 99)},
        }
        for name in FIGURES
        if (entry := entries.get(name)) is not None
    }
    return {
        "seconds": round(seconds, 2),
        "times_ms": times,
        "tokens_per_second": round(environment.counts["tokens"] / seconds, 2),
        "counts": dict(environment.counts),
        "failures": [
            {"name": fault.name, "error": str(fault.error), "occurrences": fault.occurrences}
            for fault in environment.stats.errors.values()
        ],
    }


class Chatter(HttpUser):  # type: ignore[misc]
    """Holds one conversation after another, reading each answer to its end."""

    def on_start(self) -> None:
        """Ask what is served; nothing can be asked of a gateway that doesn't say."""
        with self.client.get(MODELS, catch_response=True, timeout=CONNECT_S) as response:
            try:
                self.model: str = response.json()["data"][0]["id"]
            except (ValueError, KeyError, IndexError, TypeError):
                response.failure(f"{MODELS} names no model (HTTP {response.status_code})")
                raise StopUser() from None

    def wait_time(self) -> float:
        """A pause that is `--think` on average."""
        return random.uniform(0.0, 2.0 * self.environment.parsed_options.think)

    def converse(self) -> None:
        """One conversation, turn by turn; it ends when an answer fails."""
        conversation: Conversation = random.choice(self.environment.conversations)
        messages: list[dict[str, str]] = []
        for turn in conversation[: self.environment.parsed_options.turns]:
            messages.append({"role": "user", "content": turn})
            answer = self.ask(messages)
            if answer is None:
                return
            messages.append({"role": "assistant", "content": answer.text})

    tasks = (converse,)

    def ask(self, messages: Sequence[dict[str, str]]) -> Answer | None:
        """The answer to `messages`, read as it comes; None when it failed, after the pause that was asked for."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.environment.parsed_options.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent = time.perf_counter()
        with self.client.post(
            CHAT, json=body, stream=True, catch_response=True, timeout=(CONNECT_S, QUIET_S)
        ) as response:
            if response.status_code != 200:
                fault = _fault(response)
                response.failure(fault)
                self.report("whole answer", _since_ms(sent), fault=BrokenStream(fault))
                time.sleep(_pause_s(response))
                return None
            return self.read(response, sent)

    def read(self, response: Any, sent: float) -> Answer | None:
        """Read the answer that `response` streams, and report it."""
        answer = Answer()
        try:
            for line in lines(response.iter_content(chunk_size=None)):
                answer.line(line, _since_ms(sent))
            answer.check()
        except (BrokenStream, OSError) as error:  # requests' errors are OSErrors
            response.failure(str(error))
            self.report("whole answer", _since_ms(sent), fault=error)
            return None
        if answer.first_ms is not None:
            self.report("ttft", answer.first_ms)
        for between_ms in answer.between_ms:
            self.report("inter-token", between_ms)
        self.report("whole answer", _since_ms(sent), length=len(answer.text.encode()))
        counts: Counter[str] = self.environment.counts
        counts.update(answer.speculation())
        counts["answers"] += 1
        counts["tokens"] += answer.usage.get("completion_tokens", answer.tokens)
        return answer

    def report(self, name: str, ms: float, *, length: int = 0, fault: Exception | None = None) -> None:
        """Put a figure into locust's tables."""
        self.environment.events.request.fire(
            request_type="stream",
            name=name,
            response_time=ms,
            response_length=length,
            exception=fault,
            context=self.context(),
        )


def _since_ms(start: float) -> float:
    return (time.perf_counter() - start) * 1000.0


def _fault(response: Any) -> str:
    if response.status_code == 0:
        return f"no answer: {response.error}"
    try:
        return f"HTTP {response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def _pause_s(response: Any) -> float:
    asked = str(response.headers.get("Retry-After", ""))
    return min(float(asked), LONGEST_PAUSE_S) if asked.isdigit() else 0.0


events.init_command_line_parser.add_listener(add_arguments)
events.init.add_listener(prepare)
events.quitting.add_listener(leave_figures)
