"""Settings of the draft-gateway."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.settings import ModelSettings, Port, Positive, Seconds


class GatewaySettings(ModelSettings):
    """What a draft-gateway reads from the environment."""

    gateway_name: str = Field("gateway-0", description="This gateway's name in logs, leases and metrics.")
    gateway_host: str = Field("127.0.0.1", description="Address the gateway listens on.")
    gateway_port: Port = Field(8100, description="Port of REST, SSE, health and metrics.")
    gateway_max_streams: Positive = Field(
        256, description="Generations at a time; more are refused with 429."
    )
    draft: str = Field(
        "hybrid",
        description="Draft engine: 'hybrid' (the draft model that comes with Outrider for this target, and prompt "
        "lookup), 'lookup' (n-gram over prompt and output alone), 'none', or the directory of a small Llama-family "
        "model with the target's tokenizer to take in the place of the one that comes.",
    )
    draft_threads: Positive = Field(1, description="CPU threads of the draft model.")
    draft_cache_tokens: Positive = Field(
        65536, description="Tokens whose keys and values the draft model keeps, over all sessions."
    )
    block_length: Annotated[int, Field(ge=0)] = Field(
        5, description="Draft tokens a block (the paper's gamma)."
    )
    hints: bool = Field(True, description="Use hints of early exits to start lanes.")
    hint_threshold: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="Least confidence of a hint's outcome for a lane to start from it."
    )
    max_lanes: Annotated[int, Field(ge=0)] = Field(4, description="Lanes a session drafts at a time.")
    default_max_tokens: Positive = Field(256, description="Length of an answer whose request sets no limit.")
    open_timeout_s: Seconds = Field(15.0, description="How long opening a session may take before 503.")
    round_timeout_s: Seconds = Field(2.0, description="A round unanswered for so long is sent again.")
    stall_timeout_s: Seconds = Field(
        120.0, description="A generation without a token for so long ends with 503."
    )
    lease_s: Seconds = Field(
        5.0, description="Life of the lease on a reply partition; renewed at a third of it."
    )
    keepalive_s: Seconds = Field(15.0, description="An SSE comment is sent on a stream quiet for so long.")
    max_request_bytes: Positive = Field(2 << 20, description="Longest request body; longer ones get 413.")
