"""Settings of kv-session."""

from __future__ import annotations

from pydantic import Field

from shared.settings import CommonSettings, Port, Positive, Seconds


class KvSessionSettings(CommonSettings):
    """What a kv-session reads from the environment."""

    kv_session_name: str = Field("kv-session-0", description="This process's name in logs and metrics.")
    kv_session_host: str = Field(
        "127.0.0.1", description="Address of the operator's API, health and metrics."
    )
    kv_session_port: Port = Field(8200, description="Port of the operator's API, health and metrics.")
    verifier_timeout_s: Seconds = Field(
        5.0, description="A verifier without a heartbeat for so long counts as gone."
    )
    sweep_s: Seconds = Field(1.0, description="Time between sweeps for dead verifiers and expired sessions.")
    placement_wait_s: Seconds = Field(
        3.0,
        description="How long opening a session waits for a verifier when none is ready, before it is refused.",
    )
    prefix_block: Positive = Field(
        32, description="Tokens of a prefix block, the unit of shared-prefix affinity."
    )
    affinity_slack: Positive = Field(
        4,
        description="Sessions that the verifier with the longest shared prefix may have above the least loaded.",
    )
    retry_after_s: Seconds = Field(2.0, description="What a refused client is told to wait.")
