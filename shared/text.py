"""Text to tokens and back: the target's tokenizer, its chat template, and text that grows token by token.

What a stream shows after n tokens is a function of these n tokens alone (`IncrementalText`, `StopStrings`): another
process that is fed the same tokens stands at the same character.

Reads tokenizer.json with the `tokenizers` library itself: transformers would add six seconds of CPU and 300 MB to the
start of a gateway, and give the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.chat_template import ChatTemplate
from shared.errors import InvalidRequest, ModelFilesError
from shared.models import read_config, read_json
from shared.protocol import Tokens

if TYPE_CHECKING:
    import tokenizers

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER: Final = 4  # bytes in UTF-8, so tokens at most
_MOST_HELD: Final = 64
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-F]{2})>")
_NAMED_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class IncrementalText:
    """The text of a growing sequence of tokens. Special tokens are left out; half a character is held back.

    However the tokens are cut into pushes, the text is the same, and with the flush it is that of all tokens at once
    (of byte-level tokenizers exactly; others show what is no valid UTF-8 in ways of their own).
    """

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._backend: Final = backend
        self._skipped: Final = skipped
        self._before: list[int] = []  # the tokens shown last: how the next ones read can depend on them
        self._before_text = ""
        self._held: list[int] = []  # tokens whose text has not come out yet

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete."""
        return "".join([self._step(token) for token in tokens])

    def flush(self) -> str:
        """What no further token will complete: replacement characters for the bytes that are left over."""
        return self._show(len(self._held)) if self._held else ""

    def _step(self, token: int) -> str:
        if token in self._skipped or self._backend.id_to_token(token) is None:
            return ""
        self._held.append(token)
        text = self._decode(self._before + self._held)
        if not text.endswith(REPLACEMENT):
            return self._show(len(self._held))
        if len(self._held) < _LONGEST_CHARACTER:
            return ""
        return self._show(self._finished(text))

    def _finished(self, text: str) -> int:
        """How many held tokens no further token can change, although bytes at their end are no character (yet).

        Bytes that are cut where a character begins give the same text as uncut. An unfinished one has 3 bytes at most.
        """
        held = self._held
        for count in range(len(held) - 1, len(held) - _LONGEST_CHARACTER, -1):
            if self._decode(self._before + held[:count]) + self._decode(held[count:]) == text:
                return count
        return 0 if len(held) < _MOST_HELD else len(held)

    def _show(self, count: int) -> str:
        """The text of the first `count` held tokens, which are held no more."""
        if count == 0:
            return ""
        shown, self._held = self._held[:count], self._held[count:]
        text = self._decode(self._before + shown)
        new = text[len(self._before_text) :] if text.startswith(self._before_text) else self._decode(shown)
        self._before, self._before_text = shown, self._decode(shown)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)


class StopStrings:
    """Looks for the strings that end a growing text, and holds back what may be the beginning of one.

    The one that is complete first ends the text, the first in `strings` of several that are complete with the same
    character; so vLLM decides when it adds a token at a time (`vllm.v1.engine.detokenizer.check_stop_strings`). The text
    ends before the string, or with `included` behind it.
    """

    def __init__(self, strings: Sequence[str], *, included: bool = False) -> None:
        self._strings: Final = tuple(strings)
        self._included: Final = included
        self._reach: Final = max((len(string) for string in self._strings), default=0)
        self._tail = ""  # the end of the text so far, shorter than the longest string
        self._held = 0  # characters of it that were not shown
        self.found: str | None = None

    def push(self, text: str, *, counts: bool = True) -> str:
        """What may be shown now that `text` has been added; with `counts` a string may end within it."""
        if not self._strings or not text or self.found is not None:
            return "" if self.found is not None else text
        before, whole = len(self._tail), self._tail + text
        shown = before - self._held
        if counts and (end := self._first(whole, before)) is not None:
            return whole[shown:end]
        self._held = 0 if self._included else self._beginning(whole)
        self._tail = whole[len(whole) - self._reach + 1 :] if len(whole) >= self._reach else whole
        return whole[shown : len(whole) - self._held]

    def flush(self) -> str:
        """What was held back of a text that ended otherwise."""
        held, self._held = self._held, 0
        return self._tail[len(self._tail) - held :] if self.found is None else ""

    def _first(self, text: str, before: int) -> int | None:
        """Where the text ends, if a string is complete behind its first `before` characters."""
        ends = [
            (start + len(string), start, string)
            for string in self._strings
            if (start := text.find(string, max(0, before - len(string) + 1))) >= 0
        ]
        if not ends:
            return None
        end, start, self.found = min(ends, key=lambda found: found[0])
        return end if self._included else start

    def _beginning(self, text: str) -> int:
        """The length of the longest end of `text` that is the beginning of a string."""
        longest = min(len(text), self._reach - 1)
        for length in range(longest, 0, -1):
            if any(string.startswith(text[-length:]) and len(string) > length for string in self._strings):
                return length
        return 0


class Tokenizer:
    """The tokenizer of the model in a directory, and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        stop_tokens: frozenset[int] = frozenset(),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.backend: Final = backend
        self.stop_tokens: Final = stop_tokens
        self.vocab_size: Final[int] = backend.get_vocab_size()
        self._chat_template: Final = chat_template
        added = backend.get_added_tokens_decoder()
        self._added: Final = frozenset(added)
        self._special: Final = frozenset(number for number, token in added.items() if token.special)
        self._byte_of: Final = _bytes_of_characters() if "ByteLevel" in repr(backend.decoder) else {}

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read the tokenizer; `ModelFilesError` when the directory holds none that is usable."""
        path = Path(directory)
        config = read_config(path)
        backend = _read_backend(path / "tokenizer.json")
        named = _named_tokens(path)
        return cls(
            backend,
            stop_tokens=_stop_tokens(path, config, backend.token_to_id(named.get("eos_token", ""))),
            chat_template=_chat_template(path, named),
        )

    def encode(self, text: str) -> Tokens:
        """The tokens of a plain text, with whatever the model wants in front of one."""
        return tuple(self.backend.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """The tokens of a chat, up to where the assistant's answer begins.

        Raises `InvalidRequest` when the model has no chat template or the template refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        rendered = self._chat_template.render(messages)
        return tuple(self.backend.encode(rendered, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of all `tokens`, special ones left out."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def decode_prompt(self, tokens: Sequence[int]) -> str:
        """The text of a prompt, special tokens and all; not those that `encode` puts in front of every text."""
        put = self.encode("")
        own = tokens[len(put) :] if put and tuple(tokens[: len(put)]) == put else tokens
        return self.backend.decode(list(own), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; of byte-level tokenizers they need not be whole characters."""
        name = self.backend.id_to_token(token)
        if name is None:
            return b""
        if token not in self._added:
            if self._byte_of and all(character in self._byte_of for character in name):
                return bytes(self._byte_of[character] for character in name)
            if byte := _BYTE_TOKEN.fullmatch(name):
                return bytes([int(byte[1], 16)])
        return self.backend.decode([token], skip_special_tokens=False).encode()

    def decoder(self) -> IncrementalText:
        """A new incremental decoder."""
        return IncrementalText(self.backend, self._special)


def _bytes_of_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    if not path.exists():
        raise ModelFilesError(f"{path.parent} has no tokenizer.json")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a broken file
        raise ModelFilesError(f"{path} is no readable tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _optional_json(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}


def _named_tokens(directory: Path) -> dict[str, str]:
    """The special tokens that have a role, by the names that templates use."""
    said = {
        **_optional_json(directory / "special_tokens_map.json"),
        **_optional_json(directory / "tokenizer_config.json"),
    }
    contents = {name: said.get(name) for name in _NAMED_TOKENS}
    texts = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in contents.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(directory: Path, named_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template in a file of its own, else the (default) one in tokenizer_config.json."""
    own_file = directory / "chat_template.jinja"
    if own_file.exists():
        return ChatTemplate(own_file.read_text(encoding="utf-8"), named_tokens)
    said = _optional_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(said, list):
        said = next((entry.get("template") for entry in said if entry.get("name") == "default"), None)
    return ChatTemplate(said, named_tokens) if isinstance(said, str) else None


def _stop_tokens(directory: Path, config: Mapping[str, Any], end_of_sequence: int | None) -> frozenset[int]:
    """What ends a sequence: what generation_config.json, else config.json, says, and the tokenizer's own end."""
    said = _optional_json(directory / "generation_config.json").get("eos_token_id")
    ids = config.get("eos_token_id") if said is None else said
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in (*listed, end_of_sequence) if isinstance(token, int))
