"""The modes that are compared: where each is served, and how it is asked to speculate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from shared.errors import InvalidRequest


class Place(StrEnum):
    """Who answers."""

    STOCK = "stock"
    """vLLM as it comes."""
    NGRAM = "ngram"
    """vLLM with its own n-gram speculation."""
    DRAFT = "draft"
    """vLLM with the draft that ships as a draft model on the server."""
    EDGE = "edge"
    """The gateway at the edge, with the draft that is measured."""
    WRONG = "wrong"
    """A gateway at the edge whose draft is always wrong and sure of itself."""
    HEADLESS = "headless"
    """The gateway at the edge, before a verifier of its own whose target has no draft head; replayed only."""


STOCK: Final = (Place.STOCK, Place.NGRAM, Place.DRAFT)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to get an answer; `options` are the request's `outrider`, without the block length."""

    name: str
    meaning: str
    place: Place
    options: Mapping[str, Any] = field(default_factory=dict)

    def request(self, gamma: int) -> dict[str, Any]:
        """The request's `outrider`."""
        return {**self.options, "block_length": gamma} if self.speculates else {}

    @property
    def speculates(self) -> bool:
        """Outrider answers."""
        return self.place not in STOCK

    @property
    def policy(self) -> str:
        """The verifier's policy, "" where there is none."""
        return str(self.options.get("policy", ""))

    @property
    def adaptive(self) -> bool:
        """The block's length is chosen by measurement."""
        return bool(self.options.get("adaptive", False))


_PLAIN: Final = {"adaptive": False, "hints": False, "guesses": False, "forwards": False, "policy": "cost"}
_FULL: Final = {"adaptive": True, "guesses": True, "forwards": True, "policy": "latency"}
"""As a client gets it that asks for nothing: whether exits are computed is then for the gateway to find out."""

MODES: Final[Mapping[str, Mode]] = {
    mode.name: mode
    for mode in (
        Mode("ar", "cloud AR: stock vLLM streams over the same link", Place.STOCK),
        Mode("vllm_ngram", "stock vLLM with its own n-gram speculation", Place.NGRAM),
        Mode("vllm_draft", "stock vLLM with the draft model that ships on the server", Place.DRAFT),
        Mode("sync", "speculative decoding over the link, each block after the verdict", Place.EDGE, _PLAIN),
        Mode("paper", "sync, and lanes from exits: the paper", Place.EDGE, {**_PLAIN, "hints": True}),
        Mode("full", "all of Outrider", Place.EDGE, _FULL),
        Mode(
            "full_headless",
            "full without the target's draft head, in the paper's setting",
            Place.HEADLESS,
            _FULL,
        ),
        Mode("full-guesses", "full without lanes at send time", Place.EDGE, {**_FULL, "guesses": False}),
        Mode("full_exits", "full with exits in every pass", Place.EDGE, {**_FULL, "hints": True}),
        Mode("full-hints", "full without exits", Place.EDGE, {**_FULL, "hints": False}),
        Mode("full-forwards", "full without forwards", Place.EDGE, {**_FULL, "forwards": False}),
        Mode("full-adaptive", "full with blocks of a fixed length", Place.EDGE, {**_FULL, "adaptive": False}),
        Mode(
            "full-floor",
            "full without the floor: policy cost, as full_cost is",
            Place.EDGE,
            {**_FULL, "policy": "cost"},
        ),
        Mode("full_cost", "full under policy cost", Place.EDGE, {**_FULL, "policy": "cost"}),
        Mode(
            "full_cost-hints",
            "full under policy cost without exits",
            Place.EDGE,
            {**_FULL, "policy": "cost", "hints": False},
        ),
        Mode("wrong", "full with a draft that is always wrong", Place.WRONG, _FULL),
    )
}

DEFAULT: Final = ("ar", "vllm_ngram", "vllm_draft", "sync", "paper", "full", "full_cost")
PAPER_SETTING: Final = ("sync", "paper", "full_headless", "full", "full_cost")
REPLAYED: Final = (Place.EDGE, Place.HEADLESS)
"""Places that the paper's setting has."""


def chosen(text: str) -> tuple[Mode, ...]:
    """The modes of a list with commas; InvalidRequest names one that there isn't."""
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    for name in names:
        if name not in MODES:
            raise InvalidRequest(f"--modes: there is no mode {name!r}; there are {', '.join(MODES)}")
    if not names:
        raise InvalidRequest("--modes names no mode")
    return tuple(MODES[name] for name in dict.fromkeys(names))
