"""`VllmEngine`: the engine that the verifier uses, over vLLM's AsyncLLM and an engine process of its own.

It checks what comes in, keeps the books of open sessions, and turns vLLM's outputs and failures into ours. It does not
schedule (see `scheduler`) and does not commit anything.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from services.verifier.engine import launch
from services.verifier.engine.channel import ChannelMessage, ExitMessage, FailureMessage, Receiver
from services.verifier.engine.checkpoint import Checkpoint, read_checkpoint
from services.verifier.engine.exit_choice import ExitChoice, HeadChoice, choose_exits, choose_head
from services.verifier.engine.grammar import as_schema
from services.verifier.engine.opened import Opened, drafted_of
from services.verifier.engine.options import (
    AHEAD_KEY,
    EAGER_KEY,
    SCHEMA_KEY,
    SESSION_KEY,
    UNHEARD_KEY,
    EngineOptions,
    rules_as_argument,
)
from services.verifier.engine.types import (
    BlockStatus,
    EngineInfo,
    EngineOutput,
    EngineStats,
    ExitReport,
    OnExit,
)
from services.verifier.settings import VerifierSettings
from shared.errors import ContextLengthExceeded, EngineError, InvalidRequest, OutriderError, Overloaded
from shared.protocol import FinishReason, GenerationParams, Outcome, Policy, TokenLogprobs, Tokens
from shared.sampling.rules import Rules
from shared.sampling.sparse import SparseRow

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.sampling_params import SamplingParams

    from services.verifier.engine.client import EngineClient

T = TypeVar("T")
_log = logging.getLogger(__name__)

FAILURE_GRACE_S: Final = 0.5
"""How long a dead engine's last words are waited for."""
MOST_LOGPROBS: Final = 20
"""Likeliest tokens that may be asked for at each position (vLLM's own default)."""
_FINISH_REASONS: Final = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class _State(StrEnum):
    """An engine's life; the value completes "the engine …"."""

    NEW = "is not started"
    RUNNING = "is running"
    DIED = "has died; the verifier has to be started again"
    STOPPED = "has been stopped"


class VllmEngine:
    """A target model on vLLM that verifies blocks for many sessions (see `types.Engine`)."""

    def __init__(self, settings: VerifierSettings) -> None:
        self._settings = settings
        self._ahead = 0
        self._own_drafts = False
        self._open: dict[str, Opened] = {}
        self._by_key: dict[str, Opened] = {}
        self._numbers = count()
        self._calls: set[asyncio.Future[Any]] = set()
        self._state = _State.NEW
        self._unwatch: Callable[[], object] = lambda: None
        self._llm: EngineClient | None = None
        self._info: EngineInfo | None = None
        self._checkpoint: Checkpoint | None = None
        self._receiver: Receiver | None = None
        self._folder: Path | None = None
        self._on_exit: OnExit = lambda _: None
        self._failure: FailureMessage | None = None
        self._failed = asyncio.Event()

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self, on_exit: OnExit) -> EngineInfo:
        """See `Engine.start`. Takes about 15 s the first time in a process, of which most is importing."""
        if self._state is not _State.NEW:
            raise EngineError(f"the engine {self._state} and can't be started; make a new one")
        self._on_exit = on_exit
        checkpoint = self._checkpoint = read_checkpoint(self._settings.model)
        exits = choose_exits(self._settings, checkpoint)
        head = choose_head(self._settings, checkpoint, cuda=launch.on_cuda())
        self._ahead = launch.floor_ahead(self._settings, drafts=head.file is not None)
        self._own_drafts = head.file is not None and self._ahead > 0
        self._state = _State.RUNNING
        try:
            self._llm = await self._build(checkpoint, exits, head)
            self._watch(self._llm)
            self._info = await self._describe(self._llm, checkpoint, (*exits.notes, *head.notes))
        except Exception as error:
            reason = await self._reason(error)
            await self.stop()
            raise reason from error
        except asyncio.CancelledError:
            await self.stop()
            raise
        return self._info

    async def _build(self, checkpoint: Checkpoint, exits: ExitChoice, head: HeadChoice) -> EngineClient:
        """Start the engine process, in a thread; a cancelled start waits for it, so that it can be stopped."""
        self._folder = Path(tempfile.mkdtemp(prefix="outrider-engine-"))
        address = f"ipc://{self._folder / 'exits'}"
        self._receiver = Receiver(address, self._received)
        options = EngineOptions(
            exit_address=address,
            exit_layers=exits.layers,
            exit_modules=str(exits.file or ""),
            exit_outcomes=self._settings.exit_outcomes,
            threads=self._settings.engine_threads,
            draft_head=str(head.file or ""),
            compact=self._settings.reads_compact,
            own_drafts=self._own_drafts,
            early=launch.early_passes(self._settings),
            prompt_places=launch.prompt_places(self._settings),
        )
        with launch.engine_environment(self._settings.engine_threads):
            launch.warm_up()
            building = asyncio.ensure_future(
                asyncio.to_thread(launch.build, self._settings, checkpoint, options)
            )
            try:
                return await asyncio.shield(building)
            except asyncio.CancelledError:
                with suppress(Exception):
                    self._llm = await building
                raise

    async def _describe(self, llm: EngineClient, checkpoint: Checkpoint, chosen: Sequence[str]) -> EngineInfo:
        found: dict[str, Any] = await self._call(llm.describe())
        notes = [*chosen, *found["notes"]]
        max_model_len = int(llm.model_config.max_model_len)
        if max_model_len < self._settings.max_model_len:
            notes.append(
                f"the target's context is {max_model_len} tokens, less than OUTRIDER_MAX_MODEL_LEN="
                f"{self._settings.max_model_len}"
            )
        return EngineInfo(
            model_name=self._settings.served_name,
            num_layers=checkpoint.num_layers,
            vocab_size=checkpoint.vocab_size,
            max_model_len=max_model_len,
            max_block=self._settings.max_block,
            max_sessions=self._settings.max_sessions,
            kv_capacity_tokens=found["kv_capacity_tokens"],
            exit_layers=tuple(found["exit_layers"]),
            exits=found["exits"],
            dtype=found["dtype"],
            draft_head=found["draft_head"],
            compact=found["compact"],
            own_drafts=self._own_drafts,
            padded=found["padded"],
            notes=tuple(notes),
        )

    def _watch(self, llm: EngineClient) -> None:
        """Notice the engine process' end in the moment it happens."""
        loop = asyncio.get_running_loop()
        sentinel = llm.process.sentinel
        loop.add_reader(sentinel, self._died)
        self._unwatch = lambda: loop.remove_reader(sentinel)

    def _died(self) -> None:
        _log.error("the engine process has died%s", f": {self._failure.text}" if self._failure else "")
        self._end(_State.DIED)

    def _end(self, state: _State) -> None:
        """Nothing will be answered any more: fail what waits."""
        self._unwatch()
        self._unwatch = lambda: None
        self._state = state
        for call in tuple(self._calls):
            call.cancel()
        if self._llm is not None:
            self._llm.fail_streams()
        for opened in self._open.values():
            opened.wanted.set()

    async def stop(self) -> None:
        """See `Engine.stop`."""
        if self._state is not _State.DIED:
            self._end(_State.STOPPED)
        if self._llm is not None:
            llm, self._llm = self._llm, None
            await llm.stop()
        if self._receiver is not None:
            receiver, self._receiver = self._receiver, None
            await receiver.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def healthy(self) -> bool:
        """See `Engine.healthy`."""
        return self._info is not None and self._state is _State.RUNNING

    @property
    def process_id(self) -> int | None:
        """The engine process, for operators and tests; None when there is none."""
        return self._llm.process.pid if self._llm is not None else None

    # --- sessions -----------------------------------------------------------------------------------------------

    def open(
        self, session: str, prompt: Tokens, committed: Tokens, params: GenerationParams
    ) -> AsyncIterator[EngineOutput]:
        """See `Engine.open`. The session counts as open until its iterator ends or it is closed."""
        self._alive()
        sampling = self._sampling(prompt, committed, params)
        if session in self._open:
            raise EngineError(f"session {session} is open in the engine already")
        if len(self._open) >= self._settings.max_sessions:
            raise Overloaded(
                f"all {self._settings.max_sessions} sessions of this verifier (OUTRIDER_MAX_SESSIONS) are taken",
                retry_after_s=1.0,
            )
        eager = params.policy is Policy.LATENCY
        ahead = self._ahead if eager else 0
        key = f"{session}.{next(self._numbers)}"
        permitted = 0 if self._own_drafts else ahead
        opened = Opened(session, key, len(committed), ahead, permitted)
        sampling.extra_args = {
            **(sampling.extra_args or {}),
            SESSION_KEY: opened.key,
            EAGER_KEY: eager,
            UNHEARD_KEY: params.unheard,
            AHEAD_KEY: ahead,
        }
        self._open[session] = self._by_key[opened.key] = opened
        return self._session_stream(opened, (*prompt, *committed), sampling)

    async def _session_stream(
        self, opened: Opened, tokens: Tokens, sampling: SamplingParams
    ) -> AsyncIterator[EngineOutput]:
        try:
            async for output in self._generate(opened.key, tokens, sampling, opened):
                if opened.key not in self._by_key:
                    return
                yield output
        finally:
            self._forget(opened)
            await self._abort(opened.key)

    async def submit(
        self,
        session: str,
        base: int,
        tokens: Tokens,
        confidences: Sequence[int] = (),
        rows: Sequence[SparseRow] = (),
        *,
        alone: bool = False,
    ) -> BlockStatus:
        """See `Engine.submit`."""
        llm = self._alive()
        if len(tokens) > self._settings.max_block:
            raise InvalidRequest(
                f"a block of {len(tokens)} tokens is longer than {self._settings.max_block} (OUTRIDER_MAX_BLOCK)"
            )
        self._check_vocabulary(tokens, "the block")
        if rows and len(rows) != len(tokens):
            raise InvalidRequest(
                f"the block holds {len(tokens)} tokens, drawn from {len(rows)} distributions"
            )
        for row in rows:
            self._check_vocabulary(row.tokens, "the distribution of a drafted token")
        opened = self._open.get(session)
        if opened is None:
            return BlockStatus.GONE
        own_base = base - opened.offset
        if own_base < 0:
            return BlockStatus.STALE
        levels = list(confidences) if len(confidences) == len(tokens) else []
        drawn_from = [(list(row.tokens), list(row.counts)) for row in rows]
        if answered := opened.ask(tokens):
            own_base, tokens, levels, drawn_from = own_base + answered, (), [], []
        ahead = opened.ahead if alone or not self._own_drafts else 0
        if not tokens and opened.goes_on(own_base, ahead):
            return BlockStatus.QUEUED
        opened.taken, opened.permitted = own_base, ahead
        number = opened.submitted
        call = llm.submit_block(opened.key, own_base, list(tokens), levels, drawn_from, number, ahead)
        status = BlockStatus(await self._call(call))
        if status is BlockStatus.GONE and opened.ahead:
            # it has come to its end by itself: what it said is on its way, or there
            status = BlockStatus.STALE
        if status is BlockStatus.STALE:
            opened.ask_no_more(number)  # it went on by itself
        return status if not answered else BlockStatus.QUEUED

    async def close(self, session: str) -> None:
        """See `Engine.close`."""
        opened = self._open.get(session)
        if opened is not None:
            self._forget(opened)
            await self._abort(opened.key)

    async def alone(self, prompt: Tokens, params: GenerationParams) -> EngineOutput:
        """What the target says by itself, one token a step through vLLM's own loop: the yardstick of exactness."""
        self._alive()
        sampling = self._sampling(prompt, (), params)
        key = f"alone.{next(self._numbers)}"
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        finish_reason = None
        try:
            async for output in self._generate(key, prompt, sampling):
                tokens.extend(output.tokens)
                logprobs.extend(output.logprobs)
                finish_reason = output.finish_reason
        finally:
            await self._abort(key)
        return EngineOutput(tuple(tokens), finish_reason, tuple(logprobs))

    async def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        llm = self._alive()
        return EngineStats(**await self._call(llm.session_stats()))

    # --- the engine process -------------------------------------------------------------------------------------

    async def _generate(
        self, key: str, tokens: Tokens, sampling: SamplingParams, opened: Opened | None = None
    ) -> AsyncIterator[EngineOutput]:
        """A request's outputs until it finishes or is aborted (then without a finish reason); those of a session when
        they are asked for."""
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            queue = await self._alive().add_request(key, tokens_input(list(tokens)), sampling)
            self._alive()
            if opened is not None:
                opened.outputs = queue
            while True:
                found = await (opened.answer() if opened is not None else queue.get())
                completion = found.outputs[0]
                finish_reason = _FINISH_REASONS.get(completion.finish_reason)
                if completion.token_ids or finish_reason:
                    tokens_said = tuple(completion.token_ids)
                    yield EngineOutput(
                        tokens_said,
                        finish_reason,
                        _logprobs(tokens_said, completion.logprobs or (), sampling.logprobs),
                        opened.count_passes(found) if opened is not None else 1,
                        drafted_of(found),
                    )
                if completion.finish_reason == "error":
                    raise EngineError("the engine could not go on with this request; its log says why")
                if found.finished:
                    return
        except EngineDeadError as error:
            raise await self._reason(error) from error

    async def _call(self, call: Awaitable[T]) -> T:
        """Await a call that the engine process must answer; `EngineError` if it ends over it."""
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            return await task
        except EngineDeadError as error:
            raise await self._reason(error) from error
        except asyncio.CancelledError:
            if self._state is not _State.RUNNING and not _cancelling():
                raise await self._reason(None) from None
            task.cancel()
            raise
        finally:
            self._calls.discard(task)

    async def _abort(self, key: str) -> None:
        if self._llm is None or self._state is not _State.RUNNING:
            return
        from vllm.v1.engine.exceptions import EngineDeadError

        with suppress(EngineDeadError):
            await self._llm.abort(key)

    def _received(self, message: ChannelMessage) -> None:
        if isinstance(message, FailureMessage):
            self._failure = self._failure or message
            self._failed.set()
            return
        for report in self._reports(message):
            self._on_exit(report)

    def _reports(self, message: ExitMessage) -> list[ExitReport]:
        return [
            ExitReport(
                session=opened.session,
                base=opened.offset + outlook.base,
                layer=message.layer,
                outcomes=tuple(
                    Outcome(accepted=accepted, next_token=token, confidence=confidence)
                    for accepted, token, confidence in outlook.outcomes
                ),
                elapsed_ms=message.elapsed_ms,
                sent_s=message.sent_s,
            )
            for outlook in message.outlooks
            if (opened := self._by_key.get(outlook.key)) is not None
        ]

    async def _reason(self, error: Exception | None) -> Exception:
        """Our error for one of vLLM's, with the engine process' last words if there are any."""
        if isinstance(error, OutriderError):
            return error
        if self._state is not _State.STOPPED:
            with suppress(TimeoutError):
                async with asyncio.timeout(FAILURE_GRACE_S):
                    await self._failed.wait()
        if self._failure is not None:
            mend = _mend(self._failure.text)
            return EngineError(f"the engine has failed: {self._failure.kind}: {self._failure.text}{mend}")
        if self._state is not _State.RUNNING or error is None:
            return EngineError(f"the engine {self._state}")
        return EngineError(f"the engine has failed: {type(error).__name__}: {error}")

    def _alive(self) -> EngineClient:
        if self._llm is None or self._state is not _State.RUNNING:
            raise EngineError(f"the engine {self._state}")
        return self._llm

    def _forget(self, opened: Opened) -> None:
        opened.wanted.set()
        if self._open.get(opened.session) is opened:
            del self._open[opened.session]
        self._by_key.pop(opened.key, None)

    # --- what comes in ------------------------------------------------------------------------------------------

    def _sampling(self, prompt: Tokens, committed: Tokens, params: GenerationParams) -> SamplingParams:
        """Parameters for what is left to generate, or the reason why nothing is. To vLLM they are greedy ones; how tokens
        are really drawn is for our worker to know (see `draws`)."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        assert self._checkpoint is not None and self._info is not None
        if not prompt:
            raise InvalidRequest("the prompt is empty; it needs at least one token")
        self._check_vocabulary(prompt, "the prompt")
        self._check_vocabulary(committed, "the committed tokens")
        self._check_vocabulary(tuple(token for token, _ in params.sampling.logit_bias), "logit_bias")
        if (params.logprobs or 0) > MOST_LOGPROBS:
            raise InvalidRequest(
                f"logprobs of {params.logprobs} tokens are asked for; at most {MOST_LOGPROBS} are told"
            )
        all_stops = set(params.stop_token_ids) | set(self._checkpoint.stop_ids)
        stop_ids = set(params.stop_token_ids) if params.ignore_eos else all_stops
        rules = Rules(params.sampling, len(prompt), tuple(sorted(all_stops)))
        extra = rules_as_argument(rules)
        if params.json_schema:
            extra[SCHEMA_KEY] = (as_schema(params.json_schema), len(committed))
        if committed and committed[-1] in stop_ids:
            raise InvalidRequest("the session has finished: its last committed token ends the generation")
        if len(committed) >= params.max_tokens:
            raise InvalidRequest(
                f"the session has finished: {len(committed)} tokens are committed, max_tokens is {params.max_tokens}"
            )
        used, most = len(prompt) + len(committed), self._info.max_model_len
        if used >= most:
            raise ContextLengthExceeded(
                f"the prompt and the answer so far are {used} tokens; the context of {most} leaves room for at most "
                f"{most - 1} and one to come"
            )
        return SamplingParams(
            temperature=0.0,
            max_tokens=params.max_tokens - len(committed),
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            logprobs=params.logprobs,
            extra_args=extra or None,
        )

    def _check_vocabulary(self, tokens: Tokens, what: str) -> None:
        assert self._checkpoint is not None
        size = self._checkpoint.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < size:
            wrong = next(token for token in tokens if not 0 <= token < size)
            raise InvalidRequest(f"{what} holds token {wrong}; the target's vocabulary is 0 to {size - 1}")


def _logprobs(
    tokens: Tokens, found: Sequence[Mapping[int, Logprob]], count: int | None
) -> tuple[TokenLogprobs, ...]:
    """vLLM's log-probabilities of `tokens`, with the `count` likeliest; nothing when they were not asked for."""
    if count is None:
        return ()
    return tuple(
        TokenLogprobs(
            logprob=told[token].logprob,
            rank=told[token].rank or 0,
            top=tuple(
                (other, each.logprob)
                for other, each in sorted(told.items(), key=lambda item: item[1].rank or 0)[:count]
            ),
        )
        for token, told in zip(tokens, found, strict=True)
    )


def _mend(failure: str) -> str:
    """What an operator can do about a failure of vLLM's that speaks of vLLM's own options."""
    if "KV cache" in failure or "kv cache" in failure:
        return " (raise OUTRIDER_KV_CACHE_MB or lower OUTRIDER_MAX_MODEL_LEN)"
    return ""


def _cancelling() -> bool:
    """Whether the current task itself was asked to stop."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
