"""The comparison's arithmetic, its choice of prompts and modes, and what it writes."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loadtest import compare
from loadtest.compare_clients import Answer
from loadtest.compare_modes import MODES, Place, chosen
from loadtest.compare_parts import Carried, Parts
from loadtest.compare_report import Batch, Setting, by_prompt, differences, figures, percentile, ratio, table
from loadtest.replay_head import HEAD, HeadOptions, parse_head
from shared.errors import InvalidRequest
from shared.protocol import Tokens

TRUTH = ((10, 11, 12, 13, 14), (20, 21, 22, 23, 24))


def answer(tokens: tuple[int, ...], *arrivals: tuple[float, int], **usage: Any) -> Answer:
    return Answer(tokens, list(arrivals), usage)


def batch(*answers: Answer, up: int = 0, down: int = 0, cpu_ms: float = 0.0) -> Batch:
    return Batch(tuple(range(len(answers))), answers, up, down, cpu_ms)


SPECULATED = batch(
    answer(
        TRUTH[0],
        (100.0, 1),
        (150.0, 4),
        (180.0, 5),
        rounds=2,
        passes=3,
        drafted=6,
        accepted=2,
        floor_tokens=1,
        drafted_in_all=10,
        verify_ms=60.0,
        hits=1,
        misses=1,
        hits_by_guess=1,
        hits_by_exit=0,
        taken=1,
        forwards=2,
    ),
    answer(
        TRUTH[1],
        (200.0, 2),
        (260.0, 5),
        rounds=2,
        passes=2,
        drafted=4,
        accepted=2,
        floor_tokens=0,
        drafted_in_all=4,
        verify_ms=40.0,
        hits=2,
        misses=0,
        hits_by_guess=1,
        hits_by_exit=1,
        taken=0,
        forwards=0,
    ),
    up=200,
    down=300,
    cpu_ms=400.0,
)


def run_of(held: Batch, mode: str = "full") -> dict[str, Any]:
    setting = Setting(mode, 50.0, 1, "latency", 5, True)
    return figures(setting, [held], TRUTH, max_tokens=5, price=3.6)


def test_time_a_token_starts_at_the_first_event_and_counts_the_tokens_after_it() -> None:
    assert SPECULATED.answers[0].ms_per_token == pytest.approx(80 / 4)
    assert SPECULATED.answers[1].ms_per_token == pytest.approx(60 / 3)
    assert answer((1, 2), (5.0, 2)).ms_per_token is None


def test_figures_are_sums_by_sums() -> None:
    run = run_of(SPECULATED)
    assert run["ms_per_token"] == {"median": 20.0, "p95": 20.0}
    assert run["ttft_ms"] == 150.0
    assert run["tokens_per_round"] == pytest.approx((10 - 2 - 1) / 4)
    assert run["pass_ms"] == 25.0
    assert run["limit_ms"] == pytest.approx(25 / 1.75, abs=1e-3)
    assert run["passes_per_token"] == 0.5
    assert (run["uplink_bytes_per_token"], run["downlink_bytes_per_token"]) == (20.0, 30.0)
    assert run["verifier_ms_per_token"] == 40.0
    assert run["cost_per_million_tokens"] == pytest.approx(40.0)  # 40,000 s of a verifier at 3.6 an hour
    assert run["hit_rate"] == {"guess": 0.5, "exit": 0.25, "forward": 0.25, "late": 0.0}
    assert run["wasted_draft_tokens_per_token"] == 1.0
    assert run["wasted_verify_tokens_per_token"] == 0.6
    assert run["acceptance"] == 0.4
    assert run["floor_share"] == 0.1
    assert run["equal_to_target"]


def test_vllm_alone_has_passes_and_no_rounds() -> None:
    held = batch(answer(TRUTH[0], (50.0, 1), (130.0, 5), passes=4))
    run = run_of(held, "ar")
    assert run["tokens_per_round"] == 1.0
    assert run["limit_ms"] is None
    assert run["hit_rate"] == {"guess": None, "exit": None, "forward": None, "late": None}


def test_a_token_that_is_not_the_targets_is_told_with_its_place() -> None:
    other = batch(answer((10, 11, 99, 13, 14), (1.0, 1), (2.0, 5)), answer(TRUTH[1][:3], (1.0, 1), (2.0, 3)))
    assert differences([other], TRUTH, 5) == [{"prompt": 0, "token": 2}, {"prompt": 1, "token": 3}]
    run = run_of(other)
    assert not run["equal_to_target"]
    run["ratio_to"] = {}
    assert "no: 2 of 2" in table([run])


def test_ratios_are_of_medians_over_the_prompts_that_both_have_and_their_spread_holds_them() -> None:
    own = {n: 10.0 + n % 3 for n in range(12)}
    other = {n: 20.0 + n % 5 for n in range(1, 14)}
    found = ratio(own, other)
    assert found is not None
    assert found.value == pytest.approx(11 / 22)
    assert found.low <= found.value <= found.high
    assert found == ratio(own, other)
    assert ratio({0: 1.0}, {1: 1.0}) is None


def test_a_prompt_that_was_asked_twice_counts_once() -> None:
    twice = Batch(
        (0, 0), (answer((1, 2), (0.0, 1), (10.0, 2)), answer((1, 2), (0.0, 1), (30.0, 2))), 0, 0, 0.0
    )
    assert by_prompt([twice]) == {0: 20.0}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.95, 3.85)])
def test_percentiles_interpolate(share: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(expected)


def test_prompts_are_spread_over_families_and_over_each_family() -> None:
    texts = [("qa", f"q{n}") for n in range(30)] + [("chat", f"c{n}") for n in range(6)]
    picked = compare.balanced(texts, 6)
    assert [family for family, _ in picked] == ["chat"] * 3 + ["qa"] * 3
    assert [text for _, text in picked] == ["c1", "c3", "c5", "q5", "q15", "q25"]
    assert len(compare.balanced(texts, 100)) == 36


def test_batches_hold_every_prompt_and_are_full() -> None:
    assert list(compare.batches(5, 2)) == [(0, 1), (2, 3), (4, 0)]
    assert list(compare.batches(2, 4)) == [(0, 1, 0, 1)]


def test_a_file_of_prompts_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"category": "qa", "turns": ["a?"]}) + "\n" + json.dumps({"turns": []}) + "\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        compare.read_texts(file)
    with pytest.raises(InvalidRequest, match="can't be read"):
        compare.read_texts(tmp_path / "none")


def test_modes_are_chosen_by_name() -> None:
    assert [mode.name for mode in chosen("ar, full,ar")] == ["ar", "full"]
    with pytest.raises(InvalidRequest, match="'fast'"):
        chosen("ar,fast")
    with pytest.raises(InvalidRequest):
        chosen(",")


def test_each_ablation_switches_one_thing_off() -> None:
    full = MODES["full"].options
    for name in ("full-guesses", "full-hints", "full-forwards", "full-adaptive", "full-floor"):
        assert len(MODES[name].options.items() - full.items()) == 1, name
    assert MODES["full_exits"].options == {**full, "hints": True}
    assert MODES["full_headless"].options == full
    assert MODES["paper"].options == {**MODES["sync"].options, "hints": True}


def options_of(*words: str) -> compare.Options:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.options_of(parser.parse_args(words))


def test_the_papers_setting_has_the_papers_numbers_and_no_target_that_runs() -> None:
    options = options_of("--paper")
    assert (options.rtts_ms, options.gamma) == ((96.0,), 4)
    assert {mode.place for mode in options.modes} == {Place.EDGE, Place.HEADLESS}
    with pytest.raises(InvalidRequest, match="ar"):
        options_of("--paper", "--modes", "ar,full")
    with pytest.raises(InvalidRequest, match="full_headless"):
        options_of("--modes", "full_headless")


def test_only_one_of_the_papers_verifiers_has_the_head_and_none_where_it_is_switched_off() -> None:
    places = frozenset({Place.STOCK, Place.EDGE, Place.HEADLESS})
    heads = {
        place: parse_head(environment[HEAD])
        for place, environment in compare._replays(Path("answers"), options_of("--paper"), places).items()
    }
    assert heads == {Place.EDGE: HeadOptions(), Place.HEADLESS: None}
    without = options_of("--paper", "--head-acceptance", "0", "--modes", "sync,full")
    assert (
        parse_head(compare._replays(Path("answers"), without, places - {Place.HEADLESS})[Place.EDGE][HEAD])
        is None
    )
    with pytest.raises(InvalidRequest, match="acceptance"):
        options_of("--paper", "--head-acceptance", "0.4,0.9")


@pytest.mark.parametrize(
    "words",
    [("--rtt", "5,x"), ("--rtt", "-5"), ("--sessions", "0"), ("--max-tokens", "1"), ("--count", "-1")],
)
def test_what_can_not_be_measured_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest):
        options_of(*words)


def test_what_is_written_is_the_json_a_table_and_a_chart(tmp_path: Path) -> None:
    runs = [run_of(SPECULATED) | {"rtt_ms": rtt_ms, "ratio_to": {}} for rtt_ms in (5.0, 50.0)]
    found = {
        "prompts": "2",
        "target": "t",
        "draft": "d",
        "machine": {"cpu": "c", "placement": "p"},
        "max_tokens": 5,
        "notes": ["a note"],
        "runs": runs,
    }
    compare.write(tmp_path, found)
    assert json.loads((tmp_path / "compare.json").read_text())["runs"] == runs
    assert "a note" in (tmp_path / "compare.md").read_text()
    assert "<svg" in (tmp_path / "ms-per-token-1.svg").read_text()


# --- what is asked of whom ----------------------------------------------------------------------------------------

QUESTIONS = [compare.Question("qa", (1, n)) for n in range(3)]


@dataclass
class _Parts:
    """What serves, in so far as it is asked: `asked` holds the place, the prompt, and the tokens that were wanted."""

    serving: Sequence[Place]
    asked: list[tuple[Place, Tokens, int]] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0

    @property
    def places(self) -> dict[Place, Any]:
        return {place: SimpleNamespace(reader=_Reader(self, place)) for place in self.serving}

    async def set_round_trip(self, rtt_ms: float) -> None:
        pass

    async def link_bytes(self, place: Place) -> Carried:
        return Carried(0, 0, 0)

    def cpu_ms(self, place: Place) -> float:
        return 0.0


@dataclass
class _Reader:
    parts: _Parts
    place: Place

    async def ask(self, prompt: Tokens, max_tokens: int, options: Mapping[str, Any]) -> Answer:
        self.parts.asked.append((self.place, prompt, max_tokens))
        self.parts.busy += 1
        self.parts.most_busy = max(self.parts.most_busy, self.parts.busy)
        await asyncio.sleep(0)
        self.parts.busy -= 1
        return answer(TRUTH[0][:max_tokens], *((float(n), n) for n in range(1, min(max_tokens, 5) + 1)))


async def test_caches_are_filled_where_the_reference_was_not_asked_by_each_prompt_once_and_alone() -> None:
    parts = _Parts((Place.STOCK, Place.NGRAM, Place.EDGE, Place.WRONG))
    options = options_of("--modes", "ar,vllm_ngram,full,full_cost")
    await compare.fill_caches(cast(Parts, parts), QUESTIONS, options)
    assert parts.most_busy == 1
    assert sorted((place, prompt) for place, prompt, _ in parts.asked) == sorted(
        (place, question.tokens) for place in (Place.NGRAM, Place.EDGE) for question in QUESTIONS
    )
    assert {tokens for _, _, tokens in parts.asked} == {2}, "a longer answer would be no quicker to come by"


async def test_no_prompt_is_new_to_an_engine_once_it_is_measured() -> None:
    parts = _Parts((Place.STOCK, Place.EDGE))
    options = options_of("--modes", "ar,full", "--rtt", "5,50", "--sessions", "1,2", "--max-tokens", "5")
    await compare.measure(cast(Parts, parts), QUESTIONS, [TRUTH[0]] * 3, options, lambda _: None)
    edge = [(prompt, tokens) for place, prompt, tokens in parts.asked if place is Place.EDGE]
    assert edge[:3] == [(question.tokens, 2) for question in QUESTIONS]
    assert all(tokens > 2 for _, tokens in edge[3:])
    assert parts.asked.index((Place.STOCK, QUESTIONS[0].tokens, compare.WARM_UP_TOKENS)) >= 3
