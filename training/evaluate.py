"""Measures a pair on prompts: what the draft, the lookup and both are worth, and what the exits foresee.

The target's greedy continuations come first (kept in the output directory, so that a second run starts from them); on
them every figure is counted. Writes `evaluate.json`, `evaluate.md` and charts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from services.draft_gateway.drafting.engine import DraftEngine, DraftRequest
from services.draft_gateway.drafting.hybrid import HybridDraft, Worths
from services.draft_gateway.drafting.llama import LlamaDraft
from services.draft_gateway.drafting.lookup import PromptLookup
from services.verifier.engine.exit_files import ExitSet
from services.verifier.engine.exit_head import Naming, best_head
from services.verifier.engine.exit_modules import TrainedExit, quickest
from services.verifier.engine.exits import ExitReader, Pass, VerifiedRows
from shared.errors import InvalidRequest, ModelFilesError
from shared.models import target_sha256
from shared.pair import read_foresight
from shared.protocol import Tokens
from shared.speculation.outcomes import Foresight
from shared.text import Tokenizer
from training import outcomes
from training.charts import line_chart
from training.draft import DraftModel, choices, read_draft
from training.exits import load_exits
from training.llama import KeyValueCache, Target, load_target
from training.progress import Say
from training.rollout import Continuation, along, greedy
from training.rounds import Drafter, Tally, empty, play
from training.simulate import Record, play_rounds

BLOCKS: Final = range(1, 9)
BLOCK: Final = 5
THRESHOLDS: Final = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
FAMILIES: Final = ("translation", "summarization", "qa", "math_reasoning", "rag")
TIMED: Final = 30


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, as tokens, and the task family it belongs to."""

    question: str
    family: str
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class EvaluatePlan:
    """What to measure, and with how much of it. `exits` may be missing; then only drafts are measured."""

    target: Path
    draft: Path
    exits: Path | None
    prompts: Path
    out: Path
    most_tokens: int = 256
    limit: int | None = None
    round_texts: int | None = None
    device: str = "cpu"
    threads: int = 1


def read_prompts(path: Path, tokenizer: Tokenizer, limit: int | None) -> list[Prompt]:
    """Prompts of a Spec-Bench file (JSON lines with `question_id`, `category`, `turns`); first turns only.

    Raises `InvalidRequest` that names the line when one is malformed. With `limit`, evenly spread ones.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"the prompts {path} can't be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            category, turn = str(fields["category"]), str(fields["turns"][0])
        except (ValueError, KeyError, IndexError, TypeError):
            raise InvalidRequest(
                f'{path}:{number} is not of the form {{"question_id": …, "category": …, "turns": ["…"]}}'
            ) from None
        family = category if category in FAMILIES else "mt_bench"
        tokens = tokenizer.encode_chat([{"role": "user", "content": turn}])
        prompts.append(Prompt(str(fields.get("question_id", number)), family, tokens))
    if not prompts:
        raise InvalidRequest(f"{path} holds no prompts")
    if limit is not None and limit < len(prompts):
        prompts = [prompts[index * len(prompts) // limit] for index in range(limit)]
    return prompts


def references(
    target: Target, prompts: Sequence[Prompt], plan: EvaluatePlan, end: int, say: Say
) -> list[Continuation]:
    """The target's greedy continuations, from `references.json` in the output directory as far as it has them."""
    path = plan.out / "references.json"
    key = {"target_sha256": target_sha256(plan.target), "most_tokens": plan.most_tokens}
    kept: dict[str, dict[str, list[int]]] = {}
    if path.exists():
        found = json.loads(path.read_text())
        if found.get("key") == key:
            kept = found["texts"]
    missing = [
        prompt for prompt in prompts if kept.get(prompt.question, {}).get("prompt") != list(prompt.tokens)
    ]
    missing.sort(key=lambda prompt: len(prompt.tokens))
    for at in range(0, len(missing), 24):
        group = missing[at : at + 24]
        said = greedy(target, [prompt.tokens for prompt in group], most=plan.most_tokens, end=end)
        for prompt, text in zip(group, said, strict=True):
            kept[prompt.question] = {"prompt": list(text.prompt), "tokens": list(text.tokens)}
        path.write_text(json.dumps({"key": key, "texts": kept}))
        say(f"evaluate: {min(at + 24, len(missing))} of {len(missing)} continuations")
    return [Continuation(prompt.tokens, tuple(kept[prompt.question]["tokens"])) for prompt in prompts]


def draft_choices(
    draft: DraftModel, texts: Sequence[Continuation], device: torch.device, say: Say
) -> list[list[int]]:
    """The draft's first choice after every token of every text."""
    dtype = draft.head.dtype

    def score(tokens: Tensor) -> Tensor:
        return choices(draft, tokens, draft.decoder.full(draft.embed(tokens, dtype))[0])[0]

    found: list[list[int]] = []
    for at in range(0, len(texts), 24):
        part = [text.text for text in texts[at : at + 24]]
        found += [row.tolist() for row in along(part, score, device)]
        say(f"evaluate: draft's choices on {min(at + 24, len(texts))} of {len(texts)} texts")
    return found


class _Said:
    """A draft engine that repeats what a model is known to choose along one text. Its blocks are right or cut short."""

    name: Final = "known"
    immediate: Final = True

    def __init__(self, chosen: Sequence[int]) -> None:
        self._chosen = chosen

    def draft(
        self, requests: Sequence[DraftRequest], dropped: object = None, ready: object = None
    ) -> list[Any]:
        from services.draft_gateway.drafting.engine import Draft

        drafts = []
        for request in requests:
            at = len(request.context) - 1
            tokens = tuple(self._chosen[at : at + request.length])
            drafts.append(Draft(tokens, (1.0,) * len(tokens)))
        return drafts

    def forget(self, session: str) -> None:
        """Nothing is kept."""


def engine_drafter(engine: DraftEngine, session: str, text: Tokens) -> Drafter:
    """A drafter for `play` around an engine that sees the true text."""

    def drafter(position: int, block: int) -> Sequence[int]:
        return engine.draft([DraftRequest(session, 0, text[:position], block)])[0].tokens

    return drafter


def tallies(
    drafters: Callable[[int], Drafter], prompts: Sequence[Prompt], texts: Sequence[Continuation], block: int
) -> dict[str, Tally]:
    """Rounds over all texts with blocks of `block`, by family and together ("all")."""
    found: dict[str, Tally] = {"all": empty(block)}
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        played = play(text.text, len(text.prompt) + 1, block, drafters(index))
        found[prompt.family] = found.get(prompt.family, empty(block)) + played
        found["all"] = found["all"] + played
    return found


def drafting_figures(
    drafters: Callable[[int], Callable[[int], Drafter]],
    prompts: Sequence[Prompt],
    texts: Sequence[Continuation],
) -> dict[str, Any]:
    """Acceptance and tokens a round of one way of drafting; `drafters(block)(text)` drafts for one text."""
    by_block = {block: tallies(drafters(block), prompts, texts, block) for block in BLOCKS}
    at_block = by_block[BLOCK]
    families = {name: tally for name, tally in at_block.items() if name != "all"}
    return {
        "acceptance": at_block["all"].acceptance(),
        "acceptance_by_family": {name: tally.acceptance() for name, tally in families.items()},
        "acceptance_by_place": [at_block["all"].acceptance(place) for place in range(BLOCK)],
        "tokens_per_round": {str(block): by_block[block]["all"].tokens_per_round for block in BLOCKS},
        "tokens_per_round_by_family": {name: tally.tokens_per_round for name, tally in families.items()},
    }


def step_ms(engine: DraftEngine, texts: Sequence[Continuation], lanes: int) -> float:
    """Median ms of a drafted step with `lanes` lanes of one session, one thread, about 100 tokens of context."""
    timed = []
    for index in range(TIMED):
        context = tuple((texts[index % len(texts)].text * 8)[:100])
        requests = [
            DraftRequest(
                "timed", lane, context + ((texts[lane % len(texts)].text[lane],) if lanes > 1 else ()), 1
            )
            for lane in range(lanes)
        ]

        def spend(length: int, requests: Sequence[DraftRequest] = requests) -> float:
            asked = [DraftRequest(one.session, one.lane, one.context, length) for one in requests]
            began = time.perf_counter()
            engine.draft(asked)
            return time.perf_counter() - began

        spend(1)
        timed.append((spend(12) - spend(2)) * 100)
    engine.forget("timed")
    return statistics.median(timed)


def lookup_ms(texts: Sequence[Continuation]) -> float:
    """Median ms of a looked-up token."""
    lookup, timed = PromptLookup(), []
    for text in texts[:TIMED]:
        tokens = text.text
        for position in range(len(text.prompt) + 1, len(tokens), 7):
            began = time.perf_counter()
            found = lookup.draft([DraftRequest("timed", 0, tokens[:position], BLOCK)])[0]
            timed.append((time.perf_counter() - began) * 1000 / max(1, len(found.tokens)))
    return statistics.median(timed)


def exit_figures(
    record: Record, exits: Mapping[int, TrainedExit], depth: int, foresight: Foresight
) -> dict[str, Any]:
    """What the edge and each exit foresaw of the recorded verdicts.

    An exit's `verdict_in_best` is what the edge has after the hint, mixed with its own guess and the hints before it;
    `length_right` and `ece` are the hint's own. All figures of both are in `mixed` and `hint`.
    """
    guesses = outcomes.edge_guesses(record, foresight.own)
    own = [guessed.ranking(outcomes.KEPT, foresight.own) for guessed in guesses]
    found: dict[str, Any] = {"edge_guess": ranking_figures(own, record), "exits": []}
    hints: dict[int, outcomes.Rankings] = {}
    for layer, exit_ in sorted(exits.items()):
        hints[layer] = outcomes.exit_rankings(record, layer, exit_.calibration)
        mixed = outcomes.mixed_rankings(guesses, hints, foresight.mixture(layer))
        alone = ranking_figures(hints[layer], record)
        together = ranking_figures(mixed, record)
        found["exits"].append(
            {
                "layer": layer,
                "depth": layer / depth,
                "verdict_in_best": together["verdict_in_best"],
                "length_right": alone["length_right"],
                "ece": alone["ece"],
                "hint": alone,
                "mixed": together,
            }
        )
    return found


def ranking_figures(rankings: outcomes.Rankings, record: Record) -> dict[str, Any]:
    """How good rankings of the recorded rounds' outcomes are, and how well they keep what they promise."""
    promised = outcomes.promised(rankings, outcomes.HINTED)
    right = outcomes.right(rankings, record, outcomes.HINTED)
    return {
        "verdict_in_best": outcomes.in_best(rankings, record),
        "length_right": outcomes.length_right(rankings, record),
        "ece": outcomes.calibration_error(promised[:, :1], right[:, :1]),
        "ece_all_outcomes": outcomes.calibration_error(promised, right),
        "thresholds": outcomes.coverage(promised, right, THRESHOLDS),
        "reliability": reliability(promised[:, 0], right[:, 0]),
    }


def reliability(confidence: Tensor, correct: Tensor, bins: int = 10) -> list[tuple[float, float]]:
    """(mean confidence, share right) of equally filled bins."""
    order = confidence.argsort()
    pairs = zip(confidence[order].chunk(bins), correct[order].float().chunk(bins), strict=True)
    return [(sure.mean().item(), held.mean().item()) for sure, held in pairs]


@torch.inference_mode()
def exit_step_ratio(
    target: Target, exits: Mapping[int, TrainedExit], naming: Naming, sessions: int = 1
) -> float:
    """Time of all exits over that of a verification pass of one block a session, medians on this machine.

    The exits are read by the verifier's own `ExitReader`.
    """
    device, dtype, rows = target.embedding.device, target.embedding.dtype, BLOCK + 1
    cache = KeyValueCache(target.config, sessions, 256, device, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, target.config.vocab_size, (sessions, 200), generator=generator).to(device)
    target.decoder.aligned(target.embed(tokens), 0, cache)
    block, positions = tokens[:, :rows], torch.arange(200, 200 + rows, device=device).repeat(sessions, 1)
    head = best_head(target.logits, target.head.data, naming)
    modules = {layer: quickest(exit_) for layer, exit_ in exits.items()}
    reader = ExitReader(ExitSet(modules, "timed"), target.decoder.normed, head, outcomes.HINTED)
    own = [
        VerifiedRows(str(number), 0, number * rows, tuple(block[number, 1:].tolist()))
        for number in range(sessions)
    ]
    drafts = torch.cat((block[:, 1:], block[:, :1]), dim=1).flatten()
    seen = Pass(0.0, torch.arange(sessions * rows), tuple(own), drafts, torch.full((len(drafts),), -0.5))
    passes, reads = [], []
    for _ in range(12):
        began = time.perf_counter()
        hidden, kept = target.decoder.ragged(target.embed(block), positions, cache, exits)
        target.logits(hidden.flatten(0, 1)).argmax(dim=-1)
        middle = time.perf_counter()
        for layer in exits:
            reader.read(layer, kept[layer].flatten(0, 1), seen, lambda: 0.0)
        passes.append(middle - began)
        reads.append(time.perf_counter() - middle)
    return statistics.median(reads) / statistics.median(passes)


def evaluate(plan: EvaluatePlan, say: Say = print) -> dict[str, Any]:
    """Runs everything and writes the results; returns the contents of `evaluate.json`."""
    plan.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(plan.threads)
    device = torch.device(plan.device)
    tokenizer = Tokenizer.load(plan.target)
    prompts = read_prompts(plan.prompts, tokenizer, plan.limit)
    target = load_target(plan.target, device=device, dtype=torch.float32)
    texts = references(target, prompts, plan, end_of_turn(tokenizer), say)
    kept = [index for index, text in enumerate(texts) if len(text.tokens) > 1]
    prompts, texts = [prompts[index] for index in kept], [texts[index] for index in kept]
    draft = read_draft(plan.draft).to(device)
    chosen = draft_choices(draft, texts, device, say)
    result = measure_drafts(plan, prompts, texts, chosen, say)
    if plan.exits is not None:
        result |= measure_exits(plan, target, draft, prompts, texts, say)
    (plan.out / "evaluate.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (plan.out / "evaluate.md").write_text(table(result), encoding="utf-8")
    charts(result, plan.out)
    return result


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends an answer."""
    from training.conversations import END_OF_TURN

    found = tokenizer.encode(END_OF_TURN)
    if len(found) != 1:
        raise ModelFilesError(f"the tokenizer has no {END_OF_TURN}: a ChatML model is needed")
    return found[0]


def measure_drafts(
    plan: EvaluatePlan,
    prompts: Sequence[Prompt],
    texts: Sequence[Continuation],
    chosen: Sequence[Sequence[int]],
    say: Say,
) -> dict[str, Any]:
    """The figures of the draft, of prompt lookup, and of both together."""

    def model(block: int) -> Callable[[int], Drafter]:
        return lambda index: lambda position, size: chosen[index][position - 1 : position - 1 + size]

    def lookup(block: int) -> Callable[[int], Drafter]:
        engine = PromptLookup()
        return lambda index: engine_drafter(engine, str(index), texts[index].text)

    def hybrid(block: int) -> Callable[[int], Drafter]:
        worths = Worths()

        def of_text(index: int) -> Drafter:
            engine = HybridDraft(PromptLookup(), _Said(chosen[index]), worths)
            return engine_drafter(engine, str(index), texts[index].text)

        return of_text

    engine = LlamaDraft.load(plan.draft, target=plan.target, threads=1, cache_tokens=1 << 16)
    torch.set_num_threads(1)
    times = {"ms_per_token": step_ms(engine, texts, 1), "ms_per_step_4_lanes": step_ms(engine, texts, 4)}
    torch.set_num_threads(plan.threads)
    size = sum(file.stat().st_size for file in plan.draft.glob("*.safetensors"))
    say("evaluate: rounds of the draft, of prompt lookup and of both")
    quick = lookup_ms(texts)
    return {
        "prompts": len(prompts),
        "draft": drafting_figures(model, prompts, texts) | times | {"bytes": size},
        "lookup": drafting_figures(lookup, prompts, texts)
        | {"ms_per_token": quick, "ms_per_step_4_lanes": 4 * quick, "bytes": 0},
        "hybrid": drafting_figures(hybrid, prompts, texts) | times | {"bytes": size},
    }


def measure_exits(
    plan: EvaluatePlan,
    target: Target,
    draft: DraftModel,
    prompts: Sequence[Prompt],
    texts: Sequence[Continuation],
    say: Say,
) -> dict[str, Any]:
    """The figures of the edge's guess and of the exits."""
    assert plan.exits is not None
    exits, naming = load_exits(plan.exits, plan.target, target)
    device = target.embedding.device
    exits = {layer: exit_.to(device) for layer, exit_ in exits.items()}
    foresight = read_foresight(plan.draft)
    count = min(len(texts), plan.round_texts or len(texts))
    some = [texts[index * len(texts) // count] for index in range(count)]
    parts: list[Record] = []
    for at in range(0, count, 16):
        parts.append(play_rounds(target, draft, exits, naming, some[at : at + 16], block=BLOCK))
        say(f"evaluate: rounds with exits on {min(at + 16, count)} of {count} texts")
    record = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    own = sum(parameter.numel() for exit_ in exits.values() for parameter in exit_.parameters())
    whole = sum(parameter.numel() for parameter in target.parameters())
    torch.set_num_threads(1)  # as the verifier's engine by default
    ratios = {str(count): exit_step_ratio(target, exits, naming, count) for count in (1, 4, 16)}
    torch.set_num_threads(plan.threads)
    return exit_figures(record, exits, target.config.num_hidden_layers, foresight) | {
        "rounds": len(record["accepted"]),
        "exit_parameters_share": own / whole,
        "exit_step_ratio": ratios["1"],
        "exit_step_ratio_by_sessions": ratios,
    }


def table(result: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    ways = [name for name in ("draft", "lookup", "hybrid") if name in result]
    families = sorted(result[ways[0]]["tokens_per_round_by_family"])
    lines = [
        f"{result['prompts']} prompts, greedy.",
        "",
        "| | " + " | ".join(families) + " | all |",
        "|---" * (len(families) + 2) + "|",
    ]
    for name in ways:
        cells = [
            *(result[name]["acceptance_by_family"][family] for family in families),
            result[name]["acceptance"],
        ]
        lines.append(
            f"| first token accepted, {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"
        )
    for name in ways:
        by_family, whole = (
            result[name]["tokens_per_round_by_family"],
            result[name]["tokens_per_round"][str(BLOCK)],
        )
        cells = [*(by_family[family] for family in families), whole]
        lines.append(
            f"| tokens a round, γ = {BLOCK}, {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"
        )
    lines += [
        "",
        "| tokens a round, γ = | " + " | ".join(map(str, BLOCKS)) + " |",
        "|---" * (len(BLOCKS) + 1) + "|",
    ]
    for name in ways:
        by_block = [f"{result[name]['tokens_per_round'][str(block)]:.2f}" for block in BLOCKS]
        lines.append(f"| {name} | " + " | ".join(by_block) + " |")
    draft = result["draft"]
    lines += [
        "",
        f"Draft: {draft['bytes'] / 1e6:.1f} MB, {draft['ms_per_token']:.1f} ms a token, "
        f"{draft['ms_per_step_4_lanes']:.1f} ms a step of four lanes (one thread).",
    ]
    if "exits" in result:
        lines += [
            "",
            "| verdict in the best | 1 | 2 | 4 | 8 | accepted length right | calibration error |",
            "|---" * 7 + "|",
        ]
        guess = result["edge_guess"]["verdict_in_best"]
        lines.append(
            "| edge's own guess | "
            + " | ".join(f"{value:.2f}" for value in guess.values())
            + f" | {result['edge_guess']['length_right']:.2f} | {result['edge_guess']['ece']:.3f} |"
        )
        for found in result["exits"]:
            name = f"exit after {found['layer']} ({found['depth']:.0%})"
            for label, figures in (("", found["hint"]), (", mixed with the edge's", found["mixed"])):
                shares = " | ".join(f"{value:.2f}" for value in figures["verdict_in_best"].values())
                rest = f"{figures['length_right']:.2f} | {figures['ece']:.3f}"
                lines.append(f"| {name}{label} | {shares} | {rest} |")
        lines += [
            "",
            f"Exits: {result['exit_parameters_share']:.1%} of the target's parameters; all together "
            f"{result['exit_step_ratio']:.1%} of a verification pass.",
        ]
    return "\n".join([*lines, ""])


def charts(result: Mapping[str, Any], out: Path) -> None:
    """Tokens a round by block length, verdicts in the best k, and reliability, as SVG."""
    ways = {name: result[name]["tokens_per_round"] for name in ("draft", "lookup", "hybrid")}
    line_chart(
        out / "tokens_per_round.svg",
        "Tokens a round",
        "block length",
        "tokens",
        {name: [(float(block), value) for block, value in found.items()] for name, found in ways.items()},
    )
    if "exits" not in result:
        return
    lines = {"edge's guess": result["edge_guess"]["verdict_in_best"]}
    lines |= {f"exit {found['layer']}": found["verdict_in_best"] for found in result["exits"]}
    line_chart(
        out / "verdict_in_best.svg",
        "Verdict among the best outcomes",
        "outcomes",
        "share of rounds",
        {name: [(float(count), value) for count, value in found.items()] for name, found in lines.items()},
    )
    shown = {f"exit {found['layer']}": found["hint"]["reliability"] for found in result["exits"]}
    line_chart(
        out / "reliability.svg",
        "Promised and kept",
        "confidence of the first outcome",
        "share right",
        {
            "ideal": [(0.0, 0.0), (1.0, 1.0)],
            **{name: [tuple(p) for p in points] for name, points in shown.items()},
        },
    )
