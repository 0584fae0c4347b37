"""Ratio mode in the engine: a block's outcome is the one that the rule gives for the target's logits, whatever else runs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import torch

from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.types import BlockStatus
from shared.errors import InvalidRequest
from shared.protocol import GenerationParams, Policy, Sampling, SamplingMode, Tokens
from shared.sampling.ratio import draft_token, judge
from shared.sampling.rules import Row, Rules
from shared.sampling.sparse import SparseRow, top
from tests.integration.engine_bench import Bench, next_output, settings_for
from tests.integration.tiny_target import VOCABULARY, TinyTarget, random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

LENGTH = 16
KINDS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.9},
    "nucleus": {"temperature": 0.8, "top_p": 0.9},
    "penalised": {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "top_k": 40},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tiny_target: TinyTarget) -> AsyncIterator[Bench]:
    async with Bench.over(VllmEngine(settings_for(tiny_target))) as bench:
        yield bench


def params(seed: int, **changes: Any) -> GenerationParams:
    sampling = Sampling(**{"temperature": 0.9, "mode": SamplingMode.RATIO, "seed": seed, **changes})
    return GenerationParams(max_tokens=LENGTH, ignore_eos=True, policy=Policy.COST, sampling=sampling)


class Account:
    """What should be said: the target as transformers runs it, and a draft that sees its logits dimly."""

    def __init__(self, target: TinyTarget) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(target.directory).eval()
        self._eos = target.eos

    @torch.inference_mode()
    def logits(self, text: Tokens) -> npt.NDArray[np.float32]:
        """After each token of a text."""
        found: npt.NDArray[np.float32] = self._model(torch.tensor([text])).logits[0].float().numpy()
        return found

    def rules(self, prompt: Tokens, asked: GenerationParams) -> Rules:
        return Rules(asked.sampling, len(prompt), (self._eos,))

    def said(
        self, rules: Rules, text: Tokens, block: Tokens = (), drawn_from: tuple[SparseRow, ...] = ()
    ) -> Tokens:
        """What a block on a text is answered with."""
        logits = self.logits((*text, *block))[len(text) - 1 :]
        rows = [Row(rules, (*text, *block[:length])) for length in range(len(block) + 1)]
        accepted, next_token = judge(lambda row: logits[row], rows, block, drawn_from)
        return (*block[:accepted], next_token)

    def drafted(
        self, rules: Rules, text: Tokens, length: int, dimness: float = 1.0
    ) -> tuple[Tokens, tuple[SparseRow, ...]]:
        """A block, and what its tokens were drawn from."""
        noise = np.random.default_rng(len(text))
        tokens: list[int] = []
        rows: list[SparseRow] = []
        for _ in range(length):
            context = (*text, *tokens)
            logits = self.logits(context)[-1] + dimness * noise.standard_normal(VOCABULARY)
            drawn = draft_token(
                logits.astype(np.float32), Row(rules, context), None, lambda found: top(found, 12)
            )
            tokens.append(drawn.token)
            rows.append(drawn.row)
        return tuple(tokens), tuple(rows)


@pytest.fixture(scope="module")
def account(tiny_target: TinyTarget) -> Account:
    return Account(tiny_target)


async def played(
    bench: Bench, account: Account, session: str, prompt: Tokens, asked: GenerationParams
) -> list[int]:
    """A whole answer, every round compared with the account; how many tokens each block was accepted."""
    rules = account.rules(prompt, asked)
    stream = bench.engine.open(session, prompt, (), asked)
    out = (await next_output(stream)).tokens
    assert out == account.said(rules, prompt)
    accepted = []
    chance = random.Random(session)
    while len(out) < LENGTH:
        text = (*prompt, *out)
        block, rows = account.drafted(rules, text, min(chance.randint(0, 4), LENGTH - len(out) - 1))
        assert await bench.engine.submit(session, len(out), block, (), rows) is BlockStatus.ARMED
        said = (await next_output(stream)).tokens
        assert said == account.said(rules, text, block, rows)
        accepted.append(len(said) - 1)
        out += said
    return accepted


@pytest.mark.parametrize("kind", KINDS)
async def test_blocks_are_judged_by_the_ratio_of_the_targets_probabilities(
    bench: Bench, account: Account, kind: str
) -> None:
    accepted: list[int] = []
    for seed in range(6):
        accepted += await played(
            bench, account, f"{kind}-{seed}", random_prompt(seed, 14), params(seed, **KINDS[kind])
        )
    assert max(accepted) >= 2, "nothing is accepted: the rule was not tried"


async def test_sessions_in_ratio_mode_share_passes(bench: Bench, account: Account) -> None:
    kinds = list(KINDS.values())
    before = await bench.engine.stats()
    await asyncio.gather(
        *(
            played(bench, account, f"many-{n}", random_prompt(40 + n, 9 + n), params(n, **kinds[n % 3]))
            for n in range(8)
        )
    )
    after = await bench.engine.stats()
    assert after.steps - before.steps < after.blocks - before.blocks, "sessions are not batched"


async def test_tokens_that_were_not_drawn_are_judged_as_certain(bench: Bench, account: Account) -> None:
    prompt, asked = random_prompt(60, 12), params(9, temperature=0.3)
    rules = account.rules(prompt, asked)
    stream = bench.engine.open("certain", prompt, (), asked)
    out = (await next_output(stream)).tokens
    text = (*prompt, *out)
    block = tuple(int(token) for token in account.logits(text)[-1].argsort()[-1:])
    await bench.engine.submit("certain", 1, block)
    assert (await next_output(stream)).tokens == account.said(rules, text, block)
    await bench.engine.close("certain")


async def test_what_a_late_blocks_tokens_were_drawn_from_is_trimmed_with_them(
    bench: Bench, account: Account
) -> None:
    tried = 0
    for seed in range(12):
        prompt, asked = random_prompt(70 + seed, 12), params(seed, temperature=0.4)
        rules, session = account.rules(prompt, asked), f"late-{seed}"
        stream = bench.engine.open(session, prompt, (), asked)
        out = (await next_output(stream)).tokens
        block, rows = account.drafted(rules, (*prompt, *out), 4, dimness=0.2)
        await bench.engine.submit(session, len(out), ())
        out += (await next_output(stream)).tokens  # the target goes on by itself
        status = await bench.engine.submit(session, 1, block, (), rows)
        assert (status is BlockStatus.ARMED) == (out[1] == block[0])
        if status is BlockStatus.ARMED:
            tried += 1
            said = (await next_output(stream)).tokens
            assert said == account.said(rules, (*prompt, *out), block[1:], rows[1:])
        await bench.engine.close(session)
    assert tried, "no late block agreed with what was said meanwhile"


async def test_a_distribution_that_is_none_of_the_targets_is_refused(bench: Bench) -> None:
    stream = bench.engine.open("bad", random_prompt(90, 12), (), params(1))
    await next_output(stream)
    with pytest.raises(InvalidRequest, match=f"token {VOCABULARY}; the target's vocabulary"):
        await bench.engine.submit("bad", 1, (1,), (), (SparseRow((1, VOCABULARY), (3, 5)),))
    with pytest.raises(InvalidRequest, match="1 tokens, drawn from 2 distributions"):
        await bench.engine.submit("bad", 1, (1,), (), (SparseRow.certain(1), SparseRow.certain(1)))
    await bench.engine.close("bad")
