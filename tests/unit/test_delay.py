"""The proxy that delays: it loses nothing, keeps the order, takes at least the time it should, cuts when told."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loadtest.delay_process import DelayProcess
from shared.stack.delay import Conditions, DelayProxy


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that sends back what it gets, then ends when its client does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def through(conditions: Conditions) -> AsyncIterator[DelayProxy]:
    async with echo() as port, DelayProxy(("127.0.0.1", port), conditions) as proxy:
        yield proxy


async def test_all_bytes_come_back_in_order_and_with_the_end_of_the_stream() -> None:
    sent = bytes(range(256)) * 40_000
    async with through(Conditions(rtt_ms=10, jitter_ms=8, seed=1)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(sent)
        writer.write_eof()
        assert await reader.read(-1) == sent
        writer.close()
        assert (proxy.counts.up, proxy.counts.down, proxy.counts.connections) == (len(sent), len(sent), 1)


async def test_a_message_takes_the_round_trip_and_the_first_one_a_handshake_more() -> None:
    async with through(Conditions(rtt_ms=40)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        took_ms = []
        for _ in range(3):
            started = time.monotonic()
            writer.write(b"hello")
            await reader.readexactly(5)
            took_ms.append((time.monotonic() - started) * 1000)
        writer.close()
    assert took_ms[0] >= 79
    assert min(took_ms[1:]) >= 39


async def test_messages_are_under_way_at_the_same_time() -> None:
    """Ten messages 1 ms apart take one delay, not ten."""
    async with through(Conditions(rtt_ms=200)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        started = time.monotonic()
        for number in range(10):
            writer.write(bytes([number]))
            await asyncio.sleep(0.001)
        assert await reader.readexactly(10) == bytes(range(10))
        writer.close()
    assert 0.4 <= time.monotonic() - started < 2.0


async def test_bandwidth_holds_a_sender_up() -> None:
    async with through(Conditions(bytes_per_s=1_000_000, queue_bytes=16 << 10)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        started = time.monotonic()
        writer.write(bytes(400_000))
        await reader.readexactly(400_000)
        writer.close()
    assert time.monotonic() - started >= 0.39


async def test_dropped_connections_end_at_both_sides_and_new_ones_are_taken() -> None:
    async with through(Conditions(rtt_ms=20)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"hello")
        await reader.readexactly(5)
        assert proxy.drop() == 1
        with pytest.raises(ConnectionError):
            assert await reader.read(1) == b""
            raise ConnectionResetError
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"again")
        assert await reader.readexactly(5) == b"again"
        writer.close()


async def test_a_target_that_is_not_there_is_a_connection_that_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with DelayProxy(("127.0.0.1", port), Conditions(rtt_ms=10)) as proxy:
        reader, _ = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionError):
            assert await reader.read(1) == b""
            raise ConnectionResetError


def test_the_same_seed_gives_the_same_jitter() -> None:
    def delays(seed: int) -> list[float]:
        proxy = DelayProxy(("127.0.0.1", 1), Conditions(rtt_ms=50, jitter_ms=10, seed=seed))
        return [proxy.delay_s() for _ in range(50)]

    assert delays(1) == delays(1) != delays(2)
    assert 0.020 <= min(delays(1)) < max(delays(1)) <= 0.030


async def test_the_program_says_where_it_listens_and_what_passed() -> None:
    async with echo() as port:
        command = ["-m", "shared.stack.delay", "--listen", "0", "--to", f"127.0.0.1:{port}", "--rtt", "4"]
        program = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE
        )
        assert program.stdout is not None
        said = (await program.stdout.readline()).decode()
        assert "4 ms round trip" in said
        reader, writer = await asyncio.open_connection("127.0.0.1", int(said.split(":")[1].split(",")[0]))
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        program.terminate()
        assert "1 connections, 5 bytes up, 5 bytes down" in (await program.stdout.read()).decode()
        assert await program.wait() == 0


async def test_a_proxy_in_a_process_of_its_own_delays_as_it_is_told_meanwhile_and_says_what_passed() -> None:
    async with echo() as port, DelayProcess(("127.0.0.1", port), Conditions()) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        for rtt_ms in (0, 40):
            await proxy.become(Conditions(rtt_ms=rtt_ms))
            started = time.monotonic()
            writer.write(b"hello")
            await reader.readexactly(5)
            assert (time.monotonic() - started) * 1000 >= rtt_ms - 1
        writer.close()
        assert (await proxy.counts()).up == 10
