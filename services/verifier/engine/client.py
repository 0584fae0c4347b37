"""vLLM's AsyncLLM with the calls that reach our scheduler. Imports vLLM; `engine` imports it late."""

from __future__ import annotations

import asyncio
from multiprocessing.process import BaseProcess
from typing import Any, Final

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from services.verifier.engine.options import DESCRIBE_CALL, STATS_CALL, SUBMIT_CALL

STOP_TIMEOUT_S: Final = 5.0


class EngineClient(AsyncLLM):  # type: ignore[misc]
    """AsyncLLM, and what we ask of its engine process besides."""

    async def submit_block(
        self,
        key: str,
        base: int,
        tokens: list[int],
        levels: list[int],
        rows: list[tuple[list[int], list[int]]],
        number: int,
    ) -> str:
        """A `BlockStatus`; see `SessionScheduler.submit_block`."""
        block = (key, base, tokens, levels, rows, number)
        return str(await self.engine_core.call_utility_async(SUBMIT_CALL, *block))

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
        if self.output_handler is not None:
            self.output_handler.cancel()
            await asyncio.wait([self.output_handler])
        await asyncio.to_thread(self.shutdown, STOP_TIMEOUT_S)

    def __del__(self) -> None:
        """Nothing: `stop` was called. vLLM would shut down again here, at the interpreter's end, and stumble."""
