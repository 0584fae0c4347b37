"""From an exit's distributions to a ranked set of outcomes. Arithmetic only: no torch, no vLLM."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

LogProb = float
Candidate = tuple[int, float]
"""A token and its log-probability."""


def rank_outcomes(
    drafted_log_probs: Sequence[LogProb],
    drafts: Sequence[int],
    candidates: Sequence[Sequence[Candidate]],
    limit: int,
) -> list[tuple[int, int, float]]:
    """The `limit` most likely outcomes (accepted, next token, confidence), most likely first.

    With drafts d_0 … d_{K-1} and the exit's distribution p_i at row i (row i stands on the first i drafts),

        P(accepted = n, next = t) = Π_{i<n} p_i(d_i) · p_n(t)      for t ≠ d_n, or for every t when n = K,

    which sums to one over all outcomes: it is what greedy verification would yield were each row's arg-max drawn from
    p_i. `drafted_log_probs` are log p_i(d_i) for i < K; `candidates[n]` are row n's most likely tokens, `limit + 1` of
    them, so that `limit` remain without d_n. K + 1 rows in all. Ties go to the smaller accepted length.
    """
    best = heapq.nlargest(limit, _outcomes(drafted_log_probs, drafts, candidates), key=lambda found: found[2])
    return [(accepted, token, min(1.0, math.exp(log_prob))) for accepted, token, log_prob in best]


def _outcomes(
    drafted_log_probs: Sequence[LogProb], drafts: Sequence[int], candidates: Sequence[Sequence[Candidate]]
) -> Iterator[tuple[int, int, LogProb]]:
    prefix = 0.0
    for accepted, row in enumerate(candidates):
        drafted = drafts[accepted] if accepted < len(drafts) else None
        for token, log_prob in row:
            if token != drafted:
                yield accepted, token, prefix + log_prob
        if drafted is not None:
            prefix += drafted_log_probs[accepted]
