"""The drafter that vLLM insists on and that never drafts: blocks come from clients, through the scheduler."""

from __future__ import annotations

from typing import Any


class ClientDrafts:
    """Satisfies vLLM's `custom_class` drafter; proposes nothing for any request."""

    def __init__(self, vllm_config: Any) -> None:
        """vLLM hands in its configuration; there is nothing to take from it."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no draft model to load."""

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """No draft for each of the batch's requests."""
        return [[] for _ in sampled_token_ids]
