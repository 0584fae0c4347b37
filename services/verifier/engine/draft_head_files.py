"""Files of draft heads: what they must say of themselves.

A head that can't be used costs drafts, never service: the floor drafts from the text alone and a note says why. A file's
metadata: `format` = "outrider-draft-head/1", `target_sha256` and `tokenizer_sha256` (see `shared.models`), and `shape`, JSON
with the fields of `HeadShape`. Its tensors, for each matrix of a `DraftHead`: `<matrix>.values`, whole numbers of seven
bits, and `<matrix>.scales`, one a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from services.verifier.engine.draft_head import DraftHead, HeadShape
from services.verifier.engine.exit_files import OFF, TargetFacts, check_target, read_tensors
from services.verifier.engine.int8 import LARGEST
from shared.errors import ModelFilesError

FILE_FORMAT: Final = "outrider-draft-head/1"
WHAT: Final = "draft head"


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """A head, where there is one; `label` and `notes` are what `EngineInfo` says."""

    head: DraftHead | None = None
    label: str = OFF
    notes: tuple[str, ...] = ()


def load_head(file: Path | None, target: TargetFacts, num_layers: int) -> LoadedHead:
    """The head in `file`; never fails for the file's sake."""
    if file is None:
        return LoadedHead()
    try:
        return LoadedHead(read_head(file, target, num_layers), file.name)
    except ModelFilesError as error:
        return LoadedHead(notes=(f"{error.message}; the floor drafts from the text alone",))


def read_head(file: Path, target: TargetFacts, num_layers: int) -> DraftHead:
    """A written head in float32; `ModelFilesError` when it is unreadable or was made for another target."""
    header, tensors = read_tensors(file, WHAT)
    if header.get("format") != FILE_FORMAT:
        raise ModelFilesError(f"draft head {file}: format is {header.get('format')!r}, not {FILE_FORMAT!r}")
    check_target(file, WHAT, header, target)
    try:
        fields = json.loads(header["shape"])
        shape = HeadShape(**{**fields, "layers": tuple(fields["layers"])})
        if shape.hidden_size != target.hidden_size or shape.layers[-1] != num_layers:
            raise ModelFilesError(
                f"draft head {file} reads {shape.hidden_size} values after layer {shape.layers[-1]}, the target has "
                f"{target.hidden_size} and {num_layers}"
            )
        head = DraftHead(shape)
        head.load_state_dict({name: _matrix(tensors, name) for name in head.state_dict()})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ModelFilesError(f"draft head {file}: {error!r}: it doesn't hold what its header says") from None
    if not all(bool(torch.isfinite(each).all()) for each in head.state_dict().values()):
        raise ModelFilesError(f"draft head {file} holds values that are no finite numbers")
    return head.requires_grad_(False).eval()


def _matrix(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[f"{name}.values"].float() * tensors[f"{name}.scales"].float()[:, None]


def write_head(path: Path, head: DraftHead, header: Mapping[str, str]) -> int:
    """Write a head with its header; returns the size in bytes."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, weight in head.state_dict().items():
        matrix = weight.detach().float().cpu()
        scales = matrix.abs().amax(dim=1).clamp(min=1e-8) / LARGEST
        tensors[f"{name}.values"] = (matrix / scales[:, None]).round().to(torch.int8).contiguous()
        tensors[f"{name}.scales"] = scales
    part = path.with_suffix(".part")
    save_file(
        tensors, part, metadata={**header, "format": FILE_FORMAT, "shape": json.dumps(asdict(head.shape))}
    )
    part.chmod(0o644)
    part.rename(path)
    return path.stat().st_size
