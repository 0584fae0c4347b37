"""Who may link: keys, and whose each is. Without any, whoever is on this machine."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from hashlib import sha256
from typing import Final

from shared.errors import OutriderError

SHORTEST_KEY: Final = 16
NOBODY: Final = ""


class LinkRefused(OutriderError):
    """Who asks for a link shows no key that is known here (HTTP 401)."""

    code = "link_refused"
    status = 401
    kind = "authentication_error"


class Keys:
    """The keys of `OUTRIDER_LINK_KEYS`: NAME=KEY, separated by commas or lines. A name owns what its links open."""

    def __init__(self, text: str) -> None:
        """Raises `OutriderError` when the text isn't right; no key is ever part of the message."""
        self._names: Mapping[bytes, str] = dict(
            _parse(entry, place) for place, entry in enumerate(_entries(text), 1)
        )

    def owner(self, authorization: str | None, peer: str | None) -> str:
        """Whose link it is, by its Authorization header; `NOBODY`'s when there are no keys and the peer is local.

        Raises `LinkRefused`.
        """
        if not self._names:
            if _is_loopback(peer):
                return NOBODY
            raise LinkRefused(
                f"links from {peer} need a key: set OUTRIDER_LINK_KEYS here and OUTRIDER_LINK_KEY at the edge"
            )
        scheme, _, key = (authorization or "").partition(" ")
        shown = _digest(key.strip())
        for known, name in self._names.items():
            if scheme.lower() == "bearer" and hmac.compare_digest(known, shown):
                return name
        raise LinkRefused(
            "no key, or an unknown one: set OUTRIDER_LINK_KEY at the edge to one of OUTRIDER_LINK_KEYS"
        )


def _entries(text: str) -> list[str]:
    return [entry.strip() for line in text.splitlines() for entry in line.split(",") if entry.strip()]


def _parse(entry: str, place: int) -> tuple[bytes, str]:
    name, separator, key = entry.partition("=")
    if not (separator and name.strip() and len(key.strip()) >= SHORTEST_KEY):
        raise OutriderError(
            f"OUTRIDER_LINK_KEYS: entry {place} is not NAME=KEY with a key of {SHORTEST_KEY} characters or more"
        )
    return _digest(key.strip()), name.strip()


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _is_loopback(peer: str | None) -> bool:
    try:
        return ipaddress.ip_address(peer or "").is_loopback
    except ValueError:
        return False
