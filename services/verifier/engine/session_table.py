"""Where sessions keep their keys and values, and what a pass of their blocks is made of.

A pass is due when the last of its sessions' blocks has come, and from then on every microsecond of the host's is one in
which the device waits. So what takes a look at each session is done when its own block comes, while others are still
awaited: it is noted in the `Session`, and its blocks of the KV cache have a row here. When the pass begins, what is there
of those that are in it is gathered, whoever they are.

Scheduler and runner share all of it: they live in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from services.verifier.engine.types import UNHEARD
from shared.speculation.outcomes import LEVELS

UNTOLD: Final = LEVELS
"""The level of a token of which the draft said nothing."""


def is_heard(levels: Sequence[int], drafted: int, *, eager: bool, unheard: bool) -> bool:
    """Whether a gateway waits for hints on a block of `drafted` tokens."""
    # nobody waits for a hint on the floor's pass, with a block that was looked up for it or without one
    return not unheard and (UNHEARD not in levels if drafted else not eager)


def padded_levels(levels: Sequence[int], length: int) -> bytes:
    """A block's levels as so many bytes; of one that nobody waits for hints on nothing is said."""
    told = () if UNHEARD in levels else levels
    return bytes(told) + bytes([UNTOLD]) * (length - len(told))


class SessionTable:
    """A row of blocks of the KV cache for each session, `blocks` [rows, columns]. It is replaced by a larger one as sessions
    come: take it from here each time."""

    def __init__(self, most: int, columns: int) -> None:
        """With room for `most` sessions to begin with, of up to `columns` blocks each."""
        self.blocks: npt.NDArray[np.int32] = np.zeros((most, columns), dtype=np.int32)
        self._free = list(range(most))

    def enter(self) -> int:
        """A row for a session that comes."""
        if not self._free:
            rows = len(self.blocks)
            self.blocks = np.concatenate((self.blocks, np.zeros_like(self.blocks)))
            self._free = list(range(rows, 2 * rows))
        return self._free.pop()

    def leave(self, row: int) -> None:
        """Its session has ended."""
        self._free.append(row)

    def hold(self, row: int, first: int, blocks: Sequence[int]) -> None:
        """The session holds these from its block number `first` on."""
        self.blocks[row, first : first + len(blocks)] = blocks


class Gathered(NamedTuple):
    """What an even pass verifies, in the scheduler's order.

    `tokens` are each session's last token and its block, padded, one session after the other; `drafts` of a block are a
    draft's; `computed` tokens stand before them in the KV cache. Its blocks of that are in the rows `rows` of `table`, up to
    `held` of them. `heard`: gateways wait for hints on the block, and `told` says how sure the draft was of each token, a
    byte each, `UNTOLD` where it said nothing. `greedy`: all decode greedily, and nothing else is asked of them.

    Prompts come after the sessions that verify a block: each is as many parts, one after the other, as have room for it, and
    each part is laid out as a session's rows are. `ends` are the rows of the pass that are prompts' last. `real`, where not
    all rows of the pass are anybody's: how many of each are.
    """

    tokens: list[int]
    drafts: list[int]
    computed: list[int]
    table: SessionTable
    rows: list[int]
    held: int
    heard: list[bool]
    told: list[bytes]
    greedy: bool
    ends: Sequence[int] = ()
    real: list[int] | None = None
