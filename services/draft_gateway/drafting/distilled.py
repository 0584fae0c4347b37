"""A distilled draft: few-bit weights from files that say which target they were made for, run with int8 kernels.

The directory holds `draft-*.safetensors`, each with the same header: `format` = "outrider-draft/1", `config` (the
Llama's shape as JSON), `target_sha256` and `tokenizer_sha256` of the target that it was distilled from. The output
vocabulary is reduced (`draft_vocab`: ascending ids of the target's tokens); its rows embed these tokens too. All others
are read through product-quantised rows, and can be said while they stand in the context.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from services.draft_gateway.drafting.network import Choices, Layer, Projection, Words
from services.draft_gateway.drafting.packed import product_rows, unpack
from shared.errors import ModelFilesError
from shared.sampling.logits import Vocabulary
from shared.sampling.ratio import Truncation
from shared.sampling.rules import Row

FORMAT: Final = "outrider-draft/1"
PATTERN: Final = "draft-*.safetensors"
HEADER_KEYS: Final = ("format", "config", "target_sha256", "tokenizer_sha256")


def is_distilled(directory: Path) -> bool:
    """Whether a directory holds a distilled draft rather than a Hugging Face checkpoint."""
    return any(directory.glob(PATTERN))


def read_distilled(directory: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of all files; `ModelFilesError` when one is missing, corrupt or of another draft."""
    from safetensors import SafetensorError, safe_open

    header: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    files = sorted(directory.glob(PATTERN))
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found: dict[str, str] = opened.metadata() or {}
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelFilesError(f"{file} can't be read: {error}") from None
        header = header or found
        if found.get("format") != FORMAT or any(found.get(key) != header.get(key) for key in HEADER_KEYS):
            raise ModelFilesError(f"{file} is not of the same {FORMAT} draft as its neighbours")
    if len(files) != int(header.get("files", len(files))) or not files:
        raise ModelFilesError(f"{directory} holds {len(files)} of {header.get('files', 'some')} draft files")
    return header, tensors


def check_made_for(
    header: Mapping[str, str], *, target_sha256: str | None, tokenizer_sha256: str, what: str
) -> None:
    """`ModelFilesError` when `what` was trained for another target; one whose weights are not here has no checksum."""
    for key, own in (("tokenizer_sha256", tokenizer_sha256), ("target_sha256", target_sha256)):
        if own is not None and header.get(key) != own:
            raise ModelFilesError(
                f"{what} was trained for a target with {key} {str(header.get(key))[:12]}…, this one's is "
                f"{own[:12]}…; train one with `outrider train`"
            )


class Int8Projection:
    """A matrix of int8 values with a scale a row; inputs are quantised to 8 bits a row as they come.

    Values of six bits leave room for the 16-bit sums of CPUs without a dot-product instruction, so that all 8 bits of
    the input can be used.
    """

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        zeros = torch.zeros(len(values), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            matrix = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(matrix, None)

    def __call__(self, values: Tensor) -> Tensor:
        """`values @ matrix.T`; one scale a row, also where rows share a call."""
        if values.numel() == values.shape[-1]:
            product: Tensor = torch.ops.quantized.linear_dynamic(values, self._packed, False)
            return product
        most = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8)
        scaled: Tensor = torch.ops.quantized.linear_dynamic(values / most, self._packed, False)
        return scaled * most


def _projection(values: Tensor, scales: Tensor) -> Projection:
    if torch.backends.quantized.engine in ("x86", "fbgemm"):
        return Int8Projection(values, scales)
    weight = values.float() * scales[:, None]
    return lambda rows: F.linear(rows, weight)


class DistilledNetwork:
    """The weights of a distilled draft."""

    def __init__(self, tensors: Mapping[str, Tensor], layers: int, vocab_size: int) -> None:
        """`ModelFilesError` when a tensor is missing."""
        try:
            self._vocabulary = tensors["draft_vocab"].long()
            self._values, self._scales = unpack(tensors["head.packed"]), tensors["head.scales"]
            self._rare_codes, self._rare_books = tensors["rare_codes"], tensors["rare_books"].float()
            self.norm = tensors["norm"]
            self.layers: Sequence[Layer] = [_layer(tensors, f"layers.{index}.") for index in range(layers)]
        except KeyError as error:
            raise ModelFilesError(f"the draft lacks the tensor {error}") from None
        self._head = _projection(self._values, self._scales)
        common = len(self._vocabulary)
        slots = torch.full((vocab_size,), -1)
        slots[self._vocabulary] = torch.arange(common)
        self._rare_ids = (slots < 0).nonzero()[:, 0]
        slots[self._rare_ids] = common + torch.arange(len(self._rare_ids))
        if len(self._rare_ids) != len(self._rare_codes):
            raise ModelFilesError(
                f"the draft embeds {common} + {len(self._rare_codes)} tokens, the target has {vocab_size}"
            )
        self._slots = slots
        self._columns = Vocabulary(self._vocabulary.numpy())

    def embed(self, tokens: Tensor) -> Tensor:
        """See `Network`."""
        slots = self._slots[tokens]
        rare = slots - len(self._vocabulary)
        common = slots.clamp(max=len(self._vocabulary) - 1)
        embedded = self._values[common].float() * self._scales[common].unsqueeze(-1)
        where = rare >= 0
        if bool(where.any()):
            embedded[where] = product_rows(self._rare_codes[rare[where]], self._rare_books)
        return embedded

    def words(self, tokens: Sequence[int]) -> Words | None:
        """The context's tokens that the vocabulary lacks."""
        rare = self._slots[torch.tensor(tokens)] - len(self._vocabulary)
        rare = torch.unique(rare[rare >= 0])
        if not len(rare):
            return None
        return Words(self._rare_ids[rare], product_rows(self._rare_codes[rare], self._rare_books))

    def choose(
        self,
        hidden: Tensor,
        words: Words | None,
        draws: Sequence[Row | None] = (),
        truncations: Sequence[Truncation | None] = (),
    ) -> Choices:
        """See `Network`."""
        logits = self._head(hidden)
        if words is not None:
            logits = torch.cat((logits, F.linear(hidden, words.rows)), dim=-1)
        if draws:
            columns = self._columns if words is None else self._columns.with_more(words.ids.numpy())
            return Choices.drawn(logits, columns, draws, truncations)
        return Choices.of(
            logits, self._vocabulary if words is None else torch.cat((self._vocabulary, words.ids))
        )


def _layer(tensors: Mapping[str, Tensor], prefix: str) -> Layer:
    def projection(name: str) -> Projection:
        return _projection(unpack(tensors[f"{prefix}{name}.packed"]), tensors[f"{prefix}{name}.scales"])

    return Layer(
        attention_norm=tensors[f"{prefix}attention_norm"],
        qkv=projection("qkv"),
        output=projection("out"),
        mlp_norm=tensors[f"{prefix}mlp_norm"],
        gate_up=projection("gate_up"),
        down=projection("down"),
    )


def config_of(header: Mapping[str, str]) -> dict[str, Any]:
    """The draft's shape, as in a `config.json`."""
    try:
        found = json.loads(header["config"])
    except (KeyError, ValueError):
        raise ModelFilesError("the draft's header holds no config") from None
    return {"model_type": "llama", **found}
