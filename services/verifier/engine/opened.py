"""An open session as the verifier's process sees it: what was asked of the engine, and which of its outputs answers that."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.verifier.engine.options import ANSWERED, DRAFTED, PASSES
from shared.protocol import Tokens

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.output_processor import RequestOutputCollector


@dataclass(slots=True, eq=False)
class Opened:
    """A session's request in the engine (`key`), and how many committed tokens it was opened with (`offset`).

    One that may say tokens `ahead` by itself is only read while something is asked of it. What it says besides waits,
    merged by vLLM into one output: it answers what is asked next, or is the first part of the answer.
    """

    session: str
    key: str
    offset: int
    ahead: int = 0
    permitted: int = 0
    """How far ahead it may be now, as the engine knows it."""
    submitted: int = 0
    """Blocks so far, which is the number of the last one."""
    asked: int = 0
    """The block that the answer has to be of; 0 where any tokens will do."""
    taken: int = 0
    """Own output tokens that the engine knows to be taken."""
    passes: int = 0
    """Of which the outputs have been read."""
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    outputs: RequestOutputCollector | None = None
    _lacks: bool = False
    """What was read does not answer what is asked yet."""

    def __post_init__(self) -> None:
        self.wanted.set()  # the first token is waited for

    def unread(self) -> Tokens:
        """What it has said and nobody has asked for yet."""
        waiting = self.outputs.output if self.ahead and self.outputs is not None else None
        completions = getattr(waiting, "outputs", None)  # it may be an exception
        return tuple(completions[0].token_ids) if completions else ()

    def ask(self, tokens: Tokens) -> int:
        """Ask for what a block comes to that follows all that was read; how many tokens that are unread say it already, 0
        where it has to be verified."""
        unread = self.unread()
        reaches_on = len(tokens) > len(unread) and tokens[: len(unread)] == unread
        self.submitted += 1
        self.asked = self.submitted if reaches_on else 0
        self.wanted.set()
        return 0 if reaches_on else len(unread)

    def ask_no_more(self, number: int) -> None:
        """Block `number` has no answer of its own: any tokens will do, those that were read besides, too."""
        if self.submitted != number:
            return
        self.asked = 0
        if self._lacks and self.outputs is not None:
            self.outputs.ready.set()

    def goes_on(self, taken: int, ahead: int) -> bool:
        """Whether the engine goes on as it should if it isn't told that so many tokens are taken and it may be so far ahead:
        it knows that, and won't stop for their sake."""
        return 0 < ahead == self.permitted and taken - self.taken <= ahead // 2

    async def answer(self) -> RequestOutput:
        """The next output that answers what is asked, with all that was said before it."""
        assert self.outputs is not None
        await self.wanted.wait()
        found = self.outputs.get_nowait() or await self.outputs.get()
        self._lacks = not self._answers(found)
        while self._lacks:
            await self.outputs.ready.wait()
            self.outputs.ready.clear()  # `get` turns without end where it is set and there is nothing
            if (more := self.outputs.get_nowait()) is not None:
                found.add(more, aggregate=True)
            self._lacks = not self._answers(found)
        if self.ahead:
            self.asked = 0
            self.wanted.clear()
        return found

    def count_passes(self, found: RequestOutput) -> int:
        """How many passes have said an output, if it is the next one."""
        before, told = self.passes, found.kv_transfer_params or {}
        self.passes = told.get(PASSES, before + 1)
        return self.passes - before

    def _answers(self, found: RequestOutput) -> bool:
        told = found.kv_transfer_params or {}
        return bool(found.finished) or told.get(ANSWERED, self.asked) >= self.asked


def drafted_of(found: RequestOutput) -> tuple[tuple[int, float], ...]:
    """What the engine's draft head says may follow an output."""
    told = found.kv_transfer_params or {}
    return tuple((int(token), float(chance)) for token, chance in told.get(DRAFTED, ()))
