"""The reference of settings says what the services do, in every format."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import SecretStr

from shared.settings_reference import MODELS, Setting, as_environment, as_json, as_table, collect, load


@pytest.fixture
def settings() -> list[Setting]:
    return collect(MODELS)


def test_every_setting_is_explained(settings: list[Setting]) -> None:
    assert [setting.name for setting in settings if len(setting.meaning) < 10] == []


def test_every_setting_of_every_service_is_there_once(settings: list[Setting]) -> None:
    names = [setting.name for setting in settings]
    assert len(names) == len(set(names))
    fields = {field for reader in MODELS for field in load(reader).model_fields}
    assert {name.removeprefix("OUTRIDER_").lower() for name in names} == fields


def test_services_share_a_name_only_where_they_share_its_meaning() -> None:
    for reader in MODELS:
        for other in MODELS:
            ours, theirs = load(reader).model_fields, load(other).model_fields
            for field in set(ours) & set(theirs):
                assert ours[field].description == theirs[field].description, field


@pytest.mark.parametrize("reader", ["gateway", "verifier", "kv-session"])
def test_the_environment_file_is_what_a_service_does_without_one(
    reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(reader)()
    lines = [line for line in as_environment(collect([reader])).splitlines() if line and line[0] != "#"]
    for line in lines:
        name, _, value = line.partition("=")
        monkeypatch.setenv(name, value)
    assert len(lines) == len(load(reader).model_fields)
    assert load(reader)() == plain


def test_the_json_is_complete_and_tells_secrets_apart(settings: list[Setting]) -> None:
    content = {entry["name"]: entry for entry in json.loads(as_json(settings))}
    assert len(content) == len(settings)
    assert content["OUTRIDER_REDIS_URL"]["secret"]
    assert content["OUTRIDER_KAFKA"]["readers"] == ["gateway", "verifier", "kv-session"]
    assert load("gateway").model_fields["redis_url"].annotation is SecretStr


def test_the_table_fits_its_width_and_names_all(settings: list[Setting]) -> None:
    table = as_table(settings, width=120)
    assert max(len(line) for line in table.splitlines()) <= 120
    assert set(re.findall(r"^OUTRIDER_\w+", table, re.MULTILINE)) == {setting.name for setting in settings}
