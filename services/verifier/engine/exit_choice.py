"""Which exits and which draft head a target runs with: the settings' word, else the trained ones that come with Outrider,
else untrained exits and no head.

Looks at headers only; whether a file can be used turns out when it is loaded (`exit_files.load_exits`,
`draft_head_files.load_head`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.verifier.engine.checkpoint import AUTO, Checkpoint, exit_layers
from services.verifier.settings import VerifierSettings
from shared.errors import EngineError, ModelFilesError
from shared.models import read_metadata
from shared.pair import shipped_exits, shipped_head

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


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """The file of the head that a target should run with, if there is one; `notes` say why there is not."""

    file: Path | None = None
    notes: tuple[str, ...] = ()


def choose_head(settings: VerifierSettings, checkpoint: Checkpoint, *, cuda: bool) -> HeadChoice:
    """The draft head for a target: the settings' word, else the one that comes with Outrider. Where the floor doesn't draft
    there is none. On CUDA they don't run yet, which is said where one was asked for by name."""
    if settings.draft_head == NONE or not settings.floor_drafts:
        return HeadChoice()
    if cuda:
        named = settings.draft_head != AUTO
        notes = ("OUTRIDER_DRAFT_HEAD: draft heads run on a CPU; the floor drafts from the text alone",)
        return HeadChoice(None, notes if named else ())
    if settings.draft_head != AUTO:
        return HeadChoice(Path(settings.draft_head))
    try:
        return HeadChoice(shipped_head(checkpoint.directory))
    except ModelFilesError:
        return HeadChoice()  # nothing was asked for, and nothing is missing
