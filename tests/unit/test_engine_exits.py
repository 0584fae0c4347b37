"""Exit modules: what a file must say of itself, and what happens when it doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.verifier.engine.exit_head import ExactHead
from services.verifier.engine.exits import (
    FILE_FORMAT,
    AdapterExit,
    ExitModule,
    ExitReader,
    ExitSet,
    Pass,
    TargetFacts,
    VerifiedRows,
    load_exits,
    target_digest,
)

HIDDEN = 8
IDENTITY_HEAD = ExactHead(lambda hidden: hidden)


@pytest.fixture
def target(tmp_path: Path) -> TargetFacts:
    directory = tmp_path / "target"
    directory.mkdir()
    save_file({"w": torch.zeros(3)}, directory / "model.safetensors")
    return TargetFacts(directory, HIDDEN, torch.float32)


def write_exits(target: TargetFacts, *, trained: tuple[int, ...] = (2, 4), **header: str) -> Path:
    file = target.directory.parent / "exits.safetensors"
    tensors = {
        f"{layer}.{name}": tensor
        for layer in trained
        for name, tensor in AdapterExit(HIDDEN, 5).state_dict().items()
    }
    facts = {
        "format": FILE_FORMAT,
        "target_sha256": target_digest(target.directory),
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
    assert all(isinstance(module, AdapterExit) for module in found.modules.values())


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
        ({"layers": "2,6"}, "gate of layer 6 is missing"),
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


def test_tensors_that_do_not_fit_are_refused(target: TargetFacts) -> None:
    file = write_exits(target)
    tensors = {name: torch.zeros(5, HIDDEN) for name in ("2.gate.weight", "2.up.weight", "2.down.weight")}
    header = {
        "format": FILE_FORMAT,
        "target_sha256": target_digest(target.directory),
        "hidden_size": str(HIDDEN),
        "layers": "2",
    }
    save_file(tensors, file, metadata=header)
    assert_untrained(load_exits((2,), file, target), "layer 2 does not fit")


def test_digest_depends_on_names_and_bytes(target: TargetFacts) -> None:
    before = target_digest(target.directory)
    weights = target.directory / "model.safetensors"
    weights.rename(target.directory / "other.safetensors")
    renamed = target_digest(target.directory)
    save_file({"w": torch.ones(3)}, target.directory / "other.safetensors")
    assert len({before, renamed, target_digest(target.directory)}) == 3


def test_adapter_with_a_zero_last_matrix_is_the_untrained_exit() -> None:
    adapter = AdapterExit(HIDDEN, 5)
    torch.nn.init.zeros_(adapter.down.weight)
    hidden = torch.randn(3, HIDDEN)
    assert torch.equal(adapter(hidden), hidden)


def test_reader_ranks_each_sessions_outcomes_from_its_own_rows() -> None:
    """Three tokens, identity head: the residual stream is the logits."""
    rows = torch.tensor([[2.0, 0.0, -9.0], [0.0, 3.0, -9.0], [1.0, 0.0, 4.0]])
    sessions = (VerifiedRows("one", 7, 0, (0,)), VerifiedRows("two", 3, 2, ()))
    current = Pass(0.0, torch.arange(3), sessions, torch.tensor([0, 0, 0]))
    reader = ExitReader(
        ExitSet({4: ExitModule()}, "untrained"), torch.nn.Identity(), IDENTITY_HEAD, outcomes=2
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
        def acceptance(
            self, log_probs: torch.Tensor, hidden: torch.Tensor, drafts: torch.Tensor
        ) -> torch.Tensor:
            return torch.full_like(log_probs, -20.0)

    rows = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    current = Pass(0.0, torch.arange(2), (VerifiedRows("s", 0, 0, (0,)),), torch.tensor([0, 0]))
    reader = ExitReader(ExitSet({1: Doubter()}, "trained: x"), torch.nn.Identity(), IDENTITY_HEAD, outcomes=1)
    (outlook,) = reader.read(1, rows, current, lambda: 0.0).outlooks
    assert outlook.outcomes == [(0, 1, pytest.approx(1.0))]
