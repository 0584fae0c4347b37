"""Runs one verifier: `python -m services.verifier`."""

from __future__ import annotations

import sys

from services.verifier.engine.engine import VllmEngine
from services.verifier.service import VerifierService
from services.verifier.settings import VerifierSettings
from shared import timeline
from shared.http import build_service, load_settings, run_loop, run_service
from shared.telemetry import configure_logging


def main() -> int:
    """Run until SIGTERM or SIGINT; exit code 1 when it can't start or loses its engine."""
    settings = load_settings(VerifierSettings)
    configure_logging(settings.log_level, settings.log_format, settings.verifier_name)
    timeline.start(settings.timeline, settings.verifier_name)
    service = build_service(lambda: VerifierService(settings, VllmEngine(settings)))
    return run_loop(
        run_service(service.run, service.app, host=settings.verifier_host, port=settings.verifier_port)
    )


if __name__ == "__main__":
    sys.exit(main())
