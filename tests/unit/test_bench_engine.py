"""The engine's benchmark: options, targets, what steps become, and where its exits stand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest import bench, engine
from loadtest.engine import Passes, read_options
from loadtest.engine_modes import MODES, Plan, Sizes, chosen_modes
from loadtest.engine_report import (
    Measured,
    Setting,
    Step,
    draw,
    percentile_90,
    ratios,
    report,
    row,
    shown_step,
    table,
)
from loadtest.engine_shapes import EXITS_SHARE, exit_layers, exit_width, find_target, write_exits
from services.verifier.engine.exit_files import TargetFacts, read_exits
from shared.errors import InvalidRequest

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def steps(turn: int, *times: float, **known: Any) -> list[Step]:
    return [Step(turn=turn, ms=ms, tokens=6, **known) for ms in times]


def options(*given: str) -> engine.Options:
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    return read_options(parser.parse_args(["--out", "somewhere", *given]))


def tiny(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}))
    return folder


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--sessions", "1,many"], "--sessions: '1,many'"),
        (["--sessions", "0,4"], "--sessions: '0,4'"),
        (["--k", "0"], "--k: 0"),
        (["--steps", "1"], "--steps: 1"),
        (["--threads", "0"], "--threads: 0"),
        (["--modes", "verify,fastest"], "'fastest'"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(given: list[str], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        options(*given)


def test_sessions_are_sorted_and_measured_once() -> None:
    assert options("--sessions", "16,1,16").sessions == (1, 16)


def test_stock_ar_is_always_measured_since_it_says_what_is_right() -> None:
    assert [mode.name for mode in chosen_modes("verify")] == ["stock_ar", "verify"]


def test_without_exits_there_is_no_mode_that_verifies_with_them() -> None:
    names = [mode.name for mode in options("--exits", "none").modes]
    assert "verify_exits" not in names
    assert {"verify", "floor"} <= set(names)


def test_the_command_says_what_was_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["engine", "--out", str(tmp_path), "--sessions", "none"]) == 1
    assert "scripts/bench engine: --sessions: 'none'" in capsys.readouterr().err


def test_a_benchmark_that_is_unknown_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["motor"])
    assert "engine" in capsys.readouterr().err


# --- targets and exits --------------------------------------------------------------------------------------------


def test_shapes_that_are_unknown_are_named_beside_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'llama-9'.*llama-2-7b, llama-3-8b, smollm2-135m"):
        find_target("llama-9", tmp_path)


def test_an_architecture_that_is_not_served_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "other", architectures=["GPT2LMHeadModel"])
    with pytest.raises(InvalidRequest, match="GPT2LMHeadModel"):
        find_target(str(folder), tmp_path)


@pytest.mark.parametrize("lacking", ["hidden_size", "model_type", "architectures"])
def test_a_config_that_lacks_what_is_needed_is_refused(lacking: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "other", **{lacking: None})
    with pytest.raises(InvalidRequest, match=r"config\.json lacks"):
        find_target(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("shapes", "parameters", "kv_elements"),
    [("llama-2-7b", 6_738_415_616, 262_144), ("llama-3-8b", 8_030_261_248, 65_536)],
)
def test_the_shapes_are_those_of_the_models(
    shapes: str, parameters: int, kv_elements: int, tmp_path: Path
) -> None:
    target = find_target(shapes, tmp_path)
    assert (target.parameters, target.kv_elements, target.dummy) == (parameters, kv_elements, True)
    assert target.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("asked", "layers"),
    [("auto", (8, 16, 24)), ("0.25,0.5", (8, 16)), ("4,31", (4, 31)), ("none", ()), ("0.5,16", (16,))],
)
def test_exits_stand_at_depths_or_layers(asked: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    assert exit_layers(asked, find_target("llama-2-7b", tmp_path)) == layers


@pytest.mark.parametrize("asked", ["", "half", "32", "0", "-1", "1.5", "0.001"])
def test_exits_where_no_layer_ends_are_refused(asked: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"--exits: .*from 1 to 31"):
        exit_layers(asked, find_target("llama-2-7b", tmp_path))


@pytest.mark.parametrize("exits", [1, 3, 5])
def test_all_exits_together_have_their_share_of_the_parameters(exits: int, tmp_path: Path) -> None:
    target = find_target("llama-2-7b", tmp_path)
    adapters = exits * 3 * target.hidden * exit_width(target, exits)
    assert adapters == pytest.approx(EXITS_SHARE * target.parameters, rel=0.05)


def test_random_exits_are_read_as_trained_ones_are(tmp_path: Path) -> None:
    target = find_target(str(tiny(tmp_path / "tiny")), tmp_path)
    file = tmp_path / "exits.safetensors"
    write_exits(target, (1, 3), file)
    facts = TargetFacts(target.directory, target.hidden, 2048, target.epsilon, torch.float32)
    exits, naming = read_exits(file, facts)
    assert sorted(exits) == [1, 3]
    assert naming.vocabulary is not None
    assert naming.vocabulary.tolist() == list(range(2048))
    assert naming.reduce is not None
    assert naming.reduce.shape == (4, 64)
    assert exits[1].calibration.judgement
    hidden = torch.ones(2, 64)
    assert not torch.equal(exits[1](hidden), hidden)


def test_the_kv_cache_holds_all_sessions_at_their_longest(tmp_path: Path) -> None:
    target = find_target("llama-2-7b", tmp_path)
    plan = Plan(target, "cuda", "bfloat16", 1, Sizes((1, 64), 200, 5), "8", "none", "ipc://nowhere")
    a_session = 200 * 2 * target.kv_elements
    for mode, sessions in (("stock_ar", 64), ("verify", 64), ("verify_exits", 128), ("floor", 128)):
        assert sessions * a_session <= plan.kv_bytes(MODES[mode]) <= 1.2 * sessions * a_session


def test_only_modes_with_the_same_exits_share_an_engine_of_ours() -> None:
    pairs = {
        (one.name, other.name) for one in MODES.values() for other in MODES.values() if one.shares(other)
    }
    assert {pair for pair in pairs if len(set(pair)) > 1} == {
        ("floor", "verify_exits"),
        ("verify_exits", "floor"),
    }


# --- how much is said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_asked", [2, 7, 8, 9, 40, 64])
def test_passes_hold_as_many_steps_as_were_asked_for(steps_asked: int) -> None:
    passes = Passes.of(steps_asked, 5)
    assert sum(sum(turns) for turns in passes.turns) == steps_asked
    assert all(0 < length <= engine.TURN for turns in passes.turns for length in turns)


def test_a_session_has_room_for_all_that_a_pass_can_say() -> None:
    passes = Passes.of(64, 5)
    longest = max(sum(turns) for turns in passes.turns)
    assert passes.room > 1 + longest * (passes.k + 1) - longest // 2


# --- figures ------------------------------------------------------------------------------------------------------


def test_the_first_step_of_a_turn_does_not_count() -> None:
    found = row(Measured("verify", 1, steps(0, 90.0, 8.0, 10.0) + steps(1, 70.0, 12.0, 14.0)))
    assert found["step_ms"] == {"median": 11.0, "p90": pytest.approx(13.4), "spread": [9.0, 13.0]}
    assert found["steps"] == 4


def test_a_turn_of_one_step_counts() -> None:
    assert row(Measured("floor", 1, steps(0, 5.0)))["step_ms"]["median"] == 5.0
    assert percentile_90([5.0]) == 5.0


def test_tokens_are_counted_for_each_session_and_each_second() -> None:
    found = row(Measured("verify", 2, steps(0, 99.0, 10.0, 20.0)))
    assert found["tokens_per_step"] == 3.0
    assert found["tokens_per_s"] == 400.0


def test_a_row_says_where_the_host_works_and_when_exits_arrive() -> None:
    known = {
        "launched_ms": 0.5,
        "launch_ms": 0.1,
        "sampled_ms": 9.0,
        "forward_from_ms": 0.4,
        "forward_ms": 7.0,
    }
    own = steps(0, 50.0, 10.0, **known)
    own[1].exits_ms, own[1].heard_ms = {8: 2.5, 16: 5.0}, {8: 2.6, 16: 5.2}
    found = row(Measured("verify_exits", 1, own))
    assert found["host_ms"] == {"before_launch": 0.4, "launch": 0.1, "after_sampling": 1.0}
    assert found["forward_ms"] == 7.0
    assert found["exit_on_host_ms"] == {"8": 2.5, "16": 5.0}
    assert found["exit_heard_ms"] == {"8": 2.6, "16": 5.2}


def test_what_is_not_known_of_steps_is_left_out() -> None:
    found = row(Measured("stock_ar_async", 1, steps(0, 9.0, 8.0)))
    assert "host_ms" not in found
    assert "forward_ms" not in found
    assert found["exit_on_host_ms"] == {}


def _measured() -> list[Measured]:
    with_exits = steps(0, 50.0, 10.4, 10.4) + steps(1, 50.0, 10.8, 10.8)
    for step in with_exits:
        step.exits_ms = {8: step.ms / 4, 16: step.ms / 2, 24: step.ms * 0.75}
        step.launched_ms, step.sampled_ms, step.forward_from_ms, step.forward_ms = (
            0.5,
            step.ms - 0.4,
            0.4,
            8.0,
        )
    return [
        Measured("stock_ar", 4, steps(0, 50.0, 9.0, 9.0) + steps(1, 50.0, 9.0, 9.0), 4, []),
        Measured("verify", 4, steps(0, 50.0, 10.0, 10.0) + steps(1, 50.0, 10.0, 10.0), 4, [(2, 7)]),
        Measured("verify_exits", 4, with_exits, 4, []),
    ]


def test_ratios_are_judged_by_what_is_asked() -> None:
    found = {each["name"]: each for each in ratios(_measured())}
    without = found["verify with exits ÷ verify without"]
    assert (without["value"], without["at_most"], without["holds"]) == (1.06, 1.04, False)
    assert without["spread"] == [1.04, 1.08]
    assert found["verify with exits ÷ stock AR"]["value"] == pytest.approx(10.6 / 9, abs=1e-3)
    assert "floor ÷ stock AR" not in found
    assert found["exit after layer 8 on the host ÷ step"]["holds"] is True
    assert found["exit after layer 24 on the host ÷ step"]["holds"] is False
    assert found["host before launch and after sampling, ms"]["value"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("shapes", "dtype", "judged"),
    [("llama-2-7b", "bfloat16", True), ("llama-2-7b", "float32", False), ("smollm2-135m", "bfloat16", False)],
)
def test_only_the_setting_that_bounds_are_given_for_is_judged(shapes: str, dtype: str, judged: bool) -> None:
    held = report(Setting("H100", shapes, 5, (8, 16, 24), {"dtype": dtype}), _measured())
    assert any(each["holds"] is not None for each in held["ratios"]) is judged


def test_a_report_has_the_form_that_is_asked_and_reads_as_a_table() -> None:
    facts = {"dtype": "bfloat16", "notes": ["one thing"]}
    held = json.loads(json.dumps(report(Setting("H100", "llama-2-7b", 5, (8, 16, 24), facts), _measured())))
    assert {"device", "shapes", "k", "exits", "rows", "ratios", "dtype"} <= held.keys()
    for own in held["rows"]:
        assert {"mode", "sessions", "step_ms", "exit_on_host_ms"} <= own.keys()
        assert {"median", "p90"} <= own["step_ms"].keys()
        assert own["mode"] in MODES
    shown = table(held)
    assert "| verify | 4 | 10.00 |" in shown
    assert "1 of 4" in shown
    assert "does not hold" in shown
    assert "one thing" in shown
    widths = {line.count("|") for line in shown.splitlines() if line.startswith("| stock_ar |")}
    assert widths == {shown.splitlines()[2].count("|")}


def test_the_picture_is_of_the_step_of_median_length(tmp_path: Path) -> None:
    found = shown_step(_measured())
    assert found is not None
    sessions, step = found
    assert (sessions, step.ms) == (4, 10.8)
    draw(tmp_path / "timeline.svg", "a step", step)
    drawn = (tmp_path / "timeline.svg").read_text()
    for name in (
        "host before launch",
        "forward",
        "exit after 8",
        "exit after 24",
        "sampling",
        "host after",
        "8.00 ms",
    ):
        assert name in drawn


def test_a_step_of_which_nothing_is_known_is_drawn_as_a_whole(tmp_path: Path) -> None:
    draw(tmp_path / "timeline.svg", "a step", Step(turn=0, ms=4.0))
    assert "4.00 ms" in (tmp_path / "timeline.svg").read_text()


def test_no_picture_without_a_step_with_exits() -> None:
    assert shown_step([Measured("stock_ar", 1, steps(0, 9.0, 8.0))]) is None
