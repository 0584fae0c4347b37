"""One engine of the exactness run: the verifier's own, fed with blocks of all kinds, against answers that are known.

Run as `python -m loadtest.exact_engine PLAN`, a file of `Plan`. It starts while the answers are still being made, waits
for their file, and writes what it found to another. Exits are taken down as well: with `eager` the same blocks go through
an engine without graphs, and `loadtest.exact` compares what the exits of both foresaw.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest import mock

from services.verifier.engine import launch
from services.verifier.engine.engine import MOST_LOGPROBS, VllmEngine
from services.verifier.engine.types import BlockStatus, ExitReport
from services.verifier.settings import VerifierSettings
from shared.errors import EngineError
from shared.protocol import GenerationParams, Policy, Tokens
from shared.stack.server import within

KINDS: Final = ("right", "wrong", "short", "empty")
WAIT_S: Final = 600.0
LAST_HINTS_S: Final = 0.5
LEAST_MEMORY_SHARE: Final = 0.02
"""What vLLM on CUDA checks to be free; the KV cache has a size, since there are other engines beside this one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `prompts` are token ids; `truths` is a file of answers to them in order, `out` where findings go."""

    model: str
    dtype: str
    eager: bool
    prompts: tuple[Tokens, ...]
    sessions: tuple[int, ...]
    max_tokens: int
    max_block: int
    kv_cache_mb: int
    truths: str
    out: str

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file."""
        held = json.loads(path.read_text())
        return cls(
            **{**held, "prompts": tuple(map(tuple, held["prompts"])), "sessions": tuple(held["sessions"])}
        )

    def write(self, path: Path) -> None:
        """Put it into a file."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that is not vLLM's: the first token of it that is another, and by how much that one's logit lies below
    the right one's where both are among the likeliest (None elsewhere)."""

    prompt: int
    position: int
    expected: int | None
    found: int | None
    gap: float | None = None


@dataclass(slots=True)
class Found:
    """What so many sessions at a time gave."""

    sessions: int
    answers: int = 0
    tokens: int = 0
    blocks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    differences: list[Difference] = field(default_factory=list)


def block_for(truth: Tokens, base: int, longest: int, vocabulary: int, seed: str) -> tuple[str, Tokens]:
    """A block to follow `base` tokens of an answer, and its kind: the answer's own tokens, these with one that is another,
    fewer of them, or none. Which is the seed's choice, and the same wherever the seed is."""
    random = Random(seed)
    kind = random.choice(KINDS)
    right = truth[base : base + longest]
    if kind == "empty" or not right:
        return "empty", ()
    if kind == "short":
        return kind, right[: random.randrange(len(right))] or right[:1]
    if kind == "wrong":
        place = random.randrange(len(right))
        other = (right[place] + random.randrange(1, vocabulary)) % vocabulary
        return kind, (*right[:place], other, *right[place + 1 :])
    return kind, right


def first_difference(prompt: int, truth: Sequence[int], said: Sequence[int]) -> Difference | None:
    """Where an answer leaves the one that is right; None where it is the same."""
    for position in range(max(len(truth), len(said))):
        expected = truth[position] if position < len(truth) else None
        found = said[position] if position < len(said) else None
        if expected != found:
            return Difference(prompt, position, expected, found)
    return None


class Run:
    """An engine, the plan, and what its exits said."""

    def __init__(
        self, plan: Plan, engine: VllmEngine, vocabulary: int, truths: Sequence[Tokens], *, ahead: bool
    ) -> None:
        """`ahead`: the engine lets sessions go on by themselves."""
        self._plan = plan
        self._ahead = ahead
        self._engine = engine
        self._vocabulary = vocabulary
        self._truths = truths

    async def sessions(self, count: int) -> Found:
        """Every prompt, `count` at a time."""
        found = Found(count)
        waiting = iter(range(len(self._plan.prompts)))

        async def one_by_one() -> None:
            for prompt in waiting:
                said = await self._session(f"{count}.{prompt}", prompt, found.blocks)
                found.answers += 1
                found.tokens += len(said)
                difference = first_difference(prompt, self._truths[prompt], said)
                if difference is not None:
                    found.differences.append(difference)

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one_by_one())
        found.differences = [await self._with_gap(difference) for difference in found.differences]
        return found

    async def _session(self, name: str, prompt: int, blocks: dict[str, int]) -> Tokens:
        """An answer, block by block. `EngineError` when a block is not answered by exactly what it should.

        Every other prompt's session may go on by itself where the engine lets it: a block that comes late is stale then, and
        what is said next the answer. Its hints depend on when blocks come, and are not asked for.
        """
        by_itself = prompt % 2 == 1
        params = GenerationParams(
            max_tokens=self._plan.max_tokens,
            policy=Policy.LATENCY if by_itself else Policy.COST,
            unheard=by_itself,
        )
        fine = {BlockStatus.ARMED, BlockStatus.QUEUED}
        if by_itself and self._ahead:
            fine.add(BlockStatus.STALE)
        said: Tokens = ()
        async for output in self._engine.open(name, self._plan.prompts[prompt], (), params):
            said += output.tokens
            if output.finish_reason is not None:
                continue
            longest = min(self._plan.max_block, self._plan.max_tokens - len(said) - 1)
            kind, block = block_for(
                self._truths[prompt], len(said), max(longest, 0), self._vocabulary, f"{prompt}:{len(said)}"
            )
            blocks[kind] += 1
            alone = by_itself and self._ahead
            status = await self._engine.submit(name, len(said), block, alone=alone)
            if status not in fine:
                raise EngineError(f"session {name}: a block on {len(said)} tokens was {status}")
        return said

    async def _with_gap(self, difference: Difference) -> Difference:
        """The difference with the distance of the two tokens' logits after what both answers share."""
        before = (
            *self._plan.prompts[difference.prompt],
            *self._truths[difference.prompt][: difference.position],
        )
        if difference.expected is None or difference.found is None:
            return difference
        told = await self._engine.alone(before, GenerationParams(max_tokens=1, logprobs=MOST_LOGPROBS))
        likeliest = dict(told.logprobs[0].top) if told.logprobs else {}
        right, other = likeliest.get(difference.expected), likeliest.get(difference.found)
        gap = None if right is None or other is None else right - other
        return Difference(difference.prompt, difference.position, difference.expected, difference.found, gap)


@contextmanager
def adapted(kv_cache_mb: int, *, eager: bool = False) -> Iterator[None]:
    """Have the verifier start its engine with a KV cache of that size, on CUDA too, and without graphs if so asked."""
    real = launch.arguments

    def arguments(*given: Any, **named: Any) -> dict[str, Any]:
        found = real(*given, **named)
        found["kv_cache_memory_bytes"] = kv_cache_mb << 20
        if "gpu_memory_utilization" in found:
            found["gpu_memory_utilization"] = LEAST_MEMORY_SHARE
        if eager:
            found["enforce_eager"] = True
            found.pop("compilation_config", None)
        return found

    with mock.patch.object(launch, "arguments", arguments):
        yield


async def run(plan: Plan) -> None:
    """Start the engine, wait for the answers, run, write what was found."""
    settings = VerifierSettings.model_validate(
        {
            "model": plan.model,
            "dtype": plan.dtype,
            "max_block": plan.max_block,
            "max_sessions": max(plan.sessions),
        }
    )
    reports: list[ExitReport] = []
    engine = VllmEngine(settings)
    with adapted(plan.kv_cache_mb, eager=plan.eager):
        info = await engine.start(reports.append)
    try:
        print("ready", flush=True)
        truths = await asyncio.to_thread(answers, Path(plan.truths))
        ahead = launch.floor_ahead(settings, drafts=info.own_drafts) > 0
        run = Run(plan, engine, info.vocab_size, truths, ahead=ahead)
        found = [await run.sessions(count) for count in plan.sessions]
        await asyncio.sleep(LAST_HINTS_S)
    finally:
        await engine.stop()
    written = Path(plan.out)
    beside = written.with_suffix(".new")
    beside.write_text(
        json.dumps(
            {
                "dtype": info.dtype,
                "exit_layers": info.exit_layers,
                "exits": info.exits,
                "notes": info.notes,
                "runs": [asdict(one) for one in found],
                "reports": [
                    [
                        one.session,
                        one.base,
                        one.layer,
                        [[o.accepted, o.next_token, o.confidence] for o in one.outcomes],
                    ]
                    for one in reports
                ],
            }
        )
    )
    beside.replace(written)


def answers(path: Path) -> list[Tokens]:
    """The answers in a file that may not be there yet; blocks. `EngineError` when it does not come."""
    if not within(path.exists, WAIT_S):
        raise EngineError(f"vLLM's own answers did not come within {WAIT_S:.0f} s")
    return [tuple(one) for one in json.loads(path.read_text())]


def main() -> int:
    """Run the plan named; the exit status."""
    asyncio.run(run(Plan.read(Path(sys.argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
