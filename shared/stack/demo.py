"""The demo: brings a stack up, streams answers with each token's origin in colour, says what speculation did, and stays up.

It is a client like any other: all it shows comes from the gateway's HTTP answers.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TextIO

from shared.errors import OutriderError, Unavailable
from shared.stack import record as records
from shared.stack.settings import StackSettings
from shared.stack.signals import uninterruptible
from shared.stack.stack import Progress, Stack, StackOptions, State

PROMPTS: Final = (
    "Why is the sky blue? Answer in two sentences.",
    "Repeat this text word by word: The quick brown fox jumps over the lazy dog. The lazy dog sleeps in the warm sun. "
    "The quick brown fox runs through the warm sun.",
    "List the days of the week, one per line. Then list them again in the same order.",
)
STREAM_TIMEOUT_S: Final = 180.0
INTERRUPTED: Final = 130

_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Source:
    """Where a token came from: what the gateway calls it, its colour (an SGR code), what that means."""

    name: str
    colour: str
    meaning: str


SOURCES: Final[Mapping[str, Source]] = {
    source.name: source
    for source in (
        Source("accepted", "32", "drafted at the edge, accepted by the target"),
        Source(
            "preemptive",
            "36",
            "the same, but drafted before the verdict on its base, on an early exit's hint",
        ),
        Source("corrected", "33", "the target's own token, where a draft ended or was wrong"),
    )
}


class Paint:
    """Colours for `stream`, or none where it is no terminal or NO_COLOR is set."""

    def __init__(self, stream: TextIO) -> None:
        self.on = stream.isatty() and not os.environ.get("NO_COLOR")

    def __call__(self, text: str, code: str) -> str:
        """`text` in the colour of an SGR code."""
        return f"\033[{code}m{text}\033[0m" if self.on and text else text


class Demo:
    """One run of the demo. `options` is called once it is sure that a stack has to be started."""

    def __init__(
        self,
        *,
        settings: StackSettings,
        options: Callable[[], StackOptions],
        prompts: Sequence[str] | None = None,
        max_tokens: int = 96,
        once: bool = False,
        out: TextIO | None = None,
    ) -> None:
        self._settings = settings
        self._options = options
        self._prompts = tuple(prompts or PROMPTS)
        self._max_tokens = max_tokens
        self._once = once
        self._out = out or sys.stdout
        self._paint = Paint(self._out)

    def run(self) -> int:
        """Run it until Ctrl-C; the exit status. A stack that runs already is used and left alone."""
        try:
            return self._run()
        except KeyboardInterrupt:
            return INTERRUPTED if self._once else 0

    def _run(self) -> int:
        running = records.read(self._settings.run_dir)
        if running is not None and running.running:
            self._say(f"using the stack that runs already, its gateway at {running.gateway_url}")
            return self._use(running)
        stack = Stack(self._options(), settings=self._settings, report=self._progress)
        try:
            self._say(f"starting Kafka, Redis and the services; logs in {stack.run_dir / 'logs'}")
            stack.up()
            return self._use(stack.record)
        finally:
            self._stop(stack)

    def _use(self, stack: records.StackRecord) -> int:
        url, model = stack.gateway_url, stack.model
        if stack.places:
            self._say(f"\n{stack.places}")
        self._legend()
        failed = False
        for prompt in self._prompts:
            try:
                self._ask(url, model, prompt)
            except OutriderError as error:
                failed = True
                self._say(f"\n{error.message}")
        if self._once:
            return 1 if failed else 0
        self._invite(url, model)
        threading.Event().wait()
        return 0

    def _stop(self, stack: Stack) -> None:
        with uninterruptible():
            self._say("\nstopping what was started …")
            stack.down()
            self._say("stopped")

    # --- asking ---------------------------------------------------------------------------------------------------

    def _ask(self, url: str, model: str, prompt: str) -> None:
        self._say("\n" + self._paint(f"❯ {prompt}", "1"))
        usage: dict[str, Any] = {}
        for chunk in stream_chat(url, model, prompt, self._max_tokens):
            usage = chunk.get("usage") or usage
            for text, source in pieces(chunk):
                colour = SOURCES[source].colour if source in SOURCES else "0"
                print(self._paint(text, colour), end="", file=self._out, flush=True)
        self._say("")
        for line in summary(usage):
            self._say(self._paint(line, "2"))

    # --- saying ---------------------------------------------------------------------------------------------------

    def _progress(self, progress: Progress) -> None:
        if progress.state is State.STOPPED:
            return
        mark = {State.READY: self._paint("✓", "32"), State.DIED: self._paint("✗", "31")}.get(
            progress.state, "·"
        )
        self._say(f"{progress.seconds:6.1f} s {mark} {progress.part:<13} {progress.text}".rstrip())

    def _legend(self) -> None:
        self._say(
            "\nWhere each token came from" + ("" if self._paint.on else " (shown in colour on a terminal)")
        )
        for source in SOURCES.values():
            self._say(f"  {self._paint(f'{source.name:<10}', source.colour)} {source.meaning}")

    def _invite(self, url: str, model: str) -> None:
        self._say(f"\n{self._paint('It is up. Talk to it:', '1')}\n")
        self._say(curl_line(url, model))
        self._say(f"\n{openai_snippet(url, model)}\n")
        self._say("Ctrl-C stops everything that was started here.")

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def stream_chat(url: str, model: str, prompt: str, max_tokens: int) -> Iterator[dict[str, Any]]:
    """The chunks of one streamed answer. Raises `OutriderError` with what the gateway says when it fails."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "outrider": {"trace": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with _DIRECT.open(request, timeout=STREAM_TIMEOUT_S) as answer:
            yield from _events(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise OutriderError(_reason(error.read()) or f"the gateway answered {error.code}") from None
    except OSError as error:
        raise Unavailable(f"the gateway at {url} can't be reached: {error}") from None


def _events(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field != "data":
            continue
        if value == "[DONE]":
            return
        chunk = json.loads(value)
        if "error" in chunk:
            raise OutriderError(_reason(value.encode()) or "the answer broke off")
        yield chunk
    raise Unavailable("the answer broke off: the gateway closed the connection")


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def pieces(chunk: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a chunk adds, as (text, source); source is empty where the gateway gives none."""
    traced = chunk.get("outrider", {}).get("tokens")
    if traced:
        yield from ((token["text"], token["source"]) for token in traced)
        return
    for choice in chunk.get("choices", ()):
        yield choice.get("delta", {}).get("content") or "", ""


def summary(usage: Mapping[str, Any]) -> list[str]:
    """What speculation did for one answer, in a few lines."""
    did = usage.get("outrider")
    if not did:
        return []
    tokens, passes, drafted, accepted = (
        usage["completion_tokens"],
        did["passes"],
        did["drafted"],
        did["accepted"],
    )
    lines = [
        f"{tokens} tokens in {passes} passes of the target, {tokens / max(passes, 1):.2f} a pass; it said "
        f"{did['floor_tokens']} by itself"
    ]
    if did["rounds"]:
        lines += [
            f"{did['rounds']} rounds of the edge's drafts: {did['tokens_per_round']:.2f} tokens a round; "
            f"{accepted} of {drafted} drafted tokens accepted",
            f"preemptive drafts: {did['hits']} hits, {did['misses']} misses, {did['late']} too late",
        ]
    leads = did.get("exit_lead_ms", {})
    if leads:
        told = (
            f"layer {layer}: {lead['p50']:.0f} ms (at least {lead['min']:.0f})"
            for layer, lead in leads.items()
        )
        lines.append("hints led their verdict by, at the median: " + ", ".join(told))
    return lines


def curl_line(url: str, model: str) -> str:
    """A line to paste into a shell."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    return (
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"
    )


def openai_snippet(url: str, model: str) -> str:
    """The same with OpenAI's client."""
    return f"""\
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="none")
for chunk in client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "Why is the sky blue?"}}],
    stream=True,
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)"""
