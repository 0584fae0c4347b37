"""Placement by its properties: who may get a session, who gets it, and what a refusal says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.kv_session.fleet import Fleet
from services.kv_session.placement import Placer, PrefixIndex, partition_for
from shared.errors import ContextLengthExceeded, ModelNotFound, OutriderError, Overloaded, Unavailable
from shared.protocol import Heartbeat

BLOCK = 4
TIMEOUT_S = 5.0


def a_heartbeat(name: str = "v", **changes: object) -> Heartbeat:
    first = 3 * ord(name)
    values: dict[str, object] = {
        "verifier": name,
        "incarnation": f"{name}-1",
        "model": "m",
        "ready": True,
        "partitions": (first, first + 1, first + 2),
        "sessions": 0,
        "max_sessions": 16,
        "kv_usage": 0.0,
        "kv_capacity_tokens": 10_000,
        "max_model_len": 1000,
    }
    return Heartbeat.model_validate({**values, **changes})


def a_fleet(heartbeats: Sequence[Heartbeat], *, now_s: float = 0.0) -> Fleet:
    fleet = Fleet(timeout_s=TIMEOUT_S, now_s=now_s)
    for heartbeat in heartbeats:
        fleet.hear(heartbeat, now_s)
    return fleet


def a_placer(fleet: Fleet, *, slack: int = 4) -> Placer:
    return Placer(fleet, prefix_block=BLOCK, affinity_slack=slack, retry_after_s=2.0)


def refusal(
    placer: Placer, *, model: str = "m", prompt: tuple[int, ...] = (1,), now_s: float = 0
) -> OutriderError:
    with pytest.raises(OutriderError) as caught:
        placer.place("s", model=model, prompt=prompt, now_s=now_s)
    return caught.value


def dealt(heartbeats: list[Heartbeat], counts: list[int]) -> list[Heartbeat]:
    """The heartbeats with so many partitions each, none of them twice."""
    ends = list(itertools.accumulate(counts))
    return [
        heartbeat.model_copy(update={"partitions": tuple(range(end - count, end))})
        for heartbeat, count, end in zip(heartbeats, counts, ends, strict=True)
    ]


HEARTBEATS = st.lists(
    st.builds(
        a_heartbeat,
        st.sampled_from("abcdef"),
        model=st.sampled_from(["m", "n"]),
        ready=st.booleans(),
        stopping=st.booleans(),
        partitions=st.just(()),
        sessions=st.integers(0, 6),
        max_sessions=st.integers(1, 6),
        max_model_len=st.sampled_from([8, 100]),
        kv_capacity_tokens=st.sampled_from([0, 6, 1000]),
    ),
    max_size=6,
    unique_by=lambda heartbeat: heartbeat.verifier,
).flatmap(
    lambda heartbeats: st.lists(st.integers(0, 3), min_size=len(heartbeats), max_size=len(heartbeats)).map(
        lambda counts: dealt(heartbeats, counts)
    )
)
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple)


@given(
    HEARTBEATS, st.lists(st.tuples(PROMPTS, st.sampled_from(["", "m", "n"])), max_size=20), st.integers(1, 4)
)
def test_only_a_verifier_that_is_ready_able_and_not_full_gets_a_session(
    heartbeats: list[Heartbeat], opens: list[tuple[tuple[int, ...], str]], slack: int
) -> None:
    fleet = a_fleet(heartbeats)
    fleet.drained = {"a"}
    placer = a_placer(fleet, slack=slack)
    by_name = {heartbeat.verifier: heartbeat for heartbeat in heartbeats}
    for number, (prompt, model) in enumerate(opens):
        loads = {name: fleet.load(name) for name in by_name}
        able = {
            name
            for name, one in by_name.items()
            if one.ready
            and not one.stopping
            and one.partitions
            and name != "a"
            and model in ("", one.model)
            and len(prompt) < min(one.max_model_len, one.kv_capacity_tokens or one.max_model_len)
        }
        free = {name for name in able if loads[name] < by_name[name].max_sessions}
        try:
            place = placer.place(f"s{number}", model=model, prompt=prompt, now_s=1.0)
        except Overloaded as error:
            assert able
            assert not free
            assert error.retry_after_s == 2.0
        except OutriderError:
            assert not able
        else:
            assert place.verifier in free
            assert place.partition in by_name[place.verifier].partitions
            assert place.model == by_name[place.verifier].model
            assert loads[place.verifier] <= min(loads[name] for name in free) + slack
            assert fleet.load(place.verifier) == loads[place.verifier] + 1


@given(HEARTBEATS, PROMPTS)
def test_the_same_history_gives_the_same_place(heartbeats: list[Heartbeat], prompt: tuple[int, ...]) -> None:
    def place() -> object:
        try:
            return a_placer(a_fleet(heartbeats)).place("s", model="", prompt=prompt, now_s=0)
        except OutriderError as error:
            return error.message

    assert place() == place()


@given(st.lists(st.integers(0, 9), min_size=1, unique=True))
def test_a_session_keeps_its_partition_while_its_verifier_holds_the_same_ones(partitions: list[int]) -> None:
    heartbeat = a_heartbeat(partitions=tuple(partitions))
    assert partition_for("s", heartbeat) == partition_for("s", heartbeat)
    assert partition_for("s", heartbeat) in partitions


def test_sessions_spread_over_the_partitions_of_a_verifier() -> None:
    heartbeat = a_heartbeat(partitions=tuple(range(4)))
    used = [partition_for(f"session-{n}", heartbeat) for n in range(400)]
    assert all(used.count(partition) > 50 for partition in range(4))


# --- affinity -----------------------------------------------------------------------------------------------------


def test_a_prompt_goes_where_its_prefix_was_seen() -> None:
    placer = a_placer(a_fleet([a_heartbeat("a"), a_heartbeat("b", sessions=1)]))
    system = tuple(range(2 * BLOCK))
    first = placer.place("s1", model="m", prompt=(*system, 50, 51), now_s=0)
    second = placer.place("s2", model="m", prompt=(*system, 60, 61), now_s=0)
    third = placer.place("s3", model="m", prompt=tuple(range(90, 99)), now_s=0)
    assert (first.verifier, first.shared_tokens) == ("a", 0)
    assert (second.verifier, second.shared_tokens) == ("a", 2 * BLOCK)
    assert (third.verifier, third.shared_tokens) == ("b", 0)


def test_affinity_gives_way_when_the_verifier_is_much_busier() -> None:
    placer = a_placer(a_fleet([a_heartbeat("a"), a_heartbeat("b")]), slack=2)
    prompt = tuple(range(BLOCK))
    verifiers = [placer.place(f"s{n}", model="m", prompt=prompt, now_s=0).verifier for n in range(6)]
    assert verifiers == ["a", "a", "a", "b", "b", "b"]


def test_the_longest_shared_prefix_wins() -> None:
    placer = a_placer(a_fleet([a_heartbeat("a"), a_heartbeat("b")]))
    long, short = tuple(range(3 * BLOCK)), (*range(BLOCK), *range(50, 58))
    assert placer.place("s1", model="m", prompt=short, now_s=0).verifier == "a"
    assert placer.place("s2", model="m", prompt=long, now_s=0, prefer="b").verifier == "b"
    again = placer.place("s3", model="m", prompt=long, now_s=0)
    assert (again.verifier, again.shared_tokens) == ("b", 3 * BLOCK)


def test_the_preferred_verifier_wins_over_a_shared_prefix_but_not_over_load() -> None:
    fleet = a_fleet([a_heartbeat("a"), a_heartbeat("b", sessions=3)])
    assert a_placer(fleet).place("s1", model="m", prompt=(1,), now_s=0, prefer="b").verifier == "b"
    assert a_placer(fleet, slack=1).place("s2", model="m", prompt=(1,), now_s=0, prefer="b").verifier == "a"


def test_a_session_that_needs_no_room_is_placed_on_a_full_verifier() -> None:
    placer = a_placer(a_fleet([a_heartbeat("a", sessions=16)]))
    assert isinstance(refusal(placer), Overloaded)
    assert placer.place("s", model="m", prompt=(), now_s=0, need_room=False).verifier == "a"


@given(st.lists(st.tuples(PROMPTS, st.sampled_from("ab")), max_size=30), PROMPTS, st.integers(1, 8))
def test_the_prefix_index_knows_what_was_seen_never_more_and_stays_small(
    seen: list[tuple[tuple[int, ...], str]], prompt: tuple[int, ...], entries: int
) -> None:
    roomy, small = PrefixIndex(block=BLOCK), PrefixIndex(block=BLOCK, entries=entries)
    for index in (roomy, small):
        for each, verifier in seen:
            index.add("m", each, verifier)
    true = {
        verifier: length
        for verifier in "ab"
        if (
            length := max(
                (
                    n
                    for n in range(0, len(prompt) + 1, BLOCK)
                    if any(
                        name == verifier and each[:n] == prompt[:n] and len(each) >= n for each, name in seen
                    )
                ),
                default=0,
            )
        )
    }
    assert roomy.shared("m", prompt) == true
    assert all(length <= true.get(verifier, 0) for verifier, length in small.shared("m", prompt).items())
    assert len(small) <= entries
    assert roomy.shared("another", prompt) == {}


# --- refusals -----------------------------------------------------------------------------------------------------


def test_without_any_verifier_the_service_is_unavailable() -> None:
    error = refusal(a_placer(a_fleet([])))
    assert (type(error), error.status, error.retry_after_s) == (Unavailable, 503, 2.0)


def test_a_model_nobody_serves_is_not_found_and_those_served_are_named() -> None:
    error = refusal(a_placer(a_fleet([a_heartbeat("a", model="m"), a_heartbeat("b", model="n")])), model="x")
    assert isinstance(error, ModelNotFound)
    assert "'x'" in error.message
    assert "m, n" in error.message


def test_a_model_whose_verifier_is_away_is_unavailable_not_unknown() -> None:
    error = refusal(a_placer(a_fleet([a_heartbeat("a", ready=False)])))
    assert type(error) is Unavailable


def test_a_drained_verifier_is_named_in_the_refusal() -> None:
    fleet = a_fleet([a_heartbeat("a")])
    fleet.drained = {"a"}
    assert "a drained" in refusal(a_placer(fleet)).message


@given(st.integers(1, 40), st.integers(0, 20))
def test_a_prompt_fits_if_one_token_of_answer_does(limit: int, capacity: int) -> None:
    longest = min(limit, capacity or limit)
    assume(longest > 1)
    placer = a_placer(a_fleet([a_heartbeat(max_model_len=limit, kv_capacity_tokens=capacity)]))
    placer.place("s", model="m", prompt=(1,) * (longest - 1), now_s=0)
    error = refusal(placer, prompt=(1,) * longest)
    assert isinstance(error, ContextLengthExceeded)
    assert str(longest - 1) in error.message


# --- the fleet ----------------------------------------------------------------------------------------------------


def test_a_verifier_is_gone_when_silent_or_stopping() -> None:
    fleet = a_fleet([a_heartbeat("a"), a_heartbeat("b", partitions=(7,))])
    assert [one.verifier for one in fleet.alive(TIMEOUT_S)] == ["a", "b"]
    fleet.hear(a_heartbeat("a", stopping=True), TIMEOUT_S)
    assert [one.verifier for one in fleet.alive(TIMEOUT_S)] == ["b"]
    assert fleet.alive(TIMEOUT_S + 0.1) == []
    assert fleet.holder(7, TIMEOUT_S + 0.1) is None


def test_a_partition_that_two_claim_belongs_to_the_one_heard_last() -> None:
    fleet = a_fleet([a_heartbeat("a", partitions=(1, 2)), a_heartbeat("b", partitions=())])
    fleet.hear(a_heartbeat("b", partitions=(1,)), 1.0)
    holders = [fleet.holder(partition, 1.0) for partition in (1, 2, 3)]
    assert [holder and holder.verifier for holder in holders] == ["b", "a", None]
    fleet.hear(a_heartbeat("b", partitions=(1, 2)), 1.0)
    assert [heartbeat.verifier for heartbeat in fleet.ready(1.0)] == ["b"]


def test_sessions_just_placed_count_until_a_heartbeat_counts_them() -> None:
    fleet = a_fleet([a_heartbeat("a", sessions=2)])
    fleet.placed("a", 1.0)
    fleet.placed("a", 1.95)
    assert fleet.load("a") == 4
    fleet.hear(a_heartbeat("a", sessions=3), 2.0)
    assert fleet.load("a") == 4  # the last may not have reached the verifier yet
    fleet.hear(a_heartbeat("a", sessions=4), 3.0)
    assert fleet.load("a") == 4


def test_a_session_that_has_gone_makes_room_before_a_heartbeat_says_so() -> None:
    fleet = a_fleet([a_heartbeat("a", sessions=2)])
    fleet.left("a", 1.0)
    assert fleet.load("a") == 1
    fleet.placed("a", 1.1)
    fleet.left("a", 1.2)
    assert fleet.load("a") == 1  # one that came and went between two heartbeats counts for nothing
    fleet.hear(a_heartbeat("a", sessions=1), 2.0)
    assert fleet.load("a") == 1
    fleet.left("a", 2.1)
    fleet.left("a", 2.1)
    assert fleet.load("a") == 0


def test_silence_means_absence_only_after_listening_for_long_enough() -> None:
    fleet = Fleet(timeout_s=TIMEOUT_S, now_s=100.0)
    assert not fleet.settled(100.0 + TIMEOUT_S)
    assert fleet.settled(100.1 + TIMEOUT_S)
    fleet.deaf(200.0)
    assert not fleet.settled(200.0 + TIMEOUT_S)
    assert fleet.settled(200.1 + TIMEOUT_S)


def test_a_verifier_gone_for_long_is_forgotten() -> None:
    fleet = a_fleet([a_heartbeat("a")])
    fleet.forget(599)
    assert len(fleet.known()) == 1
    fleet.forget(601)
    assert fleet.known() == []
