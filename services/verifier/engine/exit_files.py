"""Files of trained exits: what they must say of themselves, and what serves where they can't be used.

One that can't be used costs hints, never service: the untrained exits take over and a note says why. A file's metadata:
`format` = "outrider-exits/1", `target_sha256` and `tokenizer_sha256` (see `shared.models`), `hidden_size`, `layers`
("18,21,24"), and perhaps `calibration`, JSON with a `Calibration` for each layer. Its tensors: `exit_vocab`, the token ids
that exits may name, `<layer>.<parameter>` of a `TrainedExit` for each layer, and perhaps `head.reduce`, `head.restore` and
`head.tail` (see `exit_head.Naming`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from services.verifier.engine.exit_head import Naming
from services.verifier.engine.exit_modules import JUDGEMENT_INPUTS, ExitModule, TrainedExit
from shared.errors import ModelFilesError
from shared.models import target_sha256
from shared.speculation.outcomes import Calibration

FILE_FORMAT: Final = "outrider-exits/1"
WHAT: Final = "exit modules"
UNTRAINED: Final = "untrained"
OFF: Final = "off"


@dataclass(frozen=True, slots=True)
class ExitSet:
    """The exits that a model runs with: a module per layer, how they name tokens, and how `EngineInfo` describes them."""

    modules: Mapping[int, ExitModule]
    label: str
    notes: tuple[str, ...] = ()
    naming: Naming = field(default_factory=Naming)

    def described(self, dtype: torch.dtype) -> dict[str, Any]:
        """What `EngineInfo` says of the exits, and of the `dtype` that the model computes in; without a draft head, and with
        weights as they are."""
        return {
            "exit_layers": sorted(self.modules),
            "exits": self.label,
            "draft_head": OFF,
            "compact": 1.0,
            "notes": list(self.notes),
            "dtype": str(dtype).removeprefix("torch."),
        }


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a file of trained exits must have been made for."""

    directory: Path
    hidden_size: int
    vocab_size: int
    epsilon: float
    dtype: torch.dtype


def load_exits(layers: Sequence[int], file: Path | None, target: TargetFacts) -> ExitSet:
    """Exits after `layers`: trained where `file` has them, untrained otherwise; never fails for the file's sake."""
    untrained: dict[int, ExitModule] = {layer: ExitModule() for layer in layers}
    if not layers:
        return ExitSet({}, OFF)
    if file is None:
        return ExitSet(untrained, UNTRAINED)
    try:
        trained, naming = read_exits(file, target)
    except ModelFilesError as error:
        return ExitSet(untrained, UNTRAINED, (f"{error.message}; untrained exits serve instead",))
    missing = [layer for layer in layers if layer not in trained]
    notes = (f"{file.name} has no exit after layers {_listed(missing)}: untrained there",) if missing else ()
    modules = {layer: trained.get(layer, untrained[layer]) for layer in layers}
    return ExitSet(modules, f"trained: {file.name}", notes, naming)


def read_exits(file: Path, target: TargetFacts) -> tuple[dict[int, TrainedExit], Naming]:
    """The trained exits in `file` by layer, and how they name tokens; `ModelFilesError` when it is unreadable or
    was made for another target."""
    header, tensors = read_tensors(file, WHAT)
    _check_header(file, header, target)
    calibrations = _calibrations(file, header)
    exits = {layer: _exit(file, layer, tensors, target) for layer in _layers(file, header)}
    for layer, module in exits.items():
        module.calibration = calibrations.get(layer, Calibration())
    return exits, _naming(file, tensors, target)


def read_tensors(file: Path, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file; `ModelFilesError` says that `what` it is can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            return opened.metadata() or {}, tensors
    except (OSError, SafetensorError) as error:
        raise ModelFilesError(f"{what} {file} can't be read ({error})") from error


def check_target(file: Path, what: str, header: Mapping[str, str], target: TargetFacts) -> None:
    """`ModelFilesError` when a file was trained for another target."""
    own = target_sha256(target.directory)
    if header.get("target_sha256") != own:
        raise ModelFilesError(
            f"{what} {file}: trained for the target {str(header.get('target_sha256'))[:12]}…, "
            f"{target.directory} is {own[:12]}…"
        )


def _check_header(file: Path, header: dict[str, str], target: TargetFacts) -> None:
    expected = {"format": FILE_FORMAT, "hidden_size": str(target.hidden_size)}
    for name, value in expected.items():
        if header.get(name) != value:
            raise ModelFilesError(
                f"exit modules {file}: {name} is {header.get(name)!r}, this target needs {value!r}"
            )
    check_target(file, WHAT, header, target)


def _layers(file: Path, header: dict[str, str]) -> list[int]:
    listed = header.get("layers", "")
    try:
        return [int(layer) for layer in listed.split(",")]
    except ValueError:
        raise ModelFilesError(f"exit modules {file}: layers are {listed!r}, not such as '18,24,27'") from None


def _calibrations(file: Path, header: Mapping[str, str]) -> dict[int, Calibration]:
    try:
        found = json.loads(header.get("calibration", "{}"))
        calibrations = {int(layer): Calibration.from_json(fields) for layer, fields in found.items()}
        if any(len(each.judgement) not in (0, JUDGEMENT_INPUTS) for each in calibrations.values()):
            raise ValueError
        return calibrations
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelFilesError(f"exit modules {file}: the header's calibration can't be read") from None


def _vocabulary(file: Path, tensors: Mapping[str, Tensor], target: TargetFacts) -> Tensor:
    found = tensors.get("exit_vocab")
    if found is None or found.ndim != 1 or not len(found):
        raise ModelFilesError(f"exit modules {file}: exit_vocab is missing or no list of tokens")
    if not bool(((found >= 0) & (found < target.vocab_size)).all()):
        raise ModelFilesError(
            f"exit modules {file}: exit_vocab names tokens beyond the vocabulary of {target.vocab_size}"
        )
    return found.long()


def _naming(file: Path, tensors: Mapping[str, Tensor], target: TargetFacts) -> Naming:
    vocabulary = _vocabulary(file, tensors, target)
    reduce, restore, tail = (tensors.get(f"head.{name}") for name in ("reduce", "restore", "tail"))
    if reduce is None or restore is None or tail is None:
        return Naming(vocabulary)
    if reduce.shape[1:] != (target.hidden_size,) or restore.shape != reduce.T.shape or tail.numel() != 1:
        raise ModelFilesError(
            f"exit modules {file}: head.reduce {list(reduce.shape)} and head.restore {list(restore.shape)} don't fit a "
            f"hidden size of {target.hidden_size}"
        )
    return Naming(vocabulary, reduce.float(), restore.float(), float(tail))


def _exit(file: Path, layer: int, tensors: Mapping[str, Tensor], target: TargetFacts) -> TrainedExit:
    own = {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{layer}.")
    }
    try:
        module = TrainedExit(
            target.hidden_size,
            width=len(own["gate.weight"]),
            judge_rank=len(own["judge.state.weight"]),
            judge_width=len(own["judge.first.weight"]),
            eps=target.epsilon,
        )
        module.load_state_dict(own)
    except KeyError as error:
        raise ModelFilesError(f"exit modules {file}: {error} of layer {layer} is missing") from None
    except (RuntimeError, TypeError) as error:
        raise ModelFilesError(f"exit modules {file}: layer {layer} does not fit: {error}") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in own.values()):
        raise ModelFilesError(f"exit modules {file}: layer {layer} holds values that are no finite numbers")
    return module.to(target.dtype).eval()


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
