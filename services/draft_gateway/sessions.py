"""The gateway's sessions: admits, opens, resumes, cancels and stops them; one reader each.

Between a checked request and a running generation: tokens, limits, the session's id and its placement. What a
session is made of is in `generation.py`, what its reader sees in `streams.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from services.draft_gateway.answer_text import AnswerText, Ending, TextDecoder
from services.draft_gateway.drafting import Drafter
from services.draft_gateway.generation import Generation, Replay, TokenStream, logged
from services.draft_gateway.openai_api import (
    SEED_LIMIT,
    GenerationRequest,
    OutriderOptions,
    ResponseForm,
    check_model,
)
from services.draft_gateway.settings import GatewaySettings
from services.draft_gateway.streams import Position, Reading, Text
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
from shared.protocol import (
    Cancel,
    CloseSession,
    FinishReason,
    GenerationParams,
    OpenSession,
    Policy,
    Sampling,
    SamplingMode,
    TokenLogprobs,
    Tokens,
)
from shared.sampling.rules import GREEDY_BELOW, Rules
from shared.session import SessionState
from shared.speculation.edge import EdgeConfig
from shared.speculation.outcomes import Foresight
from shared.speculation.pace import Common
from shared.telemetry import TraceContext

logger = logging.getLogger(__name__)

RETRY_S: Final = 1.0
STOP_S: Final = 5.0
DRAWN_SEED_BITS: Final = 53
"""Of a seed that is drawn here, so that clients whose numbers are all floats read it as it is."""
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

    def decode_prompt(self, tokens: Sequence[int]) -> str:
        """The text of a prompt."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for."""
        ...

    def decoder(self) -> TextDecoder:
        """A new incremental decoder."""
        ...


class NotReplayable(OutriderError):
    """The answer can't be generated again (HTTP 409)."""

    code = "not_replayable"
    status = 409
    kind = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class Replaying:
    """A session, the tokens of its answer, and the stream that generates them again."""

    state: SessionState
    tokens: Tokens
    again: Reading


def _chosen(asked: bool | None, setting: bool) -> bool:
    """What a request asks for, else what the settings say."""
    return setting if asked is None else asked


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
        self._common = Common()
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
    ) -> list[Reading]:
        """Open a session for each choice of `request`; with an idempotency key that was used before, read those again."""
        check_model(request.model, self._settings.served_name)
        if request.n > self._settings.gateway_max_streams:
            raise InvalidRequest(
                f"n={request.n} is above {self._settings.gateway_max_streams}, the generations that this gateway may "
                "have in flight",
                param="n",
            )
        if idempotency_key is None:
            response = request.api.id_prefix + secrets.token_hex(16)
        else:
            response = request.api.id_prefix + hashlib.sha256(idempotency_key.encode()).hexdigest()[:32]
        forms = [ResponseForm.of(request, response, index) for index in range(request.n)]
        known = await self._known(forms) if idempotency_key is not None else {}
        if len(known) < len(forms):
            self._admit(len(forms) - len(known))
        prompt = await self._prompt(request)
        params = self._params(request, prompt, _seed_of(known.values()))
        resumable = request.stream or idempotency_key is not None
        readings: list[Reading] = []
        try:
            for form in forms:
                if (state := known.get(form.session)) is not None:
                    readings.append(await self._resume(state, Position(form.session, 0), trace=trace))
                    continue
                sampling = params.sampling.model_copy(update={"choice": form.index})
                own = params.model_copy(update={"sampling": sampling})
                readings.append(await self._start(form, prompt, own, trace=trace, resumable=resumable))
        except BaseException:
            for reading in readings:
                reading.stream.leave("another choice could not be opened", detach=idempotency_key is not None)
            raise
        return readings

    async def _start(
        self,
        form: ResponseForm,
        prompt: Tokens,
        params: GenerationParams,
        *,
        trace: TraceContext,
        resumable: bool,
    ) -> Reading:
        generation = self._generation(form, prompt, params, trace=trace, resumable=resumable)
        message = OpenSession(
            session=form.session,
            reply=self._uplink.reply,
            model=form.model,
            prompt=prompt,
            params=params,
            metadata=form.to_metadata(),
        )
        await self._place(generation, message, trace)
        generation.begin()
        return self._reading(generation, form, params, prompt)

    async def _known(self, forms: Sequence[ResponseForm]) -> dict[str, SessionState]:
        known = {}
        for form in forms:
            state = await self._uplink.state(form.session)
            if state is None:
                continue
            if ResponseForm.from_metadata(form.session, state.metadata).fingerprint != form.fingerprint:
                raise InvalidRequest(
                    "this Idempotency-Key was used with another request; send a new key, or the same body",
                    param="Idempotency-Key",
                )
            known[form.session] = state
        return known

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
            logprobs = await self._logprobs(state, len(tokens))
        except BaseException:
            generation.leave("not resumed", detach=True)
            raise
        generation.begin(
            committed=tokens, read=position.tokens, next_round=state.last_round + 1, logprobs=logprobs
        )
        return self._reading(generation, form, state.params, prompt, tokens[: position.tokens])

    async def replay(self, session: str, *, trace: TraceContext) -> Replaying:
        """Generate a session's answer again, in a session of its own, from its prompt, parameters and seed.

        As far as it goes, if it is not complete. NotReplayable when it is not a function of these, or has no token.
        """
        state = await self._state(session)
        form = ResponseForm.from_metadata(session, state.metadata)
        params = state.params
        if params.sampling.mode is SamplingMode.RATIO:
            raise NotReplayable(
                f"the session {session} was sampled in ratio mode: its answer depends on what was drafted and on the "
                "length of every block, and comes out otherwise each time; ask for sampling 'keyed' to be able to replay"
            )
        tokens = await self._uplink.tokens(session)
        tokens = tokens[: self._answer_text(form, params).ends_within(tokens, state.finish_reason)]
        if not tokens:
            raise NotReplayable(f"the session {session} has no token yet; there is nothing to compare")
        self._admit()
        prompt = await self._uplink.prompt(session)
        sampling = params.sampling
        least = min(sampling.min_tokens, len(tokens))
        again = params.model_copy(
            update={
                "max_tokens": len(tokens),
                "logprobs": None,
                "sampling": sampling.model_copy(update={"min_tokens": least}),
            }
        )
        own = form.api.id_prefix + secrets.token_hex(16)
        copy = replace(form, session=own, response=own, fingerprint="", echo=False)
        return Replaying(state, tokens, await self._start(copy, prompt, again, trace=trace, resumable=False))

    async def _finished(self, state: SessionState, form: ResponseForm, position: Position) -> Reading | None:
        """The whole of a session that generates nothing more, or nothing that would belong to its answer."""
        if not state.ended and not state.params.stop:
            return None
        tokens = await self._uplink.tokens(state.session)
        answer = self._answer_text(form, state.params)
        count = answer.ends_within(tokens, state.finish_reason)
        if not state.ended:
            if count is None:
                return None
            self._spawn(self._end(state, "a stop string"))  # whoever drove it has gone before it could say so
        reason = state.finish_reason if count is None else FinishReason.STOP
        tokens = tokens[:count]
        _check_position(position, tokens)
        logprobs = await self._logprobs(state, len(tokens))
        replay = Replay(state, tokens, position.tokens, reason, answer.stop, logprobs)
        prompt = await self._uplink.prompt(state.session) if form.echo else ()
        read = tokens[: position.tokens]
        ended = reason if read == tokens and count is None else None
        return self._reading(replay, form, state.params, prompt, read, ended)

    def _reading(
        self,
        stream: TokenStream,
        form: ResponseForm,
        params: GenerationParams,
        prompt: Tokens,
        read: Tokens = (),
        ended: FinishReason | None = None,
    ) -> Reading:
        """`read` are the tokens whose text the reader has; at the end of the sequence `ended` says how."""
        natural = frozenset() if params.ignore_eos else self._tokenizer.stop_tokens
        text = Text(
            self._answer_text(form, params),
            read,
            ended,
            token_bytes=self._tokenizer.token_bytes if params.logprobs is not None else None,
            stop_token_ids=frozenset(params.stop_token_ids) - natural,
        )
        return Reading(
            stream, form, text, params, echo=self._tokenizer.decode_prompt(prompt) if form.echo else ""
        )

    def _answer_text(self, form: ResponseForm, params: GenerationParams) -> AnswerText:
        return AnswerText(self._tokenizer.decoder(), Ending.of(params, included=form.include_stop))

    async def _logprobs(self, state: SessionState, count: int) -> tuple[TokenLogprobs, ...]:
        """Those of the first `count` committed tokens, if they were asked for."""
        if state.params.logprobs is None:
            return ()
        return (await self._uplink.logprobs(state.session))[:count]

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
            text=self._answer_text(form, params) if params.stop else None,
            logprobs=params.logprobs is not None,
        )

    def _rules(self, prompt: Tokens, params: GenerationParams) -> Rules | None:
        """How a draft has to draw to draw as the target does; None where that is greedily."""
        stops = self._tokenizer.stop_tokens | frozenset(params.stop_token_ids)
        rules = Rules(params.sampling, len(prompt), tuple(sorted(stops)))
        return None if rules.plain else rules

    def _block_length(self, options: OutriderOptions) -> int:
        """The longest block of an answer; 0 where nothing is drafted."""
        settings = self._settings
        length = settings.block_length if options.block_length is None else options.block_length
        drafts = options.draft != "none" and settings.draft != "none"
        return min(length, settings.max_block) if drafts else 0

    def _hints_wanted(self, options: OutriderOptions) -> bool:
        """Whether exits are to speak: a pass without them takes less. Where nobody has asked for them, what they were worth
        to sessions that start lanes from guesses as well decides."""
        settings = self._settings
        if not _chosen(options.hints, settings.hints) or self._block_length(options) == 0:
            return False
        on_trial = _chosen(options.guesses, settings.guesses) and _chosen(options.adaptive, settings.adaptive)
        return options.hints is not None or not on_trial or self._common.exits.wanted()

    def _edge_config(self, form: ResponseForm, params: GenerationParams) -> EdgeConfig:
        settings, options = self._settings, form.options
        length = self._block_length(options)

        def chosen(asked: bool | None, setting: bool) -> bool:
            return length > 0 and _chosen(asked, setting)

        stops = frozenset() if params.ignore_eos else self._tokenizer.stop_tokens
        round_trip = self._uplink.round_trip
        return EdgeConfig(
            gateway=self._uplink.reply.gateway,
            round_trip_ms=round_trip.smoothed_ms if round_trip is not None else None,
            max_tokens=params.max_tokens,
            block_length=length,
            adaptive=chosen(options.adaptive, settings.adaptive),
            stop_tokens=stops | frozenset(params.stop_token_ids),
            policy=params.policy,
            hints=not params.unheard,
            guesses=chosen(options.guesses, settings.guesses),
            forwards=chosen(options.forwards, settings.forwards),
            lane_threshold=settings.lane_threshold,
            max_lanes=settings.max_lanes,
            forwards_per_token=settings.forwards_per_token,
            foresight=self._foresight,
            common=self._common,
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

    def _params(self, request: GenerationRequest, prompt: Tokens, seed: int | None) -> GenerationParams:
        """What to generate by. `seed` is that of an earlier attempt, which goes before drawing one."""
        prompt_length = len(prompt)
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
        max_tokens = request.max_tokens or min(self._settings.default_max_tokens, room)
        if request.sampling.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens={request.sampling.min_tokens} is above the {max_tokens} tokens that the answer may have",
                param="min_tokens",
            )
        self._check_tokens(request.stop_token_ids, "stop_token_ids")
        self._check_tokens([token for token, _ in request.sampling.logit_bias], "logit_bias")
        return GenerationParams(
            max_tokens=max_tokens,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            policy=Policy(request.options.policy or self._settings.policy),
            sampling=self._sampling(request, seed),
            stop=request.stop,
            logprobs=request.logprobs,
            json_schema=request.json_schema,
            unheard=not self._hints_wanted(request.options),
        )

    def _sampling(self, request: GenerationRequest, seed: int | None) -> Sampling:
        """How tokens are chosen. At temperature 0 nothing is drawn, and nothing needs truncation."""
        temperature = request.temperature
        if temperature is None:
            temperature = self._settings.default_temperature
        if request.seed is not None:
            seed = request.seed % (2 * SEED_LIMIT)
        elif seed is None:
            seed = secrets.randbits(DRAWN_SEED_BITS)
        chosen: dict[str, object] = {"temperature": temperature, "seed": seed}
        if temperature < GREEDY_BELOW:
            chosen |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "mode": SamplingMode.KEYED}
            if request.n > 1:
                raise InvalidRequest(
                    f"n={request.n} at temperature {temperature:g}: the choices would all be the same; send a "
                    "temperature above 0, or n=1",
                    param="n",
                )
        return request.sampling.model_copy(update=chosen)

    def _check_tokens(self, tokens: Sequence[int], param: str) -> None:
        highest = max(tokens, default=0)
        if highest >= self._tokenizer.vocab_size:
            raise InvalidRequest(
                f"{param} holds the token {highest}; the model's tokens are below {self._tokenizer.vocab_size}",
                param=param,
            )

    def _admit(self, count: int = 1) -> None:
        """Refuse `count` more generations for which there is no room, or nothing to serve them with."""
        if self._stopping:
            raise Unavailable("this gateway is stopping; ask another", retry_after_s=RETRY_S)
        if troubles := self._uplink.troubles():
            raise Unavailable(f"not ready: {'; '.join(troubles)}", retry_after_s=RETRY_S)
        if len(self._live) + count > self._settings.gateway_max_streams:
            raise Overloaded(
                f"{len(self._live)} of {self._settings.gateway_max_streams} generations, the most there may be, are in "
                f"flight here, and {count} more are asked for",
                retry_after_s=RETRY_S,
            )

    # --- ending ------------------------------------------------------------------------------------

    async def cancel(self, session: str) -> None:
        """End a session for good, wherever it is driven. SessionNotFound when there is none that could be ended."""
        state = await self._state(session)
        if (live := self._live.get(session)) is not None:
            live.fail(SessionNotFound(f"the session {session} was cancelled"))
        if not state.ended:
            await self._end(state, "cancelled by the client")

    async def _end(self, state: SessionState, reason: str) -> None:
        cancel = Cancel(session=state.session, epoch=state.epoch, reason=reason)
        await self._uplink.close(CloseSession(session=state.session, epoch=state.epoch, reason=reason))
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


def _seed_of(states: Iterable[SessionState]) -> int | None:
    """The seed that the choices of a response share, if any of them is known."""
    return next((state.params.sampling.seed for state in states), None)


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
