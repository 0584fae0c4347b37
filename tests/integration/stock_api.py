"""vLLM's own OpenAI server, as it comes, for tests to compare ours with: its routes, its engine, no plugin of ours.

It gets the arguments and the environment that the verifier gives its own engine (float32 on CPU, eager). Run as
`python -m tests.integration.stock_api MODEL PORT NAME MAX_MODEL_LEN`; it serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from collections.abc import Sequence
from unittest import mock

from services.verifier.engine.launch import engine_environment


def arguments(model: str, port: str, name: str, max_model_len: str) -> list[str]:
    """vLLM's command line. A request that sets no temperature gets 0, as ours gives it."""
    return [
        f"--model={model}",
        f"--served-model-name={name}",
        f"--port={port}",
        "--host=127.0.0.1",
        "--dtype=float32",
        f"--max-model-len={max_model_len}",
        "--max-num-seqs=16",
        f"--kv-cache-memory-bytes={256 << 20}",
        "--enforce-eager",
        "--no-async-scheduling",
        "--distributed-executor-backend=uni",
        "--generation-config=vllm",
        '--override-generation-config={"temperature": 0.0}',
        "--disable-log-stats",
        "--uvicorn-log-level=warning",
    ]


def main(command_line: Sequence[str]) -> int:
    """Serve until SIGTERM."""
    with engine_environment(threads=1):
        os.environ["VLLM_PLUGINS"] = ""
        from vllm.entrypoints.launchers.api_server.entry import run_server
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine import utils

        multiprocessing.set_forkserver_preload(["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"])
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments(*command_line))
        with mock.patch.object(utils, "get_mp_context", lambda: multiprocessing.get_context("forkserver")):
            asyncio.run(run_server(parsed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
