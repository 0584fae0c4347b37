"""Choosing the draft engine that the settings name, or prompt lookup where that can't be had: drafts are only advice."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from services.draft_gateway.drafting.engine import DraftEngine
from services.draft_gateway.drafting.lookup import PromptLookup
from services.draft_gateway.settings import GatewaySettings
from shared.errors import ModelFilesError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """The engine that drafts, and, where it is not the one asked for, why."""

    engine: DraftEngine
    notes: tuple[str, ...] = ()


def load_draft_engine(settings: GatewaySettings) -> LoadedDraft:
    """The engine for `settings.draft`. Files that are missing, corrupt or made for another target never stop a gateway:
    prompt lookup takes over, and the note says why.
    """
    if settings.draft in ("lookup", "none"):
        return LoadedDraft(PromptLookup())
    from services.draft_gateway.drafting.llama import LlamaDraft

    try:
        engine = LlamaDraft.load(
            Path(settings.draft),
            target=Path(settings.model),
            threads=settings.draft_threads,
            cache_tokens=settings.draft_cache_tokens,
        )
    except ModelFilesError as error:
        note = f"the draft model is not used, prompt lookup drafts instead: {error.message}"
        logger.warning("%s", note)
        return LoadedDraft(PromptLookup(), (note,))
    logger.info("drafting with %s", engine.name)
    return LoadedDraft(engine)
