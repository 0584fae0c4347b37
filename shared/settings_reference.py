"""Every setting of every service as a table, as an environment file or as JSON: what `outrider settings` prints.

It reads the pydantic models themselves, so that what it says can't differ from what the services do.
"""

from __future__ import annotations

import importlib
import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

MODELS: Final[Mapping[str, tuple[str, str]]] = {
    "gateway": ("services.draft_gateway.settings", "GatewaySettings"),
    "verifier": ("services.verifier.settings", "VerifierSettings"),
    "kv-session": ("services.kv_session.settings", "KvSessionSettings"),
    "stack": ("shared.stack.settings", "StackSettings"),
}
"""Who reads settings, and where they are. Imported when asked for: a gateway's image has no verifier."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `group` is what the class that defines it says of itself, `readers` who reads it."""

    name: str
    default: str
    meaning: str
    group: str
    secret: bool
    readers: tuple[str, ...]


def load(reader: str) -> type[BaseSettings]:
    """The settings model of a reader named in `MODELS`."""
    module, name = MODELS[reader]
    model: type[BaseSettings] = getattr(importlib.import_module(module), name)
    return model


def collect(readers: Iterable[str]) -> list[Setting]:
    """The settings of the readers, those of a kind together, each named once."""
    found: dict[str, Setting] = {}
    for reader in readers:
        model = load(reader)
        prefix = str(model.model_config.get("env_prefix", ""))
        for field, info in model.model_fields.items():
            name = f"{prefix}{field}".upper()
            earlier = found[name].readers if name in found else ()
            found[name] = _describe(name, info, _group(model, field), (*earlier, reader))
    groups = list(dict.fromkeys(setting.group for setting in found.values()))
    return sorted(found.values(), key=lambda setting: groups.index(setting.group))


def _describe(name: str, info: FieldInfo, group: str, readers: tuple[str, ...]) -> Setting:
    default = info.get_default(call_default_factory=True, validated_data={})
    secret = info.annotation is SecretStr
    return Setting(name, _shown(default), info.description or "", group, secret, readers)


def _shown(value: object) -> str:
    match value:
        case None:
            return ""
        case SecretStr():
            return value.get_secret_value()
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
        case Path() if value.is_relative_to(Path.cwd()):
            return str(value.relative_to(Path.cwd()))
        case Path() if value.is_relative_to(Path.home()):
            return f"~/{value.relative_to(Path.home())}"
        case _:
            return str(value)


def _group(model: type[BaseSettings], field: str) -> str:
    definer = next(cls for cls in model.__mro__ if field in vars(cls).get("__annotations__", {}))
    return (definer.__doc__ or definer.__name__).strip().splitlines()[0]


def as_json(settings: Sequence[Setting]) -> str:
    """A list of objects."""
    return json.dumps([asdict(setting) for setting in settings], indent=2)


def as_environment(settings: Sequence[Setting]) -> str:
    """An environment file that sets every default, each with its meaning above it."""
    lines: list[str] = []
    for group, members in _by_group(settings):
        lines += ["", f"# --- {group}"]
        for setting in members:
            # Nobody expands a home directory in such a file.
            off = "#" if setting.default.startswith("~") else ""
            lines += [f"# {setting.meaning}", f"{off}{setting.name}={setting.default}"]
    return "\n".join(lines).lstrip("\n")


def as_table(settings: Sequence[Setting], width: int | None = None) -> str:
    """Three columns: name, default, meaning; as wide as the terminal."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    names = max(len(setting.name) for setting in settings)
    defaults = min(24, max(len(setting.default) for setting in settings))
    indent = names + defaults + 4
    lines: list[str] = []
    for group, members in _by_group(settings):
        lines += ["", group]
        for setting in members:
            meaning = textwrap.wrap(setting.meaning, max(30, width - indent)) or [""]
            head = f"{setting.name:<{names}}  {setting.default:<{defaults}}"
            if len(setting.default) > defaults:
                lines.append(head)
                head = ""
            lines.append(f"{head:<{indent}}{meaning[0]}")
            lines += [f"{'':<{indent}}{rest}" for rest in meaning[1:]]
    return "\n".join(lines).lstrip("\n")


def _by_group(settings: Sequence[Setting]) -> list[tuple[str, list[Setting]]]:
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.group, []).append(setting)
    return list(groups.items())
