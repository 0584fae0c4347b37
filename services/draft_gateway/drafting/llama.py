"""A small Llama-family model as draft engine: plain torch, a KV cache a session, lanes batched over their shared prefix.

Any Hugging Face directory of the family will do that has the target's tokenizer. A tensor `draft_vocab` in the checkpoint
reduces the output vocabulary: its head has as many rows, and row i stands for the target's token `draft_vocab[i]`.

A session's cache follows its context: what both have in common is kept, the rest is rolled back by forgetting it. One lane
alone drafts straight into that cache. Several lanes see the cache up to where their contexts part, and each goes on in a
small cache of its own (a branch); when the next context goes on from one of them, the session's cache takes it over. So no
accepted token is computed again. Lanes of all sessions that wait take each step together: reading the weights, which
takes the time, is done once for all.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from services.draft_gateway.drafting.decoder import GROWTH, Cache, Decoder, Segment
from services.draft_gateway.drafting.distilled import (
    DistilledNetwork,
    check_made_for,
    config_of,
    is_distilled,
    read_distilled,
)
from services.draft_gateway.drafting.engine import (
    EMPTY,
    Alternative,
    Draft,
    DraftRequest,
    Dropped,
    Ready,
    none_dropped,
    none_told,
)
from services.draft_gateway.drafting.network import Choices, FloatNetwork, Network, Words
from services.draft_gateway.drafting.shape import LlamaShape, check_weights
from shared.errors import ModelFilesError
from shared.lookup import common_prefix
from shared.models import known_target_sha256, read_config, tokenizer_sha256, verify, weight_files
from shared.protocol import Tokens
from shared.sampling.conformal import ConformalRule, Sparsity
from shared.sampling.ratio import Drawn, Truncation
from shared.sampling.rules import Row

PREFILL_CHUNK: Final = 256
"""Tokens of a lane in one pass, at most."""


@dataclass(frozen=True, slots=True)
class _Branch:
    """What a lane left in its own cache: `tokens`, the one at position p at index p - `offset`, behind what is shared."""

    tokens: Tokens
    cache: Cache
    lane: int
    offset: int


@dataclass(slots=True)
class _Session:
    """What a session's cache holds, and the branches that set out from its end."""

    cache: Cache
    tokens: Tokens = ()
    branches: list[_Branch] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Positions that it takes up."""
        branches = {id(branch.cache): branch.cache for branch in self.branches}.values()
        return self.cache.capacity + sum(cache.lanes * cache.capacity for cache in branches)

    def follow(self, context: Tokens, capacity: int) -> None:
        """Keep, or take over from a branch, what agrees with `context`; have room for `capacity` positions."""
        known = common_prefix(self.tokens, context)
        self.cache.reserve(capacity, known)
        for branch in self.branches:
            agreed = common_prefix(branch.tokens, context)
            if agreed > known:
                lane = slice(branch.lane, branch.lane + 1)
                source = known - branch.offset
                self.cache.copy(branch.cache, lane, source=source, to=known, count=agreed - known)
                known = agreed
        self.tokens, self.branches = context[:known], []


@dataclass(slots=True)
class _Run:
    """The lanes of one session while they are drafted."""

    session: _Session
    requests: list[DraftRequest]
    lengths: list[int]
    """Tokens to draft for each lane."""
    words: Words | None
    cache: Cache
    shared: int
    padding: Tensor | None
    start: int
    pending: Tensor
    """Tokens `[lanes, n]` that are not in the cache yet."""
    choices: list[list[tuple[Alternative, ...]]]
    """For each lane what the model would say, step by step; the first of each is drafted."""
    drawn: list[list[Drawn]]
    """For each lane what its tokens were drawn from, in ratio mode."""
    thresholds: list[list[float]]
    """For each lane the conformal thresholds before its first row and after each."""
    sparsity: Sparsity

    def segment(self, count: int) -> Segment:
        """The first `count` pending tokens, which are pending no more."""
        taken, self.pending = self.pending[:, :count], self.pending[:, count:]
        prefix = self.session.cache if self.shared else None
        segment = Segment(taken, self.cache, self.start, prefix, self.shared, self.padding)
        self.start = segment.end
        return segment

    def add(self, choices: Choices) -> None:
        """The next step of each lane."""
        self.pending = choices.tokens[:, :1]
        rows = zip(choices.tokens.tolist(), choices.probabilities.tolist(), strict=True)
        for lane, (tokens, probabilities) in enumerate(rows):
            if self._lacks(lane):
                if choices.sparse and (sparse := choices.sparse[lane]) is not None:
                    self.drawn[lane].append(sparse)
                    after = self.sparsity.after(self.thresholds[lane][-1], sparse.dropped)
                    self.thresholds[lane].append(after)
                (best, *others) = zip(tokens, probabilities, strict=True)
                self.choices[lane].append((best, *(other for other in others if other[1] > 0.0)))

    def _lacks(self, lane: int) -> bool:
        return len(self.choices[lane]) < self.lengths[lane] + self.requests[lane].beyond

    def complete(self) -> list[int]:
        """Lanes whose last token has just been drafted."""
        steps = max(map(len, self.choices))
        return [
            lane for lane, length in enumerate(self.lengths) if steps == length == len(self.choices[lane])
        ]

    def wanted(self, dropped: Dropped) -> bool:
        """Whether a lane lacks steps that somebody waits for."""
        return any(self._lacks(lane) and not dropped(request) for lane, request in enumerate(self.requests))

    def draws(self) -> list[Row | None]:
        """How each lane's next token is drawn."""
        return [
            Row(request.rules, (*request.context, *(best for (best, _), *_ in choices)))
            if request.rules is not None
            else None
            for request, choices in zip(self.requests, self.choices, strict=True)
        ]

    def truncations(self) -> list[Truncation | None]:
        """What each lane's next token is drawn from, in ratio mode; nothing is drawn beyond the last one."""
        return [
            functools.partial(self.sparsity.keep, threshold=thresholds[-1])
            if request.rules is not None and request.rules.ratio and len(choices) < length
            else None
            for request, choices, length, thresholds in zip(
                self.requests, self.choices, self.lengths, self.thresholds, strict=True
            )
        ]

    def draft(self, lane: int) -> Draft:
        """What was drafted for a lane so far."""
        choices = self.choices[lane]
        drafted = [best for best, *_ in choices[: self.lengths[lane]]]
        return Draft(
            tuple(token for token, _ in drafted),
            tuple(sure for _, sure in drafted),
            tuple(choices),
            tuple(drawn.row for drawn in self.drawn[lane]),
            tuple(self.thresholds[lane][1:]),
        )

    def leave(self) -> None:
        """Note what the caches hold now."""
        held = [(*request.context, *self.draft(lane).tokens) for lane, request in enumerate(self.requests)]
        if self.cache is self.session.cache:
            self.session.tokens = held[0][: self.start]
            return
        if len(self.session.tokens) < self.shared:  # dropped before all was there that branches set out from
            return
        padding = [0] * len(held) if self.padding is None else self.padding.tolist()
        self.session.branches = [
            _Branch(tokens[: self.shared + self.start - empty], self.cache, lane, self.shared - empty)
            for lane, (tokens, empty) in enumerate(zip(held, padding, strict=True))
        ]


class LlamaDraft:
    """A draft engine around a small Llama. Not thread-safe; `Drafter` gives it a thread."""

    immediate: Final = False

    def __init__(
        self,
        name: str,
        shape: LlamaShape,
        network: Network,
        *,
        cache_tokens: int = 65536,
        sparsity: Sparsity | None = None,
    ) -> None:
        """`sparsity` says what of its distributions travels in ratio mode."""
        self.name: Final = name
        self._shape = shape
        self._network = network
        self._decoder = Decoder(shape, network)
        self._cache_tokens = cache_tokens
        self._sparsity: Sparsity = sparsity or ConformalRule()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        target: Path,
        threads: int,
        cache_tokens: int,
        sparsity: Sparsity | None = None,
    ) -> LlamaDraft:
        """Read a checkpoint; `ModelFilesError` when it is missing, damaged or has another tokenizer than `target`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if is_distilled(directory):
            name, shape, network = cls._distilled(directory, target)
            torch.set_num_threads(threads)
            return cls(name, shape, network, cache_tokens=cache_tokens, sparsity=sparsity)
        verify(directory)
        shape = LlamaShape.of(read_config(directory))
        if tokenizer_sha256(directory) != tokenizer_sha256(target):
            raise ModelFilesError(
                f"{directory.name} has another tokenizer than the target {target.name}: their token ids differ"
            )
        weights: dict[str, Tensor] = {}
        for path in weight_files(directory):
            try:
                weights |= load_file(path)
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelFilesError(f"{path} can't be read: {error}") from None
        check_weights(weights, shape)
        torch.set_num_threads(threads)
        network = FloatNetwork(weights, shape.layers)
        return cls(directory.name, shape, network, cache_tokens=cache_tokens, sparsity=sparsity)

    @staticmethod
    def _distilled(directory: Path, target: Path) -> tuple[str, LlamaShape, Network]:
        header, tensors = read_distilled(directory)
        check_made_for(
            header,
            target_sha256=known_target_sha256(target),
            tokenizer_sha256=tokenizer_sha256(target),
            what=f"the draft {directory.name}",
        )
        shape = LlamaShape.of(config_of(header))
        network = DistilledNetwork(tensors, shape.layers, shape.vocabulary)
        return f"draft for {header.get('target', target.name)}", shape, network

    # --- drafting -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def draft(
        self,
        requests: Sequence[DraftRequest],
        dropped: Dropped = none_dropped,
        ready: Ready = none_told,
    ) -> list[Draft]:
        """Drafts of what the target would say if it were this model, all lanes of all sessions step by step together."""
        by_session: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            if request.context and self._length(request) > 0 and not dropped(request):
                by_session.setdefault(request.session, []).append(index)
        drafts: list[Draft] = [EMPTY] * len(requests)
        runs = {
            tuple(indexes): self._begin([requests[index] for index in indexes])
            for indexes in by_session.values()
        }
        numbers = {id(runs[indexes]): indexes for indexes in runs}

        def there(run: _Run, lane: int) -> None:
            ready(numbers[id(run)][lane], run.draft(lane))

        self._advance(list(runs.values()), dropped, there)
        for indexes, run in runs.items():
            run.leave()
            for lane, index in enumerate(indexes):
                drafts[index] = run.draft(lane)
        self._evict()
        return drafts

    def forget(self, session: str) -> None:
        """Drop the session's cache."""
        self._sessions.pop(session, None)

    def _length(self, request: DraftRequest) -> int:
        """How many tokens to draft: no more than the model's context window has room for."""
        return min(request.length, self._shape.context - len(request.context))

    def _begin(self, requests: list[DraftRequest]) -> _Run:
        """Line up a session's lanes behind what they share."""
        contexts = [request.context for request in requests]
        lengths = [self._length(request) for request in requests]
        session = self._sessions.get(requests[0].session)
        if session is None:
            session = self._sessions[requests[0].session] = _Session(Cache(self._shape, 1, GROWTH))
        self._sessions.move_to_end(requests[0].session)
        if len(requests) == 1:
            session.follow(contexts[0][:-1], len(contexts[0]) + lengths[0])
            start = len(session.tokens)
            cache, shared, padding, suffixes = session.cache, 0, None, [contexts[0][start:]]
        else:
            common = min(common_prefix(contexts[0], context) for context in contexts)
            shared, start = min(common, *(len(context) - 1 for context in contexts)), 0
            session.follow(contexts[0][:shared], shared)
            suffixes = [context[shared:] for context in contexts]
            longest = max(map(len, suffixes))
            cache = Cache(self._shape, len(requests), longest + max(lengths))
            padding = torch.tensor([longest - len(suffix) for suffix in suffixes])
            suffixes = [(*[0] * (longest - len(suffix)), *suffix) for suffix in suffixes]
        return _Run(
            session=session,
            requests=requests,
            lengths=lengths,
            words=self._network.words((*contexts[0], *itertools.chain(*suffixes[1:]))),
            cache=cache,
            shared=shared,
            padding=padding,
            start=start,
            pending=torch.tensor(suffixes),
            choices=[[] for _ in requests],
            drawn=[[] for _ in requests],
            thresholds=[
                [self._sparsity.first if request.threshold is None else request.threshold]
                for request in requests
            ],
            sparsity=self._sparsity,
        )

    def _advance(self, runs: list[_Run], dropped: Dropped, there: Callable[[_Run, int], None]) -> None:
        """Draft token by token until no lane is wanted any more; tell which lanes have all their tokens."""
        runs = self._filled(runs, dropped)
        while runs:
            hidden = self._decoder.forward([run.segment(run.pending.shape[1]) for run in runs])
            for run, choices in zip(runs, self._choose(runs, hidden), strict=True):
                run.add(choices)
                for lane in run.complete():
                    there(run, lane)
            runs = [run for run in runs if run.wanted(dropped)]

    def _filled(self, runs: list[_Run], dropped: Dropped) -> list[_Run]:
        """Compute, chunk by chunk, what is too long for a step; those that were dropped meanwhile are left out."""
        filling, filled = [(run, self._chunks(run)) for run in runs], list[_Run]()
        while filling:
            chunks: list[tuple[_Run, Iterator[Segment], Segment]] = []
            for run, rest in filling:
                if (chunk := next(rest, None)) is None:
                    filled.append(run)
                else:
                    chunks.append((run, rest, chunk))
            if chunks:
                self._decoder.forward([chunk for _, _, chunk in chunks])
            filling = [(run, rest) for run, rest, _ in chunks if run.wanted(dropped)]
        return filled

    @staticmethod
    def _chunks(run: _Run) -> Iterator[Segment]:
        """What to compute before the lanes' first step."""
        session, context = run.session, run.requests[0].context
        for start in range(len(session.tokens), run.shared, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, run.shared)
            yield Segment(torch.tensor([context[start:end]]), session.cache, start)
            session.tokens = context[:end]
        while run.pending.shape[1] > PREFILL_CHUNK:
            yield run.segment(PREFILL_CHUNK)

    def _choose(self, runs: list[_Run], hidden: Tensor) -> list[Choices]:
        """For each run the likeliest tokens of each lane: at once, unless their words differ."""
        sizes = [len(run.requests) for run in runs]
        if all(run.words is None for run in runs):
            draws = [row for run in runs for row in run.draws()]
            truncations = [kept for run in runs for kept in run.truncations()]
            return self._network.choose(hidden, None, draws if any(draws) else (), truncations).split(sizes)
        chosen = []
        for run, rows in zip(runs, torch.split(hidden, sizes), strict=True):
            draws = run.draws()
            chosen.append(
                self._network.choose(rows, run.words, draws if any(draws) else (), run.truncations())
            )
        return chosen

    def _evict(self) -> None:
        """Drop the sessions that were used longest ago while all together hold too much; one may stay."""
        total = sum(session.size for session in self._sessions.values())
        while total > self._cache_tokens and len(self._sessions) > 1:
            total -= self._sessions.popitem(last=False)[1].size
