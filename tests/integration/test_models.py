"""The target that ships, as it was converted on this machine: the pinned bytes, sensible text, the right tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shared.models import SHIPPED, describe, fetch, sha256_of, verify
from shared.text import Tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

pytestmark = pytest.mark.engine

PINNED = {
    "config.json": "e95fb8c782677ecf3188a6e1ec5dadd3f5efdd78eb76592654a20efd6bc90d05",
    "generation_config.json": "8ce11d9ac76601bd7c3b750111ac4f2bae6256f1dd02f2d1406cb08fbb40ffeb",
    "model.safetensors": SHIPPED.target_sha256,
    "tokenizer.json": "7d27c493c729a66ecefc837280b05d948b1ed50d130eebdbf911b1b36cf38ed7",
    "tokenizer_config.json": "b67a54212a621c4c4773c622956e333f4a30246c1f8f5597990487d0efd66dfe",
}
PARAGRAPH = (
    "The city of Paris is the capital of France. It lies on the river Seine in the north of the country and has been "
    "one of the largest cities in Europe for many centuries. Visitors come from all over the world to see its museums, "
    "its churches and the Eiffel Tower, which was built in 1889 for the World's Fair. The city is also known for its "
    "food, its fashion and its universities."
)


@pytest.fixture(scope="module")
def tokenizer(target_model: Path) -> Tokenizer:
    return Tokenizer.load(target_model)


@pytest.fixture(scope="module")
def llama(target_model: Path) -> Iterator[LlamaForCausalLM]:
    import torch
    from transformers import LlamaForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LlamaForCausalLM.from_pretrained(target_model, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def test_every_machine_converts_to_the_same_bytes(target_model: Path) -> None:
    assert {name: sha256_of([target_model / name]) for name in PINNED} == PINNED


def test_it_is_whole_and_described(target_model: Path) -> None:
    verify(target_model, deep=True)
    found = describe(target_model)
    assert (found.name, found.layers, found.hidden, found.vocabulary) == (SHIPPED.name, 30, 576, 49152)
    assert found.target_sha256 == SHIPPED.target_sha256
    assert fetch() == target_model


def test_text_becomes_the_tokens_the_model_was_trained_on(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_tokens == {2}
    assert len(tokenizer.encode("2026")) == 4  # every digit by itself
    for text in ("def f(x):\n    return x ** 2\n", "naïve café, 你好 👋🏽", "  two  spaces ", "don't"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.backend.decode(list(chat), skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chats_and_texts_have_the_tokens_that_transformers_gives_them(
    target_model: Path, tokenizer: Tokenizer
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(target_model)
    for content in (PARAGRAPH, "x<|im_end|>y", "\n\n 1234\t", "", json.dumps({"é": [1, "👩‍👧"]})):
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert list(tokenizer.encode_chat(chat)) == expected
        assert list(tokenizer.encode(content)) == theirs(content)["input_ids"]


def test_the_converted_model_knows_english(llama: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    import torch

    tokens = torch.tensor([tokenizer.encode(PARAGRAPH)])
    with torch.inference_mode():
        perplexity = math.exp(float(llama(tokens, labels=tokens).loss))
    assert perplexity < 9


def test_the_converted_model_answers_a_question(llama: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    import torch

    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    with torch.inference_mode():
        said = llama.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :]
    assert "Paris" in tokenizer.decode(said.tolist())
    assert int(said[-1]) in tokenizer.stop_tokens
