"""The stack as a whole: it comes up, answers, looks after its parts, and leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from openai import OpenAI

from shared.cli import main
from shared.errors import BrokerUnavailable
from shared.stack import record as records
from shared.stack.health import Health, ask
from shared.stack.kafka import Broker
from shared.stack.processes import ProcessIdentity, StackError
from shared.stack.redis import RedisServer
from shared.stack.settings import StackSettings
from shared.stack.stack import (
    LONGEST_BACKOFF_S,
    Progress,
    Stack,
    StackOptions,
    StackRunning,
    State,
    backoff_s,
)

pytestmark = [pytest.mark.kafka, pytest.mark.stack, pytest.mark.timeout(300)]

PROMPT = "Name three colours."


@pytest.fixture
def small(
    kafka_broker: Broker, redis_server: RedisServer, topic_prefix: str, redis_prefix: str
) -> StackOptions:
    """One kv-session on the session's brokers: what is quick to start."""
    return StackOptions(
        target=Path("nowhere"),
        kafka=kafka_broker.bootstrap,
        kafka_flavor=kafka_broker.flavor,
        redis=redis_server.url,
        gateways=0,
        verifiers=0,
        environment={"OUTRIDER_TOPIC_PREFIX": topic_prefix, "OUTRIDER_REDIS_PREFIX": redis_prefix},
        die_with_parent=True,
    )


def eventually(holds: Callable[[], bool], within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def changed(options: StackOptions, **changes: object) -> StackOptions:
    return replace(options, **changes)  # type: ignore[arg-type]


def answer(url: str, model: str) -> str:
    with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
        chat = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=12
        )
    return chat.choices[0].message.content or ""


# --- all of it ----------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_every_gateway_of_a_stack_gives_the_same_answer(stack: Stack) -> None:
    first, second = (answer(stack.url(name), stack.model_name) for name in ("gateway-0", "gateway-1"))
    assert first
    assert first == second


@pytest.mark.engine
@pytest.mark.parametrize("name", ["kv-session-0", "gateway-0"])
def test_a_service_that_is_killed_is_started_again_at_its_address_and_serves(stack: Stack, name: str) -> None:
    url, before, restarts = stack.url(name), stack.pid(name), stack.restarts(name)
    stack.kill(name)
    assert eventually(lambda: stack.restarts(name) == restarts + 1)
    stack.wait_ready(name)
    assert stack.pid(name) != before
    assert stack.url(name) == url
    assert answer(stack.gateway_url, stack.model_name)


@pytest.mark.engine
def test_the_demo_answers_and_leaves_nothing_running(
    kafka: str, redis_url: str, topic_prefix: str, redis_prefix: str, target_model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "shared.cli", "demo", "--once", "--prompt", PROMPT, "--max-tokens", "16"]
    command += ["--kafka", kafka, "--redis", redis_url, "--target", str(target_model), "--port", "0"]
    environment = {
        "OUTRIDER_TOPIC_PREFIX": topic_prefix,
        "OUTRIDER_REDIS_PREFIX": redis_prefix,
        # So that each pass verifies a block, whose hints there is something to tell of: a session that goes on by itself
        # may have said all before a draft arrives.
        "OUTRIDER_POLICY": "cost",
    }
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path)],
        capture_output=True, text=True, timeout=240, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"❯ {PROMPT}" in done.stdout
    assert re.search(r"\d+ tokens in \d+ passes of the target, \d+\.\d\d a pass", done.stdout)
    assert re.search(r"hints led their verdict by, at the median: layer \d+: \d+ ms", done.stdout)
    assert "\033[" not in done.stdout
    assert records.read(tmp_path) is None
    assert not processes_that_name(topic_prefix)


def processes_that_name(text: str) -> list[str]:
    """Processes with this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.name != str(os.getpid()) and text.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


# --- coming up and going down -------------------------------------------------------------------------------------


def test_it_tells_what_happens_and_is_known_to_others_until_it_is_down(
    small: StackOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Progress] = []
    with Stack(small, settings=StackSettings(run_dir=tmp_path), report=told.append) as stack:
        assert {(each.part, each.state) for each in told} >= {
            ("kafka", State.READY), ("redis", State.READY),
            ("kv-session-0", State.STARTING), ("kv-session-0", State.READY),
        }  # fmt: skip
        assert main(["status", "--run-dir", str(tmp_path)]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kv-session-0"))
        assert f"ready      pid {stack.pid('kv-session-0')}" in line
        service = ProcessIdentity.of(stack.pid("kv-session-0") or 0)
    assert not service.alive
    assert records.read(tmp_path) is None


def test_what_was_given_is_not_stopped(small: StackOptions, tmp_path: Path, kafka_broker: Broker) -> None:
    stack = Stack(small, settings=StackSettings(run_dir=tmp_path))
    with stack, pytest.raises(StackError, match="there is no 'kafka' of ours"):
        stack.kill("kafka")
    assert kafka_broker.answers()


def test_a_stack_that_was_left_running_is_reported_and_stopped_by_somebody_else(
    small: StackOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = StackSettings(run_dir=tmp_path)
    stack = Stack(small, settings=settings).up()
    service = ProcessIdentity.of(stack.pid("kv-session-0") or 0)
    with pytest.raises(StackRunning, match="a stack runs in"):
        Stack(small, settings=settings).up()
    assert service.alive
    assert main(["down", "--run-dir", str(tmp_path)]) == 0
    assert not service.alive
    assert main(["down", "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "stopped\nnothing runs\n"
    stack.down()


def test_what_a_stack_left_behind_is_cleared_away(small: StackOptions, tmp_path: Path) -> None:
    settings, two = StackSettings(run_dir=tmp_path), changed(small, kv_sessions=2)
    left = Stack(two, settings=settings).up()
    left.kill("kv-session-0")
    orphan = ProcessIdentity.of(left.pid("kv-session-1") or 0)
    with Stack(small, settings=settings):
        assert not orphan.alive
    left.down()


def test_two_cannot_start_in_one_place_at_once(small: StackOptions, tmp_path: Path) -> None:
    with records.locked(tmp_path), pytest.raises(StackError, match="somebody else is starting or stopping"):
        Stack(small, settings=StackSettings(run_dir=tmp_path)).up()


def test_a_service_that_cannot_start_says_why_and_nothing_is_left_running(
    small: StackOptions, tmp_path: Path, topic_prefix: str
) -> None:
    broken = changed(small, service_environment={"kv-session": {"OUTRIDER_SWEEP_S": "never"}})
    with pytest.raises(StackError, match=r"ended with status 2(.|\n)*OUTRIDER_SWEEP_S='never'"):
        Stack(broken, settings=StackSettings(run_dir=tmp_path)).up()
    assert records.read(tmp_path) is None
    assert not processes_that_name(topic_prefix)


def test_a_service_that_never_becomes_ready_is_told_with_its_reason(
    small: StackOptions, tmp_path: Path
) -> None:
    deaf = changed(small, ready_s=3.0, environment={**small.environment, "OUTRIDER_KAFKA": "127.0.0.1:1"})
    with pytest.raises(StackError, match="kv-session-0 is not ready in time"):
        Stack(deaf, settings=StackSettings(run_dir=tmp_path)).up()


def test_a_given_kafka_that_is_not_there_stops_the_start(
    small: StackOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.stack.kafka.CHECK_S", 0.1)
    with pytest.raises(BrokerUnavailable, match="no Kafka answers"):
        Stack(changed(small, kafka="127.0.0.1:1"), settings=StackSettings(run_dir=tmp_path)).up()


# --- looking after its parts --------------------------------------------------------------------------------------


def test_what_dies_is_started_again_and_what_is_stopped_stays_so(small: StackOptions, tmp_path: Path) -> None:
    with Stack(changed(small, supervise=True), settings=StackSettings(run_dir=tmp_path)) as stack:
        stack.kill("kv-session-0", signal.SIGKILL)
        assert eventually(lambda: stack.restarts("kv-session-0") == 1)
        stack.wait_ready("kv-session-0")

        stack.stop("kv-session-0")
        assert not eventually(lambda: stack.restarts("kv-session-0") > 1, within_s=1.0)
        assert not ask(stack.url("kv-session-0")).ready
        stack.start("kv-session-0")
        assert ask(stack.url("kv-session-0")) == Health(
            True, (), ("no verifier is ready: sessions are refused",)
        )


def test_embedded_brokers_keep_their_data_and_address_over_a_restart(
    small: StackOptions, tmp_path: Path
) -> None:
    own = changed(small, kafka=None, redis=None)
    settings = StackSettings(run_dir=tmp_path)
    with Stack(own, settings=settings) as stack:
        addresses = stack.kafka, stack.redis_url
        for name in ("kafka", "redis"):
            stack.kill(name)
            stack.start(name)
        stack.wait_ready()
        assert (stack.kafka, stack.redis_url) == addresses
    with Stack(own, settings=settings) as again:
        assert (again.kafka, again.redis_url) == addresses


KEEPER = """
import pickle, sys, threading
from pathlib import Path
from shared.stack.settings import StackSettings
from shared.stack.signals import interruptible
from shared.stack.stack import Stack

options, run_dir = pickle.load(sys.stdin.buffer)
with interruptible(), Stack(options, settings=StackSettings(run_dir=Path(run_dir))):
    print("up", flush=True)
    threading.Event().wait()
"""


@contextmanager
def a_keeper(options: StackOptions, run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds a stack and looks after it."""
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        keeper.stdin.write(pickle.dumps((changed(options, supervise=True), str(run_dir))))
        keeper.stdin.close()
        try:
            assert keeper.stdout.readline() == b"up\n"
            yield keeper
        finally:
            keeper.kill()


def test_nothing_outlives_a_keeper_that_is_killed(
    small: StackOptions, tmp_path: Path, topic_prefix: str
) -> None:
    with a_keeper(small, tmp_path) as keeper:
        assert processes_that_name(topic_prefix)
        keeper.kill()
    assert eventually(lambda: not processes_that_name(topic_prefix), within_s=5)


def test_somebody_elses_down_asks_the_keeper_who_would_start_it_again(
    small: StackOptions, tmp_path: Path, topic_prefix: str
) -> None:
    with a_keeper(small, tmp_path) as keeper:
        assert main(["down", "--run-dir", str(tmp_path)]) == 0
        keeper.wait(10)
    assert not processes_that_name(topic_prefix)
    assert records.read(tmp_path) is None


def test_a_stack_whose_part_will_be_started_again_is_not_a_leftover(
    small: StackOptions, tmp_path: Path
) -> None:
    with Stack(changed(small, supervise=True), settings=StackSettings(run_dir=tmp_path)) as stack:
        stack.kill("kv-session-0")
        record = records.read(tmp_path)
        assert record is not None
        assert record.running
        with pytest.raises(StackRunning):
            Stack(small, settings=stack.settings).up()


def test_back_off_grows_to_a_limit() -> None:
    waits = [backoff_s(failures) for failures in range(12)]
    assert waits[:4] == [0.0, 0.5, 1.0, 2.0]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_BACKOFF_S
