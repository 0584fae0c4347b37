"""Rows of KV blocks that stay, whoever runs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.verifier.engine.block_rows import BlockRows

COLUMNS = 6


def gathered(rows: BlockRows, blocks: dict[str, list[int]]) -> list[list[int]]:
    out: npt.NDArray[np.int32] = np.full((len(blocks), COLUMNS), -1, dtype=np.int32)
    rows.gather(list(blocks), list(blocks.values()), out)
    return [row[: len(ids)].tolist() for row, ids in zip(out, blocks.values(), strict=True)]


def test_rows_come_in_the_order_that_is_asked_for_and_grow_with_their_requests() -> None:
    rows, a, b, c = BlockRows(4, COLUMNS), [1, 2], [3], [4, 5, 6]
    assert gathered(rows, {"a": a, "b": b}) == [a, b]
    a.append(7)
    b += [8, 9]
    assert gathered(rows, {"c": c, "b": b}) == [c, b]
    assert gathered(rows, {"b": b, "a": a, "c": c}) == [b, a, c]


def test_a_request_that_is_computed_anew_has_other_blocks() -> None:
    rows = BlockRows(4, COLUMNS)
    gathered(rows, {"a": [1, 2, 3]})
    assert gathered(rows, {"a": [9, 8, 7]}) == [[9, 8, 7]]
    assert gathered(rows, {"a": [5]}) == [[5]]


def test_more_requests_than_rows_take_turns() -> None:
    rows, blocks = BlockRows(3, COLUMNS), {f"s{n}": [n, n + 1] for n in range(30)}
    for first in (0, 2, 4, 9, 12, 27, 0, 15, 18, 21, 0):
        own = {key: blocks[key] for key in list(blocks)[first : first + 3]}
        assert gathered(rows, own) == list(own.values())
        for ids in own.values():
            ids.append(len(ids))
