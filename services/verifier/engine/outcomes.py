"""From an exit's distributions to a ranked set of outcomes. Arithmetic only: no torch, no vLLM."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Final

LogProb = float
Candidate = tuple[int, float]
"""A token and its log-probability."""

LEAST: Final = 1e-12


def rank_outcomes(
    drafted: Sequence[LogProb],
    accepted: Sequence[LogProb],
    drafts: Sequence[int],
    candidates: Sequence[Sequence[Candidate]],
    limit: int,
) -> list[tuple[int, int, float]]:
    """The `limit` most likely outcomes (accepted length, next token, confidence), most likely first.

    With drafts d_0 … d_{K-1}, the exit's distribution p_i at row i (which stands on the first i drafts) and a_i the
    probability that draft i is accepted (p_i(d_i) itself, unless a judge knows better),

        P(accepted = n, next = t) = Π_{i<n} a_i · (1 - a_n) · p_n(t) / (1 - p_n(d_n))      for n < K, t ≠ d_n
        P(accepted = K, next = t) = Π_{i<K} a_i · p_K(t)

    which sums to one over all outcomes; without a judge the first line is Π_{i<n} p_i(d_i) · p_n(t). `drafted` are
    log p_i(d_i), `accepted` log a_i, for i < K at least; `candidates[n]` are row n's most likely tokens, `limit + 1` of
    them, so that `limit` remain without d_n; K + 1 rows in all. Ties go to the smaller accepted length.
    """
    outcomes = _outcomes(drafted, accepted, drafts, candidates)
    best = heapq.nlargest(limit, outcomes, key=lambda outcome: outcome[2])
    return [(length, token, min(1.0, math.exp(log_prob))) for length, token, log_prob in best]


def _outcomes(
    drafted: Sequence[LogProb],
    accepted: Sequence[LogProb],
    drafts: Sequence[int],
    candidates: Sequence[Sequence[Candidate]],
) -> Iterator[tuple[int, int, LogProb]]:
    prefix = 0.0
    for length, row in enumerate(candidates):
        draft = drafts[length] if length < len(drafts) else None
        judged = 0.0 if draft is None else _log_not(accepted[length]) - _log_not(drafted[length])
        for token, log_prob in row:
            if token != draft:
                yield length, token, prefix + judged + log_prob
        if draft is not None:
            prefix += accepted[length]


def _log_not(log_prob: LogProb) -> LogProb:
    """log(1 - p), finite also where rounding has made p one."""
    return math.log(max(-math.expm1(log_prob), LEAST))
