"""How whoever holds a stack is interrupted: once, so that what was started is stopped, and not while stopping it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

INTERRUPTIONS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal do as Ctrl-C does: KeyboardInterrupt. Only the first of them counts."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in INTERRUPTIONS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handlers(interrupt):
        yield


@contextmanager
def uninterruptible() -> Iterator[None]:
    """Impatience keeps nobody from cleaning up."""
    with _handlers(signal.SIG_IGN):
        yield


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in INTERRUPTIONS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
