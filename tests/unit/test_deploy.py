"""The deployment files agree with their schemas and with the code, and faults in them are found.

No container is run: there may be no Docker engine and no cluster here.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests import deployment
from tests.deployment import DOCKERFILES, ROOT, Container, Probe

NAMED_IN = (
    "docker-compose.yml",
    ".env.example",
    "docker/models/provide",
    "docs/deploy.md",
    "k8s/README.md",
    *(f"k8s/base/{path.name}" for path in deployment.BASE.iterdir()),
    *(str(path.relative_to(ROOT)) for path in DOCKERFILES.values()),
)


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> deployment.Built:
    """What k8s/base becomes; the run prints who built it."""
    found = deployment.kubernetes()
    by = {"kubectl": "kubectl kustomize", "files": "the tests, from its files: there is no kubectl here"}
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nk8s/base: built by {by[found.by]}", flush=True)
    return found


# --- what holds -------------------------------------------------------------------------------------------------------


def test_the_compose_file_follows_the_specification_and_publishes_only_the_gateway() -> None:
    assert deployment.check_compose(deployment.compose_document()) == []


def test_compose_containers_agree_with_the_code() -> None:
    containers = deployment.compose_containers(deployment.compose_document())
    assert {container.image for container in containers} == set(DOCKERFILES)
    assert [fault for container in containers for fault in deployment.check_container(container)] == []


def test_the_kubernetes_objects_are_valid_meet_each_other_and_are_restricted(built: deployment.Built) -> None:
    assert len(built.objects) >= 8
    assert deployment.check_objects(built.objects) == []


def test_kubernetes_containers_agree_with_the_code(built: deployment.Built) -> None:
    containers = deployment.kubernetes_containers(built.objects)
    assert {container.image for container in containers} == set(DOCKERFILES)
    assert [fault for container in containers for fault in deployment.check_container(container)] == []


@pytest.mark.parametrize(
    "name", ["OUTRIDER_GATEWAY_NAME", "OUTRIDER_VERIFIER_NAME", "OUTRIDER_KV_SESSION_NAME"]
)
def test_every_service_is_named_after_its_pod(built: deployment.Built, name: str) -> None:
    fields = [
        entry["valueFrom"]["fieldRef"]["fieldPath"]
        for found in built.objects
        for content in found.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ())
        for entry in content["env"]
        if entry["name"] == name
    ]
    assert fields == ["metadata.name"]


@pytest.mark.parametrize("name", ["verifier", "kv-session"])
def test_static_members_of_consumer_groups_keep_their_names(built: deployment.Built, name: str) -> None:
    kinds = [found["kind"] for found in built.objects if found["metadata"]["name"] == name]
    assert "StatefulSet" in kinds
    assert "Deployment" not in kinds


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl to compare with")
def test_reading_the_files_without_kubectl_gives_the_same_containers(
    built: deployment.Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    read = deployment.kubernetes()
    assert read.by == "files"

    def by_place(found: deployment.Built) -> dict[str, Container]:
        return {item.where: item for item in deployment.kubernetes_containers(found.objects)}

    assert by_place(read) == by_place(built)
    assert deployment.check_objects(read.objects) == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_agrees_with_the_code_and_what_it_copies_is_there(name: str) -> None:
    assert deployment.check_container(deployment.image(name)) == []
    assert deployment.check_sources(DOCKERFILES[name]) == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_as_nobody_special_on_slim_python(name: str) -> None:
    found = deployment.instructions(DOCKERFILES[name])
    bases = {step.rest.split()[0] for step in found if step.name == "FROM"} - {"base", "runtime-${FLAVOR}"}
    assert bases == {"python:3.11-slim"}
    assert [step.rest for step in found if step.name == "USER"] == ["10001:10001"]


@pytest.mark.parametrize("path", NAMED_IN)
def test_every_variable_that_a_file_names_is_a_setting(path: str) -> None:
    assert deployment.check_names(ROOT / path) == []


@pytest.mark.parametrize("path", [".env.example", "k8s/base/settings.env"])
def test_every_value_in_a_file_of_settings_is_one_that_the_setting_can_have(path: str) -> None:
    variables = deployment.variables_in(ROOT / path)
    assert variables
    assert deployment.check_variables(dict(variables), path) == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="only kubectl builds overlays")
def test_the_overlay_in_the_readme_builds_and_changes_what_it_says(tmp_path: Path) -> None:
    readme = (ROOT / "k8s/README.md").read_text()
    overlay = tmp_path / "my-overlay"
    overlay.mkdir()
    shutil.copytree(deployment.BASE, tmp_path / "k8s" / "base")
    (overlay / "kustomization.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0])
    objects = deployment.kubernetes(overlay).objects
    assert deployment.check_objects(objects) == []
    containers = deployment.kubernetes_containers(objects)
    assert {container.image.rpartition("/")[0] for container in containers} == {
        "registry.example.com/outrider"
    }
    assert {container.tag for container in containers} == {deployment.VERSION}
    services = [container for container in containers if "-m" in container.command]
    assert len(services) == 3
    assert {container.variables["OUTRIDER_KAFKA"] for container in services} == {
        "kafka-kafka-bootstrap.kafka:9092"
    }


# --- what is found out ------------------------------------------------------------------------------------------------

ComposeFault = Callable[[dict[str, Any]], object]

COMPOSE_FAULTS: dict[str, tuple[ComposeFault, str]] = {
    "an unknown key": (lambda it: it["services"]["redis"].update(restarts="always"), "restarts"),
    "a port on every address": (
        lambda it: it["services"]["draft-gateway"].update(ports=["8100:8100"]),
        "on every address",
    ),
    "a port of Redis": (
        lambda it: it["services"]["redis"].update(ports=["127.0.0.1:6379:6379"]),
        "only the gateway",
    ),
    "a dependency that is not there": (
        lambda it: it["services"]["verifier"]["depends_on"].update(
            zookeeper={"condition": "service_started"}
        ),
        "zookeeper",
    ),
    "a wait without a health check": (
        lambda it: it["services"]["kafka"].pop("healthcheck"),
        "no health check",
    ),
    "a volume that is not declared": (lambda it: it["volumes"].pop("kafka"), "not declared"),
    "another service's Dockerfile": (
        lambda it: it["services"]["verifier"]["build"].update(dockerfile="services/kv_session/Dockerfile"),
        "is built from",
    ),
}


@pytest.mark.parametrize("fault", COMPOSE_FAULTS)
def test_a_broken_compose_file_is_found_out(fault: str) -> None:
    document = copy.deepcopy(deployment.compose_document())
    breaking, said = COMPOSE_FAULTS[fault]
    breaking(document)
    assert said in "\n".join(deployment.check_compose(document))


CONTAINER_FAULTS: dict[str, tuple[Callable[[Container], Container], str]] = {
    "a misspelt setting": (
        lambda it: _with(it, OUTRIDER_KAFKAS="kafka:9092"),
        "OUTRIDER_KAFKAS is no setting",
    ),
    "a value that is none": (
        lambda it: _with(it, OUTRIDER_MAX_SESSIONS="many"),
        "OUTRIDER_MAX_SESSIONS=many",
    ),
    "a stranger's variable": (lambda it: _with(it, VLLM_SPEED="fast"), "VLLM_SPEED is no setting"),
    "the loopback": (lambda it: _with(it, OUTRIDER_VERIFIER_HOST="127.0.0.1"), "listens on 127.0.0.1"),
    "another port": (lambda it: _with(it, OUTRIDER_VERIFIER_PORT="8400"), "listens on 8400"),
    "a port that nobody serves": (lambda it: replace(it, ports=frozenset({80})), "opens the port 80"),
    "a probe of no route": (
        lambda it: replace(it, probes=[Probe("/health", 8300)]),
        "/health, which no service",
    ),
    "no probe": (lambda it: replace(it, probes=()), "no probe"),
    "another tag": (lambda it: replace(it, tag="latest"), "the tag is 'latest'"),
    "an image of nobody": (lambda it: replace(it, image="outrider/verifer"), "no image outrider/verifer"),
    "a module that is not there": (
        lambda it: replace(it, command=["python", "-m", "services.verify"]),
        "no module services.verify",
    ),
    "a subcommand that is not there": (
        lambda it: replace(it, command=["outrider", "models", "get"]),
        "`outrider models get` is not understood",
    ),
    "a script that is not there": (lambda it: replace(it, command=["serve"]), "no command serve"),
}


def _with(container: Container, **variables: str) -> Container:
    return replace(container, variables={**container.variables, **variables})


@pytest.mark.parametrize("fault", CONTAINER_FAULTS)
def test_a_container_that_the_code_does_not_know_is_found_out(fault: str, built: deployment.Built) -> None:
    containers = deployment.kubernetes_containers(built.objects)
    verifier = next(found for found in containers if found.image == "outrider/verifier")
    assert deployment.check_container(verifier) == []
    breaking, said = CONTAINER_FAULTS[fault]
    assert said in "\n".join(deployment.check_container(breaking(verifier)))


Pod = dict[str, Any]

OBJECT_FAULTS: dict[str, tuple[Callable[[Pod], object], str]] = {
    "a key that Kubernetes does not know": (lambda pod: pod.update(restart="Always"), "restart"),
    "a number that is a text": (lambda pod: pod.update(terminationGracePeriodSeconds="45"), "45"),
    "root": (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "may run as root"),
    "links of Services": (lambda pod: pod.pop("enableServiceLinks"), "names of Services"),
    "a root that can be written": (
        lambda pod: pod["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
        "readOnlyRootFilesystem",
    ),
    "no limit": (lambda pod: pod["containers"][0].pop("resources"), "no limit of memory"),
    "a mount of nothing": (lambda pod: pod["volumes"].pop(), "not among its volumes"),
    "a ConfigMap that is not there": (
        lambda pod: pod["containers"][0]["envFrom"][0]["configMapRef"].update(name="settings"),
        "the ConfigMap settings",
    ),
}


@pytest.mark.parametrize("fault", OBJECT_FAULTS)
def test_a_broken_pod_is_found_out(fault: str, built: deployment.Built) -> None:
    objects = copy.deepcopy(list(built.objects))
    workload = next(found for found in objects if found["kind"] == "StatefulSet")
    breaking, said = OBJECT_FAULTS[fault]
    breaking(workload["spec"]["template"]["spec"])
    assert said in "\n".join(deployment.check_objects(objects))


def test_a_service_that_leads_nowhere_and_a_secret_in_the_repository_are_found_out(
    built: deployment.Built,
) -> None:
    objects = copy.deepcopy(list(built.objects))
    service = next(found for found in objects if found["kind"] == "Service")
    service["spec"]["selector"] = {"app": "nobody"}
    service["spec"]["ports"][0]["targetPort"] = "https"
    objects.append(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "outrider-redis"}, "stringData": {}}
    )
    faults = "\n".join(deployment.check_objects(objects))
    assert "selects no pods" in faults
    assert "the port https" in faults
    assert "Secret outrider-redis" in faults


def test_a_variable_that_no_setting_has_is_found_in_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Set OUTRIDER_KAFKA and OUTRIDER_KAFFEE.")
    assert deployment.check_names(page) == ["page.md: OUTRIDER_KAFFEE is no setting"]


# --- the script that provides the model -------------------------------------------------------------------------------


def provide(tmp_path: Path, model: Path) -> subprocess.CompletedProcess[str]:
    """Run docker/models/provide, with an `outrider` whose `models fetch` leaves a model in the volume."""
    tools, volume = tmp_path / "bin", tmp_path / "models"
    fetched = volume / "cache" / "Shipped"
    fetched.mkdir(parents=True)
    (fetched / "config.json").write_text("{}")
    tools.mkdir()
    (tools / "outrider").write_text(f'#!/bin/sh\n[ "$1 $2" = "models fetch" ] && echo "{fetched}"\n')
    (tools / "outrider").chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.defpath}",
        "OUTRIDER_CACHE": str(volume),
        "OUTRIDER_MODEL": str(model),
    }
    return subprocess.run(
        ["sh", str(ROOT / "docker/models/provide")],
        env=environment, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_the_target_that_ships_is_linked_under_its_name(tmp_path: Path) -> None:
    model = tmp_path / "models" / "Shipped"
    done = provide(tmp_path, model)
    assert done.returncode == 0, done.stderr
    assert (model / "config.json").exists()


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert provide(tmp_path, model).returncode == 0
    assert not (tmp_path / "models" / "Shipped").exists()


def test_a_model_of_ones_own_that_is_missing_is_named(tmp_path: Path) -> None:
    done = provide(tmp_path, tmp_path / "models" / "mine")
    assert done.returncode == 1
    assert "mine: no model there" in done.stderr


# --- what an image needs ----------------------------------------------------------------------------------------------

IMPORTING = """
import sys

class Guard:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname.partition(".")[0] in forbidden:
            raise ModuleNotFoundError(f"{fullname} is not among the requirements", name=fullname)

forbidden = set(sys.stdin.read().split())
sys.meta_path.insert(0, Guard)
for module in sys.argv[1:]:
    __import__(module)
"""


def normal(requirement: str) -> str:
    """The normal form of the name with which a requirement begins."""
    return (
        re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].replace("_", "-").replace(".", "-").lower()
    )


def with_needs(requirements: Iterable[str], found: set[str]) -> set[str]:
    """The distributions that are asked for, and all that these need."""
    for name in map(normal, requirements):
        if name not in found:
            found.add(name)
            with contextlib.suppress(metadata.PackageNotFoundError):
                needs = metadata.requires(name) or []
                with_needs((need for need in needs if "extra ==" not in need), found)
    return found


@pytest.fixture(scope="module")
def owners() -> Mapping[str, set[str]]:
    """Which distributions every module that is installed belongs to."""
    return {module: set(map(normal, names)) for module, names in metadata.packages_distributions().items()}


def import_with(
    owners: Mapping[str, set[str]], requirements: Iterable[str], modules: Iterable[str]
) -> subprocess.CompletedProcess[str]:
    """Import the modules in a process that has nothing installed but the requirements, and Outrider itself."""
    allowed = with_needs(requirements, {"outrider"})
    forbidden = [module for module, names in owners.items() if not names & allowed]
    return subprocess.run(
        [sys.executable, "-c", IMPORTING, *modules],
        input=" ".join(forbidden), capture_output=True, text=True, timeout=100, check=False, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("requirements", "modules"),
    [
        ("kv-session.txt", ["services.kv_session.__main__"]),
        ("gateway.txt", ["services.draft_gateway.__main__", "services.draft_gateway.kafka_uplink"]),
        ("edge.txt", ["services.draft_gateway.__main__", "services.draft_gateway.link.client"]),
        ("verifier-cpu.txt", ["services.verifier.__main__"]),
        (
            "models.txt",
            ["shared.cli", "shared.models", "shared.conversion", "gguf", "safetensors.numpy", "tokenizers"],
        ),
    ],
)
def test_a_service_imports_nothing_that_its_requirements_leave_out(
    requirements: str, modules: list[str], owners: Mapping[str, set[str]]
) -> None:
    lines = (ROOT / "requirements" / requirements).read_text().splitlines()
    asked = [line for line in lines if line and not line.startswith(("#", "-"))]
    done = import_with(owners, asked, modules)
    assert done.returncode == 0, done.stderr


def test_a_requirement_that_is_missing_is_found_out(owners: Mapping[str, set[str]]) -> None:
    done = import_with(owners, ["pydantic==2"], ["pydantic", "aiokafka"])
    assert done.returncode != 0
    assert "aiokafka is not among the requirements" in done.stderr
