"""From a row of logits to a token, by vLLM's sampling parameters and by noise that draft, exits and target share.

A row is processed in vLLM's order: stop tokens masked before `min_tokens`, `logit_bias`, repetition, frequency and
presence penalty, temperature, `min_p`, `top_k`, `top_p`. A token is then drawn by the Gumbel-max trick (Gumbel 1954;
Maddison, Tarlow, Minka, arXiv 1411.0030): the largest of logits / temperature + noise is distributed as the softmax of
the first. Seen from here, sampling is greedy decoding of *perturbed logits*, logits + temperature · noise, so that
whatever ranks tokens and judges how sure a model is (hints, lanes, alternatives) works on them as it does on logits.

Noise costs more than logits do, so it is looked up only where it can matter (`_contenders`); nothing is lost by that.

Arrays are numpy's. Columns of a row are tokens, or stand for those of a `Vocabulary`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.protocol import Sampling
from shared.sampling import noise
from shared.sampling.noise import GROUP_BITS, Address, Place, Stream
from shared.sampling.rules import Row

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[Any]

FEW: Final = 2048
"""Tokens whose noise is looked up without asking whether it can matter."""
CHUNK: Final = 64
"""Values whose largest is found first, when the largest of all are sought."""
SLACK: Final = 1e-3
"""By how much single precision may be wrong where it chooses whose noise is looked up."""
LOWEST: Final = float(np.finfo(np.float32).min)
"""Below are only masked tokens."""
CUTS: Final = (8.0, 16.0, math.inf)
"""How far below the best the tokens of a nucleus are sought: natural logarithms of probability ratios."""


class Vocabulary:
    """The tokens that a row's columns stand for."""

    def __init__(self, ids: Ints, before: Vocabulary | None = None) -> None:
        """`ids` of the columns that follow those of `before`; none of them twice."""
        first = 0 if before is None else len(before.ids)
        self._parts: list[_Part] = [*(before._parts if before is not None else ()), _Part(ids, first)]
        self.ids: Final[Ints] = ids if before is None else np.concatenate((before.ids, ids))
        self.groups: Final[Ints] = self.ids >> GROUP_BITS
        """The groups of noise that they are of."""

    def with_more(self, ids: Ints) -> Vocabulary:
        """The same with further columns."""
        return Vocabulary(ids, self)

    def columns(self, tokens: Ints) -> Ints:
        """Their columns, -1 for tokens without one."""
        found = np.full(len(tokens), -1)
        for part in self._parts:
            part.find(tokens, found)
        return found


class _Part:
    """Columns from `first` on, found by their tokens."""

    def __init__(self, ids: Ints, first: int) -> None:
        self._order = np.argsort(ids)
        self._sorted = ids[self._order]
        self._first = first

    def find(self, tokens: Ints, columns: Ints) -> None:
        """Write the columns of those tokens that are here."""
        places = np.searchsorted(self._sorted, tokens).clip(max=len(self._sorted) - 1)
        known = self._sorted[places] == tokens
        columns[known] = self._order[places[known]] + self._first


@dataclass(frozen=True, slots=True)
class Best:
    """The best columns of each row `[rows, count]`, best first, with their perturbed logits, and the logarithm `[rows]`
    of the sum of all their exponentials (tokens that noise can't bring up count without it). `asked` `[rows]` are the
    perturbed logits of the columns asked for. A row with fewer columns left than `count` is filled up with -inf."""

    columns: Ints
    values: Floats
    total: Floats
    asked: Floats


# --- processing ---------------------------------------------------------------------------------------


def processed(logits: Floats, row: Row, vocabulary: Vocabulary | None = None) -> Floats:
    """A row's logits `[columns]`, penalised, divided by the temperature (if there is one), -inf where truncated."""
    kept = _keep(logits, row, vocabulary)
    if kept.columns is None:
        return kept.values
    found = np.full(len(logits), -np.inf, dtype=np.float32)
    found[kept.columns] = kept.values
    return found


class _Kept(NamedTuple):
    """What truncation left of a row: columns (None for all) and their processed logits."""

    columns: Ints | None
    values: Floats


def _keep(logits: Floats, row: Row, vocabulary: Vocabulary | None) -> _Kept:
    values = _penalised(np.array(logits, dtype=np.float32), row, vocabulary)
    temperature = row.rules.temperature
    if not temperature:
        return _Kept(None, values)
    values /= np.float32(temperature)
    return _truncated(values, row.rules.sampling)


def _penalised(values: Floats, row: Row, vocabulary: Vocabulary | None) -> Floats:
    """Mask, bias and penalties, in place."""
    rules, sampling = row.rules, row.rules.sampling
    if row.position < sampling.min_tokens and rules.stop_tokens:
        stops, _ = _known(np.array(rules.stop_tokens), vocabulary)
        before = values[stops]
        values[stops] = -np.inf
        if not np.isfinite(values.max()):  # a grammar leaves nothing but the end
            values[stops] = before
    if sampling.logit_bias:
        columns, known = _known(np.array([token for token, _ in sampling.logit_bias]), vocabulary)
        values[columns] += np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)[known]
    if rules.penalised:
        _penalise(values, row, vocabulary)
    return values


def _penalise(values: Floats, row: Row, vocabulary: Vocabulary | None) -> None:
    sampling = row.rules.sampling
    tokens = np.asarray(row.tokens, dtype=np.int64)
    if sampling.repetition_penalty != 1.0:
        columns, _ = _known(np.unique(tokens), vocabulary)
        said = values[columns]
        penalty = np.float32(sampling.repetition_penalty)
        values[columns] = np.where(said > 0, said * (np.float32(1.0) / penalty), said * penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        output, counts = np.unique(tokens[row.rules.prompt_length :], return_counts=True)
        columns, known = _known(output, vocabulary)
        values[columns] -= np.float32(sampling.frequency_penalty) * counts[known].astype(np.float32)
        values[columns] -= np.float32(sampling.presence_penalty)


def _known(tokens: Ints, vocabulary: Vocabulary | None) -> tuple[Ints, npt.NDArray[np.bool_] | slice]:
    """The columns of tokens that have one, and which these are."""
    if vocabulary is None:
        return tokens, slice(None)
    columns = vocabulary.columns(tokens)
    known = columns >= 0
    return columns[known], known


def _truncated(values: Floats, sampling: Sampling) -> _Kept:
    """What min_p, top_k and top_p leave, each of what the one before it left."""
    peak = values.max()
    columns: Ints | None = None
    if sampling.min_p > 0.0:
        columns = np.flatnonzero(values >= peak + np.float32(math.log(sampling.min_p)))
    left = values if columns is None else values[columns]
    if 0 < sampling.top_k < len(left):
        chosen = np.flatnonzero(left >= np.float32(_reached_by(left, sampling.top_k)))
        columns, left = chosen if columns is None else columns[chosen], left[chosen]
    if sampling.top_p < 1.0:
        chosen = _nucleus(left - peak, sampling.top_p)
        columns, left = chosen if columns is None else columns[chosen], left[chosen]
    return _Kept(columns, left)


def _nucleus(values: Floats, share: float) -> Ints:
    """The likeliest tokens until their probabilities reach `share` (Holtzman et al., arXiv 1904.09751)."""
    weights = np.exp(values)
    wanted = share * float(weights.sum(dtype=np.float64))
    for cut in CUTS:
        near = np.flatnonzero(values > -cut)
        mass = weights[near].astype(np.float64)
        if cut == math.inf or mass.sum() >= wanted:
            break
    order = np.argsort(-mass, kind="stable")
    before = np.cumsum(mass[order]) - mass[order]
    count = max(1, int(np.searchsorted(before, wanted)))  # those before which less than the share lies
    return near[order[:count]]


def _reached_by(values: Floats, count: int) -> float:
    """The `count`th largest value. It is at least as large as that of the chunks' largest ones, which are few."""
    chunks = len(values) // CHUNK
    if chunks > 2 * count:
        least = _reached_by(values[: chunks * CHUNK].reshape(-1, CHUNK).max(axis=1), count)
        values = values[values >= values.dtype.type(least)]
    return float(np.partition(values, len(values) - count)[len(values) - count])


# --- drawing ------------------------------------------------------------------------------------------


def draw(
    logits: Floats,
    rows: Sequence[Row],
    vocabulary: Vocabulary | None = None,
) -> Ints:
    """The column `[rows]` that each row of logits `[rows, columns]` yields."""
    return best(logits, rows, 1, vocabulary, totals=False).columns[:, 0]


def best(
    logits: Floats,
    rows: Sequence[Row],
    count: int,
    vocabulary: Vocabulary | None = None,
    *,
    asked: Ints | None = None,
    totals: bool = True,
    sure: int | None = None,
) -> Best:
    """The `count` best columns of each row of logits `[rows, columns]` by perturbed logits; the first is its draw.

    Where `sure` is given, the best so many are these; of the others some may be missing, which takes less time.
    """
    width = logits.shape[1]
    fields = [
        _Field(_keep(row_logits, row, vocabulary), row.rules.temperature, vocabulary, width)
        for row_logits, row in zip(logits, rows, strict=True)
    ]
    at = noise.addresses([place(row) for row in rows])
    _contenders(fields, at, sure or count)
    if asked is not None:
        for field, column in zip(fields, asked.tolist(), strict=True):
            field.ask(column)
    _perturb(fields, at)
    columns = np.zeros((len(rows), count), dtype=np.int64)
    values = np.full((len(rows), count), -np.inf)
    total = np.zeros(len(rows))
    told = np.full(len(rows), -np.inf)
    for number, field in enumerate(fields):
        order = field.ranked(count)
        columns[number, : len(order)] = field.columns[order]
        values[number, : len(order)] = field.perturbed[order]
        if totals:
            total[number] = field.total()
        if asked is not None:
            told[number] = field.told
    return Best(columns, values, total, told)


def place(row: Row) -> Place:
    """Where the noise is with which the target draws a row's token."""
    sampling = row.rules.sampling
    stream = Stream.RESIDUAL if row.rules.ratio else Stream.TARGET
    return Place(sampling.seed, sampling.choice, row.position, stream)


class _Field:
    """A row being drawn: what is left of it, and then those of its columns whose noise is looked up."""

    def __init__(self, kept: _Kept, temperature: float, vocabulary: Vocabulary | None, width: int) -> None:
        self.kept = kept
        self.temperature = temperature
        self.vocabulary = vocabulary
        self.width = width
        self.columns: Ints = np.empty(0, dtype=np.int64)
        """Contenders."""
        self.scaled: Floats = np.empty(0)
        self.perturbed: Floats = np.empty(0)
        self._places: Ints | None = None  # of the contenders in `kept`; None: all of it
        self._asked: int | None = None
        self.told = -math.inf

    @property
    def crowded(self) -> bool:
        """More is left than noise is looked up for without need."""
        return bool(self.temperature) and len(self.kept.values) > FEW

    def tokens(self, columns: Ints) -> Ints:
        """The tokens of columns."""
        return columns if self.vocabulary is None else self.vocabulary.ids[columns]

    def left_columns(self, places: Ints) -> Ints:
        """The columns of places in `kept`."""
        return places if self.kept.columns is None else self.kept.columns[places]

    def left_places(self, tokens: Ints) -> Ints:
        """The places in `kept` of those tokens that are left."""
        if self.vocabulary is None:
            columns = tokens[tokens < self.width]
        else:
            columns = self.vocabulary.columns(tokens)
            columns = columns[columns >= 0]
        if self.kept.columns is None:
            return columns
        return np.flatnonzero(np.isin(self.kept.columns, columns))

    def spread(self, of_groups: Floats) -> Floats:
        """What each group has, at each place of `kept`."""
        columns = self.kept.columns
        if self.vocabulary is not None:
            groups = self.vocabulary.groups if columns is None else self.vocabulary.groups[columns]
        elif columns is None:
            return np.repeat(of_groups, noise.GROUP)[: self.width]
        else:
            groups = columns >> GROUP_BITS
        spread: Floats = of_groups[groups]
        return spread

    def admit(self, places: Ints | None) -> None:
        """Make contenders of what stands at these places of `kept`, or of all."""
        self._places = places
        if places is None:
            self.scaled = self.kept.values.astype(np.float64)
            self.columns = np.arange(self.width) if self.kept.columns is None else self.kept.columns
        else:
            self.scaled = self.kept.values[places].astype(np.float64)
            self.columns = self.left_columns(places)

    def ask(self, column: int) -> None:
        """Have the noise of one column more looked up."""
        where = np.flatnonzero(self.columns == column)
        if len(where):
            self._asked = int(where[0])
            return
        value = -math.inf
        if self.kept.columns is None:
            value = float(self.kept.values[column])
        elif len(found := np.flatnonzero(self.kept.columns == column)):
            value = float(self.kept.values[found[0]])
        self._asked = len(self.columns)
        self.columns = np.append(self.columns, column)
        self.scaled = np.append(self.scaled, value)

    def add(self, gumbel: Floats) -> None:
        """Take in the contenders' noise."""
        self.perturbed = (self.scaled + gumbel) * self.temperature if self.temperature else self.scaled
        if self._asked is not None:
            self.told = float(self.perturbed[self._asked])

    def ranked(self, count: int) -> Ints:
        """Contenders, best first."""
        if count == 1:
            return np.array([self.perturbed.argmax()])
        if len(self.perturbed) > 4 * count:
            near = np.argpartition(-self.perturbed, count)[:count]
            return near[np.argsort(-self.perturbed[near], kind="stable")]
        return np.argsort(-self.perturbed, kind="stable")[:count]

    def total(self) -> float:
        """Logarithm of the sum of all exponentials: contenders' with noise, the others' without."""
        peak = float(self.perturbed.max())
        sum_ = float(np.exp(self.perturbed - peak).sum())
        if self._places is not None:
            rest = np.exp(self.kept.values * np.float32(self.temperature) - np.float32(peak))
            sum_ += max(0.0, float(rest.sum()) - float(rest[self._places].sum()))
        return peak + math.log(sum_)


def _contenders(fields: Sequence[_Field], at: Address, count: int) -> None:
    """Choose whose noise is looked up: whoever can be among the `count` best of its row.

    No token has more noise than its group's peak, and the peak's owner has exactly that. With the owners, and the likeliest
    tokens, whose noise is looked up first, `count` values are known that the best have to reach.
    """
    crowded = [number for number, field in enumerate(fields) if field.crowded]
    for field in fields:
        if not field.crowded:
            field.admit(None)
    if not crowded:
        return
    likeliest = [_largest(fields[number].kept.values, count) for number in crowded]
    tokens = [
        fields[number].tokens(fields[number].left_columns(places))
        for number, places in zip(crowded, likeliest, strict=True)
    ]
    first = noise.gumbel(at.take(np.repeat(crowded, count)), np.concatenate(tokens)).reshape(-1, count)
    groups = 1 + max(_highest(fields[number]) for number in crowded) // noise.GROUP
    peaks, owners = noise.peak_gumbel(at.take(crowded).column(), np.arange(groups)[None])
    for number, places, known, peak, owner in zip(crowded, likeliest, first, peaks, owners, strict=True):
        field = fields[number]
        values = field.kept.values
        most = values + field.spread(peak.astype(np.float32))
        owns = field.left_places((np.arange(groups) << GROUP_BITS) + owner)
        reached = np.concatenate((values[places] + known, most[np.setdiff1d(owns, places)]))
        needed = reached.max() if count == 1 else np.partition(reached, len(reached) - count)[-count]
        field.admit(np.flatnonzero(most >= np.float32(max(needed - SLACK, LOWEST))))


def _highest(field: _Field) -> int:
    return field.width - 1 if field.vocabulary is None else int(field.vocabulary.ids.max())


def _largest(values: Floats, count: int) -> Ints:
    """Places of the `count` largest."""
    if count == 1:
        return np.array([values.argmax()])
    near = np.flatnonzero(values >= np.float32(_reached_by(values, count)))
    return near[np.argsort(-values[near], kind="stable")[:count]]


def _perturb(fields: Sequence[_Field], at: Address) -> None:
    """Look the contenders' noise up, all at once."""
    drawn = [number for number, field in enumerate(fields) if field.temperature]
    for field in fields:
        if not field.temperature:
            field.add(field.scaled)
    if not drawn:
        return
    sizes = [len(fields[number].columns) for number in drawn]
    tokens = np.concatenate([fields[number].tokens(fields[number].columns) for number in drawn])
    gumbel = noise.gumbel(at.take(np.repeat(drawn, sizes)), tokens)
    for number, part in zip(drawn, np.split(gumbel, np.cumsum(sizes)[:-1]), strict=True):
        fields[number].add(part)
