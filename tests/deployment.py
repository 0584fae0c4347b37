"""What the deployment files say, read without Docker or a cluster, and what may be wrong with it.

`compose`, `kubernetes` and `images` read the files into containers; every `check_…` returns the faults that it finds, as
texts. The files are checked against the code: settings classes, ports, HTTP routes, modules and commands.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, cast

import check_jsonschema  # type: ignore[import-untyped]
import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import yaml
from fastapi import FastAPI
from pydantic import ValidationError

from services.draft_gateway.settings import GatewaySettings
from services.kv_session.settings import KvSessionSettings
from services.verifier.settings import VerifierSettings
from shared import settings_reference
from shared.cli import parser
from shared.http import Readiness, create_app
from shared.settings import CommonSettings

ROOT: Final = Path(__file__).parents[1]
BASE: Final = ROOT / "k8s" / "base"
VERSION: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

Faults = list[str]
Manifest = Mapping[str, Any]

SERVICES: Final[Mapping[str, tuple[str, type[CommonSettings]]]] = {
    "outrider/draft-gateway": ("gateway", GatewaySettings),
    "outrider/verifier": ("verifier", VerifierSettings),
    "outrider/kv-session": ("kv_session", KvSessionSettings),
}
"""Our images with a service in them: how its settings begin, and their class."""

DOCKERFILES: Final[Mapping[str, Path]] = {
    "outrider/draft-gateway": ROOT / "services/draft_gateway/Dockerfile",
    "outrider/verifier": ROOT / "services/verifier/Dockerfile",
    "outrider/kv-session": ROOT / "services/kv_session/Dockerfile",
    "outrider/models": ROOT / "docker/models/Dockerfile",
}

FOREIGN_VARIABLES: Final = frozenset(
    {
        *("PATH", "HOME", "PYTHONUNBUFFERED", "HF_HUB_OFFLINE", "LD_PRELOAD"),
        *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
        *("PIP_DISABLE_PIP_VERSION_CHECK", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"),
    }
)
"""Variables that others read: Python, pip, Hugging Face's libraries, the loader, NVIDIA's runtime."""


@dataclass(frozen=True, slots=True)
class Probe:
    """An HTTP request that tells how a container is."""

    path: str
    port: int


@dataclass(frozen=True, slots=True)
class Container:
    """A container of ours as a manifest or a Dockerfile describes it. `variables` with an unknown value are None."""

    where: str
    image: str
    tag: str
    variables: Mapping[str, str | None] = field(default_factory=dict)
    command: Sequence[str] = ()
    ports: frozenset[int] = frozenset()
    probes: Sequence[Probe] = ()


# --- Dockerfiles ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a Dockerfile: `FROM`, and what follows it."""

    name: str
    rest: str


def instructions(path: Path) -> list[Instruction]:
    """A Dockerfile's instructions, continued lines joined, comments gone."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def image(name: str) -> Container:
    """What an image of ours says of itself: the variables of all its stages, its last command, its ports, its probe."""
    path = DOCKERFILES[name]
    variables: dict[str, str | None] = {}
    command: Sequence[str] = ()
    ports: set[int] = set()
    probes: list[Probe] = []
    for instruction in instructions(path):
        match instruction.name:
            case "ENV":
                pairs = (pair.split("=", 1) for pair in shlex.split(instruction.rest))
                variables |= dict(pairs)
            case "CMD":
                command = json.loads(instruction.rest)
            case "EXPOSE":
                ports |= {int(port) for port in instruction.rest.split()}
            case "HEALTHCHECK":
                test = json.loads(instruction.rest[instruction.rest.index("[") :])
                probes += _probes_of(test, variables)
    where = str(path.relative_to(ROOT))
    return Container(where, name, VERSION, variables, command, frozenset(ports), tuple(probes))


def _probes_of(test: Sequence[str], variables: Mapping[str, str | None]) -> Iterator[Probe]:
    """The URLs that a command asks, with `os.environ[…]` in its Python resolved."""
    text = re.sub(
        r"' \+ os\.environ\['(\w+)'\] \+ '", lambda match: variables.get(match[1]) or "", " ".join(test)
    )
    for port, path in re.findall(r"http://127\.0\.0\.1:(\d*)(/\w*)", text):
        yield Probe(path, int(port or 0))


# --- docker compose ---------------------------------------------------------------------------------------------------


def compose_document(text: str | None = None) -> dict[str, Any]:
    """docker-compose.yml as Compose reads it without an `.env`: `${NAME:-default}` is the default."""
    raw = (ROOT / "docker-compose.yml").read_text() if text is None else text
    document: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", raw))
    return document


def compose_containers(document: Manifest) -> list[Container]:
    """The containers of ours in a Compose document, with what their images add."""
    found = []
    for name, service in document["services"].items():
        repository, _, tag = service["image"].rpartition(":")
        if not repository.startswith("outrider/"):
            continue
        built = image(repository) if repository in DOCKERFILES else None
        variables = dict(built.variables if built else {}) | service.get("environment", {})
        found.append(
            Container(
                where=f"docker-compose.yml, {name}",
                image=repository,
                tag=tag,
                variables=variables,
                command=service.get("command", built.command if built else ()),
                ports=frozenset(int(str(port).rsplit(":", 1)[1]) for port in service.get("ports", ())),
                probes=tuple(_probes_of(service.get("healthcheck", {}).get("test", ()), variables)),
            )
        )
    return found


@cache
def compose_schema() -> dict[str, Any]:
    """The schema of the Compose specification, as check-jsonschema ships it."""
    vendored = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema: dict[str, Any] = json.loads(vendored.read_text())
    return schema


def check_compose(document: Manifest) -> Faults:
    """Against the Compose specification, and what its schema can't say: names that must exist, ports that are open."""
    validator = jsonschema.Draft202012Validator(compose_schema())
    faults = [f"{fault.json_path}: {fault.message}" for fault in validator.iter_errors(document)]
    if faults:
        return faults
    services, volumes = document["services"], document.get("volumes", {})
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            if needed not in services:
                faults.append(f"{name} depends on {needed}, which is not there")
            elif how["condition"] == "service_healthy" and "healthcheck" not in services[needed]:
                faults.append(f"{name} waits for {needed} to be healthy, which has no health check")
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source not in volumes and not source.startswith((".", "/")):
                faults.append(f"{name} mounts the volume {source}, which is not declared")
        published = [str(port) for port in service.get("ports", ())]
        if name != "draft-gateway" and published:
            faults.append(f"{name} publishes {published}; only the gateway is for outside")
        faults += [
            f"{name} publishes {port} on every address" for port in published if "127.0.0.1" not in port
        ]
        if service["image"].startswith("outrider/"):
            faults += _check_compose_build(name, service)
    return faults


def _check_compose_build(name: str, service: Manifest) -> Faults:
    repository = service["image"].rpartition(":")[0]
    dockerfile = DOCKERFILES.get(repository)
    if dockerfile is None:
        return [f"{name}: there is no Dockerfile for {repository}"]
    wanted = str(dockerfile.relative_to(ROOT))
    built = service.get("build", {}).get("dockerfile")
    return [] if built == wanted else [f"{name}: {repository} is built from {built}, not {wanted}"]


# --- Kubernetes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Built:
    """A kustomization's objects, and who built them: kubectl, or this module from the files that it lists."""

    objects: Sequence[Manifest]
    by: Literal["kubectl", "files"]


def kubernetes(base: Path = BASE) -> Built:
    """The objects of a kustomization: built by kubectl where it is, else read from the files that it lists."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return Built(_from_files(base), "files")
    done = subprocess.run(
        [kubectl, "kustomize", str(base)], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise AssertionError(f"kubectl kustomize {base} failed: {done.stderr}")
    return Built(list(yaml.safe_load_all(done.stdout)), "kubectl")


def _from_files(base: Path) -> list[Manifest]:
    """Resources, generated ConfigMaps (without the hash in their names) and the tags of images; nothing else."""
    kustomization = yaml.safe_load((base / "kustomization.yaml").read_text())
    objects = [
        found
        for resource in kustomization["resources"]
        for found in yaml.safe_load_all((base / resource).read_text())
    ]
    for generator in kustomization.get("configMapGenerator", ()):
        data = {
            name: value for path in generator["envs"] for name, value in variables_in(base / path).items()
        }
        metadata = {"name": generator["name"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    tags = {entry["name"]: entry["newTag"] for entry in kustomization.get("images", ())}
    for container in (container for found in objects for container in _containers_of(found)):
        if container["image"] in tags:
            container["image"] += f":{tags[container['image']]}"
    return objects


def variables_in(path: Path) -> dict[str, str]:
    """The variables of a file with NAME=value lines."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _pod(found: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = found.get("spec", {}).get("template", {}).get("spec", {})
    return spec


def _containers_of(found: Manifest) -> list[dict[str, Any]]:
    pod = _pod(found)
    return [*pod.get("initContainers", ()), *pod.get("containers", ())]


def kubernetes_containers(objects: Sequence[Manifest]) -> list[Container]:
    """The containers of ours in the objects' pods, with the variables of the ConfigMaps that they take."""
    maps = {found["metadata"]["name"]: found["data"] for found in objects if found["kind"] == "ConfigMap"}
    containers = []
    for found in objects:
        for content in _containers_of(found):
            repository, _, tag = content["image"].rpartition(":")
            built = image(repository) if repository in DOCKERFILES else None
            variables = dict(built.variables if built else {})
            for source in content.get("envFrom", ()):
                variables |= maps.get(source["configMapRef"]["name"], {})
            variables |= {entry["name"]: entry.get("value") for entry in content.get("env", ())}
            named = {port["name"]: port["containerPort"] for port in content.get("ports", ())}
            containers.append(
                Container(
                    where=f"k8s, {found['kind']} {found['metadata']['name']}, {content['name']}",
                    image=repository,
                    tag=tag,
                    variables=variables,
                    command=content.get("command", built.command if built else ()),
                    ports=frozenset(named.values()),
                    probes=tuple(_http_probes(content, named)),
                )
            )
    return containers


def _http_probes(content: Manifest, named: Mapping[str, int]) -> Iterator[Probe]:
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        if kind in content:
            request = content[kind]["httpGet"]
            yield Probe(request["path"], named.get(request["port"], 0))


def check_objects(objects: Sequence[Manifest]) -> Faults:
    """Against Kubernetes' own schemas, strictly; then what they can't say: names and selectors that must meet."""
    faults = []
    for found in objects:
        name = f"{found.get('kind')} {found.get('metadata', {}).get('name')}"
        try:
            kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            faults.append(f"{name}: {error.message}")
    return faults or [
        *_check_references(objects),
        *(fault for found in objects if _pod(found) for fault in check_security(found)),
    ]


def _check_references(objects: Sequence[Manifest]) -> Faults:
    faults = []
    names = {(found["kind"], found["metadata"]["name"]) for found in objects}
    labels = [found["spec"]["template"]["metadata"]["labels"] for found in objects if _pod(found)]
    ports = {
        port["name"] for found in objects for item in _containers_of(found) for port in item.get("ports", ())
    }
    for found in objects:
        where = f"{found['kind']} {found['metadata']['name']}"
        selector = found.get("spec", {}).get("selector")
        if selector and not any(
            selector.get("matchLabels", selector).items() <= those.items() for those in labels
        ):
            faults.append(f"{where} selects no pods")
        for port in found["spec"]["ports"] if found["kind"] == "Service" else ():
            if port["targetPort"] not in ports:
                faults.append(f"{where} leads to the port {port['targetPort']}, which no container has")
        headless = found.get("spec", {}).get("serviceName")
        if headless and ("Service", headless) not in names:
            faults.append(f"{where} belongs to the Service {headless}, which is not there")
        volumes = {volume["name"] for volume in _pod(found).get("volumes", ())}
        for content in _containers_of(found):
            for source in content.get("envFrom", ()):
                if ("ConfigMap", source["configMapRef"]["name"]) not in names:
                    faults.append(
                        f"{where} takes the ConfigMap {source['configMapRef']['name']}, which is not there"
                    )
            for mount in content.get("volumeMounts", ()):
                if mount["name"] not in volumes:
                    faults.append(f"{where} mounts {mount['name']}, which is not among its volumes")
    faults += [f"the Secret {name} must not be in the repository" for kind, name in names if kind == "Secret"]
    return faults


def check_security(found: Manifest) -> Faults:
    """The restricted pod security standard, a read-only root, and no variables from the names of Services."""
    pod, faults = _pod(found), []
    context = pod.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        faults.append("may run as root")
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        faults.append("has no seccomp profile")
    if pod.get("enableServiceLinks") is not False:
        faults.append("gets variables from the names of Services (enableServiceLinks)")
    if pod.get("automountServiceAccountToken") is not False:
        faults.append("gets a token of the cluster's API")
    for content in _containers_of(found):
        own = content.get("securityContext", {})
        wanted = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        faults += [
            f"{content['name']}: {name} is not {value}"
            for name, value in wanted.items()
            if own.get(name) != value
        ]
        if "memory" not in content.get("resources", {}).get("limits", {}):
            faults.append(f"{content['name']} has no limit of memory")
    return [f"{found['kind']} {found['metadata']['name']}: {fault}" for fault in faults]


# --- against the code -------------------------------------------------------------------------------------------------


@cache
def setting_names() -> frozenset[str]:
    """Every variable that some part of Outrider reads as a setting, and where it looks for secrets."""
    settings = settings_reference.collect(settings_reference.MODELS)
    read_first = re.findall(r'environ\.get\("(OUTRIDER_\w+)"\)', (ROOT / "shared/settings.py").read_text())
    return frozenset(setting.name for setting in settings) | frozenset(read_first)


def check_variables(variables: Mapping[str, str | None], where: str) -> Faults:
    """Every variable is a setting (or one that others read), and its value is one that the setting can have."""
    faults = []
    for name, value in variables.items():
        if name in FOREIGN_VARIABLES:
            continue
        if name not in setting_names():
            faults.append(f"{where}: {name} is no setting")
            continue
        for reader in settings_reference.MODELS:
            model, key = settings_reference.load(reader), name.removeprefix("OUTRIDER_").lower()
            if value is None or key not in model.model_fields:
                continue
            try:
                model(**{key: cast("Any", value)})
            except ValidationError as error:
                faults.append(f"{where}: {name}={value}: {error.errors()[0]['msg']}")
                break
    return faults


def check_names(path: Path) -> Faults:
    """Every OUTRIDER_ variable that a file's text names is a setting."""
    named = set(re.findall(r"\bOUTRIDER_[A-Z0-9][A-Z0-9_]*\b", path.read_text()))
    return [f"{path.relative_to(ROOT)}: {name} is no setting" for name in sorted(named - setting_names())]


@cache
def http_paths() -> frozenset[str]:
    """The paths that every service answers for its operators."""

    async def ready() -> Readiness:
        return Readiness()

    app: FastAPI = create_app("paths", ready)
    return frozenset(app.openapi()["paths"])


def check_container(container: Container) -> Faults:
    """A container's tag, variables, command, ports and probes are those of the code."""
    faults = check_variables(container.variables, container.where)
    if container.image not in DOCKERFILES:
        return [*faults, f"{container.where}: there is no image {container.image}"]
    if container.tag != VERSION:
        faults.append(f"{container.where}: the tag is {container.tag!r}, not {VERSION}")
    faults += check_command(container.command, container.where, image_name=container.image)
    if container.image in SERVICES and not faults:
        faults += _check_listening(container)
    return faults


def _check_listening(container: Container) -> Faults:
    prefix, model = SERVICES[container.image]
    variables = container.variables
    set_to: dict[str, Any] = {
        key.removeprefix("OUTRIDER_").lower(): value for key, value in variables.items() if value
    }
    settings = model(**{name: value for name, value in set_to.items() if name in model.model_fields})
    faults = []
    if (host := getattr(settings, f"{prefix}_host")) != "0.0.0.0":
        faults.append(f"listens on {host}, where nobody outside its container reaches it")
    port = getattr(settings, f"{prefix}_port")
    faults += [f"opens the port {other}, but listens on {port}" for other in container.ports - {port}]
    if not container.probes:
        faults.append("has no probe")
    for probe in container.probes:
        if probe.port != port:
            faults.append(f"is probed at the port {probe.port}, but listens on {port}")
        if probe.path not in http_paths():
            faults.append(f"is probed at {probe.path}, which no service answers")
    return [f"{container.where}: {fault}" for fault in faults]


def check_command(command: Sequence[str], where: str, *, image_name: str) -> Faults:
    """The module, the subcommand of `outrider` or the script in the image that a container runs is there."""
    match list(command):
        case ["python", "-m", module, *_]:
            known = importlib.util.find_spec(f"{module}.__main__") is not None if _package(module) else False
            return [] if known else [f"{where}: there is no module {module} to run"]
        case ["outrider", *arguments]:
            return _check_subcommand(arguments, where)
        case [script]:
            return _check_script(script, where, image_name)
    return [f"{where}: what is {' '.join(command) or 'no command'}?"]


def _package(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_subcommand(arguments: Sequence[str], where: str) -> Faults:
    try:
        parser().parse_args(arguments)
    except SystemExit:
        return [f"{where}: `outrider {' '.join(arguments)}` is not understood"]
    return []


def _check_script(script: str, where: str, image_name: str) -> Faults:
    for instruction in instructions(DOCKERFILES[image_name]):
        match instruction.name, instruction.rest.split():
            case "COPY", [source, target] if Path(target).name == script:
                text = (ROOT / source).read_text()
                calls = re.findall(r"\$\(outrider ([^)]*)\)", text)
                return [fault for call in calls for fault in _check_subcommand(call.split(), source)]
    return [f"{where}: the image has no command {script}"]


def check_sources(path: Path) -> Faults:
    """What a Dockerfile copies exists, and .dockerignore lets it through."""
    faults = []
    for instruction in instructions(path):
        words = instruction.rest.split()
        if instruction.name != "COPY" or words[0].startswith("--from"):
            continue
        for source in (source for word in words[:-1] for source in _flavours(word)):
            if not (ROOT / source).exists():
                faults.append(f"{path.relative_to(ROOT)}: copies {source}, which is not there")
            elif not _let_through(source):
                faults.append(f"{path.relative_to(ROOT)}: copies {source}, which .dockerignore holds back")
    return faults


def _flavours(word: str) -> Iterable[str]:
    return (
        [word.replace("${FLAVOR}", flavour) for flavour in ("cpu", "cuda")] if "${FLAVOR}" in word else [word]
    )


def _let_through(source: str) -> bool:
    """.dockerignore, as far as ours goes: the last pattern that matches the path, or a folder above it, decides."""
    let_through = True
    above = [source, *(str(folder) for folder in Path(source).parents if folder != Path())]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and any(fnmatch.fnmatch(path, pattern) for path in above):
            let_through = line.startswith("!")
    return let_through
