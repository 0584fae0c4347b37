"""What the two modes of sampling are worth with the pair that ships: `scripts/bench sampling`.

Two measurements on the same prompts, by the code that serves: the draft engine, the noise, the test of ratio mode, the
bytes of a distribution, the link's frames. The target is computed here, in float32, without vLLM.

*Rounds*: answers from beginning to end, a block of five at a time, in keyed mode and in ratio mode with a fixed number of
tokens a row and with a conformal choice of it. Nothing but blocks goes up (no lanes, no forwards), so that bytes are
those of the paper's setting.

*Rows*: along the answers of keyed mode, what would be accepted of the next token: in keyed mode whether draft and target
draw the same one, in ratio mode the probability Σ min(p, q) that the drawn one holds, for many choices of q. These
are the same rows for all of them, and free of the luck of the draw: what acceptance costs in bytes is read off them.

`sampling.json` holds the figures by family and over all, `sampling.md` tells them, `rows.svg` draws bytes against
acceptance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from loadtest.sampling_report import as_markdown, draw_chart, equal_acceptance
from services.draft_gateway.drafting.engine import Draft, DraftRequest
from services.draft_gateway.drafting.llama import LlamaDraft
from services.draft_gateway.link.frames import encode as encode_frame
from shared.errors import InvalidRequest
from shared.models import default_target
from shared.pair import shipped_draft
from shared.protocol import Block, ReplyRoute, Sampling, SamplingMode, Tokens
from shared.sampling.conformal import ConformalRule, FixedCount, Sparsity
from shared.sampling.logits import Floats, draw, processed
from shared.sampling.noise import Place
from shared.sampling.ratio import SHARE_BITS, draft_uniform, judge, path_number, probabilities
from shared.sampling.rules import Row, Rules
from shared.sampling.sparse import Candidate, SparseRow, dropped_mass, encode, quantised
from shared.speculation.outcomes import level
from shared.text import Tokenizer
from training.evaluate import FAMILIES, Prompt, read_prompts
from training.llama import KeyValueCache, Target, load_target

BLOCK: Final = 5
COUNTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
TARGETS: Final = (0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
FIXED: Final = 4
"""Tokens a row in the rounds with a fixed number: about what the conformal choice keeps."""
SESSION: Final = "cmpl-0123456789abcdef0123456789abcdef"
REPLY: Final = ReplyRoute(gateway="bench", partition=0)


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `count` prompts of each family, answers of `most_tokens`."""

    prompts: Path
    out: Path
    count: int = 10
    most_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 7
    threads: int = 1


class LiveTarget:
    """The target on one text: rows of logits after a block, and its cache as the text grows."""

    def __init__(self, target: Target, prompt: Tokens, most: int) -> None:
        self._target = target
        device, dtype = target.embedding.device, target.embedding.dtype
        self._cache = KeyValueCache(target.config, 1, len(prompt) + most + BLOCK + 1, device, dtype)
        self._known = len(prompt) - 1
        with torch.inference_mode():
            target.decoder.aligned(target.embed(torch.tensor([prompt[:-1]])), 0, self._cache)

    @torch.inference_mode()
    def logits(self, text: Tokens, block: Tokens) -> Floats:
        """After the last token of `text` and each of `block`, `[K + 1, vocabulary]`."""
        new = torch.tensor([(*text[self._known :], *block)])
        positions = torch.arange(self._known, self._known + new.shape[1])[None]
        hidden, _ = self._target.decoder.ragged(self._target.embed(new), positions, self._cache)
        self._known = len(text)
        found: Floats = self._target.logits(hidden[0, -len(block) - 1 :]).numpy()
        return found


# --- rounds -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """Counts of one way of sampling, of a family or of all."""

    rounds: int = 0
    tokens: int = 0
    tested: int = 0
    accepted: int = 0
    drafted: int = 0
    q_bytes: int = 0
    frame_bytes: int = 0
    row_tokens: int = 0

    def add(self, other: Tally) -> None:
        """Take in what was counted elsewhere."""
        for name in Tally.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, float]:
        """Per round, per token; `acceptance` is that of a token which is tested."""
        return {
            "tokens_per_round": self.tokens / self.rounds,
            "acceptance": self.accepted / self.tested,
            "tokens_per_row": self.row_tokens / self.drafted,
            "q_bits_per_drafted": 8 * self.q_bytes / self.drafted,
            "q_bytes_per_committed": self.q_bytes / self.tokens,
            "frame_bytes_per_committed": self.frame_bytes / self.tokens,
            "rounds": self.rounds,
            "tokens": self.tokens,
        }


class _Bound:
    """Both ends of a link know the session by a number, as after `Bind`."""

    reply = REPLY

    def number(self, session: str) -> int:
        return 1

    def session(self, number: int) -> str:
        return SESSION


def frame_bytes(draft: Draft, number: int, base: int) -> int:
    """What a block takes on the link."""
    levels = tuple(level(sure) for sure in draft.confidences)
    block = Block(
        session=SESSION,
        epoch=1,
        reply=REPLY,
        round=number,
        base=base,
        tokens=draft.tokens,
        confidences=levels,
        q=encode(draft.rows, draft.tokens),
    )
    return len(encode_frame(block, _Bound()))


def play(
    engine: LlamaDraft, target: Target, prompt: Prompt, sampling: Sampling, ends: frozenset[int], most: int
) -> tuple[Tokens, Tally]:
    """One answer, round by round."""
    rules = Rules(sampling, len(prompt.tokens), tuple(ends))
    live = LiveTarget(target, prompt.tokens, most)
    said: list[int] = []
    tally = Tally()
    threshold: float | None = None
    text = prompt.tokens
    said.append(_judged(live.logits(text, ()), text, (), (), rules)[0])  # the prefill's
    while len(said) < most and said[-1] not in ends:
        text = (*prompt.tokens, *said)
        request = DraftRequest(prompt.question, 0, text, BLOCK, rules=rules, threshold=threshold)
        (draft,) = engine.draft([request])
        found = _judged(live.logits(text, draft.tokens), text, draft.tokens, draft.rows, rules)
        accepted = len(found) - 1
        ended = next((n for n, token in enumerate(found) if token in ends), len(found))
        found = found[: ended + 1]
        if draft.thresholds:
            threshold = draft.thresholds[min(accepted, len(draft.thresholds) - 1)]
        tally.add(
            Tally(
                rounds=1,
                tokens=len(found),
                tested=min(accepted + 1, len(draft.tokens)),
                accepted=accepted,
                drafted=len(draft.tokens),
                q_bytes=len(encode(draft.rows, draft.tokens)),
                frame_bytes=frame_bytes(draft, tally.rounds, len(said)),
                row_tokens=sum(len(row.tokens) for row in draft.rows),
            )
        )
        said += found
    engine.forget(prompt.question)
    return tuple(said), tally


def _judged(
    logits: Floats, text: Tokens, block: Tokens, drawn_from: Sequence[SparseRow], rules: Rules
) -> list[int]:
    """What a pass says: the drafted tokens that hold, and the target's next one."""
    rows = [Row(rules, (*text, *block[:length])) for length in range(len(block) + 1)]
    if rules.ratio:
        accepted, next_token = judge(lambda row: logits[row], rows, block, drawn_from)
        return [*block[:accepted], next_token]
    drawn: list[int] = draw(logits, rows).tolist()
    held = next((n for n, token in enumerate(block) if token != drawn[n]), len(block))
    return drawn[: held + 1]


# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Recorder:
    """A sparsity that keeps everything, and every row that it saw."""

    first: float = 0.0
    seen: list[list[Candidate]] = field(default_factory=list)

    def keep(self, candidates: Sequence[Candidate], threshold: float) -> list[Candidate]:
        """See `Sparsity`."""
        self.seen.append(list(candidates))
        return self.seen[-1]

    def after(self, threshold: float, dropped: float) -> float:
        """See `Sparsity`."""
        return threshold


@dataclass(frozen=True, slots=True)
class TrueRow:
    """A place in an answer: the draft's likeliest tokens with its probabilities and the target's, and whether keyed mode
    accepts; `place` and `path` say where its noise is."""

    candidates: list[Candidate]
    target: Mapping[int, float]
    agreed: bool
    place: Place
    path: int


def true_rows(
    engine: LlamaDraft, recorder: Recorder, target: Target, prompt: Prompt, answer: Tokens, sampling: Sampling
) -> Iterator[TrueRow]:
    """Every place of an answer, the first one (which no draft is asked for) left out."""
    keyed = Rules(sampling, len(prompt.tokens))
    ratio = Rules(sampling.model_copy(update={"mode": SamplingMode.RATIO}), len(prompt.tokens))
    text = (*prompt.tokens, *answer)
    with torch.inference_mode():
        cache = KeyValueCache(target.config, 1, len(text), torch.device("cpu"), target.embedding.dtype)
        hidden = target.decoder.aligned(target.embed(torch.tensor([text])), 0, cache)
        logits = target.logits(hidden[0, len(prompt.tokens) - 1 : -1]).numpy()
    for at in range(1, len(answer)):
        context = text[: len(prompt.tokens) + at]
        (own,) = engine.draft([DraftRequest(prompt.question, 0, context, 1, rules=keyed)])
        engine.draft([DraftRequest(prompt.question, 0, context, 1, rules=ratio)])
        candidates = recorder.seen.pop()
        p = probabilities(processed(logits[at], Row(keyed, context)))
        target_shares = {token: float(p[token]) for token, _ in candidates}
        place = Place(sampling.seed, sampling.choice, at)
        yield TrueRow(candidates, target_shares, own.tokens[0] == answer[at], place, path_number(answer[:at]))
    engine.forget(prompt.question)


@dataclass(slots=True)
class Price:
    """What one choice of q accepts, and costs: sums over rows."""

    rows: int = 0
    acceptance: float = 0.0
    dropped: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def figures(self) -> dict[str, float]:
        """Means a row."""
        return {
            "acceptance": self.acceptance / self.rows,
            "dropped": self.dropped / self.rows,
            "tokens_per_row": self.tokens / self.rows,
            "bits_per_row": 8 * self.bytes / self.rows,
        }


def priced(answers: Sequence[Sequence[TrueRow]], sparsity: Sparsity, bits: int) -> Price:
    """A choice of q along all answers, its bytes counted in blocks."""
    price = Price()
    for rows in answers:
        threshold = sparsity.first
        sparse: list[SparseRow] = []
        drawn: list[int] = []
        for row in rows:
            kept = sparsity.keep(row.candidates, threshold)
            dropped = dropped_mass(kept)
            threshold = sparsity.after(threshold, dropped)
            q = quantised(kept, bits)
            sparse.append(q)
            drawn.append(q.draw(draft_uniform(row.place, row.path)))
            price.rows += 1
            price.acceptance += sum(min(q.probability(token), row.target[token]) for token in q.tokens)
            price.dropped += dropped
            price.tokens += len(q.tokens)
        for first in range(0, len(sparse), BLOCK):
            price.bytes += len(encode(sparse[first : first + BLOCK], drawn[first : first + BLOCK]))
    return price


def conformal(target: float) -> ConformalRule:
    """The rule with another target, and a first threshold in proportion."""
    default = ConformalRule()
    return replace(
        default, target=target, first=min(default.highest, default.first * target / default.target)
    )


def prices(answers: Sequence[Sequence[TrueRow]]) -> dict[str, Any]:
    """Fixed counts and conformal choices of several sizes."""
    default = ConformalRule()
    return {
        "fixed": [
            {"count": count, **priced(answers, FixedCount(count), SHARE_BITS).figures()} for count in COUNTS
        ],
        "conformal": [
            {"target": target, **priced(answers, conformal(target), SHARE_BITS).figures()}
            for target in TARGETS
        ],
        "share_bits": [{"bits": bits, **priced(answers, default, bits).figures()} for bits in range(2, 9)],
    }


# --- the run ------------------------------------------------------------------------------------------------------


def measure(options: Options, target_directory: Path) -> dict[str, Any]:
    """All figures; answers and progress are told as they come."""
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.load(target_directory)
    prompts = chosen(options, tokenizer)
    target = load_target(target_directory, device="cpu", dtype=torch.float32)
    asked = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    ratio = asked.model_copy(update={"mode": SamplingMode.RATIO})
    ways: dict[str, tuple[Sampling, Sparsity]] = {
        "keyed": (asked, ConformalRule()),
        "conformal": (ratio, ConformalRule()),
        f"top {FIXED}": (ratio, FixedCount(FIXED)),
    }
    rounds: dict[str, dict[str, Tally]] = {}
    answers: list[Tokens] = []
    for way, (sampling, sparsity) in ways.items():
        engine = load_draft(target_directory, sparsity, options.threads)
        rounds[way] = {}
        began = time.monotonic()
        for prompt in prompts:
            said, tally = play(engine, target, prompt, sampling, tokenizer.stop_tokens, options.most_tokens)
            for name in (prompt.family, "all"):
                rounds[way].setdefault(name, Tally()).add(tally)
            if way == "keyed":
                answers.append(said)
        print(f"sampling: {way}: {len(prompts)} answers in {time.monotonic() - began:.0f} s", flush=True)
    recorder = Recorder()
    engine = load_draft(target_directory, recorder, options.threads)
    by_family: dict[str, list[list[TrueRow]]] = {"all": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        rows = list(true_rows(engine, recorder, target, prompt, answer, asked))
        by_family["all"].append(rows)
        by_family.setdefault(prompt.family, []).append(rows)
    costs = prices(by_family["all"])
    return {
        "options": {name: value for name, value in asdict(options).items() if name not in ("out", "prompts")},
        "prompts": len(prompts),
        "rounds": {
            way: {family: tally.figures() for family, tally in tallies.items()}
            for way, tallies in rounds.items()
        },
        "rows": {family: row_figures(found) for family, found in by_family.items()},
        "prices": costs,
        "at_equal_acceptance": equal_acceptance(costs["fixed"], costs["conformal"]),
    }


def row_figures(answers: Sequence[Sequence[TrueRow]]) -> dict[str, float]:
    """What keyed mode and ratio mode accept of the same rows."""
    rows = [row for answer in answers for row in answer]
    keyed = float(np.mean([row.agreed for row in rows]))
    whole = float(
        np.mean([sum(min(share, row.target[token]) for token, share in row.candidates) for row in rows])
    )
    conformal = priced(answers, ConformalRule(), SHARE_BITS).figures()
    return {
        "rows": len(rows),
        "keyed": keyed,
        "ratio": whole,
        "ratio_conformal": conformal["acceptance"],
        "keyed_bound": whole / (2.0 - whole),
        "keyed_by_ratio": keyed / whole,
        "keyed_by_conformal": keyed / conformal["acceptance"],
        "bits_per_row": conformal["bits_per_row"],
    }


def load_draft(target: Path, sparsity: Sparsity, threads: int) -> LlamaDraft:
    """The draft that ships, with a choice of what travels."""
    return LlamaDraft.load(
        shipped_draft(target), target=target, threads=threads, cache_tokens=1 << 16, sparsity=sparsity
    )


def chosen(options: Options, tokenizer: Tokenizer) -> list[Prompt]:
    """`count` prompts of each family, evenly spread."""
    every = read_prompts(options.prompts, tokenizer, None)
    found = []
    for family in ("mt_bench", *FAMILIES):
        own = [prompt for prompt in every if prompt.family == family]
        count = min(options.count, len(own))
        found += [own[number * len(own) // count] for number in range(count)]
    if not found:
        raise InvalidRequest(f"{options.prompts} holds none of the families that are measured")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench sampling`."""
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="JSON lines, as Spec-Bench's"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--count", type=int, default=10, help="prompts of each family (default: 10)")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of an answer (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="default: 0.8")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: 1")
    parser.add_argument("--target", type=Path, metavar="DIR", help="by default the one that ships")


def run(chosen_options: argparse.Namespace) -> int:
    """Measure, write, print."""
    options = Options(
        prompts=chosen_options.prompts,
        out=chosen_options.out,
        count=chosen_options.count,
        most_tokens=chosen_options.max_tokens,
        temperature=chosen_options.temperature,
        top_p=chosen_options.top_p,
    )
    found = measure(options, chosen_options.target or default_target())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sampling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "sampling.md").write_text(as_markdown(found), encoding="utf-8")
    draw_chart(options.out / "rows.svg", found)
    print(as_markdown(found))
    return 0
