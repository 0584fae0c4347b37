"""What a verifier counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from shared.telemetry import LATENCY_BUCKETS_S

ANSWERS = Counter("outrider_verifier_answers", "Answers published, by kind.", ["kind"])
HINTS = Counter("outrider_verifier_hints", "Hints posted.")
COMMITTED_TOKENS = Counter("outrider_verifier_committed_tokens", "Tokens committed.")
DRAFTED_TOKENS = Counter("outrider_verifier_drafted_tokens", "Draft tokens verified.")
ACCEPTED_TOKENS = Counter("outrider_verifier_accepted_tokens", "Draft tokens accepted.")
CONFLICTS = Counter("outrider_verifier_commit_conflicts", "Commits that Redis refused.")
TAKEOVERS = Counter("outrider_verifier_takeovers", "Sessions taken over from another verifier process.")
EVICTIONS = Counter("outrider_verifier_evictions", "Sessions whose KV was freed, by reason.", ["reason"])
SESSIONS = Gauge("outrider_verifier_sessions", "Sessions with live KV.")
ENGINE_SESSIONS = Gauge(
    "outrider_verifier_engine_sessions", "Sessions that the engine holds, by what they do there.", ["state"]
)
KV_USAGE = Gauge("outrider_verifier_kv_usage_ratio", "Share of the KV cache in use.")
STEP_MS = Gauge("outrider_verifier_step_milliseconds", "Running mean of an engine step.")
VERIFY_SECONDS = Histogram(
    "outrider_verifier_verify_seconds",
    "From a block's arrival to the engine's answer.",
    buckets=LATENCY_BUCKETS_S,
)
COMMIT_SECONDS = Histogram(
    "outrider_verifier_commit_seconds", "From the engine's answer to the commit's.", buckets=LATENCY_BUCKETS_S
)
