"""Settings of the draft-gateway."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr

from shared.protocol import Policy
from shared.settings import ModelSettings, Port, Positive, Seconds


class UplinkKind(StrEnum):
    """What joins a gateway to the rest: Kafka in the cloud, a link at the edge."""

    KAFKA = "kafka"
    LINK = "link"


def _link_urls(value: str) -> str:
    """ws[s]://HOST[:PORT][/PATH][,…]"""
    for url in filter(None, map(str.strip, value.split(","))):
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(
                f"{url!r} is no link; write ws://HOST:PORT/v1/link or wss://…, several with commas"
            )
    return value


LinkUrls = Annotated[str, AfterValidator(_link_urls)]


class GatewaySettings(ModelSettings):
    """What a draft-gateway reads from the environment."""

    gateway_name: str = Field("gateway-0", description="This gateway's name in logs, leases and metrics.")
    gateway_host: str = Field("127.0.0.1", description="Address the gateway listens on.")
    gateway_port: Port = Field(8100, description="Port of REST, SSE, health and metrics.")
    gateway_max_streams: Positive = Field(
        256, description="Generations at a time; more are refused with 429."
    )
    uplink: UplinkKind = Field(
        UplinkKind.KAFKA,
        description="What joins this gateway to the rest: 'kafka' in the cloud, 'link' at the edge (it then needs no "
        "Kafka and no Redis).",
    )
    link: LinkUrls = Field(
        "",
        description="At the edge: gateways in the cloud to link to, tried in turn, ws://HOST:PORT/v1/link or wss://…, "
        "separated by commas.",
    )
    link_key: SecretStr = Field(SecretStr(""), description="At the edge: the key that it shows.")
    link_keys: SecretStr = Field(
        SecretStr(""),
        description="In the cloud: who may link, NAME=KEY separated by commas or lines; without any only processes on "
        "the same machine. A NAME sees the sessions that its own links opened.",
    )
    link_timeout_s: Seconds = Field(
        5.0,
        description="A link without an answer for so long, or that delivers nothing for so long, is given up.",
    )
    link_slow_ms: Annotated[float, Field(gt=0)] = Field(
        100.0,
        description="Hints are dropped while queues on the link delay what is sent by more than this, ms.",
    )
    link_queue: Positive = Field(64, description="Frames of one session that may wait for the link.")
    link_grace_s: Seconds = Field(
        30.0,
        description="In the cloud: a session whose link was lost and that nobody takes up frees its KV after so long.",
    )
    max_links: Positive = Field(256, description="In the cloud: links at a time; more are refused with 429.")
    draft: str = Field(
        "hybrid",
        description="Draft engine: 'hybrid' (the draft model that comes with Outrider for this target, and prompt "
        "lookup), 'lookup' (n-gram over prompt and output alone), 'none', or the directory of a small Llama-family "
        "model with the target's tokenizer to take in the place of the one that comes. For measurements there is "
        "'replay:FILE?...', which reads the target's own answers.",
    )
    draft_threads: Positive = Field(1, description="CPU threads of the draft model.")
    draft_cache_tokens: Positive = Field(
        65536, description="Tokens whose keys and values the draft model keeps, over all sessions."
    )
    block_length: Annotated[int, Field(ge=0)] = Field(
        5, description="Draft tokens a block (the paper's gamma)."
    )
    adaptive: bool = Field(
        True, description="Choose each block's length by measurement, block_length at most."
    )
    policy: Policy = Field(
        Policy.LATENCY,
        description="What a verifier does with a session that has nothing to verify: 'latency' goes on by itself, "
        "'cost' waits for a block.",
    )
    hints: bool = Field(
        True,
        description="Start lanes from hints of early exits; with `adaptive` and `guesses`, while that proves to be of use.",
    )
    guesses: bool = Field(True, description="Start lanes as a block goes up, from the draft's own guesses.")
    forwards: bool = Field(True, description="Send finished lanes up before the verdict.")
    forwards_per_token: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Forwards sent at most for each committed token: each costs some 10 bytes."
    )
    lane_threshold: Annotated[float, Field(ge=0, le=1)] = Field(
        0.02, description="Least probability of an outcome for a lane to start from it."
    )
    max_lanes: Annotated[int, Field(ge=0)] = Field(
        5, description="Lanes that a session drafts at a time; fewer where they would be late."
    )
    default_max_tokens: Positive = Field(256, description="Length of an answer whose request sets no limit.")
    default_temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="Temperature of a request that sets none; 0 takes the likeliest token each time."
    )
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

    @property
    def link_urls(self) -> tuple[str, ...]:
        """The links to try, in order."""
        return tuple(filter(None, map(str.strip, self.link.split(","))))
