"""The cores in virtual time: what comes out for drafts that are always right, always wrong, and none."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest import virtual
from loadtest.replay_head import HeadOptions
from loadtest.virtual_world import Recorded, Timings
from services.draft_gateway.drafting.engine import EMPTY, Draft
from shared.errors import InvalidRequest
from shared.protocol import Policy
from shared.speculation.outcomes import Foresight

SAID = tuple(range(100, 148))
TIMINGS = Timings(rtt=50.0)


def draft_of(tokens: tuple[int, ...], following: int) -> Draft:
    """One that is quite sure of its tokens, and sees one more."""
    places = (*tokens, following)
    return Draft(
        tokens, (0.95,) * len(tokens), tuple(((token, 0.95), (token + 5000, 0.04)) for token in places)
    )


def text(kind: str) -> Recorded:
    """An answer that never says a token twice, so that nothing is looked up."""
    drafts = []
    for at in range(1, len(SAID)):
        right = tuple(range(100 + at, 108 + at))
        match kind:
            case "right":
                drafts.append(draft_of(right, 108 + at))
            case "wrong":
                drafts.append(draft_of(tuple(token + 9000 for token in right), 1))
            case _:
                drafts.append(EMPTY)
    return Recorded("chat", (1, 2, 3), SAID, tuple(drafts))


def played(kind: str, policy: Policy = Policy.LATENCY, timings: Timings = TIMINGS) -> virtual.Row:
    return virtual.play([text(kind)] * 4, timings, policy, 5, Foresight())


def test_drafts_that_are_right_take_fewer_passes_and_less_time() -> None:
    row = played("right")
    assert row.passes_per_token < 0.4
    assert row.times_ar < 0.5
    assert row.taken > 0.5


@pytest.mark.parametrize("kind", ["wrong", "none"])
@pytest.mark.parametrize("rtt", [5.0, 200.0])
def test_without_a_draft_that_is_right_the_floor_keeps_the_targets_pace(kind: str, rtt: float) -> None:
    row = played(kind, timings=replace(TIMINGS, rtt=rtt))
    assert row.times_ar < 1.05
    assert row.floor_share > 0.9


def test_in_the_papers_timings_ours_is_faster_than_sync_and_the_head_makes_it_faster() -> None:
    def times_ar(policy: Policy | str, head: HeadOptions | None) -> float:
        texts = [virtual.replayed(number, 40, 4, head) for number in range(12)]
        return virtual.play(texts, virtual.PAPER, policy, 4, Foresight()).times_ar

    sync = times_ar(virtual.SYNC, None)
    headless, headed = times_ar(Policy.LATENCY, None), times_ar(Policy.LATENCY, HeadOptions())
    assert headed < headless < sync


def test_under_cost_each_token_that_no_draft_foresees_waits_for_the_link() -> None:
    row = played("none", Policy.COST)
    assert row.times_ar > 1.5
    assert (row.floor_share, row.passes_per_token) == (0.0, pytest.approx(1.0, abs=0.03))


def test_a_longer_link_is_never_faster_under_cost() -> None:
    times = [
        played("right", Policy.COST, replace(TIMINGS, rtt=rtt)).times_ar for rtt in (0.0, 50.0, 200.0, 800.0)
    ]
    assert times == sorted(times)


def test_the_same_input_gives_the_same_figures() -> None:
    assert played("right") == played("right")


def test_a_draft_goes_on_with_what_was_recorded_where_it_ends() -> None:
    longer = text("right").draft(3, 12)
    assert longer.tokens == tuple(range(103, 115))
    assert len(longer.alternatives) == 13
    assert text("right").draft(len(SAID), 4) == EMPTY
    assert text("none").draft(3, 4) == EMPTY


@pytest.mark.parametrize(
    "wrong", [("--rtt", "far"), ("--policies", "speed"), ("--count", "0"), ("--max-tokens", "3")]
)
def test_an_option_that_makes_no_sense_is_refused_with_what_would(wrong: tuple[str, str]) -> None:
    parser = argparse.ArgumentParser()
    virtual.add_arguments(parser)
    with pytest.raises(InvalidRequest, match=wrong[0].removesuffix("s") if wrong[0] == "--rtt" else wrong[0]):
        virtual.run(parser.parse_args(wrong))


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text('[{"family": "qa"}]')
    with pytest.raises(InvalidRequest, match=r"record\.json is no record"):
        virtual._read(file)
