"""A tiny random Llama as a checkpoint on disk: enough for everything about an engine but what it says."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 512
LAYERS = 8
HIDDEN = 128


@dataclass(frozen=True)
class TinyTarget:
    """The checkpoint, a prompt, and what greedy decoding says after it: `answer` ends with the checkpoint's EOS."""

    directory: Path
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    eos: int


def make_tiny_target(directory: Path, *, seed: int = 0, answer_length: int = 24) -> TinyTarget:
    """Write the checkpoint. Its EOS is chosen to be what it says as the `answer_length`th token after `prompt`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    prompt, answer = _prompt_with_fresh_end(model, answer_length)
    _set_eos(directory, answer[-1])
    return TinyTarget(directory, prompt, answer, answer[-1])


def random_prompt(seed: int, length: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, VOCABULARY) for _ in range(length))


def _prompt_with_fresh_end(model: object, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt whose answer's last token has not occurred in it before."""
    for seed in range(100):
        prompt = random_prompt(seed, 12)
        answer = _greedy(model, prompt, length)
        if answer[-1] not in answer[:-1]:
            return prompt, answer
    raise AssertionError("no prompt found whose answer ends in a new token")


def _greedy(model: object, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    import torch

    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(length):
            logits = model(torch.tensor([tokens])).logits  # type: ignore[operator]
            tokens.append(int(logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def _set_eos(directory: Path, eos: int) -> None:
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, "eos_token_id": eos}))
