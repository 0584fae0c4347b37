"""Distils a small draft model from a frozen target on the target's own text.

The draft is a Llama of the target's width that starts from some of its layers. Its output vocabulary is what the
target says most often; the same rows embed those tokens, all other tokens are read through product-quantised copies of
the target's embedding. The loss is the divergence from the target's distribution plus the cross-entropy with its first
choice: at temperature 0 a token is accepted when the two first choices agree, on the target's own text, so that
training sees exactly what verification will. In its last part the run trains the six-bit weights that are shipped.

Words that the context holds but the vocabulary lacks (names, above all) can be said too: their input rows serve as
output rows while they are in the context. Training shows each batch its own such words.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from services.draft_gateway.drafting.distilled import FORMAT, PATTERN, config_of, read_distilled
from services.draft_gateway.drafting.packed import (
    BITS,
    pack,
    product_codes,
    product_rows,
    quantize_rows,
    unpack,
)
from training.conversations import Role
from training.data import batches, held_out_count
from training.llama import Kernels, Llama, LlamaConfig, Target, copy_layers, fake_quantize, linear
from training.progress import Clock, Journal, rate

MATRICES: Final = ("qkv", "out", "gate_up", "down")
GROUP: Final = 6


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """How a draft is trained. `layers` are the target's layers (from 0) that it starts from."""

    layers: tuple[int, ...]
    vocabulary: int = 12_288
    context_words: int = 2_048
    steps: int = 2_000
    batch_tokens: int = 36_864
    matrix_rate: float = 4e-3
    other_rate: float = 1e-3
    hard_weight: float = 1.5
    quantize_after: float = 0.5
    seed: int = 0
    max_seconds: float | None = None
    save_every: int = 500
    say_every: int = 50


class DraftModel(nn.Module):
    """A Llama over a reduced output vocabulary that reads every token of the target."""

    vocabulary: Tensor
    slots: Tensor
    rare_ids: Tensor
    rare_codes: Tensor
    rare_books: Tensor
    rare: Tensor

    def __init__(
        self, config: LlamaConfig, vocabulary: Tensor, rare_codes: Tensor, rare_books: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.decoder = Llama(config)
        self.head = nn.Parameter(torch.empty(len(vocabulary), config.hidden_size))
        slots = torch.full((config.vocab_size,), -1, dtype=torch.long)
        slots[vocabulary] = torch.arange(len(vocabulary))
        missing = slots < 0
        self.register_buffer("rare_ids", missing.nonzero()[:, 0], persistent=False)
        slots[missing] = len(vocabulary) + torch.arange(int(missing.sum()))
        self.register_buffer("vocabulary", vocabulary.long())
        self.register_buffer("slots", slots)
        self.register_buffer("rare_codes", rare_codes)
        self.register_buffer("rare_books", rare_books)
        self.register_buffer("rare", product_rows(rare_codes, rare_books.float()), persistent=False)

    @classmethod
    def from_target(
        cls, target: Target, vocabulary: Tensor, layers: Sequence[int], *, seed: int
    ) -> DraftModel:
        """A draft that starts from layers of `target` and speaks `vocabulary` (its token ids, ascending)."""
        with torch.no_grad():
            embedding = target.embedding.detach().float()
            common = torch.zeros(len(embedding), dtype=torch.bool, device=embedding.device)
            common[vocabulary.to(embedding.device)] = True
            codes, books = product_codes(embedding[~common], group=GROUP, codes=256, rounds=12, seed=seed)
            draft = cls(
                target.config.with_layers(len(layers)), vocabulary.cpu(), codes.cpu(), books.half().cpu()
            )
            copy_layers(target.decoder, draft.decoder, layers)
            draft.head.copy_(target.head[vocabulary.to(embedding.device)])
        return draft

    @property
    def bits(self) -> int:
        """Bits a weight is rounded to while training; 0 for none."""
        return self.decoder.bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self.decoder.bits = bits

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Hidden states of the target's token ids, before the first layer."""
        slots, common = self.slots[tokens], len(self.vocabulary)
        said = F.embedding(slots.clamp(max=common - 1), fake_quantize(self.head, self.bits))
        rare = F.embedding((slots - common).clamp(min=0), self.rare)
        return torch.where((slots < common)[..., None], said.to(dtype), rare.to(dtype))

    def logits(self, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        """Scores after hidden states of the last layer: over the vocabulary, then over `words` (rare tokens' slots
        less the vocabulary's size)."""
        normed = self.decoder.normed(hidden)
        scores = linear(normed, self.head, self.bits)
        if words is None or not len(words):
            return scores
        return torch.cat((scores, F.linear(normed, self.rare[words].to(normed.dtype))), dim=-1)

    def token_ids(self, words: Tensor | None = None) -> Tensor:
        """The target's ids of the columns of `logits`."""
        if words is None or not len(words):
            return self.vocabulary
        return torch.cat((self.vocabulary, self.rare_ids[words]))

    def words_of(self, tokens: Tensor) -> Tensor:
        """The rare words (ascending) that `tokens` hold, as `logits` takes them."""
        slots = self.slots[tokens.flatten()] - len(self.vocabulary)
        words: Tensor = torch.unique(slots[slots >= 0])
        return words

    def first_seen(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Where in each row of `tokens` `[rows, length]` each of `words` comes first; `length` where it doesn't."""
        rows, length = tokens.shape
        slots = self.slots[tokens] - len(self.vocabulary)
        column = torch.searchsorted(words, slots.clamp(min=0)).clamp(max=max(len(words) - 1, 0))
        place = torch.arange(length, device=tokens.device).expand(rows, length)
        place = torch.where(slots >= 0, place, length)
        first = torch.full((rows, len(words)), length, device=tokens.device)
        return first.scatter_reduce_(1, column, place, "amin") if len(words) else first


def common_tokens(tokens: Sequence[Tensor], roles: Sequence[Tensor], size: int, vocab_size: int) -> Tensor:
    """The `size` token ids that answers are expected to hold most often, ascending.

    Counts in the target's answers (and, less, in its questions), smoothed by the order in which byte-pair encoding
    found the tokens: what was merged early is frequent in text at large.
    """
    counts = torch.full((vocab_size,), 0.3)
    for ids, role in zip(tokens, roles, strict=True):
        counts += torch.bincount(ids[role >= Role.GREEDY].cpu().long(), minlength=vocab_size)
        counts += 0.3 * torch.bincount(ids[role == Role.USER].cpu().long(), minlength=vocab_size)
    score = counts.log() - 1.5 * (torch.arange(vocab_size) + 100.0).log()
    return score.argsort(descending=True, stable=True)[: min(size, vocab_size)].sort().values


def choices(draft: DraftModel, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The draft's first choice after every token, and its log-probability: each `[rows, length]`.

    A word outside its vocabulary counts where it stands in the row's context. `hidden` is `[rows, length, width]`.
    """
    words = draft.words_of(tokens)
    scores = draft.logits(hidden, words).float()
    place = torch.arange(tokens.shape[1], device=tokens.device)[None, :, None]
    unseen = draft.first_seen(tokens, words)[:, None, :] > place
    scores[..., len(draft.vocabulary) :].masked_fill_(unseen, -torch.inf)
    best, column = scores.log_softmax(dim=-1).max(dim=-1)
    return draft.token_ids(words)[column], best


ROLE_WEIGHTS: Final = {Role.FORCED: 0.0, Role.USER: 0.1, Role.GREEDY: 1.0, Role.SAMPLED: 0.6}


def answer_positions(roles: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A fixed number of flat positions whose next token counts, and how much; the heaviest first.

    `roles` is `[rows, length]`; of its positions `share` are taken, so that shapes don't vary.
    """
    table = torch.tensor([ROLE_WEIGHTS[role] for role in Role], device=roles.device)
    following = torch.zeros_like(roles, dtype=table.dtype)
    following[:, :-1] = table[roles[:, 1:].long()]
    weights, order = following.flatten().sort(descending=True, stable=True)
    count = max(1, int(share * roles.numel()))
    return order[:count], weights[:count]


def distillation(student: Tensor, teacher: Tensor, weights: Tensor, hard: float) -> tuple[Tensor, Tensor]:
    """Weighted mean of divergence + `hard` × cross-entropy with the first choice; and where first choices agree."""
    log_q = F.log_softmax(student.float(), dim=-1)
    log_p = F.log_softmax(teacher.float(), dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    first = log_p.argmax(dim=-1)
    miss = -log_q.gather(-1, first[:, None])[:, 0]
    loss = ((divergence + hard * miss) * weights).sum() / weights.sum().clamp(min=1e-6)
    return loss, log_q.argmax(dim=-1) == first


class DraftTrainer:
    """One training run: owns the draft, its optimisers and where it stands."""

    def __init__(
        self,
        target: Target,
        draft: DraftModel,
        plan: DraftPlan,
        tokens: Sequence[Tensor],
        roles: Sequence[Tensor],
        *,
        compiled: bool,
    ) -> None:
        self.target, self.draft, self.plan = target, draft, plan
        self.step = 0
        self.spent_s = 0.0
        held = [held_out_count(len(rows)) for rows in tokens]
        self._held = [
            (rows[:count], role[:count]) for rows, role, count in zip(tokens, roles, held, strict=True)
        ]
        self._tokens = [rows[count:] for rows, count in zip(tokens, held, strict=True)]
        self._roles = [rows[count:] for rows, count in zip(roles, held, strict=True)]
        self._dtype = target.embedding.dtype
        self._random = torch.Generator().manual_seed(plan.seed)
        self._loss: Callable[..., tuple[Tensor, Tensor]] = distillation
        if compiled:
            self._loss = torch.compile(distillation, dynamic=False)
            target.decoder.kernels = Kernels.compiled()
            draft.decoder.kernels = Kernels.compiled()
        matrices = [p for name, p in draft.named_parameters() if name.rpartition(".")[2] in MATRICES]
        matrix_ids = {id(parameter) for parameter in matrices}
        others = [p for p in draft.parameters() if id(p) not in matrix_ids]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(
                    matrices, lr=plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
                ),
                plan.matrix_rate,
            ),
            (
                torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
                plan.other_rate,
            ),
        ]

    def losses(self, tokens: Tensor, roles: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, agreement of first choices and weights of a batch."""
        positions, weights = answer_positions(roles, share)
        words = self._context_words(tokens)
        with torch.no_grad():
            said, _ = self.target.decoder.full(self.target.embed(tokens))
            normed = self.target.decoder.normed(said.flatten(0, 1)[positions])
            teacher = F.linear(normed, self.target.head[self.draft.token_ids(words)])
        hidden, _ = self.draft.decoder.full(self.draft.embed(tokens, self._dtype))
        student = self.draft.logits(hidden.flatten(0, 1)[positions], words)
        loss, agreed = self._loss(student, teacher, weights, self.plan.hard_weight)
        return loss, agreed, weights

    def _context_words(self, tokens: Tensor) -> Tensor:
        """A fixed number of rare words: those of the batch, others to fill up."""
        size = min(self.plan.context_words, len(self.draft.rare_ids))
        own = self.draft.words_of(tokens)
        own = own[torch.randperm(len(own), generator=self._random).to(own.device)][:size]
        others = torch.ones(len(self.draft.rare_ids), dtype=torch.bool, device=own.device)
        others[own] = False
        return torch.cat((own, others.nonzero()[: size - len(own), 0])).sort().values

    def run(self, journal: Journal, save: Callable[[], None], name: str = "draft") -> None:
        """Trains until the plan is met, saving on the way."""
        plan = self.plan
        clock = Clock(plan.steps, plan.max_seconds, self.spent_s)
        stream = batches(self._tokens, self._roles, batch_tokens=plan.batch_tokens, seed=plan.seed)
        seen = 0
        agreement = torch.zeros((), device=self.target.head.device)
        for epoch, tokens, roles in itertools.islice(stream, self.step, None):
            done = clock.done(self.step)
            if done >= 1:
                break
            self.draft.bits = BITS if done >= plan.quantize_after else 0
            loss, agreed, weights = self.losses(tokens, roles, 0.6)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
            for optimizer, peak in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate(done)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            seen += tokens.numel()
            greedy = weights >= 1
            agreement = 0.95 * agreement + 0.05 * (agreed & greedy).sum() / greedy.sum().clamp(min=1)
            if self.step % plan.say_every == 0:
                journal.note(
                    name,
                    step=self.step,
                    epoch=epoch,
                    loss=loss.item(),
                    agreement=agreement.item() / (1 - 0.95**self.step),
                    bits=self.draft.bits,
                    seconds=clock.spent_s,
                )
            if self.step % plan.save_every == 0:
                self.spent_s = clock.spent_s
                save()
        self.spent_s = clock.spent_s
        self.draft.bits = BITS
        journal.note(name, step=self.step, **self.held_out(), seconds=clock.spent_s)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss and agreement (at temperature 0) on streams that are never trained on."""
        loss_sum, agreed_sum, count = 0.0, 0.0, 0
        fast = self._loss, self.target.decoder.kernels, self.draft.decoder.kernels
        self._loss, self.target.decoder.kernels, self.draft.decoder.kernels = (
            distillation,
            Kernels(),
            Kernels(),
        )
        for tokens, roles in self._held:
            loss, agreed, weights = self.losses(tokens.long(), roles, 0.9)
            greedy = weights >= 1
            loss_sum += loss.item() * len(tokens)
            agreed_sum += (agreed & greedy).sum().item()
            count += int(greedy.sum())
        self._loss, self.target.decoder.kernels, self.draft.decoder.kernels = fast
        rows = sum(len(tokens) for tokens, _ in self._held)
        return {"held_out_loss": loss_sum / rows, "held_out_agreement": agreed_sum / max(1, count)}

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs to give the same result."""
        return {
            "step": self.step,
            "spent_s": self.spent_s,
            "random": self._random.get_state(),
            "draft": self.draft.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes a run up where `state` was saved."""
        self.step, self.spent_s = state["step"], state["spent_s"]
        self._random.set_state(state["random"])
        self.draft.load_state_dict(state["draft"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.rename(path)


def write_draft(
    directory: Path, draft: DraftModel, header: Mapping[str, str], file_bytes: int = 15 << 20
) -> int:
    """Writes the six-bit draft with its header, in files of at most about `file_bytes`; returns its size in bytes."""
    tensors: dict[str, Tensor] = {
        "draft_vocab": draft.vocabulary.int(),
        "rare_codes": draft.rare_codes,
        "rare_books": draft.rare_books.half(),
        "norm": draft.decoder.norm.detach().float(),
    }
    weights = {"head": draft.head}
    for index, layer in enumerate(draft.decoder.layers):
        weights.update({f"layers.{index}.{name}": getattr(layer, name) for name in MATRICES})
        for name in ("attention_norm", "mlp_norm"):
            tensors[f"layers.{index}.{name}"] = getattr(layer, name).detach().float()
    for name, weight in weights.items():
        values, scales = quantize_rows(weight.detach())
        tensors[f"{name}.packed"], tensors[f"{name}.scales"] = pack(values), scales
    full = {"format": FORMAT, "config": json.dumps(draft.config.as_json()), **header}
    return write_files(directory, tensors, full, file_bytes)


def write_files(
    directory: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], file_bytes: int
) -> int:
    """Writes `draft-1.safetensors`, …, each with the header; returns the bytes of all."""
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held = sum(other.nbytes for other in groups[-1].values())
        if groups[-1] and held + tensor.nbytes > file_bytes:
            groups.append({})
        groups[-1][name] = tensor.detach().cpu().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(PATTERN):
        old.unlink()
    total = 0
    for number, group in enumerate(groups, start=1):
        path = directory / f"draft-{number}.safetensors"
        save_file(group, path, metadata={**header, "files": str(len(groups))})
        total += path.stat().st_size
    return total


def read_draft(directory: Path) -> DraftModel:
    """A written draft as a model to measure with (weights as rounded, arithmetic as on the CPU's int8 kernels).

    Raises `ModelFilesError` when there is none.
    """
    header, tensors = read_distilled(directory)
    config = LlamaConfig.from_json(config_of(header))
    draft = DraftModel(config, tensors["draft_vocab"].long(), tensors["rare_codes"], tensors["rare_books"])

    def weight(name: str) -> Tensor:
        return unpack(tensors[f"{name}.packed"]).float() * tensors[f"{name}.scales"][:, None]

    state = {"head": weight("head"), "decoder.norm": tensors["norm"]}
    for index in range(config.num_hidden_layers):
        state.update(
            {f"decoder.layers.{index}.{name}": weight(f"layers.{index}.{name}") for name in MATRICES}
        )
        for name in ("attention_norm", "mlp_norm"):
            state[f"decoder.layers.{index}.{name}"] = tensors[f"layers.{index}.{name}"]
    draft.load_state_dict(state, strict=False)
    draft.bits = BITS
    return draft.requires_grad_(False).eval()
