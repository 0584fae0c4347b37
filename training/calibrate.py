"""Fits what exits and edge promise to what happens, on rounds over text that was not trained on.

The texts are the target's answers in streams of `outrider train data`: those that training holds out, or all of a
directory that was sampled for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from shared.speculation.outcomes import Calibration, Foresight
from training import outcomes
from training.conversations import END_OF_TURN, Role
from training.data import encoder, held_out_count
from training.draft import read_draft
from training.exits import load_exits
from training.llama import load_target
from training.progress import Say
from training.rollout import greedy
from training.simulate import Record, play_rounds

LONGEST = 128


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


def calibrate(
    directory: Path,
    exits_path: Path,
    draft_path: Path,
    tokenizer: Tokenizer,
    contexts: Sequence[list[int]],
    device: torch.device,
    say: Say,
) -> Fitted:
    """Plays rounds over the target's answers after `contexts`, with the files as written, and fits."""
    record = recorded(directory, exits_path, draft_path, tokenizer, contexts, device, say)
    layers = [int(name.partition(".")[0]) for name in record if name.endswith(".judged")]
    return fitted(record, layers)


def recorded(
    directory: Path,
    exits_path: Path,
    draft_path: Path,
    tokenizer: Tokenizer,
    contexts: Sequence[list[int]],
    device: torch.device,
    say: Say,
) -> Record:
    """The rounds that `calibrate` fits to."""
    target = load_target(directory, device=device, dtype=torch.float32)
    draft = read_draft(draft_path).to(device)
    exits, vocabulary = load_exits(exits_path, directory, target)
    exits = {layer: exit_.to(device) for layer, exit_ in exits.items()}
    end = encoder(tokenizer)(END_OF_TURN)[0]
    prompts = sorted(contexts, key=len)
    parts: list[Record] = []
    for at in range(0, len(prompts), 16):
        said = greedy(target, prompts[at : at + 16], most=LONGEST, end=end)
        said = [text for text in said if len(text.tokens) > 1]
        if said:
            parts.append(play_rounds(target, draft, exits, vocabulary, said))
        say(f"calibration: {min(at + 16, len(prompts))} of {len(prompts)} texts")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
