"""Packed tokens, and what is said of an address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.redis_client import hide_password
from shared.store import pack, unpack

TOKENS = st.lists(st.integers(0, (1 << 31) - 1)).map(tuple)


@given(TOKENS)
def test_packed_tokens_unpack_to_themselves_at_four_bytes_each(tokens: tuple[int, ...]) -> None:
    assert unpack(pack(tokens)) == tokens
    assert len(pack(tokens)) == 4 * len(tokens)


@given(TOKENS, TOKENS)
def test_appending_packed_tokens_appends_the_tokens(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    assert unpack(pack(first) + pack(second)) == first + second


def test_packing_is_little_endian() -> None:
    assert pack((1, 0x01020304)) == b"\x01\x00\x00\x00\x04\x03\x02\x01"


def test_a_torn_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        unpack(b"12345")


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_a_number_that_is_no_token_is_an_error(token: int) -> None:
    with pytest.raises(OverflowError):
        pack((token,))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:secret@host:1/0", "redis://:***@host:1/0"),
        ("rediss://user:secret@host/3?ssl_cert_reqs=none", "rediss://user:***@host/3?ssl_cert_reqs=none"),
        ("unix:///run/redis.sock?password=secret&db=1", "unix:///run/redis.sock?password=***&db=1"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert hide_password(url) == shown
