"""The whole system on one machine beside vLLM as it comes: `scripts/bench system`, on CUDA or CPU.

Broker, Redis, kv-session, gateways in the cloud, the verifier, and gateways at the edge behind proxies that delay;
vLLM's own engine streams the same prompts through a link of the same kind, from the same device, in the same run. The
target has the shapes asked for and knows its mind (`system_target`), the draft is replayed with a set acceptance and speed:
all of it is SYNTHETIC but for the time that everything takes. Clients ask for no hints, since exits of such a target would
foresee everything: on CUDA passes run without exits then.

So many clients at a time ask one answer after another. In each turn every mode gives as many answers, one a client or
`--in-a-row`, and another mode comes first. `system.json` holds `{"device", "shapes", "acceptance", "draft_ms_per_token",
"rtt_ms", "target": 2.0, "runs"}`; besides what `scripts/bench compare` says of a mode a run has

    busy_s                     seconds in which the engine computed: the verifier's steps; of vLLM as it comes the time
                               with a request in it, in which it steps without a pause
    tokens_per_busy_second     tokens that clients got by these: tokens per verifier-second
    tokens_per_wall_second     the same by the time that the mode's turns took
    per_verifier_second_to_ar  tokens_per_busy_second by that of vLLM as it comes
    steps                      the verifier's; `even_steps` verified blocks and computed nothing else, `prompt_steps` are
                               others whose prompts were rows beside the blocks
    sessions_per_step          that had a block verified, on average, or said a token by themselves
    cpu_ms_per_token           what each kind of process computed for a token: `verifier` and its `engine`, `gateway` (in the
                               cloud), `edges`, `kv-session`, `kafka`, `redis`, `proxies`, and `clients`, who measure
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loadtest.compare import PROMPTS, Question, balanced, read_texts, write_answers
from loadtest.compare_clients import Answer, StockReader
from loadtest.compare_modes import MODES, Mode, Place
from loadtest.compare_parts import Parts, Wanted, device_name, on_cuda
from loadtest.compare_report import Batch, Setting, figures
from loadtest.engine_shapes import DEPTHS, find_target, write_exits
from loadtest.metered_verifier import BUSY, EVEN_STEPS, LOOK_S, PASSES, PROMPT_STEPS, STEPS
from loadtest.system_target import (
    FIRST,
    SYSTEM_SHAPES,
    TINY,
    config_of,
    roomy_folder,
    weight_bytes,
    write_target,
)
from shared.errors import InvalidRequest
from shared.models import fetch
from shared.protocol import Tokens
from shared.stack.delay import precise_loop
from shared.text import Tokenizer

ON_CUDA: Final = "llama-2-7b"
COMPARED: Final[Mapping[str, Mode]] = {
    "ar": MODES["ar"],
    "latency": MODES["full-hints"],
    "cost": MODES["full_cost-hints"],
}
WANTED_RATIO: Final = 2.0
WANTED_OF: Final = ("cost", 64)
ANSWERS_A_CLIENT: Final = 2
LEAST_ANSWERS: Final = 8
MOST_EDGES: Final = 8
WARM_UP_TOKENS: Final = 16
STEP_KINDS: Final[Mapping[str, str]] = {
    "steps": STEPS,
    "even_steps": EVEN_STEPS,
    "prompt_steps": PROMPT_STEPS,
}
SETTLED_S: Final = 3 * LOOK_S
"""After which the verifier has counted all its steps."""
SPARE_TOKENS: Final = 64
"""Of a session's place in the KV cache: blocks under way, and what a block of the cache rounds up."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command's options, read. `answers` are those of each mode at each number of sessions; None: a few a client. In
    each turn a client asks for `in_a_row`."""

    shapes: str
    modes: tuple[str, ...]
    sessions: tuple[int, ...]
    answers: int | None
    acceptance: float
    draft_ms: float
    gamma: int
    rtt_ms: float
    max_tokens: int
    prompt_tokens: int
    cuda: bool
    edges: int = 1
    in_a_row: int = 1

    @property
    def gateways(self) -> int:
        """In the cloud: a relay costs about half of what a gateway at the edge does."""
        return (self.edges + 1) // 2

    @property
    def most(self) -> int:
        """Sessions at a time at most."""
        return max(self.sessions)

    @property
    def places(self) -> int:
        """Sessions that the verifier takes: one that has ended may not have left when the next one comes."""
        return self.most + max(2, self.most // 8)

    @property
    def length(self) -> int:
        """Tokens of a session at most, in the KV cache."""
        return self.prompt_tokens + self.max_tokens + SPARE_TOKENS

    @property
    def draft(self) -> str:
        """What the replayed draft is told, after its file. Every session is an edge of its own: others cost it nothing."""
        return f"acceptance={self.acceptance:g}&ms_per_token={self.draft_ms:g}&lane_cost=0"

    def answers_for(self, sessions: int) -> int:
        """How many answers each mode gives with so many sessions at a time: as many for each client."""
        wanted = self.answers or max(LEAST_ANSWERS, ANSWERS_A_CLIENT * sessions)
        a_turn = self.in_a_row * sessions
        return max(1, round(wanted / a_turn)) * a_turn


# --- measuring ----------------------------------------------------------------------------------------------------


def prompts_of(path: Path, tokenizer: Tokenizer, count: int, longest: int) -> list[Question]:
    """`count` prompts of at most `longest` tokens. Where the file has fewer, the last ones are its texts from a later token
    on. They differ in length, by which the replayed draft chooses where it errs."""
    texts = balanced(read_texts(path), count)
    found = []
    for number in range(count):
        family, text = texts[number % len(texts)]
        tokens = tokenizer.encode(text)
        start = min(number // len(texts), max(0, len(tokens) - 1))
        end = start + longest - number % max(1, longest // 2)
        found.append(Question(family, tuple(t if t >= FIRST else FIRST + t for t in tokens[start:end])))
    return found


@dataclass(slots=True)
class Turns:
    """What one mode has done with so many sessions at a time, over all its turns."""

    batches: list[Batch]
    busy_s: float = 0.0
    wall_s: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)
    passes: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)


class Bench:
    """Everything running, and what it is asked."""

    def __init__(self, parts: Parts, asked: Sequence[Question], options: Options) -> None:
        self._parts = parts
        self._asked = asked
        self._options = options

    async def truths(self) -> list[Answer]:
        """What vLLM as it comes says, as many at a time as will be asked."""
        numbers = list(range(len(self._asked)))
        return await self._ask(COMPARED["ar"], numbers, self._options.most, self._options.max_tokens)

    async def measure(self, sessions: int) -> dict[str, Turns]:
        """All modes, in turns."""
        found = {name: Turns([]) for name in self._options.modes}
        for name in self._options.modes:
            numbers = [number % len(self._asked) for number in range(sessions)]
            await self._ask(COMPARED[name], numbers, sessions, WARM_UP_TOKENS)
        a_turn = sessions * self._options.in_a_row
        for turn in range(self._options.answers_for(sessions) // a_turn):
            first = turn % len(self._options.modes)
            for name in (*self._options.modes[first:], *self._options.modes[:first]):
                numbers = [(turn * a_turn + n) % len(self._asked) for n in range(a_turn)]
                await self._turn(found[name], COMPARED[name], numbers, sessions)
        return found

    async def _turn(self, turns: Turns, mode: Mode, numbers: Sequence[int], sessions: int) -> None:
        carried, before = await self._parts.link_bytes(mode.place), await self._busy(mode)
        cpu_ms, cpu_s = self._parts.cpu_ms(mode.place), self._parts.cpu_s(mode.place)
        began_s = time.monotonic()
        answers = await self._ask(mode, numbers, sessions, self._options.max_tokens)
        turns.wall_s += time.monotonic() - began_s
        for kind, spent_s in self._parts.cpu_s(mode.place).items():
            turns.cpu_s[kind] = turns.cpu_s.get(kind, 0.0) + spent_s - cpu_s[kind]
        await asyncio.sleep(SETTLED_S)
        cpu_ms = self._parts.cpu_ms(mode.place) - cpu_ms
        busy_s, passes, *steps = (
            now - then for now, then in zip(await self._busy(mode), before, strict=True)
        )
        turns.busy_s, turns.passes = turns.busy_s + busy_s, turns.passes + passes
        for kind, count in zip(STEP_KINDS, steps, strict=True):
            turns.steps[kind] = turns.steps.get(kind, 0.0) + count
        through = (await self._parts.link_bytes(mode.place)).since(carried)
        turns.batches.append(
            Batch(tuple(numbers), tuple(answers), through.up, through.down, cpu_ms, through.opening)
        )

    async def _busy(self, mode: Mode) -> tuple[float, ...]:
        """Seconds for which the mode's engine has computed; sessions' passes and its steps where they are counted."""
        reader = self._parts.places[mode.place].reader
        if isinstance(reader, StockReader):
            return await reader.busy_ms() / 1000, 0.0, *(0.0 for _ in STEP_KINDS)
        text = await self._parts.verifier_metrics()
        return tuple(counter(text, name) for name in (BUSY, PASSES, *STEP_KINDS.values()))

    async def _ask(self, mode: Mode, numbers: Sequence[int], at_a_time: int, most: int) -> list[Answer]:
        served = self._parts.places[mode.place]
        if isinstance(served.reader, StockReader):
            await served.reader.connect(at_a_time + 1)
        places = asyncio.Semaphore(at_a_time)
        request = mode.request(self._options.gamma)

        async def one(number: int) -> Answer:
            async with places:
                return await served.reader.ask(self._asked[number].tokens, most, request)

        return list(await asyncio.gather(*map(one, numbers)))


def counter(text: str, name: str) -> float:
    """A counter's value in a page of metrics; 0 where it isn't."""
    lines = (line.split() for line in text.splitlines() if line.startswith(f"{name}_total "))
    return next((float(value) for _, value in lines), 0.0)


def runs_of(
    found: Mapping[str, Turns], truths: Sequence[Tokens], options: Options, sessions: int
) -> list[dict[str, Any]]:
    """The figures of each mode with so many sessions at a time."""
    runs = []
    for name, turns in found.items():
        mode = COMPARED[name]
        gamma = options.gamma if mode.speculates else 0
        setting = Setting(name, options.rtt_ms, sessions, mode.policy, gamma, mode.adaptive, synthetic=True)
        steps = turns.steps.get("steps", 0.0)
        told = figures(setting, turns.batches, truths, max_tokens=options.max_tokens, price=0.0)
        del told["cost_per_million_tokens"]
        if turns.passes:  # gateways count messages, of which one may hold what several passes said
            told["passes_per_token"] = round(turns.passes / told["tokens"], 3)
        runs.append(
            {
                **told,
                "busy_s": round(turns.busy_s, 3),
                "wall_s": round(turns.wall_s, 3),
                **{kind: round(turns.steps.get(kind, 0.0)) or None for kind in STEP_KINDS},
                "sessions_per_step": round(turns.passes / steps, 2) if steps else None,
                "tokens_per_busy_second": round(told["tokens"] / turns.busy_s, 1) if turns.busy_s else None,
                "tokens_per_wall_second": round(told["tokens"] / turns.wall_s, 1),
                "cpu_ms_per_token": {
                    kind: round(spent_s * 1000 / told["tokens"], 3) for kind, spent_s in turns.cpu_s.items()
                },
            }
        )
    own = next((run for run in runs if run["mode"] == "ar"), None)
    for run in runs:
        for figure, ratio in RATIOS.items():
            known = own is not None and run[figure] is not None and own[figure]
            run[ratio] = round(run[figure] / own[figure], 3) if own is not None and known else None
    return runs


RATIOS: Final[Mapping[str, str]] = {
    "tokens_per_busy_second": "per_verifier_second_to_ar",
    "tokens_per_wall_second": "per_wall_second_to_ar",
}


# --- the whole ----------------------------------------------------------------------------------------------------


def wanted_of(target: Path, exits: Path, layers: Sequence[int], options: Options, kv_cache_mb: int) -> Wanted:
    """What is brought up."""
    length = options.length
    return Wanted(
        target,
        frozenset({Place.STOCK, Place.EDGE}),
        verifier="loadtest.metered_verifier",
        environment={
            "OUTRIDER_MAX_BLOCK": str(options.gamma),
            "OUTRIDER_MAX_MODEL_LEN": str(length),
            "OUTRIDER_MAX_SESSIONS": str(options.places),
            "OUTRIDER_KV_CACHE_MB": str(kv_cache_mb),
            "OUTRIDER_EXIT_LAYERS": ",".join(map(str, layers)),
            "OUTRIDER_EXIT_MODULES": str(exits),
        },
        stock_options=(
            *("--sessions", str(options.places), "--kv-cache-mb", str(kv_cache_mb)),
            *("--max-model-len", str(length)),
        ),
        edges=options.edges,
        gateways=options.gateways,
        pinned=not options.cuda,
    )


async def measure(
    options: Options, prompts: Path, folder: Path, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Make the target, bring everything up, measure, take it down; what system.json holds. `keep` is called with that of
    what is there so far, after each number of sessions."""
    began_s = time.monotonic()
    config = config_of(options.shapes)
    with tempfile.TemporaryDirectory(
        prefix="outrider-target-", dir=roomy_folder(weight_bytes(config))
    ) as made:
        target = Path(made) / options.shapes
        await asyncio.to_thread(write_target, config, fetch(), target)
        described = find_target(str(target), folder)
        layers = sorted({max(1, round(depth * described.checkpoint.num_layers)) for depth in DEPTHS})
        exits = Path(made) / "exits.safetensors"
        await asyncio.to_thread(write_exits, described, layers, exits)
        print(f"  the target is written after {time.monotonic() - began_s:.0f} s", flush=True)
        asked = await asyncio.to_thread(
            prompts_of, prompts, Tokenizer.load(target), options.most, options.prompt_tokens
        )
        element = 2 if options.cuda and described.dtype != "float32" else 4
        kv_cache_mb = (options.places * options.length * described.kv_elements * element >> 20) + 64
        wanted = wanted_of(target, exits, layers, options, kv_cache_mb)
        answers = folder / "answers.json"
        facts = {
            "synthetic": True,
            "device": await asyncio.to_thread(device_name),
            "shapes": options.shapes,
            "vocabulary": config["vocab_size"],
            "acceptance": options.acceptance,
            "draft_ms_per_token": options.draft_ms,
            "gamma": options.gamma,
            "rtt_ms": options.rtt_ms,
            "edges": options.edges,
            "gateways": options.gateways,
            "max_tokens": options.max_tokens,
            "prompt_tokens": options.prompt_tokens,
            "exit_layers": layers,
            "target": WANTED_RATIO,
        }
        runs: list[dict[str, Any]] = []
        async with Parts(folder, wanted) as parts:
            bench = Bench(parts, asked, options)
            said = await bench.truths()
            await asyncio.to_thread(write_answers, answers, asked, said)
            await parts.start_edges({Place.EDGE: f"replay:{answers}?{options.draft}"})
            await parts.set_round_trip(options.rtt_ms)
            print(f"  up after {time.monotonic() - began_s:.0f} s", flush=True)
            for sessions in options.sessions:
                found = await bench.measure(sessions)
                runs += runs_of(found, [answer.tokens for answer in said], options, sessions)
                keep({**facts, "runs": runs})
                print(f"  {sessions} at a time: done after {time.monotonic() - began_s:.0f} s", flush=True)
    return {**facts, "runs": runs}


# --- what it says -------------------------------------------------------------------------------------------------

COLUMNS: Final = (
    ("mode", "mode"),
    ("sessions", "sess."),
    ("tokens_per_busy_second", "tokens / verifier s"),
    ("per_verifier_second_to_ar", "× ar"),
    ("tokens_per_wall_second", "tokens / s"),
    ("per_wall_second_to_ar", "× ar"),
    ("median", "ms/token"),
    ("p95", "p95"),
    ("ttft_ms", "TTFT"),
    ("tokens_per_round", "tok/round"),
    ("passes_per_token", "pass/tok"),
    ("pass_ms", "pass"),
    ("acceptance", "acc."),
    ("floor_share", "floor"),
    ("busy_s", "busy s"),
    ("wall_s", "wall s"),
    ("steps", "steps"),
    ("sessions_per_step", "sess./step"),
    ("even_steps", "even"),
    ("prompt_steps", "with prompts"),
    ("equal", "equal"),
)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs as Markdown. Ratios are of tokens a second: above 1 is more."""
    rows = [[title for _, title in COLUMNS], ["---"] * len(COLUMNS)]
    rows += [[_cell(run, name) for name, _ in COLUMNS] for run in runs]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cpu_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """CPU ms a token of every kind of process, as Markdown."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run["cpu_ms_per_token"]))
    rows = [["CPU ms/token", "sess.", *kinds], ["---"] * (2 + len(kinds))]
    for run in runs:
        spent = run["cpu_ms_per_token"]
        rows.append(
            [run["mode"], str(run["sessions"]), *(f"{spent[k]:.3g}" if k in spent else "" for k in kinds)]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(run: Mapping[str, Any], name: str) -> str:
    if name == "equal":
        return "yes" if run["equal_to_target"] else f"no: {len(run['differences'])} of {run['answers']}"
    value = {**run, **run["ms_per_token"]}[name]
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def verdict(found: Mapping[str, Any]) -> str:
    """Whether what is promised of policy `cost` holds."""
    mode, sessions = WANTED_OF
    run = next((one for one in found["runs"] if (one["mode"], one["sessions"]) == WANTED_OF), None)
    ratio = run["per_verifier_second_to_ar"] if run is not None else None
    if ratio is None:
        return f"policy {mode} was not measured beside ar with {sessions} sessions"
    words = "reaches" if ratio >= WANTED_RATIO else "does not reach"
    return f"policy {mode}, {sessions} sessions: {ratio:.2f} × vLLM's tokens per verifier-second, {words} {WANTED_RATIO:g}"


def report(found: Mapping[str, Any]) -> str:
    """All of it to read, in Markdown."""
    return "\n\n".join(
        (
            f"SYNTHETIC: a target of the shapes of {found['shapes']} on {found['device']}, a draft that is replayed with "
            f"acceptance {found['acceptance']:g} and {found['draft_ms_per_token']:g} ms a token, blocks of up to "
            f"{found['gamma']}; {found['rtt_ms']:g} ms of round trip, {found['max_tokens']} tokens an answer; "
            f"{found['edges']} gateways at the edge, {found['gateways']} in the cloud.",
            table(found["runs"]),
            cpu_table(found["runs"]),
            verdict(found),
        )
    )


# --- the command --------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--out", type=Path, help="folder for system.json and system.md")
    parser.add_argument(
        "--shapes", help=f"{', '.join(SYSTEM_SHAPES)} (default: {ON_CUDA} on CUDA, {TINY} on CPU)"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON Lines of category and turns")
    parser.add_argument(
        "--modes", default=",".join(COMPARED), help=f"of {', '.join(COMPARED)} (default: all)"
    )
    parser.add_argument("--sessions", help="at a time (default: 1,4,16,64 on CUDA, 1,4 on CPU)")
    parser.add_argument(
        "--answers", type=int, help="of a mode at each number of sessions (default: two a client)"
    )
    parser.add_argument(
        "--in-a-row",
        type=int,
        default=1,
        help="answers that a client asks for, one after the other, before another mode's turn comes (default: 1)",
    )
    parser.add_argument("--acceptance", type=float, default=0.8, help="of the replayed draft (default: 0.8)")
    parser.add_argument("--draft-ms", type=float, default=2.0, help="that it takes a token (default: 2)")
    parser.add_argument("--gamma", type=int, default=5, help="longest block (default: 5)")
    parser.add_argument("--rtt", type=float, default=50.0, help="round trip, ms (default: 50)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument("--prompt-tokens", type=int, default=96, help="longer prompts are cut (default: 96)")
    parser.add_argument(
        "--edges",
        type=int,
        help=f"gateways at the edge, over which clients are spread (default: up to {MOST_EDGES} on CUDA, 1 on CPU)",
    )
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs (default: a temporary one)")


def options_of(arguments: argparse.Namespace, *, cuda: bool) -> Options:
    """What was asked for; InvalidRequest says what can't be."""
    modes = tuple(name.strip() for name in arguments.modes.split(","))
    if unknown := [name for name in modes if name not in COMPARED]:
        raise InvalidRequest(f"--modes: there is no mode {unknown[0]!r}; there are {', '.join(COMPARED)}")
    asked = arguments.sessions or ("1,4,16,64" if cuda else "1,4")
    try:
        sessions = tuple(int(part) for part in asked.split(","))
    except ValueError:
        sessions = ()
    if not sessions or min(sessions) < 1:
        raise InvalidRequest(f"--sessions: {asked!r} should be numbers from 1, with commas between")
    options = Options(
        shapes=arguments.shapes or (ON_CUDA if cuda else TINY),
        modes=modes,
        sessions=sessions,
        answers=arguments.answers,
        in_a_row=arguments.in_a_row,
        acceptance=arguments.acceptance,
        draft_ms=arguments.draft_ms,
        gamma=arguments.gamma,
        rtt_ms=arguments.rtt,
        max_tokens=arguments.max_tokens,
        prompt_tokens=arguments.prompt_tokens,
        cuda=cuda,
        edges=_edges(arguments.edges, max(sessions), cuda=cuda),
    )
    config_of(options.shapes)
    if not 0 <= options.acceptance <= 1 or options.draft_ms < 0 or options.rtt_ms < 0:
        raise InvalidRequest("--acceptance should be between 0 and 1, --draft-ms and --rtt not negative")
    if (
        options.max_tokens < 2
        or min(options.gamma, options.prompt_tokens, options.in_a_row) < 1
        or (options.answers is not None and options.answers < 1)
        or options.edges < 1
    ):
        raise InvalidRequest(
            "--max-tokens should be at least 2, --gamma, --prompt-tokens, --answers, --in-a-row and --edges 1"
        )
    return options


def _edges(asked: int | None, sessions: int, *, cuda: bool) -> int:
    if asked is not None:
        return asked
    return min(MOST_EDGES, sessions) if cuda else 1


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    options = options_of(arguments, cuda=on_cuda())
    with tempfile.TemporaryDirectory(prefix="outrider-system-") as temporary:
        folder = (arguments.logs or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with asyncio.Runner(loop_factory=precise_loop) as runner:
            found = runner.run(
                measure(options, arguments.prompts, folder, lambda told: write(arguments.out, told))
            )
    print(report(found))
    return 0


def write(out: Path | None, found: Mapping[str, Any]) -> None:
    """`system.json` and `system.md`, where they are wanted."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "system.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "system.md").write_text(report(found) + "\n")
