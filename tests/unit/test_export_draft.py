"""A distilled draft as a checkpoint for stock vLLM: every weight at its place, rare tokens read but never said."""

from __future__ import annotations

import pytest
import torch

from loadtest.export_draft import checkpoint
from services.draft_gateway.drafting.packed import pack, product_codes, product_rows, quantize_rows

WIDTH, KEYS, INNER, VOCABULARY = 8, 4, 12, 10
COMMON = [1, 4, 7]


def draft() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a draft of one layer, and its matrices as they are after quantisation."""
    generator = torch.Generator().manual_seed(0)
    tensors, matrices = {}, {}
    shapes = {
        "head": (len(COMMON), WIDTH),
        "layers.0.qkv": (WIDTH + 2 * KEYS, WIDTH),
        "layers.0.out": (WIDTH, WIDTH),
        "layers.0.gate_up": (2 * INNER, WIDTH),
        "layers.0.down": (WIDTH, INNER),
    }
    for name, shape in shapes.items():
        values, scales = quantize_rows(torch.randn(shape, generator=generator))
        tensors[f"{name}.packed"], tensors[f"{name}.scales"] = pack(values), scales
        matrices[name] = values.float() * scales[:, None]
    rare = torch.randn(VOCABULARY - len(COMMON), WIDTH, generator=generator)
    tensors["rare_codes"], tensors["rare_books"] = product_codes(rare, group=4, codes=4, rounds=2, seed=0)
    tensors["draft_vocab"] = torch.tensor(COMMON, dtype=torch.int32)
    for number, name in enumerate(("norm", "layers.0.attention_norm", "layers.0.mlp_norm")):
        tensors[name] = torch.full((WIDTH,), 1.0 + number)
    return tensors, matrices


def test_every_matrix_is_where_vllm_looks_for_it() -> None:
    tensors, matrices = draft()
    found = checkpoint(tensors, 1, VOCABULARY)
    layer = "model.layers.0."
    query, key, value = (found[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    assert (len(query), len(key), len(value)) == (WIDTH, KEYS, KEYS)
    assert torch.equal(torch.cat([query, key, value]), matrices["layers.0.qkv"])
    gate, up = (found[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up]), matrices["layers.0.gate_up"])
    assert torch.equal(found[f"{layer}self_attn.o_proj.weight"], matrices["layers.0.out"])
    assert torch.equal(found[f"{layer}mlp.down_proj.weight"], matrices["layers.0.down"])
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    assert [float(found[f"{name}.weight"][0]) for name in norms] == [1.0, 2.0, 3.0]


def test_tokens_outside_the_vocabulary_are_embedded_and_have_no_row_in_the_head() -> None:
    tensors, matrices = draft()
    found = checkpoint(tensors, 1, VOCABULARY)
    rare = [token for token in range(VOCABULARY) if token not in COMMON]
    embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert torch.equal(embedding[COMMON], matrices["head"])
    assert torch.equal(head[COMMON], matrices["head"])
    assert torch.equal(embedding[rare], product_rows(tensors["rare_codes"], tensors["rare_books"].float()))
    assert not head[rare].any()


def test_a_tensor_that_is_missing_is_named() -> None:
    tensors, _ = draft()
    del tensors["layers.0.down.packed"]
    with pytest.raises(KeyError, match=r"layers\.0\.down"):
        checkpoint(tensors, 1, VOCABULARY)
