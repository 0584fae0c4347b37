"""Runs one kv-session: `python -m services.kv_session`."""

from __future__ import annotations

import sys

from services.kv_session.service import KvSessionService
from services.kv_session.settings import KvSessionSettings
from shared.http import build_service, load_settings, run_loop, run_service
from shared.telemetry import configure_logging


def main() -> int:
    """Run until SIGTERM or SIGINT; exit code 1 when it can't start or loses what it can't do without."""
    settings = load_settings(KvSessionSettings)
    configure_logging(settings.log_level, settings.log_format, settings.kv_session_name)
    return run_loop(_serve(settings))


async def _serve(settings: KvSessionSettings) -> int:
    service = build_service(lambda: KvSessionService(settings))
    return await run_service(
        service.run, service.app, host=settings.kv_session_host, port=settings.kv_session_port
    )


if __name__ == "__main__":
    sys.exit(main())
