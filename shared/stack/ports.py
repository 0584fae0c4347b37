"""Ports on the loopback interface: finding free ones, and asking whether somebody listens."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection
from typing import Final

from shared.errors import Unavailable

HOST: Final = "127.0.0.1"
# Below the ports that systems hand to outgoing connections: a server that is restarted finds its port still free,
# and a client that keeps trying while it is down can't connect to itself.
FIRST, LAST = 10_000, 30_000
ATTEMPTS: Final = 200


def is_free(port: int, host: str = HOST) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(avoid: Collection[int] = ()) -> int:
    """A port that nobody listens on now, and that is not one of `avoid`."""
    for _ in range(ATTEMPTS):
        port = random.randint(FIRST, LAST)
        if port not in avoid and is_free(port):
            return port
    raise Unavailable(f"found no free port between {FIRST} and {LAST} on {HOST} in {ATTEMPTS} attempts")


def preferred_port(wanted: int, avoid: Collection[int] = ()) -> int:
    """`wanted` where it is free, else any free one."""
    return wanted if wanted not in avoid and is_free(wanted) else free_port(avoid)
