"""The OpenAI face: what a request may say, and the exact shapes of what goes back.

Bytes become a `GenerationRequest` or an `OutriderError` that names the parameter; committed text becomes chunks,
completions and usage. Nothing here knows of sessions in flight, of HTTP or of Kafka.

Served: greedy decoding, one choice. A parameter that would ask for anything else is refused by name unless it has the
value that changes nothing; `temperature` left out means 0. Fields that neither OpenAI nor vLLM define are ignored, as
both do, except inside `outrider`, our own extension, where they are refused.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from shared.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from shared.protocol import FinishReason, Tokens

JsonObject = dict[str, Any]

SEED_LIMIT: Final = 1 << 63
TOKEN_LIMIT: Final = 1 << 31


class Api(StrEnum):
    """Which of the two generating endpoints a session belongs to."""

    CHAT = "chat"
    COMPLETION = "completion"

    @property
    def id_prefix(self) -> str:
        """How ids of its responses, and so of its sessions, begin."""
        return "chatcmpl-" if self is Api.CHAT else "cmpl-"


class RequestTooLarge(InvalidRequest):
    """The body is longer than this gateway reads (HTTP 413)."""

    code = "request_too_large"
    status = 413


# --- what is not served ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Neutral:
    """The values of an unserved parameter that change nothing, and what to say of any other. None is always neutral."""

    values: tuple[object, ...]
    served: str

    def admits(self, value: object) -> bool:
        """Whether `value` asks for nothing. Booleans and numbers are told apart."""
        return value is None or any(
            value == neutral and isinstance(value, bool) is isinstance(neutral, bool)
            for neutral in self.values
        )


_GREEDY: Final = "only greedy decoding is served"
_ONE: Final = "one choice is served a request"
_NO_TOOLS: Final = "tools are not served"
_TEXT: Final = "plain text is served"
_NO_LOGPROBS: Final = "log probabilities are not served"
_WHOLE_ANSWER: Final = "answers end at the end of the sequence, at `stop_token_ids` or at `max_tokens`"
_OWN_TEMPLATE: Final = "the model's own chat template is used"

_UNSERVED: Final[Mapping[str, Neutral]] = {
    "temperature": Neutral((0,), _GREEDY),
    "top_p": Neutral((1,), _GREEDY),
    "top_k": Neutral((0, -1), _GREEDY),
    "min_p": Neutral((0,), _GREEDY),
    "typical_p": Neutral((1,), _GREEDY),
    "presence_penalty": Neutral((0,), _GREEDY),
    "frequency_penalty": Neutral((0,), _GREEDY),
    "repetition_penalty": Neutral((1,), _GREEDY),
    "length_penalty": Neutral((1,), _GREEDY),
    "logit_bias": Neutral(({},), _GREEDY),
    "bad_words": Neutral(([],), _GREEDY),
    "allowed_token_ids": Neutral((), _GREEDY),
    "use_beam_search": Neutral((False,), _GREEDY),
    "n": Neutral((1,), _ONE),
    "best_of": Neutral((1,), _ONE),
    "logprobs": Neutral((False,), _NO_LOGPROBS),
    "top_logprobs": Neutral((0,), _NO_LOGPROBS),
    "prompt_logprobs": Neutral((), _NO_LOGPROBS),
    "stop": Neutral(([],), _WHOLE_ANSWER),
    "include_stop_str_in_output": Neutral((False,), _WHOLE_ANSWER),
    "min_tokens": Neutral((0,), _WHOLE_ANSWER),
    "echo": Neutral((False,), "the prompt is not repeated"),
    "suffix": Neutral(("",), "insertion is not served"),
    "prediction": Neutral((), "predicted outputs are not served; drafts are made here"),
    "tools": Neutral(([],), _NO_TOOLS),
    "tool_choice": Neutral(("none", "auto"), _NO_TOOLS),
    "functions": Neutral(([],), _NO_TOOLS),
    "function_call": Neutral(("none", "auto"), _NO_TOOLS),
    "response_format": Neutral(({"type": "text"},), _TEXT),
    "modalities": Neutral((["text"],), _TEXT),
    "audio": Neutral((), _TEXT),
    "structured_outputs": Neutral((), _TEXT),
    "guided_json": Neutral((), _TEXT),
    "guided_regex": Neutral((), _TEXT),
    "guided_choice": Neutral((), _TEXT),
    "guided_grammar": Neutral((), _TEXT),
    "skip_special_tokens": Neutral((True,), "special tokens are left out of the text"),
    "spaces_between_special_tokens": Neutral((True,), "special tokens are left out of the text"),
    "web_search_options": Neutral((), "web search is not served"),
    "reasoning_effort": Neutral(("none",), "reasoning effort is not served"),
    "verbosity": Neutral(("medium",), "verbosity is not served"),
    "service_tier": Neutral(("auto", "default"), "there is one service tier, 'default'"),
    "store": Neutral((False,), "answers are not stored beyond the session's life"),
    "chat_template": Neutral((), _OWN_TEMPLATE),
    "chat_template_kwargs": Neutral(({},), _OWN_TEMPLATE),
    "add_generation_prompt": Neutral((True,), _OWN_TEMPLATE),
    "continue_final_message": Neutral((False,), _OWN_TEMPLATE),
    "documents": Neutral(([],), _OWN_TEMPLATE),
    "truncate_prompt_tokens": Neutral((), "prompts are taken whole or refused"),
    "return_token_ids": Neutral((False,), "ask for them with `outrider.return_token_ids`"),
}


def _refuse_unserved(body: Mapping[str, object]) -> None:
    for name, value in body.items():
        neutral = _UNSERVED.get(name)
        if neutral is None or neutral.admits(value):
            continue
        accepted = [*(repr(choice) for choice in neutral.values), "null"]
        raise UnsupportedParameter(
            f"{name}={_shown(value)} is not served: {neutral.served}. Leave `{name}` out, or send "
            f"{' or '.join(accepted)}.",
            param=name,
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- requests ---------------------------------------------------------------------------------------------------


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode (a lone surrogate)") from None
    return text


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextPart(_Request):
    """A part of a message's content; other kinds (images, audio, files) are not served."""

    type: Literal["text"]
    text: Annotated[str, AfterValidator(_encodable)]


def _joined(content: object) -> object:
    """The text of `content`, which is a string or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError("must be a string or a non-empty list of text parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(
                f'part {number} has type {kind!r}; only {{"type": "text", "text": ...}} is served'
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} must have a string `text`")
        texts.append(part["text"])
    return "".join(texts)


class ChatMessage(_Request):
    """One message of a chat. `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(_joined, json_schema_input_type=str | list[TextPart]),
        AfterValidator(_encodable),
    ]
    name: str | None = None
    tool_calls: Annotated[list[object], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Request):
    """`include_usage`: one more chunk, before `[DONE]`, with the usage. `include_obfuscation` has no effect."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class OutriderOptions(BaseModel):
    """Our extension of a request: what to show of the speculation, and how to speculate, for this request only."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    trace: bool = Field(False, description="Chunks tell, token by token, who wrote it.")
    return_token_ids: bool = Field(False, description="Choices and chunks carry `token_ids`.")
    block_length: Annotated[int, Field(ge=0)] | None = Field(None, description="Draft tokens a block.")
    adaptive: bool | None = Field(
        None, description="Whether each block's length is chosen by measurement, block_length at most."
    )
    hints: bool | None = Field(None, description="Whether hints of early exits start lanes.")
    guesses: bool | None = Field(None, description="Whether lanes start as a block goes up.")
    forwards: bool | None = Field(None, description="Whether finished lanes go up before the verdict.")
    policy: Literal["latency", "cost"] | None = Field(
        None, description="What the verifier does with nothing to verify: 'latency' goes on, 'cost' waits."
    )
    draft: Literal["engine", "none"] = Field("engine", description="'none' sends empty blocks.")


def _document_unserved(schema: JsonObject) -> None:
    """Say of each unserved parameter which values are taken, so that OpenAPI's readers need not try."""
    for name, neutral in _UNSERVED.items():
        taken = {"enum": [*neutral.values, None], "description": f"No effect: {neutral.served}."}
        schema["properties"].setdefault(name, taken)
    schema["properties"]["temperature"]["default"] = 0


class _GenerationBody(_Request):
    model_config = ConfigDict(json_schema_extra=_document_unserved)

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)] | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, lt=TOKEN_LIMIT)]], Field(max_length=64)] | None
    ) = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    outrider: OutriderOptions = OutriderOptions()


class ChatCompletionRequest(_GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


def _single_prompt(prompt: object) -> object:
    """The one prompt: a string, a list of one string, token ids, or a list of one list of token ids."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError(f"holds {len(prompt)} prompts; one is served a request")
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_token(token) for token in prompt):
        return tuple(prompt)
    raise ValueError("must be a string, a list of one string, or a non-empty list of token ids")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < TOKEN_LIMIT


def _encodable_prompt(prompt: str | tuple[int, ...]) -> str | tuple[int, ...]:
    return _encodable(prompt) if isinstance(prompt, str) else prompt


class CompletionRequest(_GenerationBody):
    """`POST /v1/completions`, one prompt a request."""

    prompt: Annotated[
        str | tuple[int, ...],
        BeforeValidator(_single_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
        AfterValidator(_encodable_prompt),
    ]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for one generation, checked. Exactly one of `messages`, `text` and `tokens` is set.

    `fingerprint` is the body's hash: an idempotency key may not be used for two different ones.
    """

    api: Api
    model: str
    stream: bool
    include_usage: bool
    max_tokens: int | None
    seed: int
    stop_token_ids: Tokens
    ignore_eos: bool
    options: OutriderOptions
    fingerprint: str
    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None
    tokens: Tokens | None = None

    @property
    def prompt_param(self) -> str:
        """The name of the parameter that holds the prompt."""
        return "messages" if self.api is Api.CHAT else "prompt"


def parse_chat(body: bytes) -> GenerationRequest:
    """The chat request in `body`; InvalidRequest or UnsupportedParameter names what is wrong with it."""
    request = _validated(ChatCompletionRequest, body)
    limit = request.max_completion_tokens
    if limit is not None and request.max_tokens is not None and limit != request.max_tokens:
        raise InvalidRequest(
            f"max_tokens={request.max_tokens} and max_completion_tokens={limit} contradict each other; send one",
            param="max_completion_tokens",
        )
    messages = tuple(message.for_template() for message in request.messages)
    return _request(Api.CHAT, request, body, limit or request.max_tokens, messages=messages)


def parse_completion(body: bytes) -> GenerationRequest:
    """The completion request in `body`; InvalidRequest or UnsupportedParameter names what is wrong with it."""
    request = _validated(CompletionRequest, body)
    text, tokens = (request.prompt, None) if isinstance(request.prompt, str) else (None, request.prompt)
    return _request(Api.COMPLETION, request, body, request.max_tokens, text=text, tokens=tokens)


def _request(
    api: Api,
    body: _GenerationBody,
    raw: bytes,
    max_tokens: int | None,
    *,
    messages: tuple[Mapping[str, str], ...] | None = None,
    text: str | None = None,
    tokens: Tokens | None = None,
) -> GenerationRequest:
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        raise InvalidRequest("stream_options needs stream=true", param="stream_options")
    return GenerationRequest(
        api=api,
        model=body.model,
        stream=stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        max_tokens=max_tokens,
        seed=body.seed or 0,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        options=body.outrider,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        messages=messages,
        text=text,
        tokens=tokens,
    )


_Body = TypeVar("_Body", bound=_GenerationBody)


def _validated(model: type[_Body], raw: bytes) -> _Body:
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    _refuse_unserved(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first fault as an OpenAI error: the parameter's path, and what would be right."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return InvalidRequest(f"missing required parameter: `{path}`", param=path)
    return InvalidRequest(f"invalid `{path}`: {text[:1].lower()}{text[1:]}", param=path)


def check_model(asked: str, served: str) -> None:
    """ModelNotFound unless `asked` is the model that is served."""
    if asked != served:
        raise ModelNotFound(
            f"the model {_shown(asked)} does not exist here; this gateway serves {served!r}", param="model"
        )


# --- answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that a stream goes on with: the tokens it was made of, and of each what it adds and who wrote it."""

    text: str
    tokens: Tokens
    traced: Sequence[tuple[str, str]]
    round: int


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """How a session's answers look. It survives in the session's metadata, so that any gateway can go on with them."""

    _VERSION: ClassVar[str] = "1"

    api: Api
    session: str
    created: int
    model: str
    include_usage: bool = False
    fingerprint: str = ""
    options: OutriderOptions = field(default_factory=OutriderOptions)

    @classmethod
    def of(cls, request: GenerationRequest, session: str) -> ResponseForm:
        """The form of the answers to `request`, from now."""
        return cls(
            api=request.api,
            session=session,
            created=int(time.time()),
            model=request.model,
            include_usage=request.include_usage,
            fingerprint=request.fingerprint,
            options=request.options,
        )

    def to_metadata(self) -> dict[str, str]:
        """The form as strings."""
        return {
            "form": self._VERSION,
            "api": self.api.value,
            "created": str(self.created),
            "model": self.model,
            "include_usage": "true" if self.include_usage else "false",
            "fingerprint": self.fingerprint,
            "outrider": self.options.model_dump_json(exclude_defaults=True),
        }

    @classmethod
    def from_metadata(cls, session: str, metadata: Mapping[str, str]) -> ResponseForm:
        """The form that `to_metadata` wrote. InvalidRequest when the session was opened by something else."""
        if metadata.get("form") != cls._VERSION:
            raise InvalidRequest(f"the session {session} was not opened by this API and cannot be streamed")
        return cls(
            api=Api(metadata["api"]),
            session=session,
            created=int(metadata["created"]),
            model=metadata["model"],
            include_usage=metadata["include_usage"] == "true",
            fingerprint=metadata["fingerprint"],
            options=OutriderOptions.model_validate_json(metadata["outrider"]),
        )

    def role_chunk(self) -> JsonObject | None:
        """The chunk that opens a chat; completions have none."""
        if self.api is Api.COMPLETION:
            return None
        return self._chunk(self._chat_delta({"role": "assistant", "content": "", "refusal": None}))

    def text_chunk(self, piece: Piece) -> JsonObject:
        """A chunk with new text."""
        choice = self._delta(piece.text)
        if self.options.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
        chunk = self._chunk(choice)
        if self.options.trace:
            chunk["outrider"] = {
                "tokens": [{"text": text, "source": source} for text, source in piece.traced],
                "round": piece.round,
            }
        return chunk

    def finish_chunk(self, reason: FinishReason, text: str = "") -> JsonObject:
        """The last chunk with a choice; `text` is what the last tokens left over."""
        choice = self._delta(text) if text or self.api is Api.COMPLETION else self._chat_delta({})
        return self._chunk(choice | {"finish_reason": reason.value})

    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        """The chunk that `include_usage` asks for."""
        return self._chunk(None) | {"usage": usage}

    def whole(self, text: str, tokens: Tokens, reason: FinishReason, usage: JsonObject) -> JsonObject:
        """The answer in one piece."""
        choice: JsonObject = {"index": 0, "logprobs": None, "finish_reason": reason.value}
        if self.api is Api.CHAT:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        if self.options.return_token_ids:
            choice["token_ids"] = list(tokens)
        name = "chat.completion" if self.api is Api.CHAT else "text_completion"
        return self._frame(name) | {"choices": [choice], "usage": usage}

    def _frame(self, name: str) -> JsonObject:
        return {
            "id": self.session,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _chunk(self, choice: JsonObject | None) -> JsonObject:
        frame = self._frame("chat.completion.chunk" if self.api is Api.CHAT else "text_completion")
        frame["choices"] = [] if choice is None else [choice]
        if self.include_usage:
            frame["usage"] = None
        return frame

    def _delta(self, text: str) -> JsonObject:
        if self.api is Api.CHAT:
            return self._chat_delta({"content": text})
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": None}

    @staticmethod
    def _chat_delta(delta: JsonObject) -> JsonObject:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}


def usage(prompt_tokens: int, completion_tokens: int, outrider: JsonObject) -> JsonObject:
    """OpenAI's usage, and what speculation did."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "outrider": outrider,
    }


def model_card(name: str, *, created: int, max_model_len: int) -> JsonObject:
    """A model as `/v1/models` lists it."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "outrider",
        "max_model_len": max_model_len,
    }


def model_list(cards: Sequence[JsonObject]) -> JsonObject:
    """The body of `/v1/models`."""
    return {"object": "list", "data": list(cards)}
