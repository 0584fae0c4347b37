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
from tokenizers import Tokenizer
from torch import Tensor

from services.verifier.engine.exit_head import Naming
from shared.models import target_sha256, tokenizer_sha256
from shared.pair import write_foresight
from shared.speculation.outcomes import Calibration, Foresight
from training import outcomes
from training.conversations import END_OF_TURN, Role
from training.data import encoder, held_out_count
from training.draft import read_draft
from training.exits import fit_naming, load_exits, write_calibrations, write_naming
from training.llama import load_target
from training.progress import Say
from training.rollout import Continuation, greedy
from training.simulate import Record, play_rounds

LONGEST: Final = 128
STATE_TEXTS: Final = 32


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was fitted: each exit's calibration, and what the edge should make of its own guess and of hints."""

    exits: dict[int, Calibration]
    foresight: Foresight


def held_out(streams: Sequence[Tensor]) -> list[Tensor]:
    """The streams of each group that are never trained on."""
    return [rows[: held_out_count(len(rows))] for rows in streams]


def answer_starts(tokens: Sequence[Tensor], roles: Sequence[Tensor], most: int) -> list[list[int]]:
    """Contexts right before an answer: at most two a stream, `most` in all, evenly spread."""
    found: list[list[int]] = []
    for rows, role_rows in zip(tokens, roles, strict=True):
        for ids, said_by in zip(rows.tolist(), role_rows.tolist(), strict=True):
            starts = [
                place
                for place in range(1, len(said_by) - 8)
                if said_by[place] >= Role.GREEDY > said_by[place - 1]
            ]
            found += [ids[:place] for place in starts[:2]]
    count = min(most, len(found))
    return [found[index * len(found) // count] for index in range(count)]


@dataclass(frozen=True, slots=True)
class Files:
    """Where target, draft and exits lie."""

    target: Path
    draft: Path
    exits: Path


def calibrate(
    files: Files, tokenizer: Tokenizer, contexts: Sequence[list[int]], device: torch.device, say: Say
) -> Fitted:
    """Plays rounds over the target's answers after `contexts` and fits; writes what it finds beside the weights.

    First, on some of the texts, how the head is read in fewer dimensions; then, with that, all confidences.
    """
    target = load_target(files.target, device=device, dtype=torch.float32)
    draft = read_draft(files.draft).to(device)
    exits, naming = load_exits(files.exits, files.target, target)
    end = encoder(tokenizer)(END_OF_TURN)[0]
    prompts = sorted(contexts, key=len)
    texts: list[Continuation] = []
    for at in range(0, len(prompts), 16):
        said = greedy(target, prompts[at : at + 16], most=LONGEST, end=end)
        texts += [text for text in said if len(text.tokens) > 1]
        say(f"calibration: {min(at + 16, len(prompts))} of {len(prompts)} texts")
    exits = {layer: exit_.to(device) for layer, exit_ in exits.items()}
    assert naming.vocabulary is not None
    states: list[Tensor] = []
    whole = Naming(naming.vocabulary)
    play_rounds(target, draft, exits, whole, texts[:: max(1, len(texts) // STATE_TEXTS)], states=states)
    naming = fit_naming(target.head.data, naming.vocabulary.to(device), torch.cat(states))
    write_naming(files.exits, naming)
    exits, naming = load_exits(files.exits, files.target, target)
    exits = {layer: exit_.to(device) for layer, exit_ in exits.items()}
    say("calibration: rounds")
    parts = [
        play_rounds(target, draft, exits, naming, texts[at : at + 16]) for at in range(0, len(texts), 16)
    ]
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
    guesses = outcomes.edge_rankings(record, own)
    exits = {layer: outcomes.fit(record, layer) for layer in layers}
    mixtures = {
        layer: outcomes.fit_mixture(guesses, outcomes.exit_rankings(record, layer, exits[layer]), record)
        for layer in layers
    }
    return Fitted(exits, Foresight(own, mixtures))
