"""The draft head: its file, what it remembers of a text, and how it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from services.verifier.engine import exit_choice, exit_files
from services.verifier.engine import floor_head as floor_head_module
from services.verifier.engine.checkpoint import Checkpoint
from services.verifier.engine.draft_head import MOST_DRAFTED, DraftHead, HeadShape
from services.verifier.engine.draft_head_files import load_head, read_head, write_head
from services.verifier.engine.exit_choice import HeadChoice, choose_head
from services.verifier.engine.exit_files import TargetFacts
from services.verifier.engine.exit_head import ExactHead
from services.verifier.engine.floor_head import MOST_SESSIONS, CommittedRows, FloorHead
from services.verifier.settings import VerifierSettings
from shared.errors import ModelFilesError

SHAPE = HeadShape(
    hidden_size=48,
    layers=(1, 3),
    window=8,
    heads=4,
    key_value_heads=2,
    width=32,
    further_width=24,
    rope_theta=10_000.0,
    eps=1e-5,
)
VOCABULARY = 96
LENGTH = 40


def made(shape: HeadShape = SHAPE, seed: int = 1) -> DraftHead:
    """A head with an opinion: nothing about it is zero."""
    generator = torch.Generator().manual_seed(seed)
    head = DraftHead(shape)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    return head.requires_grad_(False).eval()


def embedding() -> Tensor:
    return torch.randn(VOCABULARY, 48, generator=torch.Generator().manual_seed(2))


def states() -> dict[int, Tensor]:
    """Of a text of `LENGTH` rows."""
    generator = torch.Generator().manual_seed(3)
    return {layer: torch.randn(LENGTH, 48, generator=generator) for layer in SHAPE.layers}


TEXT = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(4)).tolist()


def norm(hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, (48,))


def floor_head(shape: HeadShape = SHAPE) -> FloorHead:
    rows = embedding()
    naming = ExactHead(lambda hidden: hidden @ rows.T, rows)
    return FloorHead(made(shape), norm, naming, rows, longest=64)


def fed(head: FloorHead, cuts: list[int], request: str = "r", first: int = 0) -> list[tuple[int, float]]:
    """What is drafted after rows `first` to the last cut, which came in passes that end at the cuts."""
    drafted: list[tuple[int, float]] = []
    begin = first
    for end in cuts:
        head.tap.states = {layer: rows[begin:end] for layer, rows in states().items()}
        found = head.drafts([CommittedRows(request, 0, begin, TEXT[begin + 1 : end + 1], TEXT)])
        drafted, begin = found.get(request, []), end
    return drafted


# --- what it remembers --------------------------------------------------------------------------------------------


@pytest.fixture
def sure_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are whole, and no matrix is rounded: what int8 makes of a row depends on the others that share a pass."""
    monkeypatch.setattr(floor_head_module, "LEAST_CHANCE", 0.0)
    monkeypatch.setattr(floor_head_module, "has_int8", lambda weight: False)


def same(left: list[tuple[int, float]], right: list[tuple[int, float]]) -> bool:
    tokens = [token for token, _ in left] == [token for token, _ in right]
    return tokens and [chance for _, chance in left] == pytest.approx(
        [chance for _, chance in right], rel=1e-3
    )


@pytest.mark.usefixtures("sure_of_nothing")
@pytest.mark.parametrize("window", [0, 8])
def test_it_says_what_the_trained_head_says(window: int) -> None:
    shape = replace(SHAPE, window=window)
    head, rows = made(shape), embedding()
    entered = head.entered([states()[layer] for layer in SHAPE.layers], rows[TEXT[1:]])
    attended = None
    if window:
        places = torch.arange(LENGTH)
        keys, values = head.keys_values(entered, places)
        back = places[-1] - places
        attended = functional.scaled_dot_product_attention(
            head.queries(entered, places)[-1:].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=(back < window)[None],
            enable_gqa=True,
        )[0].transpose(0, 1)
    guess = head.begin(entered[-1:], attended)
    found = []
    for _ in range(MOST_DRAFTED):
        chance, token = (norm(guess) @ rows.T).softmax(dim=-1).max(dim=-1)
        found.append((int(token), float(chance)))
        guess = head.go_on(guess, rows[token])
    assert same(fed(floor_head(shape), [LENGTH]), found)


def test_in_int8_it_is_about_as_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor_head_module, "LEAST_CHANCE", 0.0)
    rounded = fed(floor_head(), [LENGTH])
    monkeypatch.setattr(floor_head_module, "has_int8", lambda weight: False)
    exact = fed(floor_head(), [LENGTH])
    assert rounded[0][0] == exact[0][0]
    assert rounded[0][1] == pytest.approx(exact[0][1], abs=0.05)


@pytest.mark.usefixtures("sure_of_nothing")
def test_a_text_in_pieces_is_drafted_upon_as_in_one() -> None:
    whole = fed(floor_head(), [LENGTH])
    assert len(whole) == MOST_DRAFTED
    assert same(fed(floor_head(), [20, 21, 25, 26, LENGTH - 1, LENGTH]), whole)


@pytest.mark.usefixtures("sure_of_nothing")
def test_what_lies_further_back_than_it_looks_does_not_matter() -> None:
    whole = fed(floor_head(), [LENGTH])
    assert same(fed(floor_head(), [LENGTH], first=LENGTH - SHAPE.window), whole)
    shorter = fed(floor_head(), [LENGTH], first=LENGTH - 2)
    assert [chance for _, chance in shorter] != pytest.approx([chance for _, chance in whole], rel=1e-3)


@pytest.mark.usefixtures("sure_of_nothing")
def test_rows_behind_a_gap_are_a_new_beginning() -> None:
    torn = floor_head()
    fed(torn, [10])
    late = LENGTH - 3
    assert same(fed(torn, [LENGTH], first=late), fed(floor_head(), [LENGTH], first=late))


@pytest.mark.usefixtures("sure_of_nothing")
def test_rows_that_are_computed_anew_take_the_place_of_the_old_ones() -> None:
    twice = floor_head()
    fed(twice, [30])
    assert same(fed(twice, [LENGTH], first=24), fed(floor_head(), [LENGTH]))


@pytest.mark.usefixtures("sure_of_nothing")
def test_texts_are_drafted_upon_side_by_side_as_alone() -> None:
    both = floor_head()
    found = states()
    both.tap.states = {layer: torch.cat((rows[:20], rows[:30])) for layer, rows in found.items()}
    drafted = both.drafts(
        [CommittedRows("a", 0, 0, TEXT[1:21], TEXT), CommittedRows("b", 20, 0, TEXT[1:31], TEXT)]
    )
    assert same(drafted["a"], fed(floor_head(), [20]))
    assert same(drafted["b"], fed(floor_head(), [30]))


@pytest.mark.usefixtures("sure_of_nothing")
def test_a_prompt_that_goes_on_is_remembered_and_not_drafted_upon() -> None:
    head = floor_head()
    head.tap.states = {layer: rows[:20] for layer, rows in states().items()}
    assert head.drafts([CommittedRows("r", 0, 0, TEXT[1:21], TEXT, speaks=False)]) == {}
    assert same(fed(head, [LENGTH], first=20), fed(floor_head(), [LENGTH]))


def test_a_target_in_bfloat16_is_drafted_for_as_well() -> None:
    rows = embedding().bfloat16()
    naming = ExactHead(lambda hidden: hidden @ rows.T, rows)
    head = FloorHead(made().bfloat16(), norm, naming, rows, longest=64)
    for begin, end in ((0, 20), (20, 21), (21, 24)):
        head.tap.states = {layer: part[begin:end].bfloat16() for layer, part in states().items()}
        found = head.drafts([CommittedRows("r", 0, begin, TEXT[begin + 1 : end + 1], TEXT)])
        assert all(0.0 < chance <= 1.0 for _, chance in found.get("r", []))
    assert head._memories["r"].end == 24


def test_a_crowd_is_not_drafted_for() -> None:
    head = floor_head()

    def rows(count: int) -> list[CommittedRows]:
        head.tap.states = states()
        return [CommittedRows(f"r{number}", 0, 0, TEXT[1:21], TEXT) for number in range(count)]

    assert len(head.drafts(rows(MOST_SESSIONS))) == MOST_SESSIONS
    assert head.drafts(rows(MOST_SESSIONS + 1)) == {}


def test_a_request_that_has_ended_is_forgotten() -> None:
    head = floor_head()
    fed(head, [LENGTH])
    head.forget(["r", "never seen"])
    assert not head._memories


@pytest.mark.usefixtures("sure_of_nothing")
def test_a_text_whose_beginning_was_cached_takes_it_from_one_that_began_alike() -> None:
    whole = fed(floor_head(), [LENGTH])
    head = floor_head()
    fed(head, [LENGTH - 2], request="first")
    assert same(fed(head, [LENGTH], request="beside it", first=LENGTH - 4), whole)
    head.forget(["first", "beside it"])
    assert same(fed(head, [LENGTH], request="after it", first=LENGTH - 4), whole)


@pytest.mark.usefixtures("sure_of_nothing")
def test_nothing_is_taken_from_a_text_that_began_otherwise() -> None:
    head = floor_head()
    other = [(token + 1) % VOCABULARY for token in TEXT]
    head.tap.states = states()
    head.drafts([CommittedRows("other", 0, 0, other[1:], other)])
    late = LENGTH - 4
    assert same(fed(head, [LENGTH], first=late), fed(floor_head(), [LENGTH], first=late))


def test_of_texts_that_have_ended_the_oldest_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor_head_module, "PAST_PLACES", 2 * LENGTH)
    head = floor_head()
    for name in ("a", "b", "c"):
        fed(head, [LENGTH], request=name)
        head.forget([name])
    assert len(head._past) == 2


@pytest.mark.usefixtures("sure_of_nothing")
def test_a_draft_ends_where_it_is_likelier_to_fail_than_is_worth_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chances = [chance for _, chance in fed(floor_head(), [LENGTH])]
    monkeypatch.setattr(floor_head_module, "LEAST_CHANCE", chances[0] * chances[1])
    assert len(fed(floor_head(), [LENGTH])) == 2
    monkeypatch.setattr(floor_head_module, "LEAST_CHANCE", chances[0] + 1e-6)
    assert fed(floor_head(), [LENGTH]) == []


@pytest.mark.usefixtures("sure_of_nothing")
def test_without_a_window_it_looks_at_the_last_row_alone() -> None:
    shape = replace(SHAPE, window=0)
    assert same(fed(floor_head(shape), [LENGTH]), fed(floor_head(shape), [LENGTH], first=LENGTH - 1))


# --- its file -----------------------------------------------------------------------------------------------------

LAYERS = 3


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TargetFacts:
    monkeypatch.setattr(exit_files, "target_sha256", lambda directory: "t" * 64)
    return TargetFacts(tmp_path, 48, VOCABULARY, 1e-5, torch.float32)


def written(path: Path, **header: str) -> Path:
    write_head(path, made(), {"target_sha256": "t" * 64, **header})
    return path


def test_a_written_head_is_read_as_it_was_but_for_its_rounding(tmp_path: Path, facts: TargetFacts) -> None:
    found = read_head(written(tmp_path / "head.safetensors"), facts, LAYERS)
    assert found.shape == SHAPE
    for name, weight in made().state_dict().items():
        step = weight.abs().amax(dim=1, keepdim=True) / 63
        assert bool(((found.state_dict()[name] - weight).abs() <= step / 2 + 1e-6).all())


def test_a_head_of_another_target_is_named_and_left_alone(tmp_path: Path, facts: TargetFacts) -> None:
    file = written(tmp_path / "head.safetensors", target_sha256="u" * 64)
    loaded = load_head(file, facts, LAYERS)
    assert (loaded.head, loaded.label) == (None, "off")
    assert "trained for the target uuuuuuuuuuuu…" in loaded.notes[0]
    assert "the floor drafts from the text alone" in loaded.notes[0]


def test_a_head_for_another_depth_is_refused(tmp_path: Path, facts: TargetFacts) -> None:
    with pytest.raises(ModelFilesError, match="after layer 3, the target has 48 and 5"):
        read_head(written(tmp_path / "head.safetensors"), facts, 5)


@pytest.mark.parametrize(
    "fault", ["no file", "no safetensors", "no shape", "a matrix is missing", "not finite"]
)
def test_a_damaged_file_costs_the_head_and_no_more(tmp_path: Path, facts: TargetFacts, fault: str) -> None:
    path = written(tmp_path / "head.safetensors")
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    match fault:
        case "no file":
            path.unlink()
        case "no safetensors":
            path.write_bytes(b"x" * 100)
        case "no shape":
            del header["shape"]
            save_file(tensors, path, metadata=header)
        case "a matrix is missing":
            del tensors["enter.weight.values"]
            save_file(tensors, path, metadata=header)
        case _:
            tensors["enter.weight.scales"][0] = torch.inf
            save_file(tensors, path, metadata=header)
    loaded = load_head(path, facts, LAYERS)
    assert loaded.head is None
    assert str(path) in loaded.notes[0]


def checkpoint(directory: Path) -> Checkpoint:
    checkpoint = Checkpoint.__new__(Checkpoint)
    object.__setattr__(checkpoint, "directory", directory)
    return checkpoint


def test_which_head_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, own = tmp_path / "shipped.safetensors", tmp_path / "own.safetensors"
    monkeypatch.setattr(exit_choice, "shipped_head", lambda directory: shipped)
    target = checkpoint(tmp_path)
    assert choose_head(VerifierSettings(), target, cuda=False) == HeadChoice(shipped)
    assert choose_head(VerifierSettings(draft_head=str(own)), target, cuda=False) == HeadChoice(own)
    assert choose_head(VerifierSettings(draft_head="none"), target, cuda=False) == HeadChoice()
    assert choose_head(VerifierSettings(floor_drafts=False), target, cuda=False) == HeadChoice()
    assert choose_head(VerifierSettings(), target, cuda=True) == HeadChoice()
    asked = choose_head(VerifierSettings(draft_head=str(own)), target, cuda=True)
    assert asked.file is None
    assert "OUTRIDER_DRAFT_HEAD" in asked.notes[0]


def test_where_no_head_comes_for_a_target_nothing_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(directory: Path) -> Path:
        raise ModelFilesError("no draft head came")

    monkeypatch.setattr(exit_choice, "shipped_head", none)
    assert choose_head(VerifierSettings(), checkpoint(tmp_path), cuda=False) == HeadChoice()
