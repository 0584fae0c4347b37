"""What sampling parameters do to logits is what they do in vLLM: compared with its own functions, in its sampler's order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared.protocol import Sampling
from shared.sampling.logits import Vocabulary, best, processed
from shared.sampling.rules import Row, Rules

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

VOCABULARY = 5000
PROMPT = 12
STOPS = (2, 7)

CASES: dict[str, dict[str, Any]] = {
    "nothing": {"temperature": 1.0},
    "temperature": {"temperature": 0.7},
    "very low temperature": {"temperature": 0.001},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "small top_p": {"temperature": 1.3, "top_p": 0.05},
    "top_k": {"temperature": 0.8, "top_k": 40},
    "top_k of one": {"temperature": 0.8, "top_k": 1},
    "top_k of all": {"temperature": 0.8, "top_k": 2 * VOCABULARY},
    "min_p": {"temperature": 1.0, "min_p": 0.02},
    "all truncations": {"temperature": 1.1, "min_p": 0.001, "top_k": 80, "top_p": 0.95},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.3},
    "repetition below one": {"temperature": 1.0, "repetition_penalty": 0.8},
    "presence": {"temperature": 1.0, "presence_penalty": 0.7},
    "frequency": {"temperature": 1.0, "frequency_penalty": -0.4},
    "bias": {"temperature": 1.0, "logit_bias": ((3, 4.5), (4000, -100.0), (7, 2.0))},
    "min_tokens": {"temperature": 1.0, "min_tokens": 30},
    "min_tokens reached": {"temperature": 1.0, "min_tokens": 8},
    "greedy with penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "min_tokens": 30},
    "everything": {
        "temperature": 0.9,
        "min_p": 0.0005,
        "top_k": 300,
        "top_p": 0.97,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": ((3, 2.5), (2, 5.0)),
        "min_tokens": 30,
    },
}


def vllms(logits: torch.Tensor, sampling: Sampling, prompt: list[int], output: list[int]) -> torch.Tensor:
    """What vLLM's sampler makes of a batch of one."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import (
        LogitBiasLogitsProcessor,
        MinPLogitsProcessor,
        MinTokensLogitsProcessor,
    )
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.sample.sampler import Sampler

    params = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        min_tokens=sampling.min_tokens,
        max_tokens=100,
        stop_token_ids=list(STOPS),
    )
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1))
    device = torch.device("cpu")
    processors = LogitsProcessors(
        kind(config, device, False)
        for kind in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)
    )
    for processor in processors.all:
        processor.update_state(BatchUpdate(1, [], [(0, params, prompt, output)], []))

    def column(value: float) -> torch.Tensor:
        return torch.tensor([value])

    metadata = SamplingMetadata(
        temperature=column(params.temperature),
        all_greedy=params.temperature == 0,
        all_random=params.temperature > 0,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=False,
        prompt_token_ids=torch.tensor([prompt]),
        frequency_penalties=column(params.frequency_penalty),
        presence_penalties=column(params.presence_penalty),
        repetition_penalties=column(params.repetition_penalty),
        output_token_ids=[output],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=processors,
    )
    found = Sampler().apply_logits_processors(logits.clone()[None], metadata, False)
    if params.temperature == 0:
        return found[0]
    found = Sampler.apply_temperature(found, metadata.temperature, True)
    for processor in processors.argmax_invariant:
        found = processor.apply(found)
    k = torch.tensor([min(params.top_k, VOCABULARY)]) if params.top_k > 0 else None
    p = column(params.top_p) if params.top_p < 1 else None
    return apply_top_k_top_p_pytorch(found, k, p)[0]


def row_for(sampling: Sampling, output: int, seed: int) -> tuple[torch.Tensor, Row]:
    """Logits like a model's, a few tokens ahead of the others, and what stands before them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.5, VOCABULARY).astype(np.float32)
    logits[rng.integers(VOCABULARY, size=8)] += 8
    text = [*rng.integers(VOCABULARY, size=PROMPT), *rng.choice([3, 9, 9, 100, 4000], size=output)]
    logits[[int(token) for token in text]] += 3
    return torch.from_numpy(logits), Row(Rules(sampling, PROMPT, STOPS), tuple(int(token) for token in text))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_processed_logits_are_vllms(name: str, seed: int) -> None:
    sampling = Sampling(**CASES[name])
    logits, row = row_for(sampling, output=10, seed=seed)
    text = list(row.tokens)
    theirs = vllms(logits, sampling, text[:PROMPT], text[PROMPT:])
    ours = processed(logits.numpy(), row)
    assert np.array_equal(np.isneginf(ours), np.isneginf(theirs.numpy()))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_reduced_vocabulary_is_processed_alike(name: str) -> None:
    """Where truncation does not see the tokens that are missing, that is."""
    sampling = Sampling(**CASES[name])
    logits, row = row_for(sampling, output=10, seed=9)
    whole = processed(logits.numpy(), row)
    ids = np.random.default_rng(0).permutation(np.flatnonzero(np.isfinite(whole)))
    half = len(ids) // 2
    vocabulary = Vocabulary(ids[:half]).with_more(ids[half:])
    ours = processed(logits.numpy()[ids], row, vocabulary)
    if sampling.top_p == 1.0:  # a share of what is left is another share
        np.testing.assert_array_equal(ours, whole[ids])
    plenty = best(logits.numpy()[None], [row], 3)
    few = best(logits.numpy()[ids][None], [row], 3, vocabulary)
    wanted = np.isfinite(plenty.values[0])
    if sampling.top_p == 1.0:
        assert np.array_equal(vocabulary.ids[few.columns[0]][wanted], plenty.columns[0][wanted])
