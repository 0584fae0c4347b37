"""Early exits as nodes of a CUDA graph: they cost no host time, and speak while the pass still runs.

Replayed, an exit gathers the rows of verified blocks from the residual stream, guesses, judges and ranks on the device
(`ranking`), and copies outcomes alone to pinned memory: (accepted length, next token, confidence), and after these, as
a mark that they are there, the pass's number. Nothing in it waits for the host, allocates, or runs Python. One thread
looks at the marks and turns what has arrived into hints.

    host      stage ─▶ launch ──────────────────────────────────────────────▶ drain ─▶ next pass
                │ one copy            ▲ mark          ▲ mark          ▲ mark
    device      ▼   layers … ─ exit ──┘─ layers … ────┘─ layers … ────┘─ layers … ─ sample

In a full graph an exit runs on a stream of its own, beside the layers that follow; the last layer's hook joins it. It has
no precedence over them: with many rows a pass would pay half as much again for it, and it would be heard no sooner. In the
pieces of other graphs (batches with prefills), which end at every attention, it stays on the one stream.

With tensor parallelism the residual stream is whole on every rank after a layer's all-reduce, and the head is split by
tokens: an exit would run on every rank on its part of the vocabulary, and one small all-gather of each part's best, its
log-sum and the draft token's logit (as vLLM's own sharded argmax does) would stand where `DeviceHead` takes its maximum;
rank 0 alone would copy outcomes to the host. That is not written: more than one rank is refused.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from services.verifier.engine.channel import ExitMessage, Outlook, Sender
from services.verifier.engine.exit_files import ExitSet
from services.verifier.engine.exit_head import ExitHead
from services.verifier.engine.exit_modules import (
    ExitModule,
    Judged,
    TrainedExit,
    figure_weights,
    judged_acceptance,
)
from services.verifier.engine.exits import VerifiedRows
from services.verifier.engine.ranking import RANK_FIELDS, rank

if TYPE_CHECKING:
    from services.verifier.engine.fused_exits import FusedExit

POLL_S: Final = 10e-6
"""Time between two looks at the marks."""
PR_SET_TIMERSLACK: Final = 29


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the pass about to begin verifies, for the exits.

    `places` [blocks, K + 1] are the blocks' rows among the pass's, the last one repeated where a block is short; `drafts`
    are token ids and `sure` the draft's log-probabilities of them (NaN where it said nothing), whatever they are past a
    block's `lengths` [blocks]. `sessions` say whose the blocks are whose gateways wait for hints, their `start` is a block's
    first row here; they may also be named later (`expect`).
    """

    began: float
    places: npt.NDArray[np.int32]
    drafts: npt.NDArray[np.int32]
    sure: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int32]
    sessions: tuple[VerifiedRows, ...] = ()


@dataclass(slots=True)
class _Awaited:
    """A pass of which exits have yet to speak."""

    number: int
    began: float
    sessions: tuple[VerifiedRows, ...]
    missing: set[int] = field(default_factory=set)


class GraphExits:
    """The exits of one model. `run` is called by the model's forward, after layers with an exit and after the last one;
    `stage` and `drain` by the runner."""

    def __init__(
        self,
        exits: ExitSet,
        norm: Callable[[Tensor], Tensor],
        head: ExitHead,
        sender: Sender,
        *,
        device: torch.device,
        most_blocks: int,
        longest: int,
        outcomes: int,
        fused: Mapping[int, FusedExit] | None = None,
    ) -> None:
        """The modules of `exits` are on `device`; `norm` and `head` are the model's last ones. `most_blocks` of `longest`
        drafts are verified in a pass. `fused` say the same as `outcomes`, by layer, where there is a device for them."""
        self.exits = exits
        self._norm, self._head, self._sender = norm, head, sender
        self._width, self._most, self._outcomes = longest + 1, most_blocks, outcomes
        self._order = tuple(sorted(exits.modules))
        self._judgements = _judgements(exits.modules, device)
        rows = self._most * self._width
        cuda = device.type == "cuda"
        self._staged = _pinned(1 + 3 * rows + most_blocks, pin=cuda)
        self._input = torch.zeros(len(self._staged), dtype=torch.int32, device=device)
        self._number, self._rows, self._drafts, self._sure, self._lengths = torch.split(
            self._input, [1, rows, rows, rows, most_blocks]
        )
        self._found = _pinned(len(self._order), most_blocks, outcomes, RANK_FIELDS, pin=cuda)
        self._marks = _pinned(len(self._order), pin=cuda)
        self._staging, self._found_values, self._mark_values = (
            buffer.numpy() for buffer in (self._staged, self._found, self._marks)
        )
        self._side: torch.cuda.Stream | None = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._fused = fused or {}
        self._kept: list[Tensor] = []
        self._passes = 0
        self._shown = False
        self.silent = False
        """Whether what is captured is a pass without exits."""
        self._awaited: _Awaited | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        threading.Thread(target=self._poll, name="exit-poller", daemon=True).start()

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with an exit, counted from 1."""
        return self._order

    # --- the host's side ----------------------------------------------------------------------------------------

    def stage(self, blocks: Blocks | None, *, hand_over: bool = True) -> None:
        """Hand over what the next pass verifies; to be called before its launch, and after the `drain` of the last.

        Not `hand_over`: only make it ready for a `hand_over` that the pass begins with.
        """
        rows, staged = self._most * self._width, self._staging
        if blocks is None:
            if self._shown:
                staged[1 : 1 + rows] = 0
                if hand_over:
                    self.hand_over()
            self._shown = False
            return
        self._shown = True
        self._passes = self._passes % 0x7FFFFFFF + 1
        count = blocks.places.size
        staged[0] = self._passes
        staged[1 : 1 + count] = blocks.places.reshape(-1)
        # what a graph gathers past the last block must be rows that its pass has
        staged[1 + count : 1 + rows] = 0
        staged[1 + rows : 1 + rows + count] = blocks.drafts.reshape(-1)
        staged[1 + 2 * rows : 1 + 2 * rows + count] = blocks.sure.view(np.int32).reshape(-1)
        staged[1 + 3 * rows : 1 + 3 * rows + len(blocks.lengths)] = blocks.lengths
        if hand_over:
            self.hand_over()
        if blocks.sessions:
            self.expect(blocks.began, blocks.sessions)

    def expect(self, began: float, sessions: tuple[VerifiedRows, ...]) -> None:
        """Whose gateways wait for hints on the pass that was staged last, which `began` then (monotonic clock, seconds); at
        any time before its `drain`."""
        with self._lock:
            self._awaited = _Awaited(self._passes, began, sessions, set(self._order))
        self._wake.set()

    def hand_over(self) -> None:
        """Copy to the device what is staged."""
        self._input.copy_(self._staged, non_blocking=True)

    def drain(self) -> None:
        """Send what has arrived and is not sent; to be called when the device has finished a pass."""
        with self._lock:
            self._take()
            self._awaited = None
            self._wake.clear()

    def _poll(self) -> None:
        _sleep_exactly()
        while True:
            self._wake.wait()
            awaited = self._awaited
            if awaited is not None and any(
                self._mark_values[at] == awaited.number
                for at, layer in enumerate(self._order)
                if layer in awaited.missing
            ):
                with self._lock:
                    self._take()
                    if self._awaited is None or not self._awaited.missing:
                        self._wake.clear()
            time.sleep(POLL_S)

    def _take(self) -> None:
        """Turn what the marks say has come into hints. Called with the lock held."""
        awaited = self._awaited
        if awaited is None:
            return
        for at, layer in enumerate(self._order):
            if layer in awaited.missing and self._mark_values[at] == awaited.number:
                awaited.missing.remove(layer)
                elapsed_ms = (time.monotonic() - awaited.began) * 1000
                outlooks = _outlooks(self._found_values[at], awaited.sessions, self._width)
                self._sender.send(ExitMessage(layer, elapsed_ms, outlooks))

    # --- the device's side --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        """The exit after `layer`, on the pass's rows `[rows, hidden size]`; after the last layer the end of all exits."""
        if layer not in self.exits.modules:
            self._join()
            return
        if self.silent:
            return
        blocks = min(len(hidden) // self._width, self._most)
        if not blocks:
            return
        fused, index = self._fused.get(layer), self._rows[: blocks * self._width]
        own = (
            fused.gather(hidden, residual, index)
            if fused is not None
            else (hidden.index_select(0, index) + residual.index_select(0, index),)
        )
        if self._side is None or get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.FULL:
            self._speak(layer, own, blocks)
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._speak(layer, own, blocks)
        # the layers' stream allocates anew what it has freed: this must not be freed before the streams have joined
        self._kept.extend(own)

    def _join(self) -> None:
        if self._kept and self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            self._kept.clear()

    def _speak(self, layer: int, own: tuple[Tensor, ...], blocks: int) -> None:
        at, fused, rows = self._order.index(layer), self._fused.get(layer), blocks * self._width
        if fused is None:
            found = self.outcomes(layer, own[0], blocks)
        else:
            sure = self._sure[:rows].view(torch.float32)
            found = fused.outcomes(
                own[0], own[1], self._drafts[:rows], sure, self._lengths[:blocks], self._width
            )
        self._found[at, :blocks].copy_(found, non_blocking=True)
        self._marks[at : at + 1].copy_(self._number, non_blocking=True)

    def outcomes(self, layer: int, own: Tensor, blocks: int) -> Tensor:
        """What the exit after `layer` foresees `[blocks, outcomes, RANK_FIELDS]`, int32, of the staged blocks' first
        `blocks`, whose rows of the residual stream are `own`."""
        module, rows = self.exits.modules[layer], blocks * self._width
        drafts, sure = self._drafts[:rows].long(), self._sure[:rows].view(torch.float32)
        normed = self._norm(module(own))
        scores = self._head(normed, drafts, self._outcomes + 1)
        judged = Judged(normed, scores.draft_rows, scores.drafted, sure, scores.log_probs[:, :2])
        accepted = self._acceptance(layer, module, judged)
        shape = (blocks, self._width)
        lengths, tokens, shares = rank(
            scores.drafted.view(shape),
            accepted.view(shape),
            drafts.view(shape),
            self._lengths[:blocks],
            scores.tokens.view(*shape, -1),
            scores.log_probs.view(*shape, -1),
            self._outcomes,
            module.calibration.outcome,
        )
        return torch.stack((lengths.int(), tokens.int(), shares.float().view(torch.int32)), dim=-1)

    def _acceptance(self, layer: int, module: ExitModule, judged: Judged) -> Tensor:
        """Log-probabilities `[rows]` that drafts are accepted; nothing is copied to the device for it."""
        if not isinstance(module, TrainedExit):
            return module.acceptance(judged)
        return judged_acceptance(module.judge, judged, module.calibration, self._judgements.get(layer))


def _judgements(modules: Mapping[int, ExitModule], device: torch.device) -> dict[int, Tensor]:
    return {
        layer: figure_weights(module.calibration, device)
        for layer, module in modules.items()
        if module.calibration.judgement
    }


def _pinned(*shape: int, pin: bool) -> Tensor:
    """int32 zeros on the host, whatever device vLLM has made the default."""
    return torch.zeros(shape, dtype=torch.int32, device="cpu", pin_memory=pin)


def _sleep_exactly() -> None:
    """Have the sleeps of the calling thread end when they should: Linux adds up to 50 µs to each, where it isn't told."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


def _outlooks(found: npt.NDArray[np.int32], sessions: Sequence[VerifiedRows], width: int) -> list[Outlook]:
    """What an exit foresees, by session. Outcomes of probability 0 are none: fewer were to be had."""
    found = found[: 1 + max((rows.start for rows in sessions), default=0) // width]
    lengths, tokens = found[..., 0].tolist(), found[..., 1].tolist()
    shares = np.ascontiguousarray(found[..., 2]).view(np.float32).tolist()
    outlooks = []
    for rows in sessions:
        block = rows.start // width
        ranked = [
            outcome
            for outcome in zip(lengths[block], tokens[block], shares[block], strict=True)
            if outcome[2] > 0.0
        ]
        outlooks.append(Outlook(rows.key, rows.base, ranked))
    return outlooks


# --- the operator -------------------------------------------------------------------------------------------------

_RUNNING: Final[list[GraphExits]] = []


def register(exits: GraphExits) -> int:
    """The number under which the operator in a model's graph finds its exits; in order, so that compiled graphs can be
    used again."""
    _RUNNING.append(exits)
    return len(_RUNNING) - 1


def _exit(hidden: Tensor, residual: Tensor, order: Tensor, layer: int, number: int) -> None:
    _RUNNING[number].run(layer, hidden, residual)


def _exit_shapes(hidden: Tensor, residual: Tensor, order: Tensor, layer: int, number: int) -> None:
    """It returns nothing."""


# It "changes" `order`, so that compilers neither drop nor reorder it.
direct_register_custom_op("outrider_exit", _exit, mutates_args=["order"], fake_impl=_exit_shapes)
