"""vLLM as it comes, streaming greedy answers: what the comparison measures everything else against.

AsyncLLM without our plugin, scheduler, worker or models. On CPU it has the arguments and environment that the verifier
gives its own engine there (float32, eager, as many threads); on CUDA what vLLM chooses by itself: compiled, in CUDA graphs,
scheduled ahead. One process holds one engine, with vLLM's own speculation if so asked: n-gram lookup, or a draft model.
The way to it is as lean as can be, so that what is measured is vLLM and the link: newline-JSON over TCP, token ids in and
out, no text. A connection carries one answer at a time:

    → {"prompt": [ids], "max_tokens": 64, "stop": [ids]}
    ← {"t": [ids]}                                  after each step
    ← {"finish": "length", "steps": 63}             at the end; {"error": "..."} instead when it failed
    → {"stats": true}
    ← {"busy_ms": 1234.5}                           time so far with a request in the engine

Run as `python -m loadtest.stock_server --model DIR --port PORT [--speculate K [--draft DIR]]`; it prints `ready` when
it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

from loadtest.busy import BusyTime
from services.verifier.engine.launch import engine_environment
from services.verifier.settings import VerifierSettings
from shared.heap import leave_alone
from shared.stack.ports import HOST

NGRAM_MATCH: Final = (2, 5)
"""Shortest and longest suffix that vLLM's prompt lookup looks for: short ones too, as answers here are short."""


RUNNER_CHOICE: Final = "VLLM_USE_V2_MODEL_RUNNER"
LEAST_MEMORY_SHARE: Final = 0.02
"""vLLM on CUDA checks that so much is free; what the KV cache takes is said apart."""


@dataclass(frozen=True, slots=True)
class StockOptions:
    """What is served, and how. It speculates `speculate` tokens, 0 for none, by `draft` or else by prompt lookup.

    `dtype` "auto" is float32 on CPU and the checkpoint's own on CUDA. `sessions`, `kv_cache_mb` and
    `max_model_len` are the verifier's unless they are named.
    """

    model: Path
    threads: int = 1
    speculate: int = 0
    draft: Path | None = None
    dtype: str = "auto"
    sessions: int | None = None
    kv_cache_mb: int | None = None
    max_model_len: int | None = None


def build(options: StockOptions) -> Any:
    """The engine, loaded."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    cuda = current_platform.is_cuda()
    settings = VerifierSettings(engine_threads=options.threads)
    speculate, draft = options.speculate, options.draft
    arguments: dict[str, Any] = {
        "model": str(options.model),
        "dtype": "float32" if options.dtype == "auto" and not cuda else options.dtype,
        "max_model_len": options.max_model_len or settings.max_model_len,
        "max_num_seqs": options.sessions or settings.max_sessions,
        "kv_cache_memory_bytes": (options.kv_cache_mb or settings.kv_cache_mb) << 20,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",
        "distributed_executor_backend": "uni",
    }
    if cuda:
        arguments["gpu_memory_utilization"] = LEAST_MEMORY_SHARE
    else:
        arguments |= {
            "max_num_batched_tokens": settings.max_batched_tokens,
            "async_scheduling": False,
            "enforce_eager": True,
        }
    if speculate and draft is not None:
        arguments["speculative_config"] = {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": speculate,
        }
    elif speculate:
        shortest, longest = NGRAM_MATCH
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": speculate,
            "prompt_lookup_min": shortest,
            "prompt_lookup_max": longest,
        }
    config = AsyncEngineArgs(**arguments).create_engine_config()
    with mock.patch.object(utils, "get_mp_context", lambda: multiprocessing.get_context("forkserver")):
        return AsyncLLM(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
            log_requests=False,
        )


class Server:
    """Answers on connections."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._numbers: Iterator[int] = itertools.count()
        self._busy = BusyTime()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes on a connection, until it ends."""
        try:
            while line := await reader.readline():
                try:
                    asked = json.loads(line)
                    if "stats" in asked:
                        writer.write(_line({"busy_ms": self._busy.ms}))
                    else:
                        with self._busy.one():
                            await self._answer(asked, writer)
                except (ValueError, KeyError) as error:
                    writer.write(_line({"error": f"{type(error).__name__}: {error}"}))
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _answer(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=int(asked["max_tokens"]),
            stop_token_ids=list(asked["stop"]),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        steps, reason = 0, None
        prompt = tokens_input(list(asked["prompt"]))
        async for output in self._engine.generate(prompt, sampling, f"stock-{next(self._numbers)}"):
            (choice,) = output.outputs
            if choice.token_ids:
                writer.write(_line({"t": list(choice.token_ids)}))
                steps += 1
            reason = choice.finish_reason or reason
        writer.write(_line({"finish": reason, "steps": steps - 1}))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


async def run(options: StockOptions, port: int) -> None:
    """Serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = build(options)
    try:
        leave_alone()
        server = await asyncio.start_server(Server(engine).serve, HOST, port, limit=1 << 22)
        async with server:
            print("ready", flush=True)
            await stop.wait()
    finally:
        engine.shutdown(5.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a server until SIGTERM; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.stock_server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speculate", type=int, default=0, metavar="K", help="tokens that are proposed")
    parser.add_argument(
        "--draft", type=Path, help="a draft model that proposes them (default: n-gram lookup)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights (default: float32 on CPU, else theirs)"
    )
    parser.add_argument("--sessions", type=int, help="answers at a time at most (default: the verifier's)")
    parser.add_argument("--kv-cache-mb", type=int, help="memory of the KV cache (default: the verifier's)")
    parser.add_argument("--max-model-len", type=int, help="tokens of a session (default: the verifier's)")
    parsed = parser.parse_args(arguments)
    options = StockOptions(
        model=parsed.model,
        threads=parsed.threads,
        speculate=parsed.speculate,
        draft=parsed.draft,
        dtype=parsed.dtype,
        sessions=parsed.sessions,
        kv_cache_mb=parsed.kv_cache_mb,
        max_model_len=parsed.max_model_len,
    )
    runner = os.environ.get(RUNNER_CHOICE)
    with engine_environment(parsed.threads):
        os.environ["VLLM_PLUGINS"] = ""
        if runner is None and not _on_cpu():
            del os.environ[
                RUNNER_CHOICE
            ]  # the verifier's own engine needs another runner than vLLM may choose
        asyncio.run(run(options, parsed.port))
    return 0


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


if __name__ == "__main__":
    sys.exit(main())
