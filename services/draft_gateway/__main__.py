"""`python -m services.draft_gateway`: run a gateway until SIGTERM or Ctrl-C. Settings come from the environment."""

from __future__ import annotations

import sys

from services.draft_gateway.service import DraftGateway
from services.draft_gateway.settings import GatewaySettings
from shared import timeline
from shared.http import build_service, load_settings, run_loop, run_service
from shared.telemetry import configure_logging


def main() -> int:
    """Run the gateway; the exit status."""
    settings = load_settings(GatewaySettings)
    configure_logging(settings.log_level, settings.log_format, "draft-gateway")
    timeline.start(settings.timeline, settings.gateway_name or "gateway")
    gateway = build_service(lambda: DraftGateway(settings))
    return run_loop(
        run_service(gateway.serve, gateway.app, host=settings.gateway_host, port=settings.gateway_port)
    )


if __name__ == "__main__":
    sys.exit(main())
