"""`scripts/bench NAME`: the benchmarks, each a module of its own. Times are reported here and asserted nowhere else."""

from __future__ import annotations

import argparse
import signal
import sys

from loadtest import compare, drawn, hop, link, sampling
from shared.errors import OutriderError


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    benchmarks = parser.add_subparsers(dest="name", required=True)
    hop.add_arguments(benchmarks.add_parser("hop", help="what the path around the model costs, hop by hop"))
    link.add_arguments(benchmarks.add_parser("link", help="what a frame takes through a wide-area link"))
    compare.add_arguments(
        benchmarks.add_parser("compare", help="cloud AR, sync speculative decoding, the paper and Outrider")
    )
    sampling.add_arguments(
        benchmarks.add_parser("sampling", help="acceptance and bytes of keyed and of ratio mode")
    )
    drawn.add_arguments(benchmarks.add_parser("drawn", help="what drawn answers send over the link"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped, as after Ctrl-C
    chosen = parser.parse_args(arguments)
    run = {
        "hop": hop.run,
        "link": link.run,
        "compare": compare.run,
        "sampling": sampling.run,
        "drawn": drawn.run,
    }[chosen.name]
    try:
        return run(chosen)
    except OutriderError as error:
        print(f"scripts/bench {chosen.name}: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
