"""Where requests keep their keys and values: of each a row of KV blocks, filled up as the request grows.

vLLM's own block table holds the requests of the last pass alone, and is filled anew for all that join the next one. Sessions
take turns: here their rows stay, whoever runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class _Row:
    """The row at `at`, which holds the first `filled` of `ids`; these only grow, or another list takes their place."""

    at: int
    ids: list[int]
    filled: int = 0


PASSES: Final = 4
"""Rows are kept for the requests of so many passes."""


class BlockRows:
    """Rows for passes of up to `most` requests, of up to `columns` blocks each. What is kept is a copy of what vLLM knows:
    where there may not be room for another pass all rows are forgotten, and taken down again as requests come."""

    def __init__(self, most: int, columns: int) -> None:
        self._table = np.zeros((PASSES * most, columns), dtype=np.int32)
        self._rows: dict[str, _Row] = {}

    def gather(self, requests: Sequence[str], ids: Sequence[list[int]], out: npt.NDArray[np.int32]) -> None:
        """Write the rows of `requests`, whose blocks are `ids`, to `out` `[requests, columns]`; of each row only what its
        blocks fill means anything. Each request is named once."""
        if len(self._rows) + len(requests) > len(self._table):
            self._rows.clear()
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
