"""The torch draft against transformers: same weights, same greedy tokens, whatever the caches have been through."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from services.draft_gateway.drafting import load_draft_engine
from services.draft_gateway.drafting.decoder import Decoder, Segment
from services.draft_gateway.drafting.distilled import DistilledNetwork, config_of, read_distilled
from services.draft_gateway.drafting.engine import DraftRequest
from services.draft_gateway.drafting.llama import PREFILL_CHUNK, LlamaDraft
from services.draft_gateway.drafting.network import CHOICES
from services.draft_gateway.drafting.shape import LlamaShape
from services.draft_gateway.settings import GatewaySettings
from shared.errors import ModelFilesError
from shared.pair import WEIGHTS
from shared.protocol import Sampling, SamplingMode, Tokens
from shared.sampling.conformal import FixedCount
from shared.sampling.logits import draw, processed
from shared.sampling.noise import Place, address, gumbel
from shared.sampling.rules import Row, Rules

VOCABULARY = 61
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def model(**overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


def saved(directory: Path, llama: LlamaForCausalLM) -> Path:
    llama.save_pretrained(directory)
    tokenizer = {"model": {"vocab": {str(i): i for i in range(VOCABULARY)}, "merges": []}, "added_tokens": []}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def rewritten(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def engine(directory: Path, *, cache_tokens: int = 1 << 16) -> LlamaDraft:
    return LlamaDraft.load(directory, target=directory, threads=1, cache_tokens=cache_tokens)


def reference(llama: LlamaForCausalLM, context: Tokens, length: int) -> Tokens:
    tokens = list(context)
    with torch.inference_mode():
        for _ in range(length):
            tokens.append(int(llama(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(context) :])


def context(seed: int, length: int) -> Tokens:
    return tuple(Random(seed).choices(range(VOCABULARY), k=length))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3},
    ],
    ids=["tied", "untied", "biases", "llama3 rope"],
)
def test_drafts_are_the_models_own_greedy_tokens(tmp_path: Path, overrides: dict[str, Any]) -> None:
    llama = model(**overrides)
    drafting = engine(saved(tmp_path, llama))
    for seed in range(4):
        prompt = context(seed, 150)
        (draft,) = drafting.draft([DraftRequest(f"s{seed}", 0, prompt, 6)])
        assert draft.tokens == reference(llama, prompt, 6)
        assert all(0 < confidence <= 1 for confidence in draft.confidences)


def test_a_draft_tells_what_else_it_might_have_said_and_what_may_follow(tmp_path: Path) -> None:
    llama = model()
    drafting = engine(saved(tmp_path, llama))
    requests = [DraftRequest("s", lane, context(lane, 30), 3, beyond=lane != 1) for lane in range(3)]
    for request, draft in zip(requests, drafting.draft(requests), strict=True):
        text = (*request.context, *draft.tokens)
        with torch.inference_mode():
            logits = llama(torch.tensor([text])).logits[0, len(request.context) - 1 :]
        best = logits.softmax(dim=-1).topk(CHOICES, dim=-1)
        told = best.indices.tolist()[: 3 + request.beyond]
        assert [[token for token, _ in place] for place in draft.alternatives] == told
        for place, expected in zip(draft.alternatives, best.values.tolist(), strict=False):
            assert [sure for _, sure in place] == pytest.approx(expected, abs=1e-4)
        assert draft.tokens == tuple(place[0][0] for place in draft.alternatives[:3])
        assert draft.confidences == tuple(place[0][1] for place in draft.alternatives[:3])


def test_looking_beyond_a_draft_is_a_step_that_the_next_one_is_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting = engine(saved(tmp_path, model()))
    prompt = context(1, 50)
    computed = counted_tokens(monkeypatch)
    (draft,) = drafting.draft([DraftRequest("s", 0, prompt, 3, beyond=True)])
    assert computed == [50, 1, 1, 1]
    computed.clear()
    drafting.draft([DraftRequest("s", 0, (*prompt, *draft.tokens, 7), 2)])
    assert computed == [1, 1]


def test_a_cache_that_is_rolled_back_and_extended_drafts_like_a_new_one(tmp_path: Path) -> None:
    llama = model()
    drafting = engine(saved(tmp_path, llama))
    random = Random(5)
    prompt = context(1, 40)
    for turn in range(12):
        (draft,) = drafting.draft([DraftRequest("s", 0, prompt, 4)])
        assert draft.tokens == reference(llama, prompt, 4), turn
        accepted = random.randrange(5)
        prompt = (*prompt, *draft.tokens[:accepted], random.randrange(VOCABULARY))


def test_lanes_over_a_shared_prefix_draft_as_each_would_alone(tmp_path: Path) -> None:
    llama = model()
    drafting = engine(saved(tmp_path, llama))
    shared = context(2, 300)
    lanes = [(*shared, *context(lane + 10, size)) for lane, size in enumerate((1, 4, 2, 6))]
    lengths = [5, 2, 4, 3]
    requests = [
        DraftRequest("s", lane, lane_context, length)
        for lane, (lane_context, length) in enumerate(zip(lanes, lengths, strict=True))
    ]
    for _ in range(2):
        for request, draft in zip(requests, drafting.draft(requests), strict=True):
            assert draft.tokens == reference(llama, request.context, request.length)


def test_lanes_that_are_prefixes_of_one_another_keep_apart(tmp_path: Path) -> None:
    llama = model()
    drafting = engine(saved(tmp_path, llama))
    prompt = context(3, 20)
    requests = [DraftRequest("s", lane, prompt[: 20 - lane], 3) for lane in range(3)]
    for request, draft in zip(requests, drafting.draft(requests), strict=True):
        assert draft.tokens == reference(llama, request.context, 3)


def test_sessions_in_one_batch_do_not_mix_and_old_caches_are_dropped(tmp_path: Path) -> None:
    llama = model()
    drafting = engine(saved(tmp_path, llama), cache_tokens=600)
    requests = [DraftRequest(f"s{seed}", 0, context(seed, 100), 3) for seed in range(5)]
    for _ in range(2):
        for request, draft in zip(requests, drafting.draft(requests), strict=True):
            assert draft.tokens == reference(llama, request.context, 3)
    assert len(drafting._sessions) == 2


def test_lanes_and_lone_drafts_of_several_sessions_share_a_batch(tmp_path: Path) -> None:
    llama = model()
    drafting = engine(saved(tmp_path, llama))
    shared = [context(seed, 10 + 3 * seed) for seed in range(3)]
    requests = [
        DraftRequest(f"s{seed}", lane, (*shared[seed], *context(90 + lane, lane)), 2 + lane)
        for seed in range(3)
        for lane in range(1 + seed)
    ]
    Random(1).shuffle(requests)
    for request, draft in zip(requests, drafting.draft(requests), strict=True):
        assert draft.tokens == reference(llama, request.context, request.length)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_came_before_each_draft_is_the_models_own(tmp_path: Path, seed: int) -> None:
    """Sessions that go on from a lane, another one, the middle of one, or something else, under a cache too small."""
    llama = model()
    drafting = engine(saved(tmp_path, llama), cache_tokens=700)
    random = Random(seed)
    bases = {f"s{number}": context(number, random.randrange(2, 60)) for number in range(3)}
    for _ in range(12):
        requests = [
            DraftRequest(
                session,
                lane,
                (*base, *context(random.randrange(4), random.randrange(5))),
                random.randrange(6),
            )
            for session, base in random.sample(sorted(bases.items()), random.randrange(1, 4))
            for lane in range(random.randrange(1, 4))
        ]
        drafts = drafting.draft(requests)
        for request, draft in zip(requests, drafts, strict=True):
            assert draft.tokens == reference(llama, request.context, request.length)
        followed = random.randrange(len(requests))
        whole = (*requests[followed].context, *drafts[followed].tokens)
        kept = random.randrange(1, len(whole) + 1) if random.random() < 0.3 else len(whole)
        bases[requests[followed].session] = (*whole[:kept], random.randrange(VOCABULARY))


def test_a_lane_is_not_taken_over_after_the_session_went_elsewhere(tmp_path: Path) -> None:
    llama = model()
    drafting = engine(saved(tmp_path, llama))
    prompt = context(1, 30)
    lanes = drafting.draft([DraftRequest("s", lane, (*prompt, lane), 4) for lane in range(2)])
    drafting.draft([DraftRequest("s", 0, (*prompt[:10], *context(2, 10)), 4)])
    back = (*prompt, 1, *lanes[1].tokens, 5)
    (draft,) = drafting.draft([DraftRequest("s", 0, back, 4)])
    assert draft.tokens == reference(llama, back, 4)


def test_no_accepted_token_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a lone draft, and not of a lane that came true: the one new token and the drafted ones are all there is."""
    drafting = engine(saved(tmp_path, model()))
    prompt = context(1, 50)
    (lone,) = drafting.draft([DraftRequest("s", 0, prompt, 4)])
    computed = counted_tokens(monkeypatch)
    lanes = [DraftRequest("s", lane, (*prompt, *lone.tokens, lane), 4) for lane in range(3)]
    drafts = drafting.draft(lanes)
    assert computed == [
        1,
        3 * 1,
        3,
        3,
        3,
    ]  # the last drafted token, which no pass has seen, is the lanes' shared end
    computed.clear()
    drafting.draft([DraftRequest("s", 0, (*lanes[1].context, *drafts[1].tokens, 7), 4)])
    assert computed == [2, 1, 1, 1]


def counted_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass from now on computes."""
    computed: list[int] = []
    forward = Decoder.forward

    def counting(self: Decoder, segments: Sequence[Segment]) -> torch.Tensor:
        computed.append(sum(segment.tokens.numel() for segment in segments))
        return forward(self, segments)

    monkeypatch.setattr(Decoder, "forward", counting)
    return computed


def test_long_contexts_are_taken_in_chunks_also_where_lanes_share_nothing(tmp_path: Path) -> None:
    llama = model(max_position_embeddings=1024)
    drafting = engine(saved(tmp_path, llama))
    requests = [
        DraftRequest("s", lane, (lane, *context(lane, 2 * PREFILL_CHUNK + lane)), 2) for lane in range(2)
    ]
    for request in (requests[0], *requests):
        (draft,) = drafting.draft([request])
        assert draft.tokens == reference(llama, request.context, 2)
    for request, draft in zip(requests, drafting.draft(requests), strict=True):
        assert draft.tokens == reference(llama, request.context, 2)


def test_a_draft_that_is_dropped_during_prefill_stops_there_and_what_is_cached_stays_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = model(max_position_embeddings=2048)
    drafting = engine(saved(tmp_path, llama))
    for lanes in (1, 2):
        prompt = context(lanes, 5 * PREFILL_CHUNK)
        requests = [DraftRequest(f"s{lanes}", lane, (*prompt, lane), 2) for lane in range(lanes)]
        with monkeypatch.context() as patched:
            computed = counted_tokens(patched)
            drafts = drafting.draft(requests, lambda request: bool(computed))  # noqa: B023
        assert computed == [PREFILL_CHUNK]
        assert all(draft.tokens == () for draft in drafts)
        for request, draft in zip(requests, drafting.draft(requests), strict=True):
            assert draft.tokens == reference(llama, request.context, 2)


def test_a_draft_that_fails_leaves_the_caches_right(tmp_path: Path) -> None:
    llama = model()
    drafting = engine(saved(tmp_path, llama))
    prompt = context(1, 30)
    drafting.draft([DraftRequest("s", 0, prompt, 3)])
    for lanes in (1, 2):
        with pytest.raises(IndexError):
            drafting.draft([DraftRequest("s", lane, (*prompt[:20], 10**6, lane), 3) for lane in range(lanes)])
        (draft,) = drafting.draft([DraftRequest("s", 0, prompt, 3)])
        assert draft.tokens == reference(llama, prompt, 3)


def test_a_dropped_lane_stops_at_its_next_token(tmp_path: Path) -> None:
    drafting = engine(saved(tmp_path, model()))
    calls = 0

    def dropped(_: DraftRequest) -> bool:
        nonlocal calls
        calls += 1
        return calls > 2

    (draft,) = drafting.draft([DraftRequest("s", 0, context(1, 10), 8)], dropped)
    assert len(draft.tokens) == 2


def test_at_the_end_of_the_context_window_a_draft_is_short(tmp_path: Path) -> None:
    drafting = engine(saved(tmp_path, model(max_position_embeddings=16)))
    (draft,) = drafting.draft([DraftRequest("s", 0, context(1, 14), 8)])
    assert len(draft.tokens) == 2
    (none,) = drafting.draft([DraftRequest("s", 0, context(1, 16), 8)])
    assert none.tokens == ()


def test_a_reduced_output_vocabulary_is_mapped_to_the_targets_ids(tmp_path: Path) -> None:
    llama = model(tie_word_embeddings=False)
    directory = saved(tmp_path, llama)
    kept = torch.tensor(sorted({*range(0, VOCABULARY, 2)}))
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["lm_head.weight"][kept].contiguous()
    save_file(weights | {"draft_vocab": kept.int()}, path, metadata={"format": "pt"})
    prompt = context(4, 30)
    (draft,) = engine(directory).draft([DraftRequest("s", 0, prompt, 1)])
    with torch.inference_mode():
        logits = llama(torch.tensor([prompt])).logits[0, -1]
    assert draft.tokens == (int(kept[logits[kept].argmax()]),)


# --- drawing as the target draws ----------------------------------------------------------------------------------


KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.5, "min_tokens": 3},
    {"repetition_penalty": 1.5},
]


def drawn_reference(llama: LlamaForCausalLM, rules: Rules, text: Tokens, length: int) -> Tokens:
    tokens = list(text)
    with torch.inference_mode():
        for _ in range(length):
            logits = llama(torch.tensor([tokens])).logits[0, -1].numpy()
            tokens.append(int(draw(logits[None], [Row(rules, tuple(tokens))])[0]))
    return tuple(tokens[len(text) :])


@pytest.mark.parametrize("kind", KINDS, ids=", ".join)
def test_a_sampled_session_is_drafted_as_the_target_would_draw(tmp_path: Path, kind: dict[str, Any]) -> None:
    """If it were this model, that is: with the same noise, after the same tokens, in lanes beside greedy ones."""
    llama = model()
    drafting = engine(saved(tmp_path, llama))
    rules = Rules(Sampling(seed=12, **kind), 20, (5,))
    contexts = [context(1, 20) + context(lane, lane) for lane in range(3)]
    requests = [
        *(DraftRequest("s", lane, text, 5, rules=rules) for lane, text in enumerate(contexts)),
        DraftRequest("greedy", 0, contexts[0], 5),
    ]
    drafts = drafting.draft(requests)
    for text, draft in zip(contexts, drafts, strict=False):
        assert draft.tokens == drawn_reference(llama, rules, text, 5)
        assert all(0 < confidence <= 1 for confidence in draft.confidences)
        for place, token in zip(draft.alternatives, draft.tokens, strict=True):
            assert place[0][0] == token
            assert [sure for _, sure in place] == sorted((sure for _, sure in place), reverse=True)
            assert all(sure > 0 for _, sure in place)
    assert drafts[3].tokens == reference(llama, contexts[0], 5)


def test_a_draw_that_truncation_leaves_no_choice_is_sure(tmp_path: Path) -> None:
    drafting = engine(saved(tmp_path, model()))
    rules = Rules(Sampling(seed=1, temperature=1.0, top_k=1), 20)
    (draft,) = drafting.draft([DraftRequest("s", 0, context(2, 20), 3, rules=rules)])
    assert draft.confidences == pytest.approx((1.0, 1.0, 1.0))
    assert [len(place) for place in draft.alternatives] == [1, 1, 1]


def test_the_shipped_draft_draws_in_its_own_vocabulary_and_in_the_context_s_words() -> None:
    directory = next(WEIGHTS.glob("*/draft"))
    header, tensors = read_distilled(directory)
    shape = LlamaShape.of(config_of(header))
    network = DistilledNetwork(tensors, shape.layers, shape.vocabulary)
    own = set(tensors["draft_vocab"].tolist())
    rare = [token for token in range(shape.vocabulary) if token not in own][:40]
    text = (*rare, *sorted(own)[100:140])
    words = network.words(text)
    assert words is not None
    torch.manual_seed(1)
    hidden = torch.randn(12, shape.hidden) * 3
    with torch.inference_mode():
        columns = torch.cat((network._head(hidden), hidden @ words.rows.T), dim=-1).numpy()
        ids = torch.cat((tensors["draft_vocab"].long(), words.ids)).numpy()
        bias = tuple((token, 60.0) for token in (rare[3], rare[30]))
        rules = Rules(Sampling(seed=5, temperature=0.9, repetition_penalty=1.2, logit_bias=bias), 10)
        rows = [Row(rules, (*text, *range(n))) for n in range(12)]
        choices = network.choose(hidden, words, rows)
    said_rare = 0
    for number, row in enumerate(rows):
        whole = np.full(shape.vocabulary, -np.inf, dtype=np.float32)
        whole[ids] = columns[number]
        perturbed = processed(whole, row) + gumbel(
            address(Place(5, 0, row.position)), np.arange(shape.vocabulary)
        )
        best = np.argsort(-perturbed, kind="stable")[:CHOICES]
        assert choices.tokens[number].tolist() == best.tolist()
        said_rare += int(best[0]) in rare
    assert said_rare > 0


def test_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(ModelFilesError, match="gpt2"):
        LlamaShape.of({"model_type": "gpt2"})


@pytest.mark.parametrize(
    "fault",
    [
        "missing",
        "cut short",
        "garbage",
        "not a number",
        "other sizes",
        "uneven heads",
        "other tokenizer",
        "vocabulary out of range",
        "no config",
    ],
)
def test_files_that_can_not_be_used_leave_prompt_lookup_and_a_note(tmp_path: Path, fault: str) -> None:
    target, directory = saved(tmp_path / "target", model()), saved(tmp_path / "draft", model())
    weights = directory / "model.safetensors"
    match fault:
        case "missing":
            weights.unlink()
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "garbage":
            weights.write_bytes(b"\xff" * 4096)
        case "not a number":
            tensors = load_file(weights)
            tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
            save_file(tensors, weights)
        case "other sizes":
            rewritten(directory / "config.json", num_key_value_heads=1)
        case "uneven heads":
            rewritten(directory / "config.json", num_key_value_heads=3)
        case "vocabulary out of range":
            save_file(load_file(weights) | {"draft_vocab": torch.arange(VOCABULARY) + 1}, weights)
        case "other tokenizer":
            (directory / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}}')
        case _:
            (directory / "config.json").unlink()
    loaded = load_draft_engine(GatewaySettings(draft=str(directory), model=str(target)))
    assert loaded.engine.name == "prompt lookup"
    (note,) = loaded.notes
    assert "prompt lookup drafts instead" in note


# --- ratio mode ---------------------------------------------------------------------------------------------------


def ratio(prompt: Tokens, *, seed: int = 3, **changes: Any) -> Rules:
    sampling = Sampling(temperature=1.0, seed=seed, mode=SamplingMode.RATIO)
    return Rules(sampling.model_copy(update=changes), len(prompt))


def test_in_ratio_mode_tokens_are_drawn_from_the_rows_that_are_told(tmp_path: Path) -> None:
    drafting, prompt = engine(saved(tmp_path, model())), context(31, 20)
    (draft,) = drafting.draft([DraftRequest("s", 0, prompt, 5, rules=ratio(prompt), threshold=0.002)])
    assert len(draft.tokens) == len(draft.rows) == len(draft.thresholds) == 5
    threshold = 0.002
    for number, (token, row) in enumerate(zip(draft.tokens, draft.rows, strict=True)):
        found = DraftRequest(
            "t", 0, (*prompt, *draft.tokens[:number]), 1, rules=ratio(prompt), threshold=threshold
        )
        (again,) = drafting.draft([found])
        assert (again.tokens, again.rows) == ((token,), (row,))
        assert row.probability(token) > 0
        threshold = draft.thresholds[number]
        assert again.thresholds == (threshold,)


def test_in_ratio_mode_a_lane_says_the_same_whoever_is_drafted_beside_it(tmp_path: Path) -> None:
    drafting, prompt = engine(saved(tmp_path, model())), context(32, 20)
    rules = ratio(prompt)
    paths = [(*prompt, 5), (*prompt, 6, 7), (*prompt, 5, 9)]
    together = drafting.draft([DraftRequest("s", n, path, 4, rules=rules) for n, path in enumerate(paths)])
    alone = [drafting.draft([DraftRequest("t", 0, path, 4, rules=rules)])[0] for path in paths]
    assert [draft.tokens for draft in together] == [draft.tokens for draft in alone]
    assert [draft.rows for draft in together] == [draft.rows for draft in alone]


def test_in_ratio_mode_seeds_and_paths_have_draws_of_their_own(tmp_path: Path) -> None:
    drafting, prompt = engine(saved(tmp_path, model())), context(33, 20)
    said = {
        drafting.draft([DraftRequest("s", 0, prompt, 4, rules=ratio(prompt, seed=seed))])[0].tokens
        for seed in range(8)
    }
    assert len(said) > 4


def test_beyond_a_draft_in_ratio_mode_nothing_is_drawn_but_what_may_follow_is_told(tmp_path: Path) -> None:
    drafting, prompt = engine(saved(tmp_path, model())), context(34, 20)
    (draft,) = drafting.draft([DraftRequest("s", 0, prompt, 3, beyond=True, rules=ratio(prompt))])
    assert (len(draft.tokens), len(draft.rows), len(draft.alternatives)) == (3, 3, 4)
    assert [place[0][0] for place in draft.alternatives[:3]] == list(draft.tokens)


def test_in_ratio_mode_a_fixed_number_of_tokens_may_travel(tmp_path: Path) -> None:
    directory, prompt = saved(tmp_path, model()), context(35, 20)
    drafting = LlamaDraft.load(
        directory, target=directory, threads=1, cache_tokens=1 << 16, sparsity=FixedCount(3)
    )
    (draft,) = drafting.draft([DraftRequest("s", 0, prompt, 4, rules=ratio(prompt))])
    assert [len(row.tokens) for row in draft.rows] == [3, 3, 3, 3]


def test_greedy_keyed_and_ratio_lanes_share_steps(tmp_path: Path) -> None:
    drafting, prompt = engine(saved(tmp_path, model())), context(36, 20)
    keyed = ratio(prompt, mode=SamplingMode.KEYED)
    requests = [
        DraftRequest(name, 0, prompt, 4, rules=rules)
        for name, rules in (("g", None), ("k", keyed), ("r", ratio(prompt)))
    ]
    alone = [
        drafting.draft([replace(request, session=f"{request.session}2")])[0].tokens for request in requests
    ]
    together = drafting.draft(requests)
    assert [draft.tokens for draft in together] == alone
    assert [len(draft.rows) for draft in together] == [0, 0, 4]
