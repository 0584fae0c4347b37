"""The short way through the scheduler beside the long one: the same traffic leads both to the same, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from random import Random
from typing import Any

import pytest
import torch

from services.verifier.engine.options import (
    DRAFT_LENGTHS,
    DRAFT_LEVELS,
    DRAFT_ROWS,
    EVEN_ROWS,
    FOLLOWED,
    GATHERED,
    LAUNCHED,
)
from services.verifier.engine.scheduler import SessionScheduler
from services.verifier.engine.sessions import PADDING
from tests.integration.bare_scheduler import WORDS, Client, Made, bare_schedulers, truth
from tests.integration.engine_bench import MAX_BLOCK, MAX_SESSIONS
from tests.integration.tiny_target import TinyTarget

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

STOPS = (5, 6)
TIMINGS = ("step_ms", "busy_ms", "fixed_ms", "row_ms")


@pytest.fixture(scope="module")
def made(tiny_target: TinyTarget) -> Iterator[Made]:
    with bare_schedulers(tiny_target) as made:
        yield made


# --- both beside each other ---------------------------------------------------------------------------------------


def state(scheduler: SessionScheduler) -> dict[str, Any]:
    """All that a step may change. Whether what was said is hashed already is not among it."""
    for request in scheduler.requests.values():
        request.update_block_hashes()
    kv = scheduler.kv_cache_manager
    (manager,) = kv.coordinator.single_type_managers
    stats = scheduler.session_stats()
    stats["fast"] = stats.pop("steady_steps") * 0
    for name in TIMINGS:
        stats.pop(name)
    return {
        "stats": stats,
        "running": [request.request_id for request in scheduler.running],
        "waiting": [request.request_id for request in scheduler.waiting],
        "step": scheduler.current_step,
        "last": set(scheduler.prev_step_scheduled_req_ids),
        "finished": scheduler.finished_req_ids,
        "prefilling": {request.request_id for request in scheduler._inflight_prefills},
        "awaited": scheduler._awaited,
        "starved": scheduler._starved,
        "bound": scheduler.prefill_capacity_bound,
        "free": kv.block_pool.get_num_free_blocks(),
        "cached": set(kv.block_pool.cached_block_hash_to_block._cache),
        "blocks": {
            key: [block.block_id for block in blocks] for key, blocks in manager.req_to_blocks.items()
        },
        "full": dict(manager.num_cached_block),
        "requests": {
            key: (
                request.status,
                list(request.output_token_ids),
                list(request.spec_token_ids),
                list(request.block_hashes),
                request.num_computed_tokens,
                request.num_in_flight_tokens,
                request.num_stale_output_tokens,
                request.is_prefill_chunk,
                request.num_preemptions,
                request.next_decode_eligible_step,
                request.stop_reason,
            )
            for key, request in scheduler.requests.items()
        },
        "sessions": {
            key: (own.parked_at, own.resting, own.armed, own.pending, own.reached, own.drafts)
            for key, own in scheduler._by_key.items()
        },
    }


def work_of(output: Any) -> dict[str, Any]:
    """A step's work; what only asynchronous scheduling looks at is left out."""
    found = {own.name: getattr(output, own.name) for own in fields(output)}
    cached = found.pop("scheduled_cached_reqs")
    more = {own.name: getattr(cached, own.name) for own in fields(cached) if own.name != "all_token_ids"}
    marks = {name: getattr(output, name) for name in (DRAFT_LENGTHS, DRAFT_LEVELS, DRAFT_ROWS, EVEN_ROWS)}
    return {**found, **more, **marks, "order": list(found["num_scheduled_tokens"])}


class Twins:
    """A scheduler that takes the short way where it can, and one that never does."""

    def __init__(self, made: Made, **options: Any) -> None:
        self.short, self.long = Client(made(**options)), Client(made(**options))
        self.long.scheduler._steady._possible = False
        self.most_ended = 0

    @property
    def open(self) -> list[str]:
        return [key for key in self.short.said if key not in self.short.ended]

    def both(self, act: Callable[[Client], Any]) -> Any:
        found, expected = act(self.short), act(self.long)
        assert found == expected
        self.compare()
        return found

    def compare(self) -> None:
        found, expected = state(self.short.scheduler), state(self.long.scheduler)
        for name, value in expected.items():
            assert found[name] == value, name

    def step(self, meanwhile: Callable[[Client], Any] = lambda _: None) -> None:
        """A whole step of both, if there is anything to do, and what happens `meanwhile`."""
        if not self.both(lambda client: client.scheduler.has_requests()):
            return
        works = self.short.begin(), self.long.begin()
        assert work_of(works[0]) == work_of(works[1])
        self.compare()
        answers = self.short.answer(works[0]), self.long.answer(works[1])
        self.both(meanwhile)
        outputs = self.short.end(works[0], answers[0]), self.long.end(works[1], answers[1])
        assert outputs[0] == outputs[1]
        self.most_ended = max(self.most_ended, sum(output.finished for output in outputs[0]))
        self.compare()


def traffic(twins: Twins, *, seed: int, rounds: int, prompts: int, most: int = MAX_SESSIONS) -> None:
    """Sessions come, have blocks of all kinds verified, end in all ways, also while a step is under way."""
    random, number = Random(seed), 0
    for _ in range(rounds):
        while len(twins.open) < most and random.random() < 0.3:
            key, prompt = f"s{number}", [random.choice(WORDS) for _ in range(random.randint(1, prompts))]
            limits: dict[str, Any] = {"max_tokens": random.choice((8, 8, 20, 60))}
            if random.random() < 0.4:
                limits["stop_token_ids"] = list(STOPS)
            if random.random() < 0.1:
                limits["min_tokens"] = 4
            marks = {"eager": random.random() < 0.7, "unheard": random.random() < 0.3}
            twins.both(lambda client, k=key, p=prompt, more={**limits, **marks}: client.open(k, p, **more))
            number += 1
        calm = random.random() < 0.5
        for key in twins.open:
            if twins.short.said[key] and (calm or random.random() < 0.7):
                twins.both(lambda client, k=key, more=a_block(twins, key, random): client.block(k, **more))
        if twins.open and random.random() < 0.05:
            twins.both(lambda client, keys=random.sample(twins.open, 1): client.close(*keys))
        twins.short.scheduler._steady.rehearsal()
        twins.compare()
        twins.step(something(twins, random) if random.random() < 0.2 else lambda _: None)
    for _ in range(200):
        for key in twins.open:
            twins.both(lambda client, k=key: client.block(k, []))
        twins.step()
    assert not twins.open
    for key, said in twins.short.said.items():
        assert said == [truth(key, place) for place in range(len(said))]


def a_block(twins: Twins, key: str, random: Random) -> dict[str, Any]:
    base = max(0, len(twins.short.said[key]) - random.choice((0, 0, 0, 0, 1, 3)))
    tokens = [
        truth(key, base + place) for place in range(random.choice((0, MAX_BLOCK, random.randint(0, 8))))
    ]
    if tokens and random.random() < 0.5:
        tokens[random.randrange(len(tokens))] += 1
    return {"base": base, "tokens": tokens, "rows": random.random() < 0.1}


def something(twins: Twins, random: Random) -> Callable[[Client], Any]:
    """What happens while a step is under way: one closes, or a block comes early."""
    if not twins.open:
        return lambda _: None
    key = random.choice(twins.open)
    if random.random() < 0.3:
        return lambda client: client.close(key)
    more = a_block(twins, key, random)
    return lambda client: client.block(key, **more)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "ragged"])
@pytest.mark.parametrize("seed", range(3))
def test_both_ways_lead_to_the_same(made: Made, uniform: bool, seed: int) -> None:
    twins = Twins(made, uniform=uniform)
    traffic(twins, seed=seed, rounds=100, prompts=40)
    short, long = twins.short.scheduler.counters, twins.long.scheduler.counters
    assert short.steady_steps > short.steps / 4
    assert long.steady_steps == 0
    assert short.preemptions == 0
    assert twins.most_ended > 1, "no step ended more than one"


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "ragged"])
@pytest.mark.parametrize("seed", range(3))
def test_both_ways_lead_to_the_same_where_kv_is_scarce(made: Made, uniform: bool, seed: int) -> None:
    twins = Twins(made, uniform=uniform, kv_blocks=12)
    traffic(twins, seed=seed, rounds=120, prompts=80, most=8)
    counters = twins.short.scheduler.counters
    assert counters.preemptions > 2
    assert counters.steady_steps > 10


def test_a_rehearsal_is_of_the_step_that_follows_and_changes_nothing(made: Made) -> None:
    twins = Twins(made, uniform=True)
    for number in range(3):
        twins.both(lambda client, n=number: client.open(f"s{n}", [7, 8, 9 + n], max_tokens=40))
    twins.step()
    assert twins.short.scheduler._steady.rehearsal() is None, "there is nothing to verify"
    for number in range(3):
        tokens = [truth(f"s{number}", 1 + place) for place in range(number + 1)]
        twins.both(lambda client, n=number, own=tokens: client.block(f"s{n}", own))
    found = twins.short.scheduler._steady.rehearsal()
    twins.compare()
    work = twins.short.begin()
    gathered, rehearsed = getattr(work, GATHERED), getattr(found, GATHERED)
    assert found is not None
    assert found.num_scheduled_tokens == work.num_scheduled_tokens
    assert found.scheduled_spec_decode_tokens == work.scheduled_spec_decode_tokens
    for name in ("tokens", "drafts", "computed", "rows"):
        assert getattr(rehearsed, name) == getattr(gathered, name), name
    assert twins.short.scheduler._steady.rehearsal() is None, "a step is under way"


# --- which way a step takes ---------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["uniform", "ragged"])
def client(request: pytest.FixtureRequest, made: Made) -> Client:
    return Client(made(uniform=request.param))


def short_steps(client: Client) -> int:
    return client.scheduler.counters.steady_steps


def spoken(client: Client, *keys: str, **params: Any) -> None:
    for number, key in enumerate(keys):
        client.open(key, [3 + number] * 5, max_tokens=100, **params)
    client.step()


def test_a_step_of_blocks_takes_the_short_way_and_a_prefill_does_not(client: Client) -> None:
    spoken(client, "a", "b", "c")
    assert short_steps(client) == 0
    for key in "ab":
        client.block(key, [truth(key, 1), 2])
    client.step()
    assert short_steps(client) == 1
    assert client.said["a"] == [truth("a", place) for place in range(3)]
    client.block("c", [])
    client.open("d", [4, 4], max_tokens=9)
    client.step()
    assert short_steps(client) == 1
    client.block("d", [9])
    client.step()
    assert short_steps(client) == 2


def test_a_request_that_is_no_session_takes_the_long_way(client: Client) -> None:
    spoken(client, "a")
    client.open("plain", [4, 4], plain=True, max_tokens=3)
    client.step()
    client.block("a", [2])
    client.step()
    assert short_steps(client) == 0
    client.step()
    client.block("a", [2])
    client.step()
    assert short_steps(client) == 1


def test_answers_with_log_probabilities_are_taken_in_the_long_way(client: Client) -> None:
    from vllm.v1.outputs import LogprobsTensors

    spoken(client, "a", logprobs=1)
    client.block("a", [])
    work = client.begin()
    answer = client.answer(work)
    tensors = LogprobsTensors(torch.tensor([[9, 9]]), torch.zeros(1, 2), torch.ones(1, dtype=torch.long))
    answer.logprobs = tensors.tolists()
    (output,) = client.end(work, answer)
    assert output.new_logprobs is not None
    assert client.scheduler._by_key["a"].parked_at is not None


def test_a_session_that_repeats_itself_is_stopped_as_vllm_does(client: Client) -> None:
    from vllm.sampling_params import RepetitionDetectionParams

    spoken(
        client,
        "a",
        repetition_detection=RepetitionDetectionParams(max_pattern_size=1, min_pattern_size=1, min_count=3),
    )
    client.block("a", [9, 9, 9])
    work = client.begin()
    answer = client.answer(work)
    answer.sampled_token_ids[0][:] = [9, 9, 9, 8]
    (output,) = client.end(work, answer)
    assert (output.new_token_ids, output.finished) == ([9, 9, 9], True)
    assert short_steps(client) == 1


# --- even batches -------------------------------------------------------------------------------------------------


def test_a_session_computed_anew_with_as_many_rows_as_blocks_makes_no_batch_even(made: Made) -> None:
    client = Client(made(uniform=True))
    client.open("anew", [3] * (MAX_BLOCK + 1), max_tokens=50)
    spoken(client, "a", "b")
    preempted = client.scheduler.requests["anew"]
    client.scheduler.running.remove(preempted)
    client.scheduler._preempt_request(preempted, 0.0)
    for key in ("a", "b", "anew"):
        client.block(key, [2])
    work = client.begin()
    assert set(work.num_scheduled_tokens.values()) == {MAX_BLOCK + 1}, "all have as many rows"
    assert work.num_scheduled_tokens.keys() == {"a", "b", "anew"}
    assert getattr(work, EVEN_ROWS) == 0
    client.end(work, client.answer(work))
    work = client.step()
    assert list(work.num_scheduled_tokens) == ["anew"]
    assert getattr(work, EVEN_ROWS) == MAX_BLOCK + 1


def test_a_prompt_of_one_token_makes_no_batch_of_single_rows_even(made: Made) -> None:
    client = Client(made(uniform=True))
    spoken(client, "a", "b")
    for key in "ab":
        client.block(key, [])
    client.open("new", [3], max_tokens=5)
    work = client.step()
    assert work.num_scheduled_tokens == {"a": 1, "b": 1, "new": 1}
    assert getattr(work, EVEN_ROWS) == 0


# --- prompts beside blocks ----------------------------------------------------------------------------------------


def gathered_beside(client: Client) -> Any:
    """What the next step computes as an even pass with prompts; None where it has none."""
    work = client.step()
    gathered = getattr(work, GATHERED, None)
    assert getattr(work, EVEN_ROWS) == (0 if gathered is None else MAX_BLOCK + 1)
    return gathered


def test_a_prompt_is_as_many_parts_as_have_room_for_it(made: Made) -> None:
    client = Client(made(uniform=True, prompt_places=4))
    client.open("a", list(range(3, 3 + 2 * MAX_BLOCK)), max_tokens=50)
    alone = gathered_beside(client)
    assert (alone.computed, alone.real) == ([0, MAX_BLOCK + 1], [MAX_BLOCK + 1, MAX_BLOCK - 1])
    assert alone.ends == [2 * MAX_BLOCK - 1]
    client.open("b", [5] * (MAX_BLOCK + 2), max_tokens=50)
    client.block("a", [7, 8])
    both = gathered_beside(client)
    known = 2 * MAX_BLOCK
    padding = [PADDING] * (MAX_BLOCK - 2)
    assert both.tokens[: MAX_BLOCK + 1] == [truth("a", 0), 7, 8, *padding]
    assert both.tokens[MAX_BLOCK + 1 :] == [5] * (MAX_BLOCK + 2) + [PADDING] * MAX_BLOCK
    assert (both.computed, both.drafts) == ([known, 0, MAX_BLOCK + 1], [2, 0, 0])
    assert both.rows[1] == both.rows[2] != both.rows[0]
    assert both.ends == [2 * (MAX_BLOCK + 1)]
    assert client.scheduler.counters.prompt_steps == 2
    assert client.said["b"] == [truth("b", 0)]


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([3] * (MAX_SESSIONS * (MAX_BLOCK + 1) + 1), {}),
        ([3] * 10, {"logprobs": 2}),
        ([3] * 10, {"plain": True}),
    ],
    ids=["too long", "not greedy", "no session"],
)
def test_other_prompts_are_computed_as_ever(made: Made, prompt: list[int], params: dict[str, Any]) -> None:
    client = Client(made(uniform=True, prompt_places=4))
    client.open("a", prompt, max_tokens=50, **params)
    assert gathered_beside(client) is None


# --- blocks that are held back ------------------------------------------------------------------------------------


class Costs:
    """A pass takes 6 ms and so much a row."""

    def __init__(self, row_ms: float) -> None:
        self._row_ms = row_ms

    def saw(self, rows: int, elapsed_ms: float) -> None:
        """What a step took here says nothing."""

    def line(self) -> tuple[float, float]:
        return 6.0, self._row_ms


def crowd(made: Made, *, row_ms: float) -> Client:
    """Eight sessions that go on by themselves."""
    client = Client(made(uniform=True))
    client.scheduler._costs = Costs(row_ms)  # type: ignore[assignment]
    spoken(client, *(f"s{number}" for number in range(8)), ahead=20)
    client.step()
    return client


def drafted(client: Client, key: str) -> None:
    said = len(client.said[key])
    client.block(key, [truth(key, said + place) for place in range(MAX_BLOCK)])


def test_a_block_that_is_not_worth_its_padding_waits_and_is_trimmed_by_what_is_said(made: Made) -> None:
    client = crowd(made, row_ms=0.6)
    drafted(client, "s0")
    work = client.step()
    assert set(work.num_scheduled_tokens.values()) == {1}, "one block among eight sessions"
    assert len(client.said["s0"]) == 3
    for number in range(1, 8):
        drafted(client, f"s{number}")
    work = client.begin()
    assert set(work.num_scheduled_tokens.values()) == {1 + MAX_BLOCK}, "eight are worth it"
    assert getattr(work, DRAFT_LENGTHS)["s0"] == MAX_BLOCK - 1
    client.end(work, client.answer(work))
    assert client.said["s0"] == [truth("s0", place) for place in range(3 + MAX_BLOCK)]


def test_where_rows_cost_next_to_nothing_a_single_block_is_verified_at_once(made: Made) -> None:
    client = crowd(made, row_ms=0.001)
    drafted(client, "s0")
    client.step()
    assert len(client.said["s0"]) == 3 + MAX_BLOCK


def test_sessions_that_wait_for_their_drafts_have_every_block_verified(made: Made) -> None:
    client = crowd(made, row_ms=0.6)
    client.open("patient", [9] * 5, max_tokens=50, eager=False)
    client.step()
    drafted(client, "patient")
    client.step()
    assert len(client.said["patient"]) == 2 + MAX_BLOCK


# --- passes before their time -------------------------------------------------------------------------------------


def going_on(made: Made, *, row_ms: float = 0.001, **params: Any) -> Client:
    """Four sessions that go on by themselves, each of whose passes is launched before the one before it has ended."""
    client = Client(made(uniform=True, early=True))
    client.scheduler._costs = Costs(row_ms)  # type: ignore[assignment]
    spoken(client, "a", "b", "c", "d", **{"ahead": 20, **params})
    first, second = client.step(), client.step()
    assert (getattr(first, LAUNCHED), getattr(first, FOLLOWED)) == (None, [0, 1, 2, 3])
    assert (getattr(second, LAUNCHED), getattr(second, FOLLOWED)) == ([0, 1, 2, 3], [0, 1, 2, 3])
    return client


def early_steps(client: Client) -> int:
    return client.scheduler.counters.early_steps


def test_sessions_that_go_on_by_themselves_follow_each_other_until_they_are_as_far_ahead_as_they_may(
    made: Made,
) -> None:
    client = going_on(made, ahead=6)
    while client.scheduler.has_unfinished_requests():
        last = client.step()
    assert getattr(last, FOLLOWED) == []
    assert {key: len(said) for key, said in client.said.items()} == dict.fromkeys("abcd", 6)
    assert early_steps(client) == 4, "the prompts' and the first after them were launched as ever"


def test_a_block_waits_for_the_pass_that_is_launched_and_has_the_next_one(made: Made) -> None:
    client = going_on(made)
    drafted(client, "b")
    work = client.step()
    assert (getattr(work, LAUNCHED), getattr(work, FOLLOWED)) == ([0, 1, 2, 3], [])
    assert len(client.said["b"]) == 4
    work = client.step()
    assert getattr(work, LAUNCHED) is None
    assert getattr(work, DRAFT_LENGTHS)["b"] == MAX_BLOCK - 1
    assert len(client.said["b"]) == 4 + MAX_BLOCK


def test_where_one_in_four_drafts_all_the_time_no_pass_is_launched_early(made: Made) -> None:
    client = going_on(made, ahead=90)
    for _ in range(20):
        drafted(client, "b")
        last = client.step()
    assert (getattr(last, LAUNCHED), getattr(last, FOLLOWED)) == (None, [])


def test_where_a_block_is_not_worth_its_padding_passes_are_launched_early_all_the_same(made: Made) -> None:
    client = going_on(made, row_ms=6.0)
    drafted(client, "b")
    for _ in range(4):
        work = client.step()
        assert (getattr(work, LAUNCHED), getattr(work, FOLLOWED)) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_a_prompt_waits_for_the_pass_that_is_launched_and_shares_the_next_one(made: Made) -> None:
    client = going_on(made)
    client.open("new", [5] * 9, max_tokens=9)
    work = client.step()
    assert (getattr(work, LAUNCHED), getattr(work, FOLLOWED)) == ([0, 1, 2, 3], [])
    assert client.step().num_scheduled_tokens == {"a": 1, "b": 1, "c": 1, "d": 1, "new": 9}
    assert getattr(client.step(), LAUNCHED) is None


def test_who_ends_in_a_pass_has_no_part_in_the_one_that_was_launched(made: Made) -> None:
    ends = truth("c", 3)
    client = going_on(made, stop_token_ids=[ends])
    gone = {key for key in "abcd" if ends in [truth(key, place) for place in range(4)]}
    work = client.step()
    left = [key for key in "abcd" if key not in gone]
    assert "c" in gone
    assert client.ended.keys() == gone
    client.close(left[0])
    work = client.step()
    assert getattr(work, LAUNCHED) == ["abcd".index(key) for key in left[1:]]
    assert list(work.num_scheduled_tokens) == left[1:]


def test_the_last_pass_of_a_session_is_not_followed_and_neither_is_that_of_a_patient_one(made: Made) -> None:
    client = Client(made(uniform=True, early=True))
    client.open("short", [3] * 5, max_tokens=3, ahead=20)
    client.open("patient", [4] * 5, max_tokens=50, eager=False, unheard=True)
    spoken(client, "a", "b", "c", ahead=20)
    client.block("patient", [])
    work = client.step()
    assert [list(work.num_scheduled_tokens)[place] for place in getattr(work, FOLLOWED)] == [
        "short",
        "a",
        "b",
        "c",
    ]
    client.block("patient", [])
    work = client.step()
    assert getattr(work, FOLLOWED) == [], "somebody waits"
    assert client.ended.keys() == {"short"}
    assert len(client.said["patient"]) == 2
    client.step()
    assert len(client.said["patient"]) == 3


def test_where_tokens_are_drawn_no_pass_is_launched_early(made: Made) -> None:
    client = Client(made(uniform=True, early=True))
    spoken(client, "a", "b", ahead=20)
    client.scheduler._by_key["b"].greedy = False
    for _ in range(3):
        assert getattr(client.step(), FOLLOWED) == []
