"""The verifier's process and the engine's with a way between them: whatever is told, computed and heard in which order,
each session comes to its end.

The front-end and the scheduler are the real ones; the target is the test's, and so is when a message arrives.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from services.verifier.engine.checkpoint import Checkpoint
from services.verifier.engine.engine import VllmEngine, _State
from services.verifier.engine.types import BlockStatus, EngineInfo
from shared.protocol import GenerationParams, Policy
from tests.integration.bare_scheduler import WORDS, Client, Made, bare_schedulers, truth
from tests.integration.engine_bench import (
    MAX_MODEL_LEN,
    Drafter,
    always_right,
    nothing,
    partly_right,
    random_tokens,
    settings_for,
)
from tests.integration.tiny_target import TinyTarget

SESSIONS = 8
LENGTH = 30
AHEAD = 4
ROOM = 400
PASSES: Final[dict[str, dict[str, Any]]] = {
    "as they are": {},
    "uniform": {"uniform": True},
    "early": {"uniform": True, "early": True},
    "prompts beside blocks": {"uniform": True, "early": True, "prompt_places": 4},
}
SEEDS = 12
LEAVING = 0.01
"""How likely a client leaves instead of submitting a block."""
MOST_EVENTS: Final = 20_000
TURNS: Final = 12
"""Of the event loop, after which everybody has done what there is to do."""

DRAFTERS: Final = (nothing, always_right, random_tokens, partly_right)

pytestmark = [pytest.mark.engine, pytest.mark.asyncio, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def made(tiny_target: TinyTarget) -> Iterator[Made]:
    with bare_schedulers(tiny_target) as made:
        yield made


class Between:
    """In place of `EngineClient`: what is on its way to the scheduler and back, until the test lets it arrive.

    Calls arrive in their order, outputs in theirs, and so does what calls return; none of the three waits for another.
    """

    def __init__(self, scheduler: Client, random: Random) -> None:
        self._scheduler, self._random = scheduler, random
        self._collectors: dict[str, Any] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._outputs: deque[Any] = deque()
        self._returns: deque[Callable[[], None]] = deque()
        self._pauses: list[asyncio.Future[None]] = []

    async def add_request(self, key: str, prompt: Any, sampling: Any) -> Any:
        from vllm.v1.engine.output_processor import RequestOutputCollector

        tokens = list(prompt["prompt_token_ids"])
        self._collectors[key] = RequestOutputCollector(sampling.output_kind, key)
        self._calls.append(lambda: self._scheduler.add(key, tokens, sampling))
        return self._collectors[key]

    def submit_block(self, *block: Any) -> asyncio.Future[str]:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def submit() -> None:
            status = str(self._scheduler.scheduler.submit_block(*block))
            self._returns.append(lambda: answer.set_result(status))

        self._calls.append(submit)
        return answer

    async def abort(self, key: str) -> None:
        self._calls.append(lambda: self._scheduler.close(key))

    async def pause(self) -> None:
        """Wait until it is this client's turn."""
        self._pauses.append(asyncio.get_running_loop().create_future())
        await self._pauses[-1]

    def happen(self) -> bool:
        """One thing of all that may; False if there is none."""
        events: list[Callable[[], None]] = []
        if self._calls:
            events.append(lambda: _take(self._calls))
        if self._scheduler.scheduler.has_requests():
            events.append(self._step)
        if self._outputs:
            events.append(self._deliver)
        if self._returns:
            events.append(lambda: _take(self._returns))
        if self._pauses:
            events.append(
                lambda: self._pauses.pop(self._random.randrange(len(self._pauses))).set_result(None)
            )
        if events:
            self._random.choice(events)()
        return bool(events)

    def _step(self) -> None:
        work = self._scheduler.begin()
        self._outputs.extend(self._scheduler.end(work, self._scheduler.answer(work)))

    def _deliver(self) -> None:
        from vllm.outputs import CompletionOutput, RequestOutput

        said = self._outputs.popleft()
        reason = str(said.finish_reason) if said.finished else None
        completion = CompletionOutput(0, "", said.new_token_ids, None, None, finish_reason=reason)
        self._collectors[said.request_id].put(
            RequestOutput(
                said.request_id,
                None,
                None,
                None,
                [completion],
                said.finished,
                kv_transfer_params=said.kv_transfer_params,
            )
        )


def _take(calls: deque[Callable[[], None]]) -> None:
    calls.popleft()()


def engine_over(between: Between, target: TinyTarget, *, own_drafts: bool) -> VllmEngine:
    """An engine that has been started, but for its process."""
    engine = VllmEngine(settings_for(target))
    engine._llm = cast(Any, between)
    engine._state = _State.RUNNING
    engine._ahead, engine._own_drafts = AHEAD, own_drafts
    engine._checkpoint = cast(Checkpoint, SimpleNamespace(vocab_size=1 << 20, stop_ids=()))
    engine._info = cast(EngineInfo, SimpleNamespace(max_model_len=MAX_MODEL_LEN))
    return engine


async def follow(
    engine: VllmEngine, between: Between, name: str, random: Random, drafters: Sequence[Drafter]
) -> None:
    """A session of a client whose drafts are sometimes right, and who sometimes leaves; like the verifier it does not wait
    for what becomes of a block before it reads on."""
    drafter = random.choice(drafters)
    prompt = tuple(random.choice(WORDS) for _ in range(random.randint(90, 120)))
    policy = random.choice([Policy.LATENCY, Policy.LATENCY, Policy.COST])
    params = GenerationParams(max_tokens=LENGTH, ignore_eos=True, policy=policy)
    stream = engine.open(name, prompt, (), params)
    answer = tuple(truth(engine._open[name].key, place) for place in range(LENGTH))
    output = await anext(stream)
    said, submitting = output.tokens, list[asyncio.Task[BlockStatus]]()
    while output.finish_reason is None:
        await between.pause()
        if random.random() < LEAVING:
            await engine.close(name)
            return
        block = drafter(answer, said, random)
        submitting.append(
            asyncio.create_task(engine.submit(name, len(said), block, alone=random.random() < 0.5))
        )
        await asyncio.sleep(0)
        output = await anext(stream)
        said += output.tokens
    assert said == answer
    await asyncio.gather(*submitting)


@pytest.mark.parametrize("own_drafts", [False, True], ids=["plain", "own drafts"])
@pytest.mark.parametrize("kv_blocks", [ROOM, 24, 12], ids=["room", "little room", "hardly any room"])
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
async def test_all_come_to_their_end(
    made: Made, tiny_target: TinyTarget, passes: dict[str, Any], kv_blocks: int, own_drafts: bool
) -> None:
    early_steps = prompt_steps = 0
    for seed in range(SEEDS):
        drafters = DRAFTERS if seed % 2 else [nothing]
        random = Random(seed)
        client = Client(made(kv_blocks=kv_blocks, own_drafts=own_drafts, **passes))
        between = Between(client, random)
        engine = engine_over(between, tiny_target, own_drafts=own_drafts)
        sessions = {
            name: asyncio.create_task(follow(engine, between, name, Random(f"{seed}.{name}"), drafters))
            for name in (f"s{n}" for n in range(SESSIONS))
        }
        for _ in range(MOST_EVENTS):
            for _ in range(TURNS):
                await asyncio.sleep(0)
            waiting = [name for name, session in sessions.items() if not session.done()]
            if not between.happen():
                break
        assert not waiting, f"seed {seed}: {waiting} wait"
        await asyncio.gather(*sessions.values())
        assert not client.scheduler.requests
        assert client.scheduler.get_kv_cache_usage() == 0.0
        early_steps += client.scheduler.counters.early_steps
        prompt_steps += client.scheduler.counters.prompt_steps
    if "early" not in passes:
        assert early_steps == 0
    elif kv_blocks == ROOM:
        assert early_steps > 0
    assert (prompt_steps > 0) == ("prompt_places" in passes)
