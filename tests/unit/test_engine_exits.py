"""Exit modules: what a file must say of itself, and what happens when it doesn't."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from services.verifier.engine.exit_files import FILE_FORMAT, ExitSet, TargetFacts, load_exits
from services.verifier.engine.exit_head import ExactHead
from services.verifier.engine.exit_modules import JUDGEMENT_INPUTS, ExitModule, Judged, TrainedExit
from services.verifier.engine.exits import ExitReader, Pass, VerifiedRows
from shared.models import target_sha256
from shared.speculation.outcomes import Calibration, Line

HIDDEN, VOCABULARY = 8, 12


def identity_head(width: int) -> ExactHead:
    """The residual stream is the logits."""
    return ExactHead(lambda hidden: hidden, torch.eye(width))


def trained_exit() -> TrainedExit:
    return TrainedExit(HIDDEN, width=5, judge_rank=3, judge_width=4, eps=1e-5)


@pytest.fixture
def target(tmp_path: Path) -> TargetFacts:
    directory = tmp_path / "target"
    directory.mkdir()
    save_file({"w": torch.zeros(3)}, directory / "model.safetensors")
    return TargetFacts(directory, HIDDEN, VOCABULARY, 1e-5, torch.float32)


def write_exits(target: TargetFacts, *, trained: tuple[int, ...] = (2, 4), **header: str) -> Path:
    file = target.directory.parent / "exits.safetensors"
    tensors = {
        f"{layer}.{name}": tensor for layer in trained for name, tensor in trained_exit().state_dict().items()
    }
    tensors["exit_vocab"] = torch.arange(0, VOCABULARY, 2, dtype=torch.int32)
    facts = {
        "format": FILE_FORMAT,
        "target_sha256": target_sha256(target.directory),
        "hidden_size": str(HIDDEN),
        "layers": ",".join(map(str, trained)),
    }
    save_file(tensors, file, metadata={**facts, **header})
    return file


def assert_untrained(found: ExitSet, reason: str) -> None:
    assert found.label == "untrained"
    assert all(type(module) is ExitModule for module in found.modules.values())
    assert reason in found.notes[0]
    assert found.notes[0].endswith("untrained exits serve instead")


def test_without_a_file_exits_are_untrained(target: TargetFacts) -> None:
    found = load_exits((2, 4), None, target)
    assert (sorted(found.modules), found.label, found.notes) == ([2, 4], "untrained", ())


def test_without_layers_exits_are_off(target: TargetFacts) -> None:
    assert load_exits((), write_exits(target), target) == ExitSet({}, "off")


def test_trained_exits_are_loaded(target: TargetFacts) -> None:
    found = load_exits((2, 4), write_exits(target), target)
    assert (found.label, found.notes) == ("trained: exits.safetensors", ())
    assert all(isinstance(module, TrainedExit) for module in found.modules.values())
    assert found.naming.vocabulary is not None
    assert found.naming.vocabulary.tolist() == [0, 2, 4, 6, 8, 10]


def test_a_files_calibration_is_that_of_its_exits(target: TargetFacts) -> None:
    fitted = Calibration(Line(0.8, -0.5), Line(0.9, 0.1), (0.5,) * JUDGEMENT_INPUTS)
    file = write_exits(target, calibration=json.dumps({"4": asdict(fitted)}))
    found = load_exits((2, 4), file, target)
    assert (found.modules[2].calibration, found.modules[4].calibration) == (Calibration(), fitted)


def test_layer_without_a_trained_exit_is_untrained_and_noted(target: TargetFacts) -> None:
    found = load_exits((2, 3, 4), write_exits(target), target)
    assert type(found.modules[3]) is ExitModule
    assert found.notes == ("exits.safetensors has no exit after layers 3: untrained there",)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (
            {"format": "outrider-exits/2"},
            "format is 'outrider-exits/2', this target needs 'outrider-exits/1'",
        ),
        ({"hidden_size": "16"}, "hidden_size is '16', this target needs '8'"),
        ({"target_sha256": "ab" * 32}, "trained for the target abababababab…"),
        ({"layers": "2;4"}, "layers are '2;4', not such as '18,24,27'"),
        ({"layers": "2,6"}, "'gate.weight' of layer 6 is missing"),
        ({"calibration": "[1]"}, "calibration can't be read"),
        ({"calibration": '{"2": {"accept": {}}}'}, "calibration can't be read"),
        (
            {"calibration": json.dumps({"2": asdict(Calibration(judgement=(0.5, 0.1)))})},
            "calibration can't be read",
        ),
    ],
)
def test_file_for_something_else_is_refused(target: TargetFacts, header: dict[str, str], reason: str) -> None:
    assert_untrained(load_exits((2, 4), write_exits(target, **header), target), reason)


@pytest.mark.parametrize("cut", [0, 5, 100, -3])
def test_damaged_file_is_refused(target: TargetFacts, cut: int) -> None:
    file = write_exits(target)
    file.write_bytes(file.read_bytes()[:cut])
    assert_untrained(load_exits((2, 4), file, target), "can't be read")


def test_file_that_does_not_exist_is_refused(target: TargetFacts) -> None:
    assert_untrained(load_exits((2, 4), target.directory / "absent", target), "can't be read")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("2.gate.weight", torch.zeros(5, HIDDEN + 1), "layer 2 does not fit"),
        ("2.judge.state.weight", torch.zeros(()), "layer 2 does not fit"),
        ("2.down.weight", torch.full((HIDDEN, 5), float("nan")), "layer 2 holds values that are no finite"),
        ("exit_vocab", torch.tensor([0, VOCABULARY]), "beyond the vocabulary of 12"),
        ("exit_vocab", torch.zeros(2, 2), "no list of tokens"),
    ],
)
def test_tensors_that_can_not_be_right_are_refused(
    target: TargetFacts, name: str, tensor: torch.Tensor, reason: str
) -> None:
    file = write_exits(target)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file(load_file(file) | {name: tensor}, file, metadata=header)
    assert_untrained(load_exits((2, 4), file, target), reason)


def test_an_adapter_with_a_zero_last_matrix_is_the_untrained_exit() -> None:
    hidden = torch.randn(3, HIDDEN)
    assert torch.equal(trained_exit()(hidden), hidden)


def test_a_judge_hears_what_the_draft_thinks_and_does_without() -> None:
    torch.manual_seed(0)
    module = trained_exit()
    best = torch.tensor([[-0.1, -3.0], [-0.1, -3.0]])
    sure = torch.tensor([-0.2, float("nan")])
    state, token = torch.randn(1, HIDDEN).expand(2, -1), torch.randn(1, HIDDEN).expand(2, -1)
    with torch.no_grad():
        heard = module.acceptance(Judged(state, token, torch.tensor([-1.0, -1.0]), sure, best))
    assert bool(torch.isfinite(heard).all())
    assert heard[0] != heard[1]
    module.calibration = Calibration(accept=Line(1.0, -3.0))
    with torch.no_grad():
        corrected = module.acceptance(Judged(state, token, torch.tensor([-1.0, -1.0]), sure, best))
    assert bool((corrected < heard).all())


def test_reader_ranks_each_sessions_outcomes_from_its_own_rows() -> None:
    """Three tokens, identity head: the residual stream is the logits."""
    rows = torch.tensor([[2.0, 0.0, -9.0], [0.0, 3.0, -9.0], [1.0, 0.0, 4.0]])
    sessions = (VerifiedRows("one", 7, 0, (0,)), VerifiedRows("two", 3, 2, ()))
    current = Pass(0.0, torch.arange(3), sessions, torch.tensor([0, 0, 0]), torch.full((3,), torch.nan))
    reader = ExitReader(
        ExitSet({4: ExitModule()}, "untrained"), torch.nn.Identity(), identity_head(3), outcomes=2
    )
    message = reader.read(4, rows, current, lambda: 1.5)
    one, two = message.outlooks
    p = rows.softmax(-1)
    assert (message.layer, message.elapsed_ms, one.key, one.base, two.key) == (4, 1.5, "one", 7, "two")
    assert one.outcomes == [
        (1, 1, pytest.approx(float(p[0, 0] * p[1, 1]))),
        (0, 1, pytest.approx(float(p[0, 1]))),
    ]
    assert two.outcomes == [(0, 2, pytest.approx(float(p[2, 2]))), (0, 0, pytest.approx(float(p[2, 0])))]


def test_judge_replaces_what_the_exit_thinks_of_a_draft() -> None:
    class Doubter(ExitModule):
        def acceptance(self, judged: Judged) -> torch.Tensor:
            return torch.full_like(judged.drafted, -20.0)

    rows = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    sessions = (VerifiedRows("s", 0, 0, (0,)),)
    current = Pass(0.0, torch.arange(2), sessions, torch.tensor([0, 0]), torch.full((2,), torch.nan))
    exits = ExitSet({1: Doubter()}, "trained: x")
    reader = ExitReader(exits, torch.nn.Identity(), identity_head(2), outcomes=1)
    (outlook,) = reader.read(1, rows, current, lambda: 0.0).outlooks
    assert outlook.outcomes == [(0, 1, pytest.approx(1.0))]


def test_a_hints_confidence_is_the_calibrated_one() -> None:
    rows = torch.tensor([[2.0, 0.0]])
    current = Pass(
        0.0, torch.arange(1), (VerifiedRows("s", 0, 0, ()),), torch.tensor([0]), torch.tensor([torch.nan])
    )
    module = ExitModule()
    module.calibration = Calibration(outcome=Line(0.5, 0.0))
    reader = ExitReader(ExitSet({1: module}, "x"), torch.nn.Identity(), identity_head(2), outcomes=1)
    (outlook,) = reader.read(1, rows, current, lambda: 0.0).outlooks
    assert outlook.outcomes == [(0, 0, pytest.approx(float(torch.tensor(1.0).sigmoid())))]
