"""vLLM's AsyncLLM with the calls that reach our scheduler. Imports vLLM; `engine` imports it late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Final

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from services.verifier.engine.options import DESCRIBE_CALL, STATS_CALL, SUBMIT_CALL

STOP_TIMEOUT_S: Final = 5.0

_Block = tuple[str, int, list[int], list[int], list[tuple[list[int], list[int]]], int, int]


class EngineClient(AsyncLLM):  # type: ignore[misc]
    """AsyncLLM, and what we ask of its engine process besides."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._blocks: list[tuple[_Block, asyncio.Future[str]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    def submit_block(
        self,
        key: str,
        base: int,
        tokens: list[int],
        levels: list[int],
        rows: list[tuple[list[int], list[int]]],
        number: int,
        ahead: int,
    ) -> asyncio.Future[str]:
        """A `BlockStatus`; see `SessionScheduler.submit_block`. Blocks of one turn of the event loop go in one call."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        if not self._blocks:
            loop.call_soon(self._submit_all)
        self._blocks.append(((key, base, tokens, levels, rows, number, ahead), answer))
        return answer

    def _submit_all(self) -> None:
        blocks, self._blocks = self._blocks, []
        call = asyncio.get_running_loop().create_task(self._submit(blocks))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _submit(self, blocks: Sequence[tuple[_Block, asyncio.Future[str]]]) -> None:
        try:
            statuses = await self.engine_core.call_utility_async(SUBMIT_CALL, [block for block, _ in blocks])
        except Exception as error:
            for _, answer in blocks:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), status in zip(blocks, statuses, strict=True):
            if not answer.done():
                answer.set_result(status)

    async def session_stats(self) -> dict[str, Any]:
        """The fields of `EngineStats`."""
        found: dict[str, Any] = await self.engine_core.call_utility_async(STATS_CALL)
        return found

    async def describe(self) -> dict[str, Any]:
        """What `EngineInfo` says of exits and KV."""
        await self.get_supported_tasks()  # asked for and kept with the first request otherwise
        found: dict[str, Any] = await self.engine_core.call_utility_async(DESCRIBE_CALL)
        return found

    @property
    def process(self) -> BaseProcess:
        """The engine process."""
        (process,) = self.engine_core.resources.engine_manager.processes
        found: BaseProcess = process
        return found

    def fail_streams(self) -> None:
        """Raise `EngineDeadError` in every stream that is being read."""
        self.output_processor.propagate_error(EngineDeadError())

    async def stop(self) -> None:
        """End the engine process within `STOP_TIMEOUT_S`; what is still under way gets no answer."""
        for call in self._calls:
            call.cancel()
        if self.output_handler is not None:
            self.output_handler.cancel()
            await asyncio.wait([self.output_handler])
        await asyncio.to_thread(self.shutdown, STOP_TIMEOUT_S)

    def __del__(self) -> None:
        """Nothing: `stop` was called. vLLM would shut down again here, at the interpreter's end, and stumble."""
