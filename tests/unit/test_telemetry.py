"""Trace context, log lines and metrics are what other tools expect."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from shared.settings import LogFormat
from shared.telemetry import (
    LATENCY_BUCKETS_S,
    METRICS_CONTENT_TYPE,
    TraceContext,
    configure_logging,
    current_trace,
    render_metrics,
)

EXAMPLE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    names = ("", "uvicorn", "uvicorn.error", "uvicorn.access", "aiokafka", "asyncio", "httpx", "httpcore")
    loggers = [logging.getLogger(name) for name in names]
    before = [(each, each.level, list(each.handlers), each.propagate, each.disabled) for each in loggers]
    yield
    for logger, level, handlers, propagate, disabled in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.disabled = disabled


def test_a_traceparent_header_is_read_and_written_unchanged() -> None:
    trace = TraceContext.from_header(EXAMPLE)
    assert trace == TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=True)
    assert trace.to_header() == EXAMPLE
    assert TraceContext.from_header(EXAMPLE.encode()) == trace


def test_a_new_trace_survives_its_header_and_differs_every_time() -> None:
    traces = [TraceContext.new() for _ in range(100)]
    assert len({trace.trace_id for trace in traces}) == 100
    assert all(TraceContext.from_header(trace.to_header()) == trace for trace in traces)


def test_a_child_stays_in_the_trace_and_keeps_the_sampling_decision() -> None:
    parent = TraceContext.new(sampled=False)
    child = parent.child()
    assert child.trace_id == parent.trace_id
    assert child.span_id != parent.span_id
    assert not child.sampled
    assert child.to_header().endswith("-00")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        EXAMPLE.upper(),
        EXAMPLE[:-1],
        EXAMPLE + "-more",
        "ff" + EXAMPLE[2:],
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        b"\xff\xfe",
    ],
)
def test_a_malformed_traceparent_is_ignored(header: str | bytes | None) -> None:
    assert TraceContext.from_header(header) is None


def test_a_traceparent_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    trace = TraceContext.from_header("cc" + EXAMPLE[2:] + "-what-is-to-come")
    assert trace is not None
    assert trace.to_header() == EXAMPLE


@given(st.one_of(st.text(), st.binary()))
def test_no_header_makes_the_reader_fail(header: str | bytes) -> None:
    trace = TraceContext.from_header(header)
    assert trace is None or TraceContext.from_header(trace.to_header()) == trace


def test_json_log_lines_carry_service_extra_fields_and_trace() -> None:
    stream = io.StringIO()
    configure_logging("info", LogFormat.JSON, "verifier", stream=stream)
    trace = TraceContext.new()
    token = current_trace.set(trace)
    try:
        logging.getLogger("outrider.test").info("block %d", 7, extra={"session": "s-1"})
    finally:
        current_trace.reset(token)
    entry = json.loads(stream.getvalue())
    assert entry["message"] == "block 7"
    assert entry["level"] == "INFO"
    assert entry["service"] == "verifier"
    assert entry["logger"] == "outrider.test"
    assert entry["session"] == "s-1"
    assert entry["trace_id"] == trace.trace_id
    assert entry["time"].endswith("Z")


def test_an_exception_stays_within_one_json_line() -> None:
    stream = io.StringIO()
    configure_logging("INFO", LogFormat.JSON, "gateway", stream=stream)
    try:
        raise ValueError("nine")
    except ValueError:
        logging.getLogger("outrider.test").exception("failed")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert "ValueError: nine" in json.loads(lines[0])["exception"]


def test_text_log_lines_carry_service_and_extra_fields() -> None:
    stream = io.StringIO()
    configure_logging("INFO", "text", "gateway", stream=stream)
    logging.getLogger("outrider.test").warning("slow", extra={"round": 3})
    assert stream.getvalue().rstrip().endswith("WARNING gateway outrider.test: slow round=3")


def test_lines_below_the_level_and_the_access_log_are_not_written() -> None:
    stream = io.StringIO()
    configure_logging("WARNING", LogFormat.TEXT, "gateway", stream=stream)
    logging.getLogger("outrider.test").info("quiet")
    logging.getLogger("uvicorn.access").error("GET /")
    assert stream.getvalue() == ""
    logging.getLogger("uvicorn.error").error("bind failed")
    assert "bind failed" in stream.getvalue()


def test_a_line_that_the_kafka_client_repeats_is_written_once() -> None:
    stream = io.StringIO()
    configure_logging("INFO", LogFormat.TEXT, "gateway", stream=stream)
    for port in range(5):
        logging.getLogger("aiokafka.conn").error("unable to connect to %d", port)
        logging.getLogger("outrider.test").error("ours %d", port)
    logging.getLogger("aiokafka.conn").error("another line")
    text = stream.getvalue()
    assert text.count("unable to connect") == 1
    assert text.count("ours") == 5
    assert text.count("another line") == 1


def test_an_unknown_level_or_format_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"LOUD.*INFO"):
        configure_logging("LOUD", LogFormat.TEXT, "gateway")
    with pytest.raises(ValueError, match="xml"):
        configure_logging("INFO", "xml", "gateway")


def test_metrics_render_as_prometheus_text() -> None:
    registry = CollectorRegistry()
    Counter("outrider_things", "Things.", registry=registry).inc(3)
    assert b"outrider_things_total 3.0" in render_metrics(registry)
    assert METRICS_CONTENT_TYPE.startswith("text/plain")
    assert list(LATENCY_BUCKETS_S) == sorted(LATENCY_BUCKETS_S)
