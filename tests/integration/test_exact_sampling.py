"""The promise where tokens are drawn at random: speculation says what the target alone says with the same seed.

The target that ships, its pair's draft and prompt lookup, real prompts; below the API, so that 400 answers take a minute.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from services.draft_gateway.drafting import DraftRequest, load_draft_engine
from services.draft_gateway.drafting.engine import DraftEngine
from services.draft_gateway.drafting.lookup import PromptLookup
from services.draft_gateway.settings import GatewaySettings
from services.verifier.engine.engine import VllmEngine
from services.verifier.engine.types import BlockStatus, EngineOutput, ExitReport
from services.verifier.settings import VerifierSettings
from shared.errors import InvalidRequest
from shared.protocol import FinishReason, GenerationParams, Sampling, Tokens
from shared.sampling.rules import Rules
from shared.text import Tokenizer
from tests.prompts import real_prompts

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

SEEDS = 50
PROMPT_TOKENS = 16
MAX_TOKENS = 8
BLOCK = 3
AT_A_TIME = 16
DEADLINE_S = 120.0
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}


@dataclass
class Case:
    """An answer that is asked for, and what was said."""

    name: str
    prompt: Tokens
    params: GenerationParams
    draft: str
    said: Tokens = ()


@dataclass
class Bench:
    """Engine and drafts, and how the drafts have fared."""

    engine: VllmEngine
    drafts: dict[str, DraftEngine]
    prompts: list[Tokens]
    stops: tuple[int, ...]
    reports: list[ExitReport]
    rounds: Counter[str] = field(default_factory=Counter)
    agreed: Counter[str] = field(default_factory=Counter)
    """Rounds whose first drafted token was accepted."""

    def cases(self, temperature: float, top_p: float, *, penalised: bool) -> list[Case]:
        """One for each seed, the drafts taking turns."""
        return [
            Case(
                f"{draft}, temperature {temperature}, top_p {top_p}, seed {seed}",
                self.prompts[seed % len(self.prompts)],
                GenerationParams(
                    max_tokens=MAX_TOKENS,
                    sampling=Sampling(
                        seed=seed * 7919,
                        temperature=temperature,
                        top_p=top_p,
                        **(PENALTIES if penalised else {}),
                    ),
                ),
                draft,
            )
            for seed in range(SEEDS)
            for draft in ("pair" if seed % 3 else "lookup",)
        ]

    async def truths(self, cases: list[Case]) -> list[EngineOutput]:
        return list(await asyncio.gather(*(self.engine.alone(case.prompt, case.params) for case in cases)))

    async def speculate(self, cases: list[Case], *, at_a_time: int) -> list[EngineOutput]:
        """All cases as sessions, so many at a time, all their drafts one batch a round."""
        found: list[EngineOutput] = []
        for start in range(0, len(cases), at_a_time):
            found += await self._together(cases[start : start + at_a_time])
        return found

    async def _together(self, cases: list[Case]) -> list[EngineOutput]:
        streams = [self.engine.open(case.name, case.prompt, (), case.params) for case in cases]
        outputs = list(
            await asyncio.gather(*(asyncio.wait_for(anext(stream), DEADLINE_S) for stream in streams))
        )
        for case, output in zip(cases, outputs, strict=True):
            case.said = output.tokens
        while going := [n for n, output in enumerate(outputs) if output.finish_reason is None]:
            blocks = self._draft([cases[n] for n in going])
            submitted = await asyncio.gather(
                *(
                    self.engine.submit(cases[n].name, len(cases[n].said), block)
                    for n, block in zip(going, blocks, strict=True)
                )
            )
            assert {*submitted} <= {BlockStatus.ARMED, BlockStatus.QUEUED}
            for n, block in zip(going, blocks, strict=True):
                outputs[n] = await asyncio.wait_for(anext(streams[n]), DEADLINE_S)
                case = cases[n]
                case.said += outputs[n].tokens
                if block:
                    self.rounds[case.draft] += 1
                    self.agreed[case.draft] += outputs[n].tokens[0] == block[0]
        for case in cases:
            await self.engine.close(case.name)
            for draft in self.drafts.values():
                draft.forget(case.name)
        return [
            EngineOutput(case.said, output.finish_reason) for case, output in zip(cases, outputs, strict=True)
        ]

    def _draft(self, cases: list[Case]) -> list[Tokens]:
        blocks: dict[str, Tokens] = {}
        for name, draft in self.drafts.items():
            requests = [
                DraftRequest(
                    case.name,
                    0,
                    (*case.prompt, *case.said),
                    min(BLOCK, case.params.max_tokens - len(case.said)),
                    rules=Rules(case.params.sampling, len(case.prompt), self.stops),
                )
                for case in cases
                if case.draft == name
            ]
            drafted = draft.draft(requests)
            blocks.update(
                (request.session, each.tokens) for request, each in zip(requests, drafted, strict=True)
            )
        return [blocks[case.name] for case in cases]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(target_model: Path) -> AsyncIterator[Bench]:
    tokenizer = Tokenizer.load(target_model)
    prompts = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in real_prompts(10)]
    settings = VerifierSettings(
        model=str(target_model), max_sessions=2 * AT_A_TIME, max_model_len=256, max_block=BLOCK
    )
    engine = VllmEngine(settings)
    reports: list[ExitReport] = []
    await engine.start(reports.append)
    drafts: dict[str, DraftEngine] = {
        "pair": load_draft_engine(GatewaySettings(model=str(target_model))).engine,
        "lookup": PromptLookup(),
    }
    try:
        yield Bench(engine, drafts, prompts, tuple(sorted(tokenizer.stop_tokens)), reports)
    finally:
        await engine.stop()


@pytest.mark.parametrize("penalised", [False, True], ids=["plain", "penalised"])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
async def test_sixteen_sessions_at_a_time_say_what_the_target_alone_says_with_the_same_seed(
    bench: Bench, temperature: float, top_p: float, penalised: bool
) -> None:
    cases = bench.cases(temperature, top_p, penalised=penalised)
    bench.rounds.clear()
    bench.agreed.clear()
    truths = await bench.truths(cases)
    found = await bench.speculate(cases, at_a_time=AT_A_TIME)
    for case, said, truth in zip(cases, found, truths, strict=True):
        assert said == truth, case.name
    for draft, rounds in bench.rounds.items():
        print(
            f"\ntemperature {temperature}, top_p {top_p}, {draft}: the first drafted token was accepted in "
            f"{bench.agreed[draft]} of {rounds} rounds"
        )


async def test_one_session_at_a_time_says_the_same(bench: Bench) -> None:
    cases = bench.cases(1.0, 0.9, penalised=True)[:8] + bench.cases(0.7, 1.0, penalised=False)[8:16]
    assert await bench.speculate(cases, at_a_time=1) == await bench.truths(cases)


async def test_hints_foresee_the_draw(bench: Bench) -> None:
    """An exit that heard of the noise names the verdict among its outcomes far more often than chance has it."""
    cases = bench.cases(1.0, 1.0, penalised=False)[:32]
    bench.reports.clear()
    truths = await bench.speculate(cases, at_a_time=AT_A_TIME)
    said = {case.name: truth.tokens for case, truth in zip(cases, truths, strict=True)}
    last = max(report.layer for report in bench.reports)
    named = [
        any(
            said[report.session][report.base + outcome.accepted :][:1] == (outcome.next_token,)
            for outcome in report.outcomes
        )
        for report in bench.reports
        if report.layer == last
    ]
    print(f"\nthe verdict is among the hint after layer {last} in {sum(named)} of {len(named)} passes")
    assert sum(named) > 0.6 * len(named)


# --- answers that have to be JSON -------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def json_cases(bench: Bench, count: int) -> list[Case]:
    """Sampled and greedy, penalised too, with both drafts."""
    return [
        Case(
            f"json {n}",
            bench.prompts[n % len(bench.prompts)],
            GenerationParams(
                max_tokens=60,
                json_schema=json.dumps(SCHEMA),
                sampling=Sampling(
                    temperature=(0.0, 0.8, 1.2)[n % 3], seed=n, top_p=0.95, **(PENALTIES if n % 2 else {})
                ),
            ),
            ("pair", "lookup")[n % 2],
        )
        for n in range(count)
    ]


def assert_satisfies(answer: dict[str, object]) -> None:
    assert set(answer) == {"name", "age", "tags"}
    name, age, tags = answer["name"], answer["age"], answer["tags"]
    assert isinstance(name, str) and len(name) <= 10
    assert isinstance(age, int) and 1 <= age <= 120
    assert isinstance(tags, list) and 1 <= len(tags) <= 2 and set(tags) <= {"red", "green", "blue"}


async def test_answers_that_have_to_be_json_are_and_speculation_changes_nothing(
    bench: Bench, target_model: Path
) -> None:
    tokenizer = Tokenizer.load(target_model)
    cases = json_cases(bench, 8)
    truths = await bench.truths(cases)
    assert await bench.speculate(cases, at_a_time=AT_A_TIME) == truths
    ended = [truth for truth in truths if truth.finish_reason is FinishReason.STOP]
    assert len(ended) >= 4, "most answers should be complete"
    for truth in ended:
        assert_satisfies(json.loads(tokenizer.decode(truth.tokens[:-1])))


async def test_a_json_answer_restored_in_mid_answer_goes_on_with_the_same_tokens(bench: Bench) -> None:
    for case in json_cases(bench, 3):
        truth = await bench.engine.alone(case.prompt, case.params)
        committed = truth.tokens[:9]
        said = committed
        async for output in bench.engine.open(case.name, case.prompt, committed, case.params):
            said += output.tokens
            if output.finish_reason is None:
                await bench.engine.submit(case.name, len(said), truth.tokens[len(said) :][:2])
        assert said == truth.tokens


async def test_any_object_will_do_where_no_schema_is_given(bench: Bench, target_model: Path) -> None:
    params = GenerationParams(max_tokens=40, json_schema="{}", sampling=Sampling(temperature=0.7, seed=1))
    said = await bench.engine.alone(bench.prompts[0], params)
    assert Tokenizer.load(target_model).decode(said.tokens).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "the JSON schema is no JSON"),
        ("[1]", "the JSON schema is list; it should be an object"),
        ('{"type": "integer", "multipleOf": 3}', "no grammar can be made of the JSON schema"),
        ('{"type": "nonsense"}', "no grammar can be made of the JSON schema"),
    ],
)
async def test_a_schema_that_can_t_be_served_is_refused(bench: Bench, schema: str, message: str) -> None:
    params = GenerationParams(max_tokens=4, json_schema=schema)
    with pytest.raises(InvalidRequest, match=message):
        bench.engine.open("refused", (1, 2, 3), (), params)
