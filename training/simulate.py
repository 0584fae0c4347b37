"""Plays verification rounds with the real models, many texts at once, and records what each side foresaw.

The record is all that evaluation and calibration need: the block, the draft's own ranking, every exit's ranking and the
verdict. The target's text is known beforehand (greedy), so a round's verdict is what that text says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from services.verifier.engine.exit_head import Naming, best_head
from services.verifier.engine.exit_modules import Int8Exit, Judged, TrainedExit, quickest
from training.draft import DraftModel
from training.llama import KeyValueCache, Target
from training.rollout import Continuation

WIDTH: Final = 9
CATCH_UP: Final = 6
Record = dict[str, Tensor]


class Play:
    """Rounds over one batch of texts."""

    def __init__(
        self,
        target: Target,
        draft: DraftModel,
        exits: Mapping[int, TrainedExit],
        naming: Naming,
        texts: Sequence[Continuation],
        block: int,
        states: list[Tensor] | None = None,
    ) -> None:
        self.target, self.draft, self.block, self._states = target, draft, block, states
        self.exits = {layer: quickest(exit_) for layer, exit_ in exits.items()}
        device, dtype = target.embedding.device, target.embedding.dtype
        self._dtype = dtype
        self._head = best_head(target.logits, target.head.data, naming)
        self._ends = torch.tensor([len(text.text) for text in texts], device=device)
        reach = int(self._ends.max()) + block + 1
        self._text = torch.full((len(texts), reach), -1, dtype=torch.long, device=device)
        for row, text in enumerate(texts):
            self._text[row, : len(text.text)] = torch.tensor(text.text, device=device)
        self._length = torch.tensor([len(text.prompt) + 1 for text in texts], device=device)
        self._words = draft.words_of(self._text.clamp(min=0))
        self._first = draft.first_seen(self._text.clamp(min=0), self._words)
        self._trunk = target.decoder.truncated(max(exits, default=1))
        self._target_cache = KeyValueCache(self._trunk.config, len(texts), reach, device, dtype)
        self._draft_cache = KeyValueCache(draft.config, len(texts), reach, device, dtype)
        tokens = self._text[:, : int(self._length.max())].clamp(min=0)
        for at in range(0, len(texts), 16):
            part = tokens[at : at + 16]
            rows = slice(at, at + len(part))
            self._trunk.aligned(target.embed(part), 0, self._target_cache.rows(rows.start, rows.stop))
            draft.decoder.aligned(draft.embed(part, dtype), 0, self._draft_cache.rows(rows.start, rows.stop))

    @property
    def active(self) -> Tensor:
        """Texts whose next round's verdict may still lie within them."""
        return self._length < self._ends

    @torch.inference_mode()
    def round(self) -> Record:
        """Plays one round of every active text; returns the records of those whose verdict the text holds."""
        rows = self.active.nonzero()[:, 0]
        length, text = self._length[rows], self._text[rows]
        drafts, edge_tokens, edge_scores = self._draft(rows, length, text)
        place = torch.arange(self.block + 1, device=length.device)
        block = torch.cat((text.gather(1, length[:, None] - 1), drafts), dim=1)
        positions = length[:, None] - 1 + place
        _, kept = self._trunk.ragged(
            self.target.embed(block), positions, self._target_cache, self.exits, cache_rows=rows
        )
        truth = text.gather(1, length[:, None] + place)
        accepted = (drafts == truth[:, :-1]).long().cumprod(dim=1).sum(dim=1)
        following = truth.gather(1, accepted[:, None])[:, 0]
        whole = following >= 0
        record: Record = {
            "text": rows[whole],
            "drafts": drafts[whole],
            "edge_tokens": edge_tokens[whole],
            "edge_scores": edge_scores[whole],
            "accepted": accepted[whole],
            "next": following[whole],
        }
        for layer, exit_ in self.exits.items():
            record.update(self._exit(layer, exit_, kept[layer][whole], drafts[whole], edge_scores[whole]))
        self._length[rows] = length + accepted + 1
        return {name: tensor.cpu() for name, tensor in record.items()}

    def _draft(self, rows: Tensor, length: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block, and the draft's best tokens and their log-probabilities at each of its places and the next."""
        positions = (length[:, None] + torch.arange(-CATCH_UP, 0, device=length.device)).clamp(min=0)
        tokens = text.gather(1, positions)
        drafts, best_tokens, best_scores = [], [], []
        unseen = self._first[rows] >= length[:, None]
        ids = self.draft.token_ids(self._words)
        for place in range(self.block + 1):
            embedded = self.draft.embed(tokens, self._dtype)
            hidden, _ = self.draft.decoder.ragged(embedded, positions, self._draft_cache, cache_rows=rows)
            scores = self.draft.logits(hidden[:, -1], self._words).float()
            scores[:, len(self.draft.vocabulary) :].masked_fill_(unseen, -torch.inf)
            best, column = scores.log_softmax(dim=-1).topk(WIDTH, dim=-1)
            best_tokens.append(ids[column])
            best_scores.append(best)
            tokens, positions = ids[column[:, :1]], length[:, None] + place
            drafts.append(tokens[:, 0])
        return torch.stack(drafts[:-1], 1), torch.stack(best_tokens, 1), torch.stack(best_scores, 1)

    def _exit(
        self, layer: int, exit_: TrainedExit | Int8Exit, hidden: Tensor, drafts: Tensor, edge_scores: Tensor
    ) -> Record:
        """What the exit after `layer` makes of the blocks, read as the verifier reads it."""
        rounds, width = hidden.shape[0], self.block + 1
        padded = torch.cat((drafts, drafts[:, :1]), dim=1).flatten()
        normed = self.target.decoder.normed(exit_(hidden.flatten(0, 1)))
        seen = self._head(normed, padded, WIDTH)
        sure = edge_scores[:, :, 0].flatten().float()
        judged = exit_.judge(Judged(normed, seen.draft_rows, seen.drafted, sure, seen.log_probs[:, :2]))
        if self._states is not None:
            self._states.append(normed)
        return {
            f"{layer}.tokens": seen.tokens.view(rounds, width, WIDTH),
            f"{layer}.scores": seen.log_probs.view(rounds, width, WIDTH),
            f"{layer}.drafted": seen.drafted.view(rounds, width)[:, :-1],
            f"{layer}.judged": judged.view(rounds, width)[:, :-1],
        }


def play_rounds(
    target: Target,
    draft: DraftModel,
    exits: Mapping[int, TrainedExit],
    naming: Naming,
    texts: Sequence[Continuation],
    *,
    block: int = 5,
    texts_at_once: int = 64,
    states: list[Tensor] | None = None,
) -> Record:
    """Plays all texts to their ends; returns the records of all rounds, `text` counting through `texts`.

    `states`, where given, gets the normed guesses of all exits.
    """
    parts: list[Record] = []
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].text))
    for at in range(0, len(order), texts_at_once):
        group = order[at : at + texts_at_once]
        play = Play(target, draft, exits, naming, [texts[index] for index in group], block, states)
        while bool(play.active.any()):
            record = play.round()
            if len(record["text"]):
                record["text"] = torch.tensor(group)[record["text"]]
                parts.append(record)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
