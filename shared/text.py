"""Text to tokens and back: the target's tokenizer, its chat template, and text that grows token by token.

What a stream shows after n tokens is a function of these n tokens alone (`IncrementalText`): another process that
is fed the same tokens stands at the same character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import InvalidRequest, ModelFilesError
from shared.models import read_config, read_json
from shared.protocol import Tokens

if TYPE_CHECKING:
    import tokenizers


class IncrementalText:
    """The text of a growing sequence of tokens. Special tokens are left out; half a character is held back."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # tokens whose text has not come out yet

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete."""
        parts: list[str] = []
        for token in tokens:
            self._held.append(token)
            part = self._stream.step(self._backend, token)
            if part is not None:
                self._held.clear()
                parts.append(part)
        return "".join(parts)

    def flush(self) -> str:
        """What no further token will complete: a replacement character for the bytes that are left over."""
        held, self._held = self._held, []
        return str(self._backend.decode(held, skip_special_tokens=True)) if held else ""


class Tokenizer:
    """The tokenizer of the model in a directory, and its chat template."""

    def __init__(self, tokenizer: Any, stop_tokens: frozenset[int]) -> None:
        self._tokenizer: Final = tokenizer
        self.stop_tokens: Final = stop_tokens
        self.vocab_size: Final[int] = len(tokenizer)
        self.backend: Final[tokenizers.Tokenizer] = tokenizer.backend_tokenizer

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read the tokenizer; `ModelFilesError` when the directory holds none that is usable."""
        from transformers import AutoTokenizer

        path = Path(directory)
        config = read_config(path)
        if not (path / "tokenizer.json").exists():
            raise ModelFilesError(f"{path} has no tokenizer.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelFilesError(f"the tokenizer in {path} can't be read: {error}") from None
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            raise ModelFilesError(f"the tokenizer in {path} is damaged: {error}") from None
        return cls(tokenizer, _stop_tokens(path, config, tokenizer))

    def encode(self, text: str) -> Tokens:
        """The tokens of a plain text, with whatever the model wants in front of one."""
        return tuple(self._tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """The tokens of a chat, up to where the assistant's answer begins.

        Raises `InvalidRequest` when the model has no chat template or the template refuses the messages.
        """
        import jinja2

        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from None
        return tuple(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of all `tokens`, special ones left out."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=True))

    def decoder(self) -> IncrementalText:
        """A new incremental decoder."""
        return IncrementalText(self.backend)


def _stop_tokens(directory: Path, config: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    """What ends a sequence: what generation_config.json, else config.json, says, and the tokenizer's own end."""
    generation = directory / "generation_config.json"
    said = read_json(generation).get("eos_token_id") if generation.exists() else None
    ids = config.get("eos_token_id") if said is None else said
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int))
