"""What the process knows of the Kafka cluster: brokers, topics, leaders; and the rare requests about them.

Connections for messages are opened here and belong to whoever asked for them. Nothing here is on the path of a round.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, Literal

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    KafkaError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    NoError,
    TopicAlreadyExistsError,
    for_code,
)
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from aiokafka.structs import TopicPartition

from shared.errors import BrokerUnavailable
from shared.kafka.wire import Connection

RETRY_S: Final = 0.1
"""How long to wait before a request that failed is tried again."""

_EARLIEST, _LATEST = -2, -1
_NO_TRANSACTIONS: Final = (None, -1)

_log = logging.getLogger(__name__)


class Cluster:
    """A client of one cluster. `client` is our name towards the brokers, `timeout_s` how long one answer may take."""

    def __init__(self, bootstrap: str, *, client: str, timeout_s: float) -> None:
        self.bootstrap = bootstrap
        self._client_name = client
        self._timeout_s = timeout_s
        self._client: AIOKafkaClient | None = None

    async def start(self) -> None:
        """Connect; tries until it is cancelled."""
        while self._client is None:
            client = AIOKafkaClient(
                bootstrap_servers=self.bootstrap,
                client_id=self._client_name,
                request_timeout_ms=int(self._timeout_s * 1000),
                retry_backoff_ms=int(RETRY_S * 1000),
            )
            try:
                await client.bootstrap()
            except (KafkaError, OSError) as error:
                _log.debug("Kafka at %s: %r", self.bootstrap, error)
                await client.close()
                await asyncio.sleep(RETRY_S)
            except BaseException:
                await client.close()
                raise
            else:
                self._client = client

    async def stop(self) -> None:
        """Close the connections for requests."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    # --- topics -----------------------------------------------------------------------------------------------

    async def look_up(self, names: Iterable[str]) -> Mapping[str, int]:
        """The partition counts of those topics that exist and have leaders; these are kept up to date from now on."""
        client = self._require()
        # All topics are asked for: asking for one that is missing would create it on some brokers.
        everything = await client.fetch_all_metadata()
        counts: dict[str, int] = {}
        for name in names:
            partitions = everything.partitions_for_topic(name)
            if partitions and partitions == everything.available_partitions_for_topic(name):
                counts[name] = len(partitions)
        if counts:
            await client.set_topics(list(counts))
        return counts

    async def create(self, topics: Sequence[NewTopic]) -> None:
        """Create topics; one that exists meanwhile is left as it is. Raises `BrokerUnavailable` when it is refused."""
        async with self._admin() as admin:
            response = await admin.create_topics(list(topics))
        for name, code, *text in response.topic_errors:
            if for_code(code) not in (NoError, TopicAlreadyExistsError):
                raise BrokerUnavailable(
                    f"Kafka at {self.bootstrap} can't create {name}: {for_code(code).__name__} {text}"
                )

    async def group_members(self, group: str) -> frozenset[str]:
        """The member ids of a consumer group."""
        async with self._admin() as admin:
            responses = await admin.describe_consumer_groups([group])
        return frozenset(
            member[0]
            for response in responses
            for description in response.groups
            for member in description[5]
        )

    # --- leaders ----------------------------------------------------------------------------------------------

    def leader(self, name: str, partition: int) -> int | None:
        """The broker that leads the partition, as far as is known."""
        node: int | None = self._require().cluster.leader_for_partition(TopicPartition(name, partition))
        return None if node == -1 else node

    async def refresh(self) -> None:
        """Ask who leads what; whether there was an answer shows in what `leader` says."""
        await self._require().force_metadata_update()

    async def connect(self, node: int, *, purpose: str, timeout_s: float) -> Connection:
        """A connection of one's own to a broker. Raises `OSError` (`TimeoutError` is one) or `KafkaError`."""
        broker = self._require().cluster.broker_metadata(node)
        if broker is None:
            raise NodeNotReadyError(f"broker {node} is not known")
        return await Connection.open(
            broker.host, broker.port, client=f"{self._client_name}-{purpose}", timeout_s=timeout_s
        )

    # --- offsets and producers --------------------------------------------------------------------------------

    async def offset(self, name: str, partition: int, end: Literal["earliest", "latest"]) -> int:
        """The first offset that is kept, or the next one to be written. Raises `KafkaError`."""
        node = self.leader(name, partition)
        if node is None:
            raise LeaderNotAvailableError(f"{name}/{partition}")
        moment = _EARLIEST if end == "earliest" else _LATEST
        response = await self._require().send(node, OffsetRequest(-1, 0, [(name, [(partition, moment)])]))
        [(_, [(_, code, *answer)])] = response.topics
        if code:
            raise for_code(code)(f"{name}/{partition}")
        # Version 0 answers with a list of offsets, later ones with time and offset.
        return int(answer[-1][0] if isinstance(answer[-1], list) else answer[-1])

    async def new_producer_id(self) -> tuple[int, int]:
        """Id and epoch of a new idempotent producer. Raises `KafkaError`."""
        client = self._require()
        response = await client.send(client.get_random_node(), InitProducerIdRequest(*_NO_TRANSACTIONS))
        if response.error_code:
            raise for_code(response.error_code)("no producer id")
        return response.producer_id, response.producer_epoch

    # --- the inside -------------------------------------------------------------------------------------------

    def _require(self) -> AIOKafkaClient:
        if self._client is None:
            raise BrokerUnavailable("the bus is not started: use `async with`")
        return self._client

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(
            bootstrap_servers=self.bootstrap,
            client_id=f"{self._client_name}-admin",
            request_timeout_ms=int(self._timeout_s * 1000),
        )
        try:
            await admin.start()
            yield admin
        finally:
            await admin.close()
