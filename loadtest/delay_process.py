"""A delaying proxy in a process of its own, so that no link waits for whoever measures: `python -m loadtest.delay_process`.

It prints the port that it listens on. Each line that it reads is conditions as JSON, or empty for those that hold already;
each is answered with the counts so far. It ends with its standard input, and so with whoever started it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from types import TracebackType
from typing import Final, Self

from shared.errors import Unavailable
from shared.stack.delay import Conditions, Counts, DelayProxy, precise_loop


class DelayProcess:
    """A proxy to `target`; between entering and leaving it passes what comes at `port`, as `conditions` say."""

    def __init__(self, target: tuple[str, int], conditions: Conditions) -> None:
        self.conditions = conditions
        self.port = 0
        self._target: Final = target
        self._process: subprocess.Popen[str] | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.to_thread(self._start)
        self.port = int(await asyncio.to_thread(self._line))
        await self.become(self.conditions)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._require()
        process.kill()
        process.communicate()

    @property
    def pid(self) -> int:
        """The process."""
        return self._require().pid

    async def become(self, conditions: Conditions) -> None:
        """Delay so from now on."""
        await self._ask(json.dumps(dataclasses.asdict(conditions)))
        self.conditions = conditions

    async def counts(self) -> Counts:
        """What has passed so far."""
        return Counts(**json.loads(await self._ask("")))

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "loadtest.delay_process", *map(str, self._target)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    async def _ask(self, line: str) -> str:
        def ask() -> str:
            stream = self._require().stdin
            assert stream is not None
            stream.write(f"{line}\n")
            stream.flush()
            return self._line()

        return await asyncio.to_thread(ask)

    def _line(self) -> str:
        stream = self._require().stdout
        assert stream is not None
        if not (line := stream.readline()):
            raise Unavailable(f"the proxy to {self._target[0]}:{self._target[1]} has ended")
        return line

    def _require(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process


# --- the program --------------------------------------------------------------------------------------------------


async def _serve(target: tuple[str, int]) -> None:
    async with DelayProxy(target, Conditions()) as proxy:
        print(proxy.port, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            if line.strip():
                proxy.conditions = Conditions(**json.loads(line))
            print(json.dumps(dataclasses.asdict(proxy.counts)), flush=True)


def main() -> int:
    """Pass bytes to the host and port given until standard input ends."""
    host, port = sys.argv[1:]
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(_serve((host, int(port))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
