"""Trains draft heads on a frozen target: the verifier's own draft for sessions that nobody drafts for.

On the target's own text every position teaches: the states there and the token that followed are what the head will see,
the tokens after it are what it has to guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from services.verifier.engine.draft_head import MOST_DRAFTED, DraftHead, HeadShape
from training.conversations import Role
from training.data import batches, held_out_count
from training.draft import ROLE_WEIGHTS
from training.exits import token_loss
from training.llama import Kernels, Target
from training.progress import Clock, Journal, rate


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """How a head is trained; `share` of a batch's positions are taken."""

    vocabulary: int = 24_576
    steps: int = 4_000
    batch_tokens: int = 36_864
    share: float = 0.2
    matrix_rate: float = 4e-3
    hard_weight: float = 1.0
    decay: float = 0.8
    seed: int = 0
    max_seconds: float | None = None
    save_every: int = 500
    say_every: int = 50


class HeadTrainer:
    """One training run."""

    def __init__(
        self,
        target: Target,
        shape: HeadShape,
        plan: HeadPlan,
        vocabulary: Tensor,
        tokens: Sequence[Tensor],
        roles: Sequence[Tensor],
        *,
        compiled: bool,
    ) -> None:
        self.target, self.plan, self.shape = target, plan, shape
        device = target.embedding.device
        self._named = target.head[vocabulary.to(device)]
        torch.manual_seed(plan.seed)
        self.head = DraftHead(shape).to(device)
        self.step, self.spent_s = 0, 0.0
        held = [held_out_count(len(rows)) for rows in tokens]
        self._held = [
            (rows[:count], role[:count]) for rows, role, count in zip(tokens, roles, held, strict=True)
        ]
        self._tokens = [rows[count:] for rows, count in zip(tokens, held, strict=True)]
        self._roles = [rows[count:] for rows, count in zip(roles, held, strict=True)]
        self._loss: Callable[..., Tensor] = token_loss
        if compiled:
            self._loss = torch.compile(token_loss, dynamic=False)
            target.decoder.kernels = Kernels.compiled()
        self.optimizer: torch.optim.Optimizer = torch.optim.Muon(
            list(self.head.parameters()),
            lr=plan.matrix_rate,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        )

    def _places(self, roles: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """A fixed number of places `[n]` in rows `[n]` after which the target goes on by itself, and how much each drafted
        token counts there `[n, MOST_DRAFTED]`."""
        table = torch.tensor([ROLE_WEIGHTS[role] for role in Role], device=roles.device)
        weight = table[roles.long()]
        length = roles.shape[1] - MOST_DRAFTED - 1
        ahead = torch.stack([weight[:, 2 + k : 2 + k + length] for k in range(MOST_DRAFTED)], dim=-1)
        ahead = ahead.cummin(dim=-1).values
        count = max(1, int(share * roles.numel()))
        keys = torch.rand(ahead.shape[:2], device=roles.device) * (ahead[..., 0] > 0) + ahead[..., 0]
        order = keys.flatten().topk(count).indices
        return order // length, order % length, ahead.flatten(0, 1)[order]

    def _first_guess(self, states: Sequence[Tensor], tokens: Tensor, row: Tensor, at: Tensor) -> Tensor:
        """The head's guess after places `at` of rows `row`; `states` are `[rows, length, hidden]`."""
        head, shape = self.head, self.shape
        rows, length = tokens.shape
        following = self.target.embed(tokens.roll(-1, dims=1))
        if not shape.window:
            return head.begin(head.entered([each[row, at] for each in states], following[row, at]), None)
        entered = head.entered([each.flatten(0, 1) for each in states], following.flatten(0, 1))
        places = torch.arange(length, device=tokens.device).repeat(rows)
        keys, values = head.keys_values(entered, places)
        query = head.queries(entered, places)
        query, keys, values = (
            part.view(rows, length, -1, shape.head_dim).transpose(1, 2) for part in (query, keys, values)
        )
        back = places[:length, None] - places[:length]
        seen = (back >= 0) & (back < shape.window)
        mixed = F.scaled_dot_product_attention(
            query, keys, values.to(query.dtype), attn_mask=seen, enable_gqa=True
        )
        mixed = mixed.transpose(1, 2)[row, at]
        return head.begin(entered.view(rows, length, -1)[row, at], mixed)

    def losses(self, tokens: Tensor, roles: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The loss on a batch; and how often, at temperature 0, all tokens up to each place were right `[MOST_DRAFTED]`."""
        target, shape = self.target, self.shape
        row, at, weights = self._places(roles, share)
        depth = target.config.num_hidden_layers
        with torch.no_grad():
            said, kept = target.decoder.full(target.embed(tokens), set(shape.layers) - {depth})
            kept[depth] = said
            ahead = range(1, MOST_DRAFTED + 1)
            teachers = [F.linear(target.decoder.normed(said[row, at + k]), self._named) for k in ahead]
            following = [target.embed(tokens[row, at + k]) for k in ahead]
        total = torch.zeros((), device=tokens.device)
        greedy = weights >= 1
        right = greedy[:, 0]
        found = []
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.is_cuda):
            guess = self._first_guess([kept[layer] for layer in shape.layers], tokens, row, at)
            for k, teacher in enumerate(teachers):
                if k:
                    guess = self.head.go_on(guess, following[k])
                logits = F.linear(target.decoder.normed(guess), self._named)
                log_q = F.log_softmax(logits.float(), dim=-1)
                loss = self._loss(log_q, teacher, weights[:, k], self.plan.hard_weight)
                total = total + self.plan.decay**k * loss
                right = right & greedy[:, k] & (log_q.detach().argmax(dim=-1) == teacher.argmax(dim=-1))
                found.append(right.sum() / greedy[:, k].sum().clamp(min=1))
        return total, torch.stack(found)

    def run(self, journal: Journal, save: Callable[[], None], name: str = "head") -> None:
        """Trains until the plan is met, saving on the way."""
        plan = self.plan
        clock = Clock(plan.steps, plan.max_seconds, self.spent_s)
        stream = batches(self._tokens, self._roles, batch_tokens=plan.batch_tokens, seed=plan.seed + 2)
        for epoch, tokens, roles in itertools.islice(stream, self.step, None):
            done = clock.done(self.step)
            if done >= 1:
                break
            torch.manual_seed(plan.seed * 1_000_003 + self.step)
            loss, right = self.losses(tokens, roles, plan.share)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = plan.matrix_rate * rate(done)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % plan.say_every == 0:
                shown = {f"right{k + 1}": value for k, value in enumerate(right.tolist())}
                journal.note(
                    name, step=self.step, epoch=epoch, loss=loss.item(), **shown, seconds=clock.spent_s
                )
            if self.step % plan.save_every == 0:
                self.spent_s = clock.spent_s
                save()
        self.spent_s = clock.spent_s

    @torch.no_grad()
    def held_out(self, rows_at_once: int = 16) -> list[float]:
        """On streams that are never trained on: how often all tokens up to each place are right, at temperature 0."""
        parts = []
        fast = self._loss, self.target.decoder.kernels
        self._loss, self.target.decoder.kernels = token_loss, Kernels()
        for rows, roles in self._held:
            for at in range(0, len(rows), rows_at_once):
                part = slice(at, at + rows_at_once)
                parts.append(self.losses(rows[part].long(), roles[part], 0.3)[1])
        self._loss, self.target.decoder.kernels = fast
        found: list[float] = torch.stack(parts).mean(dim=0).tolist()
        return found

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs to give the same result."""
        return {
            "step": self.step,
            "spent_s": self.spent_s,
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes a run up where `state` was saved."""
        self.step, self.spent_s = state["step"], state["spent_s"]
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
