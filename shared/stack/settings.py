"""Where a local stack keeps what it makes, and where it finds Kafka. The services themselves read none of this."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.models import cache_directory

PROJECT_ROOT = Path(__file__).resolve().parents[2]


class StackSettings(BaseSettings):
    """What `outrider up`, `down`, `status` and `demo` read from the environment."""

    model_config = SettingsConfigDict(
        env_prefix="OUTRIDER_", extra="ignore", frozen=True, env_ignore_empty=True
    )

    run_dir: Path = Field(
        default_factory=lambda: Path.cwd() / ".outrider" / "run",
        description="Folder of the local stack: stack.json, logs, data of the embedded Kafka and Redis. "
        "By default .outrider/run in the working directory.",
    )
    cache: Path = Field(
        default_factory=cache_directory,
        description="Folder of what is fetched once: models, Kafka's libraries. By default ~/.cache/outrider.",
    )
    kafka_libs: Path | None = Field(
        None, description="Folder of the jars of Apache Kafka 4.3.1, for the embedded broker."
    )
