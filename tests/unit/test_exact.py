"""The exactness run: which blocks are fed, what counts as a difference, and what the report says of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loadtest.bench import main
from loadtest.exact import VARIANTS, faults, report
from loadtest.exact_engine import KINDS, Difference, Plan, block_for, first_difference
from loadtest.exact_exits import compare, read
from shared.protocol import Tokens

VOCABULARY = 100
TRUTH: Tokens = tuple(range(20))


def test_blocks_of_every_kind_are_fed_and_are_what_their_kind_says() -> None:
    seen: Counter[str] = Counter()
    for number in range(400):
        base = number % 15
        right = TRUTH[base : base + 5]
        kind, block = block_for(TRUTH, base, 5, VOCABULARY, f"seed {number}")
        seen[kind] += 1
        if kind == "right":
            assert block == right
        elif kind == "short":
            assert 0 < len(block) < 5 and block == right[: len(block)]
        elif kind == "wrong":
            assert sum(one != other for one, other in zip(block, right, strict=True)) == 1
            assert all(0 <= token < VOCABULARY for token in block)
        else:
            assert block == ()
    assert set(seen) == set(KINDS) and min(seen.values()) > 50


def test_a_seed_always_gives_the_same_block_and_no_block_is_longer_than_what_is_left() -> None:
    assert block_for(TRUTH, 3, 5, VOCABULARY, "a") == block_for(TRUTH, 3, 5, VOCABULARY, "a")
    for number in range(50):
        assert len(block_for(TRUTH, 18, 5, VOCABULARY, f"{number}")[1]) <= 2
        assert block_for(TRUTH, 20, 5, VOCABULARY, f"{number}") == ("empty", ())
        assert block_for(TRUTH, 3, 0, VOCABULARY, f"{number}") == ("empty", ())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ((1, 2, 3), None),
        ((1, 9, 3), Difference(7, 1, 2, 9)),
        ((1, 2), Difference(7, 2, 3, None)),
        ((1, 2, 3, 4), Difference(7, 3, None, 4)),
    ],
)
def test_a_difference_is_the_first_token_that_is_another_or_is_not_there(
    said: Tokens, expected: Difference | None
) -> None:
    assert first_difference(7, (1, 2, 3), said) == expected


def test_a_plan_is_what_it_was_once_it_has_been_in_a_file(tmp_path: Path) -> None:
    plan = Plan("m", "float32", True, ((1, 2), (3,)), (1, 16), 8, 5, 512, "truths", "out")
    plan.write(tmp_path / "plan")
    assert Plan.read(tmp_path / "plan") == plan


# --- exits ---


def hints(**layers: list[list[float]]) -> list[list[Any]]:
    return [["1.0", 4, int(layer.removeprefix("l")), outcomes] for layer, outcomes in layers.items()]


def test_exits_are_equal_when_confidences_differ_by_no_more_than_the_tolerance() -> None:
    graph = read(hints(l8=[[2, 5, 0.6], [1, 7, 0.3]], l16=[[5, 1, 0.9]]))
    eager = read(hints(l8=[[2, 5, 0.6005], [1, 7, 0.3]], l16=[[5, 1, 0.9]]))
    found = compare(graph, eager, 1e-3)
    assert found.equal and found.hints == 2 and found.same_best == 2 and found.worst == pytest.approx(0.0005)
    assert not compare(graph, eager, 1e-4).equal


def test_another_likeliest_outcome_is_equal_only_where_the_two_are_tied() -> None:
    graph = read(hints(l8=[[2, 5, 0.401], [1, 7, 0.4]]))
    assert compare(graph, read(hints(l8=[[1, 7, 0.4004], [2, 5, 0.4003]])), 1e-3).equal
    assert not compare(graph, read(hints(l8=[[1, 7, 0.4], [3, 9, 0.2]])), 1e-3).equal
    assert not compare(read(hints(l8=[[2, 5, 0.5]])), read(hints(l8=[[1, 7, 0.5]])), 1e-3).equal


def test_the_hint_that_differs_most_is_told_with_both_sides() -> None:
    graph = read(hints(l8=[[1, 7, 0.5], [0, 4, 0.2]], l16=[[2, 5, 0.75], [0, 3, 0.1]]))
    eager = read(hints(l8=[[1, 7, 0.5], [0, 4, 0.2]], l16=[[2, 5, 0.5], [0, 9, 0.1]]))
    assert compare(graph, graph, 1e-3).furthest is None
    told = compare(graph, eager, 1e-3).furthest
    assert told is not None
    (_, _, layer), outcomes = told
    assert (layer, outcomes) == (16, [((2, 5), 0.75, 0.5)])


def test_nothing_to_compare_is_not_equal_and_hints_of_one_side_are_counted() -> None:
    assert not compare({}, {}, 1e-3).equal
    found = compare(read(hints(l8=[[0, 1, 0.5]], l16=[[0, 1, 0.5]])), read(hints(l8=[[0, 1, 0.5]])), 1e-3)
    assert (found.hints, found.missing) == (1, 1)


# --- what it says ---


def outcome(name: str, differences: int = 0, *, failed: str = "", equal: bool = True) -> dict[str, Any]:
    found = [{"prompt": 3, "position": 9, "expected": 1, "found": 2, "gap": 0.0078}] * differences
    blocks = dict.fromkeys(KINDS, 2)
    run = {"sessions": 16, "answers": 40, "tokens": 900, "blocks": blocks, "differences": found}
    exits = {
        "hints": 9,
        "missing": 0,
        "tolerance": 1e-3,
        "worst": 0.0,
        "beyond": 0,
        "same_best": 9,
        "equal": equal,
    }
    return {
        "name": name,
        "failed": failed,
        "stock_differs": {"16": 2},
        "runs": [] if failed else [run],
        "exits": exits,
    }


def told(*variants: dict[str, Any]) -> dict[str, Any]:
    return {"target": "t", "device": "d", "prompts": 40, "max_tokens": 64, "k": 5, "variants": list(variants)}


def test_only_plain_bfloat16_may_differ_and_says_by_how_much() -> None:
    plain = told(outcome("float32"), outcome("bfloat16", 2))
    assert faults(plain) == []
    assert "| bfloat16 | 16 | 38 of 40 | 900 | 2, 2, 2, 2 | 2 |" in report(plain)
    assert "prompt 3: token 9 is 2, not 1 (logits apart by 0.0078)" in report(plain)
    for name in ("float32", "bfloat16-invariant"):
        assert faults(told(outcome(name, 1))) == [f"{name}, 16 at a time: 1 answers differ"]


def test_a_variant_that_can_not_run_is_a_fault_in_float32_alone() -> None:
    assert faults(told(outcome("bfloat16-invariant", failed="no such kernels"))) == []
    assert "no such kernels" in report(told(outcome("bfloat16-invariant", failed="no such kernels")))
    assert faults(told(outcome("float32", failed="no memory")))


def test_exits_that_differ_are_a_fault_everywhere() -> None:
    assert all(faults(told(outcome(name, equal=False))) for name in VARIANTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "float64"], "there is no 'float64'"),
        (["--sessions", "4,16"], "1 among them"),
        (["--count", "0"], "--count should be at least 1"),
        (["--max-tokens", "1"], "--max-tokens should be at least 2"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loadtest.exact.on_cuda", lambda: False)
    assert main(["exact", *arguments]) == 1
    assert said in capsys.readouterr().err
