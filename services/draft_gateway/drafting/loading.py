"""Choosing the draft engine that the settings name, or prompt lookup where that can't be had: drafts are only advice."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.draft_gateway.drafting.engine import DraftEngine
from services.draft_gateway.drafting.lookup import PromptLookup
from services.draft_gateway.drafting.replay import PREFIX, ReplayDraft, parse_replay, read_answers
from services.draft_gateway.settings import GatewaySettings
from shared.errors import ModelFilesError
from shared.pair import read_foresight, shipped_draft
from shared.speculation.outcomes import Foresight

logger = logging.getLogger(__name__)

SHIPPED: Final = "hybrid"


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """The engine that drafts, what is known of its guesses, and, where it is not the one asked for, why."""

    engine: DraftEngine
    notes: tuple[str, ...] = ()
    foresight: Foresight = field(default_factory=Foresight)


def load_draft_engine(settings: GatewaySettings) -> LoadedDraft:
    """The engine for `settings.draft`: a model together with prompt lookup, or lookup alone.

    Files that are missing, corrupt or made for another target never stop a gateway: prompt lookup takes over, and the
    note says why. A replayed draft is for measurements, and one that can't be had is an `OutriderError`.
    """
    if settings.draft in ("lookup", "none"):
        return LoadedDraft(PromptLookup())
    if settings.draft.startswith(PREFIX):
        file, options = parse_replay(settings.draft)
        replay = ReplayDraft(read_answers(file), options)
        return LoadedDraft(replay, (f"{replay.name}: for measurements only",))
    try:
        loaded = _hybrid(settings)
    except ModelFilesError as error:
        note = f"no draft model is used, prompt lookup drafts instead: {error.message}"
        logger.warning("%s", note)
        return LoadedDraft(PromptLookup(), (note,))
    for note in loaded.notes:
        logger.warning("%s", note)
    logger.info("drafting with %s", loaded.engine.name)
    return loaded


def _hybrid(settings: GatewaySettings) -> LoadedDraft:
    from services.draft_gateway.drafting.hybrid import HybridDraft
    from services.draft_gateway.drafting.llama import LlamaDraft

    target = Path(settings.model)
    directory = shipped_draft(target) if settings.draft == SHIPPED else Path(settings.draft)
    model = LlamaDraft.load(
        directory,
        target=target,
        threads=settings.draft_threads,
        cache_tokens=settings.draft_cache_tokens,
    )
    engine = HybridDraft(PromptLookup(), model)
    try:
        return LoadedDraft(engine, foresight=read_foresight(directory))
    except ModelFilesError as error:
        return LoadedDraft(engine, (f"the draft's confidence is taken as it is: {error.message}",))
