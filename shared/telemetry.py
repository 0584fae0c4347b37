"""Trace context, logging and metrics: what a service says about itself, the same way in every service.

A `TraceContext` is W3C's `traceparent`: it travels in HTTP and Kafka headers, so that one request can be followed
through all services. Nothing here sends spans anywhere; log lines and metrics are pulled by whoever wants them.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TextIO

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from shared.settings import LogFormat

TRACEPARENT: Final = "traceparent"
METRICS_CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

# Upper bounds in seconds for everything on the path of a round: a Kafka hop takes 1–2 ms, a CPU pass 10–500 ms.
LATENCY_BUCKETS_S: Final = (
    0.0005,
    0.001,
    0.002,
    0.004,
    0.008,
    0.016,
    0.032,
    0.064,
    0.128,
    0.256,
    0.512,
    1.024,
    2.048,
    4.096,
    8.192,
)

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in a distributed trace something happens (https://www.w3.org/TR/trace-context/).

    `trace_id` is 32 and `span_id` 16 lower-case hex digits, neither all zeros.
    """

    trace_id: str
    span_id: str
    sampled: bool = True

    @classmethod
    def new(cls, *, sampled: bool = True) -> TraceContext:
        """The root of a new trace."""
        return cls(_random_hex(16), _random_hex(8), sampled)

    def child(self) -> TraceContext:
        """A new span within the same trace."""
        return TraceContext(self.trace_id, _random_hex(8), self.sampled)

    @classmethod
    def from_header(cls, header: str | bytes | None) -> TraceContext | None:
        """What a `traceparent` header says; None when there is none or, as W3C demands, when it is malformed.

        Later versions than 00 are read as 00, with whatever follows the flags ignored.
        """
        if header is None:
            return None
        text = header.decode("latin-1") if isinstance(header, bytes) else header
        match = _TRACEPARENT.fullmatch(text.strip())
        if match is None:
            return None
        version, trace_id, span_id, flags, rest = match.groups()
        if version == "ff" or (version == "00" and rest) or not (int(trace_id, 16) and int(span_id, 16)):
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))

    def to_header(self) -> str:
        """The `traceparent` header, version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED if self.sampled else 0:02x}"


def _random_hex(size: int) -> str:
    while not int(text := secrets.token_hex(size), 16):
        continue
    return text


# --- logging ----------------------------------------------------------------------------------------------------

# The trace that log lines of the running task belong to.
current_trace: ContextVar[TraceContext | None] = ContextVar("outrider_trace", default=None)

# Attributes of every LogRecord: whatever else a record has came in by `extra=` and belongs into the line.
_OWN_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}

REPEAT_S: Final = 10.0
"""How often a line of aiokafka may be repeated."""

# Libraries that say at INFO what only their authors need.
_TALKATIVE: Final[Mapping[str, int]] = {
    "aiokafka": logging.WARNING,
    "asyncio": logging.WARNING,
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "websockets": logging.WARNING,
}

# uvicorn says this of every WebSocket that an app answers with an HTTP status, as if the app had failed.
_UNTRUE: Final = "ASGI callable returned without completing handshake."


class _Repeats(logging.Filter):
    """Lets a library's line through once in `REPEAT_S`: a client that reconnects ten times a second says so each time."""

    def __init__(self, library: str) -> None:
        super().__init__()
        self._library = library
        self._last: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] != self._library:
            return True
        # Where in the library's source the line is written: a bounded number of places, whatever the lines say.
        place = (record.pathname, record.lineno)
        if record.created - self._last.get(place, -REPEAT_S) < REPEAT_S:
            return False
        self._last[place] = record.created
        return True


def _true(record: logging.LogRecord) -> bool:
    return record.msg != _UNTRUE


class _TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO verifier shared.bus: text key=value`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{_timestamp(record)} {record.levelname} {self._service} {record.name}: {record.getMessage()}"
            + "".join(f" {key}={value}" for key, value in _extras(record).items())
        )
        return f"{line}\n{failure}" if (failure := _failure(record)) else line


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with the same fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if failure := _failure(record):
            entry["exception"] = failure
        return json.dumps(entry, ensure_ascii=False, default=str)


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _extras(record: logging.LogRecord) -> dict[str, object]:
    extras = {
        key: value
        for key, value in record.__dict__.items()
        if key not in _OWN_ATTRIBUTES
        and not key.startswith("vllm_")  # vLLM marks every record of its process
    }
    trace = current_trace.get()
    if trace is not None:
        extras.setdefault("trace_id", trace.trace_id)
        extras.setdefault("span_id", trace.span_id)
    return extras


def _failure(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return "".join(traceback.format_exception(*record.exc_info)).rstrip()


def configure_logging(
    level: str, log_format: LogFormat | str, service: str, *, stream: TextIO | None = None
) -> None:
    """Send all log lines of this process to `stream` (standard error), as text or JSON, naming `service`.

    Replaces whatever was configured before. uvicorn's access log is off: `/metrics` counts requests, and a line each
    costs more than serving them. Raises `ValueError` for a level or format that does not exist.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        known = ", ".join(name for name in logging.getLevelNamesMapping() if name != "NOTSET")
        raise ValueError(f"log level {level!r} does not exist; one of {known} is right")
    formatter = _JsonFormatter if LogFormat(log_format) is LogFormat.JSON else _TextFormatter
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter(service))
    handler.addFilter(_true)
    if number > logging.DEBUG:
        handler.addFilter(_Repeats("aiokafka"))
    logging.basicConfig(handlers=[handler], level=number, force=True)
    for name, least in _TALKATIVE.items():
        logging.getLogger(name).setLevel(max(number, least) if number > logging.DEBUG else number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"
    logging.getLogger("uvicorn.access").disabled = True


# --- metrics ----------------------------------------------------------------------------------------------------


def render_metrics(registry: CollectorRegistry = REGISTRY) -> bytes:
    """The body of `/metrics`, in Prometheus' text format (its type is `METRICS_CONTENT_TYPE`)."""
    return generate_latest(registry)
