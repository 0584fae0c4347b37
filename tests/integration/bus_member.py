"""A member of a consumer group as a process of its own, for tests that kill it.

Reads drafts and prints a line of JSON for each event: `assigned` with its partitions, `read` with the message's round
and partition, `failed` with an error. Rounds below `--done-below` are reported as done.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

from shared.bus import Bus
from shared.errors import OutriderError
from shared.protocol import Block, Topic
from shared.settings import CommonSettings


def say(event: str, **fields: object) -> None:
    """Print one event."""
    print(json.dumps({"event": event, "at": time.time(), **fields}), flush=True)


async def run(member: str, session_timeout_s: float, done_below: int) -> None:
    """Read until killed, or until the reader fails."""
    async with Bus(CommonSettings(), client=member) as bus:
        reader = bus.group_reader(
            Topic.DRAFTS,
            group="verifiers",
            member=member,
            session_timeout_s=session_timeout_s,
            on_assigned=lambda won: say("assigned", partitions=sorted(won)),
            on_revoked=lambda lost: say("revoked", partitions=sorted(lost)),
        )
        async with reader:
            say("started")
            try:
                async for received in reader:
                    if isinstance(received.message, Block):
                        say("read", round=received.message.round, partition=received.partition)
                        if received.message.round < done_below:
                            reader.done(received)
            except OutriderError as error:
                say("failed", code=error.code, message=error.message)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("member")
    parser.add_argument("--session-timeout-s", type=float, default=3.0)
    parser.add_argument("--done-below", type=int, default=1 << 30)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.member, arguments.session_timeout_s, arguments.done_below))


if __name__ == "__main__":
    main()
