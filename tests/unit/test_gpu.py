"""What `scripts/gpu` carries to a GPU machine: cut and joined again, without other GPUs' code, found by vLLM there."""

from __future__ import annotations

import json
import struct
import subprocess
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from random import Random

import pytest

from loadtest.gpu import pack, parts, run, unpack
from loadtest.gpu.fatbin import CUBIN, ENTRY, MAGIC, PTX, REGION, only_for, regions
from shared.errors import InvalidRequest

# --- parts ---


def written(tmp_path: Path, sizes: dict[str, int], most: int) -> tuple[Path, dict[str, bytes]]:
    random = Random(0)
    contents = {name: random.randbytes(size) for name, size in sizes.items()}
    files = []
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        files.append((tmp_path / name, f"what {name} is for"))
    parts.write(tmp_path / "packed", files, most)
    return tmp_path / "packed", contents


def read(packed: Path, into: Path) -> dict[str, bytes | None]:
    into.mkdir()
    return {item.name: path and path.read_bytes() for item, path in parts.read(packed, into)}


def test_what_is_cut_is_joined_again_and_no_folder_but_the_last_has_room_left(tmp_path: Path) -> None:
    packed, contents = written(tmp_path, {"a": 70_000, "b": 10, "c": 120_001}, most=50_000)
    sizes = [path.stat().st_size for path in parts.folders(packed)]
    assert len(sizes) > 3 and set(sizes[:-1]) == {50_000} and 0 < sizes[-1] <= 50_000
    assert read(packed, tmp_path / "out") == contents


def test_without_the_last_folders_what_the_others_hold_in_full_is_there(tmp_path: Path) -> None:
    packed, contents = written(tmp_path, {"a": 60_000, "b": 100_000, "c": 10}, most=50_000)
    last = parts.folders(packed)[-1]
    last.unlink()
    assert read(packed, tmp_path / "out") == {"a": contents["a"], "b": None, "c": None}


def test_a_folder_missing_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    packed, contents = written(tmp_path, {"a": 40_000, "b": 100_000, "c": 10}, most=50_000)
    (packed / "2" / parts.PART).unlink()
    assert read(packed, tmp_path / "out") == {"a": contents["a"], "b": None, "c": None}


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no 1/part"):
        list(parts.read(tmp_path, tmp_path))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / parts.PART).write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="is not what `scripts/gpu pack` makes"):
        list(parts.read(tmp_path, tmp_path))


# --- other GPUs' code ---


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    header = ENTRY.size + 24
    return ENTRY.pack(kind, 0x101, header, len(payload), 0, 0, 0, 0, architecture) + bytes(24) + payload


def region(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return REGION.pack(struct.unpack("<I", MAGIC)[0], 1, REGION.size, len(body)) + body


def payloads(library: bytes) -> list[list[bytes]]:
    return [[library[one.start : one.end] for one in found] for found in regions(library)]


def test_machine_code_of_one_architecture_stays_and_all_else_is_zero_in_place() -> None:
    native = region(entry(CUBIN, 80, b"old!"), entry(CUBIN, 90, b"hopper"), entry(PTX, 90, b"ptx90"))
    portable = region(entry(PTX, 80, b"ptx80"), entry(PTX, 100, b"ptx100"), entry(CUBIN, 80, b"more"))
    library = b"ELF" + MAGIC + b"no region" + native + b"code between" + portable + b"end"
    kept = only_for(library, 90)
    assert len(kept) == len(library)
    assert payloads(kept) == [[bytes(4), b"hopper", bytes(5)], [b"ptx80", bytes(6), bytes(4)]]
    assert (
        kept.startswith(b"ELF" + MAGIC + b"no region") and b"code between" in kept and kept.endswith(b"end")
    )


def test_a_library_whose_code_is_not_as_expected_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry of machine code"):
        only_for(region(entry(7, 90, b"what?")), 90)
    with pytest.raises(ValueError, match="no entry of machine code"):
        only_for(region(entry(CUBIN, 90, b"longer than its region")[:-4]), 90)
    with pytest.raises(ValueError, match="runs over its region"):
        only_for(region(entry(CUBIN, 90, b"whole"), b"a stump"), 90)


# --- pack and unpack ---


def test_jars_keep_classes_and_this_systems_code_and_lose_that_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libs = tmp_path / "libs"
    libs.mkdir()
    names = [
        "a/B.class",
        "linux/amd64/x.so",
        "linux/aarch64/x.so",
        "org/Linux/x86_64/y.so",
        "win/amd64/x.dll",
    ]
    with zipfile.ZipFile(libs / "kafka.jar", "w", zipfile.ZIP_DEFLATED) as jar:
        for name in names:
            jar.writestr(name, name * 10)
    monkeypatch.setattr(pack, "find_libs", lambda settings, say: libs)
    pack.copy_jars(tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "kafka.jar") as jar:
        assert jar.namelist() == ["a/B.class", "linux/amd64/x.so", "org/Linux/x86_64/y.so"]
        assert jar.read("a/B.class") == b"a/B.class" * 10


def test_of_vllms_wheel_python_and_two_libraries_are_carried(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm.whl"
    code = region(entry(CUBIN, 80, b"old!"), entry(CUBIN, 90, b"new!"))
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*pack.LIBRARIES, "vllm/_moe_C.abi3.so"):
            archive.writestr(name, code)
        for name in (
            "vllm/a.py",
            "vllm/x.cuh",
            "vllm-0.32.0.dist-info/METADATA",
            "vllm-0.32.0.data/scripts/vllm",
        ):
            archive.writestr(name, "text")
    pack.unpack_vllm(wheel, tmp_path / "python", tmp_path / "libraries", 90)

    def held(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert held(tmp_path / "python") == {"vllm/a.py", "vllm-0.32.0.dist-info/METADATA"}
    assert held(tmp_path / "libraries") == set(pack.LIBRARIES)
    assert payloads((tmp_path / "libraries" / pack.LIBRARIES[0]).read_bytes()) == [[bytes(4), b"new!"]]


def test_what_is_packed_is_unpacked_with_the_plugin_announced_and_an_environment_to_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for archive, content in zip(unpack.NEEDED, ("vllm/a.py", "vllm/b.so"), strict=True):
        folder = tmp_path / archive.partition(".")[0]
        (folder / content).parent.mkdir(parents=True)
        (folder / content).write_text(content)
        files.append((pack.compressed(tmp_path / archive, folder), archive))
    site = tmp_path / "a site"
    parts.write(tmp_path / "packed", files, 1 << 20)
    assert unpack.unpack(tmp_path / "packed", site) == 0
    assert (site / "vllm" / "a.py").read_text() == "vllm/a.py" and (site / "vllm" / "b.so").exists()
    (found,) = (one for one in distributions(path=[str(site)]) if one.name == "outrider")
    (plugin,) = found.entry_points.select(group="vllm.general_plugins")
    assert plugin.value == "services.verifier.engine:register"
    told = ["bash", "-c", f"set -u; . '{site}/env'; echo $OUTRIDER_CACHE; echo $PYTHONPATH"]
    cache, path = subprocess.run(told, capture_output=True, text=True, check=True).stdout.splitlines()
    assert cache == str(site / "outrider-cache") and path == f"{site}:{unpack.ROOT}"


def test_unpacking_without_vllm_fails_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "python"
    (folder / "vllm").mkdir(parents=True)
    (tmp_path / "libraries.tar.xz").write_bytes(Random(0).randbytes(100_000))
    files = [(pack.compressed(tmp_path / "python.tar.xz", folder), "code")]
    files.append((tmp_path / "libraries.tar.xz", "vLLM's libraries"))
    parts.write(tmp_path / "packed", files, 60_000)
    (tmp_path / "packed" / "2" / parts.PART).unlink()
    assert unpack.unpack(tmp_path / "packed", tmp_path / "site") == 1
    assert "not in these folders: libraries.tar.xz (vLLM's libraries)" in capsys.readouterr().out


# --- run ---


def test_one_parts_failure_stops_no_other_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def teed(command: list[str], log: Path) -> int:
        asked.append(command[3])
        return int(command[3] == "exact")

    monkeypatch.setattr(run, "_teed", teed)
    assert run.run(tmp_path) == 1
    assert asked == ["engine", "engine", "exact", "system"]
    told = json.loads((tmp_path / "run.json").read_text())
    assert [one["status"] for one in told] == [0, 0, 1, 0]
    assert run.run(tmp_path, only=["system"], quick=True) == 0


def test_a_part_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no part 'engines'; there are engine, exact, system"):
        run.run(tmp_path, only=["engines"])
