"""The embedded Kafka and Redis: what was acknowledged outlives kill -9, at the same address."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis.asyncio import Redis

from shared.errors import BrokerUnavailable, StoreUnavailable
from shared.settings import KafkaFlavor
from shared.stack.kafka import CORE_JAR, Broker, broker_answers, find_kafka
from shared.stack.ports import HOST, free_port
from shared.stack.processes import StackError
from shared.stack.redis import EmbeddedRedis, RedisServer, find_redis
from shared.stack.settings import StackSettings

TOPIC = "kept"


async def _produce(bootstrap: str, values: list[bytes]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all") as producer:
        for value in values:
            await producer.send_and_wait(TOPIC, value)


async def _read(bootstrap: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(TOPIC, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    async with consumer:
        return [(await anext(consumer)).value or b"" for _ in range(count)]


@pytest.mark.kafka
async def test_what_kafka_acknowledged_outlives_kill_9_at_the_same_address(own_kafka: Broker) -> None:
    if own_kafka.flavor is not KafkaFlavor.APACHE:
        pytest.skip("Tansu keeps everything in memory")
    address = own_kafka.bootstrap
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    await admin.create_topics([NewTopic(TOPIC, 1, 1)])
    await admin.close()
    await _produce(address, [b"before"])

    own_kafka.kill()
    assert not own_kafka.answers()
    own_kafka.start()

    await _produce(address, [b"after"])
    assert own_kafka.bootstrap == address
    assert await _read(address, 2) == [b"before", b"after"]


@pytest.mark.kafka
def test_a_given_kafka_is_checked_and_never_stopped(kafka_broker: Broker, tmp_path: Path) -> None:
    given = find_kafka(tmp_path, address=kafka_broker.bootstrap)
    given.start()
    given.stop()
    with pytest.raises(StackError, match="not ours"):
        given.kill()
    assert kafka_broker.answers()
    assert not list(tmp_path.iterdir())


def test_a_given_kafka_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.stack.kafka.CHECK_S", 0.1)
    with pytest.raises(BrokerUnavailable, match=r"no Kafka answers at 127\.0\.0\.1:1; start it"):
        find_kafka(tmp_path, address="127.0.0.1:1").start()


def test_a_server_that_is_no_kafka_does_not_pass_for_one(redis_server: RedisServer) -> None:
    host, port = redis_server.address.split(":")
    assert not broker_answers(host, int(port), 0.5)


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="give host:port"):
        find_kafka(tmp_path, address="localhost")


def test_a_broker_that_cannot_start_says_why_and_leaves_nothing_running(tmp_path: Path) -> None:
    libs = tmp_path / "libs"
    libs.mkdir()
    (libs / CORE_JAR).touch()
    broker = find_kafka(tmp_path / "data", settings=StackSettings(kafka_libs=libs, cache=tmp_path))
    with pytest.raises(StackError, match="can't be formatted"):
        broker.start()
    assert broker.process is not None
    assert not broker.process.running


async def test_what_redis_answered_outlives_kill_9_at_the_same_address(own_redis: RedisServer) -> None:
    async with Redis.from_url(own_redis.url) as client:
        for n in range(200):
            await client.rpush("kept", n)
    own_redis.kill()
    assert not own_redis.answers()
    own_redis.start()
    async with Redis.from_url(own_redis.url) as client:
        assert await client.lrange("kept", 0, -1) == [str(n).encode() for n in range(200)]


def test_another_instance_on_the_same_folder_is_the_same_redis(tmp_path: Path) -> None:
    first = EmbeddedRedis(tmp_path)
    first.start()
    first.stop()
    second = EmbeddedRedis(tmp_path)
    assert second.url == first.url


def test_a_given_redis_that_does_not_answer_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.stack.redis.CHECK_S", 0.1)
    server = find_redis(tmp_path, url=f"redis://user:secret@{HOST}:{free_port()}/0")
    with pytest.raises(StoreUnavailable, match="no Redis answers at") as caught:
        server.start()
    assert "secret" not in caught.value.message + server.source


def test_a_url_that_is_none_of_a_redis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="give redis://"):
        find_redis(tmp_path, url="localhost:6379")
