"""Cloud AR, vLLM's own speculation, sync speculation, the paper and Outrider, side by side: `scripts/bench compare`.

In one run: the same prompts, the same target on the same core, the same link. Every prompt is asked in every mode before
the next one is asked at all, and the order of the modes rotates, so that whatever drifts hits all alike. The delay sits
in TCP proxies of the same kind before everything that the cloud serves. Decoding is greedy, and each mode's tokens are
compared with those that vLLM says by itself; where they differ the report says so.

`compare.json` holds `{"prompts", "target", "draft", "machine", "max_tokens", "price_per_hour", "notes", "runs": [...]}`;
a run is one mode at one round trip with so many sessions at a time. Its figures:

    ms_per_token        median and p95 over answers of (last − first token) / (tokens between), as the reader sees it
    limit_ms            a pass by the tokens of a round: drafting and round trip wholly hidden
    hit_rate            of what was committed while a lane could have foreseen it (hits, late ones and misses): a lane from a
                        guess, from an exit, came true and was drafted; `forward`: taken by the verifier before the
                        verdict had left; `late`: came true, not yet drafted
    uplink_bytes_per_token  payload of blocks and forwards by committed tokens; what else goes up, the prompt above all, goes
                        up in every mode and is `opening_bytes_per_token`
    verifier_ms_per_token   CPU time of the processes that hold the target, prefills included
    ratio_to            ms/token by that of another mode of the same setting, 95 % of resamplings of the prompts

With `--paper` the draft is replayed and a timer verifies, in the timings of arXiv 2505.21594; all of it is marked
`synthetic`. So is the timer's draft head (`loadtest.replay_head`), which `full_headless` is without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from loadtest import rounds
from loadtest.compare_clients import Answer, StockReader
from loadtest.compare_modes import DEFAULT, PAPER_SETTING, REPLAYED, Mode, Place, chosen
from loadtest.compare_parts import Parts, Wanted, cpu_name
from loadtest.compare_report import Batch, Setting, by_prompt, charts, figures, ratio, table
from loadtest.replay_head import ACCEPTANCE as HEAD_CHANCES
from loadtest.replay_head import HEAD, parse_head
from loadtest.replay_head import NONE as NO_HEAD
from shared.errors import InvalidRequest
from shared.models import fetch
from shared.protocol import Tokens
from shared.stack.delay import precise_loop

ROOT: Final = Path(__file__).resolve().parents[1]
PROMPTS: Final = ROOT.parent / "shared" / "data" / "spec_bench_dev.jsonl"
FAMILIES: Final = ("translation", "summarization", "qa", "math_reasoning", "rag")
CHAT: Final = "chat"
TIMELINE: Final = "timeline"
WARM_UP_TOKENS: Final = 12
RATIOS: Final = ("ar", "vllm_ngram", "vllm_draft", "sync", "paper", "full")

PAPER_RTT_MS: Final = 96.0
PAPER_GAMMA: Final = 4
PAPER_DRAFT_MS: Final = 75.0
PAPER_PASS_MS: Final = 522.0
HEAD_ACCEPTANCE: Final = ",".join(f"{share:g}" for share in HEAD_CHANCES)

WRONG: Final = "acceptance=0&confidence=0.7&second=0&ms_per_token=3"
"""A draft that is always wrong, sure of itself, and as fast as the one that ships."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is compared."""

    modes: tuple[Mode, ...]
    rtts_ms: tuple[float, ...]
    jitter_ms: float
    sessions: tuple[int, ...]
    gamma: int
    count: int
    max_tokens: int
    prompt_tokens: int
    price: float
    draft: str = "hybrid"
    paper: bool = False
    acceptance: float = 0.7
    head: str = HEAD_ACCEPTANCE
    timeline: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt: its task family, and its tokens up to where the answer begins."""

    family: str
    tokens: Tokens


Say = Callable[[str], None]


# --- prompts ------------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> list[tuple[str, str]]:
    """(family, first turn) of each line of a Spec-Bench file; InvalidRequest names the line that is none."""
    texts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"--prompts: {path} can't be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            held = json.loads(line)
            category, text = str(held.get("category", CHAT)), str(held["turns"][0])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InvalidRequest(
                f'{path}, line {number}: should be like {{"category": "qa", "turns": ["..."]}} ({error!r})'
            ) from error
        texts.append((category if category in FAMILIES else CHAT, text))
    return texts


def balanced(texts: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` of them, families in turn, each spread over its own."""
    by_family: dict[str, list[tuple[str, str]]] = {}
    for text in texts:
        by_family.setdefault(text[0], []).append(text)
    shares = {
        family: count // len(by_family) + (number < count % len(by_family))
        for number, family in enumerate(sorted(by_family))
    }
    return [
        held[(2 * n + 1) * len(held) // (2 * min(share, len(held)))]
        for family, share in shares.items()
        for held in (by_family[family],)
        for n in range(min(share, len(held)))
    ]


def questions(path: Path, target: Path, count: int, longest: int) -> list[Question]:
    """The prompts as the target reads them; texts longer than `longest` tokens are cut there."""
    from shared.text import Tokenizer

    tokenizer = Tokenizer.load(target)
    found = []
    for family, text in balanced(read_texts(path), count):
        tokens = tokenizer.encode(text)
        shown = text if len(tokens) <= longest else tokenizer.decode(tokens[:longest])
        found.append(Question(family, tokenizer.encode_chat([{"role": "user", "content": shown}])))
    return found


# --- measuring ----------------------------------------------------------------------------------------------------


def batches(count: int, sessions: int) -> Iterator[tuple[int, ...]]:
    """The numbers of the prompts that are asked at a time; the last batch is filled up from the start."""
    for first in range(0, count, sessions):
        yield tuple(n % count for n in range(first, first + sessions))


async def ask_batch(
    parts: Parts, mode: Mode, asked: Sequence[Question], numbers: tuple[int, ...], options: Options, most: int
) -> Batch:
    """Some prompts at a time in one mode."""
    served = parts.places[mode.place]
    if isinstance(served.reader, StockReader):
        await served.reader.connect(len(numbers))
    before = await parts.link_bytes(mode.place)
    cpu_ms = parts.cpu_ms(mode.place)
    request = mode.request(options.gamma)
    answers = await asyncio.gather(
        *(served.reader.ask(asked[number].tokens, most, request) for number in numbers)
    )
    cpu_ms = parts.cpu_ms(mode.place) - cpu_ms
    carried = (await parts.link_bytes(mode.place)).since(before)
    return Batch(numbers, tuple(answers), carried.up, carried.down, cpu_ms, carried.opening)


async def reference(parts: Parts, asked: Sequence[Question], options: Options) -> list[Answer]:
    """What the target says by itself."""
    reader = parts.places[Place.STOCK].reader
    return [await reader.ask(question.tokens, options.max_tokens, {}) for question in asked]


async def fill_caches(parts: Parts, asked: Sequence[Question], options: Options) -> None:
    """Have every engine compute each prompt once. Stock vLLM has, as it gave the reference; where the others computed
    theirs while they are measured, the first of many sessions would be waiting for the prompts of the rest, and cloud AR
    would not."""
    for place in parts.places.keys() - {Place.STOCK}:
        mode = next((mode for mode in options.modes if mode.place is place), None)
        for number in range(len(asked)) if mode is not None else ():
            assert mode is not None
            await ask_batch(parts, mode, asked, (number,), options, 2)


async def measure(
    parts: Parts,
    asked: Sequence[Question],
    truth: Sequence[Tokens],
    options: Options,
    say: Say,
) -> list[dict[str, Any]]:
    """All runs, with their ratios."""
    runs: list[dict[str, Any]] = []
    await fill_caches(parts, asked, options)
    for rtt_ms in options.rtts_ms:
        await parts.set_round_trip(rtt_ms)
        for sessions in options.sessions:
            found: dict[str, list[Batch]] = {mode.name: [] for mode in options.modes}
            for mode in options.modes:
                await ask_batch(parts, mode, asked, (0,), options, WARM_UP_TOKENS)
            for number, prompts in enumerate(batches(len(asked), sessions)):
                turn = number % len(options.modes)
                for mode in (*options.modes[turn:], *options.modes[:turn]):
                    batch = await ask_batch(parts, mode, asked, prompts, options, options.max_tokens)
                    found[mode.name].append(batch)
                say(
                    f"  {rtt_ms:g} ms, {sessions} at a time: {min((number + 1) * sessions, len(asked))}/{len(asked)}"
                )
            runs += setting_runs(found, truth, options, rtt_ms, sessions)
    return runs


def setting_runs(
    found: Mapping[str, Sequence[Batch]],
    truth: Sequence[Tokens],
    options: Options,
    rtt_ms: float,
    sessions: int,
) -> list[dict[str, Any]]:
    """The runs of one round trip and number of sessions."""
    times = {name: by_prompt(held) for name, held in found.items()}
    runs = []
    for mode in options.modes:
        gamma = options.gamma if mode.place is not Place.STOCK else 0
        setting = Setting(mode.name, rtt_ms, sessions, mode.policy, gamma, mode.adaptive, options.paper)
        held = figures(setting, found[mode.name], truth, max_tokens=options.max_tokens, price=options.price)
        held["ratio_to"] = {
            name: {key: round(value, 3) for key, value in asdict(compared).items()}
            for name in RATIOS
            if name != mode.name and name in times
            if (compared := ratio(times[mode.name], times[name])) is not None
        }
        runs.append(held)
    return runs


# --- the whole ----------------------------------------------------------------------------------------------------


async def compare(
    options: Options, prompts: Path, target: Path, folder: Path, say: Say = print
) -> dict[str, Any]:
    """Bring everything up, measure, take it down; what compare.json holds."""
    began_s = time.monotonic()
    asked = await asyncio.to_thread(questions, prompts, target, options.count, options.prompt_tokens)
    places = frozenset({Place.STOCK, *(mode.place for mode in options.modes)})
    wanted = Wanted(
        target,
        places,
        speculate=max(1, options.gamma),
        jitter_ms=options.jitter_ms,
        replayed=options.paper,
        verifier="loadtest.replay_verifier" if options.paper else "",
        timeline=str(folder / TIMELINE) if options.timeline else "",
    )
    answers = folder / "answers.json"
    drafts = {
        Place.EDGE: _replay(answers, options) if options.paper else options.draft,
        Place.HEADLESS: _replay(answers, options),
        Place.WRONG: f"replay:{answers}?{WRONG}",
    }
    replays = _replays(answers, options, places) if options.paper else {}
    async with Parts(folder, wanted) as parts:
        said = await reference(parts, asked, options)
        await asyncio.to_thread(write_answers, answers, asked, said)
        await parts.start_edges(drafts, replays)
        say(f"  up after {time.monotonic() - began_s:.0f} s")
        runs = await measure(parts, asked, [answer.tokens for answer in said], options, say)
        pinned = parts.pinned
    return {
        "prompts": f"{len(asked)} of {prompts.name}, at most {options.prompt_tokens} tokens of each, families in turn",
        "target": target.name
        if not options.paper
        else f"a timer that knows the answers of {target.name}, its draft head {_head(options)} (synthetic)",
        "draft": _replay(Path(answers.name), options) + " (synthetic)" if options.paper else options.draft,
        "machine": machine(pinned),
        "max_tokens": options.max_tokens,
        "jitter_ms": options.jitter_ms,
        "price_per_hour": options.price,
        "synthetic": options.paper,
        "notes": notes(options, runs),
        "runs": runs,
    }


def write_answers(path: Path, asked: Sequence[Question], said: Sequence[Answer]) -> None:
    """The target's answers, for what replays them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = [
        {"prompt": list(question.tokens), "tokens": list(answer.tokens)}
        for question, answer in zip(asked, said, strict=True)
    ]
    path.write_text(json.dumps({"answers": held}))


def _replay(answers: Path, options: Options) -> str:
    return f"replay:{answers}?acceptance={options.acceptance:g}&ms_per_token={PAPER_DRAFT_MS:g}"


def _head(options: Options) -> str:
    """The draft head of the target that is replayed."""
    return f"acceptance={options.head}" if options.head not in NO_HEAD else "none"


def _replays(answers: Path, options: Options, places: Set[Place]) -> dict[Place, dict[str, str]]:
    """What the verifiers that replay read from their environment: one with the draft head, one without where it is asked."""
    common = {"OUTRIDER_REPLAY_ANSWERS": str(answers), "OUTRIDER_REPLAY_PASS_MS": str(PAPER_PASS_MS)}
    heads = {Place.EDGE: _head(options), Place.HEADLESS: "none"}
    return {place: {**common, HEAD: head} for place, head in heads.items() if place in places}


def machine(pinned: bool) -> dict[str, Any]:
    """What it was measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "placement": "one core for the processes that hold the target, one for all else (the edge with its draft, the "
        "cloud's gateway, kv-session, Kafka, Redis, the proxies and the readers)"
        if pinned
        else "not pinned: there are fewer than two cores to be had",
        "load_at_end": [round(value, 2) for value in os.getloadavg()],
    }


def notes(options: Options, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader should know beside the figures."""
    said = [
        "vllm_draft runs the draft that ships in float32 with a full LM head, as vLLM runs a draft model; at the edge it "
        "runs in int8 with a reduced one.",
        "Every engine has each prompt in its prefix cache before anything is measured, so TTFT is mostly the link's.",
    ]
    if not any(mode.place is Place.DRAFT for mode in options.modes):
        said.pop(0)
    if options.paper:
        said.insert(
            0, "SYNTHETIC: draft and verifier are replayed with set times; nothing here is a model's speed."
        )
    if differing := sum(len(run["differences"]) for run in runs):
        answers = sum(run["answers"] for run in runs)
        said.append(
            f"{differing} of {answers} answers are not what vLLM says token by token: passes of another shape round "
            "differently, which decides near-ties otherwise."
        )
    return said


# --- the command --------------------------------------------------------------------------------------------------


def _numbers(name: str, text: str, least: float) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequest(f"{name} should be numbers with commas between, not {text!r}") from None
    if any(value < least for value in values):
        raise InvalidRequest(f"{name}: {text}: none may be below {least:g}")
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--out", type=Path, help="folder for compare.json, compare.md and charts")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON Lines of category and turns")
    parser.add_argument("--count", type=int, help="prompts, balanced over families (12; 4 with --paper)")
    parser.add_argument("--modes", help=f"with commas (default: {','.join(DEFAULT)})")
    parser.add_argument("--rtt", help="round trips, ms (default: 5,50,200; 96 with --paper)")
    parser.add_argument(
        "--jitter", type=float, default=0.0, help="how much a round trip varies, ms (default: 0)"
    )
    parser.add_argument("--sessions", default="1", help="answers at a time (default: 1)")
    parser.add_argument("--gamma", type=int, help="longest block (default: 5; 4 with --paper)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=256, help="longer prompts are cut (default: 256)"
    )
    parser.add_argument("--price", type=float, default=1.0, help="of a verifier's hour (default: 1.0)")
    parser.add_argument("--draft", default="hybrid", help="the edge's draft engine (default: hybrid)")
    parser.add_argument("--paper", action="store_true", help="the paper's own timings (synthetic)")
    parser.add_argument("--acceptance", type=float, default=0.7, help="of the replayed draft (default: 0.7)")
    parser.add_argument(
        "--head-acceptance",
        default=HEAD_ACCEPTANCE,
        help="of the replayed draft head, up to its 1st, 2nd … token; 0 or none is no head "
        f"(default: {HEAD_ACCEPTANCE})",
    )
    parser.add_argument(
        "--timeline", action="store_true", help="tell where the time of a round goes (rounds.md)"
    )
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs (default: a temporary one)")


def options_of(arguments: argparse.Namespace) -> Options:
    """What was asked for; InvalidRequest says what can't be."""
    paper = bool(arguments.paper)
    options = Options(
        modes=chosen(arguments.modes or ",".join(PAPER_SETTING if paper else DEFAULT)),
        rtts_ms=_numbers("--rtt", arguments.rtt or (f"{PAPER_RTT_MS:g}" if paper else "5,50,200"), 0),
        jitter_ms=arguments.jitter,
        sessions=tuple(int(value) for value in _numbers("--sessions", arguments.sessions, 1)),
        gamma=arguments.gamma if arguments.gamma is not None else PAPER_GAMMA if paper else 5,
        count=arguments.count or (4 if paper else 12),
        max_tokens=arguments.max_tokens,
        prompt_tokens=arguments.prompt_tokens,
        price=arguments.price,
        draft=arguments.draft,
        paper=paper,
        acceptance=arguments.acceptance,
        head=arguments.head_acceptance,
        timeline=arguments.timeline,
    )
    if options.count < 1 or options.max_tokens < 2 or options.prompt_tokens < 1 or options.gamma < 0:
        raise InvalidRequest(
            "--count, --prompt-tokens and --gamma should be positive, --max-tokens at least 2"
        )
    if paper and (wrong := [mode.name for mode in options.modes if mode.place not in REPLAYED]):
        raise InvalidRequest(f"--paper has no target that runs, so it can't compare {', '.join(wrong)}")
    if not paper and any(mode.place is Place.HEADLESS for mode in options.modes):
        raise InvalidRequest(
            "full_headless is a mode of --paper alone: other targets run with what they have"
        )
    parse_head(_head(options))
    return options


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    options = options_of(arguments)
    target = fetch()
    with tempfile.TemporaryDirectory(prefix="outrider-compare-") as temporary:
        folder = (arguments.logs or Path(temporary)).resolve()
        with asyncio.Runner(loop_factory=precise_loop) as runner:
            found = runner.run(compare(options, arguments.prompts, target, folder))
        if options.timeline:
            print(rounds.write(arguments.out or folder, folder / TIMELINE))
    print(table(found["runs"]))
    print("\n".join(found["notes"]))
    if arguments.out is not None:
        write(arguments.out, found)
    return 0


def write(directory: Path, found: Mapping[str, Any]) -> None:
    """compare.json, compare.md and the charts."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "compare.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    drawn = charts(directory, found["runs"])
    lines = [
        f"target: {found['target']}; draft: {found['draft']}; {found['prompts']}; {found['max_tokens']} tokens at most",
        f"machine: {found['machine']['cpu']}, {found['machine']['placement']}",
        table(found["runs"]),
        *found["notes"],
        *(f"![{path.stem}]({path.name})" for path in drawn),
    ]
    (directory / "compare.md").write_text("\n\n".join(lines) + "\n")
