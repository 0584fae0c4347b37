"""Fetching records of one topic: one fetch open per broker, what arrives handed over in the callback that decodes it.

The broker answers an open fetch the moment a record arrives. While too much waits to be taken, nothing is asked for.
Where a partition is read from is known here alone; who reads it, and what becomes of the records, is not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from aiokafka.errors import KafkaError, OffsetOutOfRangeError, for_code

from shared.errors import ProtocolError
from shared.kafka.cluster import RETRY_S, Cluster
from shared.kafka.wire import FETCH, Connection, Fetched, Record, decode_fetch, encode_fetch

FETCH_BYTES: Final = 8 << 20
"""The most that one fetch brings, beside what waits already."""

_log = logging.getLogger(__name__)

FindPosition = Callable[[int], Awaitable[int]]
OnRecords = Callable[[int, list[Record]], None]


class Fetcher:
    """Reads partitions of the topic `name` from their positions on.

    `find_position` says where a partition begins that was given without a position. `on_records` gets what arrives, in
    order within a partition. `has_room` is asked before every fetch; say `room_made` when it may have become true.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        *,
        purpose: str,
        max_wait_ms: int,
        partition_bytes: int,
        timeout_s: float,
        find_position: FindPosition,
        on_records: OnRecords,
        has_room: Callable[[], bool],
    ) -> None:
        self._cluster = cluster
        self._name = name
        self._purpose = purpose
        self._max_wait_ms = max_wait_ms
        self._partition_bytes = partition_bytes
        self._timeout_s = timeout_s
        self._find_position = find_position
        self._on_records = on_records
        self._has_room = has_room
        self._loop = asyncio.get_running_loop()
        self._positions: dict[int, int | None] = {}
        self._connections: dict[int, Connection] = {}
        self._open: set[int] = set()
        self._resting: set[int] = set()
        self._held = False
        self._mending: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def positions(self) -> dict[int, int | None]:
        """The next offset to read of each partition; None where it is not known yet."""
        return dict(self._positions)

    def read(self, partitions: dict[int, int | None]) -> None:
        """Read these partitions from now on, from the positions given, and no others."""
        self._positions = dict(partitions)
        self._advance()

    async def positioned(self) -> None:
        """Wait until it is known of every partition where it is read from; tries until it is cancelled."""
        while None in self._positions.values():
            self._mend(0.0)
            if self._mending is not None:
                await asyncio.wait([self._mending])

    def room_made(self) -> None:
        """There is room again for what was not asked for."""
        if self._held:
            self._advance()

    async def stop(self) -> None:
        """Ask for nothing more and close the connections."""
        self._stopped = True
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.wait([self._mending])
        for connection in self._connections.values():
            connection.close()

    # --- the inside -------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Open a fetch to every broker that has none."""
        if self._stopped:
            return
        self._held = not self._has_room()
        if self._held:
            return
        wanted: dict[int, dict[int, int]] = {}
        for partition, position in self._positions.items():
            node = self._cluster.leader(self._name, partition)
            connection = self._connections.get(node) if node is not None else None
            if node is None or position is None or connection is None or connection.closed:
                self._mend(0.0)
            elif node not in self._open and partition not in self._resting:
                wanted.setdefault(node, {})[partition] = position
        for node, positions in wanted.items():
            self._fetch(node, positions)

    def _fetch(self, node: int, positions: dict[int, int]) -> None:
        self._open.add(node)
        request = encode_fetch(
            self._name,
            positions.items(),
            max_wait_ms=self._max_wait_ms,
            max_bytes=FETCH_BYTES,
            partition_bytes=self._partition_bytes,
        )
        self._connections[node].request(FETCH, request, partial(self._answered, node, positions))

    def _answered(self, node: int, asked: dict[int, int], reply: bytes | None) -> None:
        self._open.discard(node)
        if self._stopped:
            return
        if reply is None:
            self._mend(RETRY_S)
            return
        try:
            for fetched in decode_fetch(reply):
                # A position that has changed since belongs to a partition taken away, or given anew.
                if self._positions.get(fetched.partition) == asked.get(fetched.partition):
                    self._take(fetched, asked[fetched.partition])
        except ProtocolError as malformed:
            _log.error("fetching %s: %s", self._name, malformed.message)
            self._connections[node].close()
            self._mend(RETRY_S)
            return
        # After whoever waits for these records has been woken, and the task that they may start: theirs is the hot path,
        # while the next fetch is one more system call (0.1 ms with the broker on the same cores).
        self._loop.call_soon(self._loop.call_soon, self._advance)

    def _take(self, fetched: Fetched, position: int) -> None:
        if fetched.error:
            error = for_code(fetched.error)
            _log.warning("fetching %s/%d: %s", self._name, fetched.partition, error.__name__)
            if error is OffsetOutOfRangeError:
                self._positions[fetched.partition] = None
            self._resting.add(fetched.partition)
            self._mend(RETRY_S)
            return
        if not fetched.batches:
            return
        records, self._positions[fetched.partition] = fetched.read(position)
        if records:
            self._on_records(fetched.partition, records)

    def _mend(self, delay_s: float) -> None:
        if self._mending is None and not self._stopped:
            self._mending = self._loop.create_task(self._find_way(delay_s), name=f"reach {self._name}")

    async def _find_way(self, delay_s: float) -> None:
        """Get what fetching needs, leaders, connections and positions; what is reached goes on while the rest waits."""
        try:
            reached = False
            while not reached:
                if delay_s:
                    await asyncio.sleep(delay_s)
                    await self._cluster.refresh()
                reached = await self._reach_all()
                self._loop.call_soon(self._advance)
                delay_s = RETRY_S
        finally:
            self._mending = None

    async def _reach_all(self) -> bool:
        lost: set[int] = set()
        for partition in tuple(self._positions):
            node = self._cluster.leader(self._name, partition)
            if node is None or node in lost:
                lost.add(-1)
                continue
            try:
                await self._reach(partition, node)
                self._resting.discard(partition)
            except (KafkaError, OSError) as error:
                _log.debug("%s/%d can't be read: %r", self._name, partition, error)
                lost.add(node)
        return not lost

    async def _reach(self, partition: int, node: int) -> None:
        connection = self._connections.get(node)
        if connection is None or connection.closed:
            self._connections[node] = await self._cluster.connect(
                node, purpose=self._purpose, timeout_s=self._timeout_s
            )
        if self._positions.get(partition, 0) is None:
            position = await self._find_position(partition)
            if self._positions.get(partition, 0) is None:
                self._positions[partition] = position
