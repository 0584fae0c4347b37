"""Trains early exits on a frozen target: what an exit knows of the verdict before the last layer has spoken.

An exit is an adapter (norm, gated MLP, residual) in front of the target's own last norm and head, and a judge: a small
network that says whether the target will accept the draft's token, from the adapted state, the token, the exit's own
opinion of it and the draft's confidence. Judging is easier than naming; the adapter names what comes where the judge
says no. On the target's own text the draft's first choice after the true context is exactly what a block holds up to
its first rejection, so one pass over a text trains every position.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from services.verifier.engine.exit_files import FILE_FORMAT, TargetFacts, read_exits
from services.verifier.engine.exit_head import ROUGH_SHORTLIST, Naming
from services.verifier.engine.exit_modules import Judged, TrainedExit
from shared.speculation.outcomes import Calibration
from training.data import batches, held_out_count
from training.draft import DraftModel, answer_positions, choices
from training.llama import Kernels, Target
from training.progress import Clock, Journal, rate


@dataclass(frozen=True, slots=True)
class ExitPlan:
    """How exits are trained. `layers` count from 1: an exit after layer 18 reads what layer 18 puts out."""

    layers: tuple[int, ...]
    width: int = 984
    judge_width: int = 96
    judge_rank: int = 40
    vocabulary: int = 24_576
    steps: int = 1_500
    batch_tokens: int = 36_864
    matrix_rate: float = 4e-3
    other_rate: float = 1e-3
    hard_weight: float = 1.0
    accepted_weight: float = 0.35
    unsure: float = 0.1
    share: float = 0.5
    seed: int = 0
    max_seconds: float | None = None
    save_every: int = 500
    say_every: int = 50


def fitting_width(target: Target, count: int, share: float = 0.039) -> int:
    """The width of `count` adapters that, with their judges, have `share` of the target's parameters."""
    whole = sum(parameter.numel() for parameter in target.parameters())
    hidden = target.config.hidden_size
    judge = ExitPlan(layers=()).judge_rank * 2 * hidden + 13_000
    return max(8, int((share * whole / count - judge) / (3 * hidden)) // 8 * 8)


def new_exit(hidden_size: int, plan: ExitPlan, eps: float) -> TrainedExit:
    """An exit of the plan's sizes, whose adapter adds nothing yet."""
    return TrainedExit(
        hidden_size, width=plan.width, judge_rank=plan.judge_rank, judge_width=plan.judge_width, eps=eps
    )


@dataclass(frozen=True, slots=True)
class Opinion:
    """What an exit makes of rows: scores of its vocabulary (log-probabilities), of the draft's token, the judge's logit."""

    log_probs: Tensor
    drafted: Tensor
    judged: Tensor


def opinion(
    exit_: TrainedExit, target: Target, head: Tensor, hidden: Tensor, drafts: Tensor, confidence: Tensor
) -> Opinion:
    """Reads one exit on flat rows `[rows, hidden]`.

    `head` are the head's rows of the exit's vocabulary, `drafts` the draft's token ids `[rows]`, `confidence` their
    log-probability in the draft, NaN where it is unknown.
    """
    normed = target.decoder.normed(exit_(hidden))
    token = target.head[drafts]
    scores = F.linear(normed, head).float()
    total = scores.logsumexp(dim=-1)
    drafted = (normed.float() * token.float()).sum(dim=-1) - total
    best = scores.detach().topk(2, dim=-1).values - total.detach()[:, None]
    judged = exit_.judge(Judged(normed, token, drafted.detach(), confidence, best))
    return Opinion(scores - total[:, None], drafted, judged)


class ExitTrainer:
    """One training run over all exits at once: they share the target's pass and the draft's."""

    def __init__(
        self,
        target: Target,
        draft: DraftModel,
        plan: ExitPlan,
        vocabulary: Tensor,
        tokens: Sequence[Tensor],
        roles: Sequence[Tensor],
        *,
        compiled: bool,
    ) -> None:
        self.target, self.draft, self.plan = target, draft.requires_grad_(False), plan
        device = target.embedding.device
        self.vocabulary = vocabulary
        self._head = target.head[vocabulary.to(device)]
        torch.manual_seed(plan.seed)
        hidden = target.config.hidden_size
        self.exits = nn.ModuleDict(
            {str(layer): new_exit(hidden, plan, target.config.rms_norm_eps) for layer in plan.layers}
        ).to(device)
        self.step, self.spent_s = 0, 0.0
        held = [held_out_count(len(rows)) for rows in tokens]
        self._tokens = [rows[count:] for rows, count in zip(tokens, held, strict=True)]
        self._roles = [rows[count:] for rows, count in zip(roles, held, strict=True)]
        self._token_loss: Callable[..., Tensor] = token_loss
        if compiled:
            self._token_loss = torch.compile(token_loss, dynamic=False)
            target.decoder.kernels, draft.decoder.kernels = Kernels.compiled(), Kernels.compiled()
        matrices = [p for name, p in self.exits.named_parameters() if p.dim() == 2 and "judge" not in name]
        ids = {id(parameter) for parameter in matrices}
        others = [p for p in self.exits.parameters() if id(p) not in ids]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(
                    matrices, lr=plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
                ),
                plan.matrix_rate,
            ),
            (
                torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.98), weight_decay=0.01),
                plan.other_rate,
            ),
        ]

    def _read(self, tokens: Tensor, positions: Tensor) -> tuple[dict[int, Tensor], Tensor, Tensor, Tensor]:
        """Hidden states at the exits, the target's scores of all tokens, the draft's choices and their confidence."""
        with torch.no_grad():
            said, kept = self.target.decoder.full(self.target.embed(tokens), self.plan.layers)
            teacher = F.linear(self.target.decoder.normed(said.flatten(0, 1)[positions]), self.target.head)
            hidden, _ = self.draft.decoder.full(self.draft.embed(tokens, said.dtype))
            picked: list[Tensor] = []
            sure: list[Tensor] = []
            for rows, part in zip(torch.split(tokens, 8), torch.split(hidden, 8), strict=True):
                best, log_prob = choices(self.draft, rows, part)
                picked.append(best.flatten())
                sure.append(log_prob.flatten())
        states = {layer: state.flatten(0, 1)[positions] for layer, state in kept.items()}
        return states, teacher, torch.cat(picked)[positions], torch.cat(sure)[positions]

    def losses(self, tokens: Tensor, roles: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all exits' losses on a batch, and figures."""
        positions, weights = answer_positions(roles, self.plan.share)
        states, teacher, drafts, sure = self._read(tokens, positions)
        first = teacher.argmax(dim=-1)
        wanted = teacher[:, self.vocabulary.to(teacher.device)]
        accepted = first == drafts
        unsure = torch.rand(sure.shape, device=sure.device) < self.plan.unsure
        sure = torch.where(unsure, torch.nan, sure)
        token_weights = weights * torch.where(accepted, self.plan.accepted_weight, 1.0)
        total = torch.zeros((), device=tokens.device)
        figures = {"accepted": (accepted * weights).sum() / weights.sum()}
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.is_cuda):
            for layer in self.plan.layers:
                exit_: Any = self.exits[str(layer)]
                seen = opinion(exit_, self.target, self._head, states[layer], drafts, sure)
                named = self._token_loss(seen.log_probs, wanted, token_weights, self.plan.hard_weight)
                judged = F.binary_cross_entropy_with_logits(seen.judged, accepted.float(), reduction="none")
                judgement = (judged * weights).sum() / weights.sum()
                total = total + named + judgement
                figures[f"name{layer}"] = named.detach()
                figures[f"judge{layer}"] = judgement.detach()
        return total, figures

    def run(self, journal: Journal, save: Callable[[], None], name: str = "exits") -> None:
        """Trains until the plan is met, saving on the way."""
        plan = self.plan
        clock = Clock(plan.steps, plan.max_seconds, self.spent_s)
        stream = batches(self._tokens, self._roles, batch_tokens=plan.batch_tokens, seed=plan.seed + 1)
        for epoch, tokens, roles in itertools.islice(stream, self.step, None):
            done = clock.done(self.step)
            if done >= 1:
                break
            torch.manual_seed(plan.seed * 1_000_003 + self.step)
            loss, figures = self.losses(tokens, roles)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.exits.parameters(), 1.0)
            for optimizer, peak in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate(done)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % plan.say_every == 0:
                shown = {key: value.item() for key, value in figures.items()}
                journal.note(
                    name, step=self.step, epoch=epoch, loss=loss.item(), **shown, seconds=clock.spent_s
                )
            if self.step % plan.save_every == 0:
                self.spent_s = clock.spent_s
                save()
        self.spent_s = clock.spent_s

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs to give the same result."""
        return {
            "step": self.step,
            "spent_s": self.spent_s,
            "exits": self.exits.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes a run up where `state` was saved."""
        self.step, self.spent_s = state["step"], state["spent_s"]
        self.exits.load_state_dict(state["exits"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def token_loss(log_q: Tensor, wanted: Tensor, weights: Tensor, hard: float) -> Tensor:
    """Weighted mean of the divergence from the target's distribution + `hard` × cross-entropy with its first choice."""
    log_p = F.log_softmax(wanted.float(), dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    miss = -log_q.gather(-1, log_p.argmax(dim=-1)[:, None])[:, 0]
    return ((divergence + hard * miss) * weights).sum() / weights.sum().clamp(min=1e-6)


def write_exits(
    path: Path, exits: nn.ModuleDict, vocabulary: Tensor, header: dict[str, str], dtype: torch.dtype
) -> int:
    """Writes exit modules with their header; returns the size in bytes."""
    tensors = {"exit_vocab": vocabulary.int().cpu()}
    for layer, module in exits.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{layer}.{name}"] = tensor.detach().to(dtype).cpu().contiguous()
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": FILE_FORMAT, "layers": ",".join(exits), **header})
    part.chmod(0o644)
    part.rename(path)
    return path.stat().st_size


def write_calibrations(path: Path, fitted: Mapping[int, Calibration]) -> None:
    """Puts calibrations into the header of a file of exits."""
    _rewrite(path, {}, calibration=json.dumps({str(layer): asdict(found) for layer, found in fitted.items()}))


def write_naming(path: Path, naming: Naming) -> None:
    """Puts a way to read the head in fewer dimensions into a file of exits."""
    assert naming.reduce is not None and naming.restore is not None
    added = {
        "head.reduce": naming.reduce.bfloat16().contiguous(),
        "head.restore": naming.restore.bfloat16().contiguous(),
        "head.tail": torch.tensor([naming.tail]),
    }
    _rewrite(path, added)


def _rewrite(path: Path, added: Mapping[str, Tensor], **more: str) -> None:
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    part = path.with_suffix(".part")
    save_file({**tensors, **added}, part, metadata={**header, **more})
    part.chmod(0o644)
    part.rename(path)


@torch.inference_mode()
def fit_naming(head: Tensor, vocabulary: Tensor, states: Tensor, rank: int = 192) -> Naming:
    """A way to read the head's rows of a vocabulary in `rank` dimensions, for hidden states like `states` `[n, hidden]`.

    The truncated decomposition of the head in coordinates in which these states are white: the least mean square error of
    the logits that a rank allows.
    """
    named = head[vocabulary].float()
    moments = states.T @ states / len(states)
    floor = 1e-3 * moments.diagonal().mean() * torch.eye(len(moments), device=states.device)
    whitening = torch.linalg.cholesky(moments + floor)
    _, _, directions = torch.linalg.svd(named @ whitening, full_matrices=False)
    rank = min(rank, len(directions))
    restore = (whitening @ directions[:rank].T).bfloat16().float()
    reduce = torch.linalg.solve_triangular(whitening.T, directions[:rank].T, upper=True).T.bfloat16().float()
    sample = states[:: max(1, len(states) // 512)]
    exact, rough = sample @ named.T, (sample @ reduce.T) @ (named @ restore).T
    listed = rough.topk(min(ROUGH_SHORTLIST, rough.shape[1] - 1), dim=-1).indices
    tails = [scores.scatter(1, listed, -torch.inf).logsumexp(dim=-1) for scores in (exact, rough)]
    return Naming(vocabulary, reduce, restore, float((tails[0] - tails[1]).mean()))


def load_exits(path: Path, directory: Path, target: Target) -> tuple[dict[int, TrainedExit], Naming]:
    """Written exits by layer, in float32, with their calibration, and how they name tokens: as the verifier loads them.

    `ModelFilesError` when the file is damaged or was made for another target than the one in `directory`.
    """
    config = target.config
    facts = TargetFacts(directory, config.hidden_size, config.vocab_size, config.rms_norm_eps, torch.float32)
    exits, naming = read_exits(path, facts)
    return {layer: exit_.requires_grad_(False) for layer, exit_ in exits.items()}, naming
