"""What the bus decides without a broker: progress of a reader, what a flavour can do."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from shared.bus import Capabilities, Watermark
from shared.settings import KafkaFlavor


def delivered(*offsets: int) -> Watermark:
    watermark = Watermark()
    for offset in offsets:
        watermark.delivered(offset)
    return watermark


def test_there_is_no_progress_before_the_first_message() -> None:
    watermark = Watermark()
    assert watermark.position is None
    assert watermark.uncommitted is None
    assert watermark.open == 0


def test_progress_stops_at_the_first_message_that_is_open() -> None:
    watermark = delivered(3, 4, 5, 6)
    watermark.done(5)
    watermark.done(4)
    assert watermark.position == 3
    watermark.done(3)
    assert watermark.position == 6
    watermark.done(6)
    assert watermark.position == 7


def test_offsets_that_kafka_keeps_to_itself_do_not_hold_progress_up() -> None:
    watermark = delivered(3, 7)
    watermark.done(3)
    assert watermark.position == 7
    watermark.done(7)
    assert watermark.position == 8


def test_a_message_done_twice_or_never_delivered_changes_nothing() -> None:
    watermark = delivered(3, 4)
    watermark.done(4)
    watermark.done(4)
    watermark.done(99)
    assert (watermark.position, watermark.open) == (3, 1)


def test_what_is_committed_is_not_committed_again() -> None:
    watermark = delivered(3)
    assert watermark.uncommitted == 3
    watermark.committed(3)
    assert watermark.uncommitted is None
    watermark.done(3)
    assert watermark.uncommitted == 4


@given(st.sets(st.integers(0, 200), min_size=1), st.randoms())
def test_progress_never_passes_an_open_message_nor_lags_behind_the_done_ones(
    numbers: set[int], dice: random.Random
) -> None:
    offsets = sorted(numbers)
    watermark = delivered(*offsets)
    order = list(offsets)
    dice.shuffle(order)
    still_open = set(offsets)
    for offset in order:
        assert watermark.position == min(still_open)
        watermark.done(offset)
        still_open.discard(offset)
    assert watermark.position == offsets[-1] + 1
    assert watermark.open == 0


def test_apache_kafka_is_used_for_all_that_it_can() -> None:
    capabilities = Capabilities.of(KafkaFlavor.APACHE)
    assert capabilities.idempotence
    assert capabilities.topic_settings
    assert capabilities.fetch_max_wait_ms == 500
    assert capabilities.group_fetch_max_wait_ms == 100, "a partition just won waits behind it"


def test_tansu_gets_no_idempotence_and_short_fetches() -> None:
    capabilities = Capabilities.of(KafkaFlavor.TANSU)
    assert not capabilities.idempotence
    assert not capabilities.topic_settings
    assert 5 <= capabilities.fetch_max_wait_ms == capabilities.group_fetch_max_wait_ms <= 20
