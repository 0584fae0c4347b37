"""The promise on real weights, on CPU or CUDA: `scripts/bench exact`.

vLLM as it comes says each answer by itself, greedily, one at a time. Then the verifier's engine makes the same answers
while it is fed with blocks: right ones, wrong ones, short ones, empty ones, as a seeded rule has it, one session at a time
and several. Every token has to be the same in float32. In bfloat16 passes of another shape round differently, which may
decide a near-tie otherwise, unless vLLM runs its batch-invariant kernels; so there each difference is shown with the
distance of the two logits, and how often vLLM differs from itself when it is asked several things at a time.

Exits are compared too: in CUDA graphs against eagerly (see `exact_exits`), one session at a time, so that both saw the same
batches.

`exact.json` holds `{"device", "target", "prompts", "max_tokens", "k", "variants": [{"name", "dtype", "batch_invariant",
"failed", "stock_differs", "runs": [{"sessions", "answers", "tokens", "blocks", "differences"}], "exits"}]}`. The exit
status is 1 where a float32 or batch-invariant answer differs, exits do, or float32 could not run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from loadtest.compare import PROMPTS, Question, questions
from loadtest.compare_clients import StockReader
from loadtest.compare_parts import device_name, module_process, on_cuda, says_ready, stop_tokens, until
from loadtest.exact_engine import Plan, first_difference
from loadtest.exact_exits import TOLERANCES, compare, read
from shared.errors import InvalidRequest, OutriderError
from shared.models import fetch
from shared.protocol import Tokens
from shared.stack.ports import free_port
from shared.stack.processes import ManagedProcess

START_S: Final = 420.0
RUN_S: Final = 1200.0
KV_CACHE_MB: Final = 1024
MODULE: Final = "loadtest.exact_engine"
ALONE: Final = "1."
"""How the names of sessions begin that ran one at a time."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A type of weights, and whether vLLM is to use kernels whose results don't depend on the batch. `strict`: no answer
    may differ."""

    name: str
    dtype: str
    batch_invariant: bool = False

    @property
    def strict(self) -> bool:
        return self.dtype == "float32" or self.batch_invariant

    @property
    def environment(self) -> dict[str, str]:
        """For all processes of vLLM's. Triton's attention rounds float32 products to 19 bits unless told otherwise."""
        if self.dtype == "float32":
            return {"TRITON_F32_DEFAULT": "ieee", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
        return {"VLLM_BATCH_INVARIANT": "1"} if self.batch_invariant else {}


VARIANTS: Final[Mapping[str, Variant]] = {
    variant.name: variant
    for variant in (
        Variant("float32", "float32"),
        Variant("bfloat16", "bfloat16"),
        Variant("bfloat16-invariant", "bfloat16", batch_invariant=True),
    )
}
ON_CPU: Final = ("float32",)


@dataclass(frozen=True, slots=True)
class Options:
    """The command's options, read."""

    variants: tuple[Variant, ...]
    sessions: tuple[int, ...]
    count: int
    max_tokens: int
    prompt_tokens: int
    k: int
    cuda: bool


class VariantRun:
    """One variant: vLLM as it comes, our engine, and our engine without graphs, all three started at once on CUDA and one
    after the other on CPU."""

    def __init__(
        self, variant: Variant, options: Options, target: Path, asked: Sequence[Question], folder: Path
    ) -> None:
        self._variant = variant
        self._options = options
        self._target = target
        self._asked = asked
        self._folder = folder
        self._truths = folder / "truths.json"

    async def run(self) -> dict[str, Any]:
        """What came of it, for exact.json; `failed` says why nothing did."""
        variant = self._variant
        told: dict[str, Any] = {
            "name": variant.name,
            "dtype": variant.dtype,
            "batch_invariant": variant.batch_invariant,
            "failed": "",
            "stock_differs": {},
            "runs": [],
            "exits": None,
        }
        self._folder.mkdir(parents=True)
        try:
            await self._measure(told)
        except (OutriderError, TimeoutError) as error:
            told["failed"] = error.message if isinstance(error, OutriderError) else f"too slow: {error!r}"
        return told

    async def _measure(self, told: dict[str, Any]) -> None:
        async with AsyncExitStack() as exits:
            engines = {"graph": False, "eager": True}
            started = {}
            if self._options.cuda:
                started = {name: self._engine(name, eager, exits) for name, eager in engines.items()}
            told["stock_differs"] = await self._truth()
            found = {}
            for name, eager in engines.items():
                process = started.get(name) or self._engine(name, eager, exits)
                out = self._folder / f"{name}.json"
                await until(process, out.exists, RUN_S)
                found[name] = json.loads(out.read_text())
            told["runs"] = found["graph"]["runs"]
            told["engine"] = {
                name: found["graph"][name] for name in ("dtype", "exit_layers", "exits", "notes")
            }
            tolerance = TOLERANCES[self._variant.dtype]
            alone = {
                name: {key: held for key, held in read(one["reports"]).items() if key[0].startswith(ALONE)}
                for name, one in found.items()
            }
            compared = compare(alone["graph"], alone["eager"], tolerance)
            told["exits"] = {**asdict(compared), "equal": compared.equal}

    def _engine(self, name: str, eager: bool, exits: AsyncExitStack) -> ManagedProcess:
        plan = Plan(
            model=str(self._target),
            dtype=self._variant.dtype,
            eager=eager,
            prompts=tuple(question.tokens for question in self._asked),
            sessions=(1,) if eager else self._options.sessions,
            max_tokens=self._options.max_tokens,
            max_block=self._options.k,
            kv_cache_mb=KV_CACHE_MB,
            truths=str(self._truths),
            out=str(self._folder / f"{name}.json"),
        )
        file = self._folder / f"{name}.plan.json"
        plan.write(file)
        process = module_process(
            name, [MODULE, str(file)], self._folder / f"{name}.log", self._variant.environment
        )
        exits.callback(process.stop)
        return process

    async def _truth(self) -> dict[str, int]:
        """Have vLLM say all answers and write them down; how many it says otherwise with so many asked at a time."""
        port = free_port()
        command = ["loadtest.stock_server", "--model", str(self._target), "--port", str(port)]
        command += ["--dtype", self._variant.dtype, "--kv-cache-mb", str(KV_CACHE_MB)]
        command += ["--sessions", str(max(self._options.sessions))]
        log = self._folder / "stock.log"
        process = module_process("stock", command, log, self._variant.environment)
        reader = StockReader(port, stop_tokens(self._target))
        try:
            await until(process, partial(says_ready, log), START_S)
            truths = await self._ask(reader, 1)
            beside = self._truths.with_suffix(".new")
            beside.write_text(json.dumps(truths))
            beside.replace(self._truths)
            differing = {}
            for sessions in self._options.sessions:
                if sessions > 1:
                    said = await self._ask(reader, sessions)
                    pairs = zip(truths, said, strict=True)
                    differing[str(sessions)] = sum(first_difference(0, *pair) is not None for pair in pairs)
            return differing
        finally:
            reader.close()
            await asyncio.to_thread(process.stop)

    async def _ask(self, reader: StockReader, at_a_time: int) -> list[Tokens]:
        places = asyncio.Semaphore(at_a_time)

        async def one(question: Question) -> Tokens:
            async with places:
                return (await reader.ask(question.tokens, self._options.max_tokens, {})).tokens

        return list(await asyncio.gather(*map(one, self._asked)))


async def measure(
    options: Options, prompts: Path, target: Path, folder: Path, say: Any = print
) -> dict[str, Any]:
    """All variants, at once on CUDA and one after the other on CPU; what exact.json holds."""
    asked = await asyncio.to_thread(questions, prompts, target, options.count, options.prompt_tokens)
    places = asyncio.Semaphore(len(options.variants) if options.cuda else 1)

    async def one(variant: Variant) -> dict[str, Any]:
        async with places:
            began_s = time.monotonic()
            found = await VariantRun(variant, options, target, asked, folder / variant.name).run()
            say(f"  {variant.name}: {time.monotonic() - began_s:.0f} s {found['failed']}")
            return found

    variants = await asyncio.gather(*map(one, options.variants))
    return {
        "device": await asyncio.to_thread(device_name),
        "target": target.name,
        "prompts": len(asked),
        "max_tokens": options.max_tokens,
        "k": options.k,
        "variants": variants,
    }


# --- what it says -------------------------------------------------------------------------------------------------


def faults(found: Mapping[str, Any]) -> list[str]:
    """What breaks the promise, in words."""
    said = []
    for variant in found["variants"]:
        name, strict = variant["name"], VARIANTS[variant["name"]].strict
        if variant["failed"]:
            # Batch-invariant kernels need not be there for every GPU: then each difference below counts.
            if name == "float32":
                said.append(f"{name} did not run (see above)")
            continue
        for run in variant["runs"]:
            if strict and run["differences"]:
                said.append(f"{name}, {run['sessions']} at a time: {len(run['differences'])} answers differ")
        if not variant["exits"]["equal"]:
            said.append(f"{name}: exits in graphs are not those computed eagerly: {variant['exits']}")
    return said


def report(found: Mapping[str, Any]) -> str:
    """The figures to read, in Markdown."""
    lines = [
        f"{found['target']} on {found['device']}: {found['prompts']} prompts, {found['max_tokens']} tokens at most, "
        f"blocks of up to {found['k']}",
        "",
        "| variant | at a time | answers equal | tokens | blocks (right, wrong, short, empty) | vLLM differs from itself |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    details = []
    for variant in found["variants"]:
        if variant["failed"]:
            details += ["", f"{variant['name']} did not run: {variant['failed']}"]
            continue
        for run in variant["runs"]:
            equal = run["answers"] - len(run["differences"])
            blocks = ", ".join(
                str(run["blocks"].get(kind, 0)) for kind in ("right", "wrong", "short", "empty")
            )
            itself = variant["stock_differs"].get(str(run["sessions"]), "–")
            lines.append(
                f"| {variant['name']} | {run['sessions']} | {equal} of {run['answers']} | {run['tokens']} | {blocks} | "
                f"{itself} |"
            )
            details += [_difference(variant["name"], run["sessions"], one) for one in run["differences"]]
        exits = variant["exits"]
        details += [
            "",
            f"{variant['name']}: {exits['hints']} hints of exits in graphs and eagerly: {exits['hints'] - exits['beyond']} "
            f"equal within {exits['tolerance']:g}, the likeliest outcome the same in {exits['same_best']}, the largest "
            f"difference of a confidence {exits['worst']:.2g}; {exits['missing']} were there from one side alone",
        ]
    return "\n".join([*lines, *details])


def _difference(variant: str, sessions: int, one: Mapping[str, Any]) -> str:
    gap = "not among the likeliest" if one["gap"] is None else f"logits apart by {one['gap']:.4f}"
    return (
        f"\n{variant}, {sessions} at a time, prompt {one['prompt']}: token {one['position']} is {one['found']}, not "
        f"{one['expected']} ({gap})"
    )


# --- the command --------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--out", type=Path, help="folder for exact.json and exact.md")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON Lines of category and turns")
    parser.add_argument("--count", type=int, default=40, help="prompts, balanced over families (default: 40)")
    parser.add_argument("--sessions", default="1,16", help="answers at a time (default: 1,16)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, help="longer prompts are cut (default: 128)"
    )
    parser.add_argument("--k", type=int, default=5, help="longest block (default: 5)")
    parser.add_argument(
        "--variants",
        help=f"of {', '.join(VARIANTS)}, with commas (default: all on CUDA, {', '.join(ON_CPU)} on CPU)",
    )
    parser.add_argument("--target", type=Path, help="a model's folder (default: the target that ships)")
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs (default: a temporary one)")


def options_of(arguments: argparse.Namespace, *, cuda: bool) -> Options:
    """What was asked for; InvalidRequest says what can't be."""
    names = (arguments.variants or ",".join(VARIANTS if cuda else ON_CPU)).split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise InvalidRequest(f"--variants: there is no {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    try:
        sessions = tuple(int(part) for part in arguments.sessions.split(","))
    except ValueError:
        sessions = ()
    if 1 not in sessions or min(sessions) < 1:
        raise InvalidRequest(
            f"--sessions: {arguments.sessions!r} should be numbers, 1 among them, with commas between"
        )
    for name in ("count", "prompt_tokens", "k"):
        if getattr(arguments, name) < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} should be at least 1")
    if arguments.max_tokens < 2:
        raise InvalidRequest("--max-tokens should be at least 2")
    return Options(
        variants=tuple(VARIANTS[name] for name in names),
        sessions=sessions,
        count=arguments.count,
        max_tokens=arguments.max_tokens,
        prompt_tokens=arguments.prompt_tokens,
        k=arguments.k,
        cuda=cuda,
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; the exit status."""
    options = options_of(arguments, cuda=on_cuda())
    target = arguments.target or fetch()
    with tempfile.TemporaryDirectory(prefix="outrider-exact-") as temporary:
        folder = (arguments.logs or Path(temporary)).resolve()
        found = asyncio.run(measure(options, arguments.prompts, target, folder))
    print(report(found))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "exact.json").write_text(json.dumps(found, indent=1) + "\n")
        (arguments.out / "exact.md").write_text(report(found) + "\n")
    broken = faults(found)
    for fault in broken:
        print(f"NOT EXACT: {fault}")
    return int(bool(broken))
