"""The whole system's benchmark: a target that knows its mind, prompts, figures and what is said of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loadtest.bench import main
from loadtest.compare_clients import Answer, TurnsReader
from loadtest.compare_report import Batch
from loadtest.system import (
    Options,
    Turns,
    add_arguments,
    counter,
    options_of,
    prompts_of,
    report,
    runs_of,
    verdict,
    wanted_of,
)
from loadtest.system_target import (
    FIRST,
    TINY,
    VOCABULARY,
    config_of,
    roomy_folder,
    successors,
    weight_bytes,
    write_target,
)
from services.verifier.engine.checkpoint import read_checkpoint
from shared.protocol import Tokens


def options(**changes: object) -> Options:
    asked: dict[str, object] = {
        "shapes": TINY,
        "modes": ("ar", "cost"),
        "sessions": (1, 64),
        "answers": None,
        "acceptance": 0.8,
        "draft_ms": 2.0,
        "gamma": 5,
        "rtt_ms": 50.0,
        "max_tokens": 4,
        "prompt_tokens": 32,
        "cuda": False,
    }
    return Options(**{**asked, **changes})  # type: ignore[arg-type]


# --- the target ---


def test_words_follow_one_another_in_one_round_trip_that_special_ones_lead_into() -> None:
    after = successors(200, 10)
    seen, token = set(), 50
    for _ in range(190):
        token = after[token]
        seen.add(token)
    assert seen == set(range(10, 200)) and token == 50
    assert all(10 <= after[token] < 200 for token in range(10))


def test_a_target_that_is_written_says_what_was_laid_down_with_room_to_spare(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    config = config_of(TINY)
    write_target(config, tmp_path, tmp_path / "target")
    checkpoint = read_checkpoint(str(tmp_path / "target"))
    assert (checkpoint.vocab_size, checkpoint.num_layers) == (VOCABULARY, config["num_hidden_layers"])
    written = sum(path.stat().st_size for path in (tmp_path / "target").glob("*.safetensors"))
    assert written == pytest.approx(weight_bytes(config), rel=0.01)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "target").eval()
    after, prompt = successors(VOCABULARY, FIRST), [1, FIRST + 5, 40_000, 3_000]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0]
    best = logits.topk(2, dim=-1)
    assert best.indices[1:, 0].tolist() == [after[token] for token in prompt[1:]]
    margins = (best.values[1:, 0] - best.values[1:, 1]) / logits[1:].std(dim=-1)
    assert margins.min() > 5


def test_a_folder_for_more_than_memory_holds_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert roomy_folder(1 << 60) == tmp_path


# --- prompts and options ---


class Words:
    """A tokenizer that gives a word its length, and the first one a special id."""

    def encode(self, text: str) -> Tokens:
        return (1, *(100 + len(word) for word in text.split()))


def test_prompts_are_as_many_as_asked_for_differ_and_hold_no_special_token(tmp_path: Path) -> None:
    texts = ["a bb ccc dddd eeeee " * 10, "one three eleven fourteen " * 10]
    (tmp_path / "prompts").write_text("\n".join(json.dumps({"turns": [text]}) for text in texts))
    found = prompts_of(tmp_path / "prompts", Words(), 8, 20)  # type: ignore[arg-type]
    assert len({question.tokens for question in found}) == 8
    assert len({len(question.tokens) for question in found}) == 8
    assert all(len(q.tokens) <= 20 and min(q.tokens) >= FIRST for q in found)


def test_every_client_asks_as_often_as_the_others() -> None:
    assert options().answers_for(1) == 8
    assert options().answers_for(64) == 128
    assert options(answers=30).answers_for(16) == 32
    assert options(answers=1).answers_for(64) == 64
    assert options(answers=300, in_a_row=2).answers_for(64) == 256


def test_one_engine_is_as_large_as_the_other_and_takes_a_few_sessions_more_than_come() -> None:
    wanted = wanted_of(Path("target"), Path("exits"), (1, 2), options(), 300)
    assert wanted.environment["OUTRIDER_MAX_SESSIONS"] == "72"
    assert wanted.environment["OUTRIDER_MAX_BLOCK"] == "5"
    own = (
        wanted.environment[f"OUTRIDER_{name}"] for name in ("MAX_SESSIONS", "KV_CACHE_MB", "MAX_MODEL_LEN")
    )
    assert wanted.stock_options[1::2] == tuple(own)
    assert wanted.pinned and not wanted_of(Path("t"), Path("e"), (1,), options(cuda=True), 1).pinned


def test_clients_of_many_sessions_are_many_edges_where_there_are_cores_for_them() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def edges(*arguments: str, cuda: bool) -> tuple[int, int]:
        found = options_of(parser.parse_args(arguments), cuda=cuda)
        wanted = wanted_of(Path("t"), Path("e"), (1,), found, 1)
        return wanted.edges, wanted.gateways

    assert edges(cuda=True) == (8, 4)
    assert edges("--sessions", "1,3", cuda=True) == (3, 2)
    assert edges(cuda=False) == (1, 1)
    assert edges("--edges", "2", cuda=False) == (2, 1)


async def test_several_edges_answer_in_turn() -> None:
    asked: list[tuple[int, Tokens]] = []

    class Edge:
        def __init__(self, number: int) -> None:
            self._number = number

        async def ask(self, prompt: Tokens, max_tokens: int, options: Mapping[str, Any]) -> Answer:
            asked.append((self._number, prompt))
            return Answer(prompt)

    reader = TurnsReader([Edge(0), Edge(1)])
    for token in range(3):
        assert (await reader.ask((token,), 1, {})).tokens == (token,)
    assert asked == [(0, (0,)), (1, (1,)), (0, (2,))]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modes", "ar,full"], "there is no mode 'full'"),
        (["--sessions", "0"], "numbers from 1"),
        (["--shapes", "huge"], "there are no 'huge'"),
        (["--acceptance", "1.5"], "between 0 and 1"),
        (["--answers", "0"], "--in-a-row and --edges 1"),
        (["--edges", "0"], "--in-a-row and --edges 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loadtest.system.on_cuda", lambda: False)
    assert main(["system", *arguments]) == 1
    assert said in capsys.readouterr().err


# --- figures ---


def turns(answer: Answer, busy_s: float, wall_s: float) -> Turns:
    batch = Batch(prompts=(0,), answers=(answer,), bytes_up=1, bytes_down=1, cpu_ms=1.0)
    return Turns([batch, batch], busy_s, wall_s, cpu_s={"engine": busy_s, "clients": 0.008})


def test_tokens_a_verifier_second_are_those_of_all_answers_by_the_time_that_the_engine_computed() -> None:
    stock = Answer((7, 8, 9, 10), [(10.0, 1), (40.0, 4)], {"passes": 3})
    usage = {"rounds": 1, "passes": 1, "drafted": 5, "accepted": 2, "drafted_in_all": 5, "verify_ms": 9.0}
    own = Answer((7, 8, 9, 10), [(10.0, 1), (40.0, 4)], usage)
    cost = turns(own, 0.5, 4.0)
    cost.steps, cost.passes = {"steps": 4.0}, 10.0
    found = runs_of({"ar": turns(stock, 2.0, 2.0), "cost": cost}, [(7, 8, 9, 10)], options(), 64)
    assert [run["tokens"] for run in found] == [8, 8]
    assert [run["tokens_per_busy_second"] for run in found] == [4.0, 16.0]
    assert [run["tokens_per_wall_second"] for run in found] == [4.0, 2.0]
    assert [run["per_verifier_second_to_ar"] for run in found] == [1.0, 4.0]
    assert [run["per_wall_second_to_ar"] for run in found] == [1.0, 0.5]
    assert [(run["steps"], run["sessions_per_step"]) for run in found] == [(None, None), (4, 2.5)]
    assert [run["cpu_ms_per_token"] for run in found] == [
        {"engine": 250.0, "clients": 1.0},
        {"engine": 62.5, "clients": 1.0},
    ]
    assert all(run["synthetic"] and run["equal_to_target"] for run in found)
    told = {
        **dict.fromkeys(("acceptance", "draft_ms_per_token", "gamma", "rtt_ms", "max_tokens"), 1),
        **dict.fromkeys(("edges", "gateways"), 1),
        "shapes": TINY,
        "device": "d",
        "runs": found,
    }
    assert "4.00 × vLLM's tokens per verifier-second, reaches 2" in verdict(told)
    assert report(told).startswith("SYNTHETIC") and "| cost | 64 | 16 | 4 | 2 | 0.5 |" in report(told)
    assert "| ar | 64 | 250 | 1 |" in report(told)


def test_a_ratio_below_what_is_promised_is_said_and_so_is_one_that_was_not_measured() -> None:
    run = {"mode": "cost", "sessions": 64, "per_verifier_second_to_ar": 1.5}
    assert "1.50 × vLLM's tokens per verifier-second, does not reach 2" in verdict({"runs": [run]})
    assert "was not measured" in verdict({"runs": [{**run, "sessions": 16}]})
    assert "was not measured" in verdict({"runs": [{**run, "per_verifier_second_to_ar": None}]})


def test_a_counter_is_read_from_a_page_of_metrics() -> None:
    page = "# HELP busy_total Time.\nbusy_created 7.0\nbusy_total 12.5\nbusy_total_more 3\n"
    assert counter(page, "busy") == 12.5
    assert counter(page, "steps") == 0.0
