"""`scripts/gpu`: the project on a GPU machine. Subcommands import what they need themselves: `unpack` runs where nothing
is installed yet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/gpu", description="Outrider on a GPU machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="make the virtual environment, where registries are reachable")
    packing = commands.add_parser(
        "pack", help="make what a machine without registries lacks, as DIR/1, DIR/2, ..."
    )
    packing.add_argument("directory", type=Path, metavar="DIR")
    packing.add_argument(
        "--mib", type=float, default=57.0, help="size of a folder at most, MiB (default: 57)"
    )
    packing.add_argument(
        "--architecture", default="90", help="of the GPU: 90 is Hopper (the default), 'all' keeps all code"
    )
    packing.add_argument("--vllm-wheel", type=Path, help="a copy of vLLM's CUDA wheel that is at hand")
    unpacking = commands.add_parser("unpack", help="install there what `pack` made")
    unpacking.add_argument("directory", type=Path, metavar="DIR")
    unpacking.add_argument("site", type=Path, metavar="SITE")
    running = commands.add_parser("run", help="measure: engine, exactness, the whole system")
    running.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for logs and figures")
    running.add_argument("--only", default="engine,exact,system", help="parts, with commas between")
    running.add_argument("--quick", action="store_true", help="fewer sessions, steps and prompts")
    running.add_argument(
        "--prompts", type=Path, help="JSON Lines of category and turns (Spec-Bench's dev prompts)"
    )
    parsed = parser.parse_args(arguments)
    if parsed.command == "unpack":
        from loadtest.gpu.unpack import unpack

        return unpack(parsed.directory, parsed.site)
    from shared.errors import OutriderError

    try:
        if parsed.command == "run":
            from loadtest.gpu.run import run

            only = [name.strip() for name in parsed.only.split(",")]
            return run(parsed.out, only=only, quick=parsed.quick, prompts=parsed.prompts)
        from loadtest.gpu.pack import pack

        return pack(
            parsed.directory,
            most_mib=parsed.mib,
            architecture=None if parsed.architecture == "all" else int(parsed.architecture),
            wheel=parsed.vllm_wheel,
        )
    except OutriderError as error:
        print(f"scripts/gpu {parsed.command}: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
