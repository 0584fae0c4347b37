"""Settings that every service has; each service adds its own in `services/*/settings.py`.

All come from the environment with the prefix `OUTRIDER_` (or from a file of secrets, see `secrets_dir` of
pydantic-settings: `OUTRIDER_SECRETS_DIR`). Names are unique over all services, so that one environment, ConfigMap or
`.env` can serve them all. `outrider settings` prints every one with its default and meaning.
"""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]


def _addresses(value: str) -> str:
    """host:port[,host:port], as Kafka's clients read it."""
    for address in value.split(","):
        host, _, port = address.strip().rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
            raise ValueError(f"{address!r} is no address; write host:port[,host:port]")
    return value


def _level(value: str) -> str:
    known = [name for name in logging.getLevelNamesMapping() if name != "NOTSET"]
    if value.upper() not in known:
        raise ValueError(f"no such level; one of {', '.join(known)} is right")
    return value


Addresses = Annotated[str, AfterValidator(_addresses)]
LogLevel = Annotated[str, AfterValidator(_level)]

SECRETS_DIR = os.environ.get("OUTRIDER_SECRETS_DIR")


class KafkaFlavor(StrEnum):
    """Which broker answers; decides what the bus may use (idempotence, long fetches)."""

    APACHE = "apache"
    TANSU = "tansu"


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class CommonSettings(BaseSettings):
    """Broker, store, topics and logging: the same for every service."""

    model_config = SettingsConfigDict(
        env_prefix="OUTRIDER_",
        extra="ignore",
        frozen=True,
        secrets_dir=SECRETS_DIR,
        protected_namespaces=(),
        env_ignore_empty=True,
    )

    kafka: Addresses = Field("127.0.0.1:9092", description="Kafka bootstrap servers, host:port[,host:port].")
    kafka_flavor: KafkaFlavor = Field(
        KafkaFlavor.APACHE,
        description="Broker flavour: 'apache', or 'tansu' (no idempotence, short fetches).",
    )
    topic_prefix: str = Field(
        "", description="Put before every topic name and consumer group; separates deployments."
    )
    drafts_partitions: Positive = Field(
        12, description="Partitions of the drafts topic, when it has to be created."
    )
    reply_partitions: Positive = Field(
        16, description="Partitions of the exits and verdicts topics: the most gateways at a time."
    )
    sessions_partitions: Positive = Field(4, description="Partitions of sessions, placements and heartbeats.")
    replication_factor: Positive = Field(
        1, description="Replication of topics, when they have to be created."
    )
    bus_queue: Positive = Field(4096, description="Messages that a reader holds before it stops fetching.")
    bus_deadline_s: Seconds = Field(20.0, description="How long a send waits for the broker before it fails.")
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"), description="Redis or Valkey (7.0 or newer), as a URL."
    )
    redis_prefix: str = Field("outrider:", description="Put before every Redis key; separates deployments.")
    store_deadline_s: Seconds = Field(
        20.0, description="How long an operation waits for Redis before it fails."
    )
    session_ttl_s: Seconds = Field(3600.0, description="A session untouched for so long expires from Redis.")
    log_level: LogLevel = Field("INFO", description="Least level that is logged.")
    log_format: LogFormat = Field(LogFormat.TEXT, description="Log lines as 'text' or 'json'.")
    timeline: str = Field(
        "", description="Folder for a file that tells where the time of each round goes; none by default."
    )


class ModelSettings(CommonSettings):
    """The target as well: gateways need its tokenizer, verifiers all of it."""

    model: str = Field("", description="Directory of the target model (Hugging Face layout, Llama family).")
    model_name: str = Field("", description="Name under which it is served; by default its directory's name.")
    max_block: Positive = Field(8, description="The longest block that is verified; longer ones are refused.")
    max_model_len: Positive = Field(2048, description="Longest prompt plus answer, tokens.")

    @property
    def served_name(self) -> str:
        """The model's name towards clients and in heartbeats."""
        return self.model_name or Path(self.model).name or "target"
