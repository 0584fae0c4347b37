"""Fits what exits and edge promise to what happens, on rounds over text that was not trained on.

The texts are the target's answers in streams of `outrider train data`: those that training holds out, or all of a
directory that was sampled for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from services.verifier.engine.exit_head import Naming
from shared.models import target_sha256, tokenizer_sha256
from shared.pair import write_foresight
from shared.speculation.outcomes import Calibration, Foresight
from training import outcomes
from training.conversations import Role
from training.data import held_out_count
from training.draft import read_draft
from training.exits import fit_naming, load_exits, write_calibrations, write_naming
from training.llama import load_target
from training.progress import Say
from training.rollout import Continuation
from training.simulate import Record, play_rounds

LONGEST: Final = 128
SHORTEST: Final = 8
STATE_TEXTS: Final = 16
TEXTS_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was fitted: each exit's calibration, and what the edge should make of its own guess and of hints."""

    exits: dict[int, Calibration]
    foresight: Foresight


def held_out(streams: Sequence[Tensor]) -> list[Tensor]:
    """The streams of each group that are never trained on."""
    return [rows[: held_out_count(len(rows))] for rows in streams]


def answers(tokens: Sequence[Tensor], roles: Sequence[Tensor], most: int) -> list[Continuation]:
    """What the target said at temperature 0, and after what: at most two answers a stream, `most` in all, evenly spread."""
    found: list[Continuation] = []
    for rows, role_rows in zip(tokens, roles, strict=True):
        for ids, said_by in zip(rows.tolist(), role_rows.tolist(), strict=True):
            starts = [
                place for place in range(1, len(ids)) if said_by[place] == Role.GREEDY != said_by[place - 1]
            ]
            for start in starts[:2]:
                ends = (place for place in range(start, len(ids)) if said_by[place] != Role.GREEDY)
                end = min(next(ends, len(ids)), start + LONGEST)
                if end - start >= SHORTEST:
                    found.append(Continuation(tuple(ids[:start]), tuple(ids[start:end])))
    count = min(most, len(found))
    return [found[index * len(found) // count] for index in range(count)]


@dataclass(frozen=True, slots=True)
class Files:
    """Where target, draft and exits lie."""

    target: Path
    draft: Path
    exits: Path


def calibrate(files: Files, texts: Sequence[Continuation], device: torch.device, say: Say) -> Fitted:
    """Plays rounds over `texts`, greedy answers of the target, and fits; writes what it finds beside the weights.

    First, on some of the texts, how the head is read in fewer dimensions; then, with that, all confidences.
    """
    target = load_target(files.target, device=device, dtype=torch.float32)
    draft = read_draft(files.draft).to(device)
    exits, naming = load_exits(files.exits, files.target, target)
    texts = sorted(texts, key=lambda text: len(text.text))
    exits = {layer: exit_.to(device) for layer, exit_ in exits.items()}
    assert naming.vocabulary is not None
    states: list[Tensor] = []
    whole = Naming(naming.vocabulary)
    some = texts[:: max(1, len(texts) // STATE_TEXTS)]
    for at in range(0, len(some), TEXTS_AT_ONCE):
        play_rounds(target, draft, exits, whole, some[at : at + TEXTS_AT_ONCE], states=states)
    say(f"calibration: {sum(map(len, states)):,} states of exits seen")
    naming = fit_naming(target.head.data, naming.vocabulary.to(device), torch.cat(states))
    write_naming(files.exits, naming)
    exits, naming = load_exits(files.exits, files.target, target)
    exits = {layer: exit_.to(device) for layer, exit_ in exits.items()}
    parts = []
    for at in range(0, len(texts), TEXTS_AT_ONCE):
        parts.append(play_rounds(target, draft, exits, naming, texts[at : at + TEXTS_AT_ONCE]))
        say(f"calibration: {min(at + TEXTS_AT_ONCE, len(texts))} of {len(texts)} texts")
    record = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = fitted(record, list(exits))
    write_calibrations(files.exits, found.exits)
    made_for = {
        "target_sha256": target_sha256(files.target),
        "tokenizer_sha256": tokenizer_sha256(files.target),
    }
    write_foresight(files.draft, found.foresight, made_for)
    return found


def fitted(record: Record, layers: Sequence[int]) -> Fitted:
    """The fits to recorded rounds."""
    own = outcomes.fit(record)
    guesses = outcomes.edge_guesses(record, own)
    exits = {layer: outcomes.fit(record, layer) for layer in layers}
    hints: dict[int, outcomes.Rankings] = {}
    mixtures = {}
    for layer in sorted(layers):  # by then the earlier ones have spoken too
        hints[layer] = outcomes.exit_rankings(record, layer, exits[layer])
        mixtures[layer] = outcomes.fit_mixture(guesses, hints, record)
    return Fitted(exits, Foresight(own, mixtures))
