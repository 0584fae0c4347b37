"""Where the time of an engine's steps goes: what each part of the host's work takes, and what the device ran meanwhile.

`--profile` of `scripts/bench engine` writes it as `profile.json` and `profile.md`. The host's parts are timed with a clock
around vLLM's and our functions, nested as they call each other; the device's kernels come from steps of their own, under
PyTorch's profiler, which slows the host, so that times before the first kernel are not taken from it.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

STEP: Final = "engine step"
DEVICE_CATEGORIES: Final = ("kernel", "gpu_memcpy", "gpu_memset")
MOST_KERNELS: Final = 14
NAME_LENGTH: Final = 70


class Stopwatch:
    """Times calls of functions while they are watched, by step."""

    def __init__(self) -> None:
        self._spent: dict[str, list[float]] = defaultdict(list)
        self._step: Counter[str] = Counter()

    @contextmanager
    def watching(self, functions: Sequence[tuple[object, str]]) -> Iterator[None]:
        """Watch methods of objects, where they are there."""
        with ExitStack() as stack:
            for owner, name in functions:
                function = getattr(owner, name, None)
                if callable(function):
                    stack.enter_context(mock.patch.object(owner, name, self._timed(name, function)))
            yield

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._step[name] += time.perf_counter() - began  # type: ignore[assignment]

        return timed

    def step_done(self) -> None:
        """Book what was timed since the last step."""
        for name, seconds in self._step.items():
            self._spent[name].append(seconds * 1000)
        self._step.clear()

    def medians(self) -> dict[str, float]:
        """ms a step by function, the median, in the order of their first call's end."""
        return {name: round(statistics.median(spent), 3) for name, spent in self._spent.items()}


def watched_of(core: Any, worker: Any) -> list[tuple[object, str]]:
    """The functions of a step, vLLM's and ours."""
    runner = worker.model_runner
    return [
        (core.scheduler, "schedule"),
        (core.model_executor, "execute_model"),
        *((runner, name) for name in RUNNER_PARTS),
        (core.scheduler, "get_grammar_bitmask"),
        (core.model_executor, "sample_tokens"),
        (core.scheduler, "update_from_output"),
    ]


RUNNER_PARTS: Final = (
    "_leave_batch",
    "_lay_out_gathered",
    "_update_states",
    "_advance",
    "_prepare_inputs",
    "_build_attention_metadata",
    "_lay_out",
    "_attention",
    "_show_blocks",
    "_show_gathered",
    "_show_exits",
    "_hand_over",
    "_model_forward",
    "_replay",
    "_brought_up",
    "_await_hints",
    "_sample",
    "_device_done",
    "_bookkeeping_sync",
    "_end",
)


@contextmanager
def traced() -> Iterator[list[Mapping[str, Any]]]:
    """What the device runs, as events of PyTorch's profiler: there when the block is left."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    events: list[Mapping[str, Any]] = []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        yield events
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events += json.loads(file.read_text(encoding="utf-8"))["traceEvents"]


@contextmanager
def step_span() -> Iterator[None]:
    """One step, in the trace."""
    import torch

    with torch.profiler.record_function(STEP):
        yield


def device_figures(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the device did in a step, ms, medians over the steps traced: from its first kernel to its last, busy on the
    stream that was busiest (the layers) and on all others (exits), and which kernels took most."""
    steps = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == STEP]
    found: list[dict[str, float]] = []
    by_name: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for began, ended in steps:
        own = [
            event
            for event in events
            if event.get("cat") in DEVICE_CATEGORIES and began <= event["ts"] <= ended
        ]
        if not own:
            continue
        busy: Counter[Any] = Counter()
        for event in own:
            busy[event["args"].get("stream")] += event["dur"]
            by_name[short(event["name"])] += event["dur"]
            counts[short(event["name"])] += 1
        first, last = min(event["ts"] for event in own), max(event["ts"] + event["dur"] for event in own)
        most = max(busy.values())
        calls = sum(event.get("cat") == "cuda_runtime" and began <= event["ts"] <= ended for event in events)
        found.append(
            {
                "first_to_last": (last - first) / 1000,
                "layers_stream_busy": most / 1000,
                "other_streams_busy": (sum(busy.values()) - most) / 1000,
                "kernels_and_copies": len(own),
                "runtime_calls": calls,
            }
        )
    if not found:
        return {}
    return {
        **{name: round(statistics.median(own[name] for own in found), 3) for name in found[0]},
        "kernels": [
            {
                "name": name,
                "ms": round(spent / 1000 / len(found), 3),
                "count": round(counts[name] / len(found), 1),
            }
            for name, spent in by_name.most_common(MOST_KERNELS)
        ],
    }


def short(name: str) -> str:
    """A kernel's name without its template's arguments and its own."""
    bare = re.sub(r"<.*|\(.*", "", name.replace("(anonymous namespace)", "").removeprefix("void "))
    return (bare or name)[:NAME_LENGTH]


def report(profiles: Sequence[Mapping[str, Any]]) -> str:
    """`profile.md`."""
    lines = ["# Where a step's time goes", ""]
    for own in profiles:
        lines += [f"## {own['mode']}, {own['sessions']} sessions: {own['step_ms']:.2f} ms a step", ""]
        lines += ["| host | ms |", "| --- | --- |"]
        lines += [f"| `{name}` | {spent:.3f} |" for name, spent in own["host_ms"].items()]
        device = own["device"]
        if device:
            lines += ["", "| device | |", "| --- | --- |"]
            lines += [
                f"| {name.replace('_', ' ')} | {device[name]:g} |" for name in device if name != "kernels"
            ]
            lines += ["", "| kernel | ms a step | times |", "| --- | --- | --- |"]
            lines += [
                f"| `{one['name']}` | {one['ms']:.3f} | {one['count']:g} |" for one in device["kernels"]
            ]
        lines.append("")
    return "\n".join(lines)
