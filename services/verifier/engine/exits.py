"""Early exits: small modules that foresee, after some of the layers, what the last one will say.

An exit module turns the residual stream after its layer into a guess of the residual stream after the last one; the
model's own final norm and LM head do the rest. Untrained, the guess is the stream itself. Trained modules come from a
safetensors file whose header says what they were trained for; one that can't be used costs hints, never service: the
untrained exits take over and a note says why.

The file: metadata `format` = "outrider-exits/1", `target_sha256` (see `target_digest`), `hidden_size`, `layers`
("18,24,27"); tensors `<layer>.<parameter>` of an `AdapterExit` for each of these layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.verifier.engine.channel import ExitMessage, Outlook
from services.verifier.engine.exit_head import ExitHead
from shared.errors import ModelFilesError
from shared.speculation.outcomes import rank_outcomes

FILE_FORMAT: Final = "outrider-exits/1"
UNTRAINED: Final = "untrained"
OFF: Final = "off"


class ExitModule(nn.Module):
    """An exit after one layer, untrained. Trained ones override `forward`, and `acceptance` if they have a judge."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden size]: the residual stream after the layer → a guess of the one after the last layer."""
        return hidden

    def acceptance(self, log_probs: Tensor, hidden: Tensor, drafts: Tensor) -> Tensor:
        """[rows]: log-probability that the draft token that a row judges is accepted.

        `log_probs` is what the exit's own distribution gives these tokens, and the answer as long as no trained judge
        knows better; `hidden` is [rows, hidden size], the residual stream after the layer.
        """
        return log_probs


class AdapterExit(ExitModule):
    """RMSNorm → gated MLP → residual: h + down(silu(gate(n)) · up(n)), n = norm(h)."""

    def __init__(self, hidden_size: int, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """See `ExitModule.forward`."""
        normed = self.norm(hidden)
        guess: Tensor = hidden + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return guess


@dataclass(frozen=True, slots=True)
class ExitSet:
    """The exits that a model runs with: a module per layer, and how `EngineInfo` describes them."""

    modules: dict[int, ExitModule]
    label: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a file of trained exits must have been made for."""

    directory: Path
    hidden_size: int
    dtype: torch.dtype


def load_exits(layers: Sequence[int], file: Path | None, target: TargetFacts) -> ExitSet:
    """Exits after `layers`: trained where `file` has them, untrained otherwise; never fails for the file's sake."""
    untrained: dict[int, ExitModule] = {layer: ExitModule() for layer in layers}
    if not layers:
        return ExitSet({}, OFF)
    if file is None:
        return ExitSet(untrained, UNTRAINED)
    try:
        trained = read_exits(file, target)
    except ModelFilesError as error:
        return ExitSet(untrained, UNTRAINED, (f"{error.message}; untrained exits serve instead",))
    missing = [layer for layer in layers if layer not in trained]
    notes = (f"{file.name} has no exit after layers {_listed(missing)}: untrained there",) if missing else ()
    return ExitSet(
        {layer: trained.get(layer, untrained[layer]) for layer in layers}, f"trained: {file.name}", notes
    )


def read_exits(file: Path, target: TargetFacts) -> dict[int, ExitModule]:
    """The trained exits in `file` by layer; `ModelFilesError` when it is unreadable or was made for another target."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise ModelFilesError(f"exit modules {file} can't be read ({error})") from error
    _check_header(file, header, target)
    return {layer: _adapter(file, layer, tensors, target) for layer in _layers(file, header)}


def target_digest(directory: Path) -> str:
    """sha256 over the names and bytes of a checkpoint's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while piece := opened.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _check_header(file: Path, header: dict[str, str], target: TargetFacts) -> None:
    expected = {"format": FILE_FORMAT, "hidden_size": str(target.hidden_size)}
    for name, value in expected.items():
        if header.get(name) != value:
            raise ModelFilesError(
                f"exit modules {file}: {name} is {header.get(name)!r}, this target needs {value!r}"
            )
    digest = target_digest(target.directory)
    if header.get("target_sha256") != digest:
        raise ModelFilesError(
            f"exit modules {file} were trained for the target {str(header.get('target_sha256'))[:12]}…, "
            f"{target.directory} is {digest[:12]}…"
        )


def _layers(file: Path, header: dict[str, str]) -> list[int]:
    listed = header.get("layers", "")
    try:
        return [int(layer) for layer in listed.split(",")]
    except ValueError:
        raise ModelFilesError(f"exit modules {file}: layers are {listed!r}, not such as '18,24,27'") from None


def _adapter(file: Path, layer: int, tensors: dict[str, Tensor], target: TargetFacts) -> AdapterExit:
    own = {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{layer}.")
    }
    gate = own.get("gate.weight")
    if gate is None or gate.ndim != 2:
        raise ModelFilesError(f"exit modules {file}: the gate of layer {layer} is missing or not a matrix")
    module = AdapterExit(target.hidden_size, gate.shape[0])
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise ModelFilesError(f"exit modules {file}: layer {layer} does not fit: {error}") from error
    return module.to(target.dtype).eval()


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in layers)


@dataclass(frozen=True, slots=True)
class VerifiedRows:
    """A session's rows in a pass: `start` and its drafts' count + 1 of them; `base` output tokens stand before."""

    key: str
    base: int
    start: int
    drafts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """What the exits look at in one pass: its rows (indices into the pass' tokens) and whose they are."""

    began: float
    """On the monotonic clock, seconds."""
    rows: Tensor
    sessions: tuple[VerifiedRows, ...]
    drafts: Tensor = field(repr=False)
    """[rows]: the draft token that each row judges; 0 where there is none (the last row of a session)."""


class ExitReader:
    """Applies the exits to a pass' rows and says what they foresee."""

    def __init__(
        self, exits: ExitSet, norm: Callable[[Tensor], Tensor], head: ExitHead, outcomes: int
    ) -> None:
        """`norm` and `head` are the model's last ones; `outcomes` is how many a hint names at most."""
        self.exits = exits
        self._norm = norm
        self._head = head
        self._outcomes = outcomes

    @torch.inference_mode()
    def read(self, layer: int, hidden: Tensor, current: Pass, elapsed_ms: Callable[[], float]) -> ExitMessage:
        """The outlook of the exit after `layer` on every session of the pass; `hidden` is [rows, hidden size]."""
        module = self.exits.modules[layer]
        scores = self._head(self._norm(module(hidden)), current.drafts, self._outcomes + 1)
        accepted = module.acceptance(scores.drafted, hidden, current.drafts).tolist()
        drafted = scores.drafted.tolist()
        candidates = [
            list(zip(tokens, log_probs, strict=True))
            for tokens, log_probs in zip(scores.tokens.tolist(), scores.log_probs.tolist(), strict=True)
        ]
        outlooks = []
        for rows in current.sessions:
            own = slice(rows.start, rows.start + len(rows.drafts) + 1)
            outcomes = rank_outcomes(
                drafted[own], accepted[own], rows.drafts, candidates[own], self._outcomes
            )
            outlooks.append(Outlook(rows.key, rows.base, outcomes))
        return ExitMessage(layer, elapsed_ms(), outlooks)
