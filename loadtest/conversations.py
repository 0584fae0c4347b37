"""What the users of the load test say: built-in conversations, or those of a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

Conversation = tuple[str, ...]

BUILT_IN: Final[Sequence[Conversation]] = (
    ("Why is the sky blue?", "Say it again in one sentence."),
    ("List three uses of a paper clip.",),
    ("Write a short poem about the sea.", "Now about the desert."),
    ("What is the capital of France, and what is it known for?",),
    ("Explain to a child how a bicycle stays upright.",),
    ("A train leaves at nine and arrives at half past eleven. How long is the journey?",),
)


def load(path: Path | None, *, longest: int = 4000) -> Sequence[Conversation]:
    """The conversations of `path`, an object with `turns` a line; the built-in ones without a path.

    Turns are cut to `longest` characters. Raises ValueError that names the line which is wrong.
    """
    if path is None:
        return BUILT_IN
    conversations = [
        _conversation(line, f"{path}, line {number}", longest)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if line.strip()
    ]
    if not conversations:
        raise ValueError(f'{path} holds no conversation; it should have lines like {{"turns": ["Hello!"]}}')
    return conversations


def _conversation(line: str, where: str, longest: int) -> Conversation:
    try:
        turns = json.loads(line)["turns"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{where} should be an object like {{"turns": ["Hello!"]}}') from None
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns)):
        raise ValueError(f"{where}: `turns` should be a list of strings, none of them empty")
    return tuple(turn[:longest] for turn in turns)
