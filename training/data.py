"""Makes training text by letting the target talk to itself: seeded, sharded, resumable.

All streams of a shard stand at the same position at every step, so that attention needs no mask and a step is a few
hundred launches whatever the batch; turns are told apart by small tensors on the device. A shard is a function of the
target, the seed, its number and its shape alone. No text from elsewhere is used, and nothing is filtered.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from shared.errors import ModelFilesError
from training.conversations import END_OF_TURN, Role, Segment, conversation
from training.llama import KeyValueCache, Target

FORMAT: Final = "outrider-data/1"
MOST_SEGMENTS: Final = 26
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DataPlan:
    """How much to sample, in which shapes. Every `long_every`-th shard holds long documents (0: none does)."""

    seed: int = 0
    tokens: int = 1_000_000
    streams: int = 64
    length: int = 512
    long_length: int = 1536
    long_every: int = 5
    max_seconds: float | None = None

    def shape(self, shard: int) -> tuple[int, int, bool]:
        """Streams, tokens a stream and whether they are long, of one shard."""
        if self.long_every and shard % self.long_every == self.long_every - 1:
            return max(1, self.streams * self.length // self.long_length), self.long_length, True
        return self.streams, self.length, False


@dataclass(frozen=True, slots=True)
class Shard:
    """Token ids `[streams, length]` and who each comes from."""

    tokens: Tensor
    roles: Tensor


class Turns:
    """Where each stream stands in its segments; decides which tokens are forced and where a turn ends."""

    def __init__(
        self, streams: Sequence[Sequence[Segment]], encode: Callable[[str], list[int]], device: torch.device
    ) -> None:
        kinds: dict[Segment, int] = {}
        plan = torch.zeros(len(streams), MOST_SEGMENTS, dtype=torch.long)
        for row, segments in enumerate(streams):
            for column, segment in enumerate(segments[:MOST_SEGMENTS]):
                plan[row, column:] = kinds.setdefault(segment, len(kinds))
        prefixes = [encode(segment.prefix) for segment in kinds]
        table = torch.zeros(len(kinds), max(map(len, prefixes)), dtype=torch.long)
        for row, prefix in enumerate(prefixes):
            table[row, : len(prefix)] = torch.tensor(prefix)

        def column_of(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self._plan = plan.to(device)
        self._prefixes = table.to(device)
        self._prefix_length = column_of([len(prefix) for prefix in prefixes], torch.long)
        self._least = column_of([segment.least for segment in kinds], torch.long)
        self._most = column_of([segment.most for segment in kinds], torch.long)
        self._role = column_of([int(segment.role) for segment in kinds], torch.long)
        self._temperature = column_of([segment.temperature for segment in kinds], torch.float32)
        self._end = encode(END_OF_TURN)[0]
        self._row = torch.arange(len(streams), device=device)
        self._segment = torch.zeros_like(self._row)
        self._offset = torch.zeros_like(self._row)

    def temperatures(self) -> Tensor:
        """The temperature at which each stream's next token is drawn."""
        return self._temperature[self._kind()]

    def may_end(self) -> Tensor:
        """Whether each stream's turn may end with the next token."""
        kind = self._kind()
        return self._offset - self._prefix_length[kind] >= self._least[kind]

    def advance(self, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that really come next, and their roles, given what the target would say."""
        kind = self._kind()
        forced = self._offset < self._prefix_length[kind]
        ended = ~forced & (sampled == self._end)
        over = ~forced & (ended | (self._offset - self._prefix_length[kind] >= self._most[kind]))
        own_role = self._role[kind]
        self._segment = self._segment + over.long()
        self._offset = torch.where(over, 0, self._offset)
        kind = self._kind()
        column = self._offset.clamp(max=self._prefixes.shape[1] - 1)
        tokens = torch.where(forced | over, self._prefixes[kind, column], sampled)
        kept = ~forced & (~over | (ended & (tokens == self._end)))
        self._offset = self._offset + 1
        return tokens, torch.where(kept, own_role, int(Role.FORCED))

    def _kind(self) -> Tensor:
        return self._plan[self._row, self._segment.clamp(max=MOST_SEGMENTS - 1)]


def draw(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row: the likeliest at temperature 0, else a sample (exponential races, no host sync)."""
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    scaled = logits - noise * temperatures[:, None]
    return scaled.argmax(dim=-1)


@torch.inference_mode()
def sample_shard(
    target: Target,
    tokenizer: Tokenizer,
    plan: DataPlan,
    shard: int,
    suppressed: Sequence[int],
    documents: Sequence[str] = (),
) -> Shard:
    """Samples one shard; `suppressed` ids (special tokens) are never drawn, `documents` are quoted in long streams."""
    rows, length, long = plan.shape(shard)
    device = target.embedding.device
    rng = random.Random(f"{plan.seed}/{shard}")
    streams = [conversation(rng, length=length, long=long, documents=documents) for _ in range(rows)]
    end = encoder(tokenizer)(END_OF_TURN)[0]
    turns = Turns(streams, encoder(tokenizer), device)
    generator = torch.Generator(device).manual_seed(plan.seed * 1_000_003 + shard)
    cache = KeyValueCache(target.config, rows, length, device, target.embedding.dtype)
    banned = torch.tensor(suppressed, device=device)
    said = torch.zeros(rows, length, dtype=torch.int32, device=device)
    roles = torch.zeros(rows, length, dtype=torch.uint8, device=device)
    tokens, role = turns.advance(torch.zeros(rows, dtype=torch.long, device=device))
    for position in range(length):
        said[:, position] = tokens
        roles[:, position] = role
        if position + 1 == length:
            break
        hidden = target.decoder.aligned(target.embed(tokens[:, None]), position, cache)
        logits = target.logits(hidden[:, 0]).float()
        logits[:, banned] = -torch.inf
        logits[:, end].masked_fill_(~turns.may_end(), -torch.inf)
        tokens, role = turns.advance(draw(logits, turns.temperatures(), generator))
    return Shard(said.cpu(), roles.cpu())


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Text to ids, special tokens understood, none added."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def special_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids of all special tokens but the end of a turn."""
    end = tokenizer.token_to_id(END_OF_TURN)
    if end is None:
        raise ModelFilesError(
            f"the tokenizer has no {END_OF_TURN}: a ChatML model is needed to talk to itself"
        )
    added = tokenizer.get_added_tokens_decoder()
    return sorted(number for number, token in added.items() if token.special and number != end)


def shard_path(directory: Path, shard: int) -> Path:
    """Where shard number `shard` lies."""
    return directory / f"shard-{shard:05d}.safetensors"


def write_shard(directory: Path, shard: int, content: Shard, header: dict[str, str]) -> None:
    """Writes a shard so that it is there whole or not at all."""
    path = shard_path(directory, shard)
    part = path.with_suffix(".part")
    tensors = {"tokens": content.tokens.to(torch.uint16), "roles": content.roles}
    if int(content.tokens.max()) >= 1 << 16:
        tensors["tokens"] = content.tokens
    save_file(tensors, part, metadata=header)
    part.rename(path)


def read_shard(path: Path) -> Shard:
    """Reads a shard; raises `ModelFilesError` when it is corrupt."""
    try:
        with safe_open(path, framework="pt") as opened:
            if (opened.metadata() or {}).get("format") != FORMAT:
                raise ModelFilesError(f"{path} is no shard of training data ({FORMAT})")
            return Shard(opened.get_tensor("tokens").to(torch.int32), opened.get_tensor("roles"))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFilesError(
            f"{path} can't be read ({error}); delete it and run `outrider train data`"
        ) from None


def shards(directory: Path) -> list[Path]:
    """The shards of a data directory in order; raises `ModelFilesError` when there is none."""
    found = sorted(directory.glob("shard-*.safetensors"))
    if not found:
        raise ModelFilesError(
            f"{directory} holds no shards; run `outrider train data --out {directory}` first"
        )
    return found


def make_data(
    target: Target,
    tokenizer: Tokenizer,
    plan: DataPlan,
    directory: Path,
    *,
    target_sha256: str,
    say: Progress = print,
) -> int:
    """Samples until `plan` is met, leaving complete shards alone. Returns the tokens there are then.

    Raises `ModelFilesError` when the directory was begun with another plan or target.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _check_manifest(directory, plan, target_sha256)
    suppressed = special_tokens(tokenizer)
    header = {"format": FORMAT, "target_sha256": target_sha256, "seed": str(plan.seed)}
    began, total, made, shard = time.monotonic(), 0, 0, 0
    while total < plan.tokens:
        rows, length, _ = plan.shape(shard)
        if not shard_path(directory, shard).exists():
            if plan.max_seconds is not None and time.monotonic() - began > plan.max_seconds:
                break
            quotable = documents(directory, tokenizer, plan, shard) if plan.shape(shard)[2] else []
            content = sample_shard(target, tokenizer, plan, shard, suppressed, quotable)
            write_shard(directory, shard, content, {**header, "shard": str(shard)})
            made += rows * length
            seconds = time.monotonic() - began
            said = float((content.roles >= Role.GREEDY).float().mean())
            say(
                f"data: shard {shard} ({rows}×{length}, {said:.0%} answers), {total + rows * length:,} of "
                f"{plan.tokens:,} tokens, {made / seconds:,.0f} tokens/s"
            )
        total += rows * length
        shard += 1
    return total


def documents(
    directory: Path, tokenizer: Tokenizer, plan: DataPlan, shard: int, least: int = 120
) -> list[str]:
    """Answers of `least` tokens or more in the last shard of short streams before `shard`, as text."""
    before = next((number for number in range(shard - 1, -1, -1) if not plan.shape(number)[2]), None)
    if before is None:
        return []
    content = read_shard(shard_path(directory, before))
    found = []
    for tokens, roles in zip(content.tokens.tolist(), content.roles.tolist(), strict=True):
        for role, run in itertools.groupby(range(len(roles)), roles.__getitem__):
            places = list(run)
            if role >= Role.GREEDY and len(places) >= least:
                found.append([tokens[place] for place in places])
    return [text.strip() for text in tokenizer.decode_batch(found)]


def _check_manifest(directory: Path, plan: DataPlan, target_sha256: str) -> None:
    fixed = {key: value for key, value in asdict(plan).items() if key not in ("tokens", "max_seconds")}
    manifest = {"format": FORMAT, "target_sha256": target_sha256, **fixed}
    path = directory / "data.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != manifest:
            raise ModelFilesError(
                f"{path} was begun with other settings ({found}); give the same ones or another directory"
            )
        return
    path.write_text(json.dumps(manifest, indent=1))


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def held_out_count(streams: int) -> int:
    """How many of a group's first streams are never trained on."""
    return max(1, min(streams // 50, 64))


def batches(
    tokens: Sequence[Tensor], roles: Sequence[Tensor], *, batch_tokens: int, seed: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Endless seeded batches of about `batch_tokens` tokens: (epoch, ids `[rows, length]`, roles).

    Every group of streams of one length is dealt out once an epoch; groups are interleaved by size.
    """
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 7919 + epoch)
        deck: list[tuple[float, int, Tensor]] = []
        for group, rows in enumerate(tokens):
            size = max(1, batch_tokens // rows.shape[1])
            order = torch.randperm(len(rows), generator=generator)
            whole = [order[at : at + size] for at in range(0, len(rows) - size + 1, size)] or [order]
            keys = torch.rand(len(whole), generator=generator).tolist()
            deck += [(key, group, picked) for key, picked in zip(keys, whole, strict=True)]
        for _, group, picked in sorted(deck, key=lambda entry: entry[0]):
            chosen = picked.to(tokens[group].device)
            yield epoch, tokens[group][chosen].long(), roles[group][chosen]
        epoch += 1


def load_groups(directory: Path, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """All shards of a directory on `device`, grouped by stream length: ids and roles."""
    groups: dict[int, list[Shard]] = {}
    for path in shards(directory):
        shard = read_shard(path)
        groups.setdefault(shard.tokens.shape[1], []).append(shard)
    ordered = [groups[length] for length in sorted(groups)]
    tokens = [torch.cat([shard.tokens for shard in group]).to(device) for group in ordered]
    return tokens, [torch.cat([shard.roles for shard in group]).to(device) for group in ordered]
