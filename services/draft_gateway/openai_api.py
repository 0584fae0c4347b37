"""The OpenAI face: what a request may say, and the exact shapes of what goes back.

Bytes become a `GenerationRequest` or an `OutriderError` that names the parameter; committed text becomes chunks,
completions and usage. Nothing here knows of sessions in flight, of HTTP or of Kafka.

A parameter that would ask for what is not served is refused by name unless it has the value that changes nothing. What
is served has the names, the ranges and the meaning that vLLM gives it. Fields that neither OpenAI nor vLLM define are
ignored, as both do, except inside `outrider`, our own extension, where they are refused.
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

from services.draft_gateway import json_schema
from shared.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from shared.protocol import FinishReason, Sampling, SamplingMode, Tokens

JsonObject = dict[str, Any]

SEED_LIMIT: Final = 1 << 63
TOKEN_LIMIT: Final = 1 << 31
MOST_CHOICES: Final = 128
MOST_STOPS: Final = 4
LONGEST_STOP: Final = 1000
MOST_LOGPROBS: Final = 20
BIAS_LIMIT: Final = 100.0
LEAST_LOGPROB: Final = -9999.0


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


_WHOLE_VOCABULARY: Final = "no token is forbidden; `logit_bias` makes tokens unlikely"
_NO_BEAMS: Final = "beam search is not served; tokens are sampled"
_NO_TOOLS: Final = "tools are not served"
_TEXT: Final = "text is served, and JSON by `response_format`"
_NO_PROMPT_LOGPROBS: Final = "log probabilities of the prompt are not served"
_OWN_TEMPLATE: Final = "the model's own chat template is used"

_UNSERVED: Final[Mapping[str, Neutral]] = {
    "typical_p": Neutral((1,), "truncate with `top_p`, `top_k` or `min_p`"),
    "length_penalty": Neutral((1,), _NO_BEAMS),
    "use_beam_search": Neutral((False,), _NO_BEAMS),
    "best_of": Neutral((1,), "every choice is returned; ask for several with `n`"),
    "bad_words": Neutral(([],), _WHOLE_VOCABULARY),
    "allowed_token_ids": Neutral((), _WHOLE_VOCABULARY),
    "prompt_logprobs": Neutral((), _NO_PROMPT_LOGPROBS),
    "logprob_token_ids": Neutral(([],), "the likeliest tokens are told, not chosen ones"),
    "suffix": Neutral(("",), "insertion is not served"),
    "prediction": Neutral((), "predicted outputs are not served; drafts are made here"),
    "tools": Neutral((), _NO_TOOLS),
    "tool_choice": Neutral(("none", "auto"), _NO_TOOLS),
    "functions": Neutral(([],), _NO_TOOLS),
    "function_call": Neutral(("none", "auto"), _NO_TOOLS),
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
    "thinking_token_budget": Neutral((-1,), "reasoning effort is not served"),
    "repetition_detection": Neutral((), "answers end at their end, at a stop or at `max_tokens`"),
    "verbosity": Neutral(("medium",), "verbosity is not served"),
    "service_tier": Neutral(("auto", "default"), "there is one service tier, 'default'"),
    "store": Neutral((False,), "answers are not stored beyond the session's life"),
    "chat_template": Neutral((), _OWN_TEMPLATE),
    "chat_template_kwargs": Neutral(({},), _OWN_TEMPLATE),
    "add_generation_prompt": Neutral((True,), _OWN_TEMPLATE),
    "continue_final_message": Neutral((False,), _OWN_TEMPLATE),
    "documents": Neutral(([],), _OWN_TEMPLATE),
    "truncate_prompt_tokens": Neutral((), "prompts are taken whole or refused"),
    "prompt_embeds": Neutral((), "prompts are text or tokens"),
    "return_token_ids": Neutral((False,), "ask for them with `outrider.return_token_ids`"),
    "return_tokens_as_token_ids": Neutral((False,), "ask for them with `outrider.return_token_ids`"),
}
_UNSERVED_IN_CHAT: Final[Mapping[str, Neutral]] = {
    **_UNSERVED,
    "echo": Neutral((False,), "the prompt of a chat is not repeated"),
}
_UNSERVED_IN_COMPLETIONS: Final[Mapping[str, Neutral]] = {
    **_UNSERVED,
    "top_logprobs": Neutral((0,), "completions have `logprobs`, the number of likeliest tokens to tell"),
}


def _refuse_unserved(body: Mapping[str, object], unserved: Mapping[str, Neutral]) -> None:
    for name, value in body.items():
        neutral = unserved.get(name)
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
    """The text of `content`, which is a string or a list of text parts; these are lines, as vLLM reads them."""
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
    return "\n".join(texts)


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
    sampling: Literal["keyed", "ratio"] = Field(
        "keyed",
        description="How drafted tokens are judged at a temperature above 0. 'keyed': the answer is a function of "
        "prompt and seed. 'ratio': the classic accept/reject test; exact in distribution, not replayable.",
    )


class JsonSchemaFormat(_Request):
    """`name` and `description` are for the client's own use."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Request):
    """What the answer has to be. With `json_schema` an answer that is not cut short validates, `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def as_schema(self) -> str:
        """The schema as JSON, "{}" for any object, "" for text. InvalidRequest when there is none, or a wrong one."""
        if self.type == "text":
            return ""
        if self.type == "json_object":
            return "{}"
        if self.json_schema is None:
            raise InvalidRequest(
                "missing required parameter: `response_format.json_schema`",
                param="response_format.json_schema",
            )
        return json_schema.checked(self.json_schema.schema_ or {}, param="response_format.json_schema.schema")


def _stop_strings(stop: object) -> object:
    """The strings in `stop`, which is one string or a list of some."""
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MOST_STOPS:
        raise ValueError(f"holds {len(strings)} strings; at most {MOST_STOPS} are served")
    for string in strings:
        if not 1 <= len(string) <= LONGEST_STOP:
            raise ValueError(f"a string has {len(string)} characters; 1 to {LONGEST_STOP} are served")
        _encodable(string)
    return tuple(strings)


def _bias(bias: object) -> object:
    """Pairs of a token and what is added to its logit, which is held within ±BIAS_LIMIT, as vLLM does."""
    if not isinstance(bias, dict):
        raise ValueError("must be an object of token ids and numbers")
    pairs = {}
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and int(token[:11]) < TOKEN_LIMIT):
            raise ValueError(f"{_shown(token)} is no token id")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"the bias of {token} must be a number")
        pairs[int(token)] = max(-BIAS_LIMIT, min(BIAS_LIMIT, float(value)))
    return tuple(sorted(pairs.items()))


Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


def _document_unserved(schema: JsonObject, unserved: Mapping[str, Neutral]) -> None:
    """Say of each unserved parameter which values are taken, so that OpenAPI's readers need not try."""
    for name, neutral in unserved.items():
        taken = {"enum": [*neutral.values, None], "description": f"No effect: {neutral.served}."}
        schema["properties"].setdefault(name, taken)


class _GenerationBody(_Request):
    unserved: ClassVar[Mapping[str, Neutral]]

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        None, description="Left out, the gateway's setting `default_temperature` (0 unless set)."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=TOKEN_LIMIT)] | None = Field(None, description="0 and -1 are all.")
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)] | None = Field(
        None, description="Left out, the gateway draws one; `usage.outrider.seed` tells it."
    )
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[
            tuple[tuple[int, float], ...], BeforeValidator(_bias, json_schema_input_type=dict[str, float])
        ]
        | None
    ) = None
    stop: (
        Annotated[tuple[str, ...], BeforeValidator(_stop_strings, json_schema_input_type=str | list[str])]
        | None
    ) = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, lt=TOKEN_LIMIT)]], Field(max_length=64)] | None
    ) = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    outrider: OutriderOptions = OutriderOptions()


class ChatCompletionRequest(_GenerationBody):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra=lambda schema: _document_unserved(schema, _UNSERVED_IN_CHAT))
    unserved: ClassVar[Mapping[str, Neutral]] = _UNSERVED_IN_CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


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

    model_config = ConfigDict(
        json_schema_extra=lambda schema: _document_unserved(schema, _UNSERVED_IN_COMPLETIONS)
    )
    unserved: ClassVar[Mapping[str, Neutral]] = _UNSERVED_IN_COMPLETIONS

    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    prompt: Annotated[
        str | tuple[int, ...],
        BeforeValidator(_single_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
        AfterValidator(_encodable_prompt),
    ]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for `n` answers to one prompt, checked. Exactly one of `messages`, `text` and `tokens` is set.

    `sampling` lacks what the gateway has to choose where the client did not, the temperature and the seed. `logprobs`
    asks for log-probabilities, and for those of so many likeliest tokens. `json_schema` is "" for text.
    `fingerprint` is the body's hash: an idempotency key may not be used for two different ones.
    """

    api: Api
    model: str
    stream: bool
    include_usage: bool
    max_tokens: int | None
    n: int
    temperature: float | None
    seed: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    include_stop: bool
    stop_token_ids: Tokens
    ignore_eos: bool
    echo: bool
    logprobs: int | None
    json_schema: str
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
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
    messages = tuple(message.for_template() for message in request.messages)
    return _request(
        Api.CHAT,
        request,
        body,
        limit or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        messages=messages,
    )


def parse_completion(body: bytes) -> GenerationRequest:
    """The completion request in `body`; InvalidRequest or UnsupportedParameter names what is wrong with it."""
    request = _validated(CompletionRequest, body)
    text, tokens = (request.prompt, None) if isinstance(request.prompt, str) else (None, request.prompt)
    if request.echo and request.logprobs is not None:
        raise UnsupportedParameter(
            f"logprobs={request.logprobs} with echo=true is not served: {_NO_PROMPT_LOGPROBS}. Leave one of them out.",
            param="logprobs",
        )
    return _request(
        Api.COMPLETION,
        request,
        body,
        request.max_tokens,
        logprobs=request.logprobs,
        echo=bool(request.echo),
        text=text,
        tokens=tokens,
    )


def _request(
    api: Api,
    body: _GenerationBody,
    raw: bytes,
    max_tokens: int | None,
    *,
    logprobs: int | None,
    echo: bool = False,
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
        n=body.n or 1,
        temperature=body.temperature,
        seed=body.seed,
        sampling=_sampling(body),
        stop=body.stop or (),
        include_stop=bool(body.include_stop_str_in_output),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        echo=echo,
        logprobs=logprobs,
        json_schema=body.response_format.as_schema() if body.response_format is not None else "",
        options=body.outrider,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        messages=messages,
        text=text,
        tokens=tokens,
    )


def _sampling(body: _GenerationBody) -> Sampling:
    """What the body says of sampling; what it leaves out, or says is null, is the default."""
    said = {
        "top_p": body.top_p,
        "top_k": max(0, body.top_k or 0),
        "min_p": body.min_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": body.logit_bias,
        "min_tokens": body.min_tokens,
        "mode": SamplingMode(body.outrider.sampling),
    }
    return Sampling.model_validate({name: value for name, value in said.items() if value is not None})


_Body = TypeVar("_Body", bound=_GenerationBody)


def _validated(model: type[_Body], raw: bytes) -> _Body:
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    _refuse_unserved(body, model.unserved)
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
class Likelihood:
    """A token as clients read it, the bytes it stands for, and its log-probability (natural, at most 0)."""

    token: str
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Told:
    """What `logprobs` tells of one token: its own likelihood, the likeliest ones', and where in the text it begins."""

    own: Likelihood
    top: Sequence[Likelihood]
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that an answer goes on with: the tokens it was made of, and of each what it adds and who wrote it.

    `told` has one entry a token where log-probabilities were asked for.
    """

    text: str
    tokens: Tokens
    traced: Sequence[tuple[str, str]] = ()
    round: int = 0
    told: Sequence[Told] | None = None


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """How a session's answers look. It survives in the session's metadata, so that any gateway can go on with them.

    Each choice of a response is a session of its own; `response` is the id that they share, `index` tells them apart.
    """

    _VERSION: ClassVar[str] = "1"

    api: Api
    session: str
    created: int
    model: str
    include_usage: bool = False
    fingerprint: str = ""
    options: OutriderOptions = field(default_factory=OutriderOptions)
    response: str = ""
    index: int = 0
    echo: bool = False
    include_stop: bool = False

    @classmethod
    def of(cls, request: GenerationRequest, response: str, index: int = 0) -> ResponseForm:
        """The form of choice `index` of the answer to `request`, from now."""
        return cls(
            api=request.api,
            session=choice_session(response, index),
            created=int(time.time()),
            model=request.model,
            include_usage=request.include_usage,
            fingerprint=request.fingerprint,
            options=request.options,
            response=response,
            index=index,
            echo=request.echo,
            include_stop=request.include_stop,
        )

    def to_metadata(self) -> dict[str, str]:
        """The form as strings."""
        return {
            "form": self._VERSION,
            "api": self.api.value,
            "created": str(self.created),
            "model": self.model,
            "include_usage": _flag(self.include_usage),
            "fingerprint": self.fingerprint,
            "outrider": self.options.model_dump_json(exclude_defaults=True),
            "response": self.response,
            "index": str(self.index),
            "echo": _flag(self.echo),
            "include_stop": _flag(self.include_stop),
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
            include_usage=metadata["include_usage"] == _flag(True),
            fingerprint=metadata["fingerprint"],
            options=OutriderOptions.model_validate_json(metadata["outrider"]),
            response=metadata["response"],
            index=int(metadata["index"]),
            echo=metadata["echo"] == _flag(True),
            include_stop=metadata["include_stop"] == _flag(True),
        )

    def role_chunk(self) -> JsonObject | None:
        """The chunk that opens a chat; completions have none."""
        if self.api is Api.COMPLETION:
            return None
        return self._chunk(self._chat_delta({"role": "assistant", "content": "", "refusal": None}))

    def text_chunk(self, piece: Piece) -> JsonObject:
        """A chunk with new text."""
        choice = self._delta(piece.text) | {"logprobs": self._logprobs(piece.told)}
        if self.options.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
        chunk = self._chunk(choice)
        if self.options.trace:
            chunk["outrider"] = {
                "tokens": [{"text": text, "source": source} for text, source in piece.traced],
                "round": piece.round,
            }
        return chunk

    def finish_chunk(
        self, reason: FinishReason, text: str = "", stop_reason: str | int | None = None
    ) -> JsonObject:
        """The last chunk with this choice; `text` is what the last tokens left over."""
        choice = self._delta(text) if text or self.api is Api.COMPLETION else self._chat_delta({})
        return self._chunk(choice | {"finish_reason": reason.value, "stop_reason": stop_reason})

    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        """The chunk that `include_usage` asks for."""
        return self._chunk(None) | {"usage": usage}

    def choice(self, piece: Piece, reason: FinishReason, stop_reason: str | int | None = None) -> JsonObject:
        """The choice in one piece."""
        choice: JsonObject = {
            "index": self.index,
            "logprobs": self._logprobs(piece.told),
            "finish_reason": reason.value,
            "stop_reason": stop_reason,
        }
        if self.api is Api.CHAT:
            choice["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        else:
            choice["text"] = piece.text
        if self.options.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
        return choice

    def whole(self, choices: Sequence[JsonObject], usage: JsonObject) -> JsonObject:
        """The answer in one piece."""
        name = "chat.completion" if self.api is Api.CHAT else "text_completion"
        return self._frame(name) | {"choices": list(choices), "usage": usage}

    def _frame(self, name: str) -> JsonObject:
        return {
            "id": self.response or self.session,
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
        return {"index": self.index, "text": text, "logprobs": None, "finish_reason": None}

    def _chat_delta(self, delta: JsonObject) -> JsonObject:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, told: Sequence[Told] | None) -> JsonObject | None:
        if told is None:
            return None
        if self.api is Api.CHAT:
            content = [
                {**_likelihood(each.own), "top_logprobs": [_likelihood(token) for token in each.top]}
                for each in told
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [each.own.token for each in told],
            "token_logprobs": [_bounded(each.own) for each in told],
            "top_logprobs": [
                {token.token: _bounded(token) for token in (each.own, *each.top)} for each in told
            ],
            "text_offset": [each.offset for each in told],
        }


def choice_session(response: str, index: int) -> str:
    """The id of the session that writes choice `index` of a response: the first one's is the response's own."""
    return f"{response}-{index}" if index else response


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _likelihood(token: Likelihood) -> JsonObject:
    return {"token": token.token, "logprob": _bounded(token), "bytes": list(token.data)}


def _bounded(token: Likelihood) -> float:
    """JSON knows no infinity: what a grammar or a bias forbids has the log-probability that OpenAI gives it."""
    return max(token.logprob, LEAST_LOGPROB)


def usage(prompt_tokens: int, completion_tokens: int, outrider: JsonObject) -> JsonObject:
    """OpenAI's usage, over all choices, and what speculation did. A prompt is counted once."""
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
