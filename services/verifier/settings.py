"""Settings of the verifier."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.settings import ModelSettings, Port, Positive, Seconds


class VerifierSettings(ModelSettings):
    """What a verifier reads from the environment."""

    verifier_name: str = Field(
        "verifier-0", description="This verifier's name: also its static membership in the consumer group."
    )
    verifier_host: str = Field("127.0.0.1", description="Address of health and metrics.")
    verifier_port: Port = Field(8300, description="Port of health and metrics.")
    dtype: str = Field(
        "auto", description="Weights' type; 'auto' is float32 on CPU, the checkpoint's own on CUDA."
    )
    exit_layers: str = Field(
        "auto",
        description="Layers with an early exit, such as '18,21,24'; 'auto' is those of the trained exits, or 0.6, "
        "0.8 and 0.9 of the depth without any; 'none' switches exits off.",
    )
    exit_modules: str = Field(
        "auto",
        description="Trained exits: a file (safetensors), 'auto' (those that come with Outrider for this target), or "
        "'none': final norm and LM head serve.",
    )
    draft_head: str = Field(
        "auto",
        description="What drafts for sessions that go on by themselves: a file (safetensors), 'auto' (the draft head that "
        "comes with Outrider for this target), or 'none'. On CUDA there is none yet.",
    )
    exit_outcomes: Positive = Field(8, description="Outcomes a hint names at most.")
    max_sessions: Positive = Field(16, description="Sessions with live KV at a time; more are refused.")
    kv_cache_mb: Positive = Field(512, description="Memory of the KV cache on CPU, MiB.")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of a GPU's memory for weights, graphs and KV cache, on CUDA."
    )
    max_batched_tokens: Positive = Field(
        1024, description="Tokens of one engine step; longer prefills are chunked."
    )
    engine_threads: Positive = Field(1, description="CPU threads of the engine.")
    compact_weights: bool = Field(
        True,
        description="On a CPU and with one thread, read weights in the few bits that they are made of (bfloat16, or blocks "
        "of 4 or 8 bits), where all of them come back from these exactly.",
    )
    idle_ttl_s: Seconds = Field(
        60.0, description="A session without a block for so long loses its KV, not its tokens."
    )
    room_after_s: Seconds = Field(
        5.0,
        description="When all places are taken, a session idle for so long gives its place up to a new one.",
    )
    heartbeat_s: Seconds = Field(1.0, description="Time between heartbeats.")
    member_timeout_s: Annotated[float, Field(ge=1)] = Field(
        6.0, description="A verifier silent for so long loses its partitions to the others."
    )
    floor_drafts: bool = Field(
        True,
        description="Let a session that goes on by itself draft where that is worth its rows: with the target's draft head, "
        "by prompt lookup, and from what a draft that was refused goes on with.",
    )
    floor_ahead: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Tokens that a session that goes on by itself may say before those before them are committed; "
        "they are committed and sent together. Unset: 32 on CUDA; on a CPU 16 with a draft head, as long as nobody else "
        "drafts, and 0 without one.",
    )
    early_passes: bool | None = Field(
        None,
        description="Launch a pass of sessions that go on by themselves before the one before it has ended, as long as "
        "hardly anybody drafts: a GPU does not wait for the host in between. A block that comes meanwhile waits a pass "
        "longer. Unset: on CUDA.",
    )
    prompt_places: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="On CUDA, room in a pass of blocks for prompts that come meanwhile, in blocks' worth of rows: as long "
        "as they fit, they are computed in the same whole graph. Unset: 32. 0: passes with prompts run outside the whole "
        "graphs.",
    )
    session_queue: Positive = Field(
        32, description="Messages that wait for one session; more are answered as faults."
    )

    @property
    def reads_compact(self) -> bool:
        """Whether weights are to be read compact: the kernels for it run on one thread."""
        return self.compact_weights and self.engine_threads == 1
