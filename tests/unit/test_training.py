"""Training on a target small enough for seconds of CPU: data, draft, exits, rounds, calibration."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from services.draft_gateway.drafting.packed import pack, product_codes, product_rows, quantize_rows, unpack
from services.verifier.engine.draft_head import MOST_DRAFTED, HeadShape
from services.verifier.engine.exit_modules import calibrated_odds
from shared.errors import ModelFilesError
from shared.speculation.outcomes import Guess, Mixture, Ranked
from training import outcomes
from training.calibrate import fitted
from training.cli import spread
from training.data import DataPlan, batches, load_groups, make_data
from training.draft import (
    DraftModel,
    DraftPlan,
    DraftTrainer,
    choices,
    common_tokens,
    read_draft,
    write_draft,
)
from training.draft_head import HeadPlan, HeadTrainer
from training.exits import ExitPlan, ExitTrainer, load_exits, write_calibrations, write_exits
from training.llama import KeyValueCache, LlamaConfig, Target
from training.progress import Journal
from training.rollout import along, greedy
from training.rounds import empty, play
from training.simulate import play_rounds

CPU = torch.device("cpu")
CHATML = ("<|im_start|>", "<|im_end|>")
CONFIG = LlamaConfig(48, 96, 4, 4, 2, 96, 10_000.0, 1e-5, 512)
HEADER = {"target_sha256": "t", "tokenizer_sha256": "k", "hidden_size": "48"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are computed by one thread: several would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target() -> Target:
    """A random target whose next token depends on its context."""
    generator = torch.Generator().manual_seed(5)
    made = Target(CONFIG)
    for parameter in made.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.12, generator=generator)
    made.head = made.embedding
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def data(target: Target) -> tuple[list[Tensor], list[Tensor]]:
    """Streams that the target says greedily after a few random tokens."""
    generator = torch.Generator().manual_seed(6)
    prompts = torch.randint(0, 96, (768, 3), generator=generator).tolist()
    texts = greedy(target, prompts, most=13, end=-1)
    tokens = torch.tensor([text.text for text in texts], dtype=torch.int32)
    roles = torch.full_like(tokens, 2, dtype=torch.uint8)
    roles[:, :3] = 0
    return [tokens], [roles]


def trainer(target: Target, data: tuple[list[Tensor], list[Tensor]], steps: int) -> DraftTrainer:
    vocabulary = common_tokens(*data, 80, CONFIG.vocab_size)
    draft = DraftModel.from_target(target, vocabulary, (0, 1, 3), seed=1)
    plan = DraftPlan(layers=(0, 1, 3), steps=steps, batch_tokens=1024, context_words=8, say_every=10, seed=3)
    return DraftTrainer(target, draft, plan, *data, compiled=False)


@pytest.fixture(scope="module")
def trained(
    target: Target, data: tuple[list[Tensor], list[Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[DraftTrainer, list[dict[str, float]], dict[str, float]]:
    """A trained draft, the journal of its run, and what it reached before."""
    run = trainer(target, data, 120)
    before = run.held_out()
    path = tmp_path_factory.mktemp("run") / "training.jsonl"
    run.run(Journal(path, lambda _: None), lambda: None)
    return run, [json.loads(line) for line in path.read_text().splitlines()], before


def test_packed_values_come_back() -> None:
    values = torch.randint(-31, 32, (7, 24), dtype=torch.int8)
    assert torch.equal(unpack(pack(values)), values)
    assert pack(values).shape == (7, 18)


def test_six_bits_keep_a_row_to_a_sixtieth_of_its_largest_value() -> None:
    weight = torch.randn(9, 32)
    values, scales = quantize_rows(weight)
    error = (values.float() * scales[:, None] - weight).abs().amax(dim=1)
    assert bool((error <= weight.abs().amax(dim=1) / 61).all())


def test_product_quantisation_is_exact_where_codes_suffice() -> None:
    rows = torch.randn(5, 12)
    codes, books = product_codes(rows, group=6, codes=256, rounds=3, seed=0)
    assert torch.allclose(product_rows(codes, books), rows)


def test_a_cache_changes_nothing(target: Target) -> None:
    tokens = torch.randint(0, 96, (3, 12))
    whole, kept = target.decoder.full(target.embed(tokens), (2,))
    cache = KeyValueCache(CONFIG, 3, 16, CPU, torch.float32)
    start = target.decoder.aligned(target.embed(tokens[:, :5]), 0, cache)
    one = target.decoder.aligned(target.embed(tokens[:, 5:6]), 5, cache)
    positions = torch.arange(6, 12).repeat(3, 1)
    rest, also = target.decoder.ragged(target.embed(tokens[:, 6:]), positions, cache, (2,))
    assert torch.allclose(torch.cat((start, one, rest), dim=1), whole, atol=1e-4)
    assert torch.allclose(also[2], kept[2][:, 6:], atol=1e-4)


def test_loss_falls_and_agreement_rises(
    trained: tuple[DraftTrainer, list[dict[str, float]], dict[str, float]],
) -> None:
    run, journal, before = trained
    steps = [line for line in journal if "loss" in line]
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]
    after = run.held_out()
    assert after["held_out_loss"] < before["held_out_loss"]
    assert after["held_out_agreement"] > before["held_out_agreement"] + 0.1
    assert steps[-1]["agreement"] > steps[0]["agreement"] + 0.1


def test_a_resumed_run_gives_the_same_result(
    target: Target, data: tuple[list[Tensor], list[Tensor]], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "training.jsonl", lambda _: None)
    whole = trainer(target, data, 16)
    whole.run(journal, lambda: None)

    first = trainer(target, data, 16)

    class Enough(Exception):
        """The run is interrupted here."""

    def save() -> None:
        torch.save(first.state(), tmp_path / "draft.pt")
        raise Enough

    first.plan = replace(first.plan, save_every=7)
    with pytest.raises(Enough):
        first.run(journal, save)
    second = trainer(target, data, 16)
    second.load_state(torch.load(tmp_path / "draft.pt", weights_only=True))
    assert second.step == 7
    second.run(journal, lambda: None)
    for (name, one), other in zip(whole.draft.named_parameters(), second.draft.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_written_draft_chooses_as_the_trained_one(
    trained: tuple[DraftTrainer, list[dict[str, float]], dict[str, float]],
    data: tuple[list[Tensor], list[Tensor]],
    tmp_path: Path,
) -> None:
    draft = trained[0].draft
    write_draft(tmp_path, draft, HEADER, file_bytes=12_000)
    assert len(list(tmp_path.glob("draft-*.safetensors"))) > 1
    read = read_draft(tmp_path)
    tokens = data[0][0][:4].long()

    def chosen(model: DraftModel) -> Tensor:
        hidden, _ = model.decoder.full(model.embed(tokens, torch.float32))
        return choices(model, tokens, hidden)[0]

    with torch.no_grad():
        assert (chosen(draft) == chosen(read)).float().mean() > 0.97
    (tmp_path / "draft-2.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=r"holds \d of \d"):
        read_draft(tmp_path)


def test_a_word_outside_the_vocabulary_can_be_said_once_the_context_holds_it(
    trained: tuple[DraftTrainer, list[dict[str, float]], dict[str, float]],
) -> None:
    draft = trained[0].draft
    rare = int(draft.rare_ids[3])
    tokens = torch.tensor([[int(draft.vocabulary[0]), rare, int(draft.vocabulary[1])]])
    words = draft.words_of(tokens)
    assert draft.token_ids(words).tolist()[-1] == rare
    assert draft.first_seen(tokens, words).tolist() == [[1]]


def test_exits_learn_and_rounds_tell_what_they_foresaw(
    target: Target,
    data: tuple[list[Tensor], list[Tensor]],
    trained: tuple[DraftTrainer, list[dict[str, float]], dict[str, float]],
    tmp_path: Path,
) -> None:
    draft = trained[0].draft
    draft.bits = 6
    vocabulary = common_tokens(*data, 90, CONFIG.vocab_size)
    plan = ExitPlan(layers=(2, 3), width=48, steps=80, batch_tokens=1024, say_every=10)
    run = ExitTrainer(target, draft, plan, vocabulary, *data, compiled=False)
    run.run(Journal(tmp_path / "training.jsonl", lambda _: None), lambda: None)
    journal = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert journal[-1]["loss"] < journal[0]["loss"]
    assert journal[-1]["judge3"] < 0.9 * journal[0]["judge3"]

    directory = tmp_path / "target"
    directory.mkdir()
    (directory / "outrider.json").write_text(json.dumps({"target_sha256": "t"}))
    path = tmp_path / "exits.safetensors"
    write_exits(path, run.exits, vocabulary, HEADER, torch.float32)
    exits, named = load_exits(path, directory, target)
    assert sorted(exits) == [2, 3]
    prompts = data[0][0][:24, :3].tolist()
    texts = greedy(target, prompts, most=28, end=-1)
    record = play_rounds(target, draft, exits, named, texts)

    def score(tokens: Tensor) -> Tensor:
        return choices(draft, tokens, draft.decoder.full(draft.embed(tokens, torch.float32))[0])[0]

    total = empty(5)
    for text, chosen in zip(texts, along([text.text for text in texts], score, CPU), strict=True):
        known = chosen.tolist()
        total = total + play(text.text, 4, 5, lambda at, size, known=known: known[at - 1 : at - 1 + size])
    # a text's last verdict may lie behind its end
    assert abs(len(record["accepted"]) - total.rounds) <= len(texts)

    found = fitted(record, sorted(exits))
    write_calibrations(path, found.exits)
    again, _ = load_exits(path, directory, target)
    assert {layer: exit_.calibration for layer, exit_ in again.items()} == found.exits
    own = outcomes.edge_rankings(record, found.foresight.own)
    guesses = outcomes.edge_guesses(record, found.foresight.own)
    hints = {layer: outcomes.exit_rankings(record, layer, found.exits[layer]) for layer in (2, 3)}
    mixed = outcomes.mixed_rankings(guesses, hints, found.foresight.mixture(3))
    guessed, together = outcomes.in_best(own, record), outcomes.in_best(mixed, record)
    assert together["1"] <= together["2"] <= together["4"] <= together["8"]
    assert together["4"] >= guessed["4"]


def test_calibration_finds_the_line_that_made_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(20_000, generator=generator) * 2
    labels = torch.rand(20_000, generator=generator) < torch.sigmoid(0.6 * raw - 0.4)
    line = outcomes.fit_line(raw, labels)
    assert line.slope == pytest.approx(0.6, abs=0.05)
    assert line.offset == pytest.approx(-0.4, abs=0.06)
    assert outcomes.calibration_error(torch.sigmoid(line(raw))[:, None], labels[:, None]) < 0.02


def test_the_fitted_mixture_trusts_the_side_that_is_right() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.randint(0, 4, (400,), generator=generator).tolist()
    right = [[Ranked(0, token, 0.7), Ranked(1, token, 0.2)] for token in truth]
    others = [{(token + 1) % 4: math.log(0.6), (token + 2) % 4: math.log(0.3)} for token in truth]
    random = [Guess((0.0,), (names,)) for names in others]
    record = {"accepted": torch.zeros(400), "next": torch.tensor(truth)}
    found = outcomes.fit_mixture(random, {3: right}, record)
    mixed = outcomes.mixed_rankings(random, {3: right}, found)
    assert outcomes.in_best(mixed, record)["1"] == 1.0
    promised = outcomes.promised(mixed, 1)
    assert (
        outcomes.calibration_error(promised, outcomes.right(mixed, record, 1)) < 0.03
    )  # the fit holds its weights back
    plain = outcomes.mixed_rankings(random, {3: right}, Mixture.plain(3, 1.0, 0.0))
    assert outcomes.in_best(plain, record)["1"] == 0.0


def test_a_judgement_takes_from_the_figures_what_the_judges_word_lacks() -> None:
    """The draft's tokens are accepted as the exit's own probability of them says; the judge says nothing at all."""
    generator = torch.Generator().manual_seed(2)
    drafted = torch.rand(3_000, 5, generator=generator)
    held = torch.rand(3_000, 5, generator=generator) < drafted
    likeliest = torch.maximum(drafted, 1 - drafted).log()
    scores = torch.stack((likeliest, (1 - likeliest.exp()).clamp(min=1e-4).log()), dim=-1)
    record = {
        "drafts": torch.zeros(3_000, 5, dtype=torch.long),
        "accepted": held.long().cumprod(dim=1).sum(dim=1),
        "next": torch.ones(3_000, dtype=torch.long),
        "edge_scores": torch.full((3_000, 6, 2), math.log(0.5)),
        "3.judged": torch.randn(3_000, 5, generator=generator),
        "3.drafted": drafted.log(),
        "3.scores": torch.cat((scores, scores[:, :1]), dim=1),
        "3.tokens": torch.arange(2).expand(3_000, 6, 2),
    }
    found = outcomes.fit(record, 3)
    figures = outcomes.judged_figures(record, 3)
    believed = torch.sigmoid(calibrated_odds(record["3.judged"], figures, found))
    assert (believed - drafted).abs().mean() < 0.04
    unknown = torch.cat((figures[..., :-1], torch.zeros_like(figures[..., :1])), dim=-1)
    plain = replace(found, judgement=())
    assert torch.equal(
        calibrated_odds(record["3.judged"], unknown, found),
        calibrated_odds(record["3.judged"], figures, plain),
    )


def test_rounds_commit_the_accepted_tokens_and_one_more() -> None:
    text = [9, 1, 2, 3, 4, 5, 6, 7]
    perfect = play(text, 1, 3, lambda at, size: text[at : at + size])
    assert (perfect.rounds, perfect.tokens, perfect.acceptance()) == (2, 7, 1.0)
    wrong = play(text, 1, 3, lambda at, size: [0] * size)
    assert (wrong.rounds, wrong.tokens, wrong.acceptance()) == (7, 7, 0.0)
    none = play(text, 1, 3, lambda at, size: [])
    assert none.rounds == 7


def test_batches_are_the_same_for_a_seed_and_hold_every_stream_once_an_epoch() -> None:
    rows = torch.arange(40, dtype=torch.int32).view(10, 4)
    roles = torch.zeros_like(rows, dtype=torch.uint8)

    def epoch() -> list[list[int]]:
        stream = batches([rows], [roles], batch_tokens=8, seed=4)
        return [next(stream)[1][:, 0].tolist() for _ in range(5)]

    assert epoch() == epoch()
    assert sorted(first for batch in epoch() for first in batch) == rows[:, 0].tolist()


@pytest.mark.parametrize(("depth", "count"), [(30, 8), (30, 4), (6, 8), (32, 5), (12, 1)])
def test_layers_to_start_from_are_distinct_and_hold_the_first_and_the_last(depth: int, count: int) -> None:
    layers = spread(depth, count)
    assert len(set(layers)) == len(layers) == min(depth, count) or count > depth - 2
    assert layers == tuple(sorted(layers))
    assert layers[-1] == depth - 1


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, and ChatML's marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*CHATML, "<|endoftext|>"])
    return made


@pytest.fixture(scope="module")
def talker(tokenizer: Tokenizer) -> Target:
    """A random target over the tokenizer's bytes."""
    torch.manual_seed(4)
    made = Target(replace(CONFIG, vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1))
    made.head = made.embedding
    return made.requires_grad_(False)


def sampled(
    talker: Target, tokenizer: Tokenizer, directory: Path, *, seed: int, tokens: int, length: int = 96
) -> list[Tensor]:
    plan = DataPlan(seed, tokens, streams=4, length=length, long_length=2 * length, long_every=3)
    make_data(talker, tokenizer, plan, directory, target_sha256="t", say=lambda _: None)
    groups, roles = load_groups(directory, CPU)
    return [*groups, *roles]


def test_a_seed_reproduces_the_data_also_in_two_runs(
    talker: Target, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = sampled(talker, tokenizer, tmp_path / "whole", seed=7, tokens=1600)
    sampled(talker, tokenizer, tmp_path / "parts", seed=7, tokens=300)
    parts = sampled(talker, tokenizer, tmp_path / "parts", seed=7, tokens=1600)
    other = sampled(talker, tokenizer, tmp_path / "other", seed=8, tokens=1600)
    assert all(torch.equal(one, another) for one, another in zip(whole, parts, strict=True))
    assert not torch.equal(whole[0], other[0])
    with pytest.raises(ModelFilesError, match="was begun with other settings"):
        sampled(talker, tokenizer, tmp_path / "parts", seed=9, tokens=1600)


def test_greedy_answers_in_the_data_are_what_the_target_says(
    talker: Target, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    streams, roles = sampled(talker, tokenizer, tmp_path, seed=3, tokens=4 * 480, length=480)
    tokens = streams.long()
    said, _ = talker.decoder.full(talker.embed(tokens))
    scores = talker.logits(said)
    end = tokenizer.token_to_id(CHATML[1])
    for special in (CHATML[0], "<|endoftext|>"):
        scores[:, :, tokenizer.token_to_id(special)] = -math.inf
    chosen = scores.argmax(dim=-1)[:, :-1]
    greedy_places = (roles[:, 1:] == 2) & (tokens[:, 1:] != end) & (chosen != end)
    assert int(greedy_places.sum()) > 20
    assert bool((chosen == tokens[:, 1:])[greedy_places].all())


# --- the draft head ---------------------------------------------------------------------------------------------------


def head_trainer(
    target: Target, data: tuple[list[Tensor], list[Tensor]], steps: int, window: int
) -> HeadTrainer:
    depth = CONFIG.num_hidden_layers
    shape = HeadShape(48, (1, depth), window, 4, 2, 64, 64, CONFIG.rope_theta, CONFIG.rms_norm_eps)
    plan = HeadPlan(vocabulary=96, steps=steps, batch_tokens=1_024, seed=3)
    return HeadTrainer(target, shape, plan, torch.arange(96), *data, compiled=False)


def held_out_loss(trainer: HeadTrainer) -> float:
    """Of the head, on text that it is never trained on."""
    ((tokens, roles),) = trainer._held
    torch.manual_seed(1)
    return trainer.losses(tokens.long(), roles, 0.3)[0].item()


@pytest.mark.parametrize("window", [0, 6])
def test_a_head_learns_to_say_what_the_target_says_next(
    target: Target, data: tuple[list[Tensor], list[Tensor]], tmp_path: Path, window: int
) -> None:
    untaught = held_out_loss(head_trainer(target, data, 100, window))
    trained = head_trainer(target, data, 100, window)
    trained.run(Journal(tmp_path / "training.jsonl", lambda _: None), lambda: None)
    found = trained.held_out()
    assert len(found) == MOST_DRAFTED
    assert found == sorted(found, reverse=True), (
        "all tokens up to a place are right no oftener than up to one before"
    )
    assert held_out_loss(trained) < 0.9 * untaught


def test_a_head_that_goes_on_from_a_checkpoint_comes_to_the_same(
    target: Target, data: tuple[list[Tensor], list[Tensor]], tmp_path: Path
) -> None:
    def say(_: str) -> None:
        return

    whole = head_trainer(target, data, 6, 6)
    whole.run(Journal(tmp_path / "whole.jsonl", say), lambda: None)
    first = head_trainer(target, data, 6, 6)
    kept: list[dict[str, object]] = []
    first.plan = replace(first.plan, save_every=3)
    first.run(Journal(tmp_path / "first.jsonl", say), lambda: kept.append(copy.deepcopy(first.state())))
    second = head_trainer(target, data, 6, 6)
    second.load_state(kept[0])
    second.run(Journal(tmp_path / "second.jsonl", say), lambda: None)
    for name, weight in whole.head.state_dict().items():
        assert torch.equal(weight, second.head.state_dict()[name]), name
