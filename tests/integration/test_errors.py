"""Clear errors, seen from outside: services as processes that lack something, or are given something wrong.

Each ends by a deadline with a status other than 0 and one line that names the fault and the mend, or says at `/readyz`
what it lacks; never a traceback, never a hang. Errors of a running service are tested with it.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from aiokafka import AIOKafkaProducer

from shared.bus import Bus
from shared.protocol import DeadLetter, Topic
from shared.settings import CommonSettings
from shared.stack.kafka import Broker
from shared.stack.ports import free_port
from tests.integration.byte_model import write_byte_model
from tests.integration.tiny_target import TinyTarget
from tests.integration.verifier_peer import until

pytestmark = [pytest.mark.kafka, pytest.mark.stack]

ENDS_WITHIN_S = 60.0
"""A cold start imports a lot; what a service waits for is limited to a second here."""

SERVICES = {
    "services.draft_gateway": "OUTRIDER_GATEWAY_PORT",
    "services.kv_session": "OUTRIDER_KV_SESSION_PORT",
    "services.verifier": "OUTRIDER_VERIFIER_PORT",
}
every_service = pytest.mark.parametrize("service", SERVICES)

VLLM_OF_ANOTHER_VERSION = """
import sys
import vllm.version
vllm.version.__version__ = "0.31.1"
from services.verifier.__main__ import main
sys.exit(main())
"""


@dataclass
class Process:
    """A service and what it has said on stderr."""

    process: asyncio.subprocess.Process
    port: int
    errors: Path

    @property
    def said(self) -> str:
        """Its stderr so far."""
        return self.errors.read_text()

    async def ends(self) -> int:
        """Its exit status, once it has ended."""
        try:
            async with asyncio.timeout(ENDS_WITHIN_S):
                return await self.process.wait()
        except TimeoutError:
            pytest.fail(f"still running after {ENDS_WITHIN_S:g} s; it said: {self.said}")

    async def reasons(self) -> list[str] | None:
        """Why it is not ready, by `/readyz`; empty when it is, None when it doesn't answer."""
        try:
            async with httpx.AsyncClient(timeout=5) as client:
                response = await client.get(f"http://127.0.0.1:{self.port}/readyz")
        except httpx.TransportError:
            if self.process.returncode is not None:
                pytest.fail(f"it has ended: {self.said}")
            return None
        reasons: list[str] = response.json()["reasons"]
        assert (response.status_code == 200) is (not reasons)
        return reasons

    async def ready(self) -> bool:
        """Whether it says so."""
        return await self.reasons() == []


@pytest.fixture
def environment(settings_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """What every service needs to start."""
    return {
        **settings_env,
        "OUTRIDER_MODEL": str(write_byte_model(tmp_path / "byte-model")),
        "OUTRIDER_BUS_DEADLINE_S": "1",
        "OUTRIDER_STORE_DEADLINE_S": "1",
        "PATH": "/usr/bin:/bin",
    }


@asynccontextmanager
async def started(
    service: str, environment: Mapping[str, str], tmp_path: Path, *, program: str | None = None
) -> AsyncIterator[Process]:
    """The service (or a Python program in its place) as a process; killed at the end if it still runs."""
    port = free_port()
    errors = tmp_path / "stderr"
    command = ["-m", service] if program is None else ["-c", program]
    with errors.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            env={SERVICES[service]: str(port), "HOME": str(tmp_path), **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        yield Process(process, port, errors)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def failure(
    service: str,
    environment: Mapping[str, str],
    tmp_path: Path,
    *,
    status: int = 1,
    program: str | None = None,
) -> str:
    """The line with which the service ends, which is the only one of its kind."""
    async with started(service, environment, tmp_path, program=program) as process:
        assert await process.ends() == status, process.said
        assert "Traceback" not in process.said
        lines = process.said.splitlines()
        if status == 1:
            critical = [line for line in lines if " CRITICAL " in line]
            assert critical == lines[-1:], process.said
        return lines[-1]


# --- settings -----------------------------------------------------------------------------------------------------


@every_service
async def test_every_wrong_setting_is_named_at_once_with_what_would_be_right(
    environment: dict[str, str], tmp_path: Path, service: str
) -> None:
    wrong = {
        "OUTRIDER_BUS_DEADLINE_S": ("soon", "number"),
        "OUTRIDER_STORE_DEADLINE_S": ("-1", "greater than 0"),
        "OUTRIDER_KAFKA": ("somewhere", "host:port"),
        "OUTRIDER_LOG_FORMAT": ("xml", "'text' or 'json'"),
        "OUTRIDER_LOG_LEVEL": ("LOUD", "WARNING"),
        SERVICES[service]: ("70000", "65535"),
    }
    values = {name: value for name, (value, _) in wrong.items()}
    async with started(service, {**environment, **values}, tmp_path) as process:
        assert await process.ends() == 2
        said = dict(line.split(": ", 1) for line in process.said.splitlines())
    assert said.keys() == {f"{name}={value!r}" for name, value in values.items()}
    for name, (value, right) in wrong.items():
        assert right in said[f"{name}={value!r}"]


@every_service
async def test_a_redis_url_that_is_none_is_refused_without_its_password(
    environment: dict[str, str], tmp_path: Path, service: str
) -> None:
    url = "http://:hush@127.0.0.1:6379/0"
    line = await failure(service, {**environment, "OUTRIDER_REDIS_URL": url}, tmp_path)
    assert "127.0.0.1:6379" in line
    assert "write redis://" in line
    assert "hush" not in line


async def test_a_port_that_is_taken_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    service = "services.kv_session"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        line = await failure(service, {**environment, SERVICES[service]: str(port)}, tmp_path)
    assert f"can't listen on 127.0.0.1:{port}" in line
    assert "give another host or port" in line


# --- brokers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["Kafka", "Redis"])
async def test_a_missing_broker_or_store_ends_a_verifier_with_its_address(
    environment: dict[str, str], tmp_path: Path, missing: str
) -> None:
    setting, address, value = _nowhere(missing)
    line = await failure("services.verifier", {**environment, setting: value}, tmp_path)
    assert missing in line
    assert address in line
    assert setting in line
    assert "hush" not in line


@pytest.mark.parametrize("missing", ["Kafka", "Redis"])
async def test_a_gateway_waits_for_broker_and_store_and_says_so_at_the_door(
    environment: dict[str, str], tmp_path: Path, missing: str
) -> None:
    setting, address, value = _nowhere(missing)
    async with started("services.draft_gateway", {**environment, setting: value}, tmp_path) as gateway:

        async def told() -> bool:
            return any(missing in reason for reason in await gateway.reasons() or ())

        await until(told, f"/readyz names {missing}", ENDS_WITHIN_S)
        await until(lambda: address in gateway.said, "the log names the address", ENDS_WITHIN_S)
        assert setting in gateway.said
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.ends() == 0
        assert "Traceback" not in gateway.said
        assert "hush" not in gateway.said


def _nowhere(missing: str) -> tuple[str, str, str]:
    """The setting, an address where nothing listens, and the setting's value."""
    address = f"127.0.0.1:{free_port()}"
    if missing == "Kafka":
        return "OUTRIDER_KAFKA", address, address
    return "OUTRIDER_REDIS_URL", address, f"redis://:hush@{address}/0"


async def test_what_no_service_can_read_goes_to_the_dead_letters_and_all_go_on(
    environment: dict[str, str], tmp_path: Path, kafka_broker: Broker, topic_prefix: str
) -> None:
    patient = {**environment, "OUTRIDER_BUS_DEADLINE_S": "20", "OUTRIDER_STORE_DEADLINE_S": "20"}
    settings = CommonSettings(
        kafka=kafka_broker.bootstrap, kafka_flavor=kafka_broker.flavor, topic_prefix=topic_prefix
    )
    for name in ("gateway", "kv-session"):
        (tmp_path / name).mkdir()
    async with (
        started("services.kv_session", patient, tmp_path / "kv-session") as kv_session,
        started("services.draft_gateway", patient, tmp_path / "gateway") as gateway,
        Bus(settings, client="test") as bus,
    ):
        for process in (kv_session, gateway):
            # Without a verifier a kv-session has nothing to be ready for, but it is connected.
            await until(lambda process=process: _connected(process), "connected", ENDS_WITHIN_S)  # type: ignore[misc]
        await bus.ensure_topics()
        waiting = {Topic.SESSIONS, Topic.HEARTBEATS, Topic.PLACEMENTS, Topic.VERDICTS, Topic.EXITS}
        async with (
            bus.reader(Topic.DEAD_LETTERS, start="earliest") as letters,
            AIOKafkaProducer(bootstrap_servers=settings.kafka) as producer,
            asyncio.timeout(ENDS_WITHIN_S),
        ):
            while waiting:
                for topic in waiting:  # again until it is read: a reader from the latest may only just begin
                    for partition in range(bus.partitions(topic)):
                        await producer.send_and_wait(topic_prefix + topic, b"{", partition=partition)
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        async for received in letters:
                            letter = received.message
                            assert isinstance(letter, DeadLetter)
                            assert letter.reason.startswith(f"not a message of {letter.source}")
                            waiting.discard(Topic(letter.source))
                            if not waiting:
                                break
        for process in (kv_session, gateway):
            assert await _connected(process)
            process.process.send_signal(signal.SIGTERM)
            assert await process.ends() == 0
            assert "Traceback" not in process.said


async def _connected(process: Process) -> bool:
    reasons = await process.reasons()
    return reasons is not None and not any("Kafka" in reason or "Redis" in reason for reason in reasons)


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["", "/nonexistent/model"])
async def test_a_verifier_without_its_model_ends_and_names_the_mend(
    environment: dict[str, str], tmp_path: Path, model: str
) -> None:
    line = await failure("services.verifier", {**environment, "OUTRIDER_MODEL": model}, tmp_path)
    assert model in line
    assert "OUTRIDER_MODEL" in line or "outrider models fetch" in line


def _shorten(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _scramble_header(model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[8:40] = b"x" * 32
    weights.write_bytes(bytes(content))


@pytest.mark.parametrize("spoil", [_shorten, _scramble_header])
async def test_a_verifier_with_corrupt_weights_ends_and_names_the_file(
    environment: dict[str, str], tmp_path: Path, tiny_target: TinyTarget, spoil: Callable[[Path], None]
) -> None:
    model = Path(shutil.copytree(tiny_target.directory, tmp_path / "copy"))
    spoil(model)
    line = await failure("services.verifier", {**environment, "OUTRIDER_MODEL": str(model)}, tmp_path)
    assert str(model / "model.safetensors") in line
    assert "outrider models fetch" in line or "fetch it again" in line


async def test_a_gateway_with_a_damaged_tokenizer_ends_and_names_the_file(
    environment: dict[str, str], tmp_path: Path
) -> None:
    damaged = Path(environment["OUTRIDER_MODEL"]) / "tokenizer.json"
    damaged.write_text(damaged.read_text()[:-20])
    line = await failure("services.draft_gateway", environment, tmp_path)
    assert str(damaged) in line


# --- the engine ---------------------------------------------------------------------------------------------------


async def test_another_vllm_is_refused_with_the_version_to_install(
    environment: dict[str, str], tmp_path: Path, tiny_target: TinyTarget
) -> None:
    tiny = {**environment, "OUTRIDER_MODEL": str(tiny_target.directory)}
    line = await failure("services.verifier", tiny, tmp_path, program=VLLM_OF_ANOTHER_VERSION)
    assert "vLLM 0.31.1 is installed" in line
    assert "0.32.0" in line


async def test_exit_layers_that_the_target_does_not_have_are_refused_with_those_it_has(
    environment: dict[str, str], tmp_path: Path, tiny_target: TinyTarget
) -> None:
    wrong = {"OUTRIDER_MODEL": str(tiny_target.directory), "OUTRIDER_EXIT_LAYERS": "8"}
    line = await failure("services.verifier", {**environment, **wrong}, tmp_path)
    assert "OUTRIDER_EXIT_LAYERS is '8'" in line
    assert "from 1 to 7" in line
