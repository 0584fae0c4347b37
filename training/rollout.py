"""What a model says on given prompts: greedy continuations, and first choices along given text.

Used to measure; nothing here trains or samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.llama import KeyValueCache, Target


@dataclass(frozen=True, slots=True)
class Continuation:
    """A prompt and what the target says after it, end of turn included when it came."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def text(self) -> tuple[int, ...]:
        """Prompt and continuation."""
        return self.prompt + self.tokens


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    table = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=device)
    for index, row in enumerate(rows):
        table[index, : len(row)] = torch.tensor(row, device=device)
    return table


@torch.inference_mode()
def greedy(
    target: Target, prompts: Sequence[Sequence[int]], *, most: int, end: int, rows_at_once: int = 16
) -> list[Continuation]:
    """The target's greedy continuations of up to `most` tokens, all prompts in one batch."""
    device, dtype = target.embedding.device, target.embedding.dtype
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = KeyValueCache(target.config, len(prompts), int(lengths.max()) + most, device, dtype)
    firsts = []
    for at in range(0, len(prompts), rows_at_once):
        tokens = _padded(prompts[at : at + rows_at_once], device)
        part = cache.rows(at, at + len(tokens))
        hidden = target.decoder.aligned(target.embed(tokens), 0, part)
        last = hidden[torch.arange(len(tokens)), lengths[at : at + len(tokens)] - 1]
        firsts.append(target.logits(last).argmax(dim=-1))
    said = [torch.cat(firsts)]
    for step in range(most - 1):
        if step % 16 == 15 and bool((torch.stack(said) == end).any(dim=0).all()):
            break
        positions = (lengths + step)[:, None]
        hidden, _ = target.decoder.ragged(target.embed(said[-1][:, None]), positions, cache)
        said.append(target.logits(hidden[:, 0]).argmax(dim=-1))
    table = torch.stack(said, dim=1).tolist()
    return [
        Continuation(tuple(prompt), tuple(row[: row.index(end) + 1] if end in row else row))
        for prompt, row in zip(prompts, table, strict=True)
    ]


@torch.inference_mode()
def along(
    texts: Sequence[Sequence[int]],
    score: Callable[[Tensor], Tensor],
    device: torch.device,
    rows_at_once: int = 8,
) -> list[Tensor]:
    """`score` of every position of every text, causal: `[length, …]` each. Texts of like length go together."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    scored: dict[int, Tensor] = {}
    for at in range(0, len(order), rows_at_once):
        group = order[at : at + rows_at_once]
        result = score(_padded([texts[index] for index in group], device))
        for row, index in enumerate(group):
            scored[index] = result[row, : len(texts[index])].cpu()
    return [scored[index] for index in range(len(texts))]
