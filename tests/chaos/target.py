"""A target that is quick, never repeats itself for long, and has text: the tiny random Llama with a tokenizer beside it."""

from __future__ import annotations

import json
import shutil
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

from tests.integration.byte_model import write_byte_model
from tests.integration.tiny_target import VOCABULARY, make_tiny_target


def write_chaos_target(directory: Path) -> Path:
    """Write the checkpoint; gives the directory back."""
    make_tiny_target(directory)
    text = write_byte_model(directory.with_name(f"{directory.name}-text"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text / name, directory / name)
    _name_every_token(directory / "tokenizer.json")
    return directory


def _name_every_token(file: Path) -> None:
    """Give the tokens that are no bytes a text of two letters each, so that none is lost without a trace."""
    content = json.loads(file.read_text())
    used = len(content["model"]["vocab"]) + len(content["added_tokens"])
    pairs = islice(product(ascii_lowercase, repeat=2), VOCABULARY - used)
    for number, pair in enumerate(pairs, start=used):
        content["model"]["vocab"]["".join(pair)] = number
        content["model"]["merges"].append(list(pair))
    file.write_text(json.dumps(content))
