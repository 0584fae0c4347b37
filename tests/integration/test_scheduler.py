"""Which blocks a step waits for, and for how long: our scheduler over vLLM's, without a model, by a clock of the test's."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.verifier.engine import launch, plugin, scheduler
from services.verifier.engine.checkpoint import read_checkpoint
from services.verifier.engine.companions import RETURNS
from services.verifier.engine.options import EAGER_KEY, SESSION_KEY, EngineOptions
from services.verifier.engine.types import BlockStatus
from tests.integration.engine_bench import settings_for
from tests.integration.tiny_target import TinyTarget

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

STEP_MS = 40.0
WAIT_MS = 6.0
"""`GATHERED_SHARE` of a step."""
LONGEST_MS = 15.0
TOKEN = 7
"""What the target always says."""


class Steps:
    """A scheduler that is stepped by hand: sessions by their keys, times in ms."""

    def __init__(self, scheduler: scheduler.SessionScheduler) -> None:
        self.scheduler = scheduler
        self.now_ms = 1000.0
        self.said: dict[str, int] = {}

    def monotonic(self) -> float:
        return self.now_ms / 1000

    @property
    def wait_ms(self) -> float:
        """For how long the next step may still wait."""
        return round(self.scheduler.gather_s() * 1000, 6)

    def open(self, *keys: str, eager: bool = True) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        for key in keys:
            marks = {SESSION_KEY: key, EAGER_KEY: eager}
            params = SamplingParams(temperature=0.0, max_tokens=50, extra_args=marks)
            self.scheduler.add_request(Request(key, [5, 6], params, None))
            self.said[key] = 0

    def begin(self) -> Any:
        """A step has its work, and is under way."""
        return self.scheduler.schedule()

    def end(self, work: Any, took_ms: float = STEP_MS) -> None:
        """It ends; each session in it says one token."""
        from vllm.v1.outputs import ModelRunnerOutput

        self.now_ms += took_ms
        keys = list(work.num_scheduled_tokens)
        tokens = [[TOKEN] for _ in keys]
        self.scheduler.update_from_output(
            work, ModelRunnerOutput(keys, {key: row for row, key in enumerate(keys)}, tokens)
        )
        for key in keys:
            self.said[key] += 1

    def step(self, took_ms: float = STEP_MS) -> set[str]:
        """A whole one; whose tokens were computed in it."""
        work = self.begin()
        self.end(work, took_ms)
        return set(work.num_scheduled_tokens)

    def block(self, key: str, base: int | None = None) -> BlockStatus:
        """One of two tokens, after all that the session has said unless `base` says otherwise."""
        return self.scheduler.submit_block(key, self.said[key] if base is None else base, [8, 9], [], [])


@pytest.fixture(scope="module")
def vllm_config(tiny_target: TinyTarget) -> Iterator[Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    settings, checkpoint = settings_for(tiny_target), read_checkpoint(str(tiny_target.directory))
    options = EngineOptions("ipc://nobody", (), "", 1, 1)
    with launch.engine_environment(1):
        launch.register_models()
        arguments = launch.arguments(settings, checkpoint, options, cuda=False)
        yield AsyncEngineArgs(**arguments).create_engine_config()


@pytest.fixture
def steps(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Steps:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    block = vllm_config.cache_config.block_size
    spec = FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=32, dtype=torch.float32)
    vllm_config.cache_config.num_gpu_blocks = 64
    made = scheduler.SessionScheduler(
        vllm_config,
        KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(vllm_config),
        block,
    )
    steps = Steps(made)
    monkeypatch.setattr(scheduler, "time", steps)
    return steps


# --- whom a step waits for ----------------------------------------------------------------------------------------


def test_a_step_waits_for_the_block_of_a_session_that_has_just_spoken(steps: Steps) -> None:
    steps.open("a")
    assert steps.wait_ms == 0.0, "it has not spoken yet"
    steps.step()
    assert steps.wait_ms == WAIT_MS
    assert steps.block("a") is BlockStatus.ARMED
    assert steps.wait_ms == 0.0
    assert steps.step() == {"a"}
    assert steps.wait_ms == WAIT_MS


def test_a_step_does_not_wait_for_sessions_whose_blocks_follow_when_they_may(steps: Steps) -> None:
    steps.open("a", "b", eager=False)
    assert steps.step() == {"a", "b"}
    assert steps.wait_ms == 0.0
    steps.block("a")
    assert steps.wait_ms == 0.0


def test_a_step_waits_no_longer_than_its_share_of_a_step_after_the_last_one(steps: Steps) -> None:
    steps.open("a", "b")
    steps.step()
    steps.now_ms += 4.0
    assert steps.wait_ms == WAIT_MS - 4.0
    steps.now_ms += 2.0
    assert steps.wait_ms == 0.0
    steps.now_ms += 1.0
    assert steps.wait_ms == 0.0


def test_of_a_long_step_the_share_is_bounded(steps: Steps) -> None:
    steps.open("a")
    steps.step(took_ms=2000.0)
    assert steps.wait_ms == LONGEST_MS


def test_each_block_that_was_waited_for_gives_the_others_as_long_again(steps: Steps) -> None:
    steps.open("a", "b", "c")
    steps.step()
    for key in "ab":
        steps.now_ms += 5.0
        steps.block(key)
        assert steps.wait_ms == WAIT_MS
    steps.now_ms += 5.0
    steps.block("c")
    assert steps.wait_ms == 0.0, "all are there"
    assert steps.step() == {"a", "b", "c"}


def test_a_block_that_nobody_waited_for_makes_nobody_wait_longer(steps: Steps) -> None:
    steps.open("a")
    steps.open("patient", eager=False)
    steps.step()
    steps.now_ms += 5.0
    assert steps.block("patient") is BlockStatus.ARMED
    assert steps.wait_ms == WAIT_MS - 5.0


def test_a_session_that_replaces_its_block_makes_nobody_wait_longer(steps: Steps) -> None:
    steps.open("a", "b")
    steps.step()
    steps.block("a")
    steps.now_ms += 5.0
    steps.block("a")
    assert steps.wait_ms == WAIT_MS - 5.0


def test_a_stale_block_is_not_the_one_that_is_waited_for(steps: Steps) -> None:
    steps.open("a")
    steps.step()
    steps.now_ms += 5.0
    assert steps.block("a", base=9) is BlockStatus.STALE
    assert steps.wait_ms == WAIT_MS - 5.0


def test_a_session_that_missed_a_step_is_not_waited_for_again_until_it_has_spoken(steps: Steps) -> None:
    steps.open("quick", "slow")
    steps.step()
    steps.block("quick")
    work = steps.begin()
    assert steps.wait_ms == 0.0
    steps.end(work)
    assert steps.wait_ms == WAIT_MS, "the quick one is waited for"
    steps.block("quick")
    assert steps.wait_ms == 0.0, "the slow one is not"
    steps.block("slow")
    steps.step()
    steps.block("quick")
    assert steps.wait_ms == WAIT_MS, "it has spoken again"


def test_a_session_whose_block_came_while_it_was_being_computed_is_not_waited_for(steps: Steps) -> None:
    steps.open("a")
    work = steps.begin()
    assert steps.scheduler.submit_block("a", 0, [TOKEN, 9], [], []) is BlockStatus.QUEUED
    steps.end(work)
    assert steps.wait_ms == 0.0
    assert steps.step() == {"a"}


def test_a_session_that_has_ended_is_not_waited_for(steps: Steps) -> None:
    from vllm.v1.request import RequestStatus

    steps.open("a", "b")
    steps.step()
    steps.block("a")
    assert steps.wait_ms == WAIT_MS
    steps.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    assert steps.wait_ms == 0.0


# --- patient sessions ---------------------------------------------------------------------------------------------

RETURN_MS = 50.0


def apart(steps: Steps, *keys: str) -> None:
    """Sessions under policy `cost` that have spoken one after the other, 10 ms apart; how long a return takes is known."""
    steps.open(*keys, eager=False)
    steps.step()
    companions = steps.scheduler._companions
    for _ in range(200):
        companions.spoke("known", 0.0)
        companions.returned("known", RETURN_MS / 1000)
    for number, key in enumerate(keys):
        companions.spoke(key, (steps.now_ms + 10.0 * number) / 1000)


def test_a_step_waits_for_patient_sessions_whose_blocks_are_due(steps: Steps) -> None:
    apart(steps, "a", "b", "c")
    steps.now_ms += RETURN_MS
    steps.block("a")
    assert steps.wait_ms == pytest.approx(20.0, abs=0.1), "until the last is due"
    loop = Loop(steps, b=10.0, c=20.0)
    assert loop.gather() == 20.0
    assert steps.step() == {"a", "b", "c"}


def test_a_patient_session_that_is_late_is_given_up_and_the_next_one_waited_for(steps: Steps) -> None:
    apart(steps, "a", "late", "c")
    steps.now_ms += RETURN_MS
    steps.block("a")
    assert Loop(steps, c=20.0, late=90.0).gather() == 20.0
    assert steps.step() == {"a", "c"}


def test_a_step_waits_however_little_of_the_engine_its_pass_takes(steps: Steps) -> None:
    apart(steps, "a", "b")
    steps.scheduler._companions.spoke("b", (steps.now_ms + 40.0) / 1000)
    steps.now_ms += RETURN_MS
    steps.block("a")
    assert steps.wait_ms == pytest.approx(40.0, abs=0.1)


def test_no_block_waits_longer_than_a_few_returns_usually_take(steps: Steps) -> None:
    apart(steps, "near", "far")
    companions = steps.scheduler._companions
    for number in range(RETURNS):
        companions.spoke("known", 0.0)
        companions.returned("known", (20 if number % 16 == 0 else 1) * RETURN_MS / 1000)
    steps.now_ms += RETURN_MS
    steps.block("near")
    assert Loop(steps, far=19 * RETURN_MS).gather() == pytest.approx(3 * 1000 * companions.usual_s, abs=0.1)
    assert steps.step() == {"near"}


def test_patient_sessions_hold_up_neither_eager_ones_nor_their_prompts(steps: Steps) -> None:
    apart(steps, "a", "b")
    steps.now_ms += RETURN_MS
    steps.block("a")
    assert steps.wait_ms > 0.0
    steps.open("eager")
    assert steps.wait_ms == 0.0, "an eager session's prompt is there"
    steps.step()
    steps.block("eager")
    steps.block("a")
    assert steps.wait_ms == 0.0, "an eager session is ready"


def test_patient_sessions_prompts_wait_for_those_that_come_right_after_them(steps: Steps) -> None:
    apart(steps, "a")
    steps.now_ms += RETURN_MS
    steps.block("a")
    steps.open("p0", eager=False)
    for number in range(1, 10):
        assert steps.wait_ms == pytest.approx(15.0, abs=0.1)
        steps.now_ms += 5.0
        steps.open(f"p{number}", eager=False)
    steps.now_ms += 10.0
    assert steps.wait_ms == pytest.approx(5.0, abs=0.1), "no longer than a few times that in all"
    steps.now_ms += 5.0
    assert steps.wait_ms == 0.0
    assert steps.step() == {"a", *(f"p{number}" for number in range(10))}


def test_a_prompt_waits_for_patient_sessions_blocks_and_shares_their_step(steps: Steps) -> None:
    apart(steps, "a", "b", "c")
    steps.now_ms += RETURN_MS
    steps.open("p", eager=False)
    assert steps.wait_ms == pytest.approx(20.0, abs=0.1), "until the last is due"
    assert Loop(steps, a=0.0, b=10.0, c=20.0).gather() == 20.0
    assert steps.step() == {"a", "b", "c", "p"}


def test_a_patient_session_that_has_ended_is_not_waited_for(steps: Steps) -> None:
    from vllm.v1.request import RequestStatus

    apart(steps, "a", "b")
    steps.now_ms += RETURN_MS
    steps.block("a")
    steps.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    assert steps.wait_ms == 0.0


# --- how the engine's loop waits ----------------------------------------------------------------------------------


class Loop:
    """vLLM's engine loop, its inbox filled at set times."""

    def __init__(self, steps: Steps, **arrivals_ms: float) -> None:
        """When each session's block comes, from now on."""
        self.steps = steps
        self.scheduler: Any = steps.scheduler
        self.input_queue = self
        self.looked = 0
        self._arrivals = [(steps.now_ms + after_ms, key) for key, after_ms in arrivals_ms.items()]

    def has_work(self) -> bool:
        return self.steps.scheduler.has_requests()

    def get(self, timeout: float) -> tuple[str]:
        """What comes within `timeout` seconds."""
        end_ms = self.steps.now_ms + timeout * 1000
        if not self._arrivals or self._arrivals[0][0] > end_ms:
            self.steps.now_ms = end_ms
            raise queue.Empty
        self.steps.now_ms, key = self._arrivals.pop(0)
        return (key,)

    def _handle_client_request(self, key: str) -> None:
        self.steps.block(key)

    def gather(self) -> float:
        """What the loop does before a step; how long it took, ms."""
        began_ms = self.steps.now_ms
        gathered = plugin._gathering(lambda core: setattr(core, "looked", core.looked + 1))
        gathered(self)  # type: ignore[arg-type]
        assert self.looked == 1, "vLLM's own look comes first, once"
        return round(self.steps.now_ms - began_ms, 6)


def test_the_loop_waits_while_blocks_keep_coming_and_not_after_the_last(steps: Steps) -> None:
    steps.open("first", "a", "b", "c")
    steps.step()
    steps.block("first")
    assert Loop(steps, a=5.0, b=10.0, c=15.0).gather() == 15.0
    assert steps.step() == {"first", "a", "b", "c"}


def test_the_loop_goes_on_without_a_block_that_takes_too_long(steps: Steps) -> None:
    steps.open("first", "a", "late")
    steps.step()
    steps.block("first")
    assert Loop(steps, a=5.0, late=11.5).gather() == 5.0 + WAIT_MS
    assert steps.step() == {"first", "a"}


def test_the_loop_does_not_wait_with_nothing_to_compute(steps: Steps) -> None:
    steps.open("a")
    steps.step()
    assert steps.wait_ms > 0.0
    assert Loop(steps, a=3.0).gather() == 0.0


def test_the_loop_does_not_wait_with_vllms_own_scheduler(steps: Steps) -> None:
    steps.open("first", "a")
    steps.step()
    steps.block("first")
    loop = Loop(steps, a=3.0)
    loop.scheduler = SimpleNamespace()
    assert loop.gather() == 0.0
