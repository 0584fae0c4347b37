"""A verifier's process in miniature: starts an engine, says its process id, waits to be killed."""

from __future__ import annotations

import asyncio
import sys

from services.verifier.engine.engine import VllmEngine
from services.verifier.settings import VerifierSettings
from shared.protocol import GenerationParams


async def main(model: str) -> None:
    engine = VllmEngine(VerifierSettings(model=model, max_model_len=256, kv_cache_mb=8))
    await engine.start(lambda report: None)
    stream = engine.open("only", (5, 6, 7), (), GenerationParams(max_tokens=100))
    await anext(stream)
    print(engine.process_id, flush=True)
    await anext(stream)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
