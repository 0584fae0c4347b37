"""The weights that come with Outrider: for some targets a distilled draft, trained early exits and a draft head, made by
`training`.

They are found by what they were made for, never by name: a draft has to share the target's tokenizer, exits and heads its
very weights. Reads headers only. Beside the draft lies `foresight.json`, what measurement says of draft and exits together
(see `shared.speculation.outcomes`).

    training/weights/<target>/draft/draft-*.safetensors
    training/weights/<target>/draft/foresight.json
    training/weights/<target>/exits.safetensors
    training/weights/<target>/draft-head.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

from shared.errors import ModelFilesError
from shared.models import known_target_sha256, read_metadata, tokenizer_sha256
from shared.speculation.outcomes import Calibration, Foresight, Mixture

WEIGHTS: Final = Path(__file__).parents[1] / "training" / "weights"
FORESIGHT: Final = "foresight.json"
FORESIGHT_FORMAT: Final = "outrider-foresight/1"


def shipped_draft(target: Path) -> Path:
    """The directory of the draft that comes with Outrider for the target; `ModelFilesError` when there is none."""
    return _made_for(target, WEIGHTS.glob("*/draft/draft-1.safetensors"), "draft").parent


def shipped_exits(target: Path) -> Path:
    """The file of trained exits that comes with Outrider for the target; `ModelFilesError` when there is none."""
    return _made_for(target, WEIGHTS.glob("*/exits.safetensors"), "trained exits")


def shipped_head(target: Path) -> Path:
    """The file of the draft head that comes with Outrider for the target; `ModelFilesError` when there is none."""
    return _made_for(target, WEIGHTS.glob("*/draft-head.safetensors"), "draft head")


def _made_for(target: Path, files: Iterable[Path], what: str) -> Path:
    """The file whose header names the target. The weights are hashed only where the tokenizer is the same; where there
    are none, the tokenizer decides."""
    own_tokenizer = tokenizer_sha256(target)
    damaged = []
    for file in sorted(files):
        try:
            made_for = read_metadata(file)
        except ModelFilesError as error:
            damaged.append(error.message)
            continue
        if made_for.get("tokenizer_sha256") != own_tokenizer:
            continue
        if known_target_sha256(target) in (None, made_for.get("target_sha256")):
            return file
    reasons = "".join(f"; {reason}" for reason in damaged)
    raise ModelFilesError(
        f"no {what} for {target.name} came with Outrider (`outrider train` makes them){reasons}"
    )


def read_foresight(draft: Path) -> Foresight:
    """What lies beside a draft's weights; plain assumptions where nothing does. `ModelFilesError` when it is damaged."""
    path = draft / FORESIGHT
    if not path.exists():
        return Foresight()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORESIGHT_FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORESIGHT_FORMAT!r}")
        return Foresight(
            Calibration.from_json(found["own"]),
            {
                int(layer): Mixture.from_json(int(layer), fields)
                for layer, fields in found["mixtures"].items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFilesError(f"{path} can't be read ({error})") from None


def write_foresight(draft: Path, foresight: Foresight, made_for: Mapping[str, str]) -> None:
    """Put what was measured beside a draft's weights; `made_for` says for which target."""
    content = {
        "format": FORESIGHT_FORMAT,
        **made_for,
        "own": asdict(foresight.own),
        "mixtures": {str(layer): asdict(mixture) for layer, mixture in foresight.mixtures.items()},
    }
    (draft / FORESIGHT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
