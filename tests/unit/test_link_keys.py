"""Who may link, and whose sessions a link sees."""

from __future__ import annotations

import pytest

from services.draft_gateway.link.keys import NOBODY, Keys, LinkRefused
from shared.errors import OutriderError

ROBOTS, SHOP = "robots-0123456789", "shop-key-with=equals="


@pytest.fixture
def keys() -> Keys:
    return Keys(f"robots={ROBOTS}, shop={SHOP}\n")


def test_a_key_says_whose_link_it_is(keys: Keys) -> None:
    assert keys.owner(f"Bearer {ROBOTS}", "192.0.2.7") == "robots"
    assert keys.owner(f"bearer {SHOP}", "192.0.2.7") == "shop"


@pytest.mark.parametrize(
    "shown", [None, "", "Bearer", f"Basic {ROBOTS}", f"Bearer {ROBOTS}x", f"Bearer {ROBOTS[:-1]}"]
)
def test_any_other_is_refused_also_from_this_machine(keys: Keys, shown: str | None) -> None:
    with pytest.raises(LinkRefused) as refused:
        keys.owner(shown, "127.0.0.1")
    assert ROBOTS not in refused.value.message


def test_without_keys_only_this_machine_may_link() -> None:
    none = Keys("")
    assert none.owner(None, "127.0.0.1") == none.owner(None, "::1") == NOBODY
    for peer in ("192.0.2.7", "2001:db8::1", "", None):
        with pytest.raises(LinkRefused, match="OUTRIDER_LINK_KEYS"):
            none.owner(None, peer)


@pytest.mark.parametrize("text", [ROBOTS, f"={ROBOTS}", "robots=short", f"robots={ROBOTS},shop"])
def test_keys_that_are_not_right_are_told_without_showing_them(text: str) -> None:
    with pytest.raises(OutriderError, match=r"entry \d is not NAME=KEY") as told:
        Keys(text)
    assert ROBOTS not in told.value.message
