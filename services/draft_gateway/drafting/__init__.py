"""Draft engines: who guesses what the target will say next, and the asyncio face that the rest of the gateway uses."""

from services.draft_gateway.drafting.drafter import Drafter
from services.draft_gateway.drafting.engine import EMPTY, Draft, DraftEngine, DraftRequest
from services.draft_gateway.drafting.loading import LoadedDraft, load_draft_engine

__all__ = ["EMPTY", "Draft", "DraftEngine", "DraftRequest", "Drafter", "LoadedDraft", "load_draft_engine"]
