"""What the three services have in common: protocol, bus, store, speculation core, settings, telemetry."""
