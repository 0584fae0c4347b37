"""Rows that sessions keep while others come and go."""

from __future__ import annotations

from services.verifier.engine.session_table import SessionTable

COLUMNS = 6


def test_blocks_of_the_kv_cache_follow_each_other() -> None:
    table = SessionTable(2, COLUMNS)
    row, other = table.enter(), table.enter()
    table.hold(row, 0, [11, 12])
    table.hold(other, 0, [5])
    table.hold(row, 2, [13])
    assert table.blocks[row, :3].tolist() == [11, 12, 13]
    assert table.blocks[other, :1].tolist() == [5]


def test_more_sessions_than_expected_keep_what_was_written() -> None:
    table = SessionTable(2, COLUMNS)
    rows = [table.enter() for _ in range(9)]
    assert len(set(rows)) == 9
    for number, row in enumerate(rows):
        table.hold(row, 0, [number])
    table.hold(table.enter(), 0, [99])
    assert table.blocks[rows, 0].tolist() == list(range(9))


def test_a_row_that_was_left_is_taken_again() -> None:
    table = SessionTable(1, COLUMNS)
    row = table.enter()
    table.leave(row)
    assert table.enter() == row
