"""The engines that are measured: vLLM as it comes and ours, side by side in this process, with one set of weights.

vLLM as it comes keeps its scheduler, its worker and, on CUDA, all of its defaults (its own choice of a runner, compiled,
full CUDA graphs). `async_scheduling` is off in all modes, since ours can't have it, but for one: `stock_ar_async` is what
a user of vLLM gets who chooses nothing. On a CPU all run eagerly, as the verifier's engine does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from loadtest.engine_shapes import AUTO, Target
from services.verifier.engine import launch
from services.verifier.engine.compat import Symbol, check_compatible, check_symbols
from services.verifier.engine.exit_choice import choose_exits
from services.verifier.engine.options import EngineOptions
from services.verifier.settings import VerifierSettings
from shared.errors import InvalidRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.core_client import InprocClient

    from loadtest.engine_worker import WatchedWorker, Weights

NGRAM_MATCH: Final = (2, 5)
"""Shortest and longest suffix that vLLM's prompt lookup looks for, as in `scripts/bench compare`."""
KV_BLOCK: Final = {"cpu": 128, "cuda": 16}
"""Tokens of a block of the KV cache, by device: vLLM's defaults."""
ELEMENT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
BATCHED_TOKENS: Final = 2048
GRAPH_BYTES: Final = 1 << 30
"""Of an engine's CUDA graphs, activations and exits, about."""
LEAST_MEMORY_SHARE: Final = 0.01
"""Of the device's memory: vLLM refuses to start where less than this is free, and there are other engines here."""

SYMBOLS: Final = (
    Symbol("vllm.v1.engine.core_client", "InprocClient.get_output", ("self",), ("step_fn", "post_step")),
    Symbol("vllm.v1.engine.core_client", "InprocClient.abort_requests", ("self", "request_ids")),
    Symbol("vllm.v1.engine.core", "EngineCore.step", ("self",), ("execute_model", "sample_tokens")),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.sample_tokens", ("self", "grammar_output")),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.execute_model", ("self", "scheduler_output")),
)
"""What of vLLM's the benchmark relies on beside the verifier."""


RUNNER_CHOICE: Final = "VLLM_USE_V2_MODEL_RUNNER"


class Kind(StrEnum):
    """Whose engine, and what its sessions do in a step."""

    STOCK = "stock"
    VERIFY = "verify"
    FLOOR = "floor"


@dataclass(frozen=True, slots=True)
class Mode:
    """One engine. `asynchronous`: vLLM's own default scheduling."""

    name: str
    meaning: str
    kind: Kind
    ngram: bool = False
    exits: bool = False
    asynchronous: bool = False

    @property
    def own(self) -> bool:
        """The verifier's engine."""
        return self.kind is not Kind.STOCK

    def shares(self, other: Mode) -> bool:
        """Whether one engine serves both."""
        return self.own and other.own and self.exits == other.exits


STOCK_AR: Final = "stock_ar"
MODES: Final[Mapping[str, Mode]] = {
    mode.name: mode
    for mode in (
        Mode(STOCK_AR, "vLLM as it comes, one token a step", Kind.STOCK),
        Mode("stock_ar_async", "the same with vLLM's default scheduling", Kind.STOCK, asynchronous=True),
        Mode("stock_ngram", "vLLM with its own n-gram speculation", Kind.STOCK, ngram=True),
        Mode("verify", "our engine without exits, K tokens a block", Kind.VERIFY),
        Mode("verify_exits", "our engine with exits, K tokens a block", Kind.VERIFY, exits=True),
        Mode("floor", "our engine with exits, empty blocks: one token a step", Kind.FLOOR, exits=True),
    )
}


def chosen_modes(text: str) -> tuple[Mode, ...]:
    """The modes of a list with commas, `stock_ar` always among them: it says what the target's tokens are.

    InvalidRequest names one that there isn't.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MODES:
            raise InvalidRequest(f"--modes: there is no mode {name!r}; there are {', '.join(MODES)}")
    return tuple(mode for name, mode in MODES.items() if name in names or name == STOCK_AR)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What engines are built for: the counts of sessions that are measured, rising; tokens that a session may have, prompt
    and all; and K."""

    counts: tuple[int, ...]
    tokens: int
    k: int

    @property
    def sessions(self) -> int:
        """The most sessions at a time."""
        return self.counts[-1]


@dataclass(frozen=True, slots=True)
class Plan:
    """What all engines of a run have in common. `exits` is a file of exits, or what the verifier's settings may say."""

    target: Target
    device: str
    dtype: str
    threads: int
    sizes: Sizes
    layers: str
    exits: str
    address: str
    stock_runner: str = AUTO

    def kv_bytes(self, mode: Mode) -> int:
        """Of one engine's KV cache: all sessions at their longest, and a block for each that is under way."""
        block = KV_BLOCK[self.device]
        blocks = self.open_at_most(mode) * (-(-self.sizes.tokens // block) + 1) + 2
        return blocks * block * self.target.kv_elements * ELEMENT_BYTES[self.dtype]

    def open_at_most(self, mode: Mode) -> int:
        """Sessions in a mode's engine: those of another mode as well, where two share one."""
        return self.sizes.sessions * (2 if mode.own and mode.exits else 1)

    @property
    def weight_bytes(self) -> int:
        """Of the target's parameters."""
        return self.target.parameters * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine in this process."""

    mode: Mode
    client: InprocClient
    worker: WatchedWorker


def device_of(asked: str) -> str:
    """`cpu` or `cuda`: what the installed vLLM is for.

    `InvalidRequest` when that is not what was asked for, `EngineError` when it is not the vLLM that we know.
    """
    found = "cuda" if launch.on_cuda() else "cpu"
    check_compatible(cuda=found == "cuda")
    check_symbols(SYMBOLS)
    if asked not in (AUTO, found):
        raise InvalidRequest(f"--device {asked}: the vLLM that is installed is built for {found}")
    return found


def check_memory(plan: Plan, modes: Sequence[Mode]) -> None:
    """`InvalidRequest` when the device has no room for the modes' engines: KV and graphs for each, weights once, and twice
    while one is built."""
    if plan.device != "cuda":
        return
    import torch

    free, _ = torch.cuda.mem_get_info()
    built = [mode for at, mode in enumerate(modes) if not any(mode.shares(other) for other in modes[:at])]
    each = [plan.kv_bytes(mode) + GRAPH_BYTES for mode in built]
    needed = plan.weight_bytes + max(sum(each), plan.weight_bytes + sum(each[:-1]))
    if needed > free:
        raise InvalidRequest(
            f"{len(built)} engines need {needed / 2**30:.0f} GiB, {plan.weight_bytes / 2**30:.0f} of them for weights (and "
            f"again while one is built), {sum(each) / 2**30:.0f} for KV caches and graphs; {free / 2**30:.0f} are free: ask "
            "for fewer --sessions or --modes"
        )


def build(plan: Plan, mode: Mode, weights: Weights) -> Engine | None:
    """An engine, loaded; None where vLLM's default scheduling is no other than that of the other modes."""
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.executor import Executor

    from loadtest.engine_worker import sharing

    launch.register_models()
    with _environment(plan, mode), sharing(weights):
        config: VllmConfig = EngineArgs(**_arguments(plan, mode)).create_engine_config()
        if mode.asynchronous and not config.scheduler_config.async_scheduling:
            return None
        set_cudagraph_capturing_enabled(True)  # the engine before has ended its own capture
        client = InprocClient(config, Executor.get_class(config), log_stats=False)
    return Engine(mode, client, client.engine_core.model_executor.driver_worker.worker)


def _arguments(plan: Plan, mode: Mode) -> dict[str, Any]:
    module = f"loadtest.engine_{plan.device}"
    found = _verifiers_arguments(plan, mode) if mode.own else _stock_arguments(plan, mode)
    found |= {
        "worker_cls": f"{module}.{'OwnWorker' if mode.own else 'StockWorker'}",
        "kv_cache_memory_bytes": plan.kv_bytes(mode),
        "dtype": plan.dtype,
    }
    if plan.target.dummy:
        found["load_format"] = "dummy"
    if plan.device == "cuda":
        found["gpu_memory_utilization"] = LEAST_MEMORY_SHARE
        # graphs of no other sizes would be replayed here, and capturing each takes its time
        rows = plan.sizes.k + 1 if mode.own or mode.ngram else 1
        found["compilation_config"] = {
            **found.get("compilation_config", {}),
            "cudagraph_capture_sizes": [rows * sessions for sessions in plan.sizes.counts],
        }
    return found


def _stock_arguments(plan: Plan, mode: Mode) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": str(plan.target.directory),
        "max_model_len": plan.sizes.tokens,
        "max_num_seqs": plan.sizes.sessions,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",
        "distributed_executor_backend": "uni",
    }
    if plan.device == "cpu":
        found["enforce_eager"] = True
    if not mode.asynchronous:
        found["async_scheduling"] = False
    if mode.ngram:
        shortest, longest = NGRAM_MATCH
        found["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": plan.sizes.k,
            "prompt_lookup_min": shortest,
            "prompt_lookup_max": longest,
        }
    return found


def _verifiers_arguments(plan: Plan, mode: Mode) -> dict[str, Any]:
    settings = VerifierSettings.model_validate(
        {
            "model": str(plan.target.directory),
            "dtype": plan.dtype,
            "max_model_len": plan.sizes.tokens,
            "max_block": plan.sizes.k,
            "max_sessions": plan.open_at_most(mode),
            "max_batched_tokens": BATCHED_TOKENS,
            "kv_cache_mb": -(-plan.kv_bytes(mode) >> 20) or 1,
            "engine_threads": plan.threads,
            "exit_layers": plan.layers if mode.exits else "none",
            "exit_modules": plan.exits,
        }
    )
    checkpoint = plan.target.checkpoint
    exits = choose_exits(settings, checkpoint)
    options = EngineOptions(
        exit_address=plan.address,
        exit_layers=exits.layers,
        exit_modules=str(exits.file or ""),
        exit_outcomes=settings.exit_outcomes,
        threads=plan.threads,
        compact=settings.reads_compact,
    )
    return launch.arguments(settings, checkpoint, options, cuda=plan.device == "cuda")


def layers_of(engine: Engine) -> tuple[int, ...]:
    """The layers after which an engine of ours has exits."""
    (described,) = engine.client.collective_rpc("describe_exits")
    return tuple(described["exit_layers"])


def notes_of(engine: Engine) -> tuple[str, ...]:
    """What an engine of ours says about its exits."""
    (described,) = engine.client.collective_rpc("describe_exits")
    return tuple(described["notes"])


@contextmanager
def _environment(plan: Plan, mode: Mode) -> Iterator[None]:
    """The verifier's environment names the runner that it needs; vLLM as it comes chooses by itself.

    vLLM keeps what it has read of the environment for the engine before, so it is told to read it again.
    """
    from vllm import envs

    chooses = not mode.own and plan.stock_runner == AUTO
    named = os.environ.pop(RUNNER_CHOICE, None) if chooses else None
    envs.disable_envs_cache()
    try:
        yield
    finally:
        if named is not None:
            os.environ[RUNNER_CHOICE] = named
        envs.disable_envs_cache()
        envs.enable_envs_cache()
