"""`shared.speculation.outcomes.rank_outcomes` and `calibrated` as tensor operations: for exits inside a CUDA graph.

Every size is fixed and nothing waits for the host, so that the operations can be captured. Blocks shorter than the
longest are told apart by their length.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from shared.speculation.outcomes import LEAST, SUREST_LOGIT, Line

RANK_FIELDS: Final = 3
"""Of an outcome on its way to the host: accepted length, next token, confidence (its bits)."""


def rank(
    drafted: Tensor,
    accepted: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    log_probs: Tensor,
    limit: int,
    outcome: Line,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `limit` likeliest outcomes of each block: accepted lengths and next tokens `[blocks, limit]`, and confidences.

    `drafted`, `accepted` and `drafts` `[blocks, K + 1]` are log p_n(d_n), log a_n and d_n; `lengths` `[blocks]` says how
    many of the K are drafts; `tokens` and `log_probs` `[blocks, K + 1, k]` are the likeliest at each place. `outcome` puts
    a probability's logit right. Of outcomes that are equally likely any may come first.
    """
    _, places, named = tokens.shape
    place = torch.arange(places, device=tokens.device)
    judged = place < lengths[:, None]
    held = torch.where(judged, accepted, 0.0)
    prefix = held.cumsum(dim=1) - held
    refused = torch.log((-torch.expm1(accepted)).clamp(min=LEAST))
    share = prefix + torch.where(judged, refused, 0.0)
    others = judged[:, :, None] & (tokens == drafts[:, :, None])
    kept = log_probs.masked_fill(others, -torch.inf)
    rest = torch.maximum(-torch.expm1(drafted), kept.exp().sum(dim=-1)).clamp(min=LEAST).log()
    scores = kept + (share - torch.where(judged, rest, 0.0))[:, :, None]
    scores = scores.masked_fill((place > lengths[:, None])[:, :, None], -torch.inf)
    best, at = scores.flatten(1).topk(min(limit, places * named), dim=-1)
    probabilities = best.exp().clamp(max=1.0)
    if outcome != Line():
        odds = torch.log(probabilities.clamp(min=LEAST)) - torch.log((1.0 - probabilities).clamp(min=LEAST))
        probabilities = torch.sigmoid(
            outcome.slope * odds.clamp(-SUREST_LOGIT, SUREST_LOGIT) + outcome.offset
        )
    probabilities = torch.where(best == -torch.inf, 0.0, probabilities)
    return at // named, tokens.flatten(1).gather(1, at), probabilities
