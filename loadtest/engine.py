"""The engine's steps beside those of vLLM as it comes: `scripts/bench engine`, on CPU or CUDA.

One process holds an engine for each mode (see `engine_modes`; the two of ours with exits share one), over one set of
weights, and drives them by hand, in turns: some steps of one mode, then of the next, so that whatever disturbs the machine
disturbs all. Sessions of random prompts are prefilled first. In a turn, a mode that verifies gets blocks of which half are
right and half have one wrong token, at a random place; modes that say one token a step get as many steps as it takes to
say as much. So all modes walk over the same text, with the same context. What vLLM as it comes says is taken down before;
every stream is compared with it.

`engine.json` holds `{"device", "shapes", "k", "exits", "rows": [{"mode", "sessions", "step_ms": {"median", "p90", "spread"},
"exit_on_host_ms": {layer: ms}, ...}], "ratios": [...]}` and what else `engine_report` says; `engine.md` is the same to read,
and `timeline.svg` shows a step of the median length.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from loadtest import engine_profile
from loadtest.engine_modes import (
    ELEMENT_BYTES,
    MODES,
    STOCK_AR,
    Kind,
    Mode,
    Plan,
    Sizes,
    build,
    check_memory,
    chosen_modes,
    device_of,
    layers_of,
    notes_of,
)
from loadtest.engine_report import Measured, Setting, Step, draw, report, shown_step, table
from loadtest.engine_shapes import AUTO, NONE, SHAPES, SMOLLM2, Target, exit_layers, find_target, write_exits
from services.verifier.engine.launch import engine_environment
from shared.errors import InvalidRequest

if TYPE_CHECKING:
    from loadtest.engine_modes import Engine
    from loadtest.engine_steps import Driver, Ear

PROMPT: Final = 100
FIRST_TOKEN: Final = 3
"""Token ids below are special."""
TURN: Final = 8
TURNS_A_PASS: Final = 2
"""A pass opens sessions afresh, so that they don't grow without end: the KV caches of all modes have to fit."""
PROFILED: Final = (STOCK_AR, "verify", "verify_exits", "floor")
DEVICES: Final = (AUTO, "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Options:
    """The command's options, read. `steps` are those of a mode that verifies."""

    shapes: str
    sessions: tuple[int, ...]
    k: int
    exits: str
    steps: int
    modes: tuple[Mode, ...]
    device: str
    dtype: str
    threads: int
    stock_runner: str
    profile: bool
    out: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--shapes", default=SMOLLM2, help=f"{', '.join((*SHAPES, SMOLLM2))}, or a folder with a config.json"
    )
    parser.add_argument("--sessions", default="1,4,16,64", help="sessions at a time; several with commas")
    parser.add_argument("--k", type=int, default=5, help="tokens of a block")
    parser.add_argument(
        "--exits",
        default=AUTO,
        help="depths such as 0.25,0.5,0.75, or layers, or none (default: those trained for the target, else these depths)",
    )
    parser.add_argument(
        "--steps", type=int, default=64, help="steps with blocks, for each number of sessions"
    )
    parser.add_argument("--modes", default=",".join(MODES), help="several with commas (default: all)")
    parser.add_argument("--device", choices=DEVICES, default=AUTO, help="default: what vLLM is built for")
    parser.add_argument("--dtype", choices=(AUTO, *ELEMENT_BYTES), default=AUTO)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine")
    parser.add_argument(
        "--stock-runner",
        choices=(AUTO, "v1"),
        default=AUTO,
        help="model runner of vLLM as it comes: its own choice, or the one that our engine builds on",
    )
    parser.add_argument(
        "--profile", action="store_true", help="also say where a step's time goes: profile.md, profile.json"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for engine.json, engine.md, timeline.svg"
    )


def read_options(arguments: argparse.Namespace) -> Options:
    """The options; `InvalidRequest` names one that makes no sense."""
    try:
        sessions = tuple(sorted({int(part) for part in arguments.sessions.split(",")}))
    except ValueError:
        sessions = ()
    if not sessions or sessions[0] < 1:
        raise InvalidRequest(
            f"--sessions: {arguments.sessions!r} should be numbers from 1, several with commas, such as 1,4,16"
        )
    for name, least in (("k", 1), ("steps", 2), ("threads", 1)):
        if getattr(arguments, name) < least:
            raise InvalidRequest(f"--{name}: {getattr(arguments, name)} should be {least} or more")
    modes = chosen_modes(arguments.modes)
    if arguments.exits == NONE:
        modes = tuple(mode for mode in modes if mode.kind is not Kind.VERIFY or not mode.exits)
    return Options(
        shapes=arguments.shapes,
        sessions=sessions,
        k=arguments.k,
        exits=arguments.exits,
        steps=arguments.steps,
        modes=modes,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
        stock_runner=arguments.stock_runner,
        profile=arguments.profile,
        out=arguments.out,
    )


# --- how much is said ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passes:
    """How the steps of a row are laid out: for each pass, the steps of its turns."""

    turns: tuple[tuple[int, ...], ...]
    k: int

    @classmethod
    def of(cls, steps: int, k: int) -> Passes:
        """So many steps, in turns of `TURN` and passes of `TURNS_A_PASS` turns."""
        turns = [min(TURN, steps - done) for done in range(0, steps, TURN)]
        passes = [tuple(turns[done : done + TURNS_A_PASS]) for done in range(0, len(turns), TURNS_A_PASS)]
        return cls(tuple(passes), k)

    @property
    def tokens_a_step(self) -> float:
        """What a step with blocks says for a session, on average: K + 1 tokens of right blocks, half of that else."""
        return 0.75 * (self.k + 1)

    @property
    def room(self) -> int:
        """Tokens that a session may say in a pass, with some to spare."""
        longest = max(sum(turns) for turns in self.turns)
        right, wrong = math.ceil(longest / 2), longest // 2
        return 1 + right * (self.k + 1) + wrong * self.k + 2 * (self.k + 1)


# --- measuring ----------------------------------------------------------------------------------------------------


class Bench:
    """All engines, and what was measured."""

    def __init__(self, plan: Plan, passes: Passes, drivers: Sequence[Driver]) -> None:
        self._plan = plan
        self._passes = passes
        self._drivers = drivers
        self._random = Random(0)

    def measure(self, sessions: int) -> list[Measured]:
        """A row for each mode."""
        steps: dict[str, list[Step]] = {driver.mode.name: [] for driver in self._drivers}
        differences: dict[str, list[tuple[int, int]]] = {name: [] for name in steps}
        turn = 0
        for number, turns in enumerate(self._passes.turns):
            name = f"{sessions}.{number}"
            self._open(name, sessions)
            target = self._drivers[0].said
            for length in turns:
                target += length * self._passes.tokens_a_step
                for driver in _rotated(self._drivers, turn):
                    steps[driver.mode.name] += self._turn(driver, turn, length, target)
                turn += 1
            for driver in self._drivers:
                differences[driver.mode.name] += driver.differences(sessions * number)
                driver.close()
        return [
            Measured(name, sessions, own, sessions * len(self._passes.turns), differences[name])
            for name, own in steps.items()
        ]

    def profile(self, sessions: int) -> list[dict[str, Any]]:
        """Where the time of a step goes, in the modes of `PROFILED`."""
        self._open(f"{sessions}.profile", sessions)
        steps = max(1, max(map(sum, self._passes.turns)) // 2)
        found = [
            driver.profiled(Random(0), steps=steps)
            for driver in self._drivers
            if driver.mode.name in PROFILED
        ]
        for driver in self._drivers:
            driver.close()
        return found

    def _open(self, name: str, sessions: int) -> None:
        vocabulary = self._plan.target.checkpoint.vocab_size
        prompts = [
            [self._random.randrange(min(FIRST_TOKEN, vocabulary - 1), vocabulary) for _ in range(PROMPT)]
            for _ in range(sessions)
        ]
        room = self._passes.room
        alone = next(driver for driver in self._drivers if driver.mode.name == STOCK_AR)
        alone.open(f"{name}.alone", prompts, [()] * sessions, room + 1)
        truths = alone.say(room)
        alone.close()
        for driver in self._drivers:
            driver.open(name, prompts, truths, room)

    def _turn(self, driver: Driver, turn: int, length: int, target: float) -> list[Step]:
        """Steps with blocks are counted; all others go on until as much is said."""
        random = Random(turn)  # the same blocks in all modes that verify
        if driver.mode.kind is Kind.VERIFY:
            return driver.turn(random, turn=turn, steps=length, target=math.inf, room=self._passes.room)
        most = math.ceil(length * self._passes.tokens_a_step)
        return driver.turn(random, turn=turn, steps=most, target=target, room=self._passes.room)


def _rotated(drivers: Sequence[Driver], by: int) -> Iterator[Driver]:
    """All of them, each time another first."""
    start = by % len(drivers)
    yield from drivers[start:]
    yield from drivers[:start]


def measure(
    options: Options, folder: Path, tell: Callable[[str], None]
) -> Iterator[tuple[Setting, list[Measured]]]:
    """Build all engines and measure: what there is after each number of sessions. To be called within
    `engine_environment`."""
    import torch

    from loadtest.engine_steps import Ear

    torch.set_num_threads(options.threads)
    target = find_target(options.shapes, folder)
    device = device_of(options.device)
    passes = Passes.of(options.steps, options.k)
    layers, exits = _exits(options, target, folder)
    tokens = PROMPT + passes.room + 2 * (options.k + 1)
    if tokens > target.checkpoint.context:
        raise InvalidRequest(
            f"--shapes {options.shapes}: its context is {target.checkpoint.context} tokens, {tokens} are needed: ask for a "
            "smaller --k"
        )
    plan = Plan(
        target=target,
        device=device,
        dtype=_dtype(options, target, device),
        threads=options.threads,
        sizes=Sizes(tuple(options.sessions), tokens, options.k),
        layers=layers,
        exits=exits,
        address=f"ipc://{folder / 'exits'}",
        stock_runner=options.stock_runner,
    )
    check_memory(plan, options.modes)
    ear = Ear(plan.address)
    try:
        engines, notes = _engines(plan, options.modes, tell)
        drivers = [_driver(engine, plan, ear) for engine in engines]
        bench = Bench(plan, passes, drivers)
        exits_at = next((layers_of(engine) for engine in engines if engine.mode.exits), ())
        setting = _setting(plan, exits_at, engines, notes)
        measured: list[Measured] = []
        for sessions in options.sessions:
            began = time.monotonic()
            measured += bench.measure(sessions)
            tell(f"{sessions} sessions measured in {time.monotonic() - began:.1f} s")
            yield setting, measured
        if options.profile:
            profiles = [own for sessions in options.sessions for own in bench.profile(sessions)]
            write_profiles(options.out, profiles)
    finally:
        ear.close()


def _exits(options: Options, target: Target, folder: Path) -> tuple[str, str]:
    """Layers and modules of the exits, as the verifier's settings say it."""
    if target.trained and options.exits == AUTO:
        return AUTO, AUTO
    layers = exit_layers(options.exits, target)
    if not layers:
        return NONE, NONE
    listed = ",".join(str(layer) for layer in layers)
    if target.trained:
        return listed, AUTO
    file = folder / "exits.safetensors"
    write_exits(target, layers, file)
    return listed, str(file)


def _dtype(options: Options, target: Target, device: str) -> str:
    if options.dtype != AUTO:
        return options.dtype
    return "float32" if device == "cpu" else target.dtype


def _engines(
    plan: Plan, modes: Sequence[Mode], tell: Callable[[str], None]
) -> tuple[list[Engine], list[str]]:
    """All engines, the first of which lends its weights to the others; and what is to be said of them."""
    from loadtest.engine_worker import weights_of

    engines: list[Engine] = []
    notes: list[str] = []
    # n-gram speculation comes last: it imports numba, over which vLLM stumbles when it makes a CPU worker
    for mode in sorted(modes, key=lambda mode: mode.ngram):
        began = time.monotonic()
        twin = next((engine for engine in engines if mode.shares(engine.mode)), None)
        if twin is not None:
            engines.append(replace(twin, mode=mode))
            continue
        weights = weights_of(engines[0].worker.model_runner.get_model()) if engines else {}
        try:
            engine = build(plan, mode, weights)
        except RuntimeError as error:
            if mode.own or not engines:
                raise
            notes.append(f"{mode.name}: vLLM can't run it here ({error})")
            tell(notes[-1])
            continue
        if engine is None:
            notes.append(f"{mode.name}: vLLM does not schedule asynchronously here")
            tell(notes[-1])
            continue
        engines.append(engine)
        tell(f"{mode.name}: ready in {time.monotonic() - began:.1f} s")
        if mode.own and mode.exits:
            notes += [note for note in notes_of(engine) if note not in notes]
    return sorted(engines, key=lambda engine: modes.index(engine.mode)), notes


def _driver(engine: Engine, plan: Plan, ear: Ear) -> Driver:
    from loadtest.engine_steps import Driver

    awaited = engine.mode.exits and engine.mode.kind is Kind.VERIFY
    return Driver(
        engine,
        ear,
        k=plan.sizes.k,
        vocabulary=plan.target.checkpoint.vocab_size,
        exits=len(layers_of(engine)) if awaited else 0,
    )


# --- what it was measured on --------------------------------------------------------------------------------------


def _setting(plan: Plan, exits: Sequence[int], engines: Sequence[Engine], notes: Sequence[str]) -> Setting:
    facts: dict[str, Any] = {
        "dtype": plan.dtype,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": _versions(plan.device),
        "threads": plan.threads,
        "weights": "random" if plan.target.dummy else plan.target.name,
        "runners": {engine.mode.name: _runner(engine) for engine in engines},
        "notes": list(notes),
    }
    return Setting(_device_name(plan.device), plan.target.name, plan.sizes.k, exits, facts)


def _runner(engine: Engine) -> str:
    """The model runner that an engine has."""
    kind = type(engine.worker.model_runner)
    return f"{kind.__module__}.{kind.__qualname__}"


def commit() -> str:
    """The commit that is checked out, with a plus where files have changed; empty where there is no repository."""
    here = Path(__file__).parent
    try:
        name = _git(here, "rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _versions(device: str) -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["vllm"] = importlib.import_module("vllm.version").__version__
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine() or "cpu")


# --- running it ---------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Measure, write after each number of sessions, print."""
    options = read_options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    shown = ""
    with (
        engine_environment(options.threads),
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        tempfile.TemporaryDirectory(prefix="outrider-bench-") as folder,
    ):
        for setting, measured in measure(options, Path(folder), lambda said: print(said, flush=True)):
            shown = write(options.out, setting, measured)
    print(shown)
    return 0


def write_profiles(out: Path, profiles: Sequence[Mapping[str, Any]]) -> None:
    """`profile.json` and `profile.md`."""
    (out / "profile.json").write_text(json.dumps(list(profiles), indent=1) + "\n", encoding="utf-8")
    (out / "profile.md").write_text(engine_profile.report(profiles), encoding="utf-8")


def write(out: Path, setting: Setting, measured: Sequence[Measured]) -> str:
    """`engine.json`, `engine.md` and, where steps with exits were measured, `timeline.svg`; what `engine.md` says."""
    held = report(setting, measured)
    (out / "engine.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    shown = table(held)
    found = shown_step(measured)
    if found is not None:
        sessions, step = found
        title = f"A step of {sessions} sessions, K = {setting.k}, with exits: {setting.shapes} on {setting.device} (ms)"
        draw(out / "timeline.svg", title, step)
        shown += "\n![a step](timeline.svg)\n"
    (out / "engine.md").write_text(shown, encoding="utf-8")
    return shown
