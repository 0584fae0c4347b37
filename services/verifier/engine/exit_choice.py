"""Which exits a target runs with: the settings' word, else the trained ones that come with Outrider, else untrained.

Looks at headers only; whether a file's modules can be used turns out when they are loaded (`exit_files.load_exits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.verifier.engine.checkpoint import AUTO, Checkpoint, exit_layers
from services.verifier.settings import VerifierSettings
from shared.errors import EngineError, ModelFilesError
from shared.models import read_metadata
from shared.pair import shipped_exits

NONE: Final = "none"


@dataclass(frozen=True, slots=True)
class ExitChoice:
    """Layers with an exit, and the file with trained modules for them, if there is one; `notes` say why there is not."""

    layers: tuple[int, ...]
    file: Path | None = None
    notes: tuple[str, ...] = ()


def choose_exits(settings: VerifierSettings, checkpoint: Checkpoint) -> ExitChoice:
    """The exits for a target. `EngineError` when the settings name layers that it does not have."""
    asked = exit_layers(settings.exit_layers, checkpoint.num_layers)
    if not asked or settings.exit_modules == NONE:
        return ExitChoice(asked)
    if settings.exit_modules == AUTO:
        try:
            file = shipped_exits(checkpoint.directory)
        except ModelFilesError as error:
            return ExitChoice(asked, notes=(f"{error.message}; untrained exits serve instead",))
    else:
        file = Path(settings.exit_modules)
    if settings.exit_layers.strip() != AUTO:
        return ExitChoice(asked, file)
    return ExitChoice(_trained_layers(file, checkpoint.num_layers) or asked, file)


def _trained_layers(file: Path, num_layers: int) -> tuple[int, ...]:
    """The layers that a file's header names; none when it can't be read, which loading it will say."""
    try:
        return exit_layers(read_metadata(file).get("layers", ""), num_layers)
    except (ModelFilesError, EngineError):
        return ()
