"""What kv-session counts. The names are those of `/metrics`."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

OPENED = Counter("outrider_kv_session_opened", "Sessions opened.")
RESUMED = Counter("outrider_kv_session_resumed", "Sessions taken up again.")
REFUSED = Counter("outrider_kv_session_refused", "Opens and resumes refused, by error code.", ["code"])
CLOSED = Counter("outrider_kv_session_closed", "Sessions closed or detached by their gateway.", ["status"])
MOVED = Counter("outrider_kv_session_moved", "Sessions moved to another verifier.")
EVICTED = Counter("outrider_kv_session_evicted", "Evictions asked for by the operator.")
EXPIRED = Counter("outrider_kv_session_expired", "Sessions erased because nobody used them.")
SHARED_TOKENS = Counter(
    "outrider_kv_session_shared_prefix_tokens", "Prompt tokens placed where they had been seen before."
)
OPEN_SECONDS = Histogram(
    "outrider_kv_session_open_seconds",
    "From reading an open or resume to its answer being published.",
    buckets=(0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 5, 10),
)
READY_VERIFIERS = Gauge("outrider_kv_session_ready_verifiers", "Verifiers that take sessions.")
STRANDED = Gauge(
    "outrider_kv_session_stranded",
    "Open sessions whose verifier is gone or drained and for which no other has a place; this replica's last sweep.",
)
