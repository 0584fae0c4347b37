"""Where requests keep their keys and values: of each a row of KV blocks, filled up as the request grows.

vLLM's own block table holds the requests of the last pass alone, and is filled anew for all that join the next one. Sessions
take turns: here their rows stay, whoever runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class _Row:
    """The row at `at`, which holds the first `filled` of `ids`; these only grow, or another list takes their place."""

    at: int
    ids: list[int]
    filled: int = 0


class BlockRows:
    """Rows for `most` requests, of up to `columns` blocks each. What is kept is a copy of what vLLM knows: where there is no
    room for another request all are forgotten, and taken down again as they come."""

    def __init__(self, most: int, columns: int) -> None:
        self._table = np.zeros((most, columns), dtype=np.int32)
        self._rows: dict[str, _Row] = {}

    def gather(self, requests: Sequence[str], ids: Sequence[list[int]], out: npt.NDArray[np.int32]) -> None:
        """Write the rows of `requests`, whose blocks are `ids`, to `out` `[requests, columns]`; of each row only what its
        blocks fill means anything. There are no more requests than rows, and each is named once."""
        rows = self._rows
        if len(rows) + sum(request not in rows for request in requests) > len(self._table):
            rows.clear()
        places = [self._place(request, own) for request, own in zip(requests, ids, strict=True)]
        np.take(self._table, places, axis=0, out=out, mode="clip")

    def _place(self, request: str, ids: list[int]) -> int:
        row = self._rows.get(request)
        if row is None:
            row = self._rows[request] = _Row(len(self._rows), ids)
        elif row.ids is not ids:
            row.ids, row.filled = ids, 0
        if row.filled != len(ids):
            self._table[row.at, row.filled : len(ids)] = ids[row.filled :]
            row.filled = len(ids)
        return row.at
