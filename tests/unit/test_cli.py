"""The command line: clear answers to wrong arguments, and nothing imported that isn't needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared import cli
from shared.cli import ProgressBar, main


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in (
        "demo",
        "up",
        "down",
        "status",
        "replay",
        "settings",
        "models",
        "gateway",
        "verifier",
        "kv-session",
    ):
        assert re.search(rf"^    {name}\b", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "required"),
        (("fly",), "invalid choice"),
        (("settings", "moon"), "invalid choice"),
        (("demo", "--max-tokens", "0"), "'0' is not a number above 0"),
        (("models",), "required"),
        (("demo", "--rtt", "-5"), "'-5' is not a time in ms"),
        (("up", "--rtt", "soon"), "'soon' is not a time in ms"),
        (("up", "--jitter", "nan"), "'nan' is not a time in ms"),
    ],
)
def test_wrong_arguments_end_with_usage_and_status_2(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "demo"])
@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--draft", "/no/such/model", "give 'hybrid', 'lookup', 'none' or a model's directory"),
        ("--port", "70000", "a port is a number from 0 (any free one) to 65535"),
    ],
)
def test_arguments_that_cannot_be_right_are_named_with_status_2(
    command: str, option: str, value: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, option, value, "--run-dir", tmp_path) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("up", "--target", tmp_path, "--run-dir", tmp_path / "run") == 1
    assert "has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_kafka_that_does_not_answer_is_named_and_nothing_is_left_running(
    target_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.stack.kafka.CHECK_S", 0.1)
    monkeypatch.setattr("shared.models.verify", lambda directory: None)
    status = run("up", "--target", target_like, "--kafka", "127.0.0.1:1", "--run-dir", tmp_path / "run")
    assert status == 1
    assert "no Kafka answers at 127.0.0.1:1" in capsys.readouterr().err
    assert run("status", "--run-dir", tmp_path / "run") == 1
    assert "no stack" in capsys.readouterr().out


@pytest.fixture
def target_like(tmp_path: Path) -> Path:
    directory = tmp_path / "target"
    directory.mkdir()
    return directory


def test_down_and_status_without_a_stack_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("down", "--run-dir", tmp_path) == 0
    assert "nothing runs" in capsys.readouterr().out
    assert run("status", "--run-dir", tmp_path) == 1
    assert "`outrider up` starts one" in capsys.readouterr().out
    assert run("status", "--json", "--run-dir", tmp_path) == 1
    assert capsys.readouterr().out == "[]\n"


def test_a_damaged_record_is_an_error_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stack.json").write_text("{")
    assert run("status", "--run-dir", tmp_path) == 1
    assert "can't be read" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "verify", tmp_path / "none") == 1
    assert f"there is no model directory {tmp_path / 'none'}" in capsys.readouterr().err


def test_an_empty_cache_of_models_says_how_to_fill_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path))
    assert run("models", "list") == 0
    assert "outrider models fetch" in capsys.readouterr().out


def test_a_bad_environment_is_named_setting_by_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTRIDER_KV_SESSION_PORT", "many")
    with pytest.raises(SystemExit) as ended:
        run("kv-session")
    assert ended.value.code == 2
    assert "OUTRIDER_KV_SESSION_PORT='many'" in capsys.readouterr().err


def test_a_service_whose_packages_are_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.SERVICES, "verifier", "services.no_such_service")
    assert run("verifier") == 1
    assert 'pip install "outrider[verifier-cpu]"' in capsys.readouterr().err


@pytest.mark.parametrize("form", ["table", "env", "json"])
def test_settings_come_in_every_format(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("settings", "gateway", "--format", form) == 0
    text = capsys.readouterr().out
    assert "OUTRIDER_BLOCK_LENGTH" in text
    assert "OUTRIDER_KV_CACHE_MB" not in text


def test_looking_at_settings_loads_no_model_library() -> None:
    code = (
        "import sys; from shared.cli import main; main(['settings']);"
        "print(sorted({'torch', 'vllm', 'transformers', 'aiokafka', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "[]"


def test_whoever_stops_reading_causes_no_traceback() -> None:
    command = f"{sys.executable} -m shared.cli settings | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_progress_without_a_terminal_is_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("model")
    for step, share in (("downloading", 0.0), ("downloading", 0.5), ("converting", 0.0), ("converting", 1.0)):
        bar(step, share)
    bar.close()
    assert capsys.readouterr().err == "model: downloading\nmodel: converting\n"
