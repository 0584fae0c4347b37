"""Asking a service whether it is ready: its `/readyz`, with the reasons that it gives."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Final

TIMEOUT_S: Final = 3.0
NO_ANSWER: Final = "it doesn't answer yet"
# The stack is on this machine: no proxy that the environment names stands between.
_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Health:
    """What a service says of itself: `reasons` why it isn't ready, `notes` that its operator should know."""

    ready: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def ask(url: str, timeout_s: float = TIMEOUT_S) -> Health:
    """The readiness of the service at `url`; a service that doesn't answer is not ready."""
    try:
        with _DIRECT.open(f"{url}/readyz", timeout=timeout_s) as answer:
            return _read(answer.read(), ready=True)
    except urllib.error.HTTPError as error:
        with error:
            return _read(error.read(), ready=False)
    except OSError:
        return Health(ready=False, reasons=(NO_ANSWER,))


def _read(body: bytes, *, ready: bool) -> Health:
    try:
        content: Any = json.loads(body)
    except ValueError:
        content = {}
    if not isinstance(content, dict):
        content = {}
    reasons = tuple(str(reason) for reason in content.get("reasons", ()))
    notes = tuple(str(note) for note in content.get("notes", ()))
    return Health(ready, reasons if ready or reasons else ("it gives no reason",), notes)
