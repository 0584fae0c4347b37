"""The engine process' ties to its verifier: it dies with it, and says why when it dies by itself."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from typing import Final

from services.verifier.engine.channel import FailureMessage, Sender

VLLM_CORE_LOGGER: Final = "vllm.v1.engine.core"


def stay_with_parent() -> None:
    """Die when the verifier does, even by SIGKILL, so that its successor finds the memory free.

    Ctrl-C reaches the whole process group: the verifier alone decides what to do about it.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="verifier-watch", daemon=True).start()


def report_failures(sender: Sender) -> None:
    """Send the reason when vLLM's engine loop ends with an exception; vLLM itself only logs it."""
    logging.getLogger(VLLM_CORE_LOGGER).addHandler(_FailureHandler(sender))


class _FailureHandler(logging.Handler):
    def __init__(self, sender: Sender) -> None:
        super().__init__(level=logging.ERROR)
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on the exception that a log record carries."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, SystemExit):
            self._sender.send(FailureMessage(type(error).__name__, str(error)))
