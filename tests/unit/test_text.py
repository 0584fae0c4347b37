"""Text to tokens and back, on tokenizers small enough to read."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from shared.chat_template import ChatTemplate
from shared.errors import InvalidRequest, ModelFilesError
from shared.text import REPLACEMENT, IncrementalText, Tokenizer

CHATML = (
    "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\n' }}\n{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ message | tojson }}{% generation %}<{{ eos_token }}>"
    "{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog, naïve café 你好 👋🏽 €"] * 4


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE with some merges, as GPT-2, Llama 3 and SmolLM have."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """Words with a mark for the space before them and single bytes for the rest, as Llama 2 has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


BYTE_LEVEL = Tokenizer(byte_level())
SENTENCEPIECE = Tokenizer(sentencepiece())
TEXTS = st.text(
    st.sampled_from("ab ,é€你😀👩\u200d\U0001f3fd\u0301\n") | st.characters(codec="utf-8"), max_size=30
)
BYTE_TOKENS = st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=60)


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> tuple[list[str], IncrementalText]:
    decoder = tokenizer.decoder()
    return [decoder.push([token]) for token in tokens], decoder


def model_directory(directory: Path, backend: tokenizers.Tokenizer, **tokenizer_config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}
    (directory / "tokenizer_config.json").write_text(json.dumps(said))
    return directory


# --- text that grows ----------------------------------------------------------------------------------


@given(BYTE_TOKENS)
def test_any_tokens_come_out_as_the_text_of_all_of_them(tokens: list[int]) -> None:
    shown, decoder = pieces(BYTE_LEVEL, tokens)
    assert "".join(shown) + decoder.flush() == BYTE_LEVEL.decode(tokens)


@given(TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_a_text_comes_out_whole_and_never_by_half_characters(tokenizer: Tokenizer, text: str) -> None:
    tokens = list(tokenizer.encode(text))
    shown, decoder = pieces(tokenizer, tokens)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in shown)
        assert decoder.flush() == ""
        assert "".join(shown) == tokenizer.decode(tokens)


@given(BYTE_TOKENS, st.integers(0, 60), st.lists(st.integers(0, 60), max_size=8))
def test_a_stream_that_another_process_goes_on_with_neither_loses_nor_repeats(
    tokens: list[int], cut: int, cuts: list[int]
) -> None:
    shown, decoder = pieces(BYTE_LEVEL, tokens)
    resumed = BYTE_LEVEL.decoder()
    before = resumed.push(tokens[:cut])
    assert before == "".join(shown[:cut])
    bounds = sorted({min(max(bound, cut), len(tokens)) for bound in (cut, *cuts, len(tokens))})
    rest = [resumed.push(tokens[start:end]) for start, end in pairwise(bounds)]
    assert before + "".join(rest) + resumed.flush() == "".join(shown) + decoder.flush()


def test_words_keep_the_spaces_between_them() -> None:
    tokens = list(SENTENCEPIECE.encode("a b a"))
    shown, _ = pieces(SENTENCEPIECE, tokens)
    assert shown[1:] == ["a", " b", " a"]


def test_bytes_that_never_become_a_character_are_shown_in_time_and_not_held_for_ever() -> None:
    stray = next(n for n in range(BYTE_LEVEL.vocab_size) if BYTE_LEVEL.decode([n]) == REPLACEMENT)
    for tokenizer, token in ((BYTE_LEVEL, stray), (SENTENCEPIECE, 3 + 0xFF)):
        shown, decoder = pieces(tokenizer, [token] * 500)
        assert len("".join(shown)) >= 490
        assert "".join(shown) + decoder.flush() == REPLACEMENT * 500


def test_special_and_unknown_tokens_are_not_shown() -> None:
    hello = list(BYTE_LEVEL.encode("hello"))
    shown, decoder = pieces(BYTE_LEVEL, [1, *hello, 2, 10**6, 0])
    assert "".join(shown) + decoder.flush() == "hello"


def test_a_special_token_inside_a_character_does_not_break_it() -> None:
    vocabulary = BYTE_LEVEL.backend.get_vocab()
    first, second, third = (vocabulary[letter] for letter in "âĤ¬")  # € in the byte-level alphabet
    shown, _ = pieces(BYTE_LEVEL, [first, 2, second, third])
    assert shown == ["", "", "", "€"]


# --- loading ------------------------------------------------------------------------------------------


def test_what_ends_a_sequence_is_gathered_from_the_models_files(tmp_path: Path) -> None:
    directory = model_directory(tmp_path, byte_level(), eos_token={"content": "<|endoftext|>"})
    assert Tokenizer.load(directory).stop_tokens == {0, 2}
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert Tokenizer.load(directory).stop_tokens == {0, 1, 7}


def test_truncation_in_the_tokenizers_file_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert len(Tokenizer.load(model_directory(tmp_path, backend)).encode("x" * 40)) == 40


def test_plain_text_gets_the_token_that_the_model_wants_in_front_and_a_chat_gets_its_templates_own() -> None:
    assert SENTENCEPIECE.encode("a")[0] == 1
    template = ChatTemplate("{{ bos_token }}{{ messages[0]['content'] }}", {"bos_token": "<s>"})
    tokenizer = Tokenizer(sentencepiece(), chat_template=template)
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]).count(1) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{", "no readable tokenizer"),
        ("tokenizer.json", '{"model": {}}', "no readable tokenizer"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("config.json", None, "has no config.json"),
        ("config.json", "[]", "no JSON object"),
        ("tokenizer_config.json", "{", "can't be read as JSON"),
        ("chat_template.jinja", "{% for %}", "can't be compiled"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(
    tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    directory = model_directory(tmp_path, byte_level())
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)
    with pytest.raises(ModelFilesError, match=says):
        Tokenizer.load(directory)


# --- chats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CHATML, STRICT], ids=["ChatML", "strict"])
def test_chats_are_rendered_and_tokenized_as_transformers_does(tmp_path: Path, source: str) -> None:
    from transformers import AutoTokenizer

    directory = model_directory(
        tmp_path, byte_level(), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=source
    )
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.load(directory)
    for content in ("", "hi <b>&amp;</b>", "  spaces\n\n", "你好 👋🏽", '"quoted" \\ <|im_end|>'):
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "é"}]
        expected = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        assert list(ours.encode_chat(chat)) == expected["input_ids"]
        assert list(ours.encode(content)) == theirs(content)["input_ids"]


def test_a_template_in_a_file_of_its_own_wins_over_the_one_in_the_configuration(tmp_path: Path) -> None:
    listed = [{"name": "tools", "template": "no"}, {"name": "default", "template": "listed"}]
    directory = model_directory(tmp_path, byte_level(), chat_template=listed)
    chat = [{"role": "user", "content": "x"}]
    assert BYTE_LEVEL.decode(Tokenizer.load(directory).encode_chat(chat)) == "listed"
    (directory / "chat_template.jinja").write_text("own")
    assert BYTE_LEVEL.decode(Tokenizer.load(directory).encode_chat(chat)) == "own"


def test_messages_that_the_template_refuses_are_a_bad_request_that_says_why() -> None:
    template = ChatTemplate(STRICT, {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([{"role": "assistant", "content": "x"}])


def test_a_message_without_what_the_template_needs_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequest, match="content"):
        ChatTemplate(CHATML, {}).render([{"role": "user"}])


def test_a_template_can_not_reach_out_of_its_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InvalidRequest, match="unsafe"):
        template.render([{"role": "user", "content": "x"}])


def test_a_model_without_a_template_says_what_to_use_instead() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        BYTE_LEVEL.encode_chat([{"role": "user", "content": "x"}])
