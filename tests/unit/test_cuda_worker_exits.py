"""What the CUDA runner hands to its exits: an even pass and any other say the same of the same blocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from services.verifier.engine.cuda_worker import CudaSessionRunner
from services.verifier.engine.exits import VerifiedRows
from services.verifier.engine.graph_exits import Blocks
from services.verifier.engine.runner import NO_TOKEN, Speaker
from services.verifier.engine.session_table import padded_levels
from services.verifier.engine.steady import EvenBlocks, Graph
from services.verifier.engine.types import UNHEARD

WIDTH = 4
KEYS = ("a", "b", "c", "d")


class Staged:
    """Exits that keep what they are handed."""

    layers = (2,)

    def __init__(self) -> None:
        self.blocks: Blocks | None = None
        self.sessions: tuple[VerifiedRows, ...] = ()

    def stage(self, blocks: Blocks | None, *, hand_over: bool = True) -> None:
        self.blocks = blocks
        self.sessions = blocks.sessions if blocks is not None else ()

    def expect(self, began: float, sessions: tuple[VerifiedRows, ...]) -> None:
        assert self.blocks is not None
        assert began == self.blocks.began
        self.sessions = sessions


class Runner(CudaSessionRunner):
    """The runner's part that exits see, without a device."""

    def __init__(self, *drawn: str) -> None:
        self.graph_exits: Any = Staged()
        self.step_clock: Any = SimpleNamespace(began=5.0)
        self.uniform_decode_query_len = WIDTH
        self._drawn: Any = dict.fromkeys(drawn)
        self._width_offsets = np.arange(WIDTH, dtype=np.int32)
        self._starts = np.arange(9, dtype=np.int32)[:, None] * np.int32(WIDTH)
        self._hinted = None
        self._silent_graphs = frozenset((2, 4))
        self._speakers = {key: speaker(key) for key in KEYS}
        self.requests = dict.fromkeys(KEYS)
        self.max_num_reqs = len(KEYS)


def speaker(key: str) -> Speaker:
    return Speaker(None, None, key, eager=key == "b", unheard=key == "c", prompt=10)


def even_blocks(lengths: tuple[int, ...], levels: dict[str, list[int]]) -> EvenBlocks:
    tokens = np.full((len(lengths), WIDTH - 1), NO_TOKEN, dtype=np.int32)
    for at, length in enumerate(lengths):
        tokens[at, :length] = np.arange(length) + 20 * (at + 1)
    requests = list(KEYS[: len(lengths)])
    told = [padded_levels(levels.get(key, []), WIDTH) for key in requests]
    heard = [
        CudaSessionRunner._is_heard(speaker(request), levels.get(request, ()), length)
        for request, length in zip(requests, lengths, strict=True)
    ]
    computed = np.array([30 + at for at in range(len(lengths))], dtype=np.int32)
    return EvenBlocks(requests, tokens, np.array(lengths), computed, levels, told, heard)


CASES: dict[str, tuple[tuple[int, ...], dict[str, list[int]]]] = {
    "full blocks": ((3, 3, 3, 3), {"a": [1, 50, 99], "b": [2, 2, 2], "d": []}),
    "short and empty ones": ((2, 0, 1, 0), {"a": [7, 8], "c": [4]}),
    "one that nobody waits for": ((3, 2), {"a": [UNHEARD] * 3, "b": [60, 61]}),
    "nobody waits": ((3, 0), {"a": [UNHEARD] * 3}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("drawn", [(), ("a",)], ids=["greedy", "one is drawn"])
def test_an_even_pass_is_shown_to_exits_as_any_other(case: str, drawn: tuple[str, ...]) -> None:
    even = even_blocks(*CASES[case])
    quick, slow = Runner(*drawn), Runner(*drawn)
    quick._show_even(even)
    quick._await_hints()
    slow._show_exits(even.rows, None, even.levels)  # type: ignore[arg-type]
    found, expected = quick.graph_exits, slow.graph_exits
    assert found.sessions == expected.sessions
    if expected.blocks is None:
        assert found.blocks is None
        return
    for name in ("places", "drafts", "sure", "lengths"):
        np.testing.assert_array_equal(
            getattr(found.blocks, name), getattr(expected.blocks, name), err_msg=name, strict=True
        )


def test_hints_are_for_those_that_wait_for_them() -> None:
    runner = Runner()
    runner._show_even(even_blocks((2, 0, 3, 0), {"a": [5, 6], "c": [1, 1, 1]}))
    assert runner.graph_exits.sessions == (), "named after the launch"
    runner._await_hints()
    assert runner.graph_exits.sessions == (
        VerifiedRows("a", 21, 0, (20, 21)),
        VerifiedRows("d", 24, 3 * WIDTH, ()),
    )


def test_a_pass_of_single_rows_is_shown_to_no_exit() -> None:
    runner = Runner()
    runner._show_even(even_blocks((3, 3), {}))
    runner._show_even(replace(even_blocks((0, 0), {}), tokens=np.zeros((2, 0), np.int32)))
    runner._await_hints()
    assert runner.graph_exits.blocks is None
    assert runner.graph_exits.sessions == ()


@pytest.mark.parametrize(
    ("case", "has_exits"),
    [("full blocks", True), ("one that nobody waits for", True), ("nobody waits", False)],
)
def test_a_pass_in_which_nobody_waits_for_hints_runs_without_exits(case: str, has_exits: bool) -> None:
    runner, even = Runner(), even_blocks(*CASES[case])
    sessions = len(even.tokens)
    rows = sessions * WIDTH
    usual = Graph(CUDAGraphMode.FULL, BatchDescriptor(rows, sessions, uniform=True), sessions, rows, WIDTH)
    runner._show_even(even)
    found = runner._graph_of_pass(usual)
    assert (found == usual) is has_exits
    assert (found.sessions, found.rows, found.width) == (sessions, rows, WIDTH)
    assert found.batch.num_tokens == rows
    assert runner._graph_of_pass(usual._replace(sessions=3)).batch == usual.batch, "there is no other"
