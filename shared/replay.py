"""Asking a gateway to generate an answer again: the client of `POST /v1/streams/{id}/replay`.

It knows HTTP alone, so that whoever has the id of an answer and a gateway's address can check the one by the other.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlsplit

from shared.errors import OutriderError, SessionNotFound, Unavailable, error_for

PATIENCE_S: Final = 3600.0
"""An answer is generated anew in full before the gateway says anything."""

_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Replayed:
    """An answer and what its prompt, parameters and seed gave a second time. `text` is the second one's."""

    session: str
    seed: int
    temperature: float
    tokens: tuple[int, ...]
    again: tuple[int, ...]
    text: str

    @property
    def equal(self) -> bool:
        """Every token is the same."""
        return self.tokens == self.again

    @property
    def first_difference(self) -> int:
        """The position of the first token that is not the same."""
        pairs = zip(self.tokens, self.again, strict=False)
        shorter = min(len(self.tokens), len(self.again))
        return next((number for number, (one, other) in enumerate(pairs) if one != other), shorter)


def replay(gateway: str, session: str) -> Replayed:
    """Have the answer `session` generated again at `gateway` (http://HOST:PORT); takes as long as an answer takes.

    Raises what the gateway answers (`SessionNotFound` for an id that is unknown or has expired), and `Unavailable` when
    it can't be reached.
    """
    if urlsplit(gateway).scheme not in ("http", "https"):
        raise OutriderError(f"{gateway!r} is no gateway's address; write http://HOST:PORT")
    request = urllib.request.Request(
        f"{gateway.rstrip('/')}/v1/streams/{quote(session, safe='')}/replay", b"", method="POST"
    )
    try:
        with _DIRECT.open(request, timeout=PATIENCE_S) as answer:
            return _replayed(json.load(answer))
    except urllib.error.HTTPError as error:
        with error:
            raise _told(error.code, error.read()) from None
    except (OSError, ValueError, KeyError) as error:
        raise Unavailable(f"the gateway at {gateway} can't be asked: {error}") from None


def _replayed(body: Mapping[str, Any]) -> Replayed:
    return Replayed(
        session=body["id"],
        seed=body["seed"],
        temperature=body["temperature"],
        tokens=tuple(body["token_ids"]),
        again=tuple(body["replayed_token_ids"]),
        text=body["text"],
    )


def _told(status: int, body: bytes) -> OutriderError:
    try:
        error = json.loads(body)["error"]
        return error_for(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return (
            SessionNotFound("no such answer")
            if status == 404
            else OutriderError(f"the gateway answered {status}")
        )
