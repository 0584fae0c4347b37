"""The asyncio face of a draft engine: one worker thread, everything that waits drafted as one batch.

An engine that is immediate is called in place: handing a 10 µs draft to a thread and back would take ten times as long.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.draft_gateway.drafting.engine import Draft, DraftEngine, DraftRequest
from shared.errors import Overloaded

logger = logging.getLogger(__name__)

QUEUE: Final = 1024
BATCH: Final = 32
CLOSE_DEADLINE_S: Final = 10.0
TURNS: Final = 3
"""Turns of the event loop from a draft to what is asked for because of it: the draft settles, who waits for it goes on,
and what is asked for then is put in."""
BREATH_S: Final = 0.002
"""How long these turns are waited for: a small part of a draft's step."""


Early = Callable[[Draft], None]
"""Called in the event loop with a draft whose tokens are all there, while its engine is still busy."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    request: DraftRequest
    result: asyncio.Future[Draft]
    early: Early | None
    loop: asyncio.AbstractEventLoop

    def tell(self, draft: Draft) -> None:
        """Show the draft to who wants it early, unless it is of no more use."""
        if self.early is not None and not self.result.done():
            self.early(draft)


class Drafter:
    """Drafts beside the event loop. Cancelling a draft drops it: not begun, or stopped at its next token."""

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        self._waiting: deque[_Job | str] = deque()  # a string is a session to forget
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """The engine's name."""
        return self._engine.name

    async def draft(self, request: DraftRequest, early: Early | None = None) -> Draft:
        """A draft for one lane; `early` may see its tokens before. `Overloaded` when too many wait already."""
        if self._engine.immediate:
            return self._engine.draft([request])[0]
        loop = asyncio.get_running_loop()
        job = _Job(request, loop.create_future(), early, loop)
        self._put(job)
        return await job.result

    def forget(self, session: str) -> None:
        """Free what the engine keeps for a session."""
        if self._engine.immediate:
            self._engine.forget(session)
        elif not self._closed:
            self._put(session)

    def _put(self, job: _Job | str) -> None:
        with self._wake:
            if isinstance(job, _Job) and (self._closed or len(self._waiting) >= QUEUE):
                raise Overloaded(f"{len(self._waiting)} drafts wait already")
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="drafter", daemon=True)
                self._thread.start()
            self._waiting.append(job)
            self._wake.notify()

    def close(self) -> None:
        """Stop the worker; drafts that wait are dropped."""
        with self._wake:
            self._closed = True
            for job in self._waiting:
                if isinstance(job, _Job):
                    _in_loop(job.result, None)
            self._waiting.clear()
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_DEADLINE_S)
            if self._thread.is_alive():
                logger.warning("a draft has not ended %.0f s after it was dropped", CLOSE_DEADLINE_S)

    # --- the worker's side ----------------------------------------------------------------------------

    def _run(self) -> None:
        while (jobs := self._take()) is not None:
            wanted = [job for job in jobs if not job.result.cancelled()]
            if wanted:
                self._draft(wanted)

    def _take(self) -> list[_Job] | None:
        """What waits, at most `BATCH`; None when closed."""
        with self._wake:
            while not self._waiting and not self._closed:
                self._wake.wait()
            if self._closed:
                return None
            jobs: list[_Job] = []
            while self._waiting and len(jobs) < BATCH:
                job = self._waiting.popleft()
                if isinstance(job, _Job):
                    jobs.append(job)
                elif jobs:  # forgetting comes after the drafts that were asked for before it
                    self._waiting.appendleft(job)
                    break
                else:
                    self._engine.forget(job)
            return jobs

    def _draft(self, jobs: list[_Job]) -> None:
        results = {id(job.request): job.result for job in jobs}

        def dropped(request: DraftRequest) -> bool:
            return self._closed or results[id(request)].cancelled()

        def ready(number: int, draft: Draft) -> None:
            job = jobs[number]
            if job.early is not None and not job.result.cancelled() and not job.loop.is_closed():
                job.loop.call_soon_threadsafe(job.tell, draft)

        try:
            drafts = self._engine.draft([job.request for job in jobs], dropped, ready)
        except Exception as error:
            for job in jobs:
                _in_loop(job.result, error)
            return
        for job, draft in zip(jobs, drafts, strict=True):
            _in_loop(job.result, draft)
        self._breathe(jobs[-1].loop)

    def _breathe(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the loop ask for what follows from these drafts: the likeliest lane of all follows from a block's end, and
        would else wait until a batch of less likely ones is through."""
        passed = threading.Event()

        def turn(left: int) -> None:
            if left:
                loop.call_soon(turn, left - 1)
            else:
                passed.set()

        if not loop.is_closed():
            loop.call_soon_threadsafe(turn, TURNS)
            passed.wait(BREATH_S)


def _in_loop(future: asyncio.Future[Draft], outcome: Draft | Exception | None) -> None:
    """Settle a future from any thread, None by cancelling it; a loop that has closed wants no answer."""

    def settle() -> None:
        if future.done():
            return
        if outcome is None:
            future.cancel()
        elif isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    loop = future.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
