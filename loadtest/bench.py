"""`scripts/bench NAME`: the benchmarks, each a module of its own. Times are reported here and asserted nowhere else."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Mapping
from typing import Final, Protocol, cast

from shared.errors import OutriderError

BENCHMARKS: Final[Mapping[str, str]] = {
    "hop": "what the path around the model costs, hop by hop",
    "link": "what a frame takes through a wide-area link",
    "compare": "cloud AR, sync speculative decoding, the paper and Outrider",
    "virtual": "what the rules of the speculation core are worth, in virtual time",
    "sampling": "acceptance and bytes of keyed and of ratio mode",
    "drawn": "what drawn answers send over the link",
    "exact": "answers and exits on real weights, token by token, on CPU or CUDA",
    "system": "the whole system beside vLLM as it comes, on CUDA or CPU (synthetic)",
    "engine": "the engine's steps beside those of vLLM as it comes, on CPU or CUDA",
}


class Benchmark(Protocol):
    """What a benchmark's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Measure, print, write; the exit status."""


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    found: Benchmark | None = None
    for name, told in BENCHMARKS.items():
        command = commands.add_parser(name, help=told)
        if name == next(iter(given), None):  # only this one's packages have to be installed
            found = cast(Benchmark, importlib.import_module(f"loadtest.{name}"))
            found.add_arguments(command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped, as after Ctrl-C
    chosen = parser.parse_args(given)
    if found is None:
        parser.error(f"name the benchmark first: {', '.join(BENCHMARKS)}")
    try:
        return found.run(chosen)
    except OutriderError as error:
        print(f"scripts/bench {chosen.name}: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
