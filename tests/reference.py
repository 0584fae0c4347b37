"""The distribution that a target's tokens should have, written out token by token: another hand's reading of vLLM's
documentation, to test samplers against."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.protocol import Sampling

Floats = npt.NDArray[Any]


def shares(logits: Floats, sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...]) -> Floats:
    """Probabilities after bias and penalties, temperature, then truncation; tokens 2 and 5 end a sequence."""
    values = logits.astype(np.float64).copy()
    for token in range(len(values)):
        if len(output) < sampling.min_tokens and token in (2, 5):
            values[token] = -np.inf
        values[token] += dict(sampling.logit_bias).get(token, 0.0)
        if token in prompt or token in output:
            factor = sampling.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= sampling.frequency_penalty * output.count(token)
        values[token] -= sampling.presence_penalty * (token in output)
    p = np.exp(values / sampling.temperature)
    p /= p.sum()
    p[p < sampling.min_p * p.max()] = 0
    if sampling.top_k:
        p[p < np.sort(p)[-sampling.top_k]] = 0
    p /= p.sum()
    before = 0.0
    for token in np.argsort(-p, kind="stable"):
        p[token], before = (p[token] if before < sampling.top_p else 0.0), before + p[token]
    return p / p.sum()
