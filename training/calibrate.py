"""Fits what exits and edge promise to what happens, on rounds over text that was not trained on.

The texts are the target's answers in the streams that training holds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training import outcomes
from training.conversations import END_OF_TURN, Role
from training.data import encoder, held_out_count
from training.draft import read_draft
from training.exits import read_exits
from training.llama import load_target
from training.progress import Say
from training.rollout import greedy
from training.simulate import play_rounds

LONGEST = 128


def answer_starts(tokens: Sequence[Tensor], roles: Sequence[Tensor], most: int) -> list[list[int]]:
    """Contexts right before an answer, from held-out streams: at most two a stream, `most` in all."""
    found: list[list[int]] = []
    for rows, role_rows in zip(tokens, roles, strict=True):
        count = held_out_count(len(rows))
        for ids, said_by in zip(rows[:count].tolist(), role_rows[:count].tolist(), strict=True):
            starts = [
                place
                for place in range(1, len(said_by) - 8)
                if said_by[place] >= Role.GREEDY > said_by[place - 1]
            ]
            found += [ids[:place] for place in starts[:2]]
    step = max(1, len(found) // most)
    return found[::step][:most]


def calibrate(
    directory: Path,
    exits_path: Path,
    draft_path: Path,
    tokenizer: Tokenizer,
    tokens: Sequence[Tensor],
    roles: Sequence[Tensor],
    texts: int,
    say: Say,
) -> dict[str, outcomes.Calibration]:
    """Plays rounds on held-out text with the files as written and fits the edge's and every exit's calibration."""
    device = tokens[0].device
    target = load_target(directory, device=device, dtype=torch.float32)
    draft = read_draft(draft_path).to(device)
    exits, vocabulary = read_exits(exits_path, eps=target.config.rms_norm_eps)
    exits = {layer: exit_.to(device) for layer, exit_ in exits.items()}
    end = encoder(tokenizer)(END_OF_TURN)[0]
    prompts = sorted(answer_starts(tokens, roles, texts), key=len)
    record: list[dict[str, Tensor]] = []
    for at in range(0, len(prompts), 16):
        said = greedy(target, prompts[at : at + 16], most=LONGEST, end=end)
        said = [text for text in said if len(text.tokens) > 1]
        if said:
            record.append(play_rounds(target, draft, exits, vocabulary, said))
        say(f"exits: calibration on {min(at + 16, len(prompts))} of {len(prompts)} texts")
    whole = {name: torch.cat([part[name] for part in record]) for name in record[0]}
    edge = outcomes.fit(whole, None)
    return {"edge": edge} | {str(layer): outcomes.fit(whole, layer, edge) for layer in exits}
