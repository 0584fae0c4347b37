"""The command line, `outrider`: run the local stack, one service of it, or the demo; look at settings and models.

It parses, calls and prints; what it calls is elsewhere and imported when it is needed. An `OutriderError` ends it with
its message and status 1, a wrong argument with status 2.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shared.errors import OutriderError

if TYPE_CHECKING:
    from shared.stack.settings import StackSettings
    from shared.stack.stack import Progress, StackOptions

SERVICES: Final = {
    "gateway": "services.draft_gateway.__main__",
    "verifier": "services.verifier.__main__",
    "kv-session": "services.kv_session.__main__",
}
TRAINING: Final = "training.cli"
GATEWAY_PORT: Final = 8100
LONGEST_RTT_MS: Final = 10_000.0
DRAFTS: Final = ("hybrid", "lookup", "none")

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130


class WrongUse(OutriderError):
    """An argument that can't be right."""

    code = "wrong_use"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parsed = parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except WrongUse as error:
        print(f"outrider: {error.message}", file=sys.stderr)
        return WRONG_USE
    except OutriderError as error:
        print(f"outrider: {error.message}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


# --- arguments ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="outrider", description="Speculative decoding between edge and cloud, with early exits."
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "start everything, stream answers, stay up until Ctrl-C")
    demo.add_argument(
        "--prompt", action="append", metavar="TEXT", help="ask this; may be given several times"
    )
    demo.add_argument("--once", action="store_true", help="exit after the prompts")
    demo.add_argument(
        "--max-tokens", type=_positive, default=96, metavar="N", help="length of an answer (default: 96)"
    )
    _stack_options(demo)

    up = _command(commands, "up", _up, "start the local stack and leave it running")
    up.add_argument("--gateways", type=_positive, default=1, metavar="N", help="how many (default: 1)")
    up.add_argument("--verifiers", type=_positive, default=1, metavar="N", help="how many (default: 1)")
    up.add_argument("--fresh", action="store_true", help="forget what the embedded Kafka and Redis hold")
    up.add_argument(
        "--foreground", action="store_true", help="stay, restart what dies, stop everything on Ctrl-C"
    )
    _stack_options(up)

    _run_dir(_command(commands, "down", _down, "stop the local stack"))
    status = _command(commands, "status", _status, "tell what of the local stack runs, and how it is")
    status.add_argument("--json", action="store_true", help="as JSON")
    _run_dir(status)

    replay = _command(commands, "replay", _replay, "generate an answer again and compare it, token by token")
    replay.add_argument(
        "answer", metavar="ID", help="the answer's `id`; of further choices the id, - and the index"
    )
    replay.add_argument(
        "--gateway",
        metavar="URL",
        help=f"default: that of the local stack, else http://127.0.0.1:{GATEWAY_PORT}",
    )
    replay.add_argument("--json", action="store_true", help="as JSON")
    _run_dir(replay)

    settings = _command(commands, "settings", _settings, "explain every setting")
    settings.add_argument("service", nargs="?", choices=(*SERVICES, "stack"), help="only those that it reads")
    settings.add_argument(
        "--format", choices=("table", "env", "json"), default="table", help="default: table"
    )

    models = _command(commands, "models", None, "fetch, list or check models").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    _command(models, "fetch", _models_fetch, "fetch and convert the target that ships; prints its directory")
    _command(models, "list", _models_list, "list the models in the cache")
    verify = _command(models, "verify", _models_verify, "check the files of a model")
    verify.add_argument("directory", nargs="?", type=Path, help="by default the target that ships")

    _training_commands(commands)
    for name in SERVICES:
        _command(
            commands, name, _service, f"run one {name} in the foreground, set by OUTRIDER_…"
        ).set_defaults(service=name)
    return top


def _training_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`train` and `evaluate`, where `training` is installed: a service's image has only the weights of it."""
    if importlib.util.find_spec("training") and importlib.util.find_spec(TRAINING):
        importlib.import_module(TRAINING).add_commands(commands)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    if run is not None:
        command.set_defaults(command=run)
    return command


def _stack_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kafka", metavar="ADDRESS", default=os.environ.get("OUTRIDER_KAFKA") or None,
        help="a Kafka that runs, host:port[,host:port] (default: $OUTRIDER_KAFKA, else an embedded one)",
    )  # fmt: skip
    command.add_argument(
        "--redis", metavar="URL", default=os.environ.get("OUTRIDER_REDIS_URL") or None,
        help="a Redis that runs, redis://… (default: $OUTRIDER_REDIS_URL, else an embedded one)",
    )  # fmt: skip
    command.add_argument(
        "--target", type=Path, metavar="DIR", default=_path_or_none(os.environ.get("OUTRIDER_MODEL")),
        help="the target model's directory (default: $OUTRIDER_MODEL, else the one that ships)",
    )  # fmt: skip
    command.add_argument(
        "--draft", metavar="hybrid|lookup|none|DIR", default=os.environ.get("OUTRIDER_DRAFT") or "hybrid",
        help="the draft model that comes with Outrider and prompt lookup, lookup alone, nothing, or another small "
        "model's directory (default: $OUTRIDER_DRAFT, else hybrid)",
    )  # fmt: skip
    command.add_argument(
        "--port", type=int, default=GATEWAY_PORT, metavar="N",
        help=f"the gateway's port, if it is free (default: {GATEWAY_PORT})",
    )  # fmt: skip
    command.add_argument(
        "--rtt", type=_milliseconds, metavar="MS",
        help="two places: a gateway at the edge too, linked to the one in the cloud over such a round trip",
    )  # fmt: skip
    command.add_argument(
        "--jitter", type=_milliseconds, default=0.0, metavar="MS",
        help="how much that round trip varies (default: 0)",
    )  # fmt: skip
    _run_dir(command)


def _run_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="default: $OUTRIDER_RUN_DIR, else .outrider/run"
    )


def _path_or_none(text: str | None) -> Path | None:
    return Path(text) if text else None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < LONGEST_RTT_MS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in ms from 0 to {LONGEST_RTT_MS:g}")
    return value


# --- the stack ----------------------------------------------------------------------------------------------------


def _stack_settings(parsed: argparse.Namespace) -> StackSettings:
    from shared.http import load_settings
    from shared.stack.settings import StackSettings

    settings = load_settings(StackSettings)
    return settings.model_copy(update={"run_dir": parsed.run_dir}) if parsed.run_dir else settings


def _options(parsed: argparse.Namespace, **more: object) -> StackOptions:
    from shared.models import verify
    from shared.settings import KafkaFlavor
    from shared.stack.stack import StackOptions

    if parsed.draft not in DRAFTS and not Path(parsed.draft).is_dir():
        raise WrongUse(
            f"--draft {parsed.draft}: no such directory; give 'hybrid', 'lookup', 'none' or a model's directory"
        )
    if not 0 <= parsed.port < 1 << 16:
        raise WrongUse(f"--port {parsed.port}: a port is a number from 0 (any free one) to 65535")
    target = parsed.target or _fetched()
    verify(target)
    flavor = os.environ.get("OUTRIDER_KAFKA_FLAVOR") or KafkaFlavor.APACHE
    try:
        flavor = KafkaFlavor(flavor)
    except ValueError:
        raise WrongUse(f"OUTRIDER_KAFKA_FLAVOR={flavor}: there are {', '.join(KafkaFlavor)}") from None
    draft = parsed.draft if parsed.draft in DRAFTS else str(Path(parsed.draft).resolve())
    threads = os.environ.get("OUTRIDER_ENGINE_THREADS") or str(_spare_threads())
    return StackOptions(
        target=target,
        draft=draft,
        kafka=parsed.kafka,
        kafka_flavor=flavor,
        redis=parsed.redis,
        gateway_port=parsed.port,
        rtt_ms=parsed.rtt,
        jitter_ms=parsed.jitter,
        environment={"OUTRIDER_ENGINE_THREADS": threads},
        **more,  # type: ignore[arg-type]
    )


def _spare_threads() -> int:
    """For the engine, when all else runs on this machine too."""
    return max(1, min(4, len(os.sched_getaffinity(0)) - 1))


def _up(parsed: argparse.Namespace) -> int:
    from shared.stack.record import read
    from shared.stack.signals import interruptible, uninterruptible
    from shared.stack.stack import Stack, StackRunning

    settings = _stack_settings(parsed)
    earlier = read(settings.run_dir)
    if earlier is not None and earlier.running:
        raise StackRunning(
            f"a stack runs already, its gateway at {earlier.gateway_url}; `outrider down` stops it, "
            "--run-dir names another place"
        )
    options = _options(
        parsed,
        gateways=parsed.gateways,
        verifiers=parsed.verifiers,
        fresh=parsed.fresh,
        supervise=parsed.foreground,
        die_with_parent=parsed.foreground,
    )
    stack = Stack(options, settings=settings, report=print_progress)
    with interruptible():
        stack.up()
        print(f"\nup: {stack.gateway_url}/v1 serves {stack.model_name}")
        if stack.record.places:
            print(stack.record.places)
        if not parsed.foreground:
            print("`outrider status` looks at it, `outrider down` stops it")
            return 0
        print("Ctrl-C stops it", flush=True)
        try:
            threading.Event().wait()
        finally:
            with uninterruptible():
                stack.down()
    return 0


def _down(parsed: argparse.Namespace) -> int:
    from shared.stack.record import stop

    record = stop(_stack_settings(parsed).run_dir)
    print("stopped" if record else "nothing runs")
    return 0


def _status(parsed: argparse.Namespace) -> int:
    from shared.stack.record import read

    run_dir = _stack_settings(parsed).run_dir
    record = read(run_dir)
    parts = record.parts if record else ()
    told = [(part, part.health()) for part in parts]
    if parsed.json:
        content = [
            {
                "name": part.name, "url": part.url, "source": part.source, "log": part.log,
                "pid": part.process.pid if part.process else None, "restarts": part.restarts,
                "ready": health.ready, "reasons": health.reasons, "notes": health.notes,
            }
            for part, health in told
        ]  # fmt: skip
        print(json.dumps(content, indent=2))
    elif not parts:
        print(f"no stack in {run_dir}; `outrider up` starts one")
    for part, health in told if not parsed.json else ():
        state = "ready" if health.ready else "not ready"
        pid = f"pid {part.process.pid}" if part.process else "given"
        remarks = "; ".join((*health.reasons, *health.notes))
        print(f"{part.name:<14} {state:<10} {pid:<12} {part.url:<32} {remarks}".rstrip())
    return 0 if parts and all(health.ready for _, health in told) else FAILED


def _demo(parsed: argparse.Namespace) -> int:
    from shared.stack.demo import Demo
    from shared.stack.signals import interruptible

    demo = Demo(
        settings=_stack_settings(parsed),
        options=lambda: _options(parsed, fresh=True, supervise=True, die_with_parent=True),
        prompts=parsed.prompt,
        max_tokens=parsed.max_tokens,
        once=parsed.once,
    )
    with interruptible():
        return demo.run()


def _replay(parsed: argparse.Namespace) -> int:
    from shared.replay import replay
    from shared.stack.record import read

    record = None if parsed.gateway else read(_stack_settings(parsed).run_dir)
    url = parsed.gateway or (record.gateway_url if record else "") or f"http://127.0.0.1:{GATEWAY_PORT}"
    found = replay(url, parsed.answer)
    if parsed.json:
        print(json.dumps(asdict(found) | {"equal": found.equal}))
        return 0 if found.equal else FAILED
    print(found.text)
    print("\ntokens:", *found.again)
    if found.equal:
        print(f"equal: {len(found.tokens)} tokens, seed {found.seed}, temperature {found.temperature:g}")
        return 0
    where = found.first_difference
    print(
        f"different from token {where} on: {len(found.tokens)} tokens, then "
        f"{', '.join(map(str, found.tokens[where : where + 5]))}; again {len(found.again)}, then "
        f"{', '.join(map(str, found.again[where : where + 5]))}"
    )
    return FAILED


def print_progress(progress: Progress) -> None:
    """One line for one thing that happened."""
    line = f"{progress.seconds:6.1f} s  {progress.part:<13} {progress.state.value:<9} {progress.text}"
    print(line.rstrip(), flush=True)


# --- settings, models, services -----------------------------------------------------------------------------------


def _settings(parsed: argparse.Namespace) -> int:
    from shared import settings_reference as reference

    settings = reference.collect([parsed.service] if parsed.service else reference.MODELS)
    form = {"table": reference.as_table, "env": reference.as_environment, "json": reference.as_json}
    print(form[parsed.format](settings))
    return 0


def _models_fetch(parsed: argparse.Namespace) -> int:
    print(_fetched())
    return 0


def _fetched() -> Path:
    """The target that ships, fetched if need be, with a progress bar."""
    from shared.models import fetch

    bar = ProgressBar("model")
    try:
        return fetch(bar)
    finally:
        bar.close()


def _models_list(parsed: argparse.Namespace) -> int:
    from shared.models import cached_models, describe

    found = cached_models()
    for directory in found:
        model = describe(directory)
        print(
            f"{model.name}: {model.layers} layers of {model.hidden}, {model.vocabulary} tokens, "
            f"{model.bytes / 1e6:.0f} MB, {model.path}"
        )
    if not found:
        print("none in the cache; `outrider models fetch` gets the one that ships")
    return 0


def _models_verify(parsed: argparse.Namespace) -> int:
    from shared.models import default_target, verify

    directory = parsed.directory or default_target()
    verify(directory, deep=True)
    print(f"{directory} is whole")
    return 0


def _service(parsed: argparse.Namespace) -> int:
    try:
        module = importlib.import_module(SERVICES[parsed.service])
    except ImportError as error:
        raise OutriderError(
            f"{parsed.service} can't be run here: {error}; install what it needs (pip install "
            f'"outrider[{"verifier-cpu" if parsed.service == "verifier" else parsed.service}]")'
        ) from None
    run: Callable[[], int] = module.main
    return run()


class ProgressBar:
    """A bar on the terminal, or a line a step where there is none. Call it with what is done and how much of it."""

    WIDTH: Final = 30

    def __init__(self, title: str) -> None:
        self._title = title
        self._tty = sys.stderr.isatty()
        self._step = ""
        self._drawn = False

    def __call__(self, step: str, share: float) -> None:
        if self._tty:
            filled = round(share * self.WIDTH)
            bar = "█" * filled + "·" * (self.WIDTH - filled)
            print(
                f"\r\033[K{self._title}: {step:<22} {bar} {share:4.0%}", end="", file=sys.stderr, flush=True
            )
            self._drawn = True
        elif step != self._step:
            print(f"{self._title}: {step}", file=sys.stderr, flush=True)
        self._step = step

    def close(self) -> None:
        """Leave the line."""
        if self._drawn:
            print(file=sys.stderr, flush=True)
        self._drawn = False


if __name__ == "__main__":
    sys.exit(main())
