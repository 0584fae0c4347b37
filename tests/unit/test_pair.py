"""The weights that come with Outrider are found by what they were made for, and never stop a service."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.draft_gateway.drafting import load_draft_engine
from services.draft_gateway.settings import GatewaySettings
from services.verifier.engine.checkpoint import Checkpoint
from services.verifier.engine.exit_choice import ExitChoice, choose_exits
from services.verifier.settings import VerifierSettings
from shared import pair
from shared.errors import ModelFilesError
from shared.models import target_sha256, tokenizer_sha256
from shared.pair import read_foresight, shipped_draft, shipped_exits, write_foresight
from shared.speculation.outcomes import Calibration, Foresight, Line, Mixture, Weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory with a tokenizer and some weights."""
    directory = tmp_path / "target"
    directory.mkdir()
    (directory / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}}')
    save_file({"w": torch.ones(3)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def weights(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where weights ship, for another target and for this one."""
    shipped = tmp_path / "weights"
    own = {"target_sha256": target_sha256(target), "tokenizer_sha256": tokenizer_sha256(target)}
    for name, header in (("a-other", {**own, "target_sha256": "0" * 64}), ("b-own", own)):
        (shipped / name / "draft").mkdir(parents=True)
        save_file({"t": torch.ones(2)}, shipped / name / "draft" / "draft-1.safetensors", metadata=header)
        layers = {**header, "layers": "3,5"}
        save_file({"t": torch.ones(2)}, shipped / name / "exits.safetensors", metadata=layers)
    monkeypatch.setattr(pair, "WEIGHTS", shipped)
    return shipped


def checkpoint(target: Path) -> Checkpoint:
    return Checkpoint(target, "LlamaForCausalLM", 8, 1, 64, ())


def test_they_are_found_by_what_they_were_made_for(target: Path, weights: Path) -> None:
    assert shipped_draft(target) == weights / "b-own" / "draft"
    assert shipped_exits(target) == weights / "b-own" / "exits.safetensors"


def test_another_target_has_none_and_is_told_how_to_make_them(target: Path, weights: Path) -> None:
    (target / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}, "merges": []}}')
    with pytest.raises(ModelFilesError, match=r"no draft for target came with Outrider \(`outrider train`"):
        shipped_draft(target)


def test_a_gateway_that_has_the_tokenizer_alone_finds_a_draft_for_it(target: Path, weights: Path) -> None:
    (target / "model.safetensors").unlink()
    assert shipped_draft(target).parent.parent == weights


def test_damaged_weights_are_passed_over_and_named(target: Path, weights: Path) -> None:
    path = weights / "b-own" / "exits.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelFilesError, match=r"no trained exits .*b-own/exits.safetensors should be"):
        shipped_exits(target)


def test_exits_stand_after_the_layers_that_they_were_trained_for(target: Path, weights: Path) -> None:
    file = weights / "b-own" / "exits.safetensors"
    assert choose_exits(VerifierSettings(), checkpoint(target)) == ExitChoice((3, 5), file)
    assert choose_exits(VerifierSettings(exit_layers="4,5"), checkpoint(target)) == ExitChoice((4, 5), file)
    assert choose_exits(VerifierSettings(exit_layers="none"), checkpoint(target)) == ExitChoice(())
    own = VerifierSettings(exit_modules=str(file))
    assert choose_exits(own, checkpoint(target)) == ExitChoice((3, 5), file)


def test_without_trained_exits_untrained_ones_stand_where_the_depth_says(target: Path, weights: Path) -> None:
    assert choose_exits(VerifierSettings(exit_modules="none"), checkpoint(target)) == ExitChoice((5, 6, 7))
    shutil.rmtree(weights)
    found = choose_exits(VerifierSettings(), checkpoint(target))
    assert (found.layers, found.file) == ((5, 6, 7), None)
    assert found.notes[0].endswith("untrained exits serve instead")


@pytest.mark.parametrize("layers", ["3;5", "7,8", ""])
def test_layers_that_the_target_does_not_have_are_not_taken_from_a_file(
    target: Path, weights: Path, layers: str
) -> None:
    file = weights / "exits.safetensors"
    save_file({"t": torch.ones(2)}, file, metadata={"layers": layers})
    found = choose_exits(VerifierSettings(exit_modules=str(file)), checkpoint(target))
    assert found == ExitChoice((5, 6, 7), file)


@pytest.mark.parametrize("fault", ["none came", "other tensors", "missing directory"])
def test_without_a_draft_prompt_lookup_drafts_and_a_note_says_why(
    target: Path, weights: Path, fault: str
) -> None:
    draft = "/no/such/draft" if fault == "missing directory" else "hybrid"
    if fault == "none came":
        shutil.rmtree(weights)
    loaded = load_draft_engine(GatewaySettings(model=str(target), draft=draft))
    assert loaded.engine.name == "prompt lookup"
    assert loaded.notes[0].startswith("no draft model is used, prompt lookup drafts instead: ")


# --- the real ones ------------------------------------------------------------------------------------------------


def test_the_target_that_ships_has_its_draft_and_exits(target_model: Path) -> None:
    loaded = load_draft_engine(GatewaySettings(model=str(target_model)))
    assert (loaded.engine.name, loaded.notes) == ("draft for SmolLM2-135M-Instruct and prompt lookup", ())
    assert (loaded.foresight != Foresight()) == any(pair.WEIGHTS.rglob(pair.FORESIGHT))
    settings = VerifierSettings(model=str(target_model))
    exits = choose_exits(settings, Checkpoint(target_model, "LlamaForCausalLM", 30, 49152, 8192, ()))
    assert (exits.layers, exits.notes) == ((18, 21, 24), ())


def test_an_installed_package_holds_all_of_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["training"]
    files = [path.relative_to(ROOT / "training") for path in pair.WEIGHTS.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"draft-1.safetensors", "exits.safetensors"}
    for path in files:
        assert any(path.match(pattern) for pattern in patterns), path


@pytest.mark.parametrize("service", ["draft_gateway", "verifier"])
def test_the_images_of_those_that_use_them_hold_them_too(service: str) -> None:
    text = (ROOT / "services" / service / "Dockerfile").read_text()
    assert "COPY training/weights training/weights" in text


# --- foresight ----------------------------------------------------------------------------------------------------


def test_what_was_measured_is_read_as_it_was_written(tmp_path: Path) -> None:
    mixtures = {
        18: Mixture.plain(18, 0.5, 0.25, 0.01),
        21: Mixture(
            Weights(0.4, 0.3, -2.0), {18: Weights(0.1, 0.0, -0.5), 21: Weights(0.7, 0.1, -3.0)}, 0.02
        ),
    }
    foresight = Foresight(Calibration(Line(0.9, 0.1), Line(1.1, -0.2)), mixtures)
    write_foresight(tmp_path, foresight, {"target_sha256": "ab"})
    assert read_foresight(tmp_path) == foresight


def test_without_measurement_the_draft_is_believed(tmp_path: Path) -> None:
    assert read_foresight(tmp_path) == Foresight()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "outrider-foresight/2"}', '{"format": "outrider-foresight/1"}']
)
def test_damaged_measurements_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / pair.FORESIGHT).write_text(content)
    with pytest.raises(ModelFilesError, match=r"foresight\.json can't be read"):
        read_foresight(tmp_path)
