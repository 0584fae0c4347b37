"""Sampling in the engine: whatever is drafted, batched, restored or preempted, a session says what its seed says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.types import EngineOutput
from shared.errors import InvalidRequest
from shared.protocol import GenerationParams, Policy, Sampling, Tokens
from shared.sampling.logits import draw
from shared.sampling.rules import Row, Rules
from tests.integration.engine_bench import (
    DRAFTERS,
    Bench,
    always_right,
    next_output,
    partly_right,
    read_until,
    settings_for,
)
from tests.integration.tiny_target import VOCABULARY, TinyTarget, random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

LENGTH = 24
KINDS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "nucleus": {"temperature": 0.7, "top_p": 0.9},
    "truncated": {"temperature": 1.2, "top_k": 30, "min_p": 0.01},
    "penalised": {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "greedy, penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    "biased": {"temperature": 0.8, "logit_bias": ((77, 6.0), (78, 6.0))},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tiny_target: TinyTarget) -> AsyncIterator[Bench]:
    async with Bench.over(VllmEngine(settings_for(tiny_target))) as bench:
        yield bench


def sampled(seed: int = 0, length: int = LENGTH, **changes: Any) -> GenerationParams:
    sampling = Sampling(**{"temperature": 1.0, **changes}, seed=seed)
    return GenerationParams(max_tokens=length, ignore_eos=True, policy=Policy.COST, sampling=sampling)


class Alone:
    """The target as transformers runs it, drawn from by hand: an independent account of what should be said."""

    def __init__(self, target: TinyTarget) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(target.directory).eval()
        self._eos = target.eos

    @torch.inference_mode()
    def answer(self, prompt: Tokens, params: GenerationParams) -> tuple[Tokens, list[np.ndarray]]:
        text, logits = list(prompt), []
        for _ in range(params.max_tokens):
            row = self._model(torch.tensor([text])).logits[0, -1].float().numpy()
            rules = Rules(params.sampling, len(prompt), (*params.stop_token_ids, self._eos))
            logits.append(row)
            text.append(int(draw(row[None], [Row(rules, tuple(text))])[0]))
        return tuple(text[len(prompt) :]), logits


@pytest.fixture(scope="module")
def alone(tiny_target: TinyTarget) -> Alone:
    return Alone(tiny_target)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_target_by_itself_says_what_is_drawn_from_its_logits(
    bench: Bench, alone: Alone, kind: str
) -> None:
    prompt, params = random_prompt(21, 15), sampled(5, **KINDS[kind])
    truth, _ = alone.answer(prompt, params)
    assert (await bench.answer(prompt, params)).tokens == truth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", DRAFTERS)
async def test_a_session_says_what_the_target_says_by_itself(bench: Bench, drafter: str, kind: str) -> None:
    prompt, params = random_prompt(22, 15), sampled(6, **KINDS[kind])
    truth = await bench.answer(prompt, params)
    assert await bench.speculate("one", prompt, truth.tokens, params, DRAFTERS[drafter]) == truth


async def test_seeds_choices_and_positions_matter(bench: Bench) -> None:
    prompt = random_prompt(23, 15)
    said = [
        (await bench.answer(prompt, params)).tokens
        for params in (sampled(1), sampled(2), sampled(1, choice=1), sampled(1), sampled(1, temperature=0.0))
    ]
    assert said[0] == said[3]
    assert len({*said}) == 4


async def test_sixteen_sessions_sampled_and_greedy_share_passes_and_are_exact(bench: Bench) -> None:
    kinds = [*KINDS.values(), {"temperature": 0.0}]
    params = [sampled(n, **kinds[n % len(kinds)]) for n in range(16)]
    prompts = [random_prompt(200 + n, 8 + n) for n in range(16)]
    truths = [await bench.answer(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    before = await bench.engine.stats()
    drafters = list(DRAFTERS.values())
    found = await asyncio.gather(
        *(
            bench.speculate(f"s{n}", prompts[n], truths[n].tokens, params[n], drafters[n % len(drafters)], n)
            for n in range(16)
        )
    )
    after = await bench.engine.stats()
    assert found == truths
    assert after.steps - before.steps < after.blocks - before.blocks, "sessions are not batched"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("committed", [1, 7, 20])
async def test_a_session_restored_in_mid_answer_goes_on_with_the_same_tokens(
    bench: Bench, kind: str, committed: int
) -> None:
    prompt, params = random_prompt(24, 15), sampled(7, **KINDS[kind])
    truth = (await bench.answer(prompt, params)).tokens
    stream = bench.engine.open("again", prompt, truth[:committed], params)
    out = truth[:committed] + (await next_output(stream)).tokens
    while len(out) < LENGTH:
        await bench.engine.submit("again", len(out), truth[len(out) :][:3])
        out += (await next_output(stream)).tokens
    assert out == truth


def replace_temperature(params: GenerationParams, temperature: float) -> GenerationParams:
    return params.model_copy(
        update={"sampling": params.sampling.model_copy(update={"temperature": temperature})}
    )


async def test_min_tokens_keeps_the_end_away_and_no_longer(bench: Bench, tiny_target: TinyTarget) -> None:
    end = len(tiny_target.answer)
    plain = GenerationParams(max_tokens=64)
    assert (await bench.answer(tiny_target.prompt, plain)).tokens == tiny_target.answer
    for least, ends in ((end - 1, True), (end, False)):
        params = plain.model_copy(update={"sampling": Sampling(min_tokens=least)})
        truth = await bench.answer(tiny_target.prompt, params)
        assert (truth.tokens == tiny_target.answer) is ends
        assert truth.tokens[: end - 1] == tiny_target.answer[:-1]
        found = await bench.speculate("least", tiny_target.prompt, truth.tokens, params, always_right)
        assert found == truth


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_log_probabilities_are_those_of_the_raw_logits(
    bench: Bench, alone: Alone, temperature: float
) -> None:
    prompt = random_prompt(26, 15)
    params = sampled(9, temperature=temperature, repetition_penalty=1.2).model_copy(update={"logprobs": 3})
    truth, logits = alone.answer(prompt, params)
    by_itself = await bench.answer(prompt, params)
    in_blocks = await told_in_blocks(bench, prompt, params, truth)
    for output in (by_itself, in_blocks):
        assert output.tokens == truth
        assert len(output.logprobs) == len(truth)
        for token, told, row in zip(truth, output.logprobs, logits, strict=True):
            wanted = torch.from_numpy(row).log_softmax(dim=-1)
            assert told.logprob == pytest.approx(float(wanted[token]), abs=1e-3)
            assert told.rank == int((wanted > wanted[token]).sum()) + 1
            best = wanted.topk(3)
            assert [other for other, _ in told.top] == best.indices.tolist()
            assert [logprob for _, logprob in told.top] == pytest.approx(best.values.tolist(), abs=1e-3)


async def told_in_blocks(
    bench: Bench, prompt: Tokens, params: GenerationParams, truth: Tokens
) -> EngineOutput:
    """The same said by a session, beside one that wants no log-probabilities."""
    beside = bench.engine.open(
        "beside", prompt, (), replace_temperature(params, 0.5).model_copy(update={"logprobs": None})
    )
    assert (await next_output(beside)).logprobs == ()
    stream = bench.engine.open("told", prompt, (), params)
    said = await next_output(stream)
    tokens, logprobs = said.tokens, said.logprobs
    while said.finish_reason is None:
        block = list(truth[len(tokens) :][:4])
        if len(block) > 2 and len(tokens) % 2:
            block[2] = (block[2] + 1) % VOCABULARY
        await asyncio.gather(
            bench.engine.submit("beside", 1, (5, 6)), bench.engine.submit("told", len(tokens), tuple(block))
        )
        said = await next_output(stream)
        tokens, logprobs = tokens + said.tokens, logprobs + said.logprobs
    await bench.engine.close("beside")
    return EngineOutput(tokens, said.finish_reason, logprobs)


async def test_no_log_probabilities_but_the_token_s_own_when_none_more_are_asked_for(bench: Bench) -> None:
    params = sampled(3, length=4).model_copy(update={"logprobs": 0})
    told = await bench.answer(random_prompt(27, 15), params)
    assert [each.top for each in told.logprobs] == [()] * 4
    assert (await bench.answer(random_prompt(27, 15), sampled(3, length=4))).logprobs == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": 21}, "logprobs of 21 tokens are asked for; at most 20"),
        ({"sampling": Sampling(logit_bias=((VOCABULARY, 1.0),))}, "logit_bias holds token 512"),
    ],
)
async def test_what_can_t_be_done_is_refused(bench: Bench, changes: dict[str, Any], message: str) -> None:
    params = sampled(1).model_copy(update=changes)
    with pytest.raises(InvalidRequest, match=message):
        bench.engine.open("refused", (1, 2, 3), (), params)


async def test_a_sampled_session_under_way_does_not_disturb_a_greedy_one(bench: Bench) -> None:
    prompt, params = random_prompt(28, 15), sampled(1, temperature=0.0)
    truth = await bench.answer(prompt, params)
    other = bench.engine.open("other", random_prompt(29, 15), (), sampled(2))
    found = await asyncio.gather(
        bench.speculate("greedy", prompt, truth.tokens, params, partly_right), read_until(other, 1)
    )
    assert found[0] == truth
    await bench.engine.close("other")
