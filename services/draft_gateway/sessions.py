"""The gateway's sessions: admits, opens, resumes, cancels and stops them; one reader each.

Between a checked request and a running generation: tokens, limits, the session's id and its placement. What a
session is made of is in `generation.py`, what its reader sees in `streams.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Final, Protocol

from services.draft_gateway.drafting import Drafter
from services.draft_gateway.generation import Generation, Replay, TokenStream, logged
from services.draft_gateway.openai_api import GenerationRequest, ResponseForm, check_model
from services.draft_gateway.settings import GatewaySettings
from services.draft_gateway.streams import Position, Text, TextDecoder
from services.draft_gateway.uplink import Uplink
from shared.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    OutriderError,
    Overloaded,
    SessionNotFound,
    SessionTaken,
    Unavailable,
)
from shared.protocol import Cancel, CloseSession, GenerationParams, OpenSession, Policy, Sampling, Tokens
from shared.sampling.rules import Rules
from shared.session import SessionState
from shared.speculation.edge import EdgeConfig
from shared.speculation.outcomes import Foresight
from shared.telemetry import TraceContext

logger = logging.getLogger(__name__)

RETRY_S: Final = 1.0
STOP_S: Final = 5.0
LONG_TEXT: Final = 4096  # characters from which a prompt is tokenized beside the event loop


class PromptTokenizer(Protocol):
    """What a session needs of the target's tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        ...

    def encode(self, text: str) -> Tokens:
        """The tokens of a plain text."""
        ...

    def encode_chat(self, messages: list[dict[str, str]]) -> Tokens:
        """The tokens of a chat, up to where the assistant's answer begins."""
        ...

    def decoder(self) -> TextDecoder:
        """A new incremental decoder."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """A stream, how its answers look, and the text that its deliveries go on with."""

    stream: TokenStream
    form: ResponseForm
    text: Text


class Sessions:
    """All sessions that this gateway drives, at most `gateway_max_streams`."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        uplink: Uplink,
        drafter: Drafter,
        tokenizer: PromptTokenizer,
        foresight: Foresight,
    ) -> None:
        self._settings = settings
        self._uplink = uplink
        self._drafter = drafter
        self._tokenizer = tokenizer
        self._foresight = foresight
        self._live: dict[str, Generation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """No session is taken any more."""
        return self._stopping

    # --- opening -----------------------------------------------------------------------------------

    async def open(
        self, request: GenerationRequest, *, trace: TraceContext, idempotency_key: str | None = None
    ) -> Reading:
        """Open a session for `request`; with an idempotency key that was used before, read that one again."""
        check_model(request.model, self._settings.served_name)
        if idempotency_key is None:
            session = request.api.id_prefix + secrets.token_hex(16)
        else:
            session = request.api.id_prefix + hashlib.sha256(idempotency_key.encode()).hexdigest()[:32]
            if (known := await self._known(session, request)) is not None:
                return await self._resume(known, Position(session, 0), trace=trace)
        self._admit()
        prompt = await self._prompt(request)
        params = self._params(request, len(prompt))
        form = ResponseForm.of(request, session)
        generation = self._generation(
            form, prompt, params, trace=trace, resumable=request.stream or idempotency_key is not None
        )
        message = OpenSession(
            session=session,
            reply=self._uplink.reply,
            model=request.model,
            prompt=prompt,
            params=params,
            metadata=form.to_metadata(),
        )
        await self._place(generation, message, trace)
        generation.begin()
        return Reading(generation, form, Text(self._tokenizer.decoder()))

    async def _known(self, session: str, request: GenerationRequest) -> SessionState | None:
        state = await self._uplink.state(session)
        if state is None:
            return None
        if ResponseForm.from_metadata(session, state.metadata).fingerprint != request.fingerprint:
            raise InvalidRequest(
                "this Idempotency-Key was used with another request; send a new key, or the same body",
                param="Idempotency-Key",
            )
        return state

    async def resume(self, session: str, position: Position | None, *, trace: TraceContext) -> Reading:
        """Read a session on after `position`, or from its start. Its reader until now, wherever it is, loses it."""
        return await self._resume(await self._state(session), position or Position(session, 0), trace=trace)

    async def _resume(self, state: SessionState, position: Position, *, trace: TraceContext) -> Reading:
        form = ResponseForm.from_metadata(state.session, state.metadata)
        if (known := await self._finished(state, form, position)) is not None:
            return known
        self._admit()
        prompt = await self._uplink.prompt(state.session)
        generation = self._generation(form, prompt, state.params, trace=trace, resumable=True, earlier=state)
        message = OpenSession(session=state.session, reply=self._uplink.reply, resume=True)
        try:
            await self._place(generation, message, trace)
        except OutriderError:
            if (known := await self._finished(await self._state(state.session), form, position)) is None:
                raise
            return known
        try:
            state = await self._state(state.session)
            if (known := await self._finished(state, form, position)) is not None:
                generation.leave("finished", detach=True)
                return known
            tokens = await self._uplink.tokens(state.session)
            _check_position(position, tokens)
        except BaseException:
            generation.leave("not resumed", detach=True)
            raise
        generation.begin(committed=tokens, read=position.tokens, next_round=state.last_round + 1)
        return Reading(generation, form, Text(self._tokenizer.decoder(), tokens[: position.tokens]))

    async def _finished(self, state: SessionState, form: ResponseForm, position: Position) -> Reading | None:
        if not state.ended:
            return None
        tokens = await self._uplink.tokens(state.session)
        _check_position(position, tokens)
        replay = Replay(state, tokens, position.tokens)
        return Reading(replay, form, Text(self._tokenizer.decoder(), tokens[: position.tokens]))

    async def _place(self, generation: Generation, message: OpenSession, trace: TraceContext) -> None:
        """Have the session placed, for `generation` to drive. Whoever drove it in this process loses it now."""
        session = generation.session
        if (older := self._live.get(session)) is not None:
            older.fail(SessionTaken("the session was taken over by a newer connection"))
        self._admit()
        self._live[session] = generation
        self._uplink.subscribe(session, generation.receive)
        try:
            placed = await self._uplink.open(message, timeout_s=self._settings.open_timeout_s, trace=trace)
        except BaseException:
            generation.leave("not opened", detach=True)
            if not message.resume:  # it may yet be opened, in its first epoch, with nobody to drive it
                close = CloseSession(session=session, epoch=1, reason="not opened in time")
                self._spawn(self._uplink.close(close))
            raise
        generation.place(placed)

    def _generation(
        self,
        form: ResponseForm,
        prompt: Tokens,
        params: GenerationParams,
        *,
        trace: TraceContext,
        resumable: bool,
        earlier: SessionState | None = None,
    ) -> Generation:
        return Generation(
            form.session,
            prompt,
            self._edge_config(form, params),
            rules=self._rules(prompt, params),
            uplink=self._uplink,
            drafter=self._drafter,
            trace=trace,
            resumable=resumable,
            on_end=self._forget,
            earlier=earlier.stats if earlier is not None else None,
        )

    def _rules(self, prompt: Tokens, params: GenerationParams) -> Rules | None:
        """How a draft has to draw to draw as the target does; None where that is greedily."""
        stops = self._tokenizer.stop_tokens | frozenset(params.stop_token_ids)
        rules = Rules(params.sampling, len(prompt), tuple(sorted(stops)))
        return None if rules.plain else rules

    def _edge_config(self, form: ResponseForm, params: GenerationParams) -> EdgeConfig:
        settings, options = self._settings, form.options
        length = settings.block_length if options.block_length is None else options.block_length
        if options.draft == "none" or settings.draft == "none":
            length = 0

        def chosen(asked: bool | None, setting: bool) -> bool:
            return length > 0 and (setting if asked is None else asked)

        stops = frozenset() if params.ignore_eos else self._tokenizer.stop_tokens
        return EdgeConfig(
            gateway=self._uplink.reply.gateway,
            max_tokens=params.max_tokens,
            block_length=min(length, settings.max_block),
            adaptive=chosen(options.adaptive, settings.adaptive),
            stop_tokens=stops | frozenset(params.stop_token_ids),
            policy=params.policy,
            hints=chosen(options.hints, settings.hints),
            guesses=chosen(options.guesses, settings.guesses),
            forwards=chosen(options.forwards, settings.forwards),
            lane_threshold=settings.lane_threshold,
            max_lanes=settings.max_lanes,
            forwards_per_token=settings.forwards_per_token,
            foresight=self._foresight,
            round_timeout_ms=settings.round_timeout_s * 1000,
            stall_timeout_ms=settings.stall_timeout_s * 1000,
        )

    # --- what is asked for -------------------------------------------------------------------------

    async def _prompt(self, request: GenerationRequest) -> Tokens:
        if request.tokens is not None:
            prompt = request.tokens
        elif request.messages is not None:
            messages = [dict(message) for message in request.messages]
            size = sum(len(message["content"]) for message in messages)
            prompt = await _aside(size, lambda: self._tokenizer.encode_chat(messages))
        else:
            text = request.text or ""
            prompt = await _aside(len(text), lambda: self._tokenizer.encode(text))
        if not prompt:
            raise InvalidRequest("the prompt is empty; send at least one token", param=request.prompt_param)
        if (highest := max(prompt)) >= self._tokenizer.vocab_size:
            raise InvalidRequest(
                f"the prompt holds the token {highest}; the model's tokens are below {self._tokenizer.vocab_size}",
                param=request.prompt_param,
            )
        return prompt

    def _params(self, request: GenerationRequest, prompt_length: int) -> GenerationParams:
        block_length = request.options.block_length
        if block_length is not None and block_length > self._settings.max_block:
            raise InvalidRequest(
                f"outrider.block_length={block_length} is longer than {self._settings.max_block}, the longest "
                "block that is verified",
                param="outrider.block_length",
            )
        limit = self._settings.max_model_len
        room = limit - prompt_length
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_length} tokens; the context is {limit} tokens, of which at least one must "
                "be left for the answer",
                param=request.prompt_param,
            )
        if request.max_tokens is not None and request.max_tokens > room:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_length} tokens and {request.max_tokens} are asked for; the context is "
                f"{limit} tokens: ask for at most {room}, or shorten the prompt",
                param="max_tokens",
            )
        return GenerationParams(
            max_tokens=request.max_tokens or min(self._settings.default_max_tokens, room),
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            policy=Policy(request.options.policy or self._settings.policy),
            sampling=Sampling(seed=request.seed % (1 << 64)),
        )

    def _admit(self) -> None:
        """Refuse what there is no room for, or nothing to serve it with."""
        if self._stopping:
            raise Unavailable("this gateway is stopping; ask another", retry_after_s=RETRY_S)
        if troubles := self._uplink.troubles():
            raise Unavailable(f"not ready: {'; '.join(troubles)}", retry_after_s=RETRY_S)
        if len(self._live) >= self._settings.gateway_max_streams:
            raise Overloaded(
                f"{self._settings.gateway_max_streams} generations are in flight here, the most there may be",
                retry_after_s=RETRY_S,
            )

    # --- ending ------------------------------------------------------------------------------------

    async def cancel(self, session: str) -> None:
        """End a session for good, wherever it is driven. SessionNotFound when there is none that could be ended."""
        state = await self._state(session)
        if (live := self._live.get(session)) is not None:
            live.fail(SessionNotFound(f"the session {session} was cancelled"))
        if state.ended:
            return
        reason = "cancelled by the client"
        cancel = Cancel(session=session, epoch=state.epoch, reason=reason)
        await self._uplink.close(CloseSession(session=session, epoch=state.epoch, reason=reason))
        await self._uplink.send(cancel, partition=state.partition)

    async def stop(self) -> None:
        """Take no more sessions and end those in flight; streams may be resumed at another gateway."""
        self._stopping = True
        for generation in list(self._live.values()):
            generation.fail(
                Unavailable(
                    f"this gateway is stopping; go on at GET /v1/streams/{generation.session} with the last event's "
                    "id as Last-Event-ID",
                    retry_after_s=RETRY_S,
                )
            )
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)

    def _forget(self, generation: Generation) -> None:
        if self._live.get(generation.session) is generation:
            del self._live[generation.session]
        self._uplink.unsubscribe(generation.session, generation.receive)
        self._spawn(generation.settled())

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _state(self, session: str) -> SessionState:
        state = await self._uplink.state(session)
        if state is None:
            raise SessionNotFound(f"there is no session {session}, or it has expired")
        return state


def _check_position(position: Position, tokens: Tokens) -> None:
    if position.tokens > len(tokens):
        raise InvalidRequest(
            f"Last-Event-ID {position} is ahead of the session, which has {len(tokens)} tokens; send the id of an "
            "event that was received",
            param="Last-Event-ID",
        )


async def _aside(size: int, work: Callable[[], Tokens]) -> Tokens:
    """Tokenize; a long text does not hold up the rounds of other sessions."""
    return work() if size < LONG_TEXT else await asyncio.to_thread(work)
