"""What tests share: an embedded Kafka and Redis, names of their own, the target model.

The brokers of the session serve many tests at once and must not be killed; who wants to kill one takes `own_kafka` or
`own_redis`. Nothing here looks at the environment's own OUTRIDER_* settings but at where Kafka's libraries and the
caches are.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import models
from shared.stack.kafka import Broker, find_kafka
from shared.stack.ports import free_port
from shared.stack.redis import RedisServer, find_redis
from shared.stack.settings import StackSettings
from shared.stack.stack import Stack, StackOptions

KEPT_FROM_ENVIRONMENT = ("OUTRIDER_KAFKA_LIBS", "OUTRIDER_CACHE", "OUTRIDER_VENV")

_sources = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_sources] = {}
    for name in [name for name in os.environ if name.startswith("OUTRIDER_")]:
        if name not in KEPT_FROM_ENVIRONMENT:
            del os.environ[name]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several tells the one that prints what it ran on."""
    told = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["sources"] = session.config.stash[_sources]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of several processes has ended."""
    node.config.stash[_sources].update(getattr(node, "workeroutput", {}).get("sources", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, source in config.stash[_sources].items():
        terminalreporter.write_line(f"{name}: {source}")


def _say(request: pytest.FixtureRequest, name: str, text: str) -> None:
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{name}: {text}", flush=True)


@pytest.fixture
def unused_tcp_port() -> int:
    """For a process that is about to start: none of those that outgoing connections get, which may be taken by then."""
    return free_port()


@pytest.fixture(scope="session")
def kafka_broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broker]:
    """The session's Kafka, in BROKERS' order; the run prints which it took."""
    directory = tmp_path_factory.mktemp("kafka")
    broker = find_kafka(directory, die_with_parent=True, say=lambda text: _say(request, "Kafka", text))
    request.config.stash[_sources]["Kafka"] = broker.source
    _say(request, "Kafka", broker.source)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def kafka(kafka_broker: Broker) -> str:
    """The bootstrap address of the session's Kafka."""
    return kafka_broker.bootstrap


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[Broker]:
    """A Kafka for one test, which may kill() and start() it."""
    broker = find_kafka(tmp_path / "kafka", die_with_parent=True)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def redis_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """The session's Redis."""
    server = find_redis(tmp_path_factory.mktemp("redis"), die_with_parent=True)
    request.config.stash[_sources]["Redis"] = server.source
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    """The URL of the session's Redis."""
    return redis_server.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for one test, which may kill() and start() it."""
    server = find_redis(tmp_path / "redis", die_with_parent=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def topic_prefix() -> str:
    """Topics and groups of this test only."""
    return f"test-{secrets.token_hex(4)}-"


@pytest.fixture
def redis_prefix() -> str:
    """Redis keys of this test only."""
    return f"test-{secrets.token_hex(4)}:"


@pytest.fixture
def settings_env(
    kafka_broker: Broker, redis_url: str, topic_prefix: str, redis_prefix: str
) -> dict[str, str]:
    """The environment of a service that shares the session's brokers with others but no topic and no key."""
    return {
        "OUTRIDER_KAFKA": kafka_broker.bootstrap,
        "OUTRIDER_KAFKA_FLAVOR": kafka_broker.flavor.value,
        "OUTRIDER_REDIS_URL": redis_url,
        "OUTRIDER_TOPIC_PREFIX": topic_prefix,
        "OUTRIDER_REDIS_PREFIX": redis_prefix,
    }


@pytest.fixture(scope="session")
def target_model(request: pytest.FixtureRequest) -> Path:
    """The target that ships, fetched and converted on first use."""
    _say(request, "target", f"{models.default_target().name}, fetched on first use")
    return models.fetch()


@pytest.fixture(scope="session")
def stack(
    request: pytest.FixtureRequest,
    kafka_broker: Broker,
    redis_server: RedisServer,
    target_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    """A whole stack on the session's brokers: the three services as processes, two gateways, restarted when they die.

    It takes half a minute to start, so all share it. Who kills a part of it waits until it is ready again.
    """
    name = f"stack-{secrets.token_hex(4)}"
    options = StackOptions(
        target=target_model,
        kafka=kafka_broker.bootstrap,
        kafka_flavor=kafka_broker.flavor,
        redis=redis_server.url,
        gateways=2,
        environment={
            "OUTRIDER_TOPIC_PREFIX": f"{name}-",
            "OUTRIDER_REDIS_PREFIX": f"{name}:",
            "OUTRIDER_STALL_TIMEOUT_S": "300",  # a verifier takes minutes to come back on a busy machine
        },
        supervise=True,
        die_with_parent=True,
    )
    settings = StackSettings(run_dir=tmp_path_factory.mktemp("stack"))
    _say(request, "stack", f"starting three services, logs in {settings.run_dir / 'logs'}")
    with Stack(options, settings=settings) as stack:
        yield stack
