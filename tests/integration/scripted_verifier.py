"""A verifier for the gateway's tests: real Kafka, real Redis, and in the place of a model a text that it recites.

It claims, verifies, hints, commits and answers as the real one does, so that a gateway can't tell; what it says after a
prompt is known beforehand, so that a test can. A test may make it slow, silent or faulty.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import Self

from shared.bus import Bus
from shared.errors import OutriderError
from shared.protocol import (
    Block,
    Cancel,
    DraftsMessage,
    Fault,
    FinishReason,
    Forward,
    Heartbeat,
    Hint,
    Outcome,
    Prompt,
    Sampling,
    Stale,
    TokenLogprobs,
    Tokens,
    Topic,
    Verdict,
)
from shared.settings import CommonSettings
from shared.store import Claim, CommitConflict, StaleClaim, Store

HEARTBEAT_S = 0.2
LAYER = 7

Reciter = Callable[[Tokens, int], Tokens]


def drawn(prompt: Tokens, sampling: Sampling) -> Tokens:
    """The prompt whose continuation is said by such sampling."""
    return (*prompt, sampling.seed % 256, sampling.choice) if sampling.temperature > 0 else prompt


def likelihoods(base: int, tokens: Tokens, count: int | None) -> tuple[TokenLogprobs, ...]:
    """What the scripted target says of the log-probabilities of `tokens`, the first of them at position `base`."""
    if count is None:
        return ()
    return tuple(
        TokenLogprobs(
            logprob=-position / 8,
            rank=1,
            top=tuple(((token + number) % 256, -position / 8 - number) for number in range(count)),
        )
        for position, token in enumerate(tokens, base)
    )


class ScriptedVerifier:
    """Answers every block from `recite(prompt, length)`, the target's greedy continuation of a prompt.

    At a temperature above 0 it is the one of another prompt, which depends on seed and choice (`drawn`).
    `stop_tokens` end a generation. `pass_s` is how long a pass takes; a hint (the true outcome) goes out at half of it.
    `fault` and `drop_verdict` decide over each message; `hold` makes it wait before it answers.
    """

    def __init__(
        self,
        settings: CommonSettings,
        recite: Reciter,
        *,
        model: str,
        stop_tokens: frozenset[int],
        name: str = "scripted",
        pass_s: float = 0.01,
    ) -> None:
        self._settings = settings
        self.recite = recite
        self._model = model
        self._stop_tokens = stop_tokens
        self._name = name
        self.incarnation = f"{name}.{secrets.token_hex(4)}"
        self.pass_s = pass_s
        self.ready = True
        self.fault: Callable[[Prompt | Block], Fault | None] = lambda message: None
        self.drop_verdict: Callable[[Verdict], bool] = lambda verdict: False
        self.hold = asyncio.Event()
        self.hold.set()
        self.blocks: list[Prompt | Block] = []
        self.cancelled: list[Cancel] = []
        self._claims: dict[str, Claim] = {}
        self._bus = Bus(settings, client=self.incarnation)
        self._store = Store(settings)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._store.start()
        await self._bus.start()
        await self._bus.ensure_topics()
        self._reader = self._bus.reader(Topic.DRAFTS)
        await self._reader.start()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reader.stop()
        await self._bus.stop()
        await self._store.stop()

    async def _beat(self) -> None:
        while True:
            await self._bus.send(
                Heartbeat(
                    verifier=self._name,
                    incarnation=self.incarnation,
                    model=self._model,
                    ready=self.ready,
                    partitions=tuple(range(self._bus.partitions(Topic.DRAFTS))),
                    sessions=len(self._claims),
                    max_sessions=64,
                    kv_usage=0.0,
                    kv_capacity_tokens=100_000,
                    max_model_len=4096,
                )
            )
            await asyncio.sleep(HEARTBEAT_S)

    async def _read(self) -> None:
        async for received in self._reader:
            self._tasks.append(asyncio.create_task(self._handle(received.message)))

    async def _handle(self, message: DraftsMessage) -> None:
        if isinstance(message, Cancel):
            self.cancelled.append(message)
            self._claims.pop(message.session, None)
            return
        if isinstance(message, Forward):
            return
        self.blocks.append(message)
        await self.hold.wait()
        if (fault := self.fault(message)) is not None:
            await self._bus.send(fault, partition=message.reply.partition)
            return
        try:
            claim = await self._claim(message)
        except StaleClaim as stale:
            state = stale.state
            tokens = await self._store.tokens(message.session, message.base)
            await self._answer_stale(message, state.epoch, state.base, tokens, state.reply.gateway)
            return
        except OutriderError as error:
            await self._bus.send(
                Fault(
                    session=message.session,
                    epoch=message.epoch,
                    round=message.round,
                    code=error.code,
                    message=error.message,
                ),
                partition=message.reply.partition,
            )
            return
        await self._verify(message, claim)

    async def _claim(self, message: Prompt | Block) -> Claim:
        known = self._claims.get(message.session)
        if known is not None and known.state.epoch >= message.epoch:
            return known
        claim = await self._store.claim(message.session, epoch=message.epoch, owner=self.incarnation)
        self._claims[message.session] = claim
        return claim

    async def _verify(self, message: Prompt | Block, claim: Claim) -> None:
        epoch, params = claim.state.epoch, claim.state.params
        drafted = message.tokens if isinstance(message, Block) else ()
        truth = self.recite(drawn(claim.prompt, params.sampling), params.max_tokens)
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == truth[message.base + accepted]:
            accepted += 1
        tokens = truth[message.base : message.base + accepted + 1]
        reason = None
        stops = self._stop_tokens if not params.ignore_eos else frozenset()
        for number, token in enumerate(tokens):
            if token in stops or token in params.stop_token_ids:
                tokens, reason = tokens[: number + 1], FinishReason.STOP
                break
        if reason is None and message.base + len(tokens) >= params.max_tokens:
            tokens, reason = tokens[: params.max_tokens - message.base], FinishReason.LENGTH
        told = likelihoods(message.base, tokens, params.logprobs)
        await asyncio.sleep(self.pass_s / 2)
        if isinstance(message, Block) and accepted < len(tokens):
            self._bus.post(
                Hint(
                    session=message.session,
                    epoch=epoch,
                    round=message.round,
                    base=message.base,
                    layer=LAYER,
                    outcomes=(Outcome(accepted=accepted, next_token=tokens[accepted], confidence=0.9),),
                ),
                partition=message.reply.partition,
            )
        await asyncio.sleep(self.pass_s / 2)
        try:
            await self._store.commit(
                message.session,
                epoch=epoch,
                round=message.round,
                base=message.base,
                tokens=tokens,
                finish_reason=reason,
                drafted=len(drafted),
                accepted=accepted,
                logprobs=told,
            )
        except CommitConflict as conflict:
            await self._answer_stale(
                message,
                conflict.epoch,
                conflict.base,
                conflict.tokens,
                conflict.gateway,
                conflict.finish_reason,
            )
            return
        verdict = Verdict(
            session=message.session,
            epoch=epoch,
            round=message.round,
            base=message.base,
            accepted=min(accepted, len(tokens)),
            tokens=tokens,
            finish_reason=reason,
            logprobs=told,
        )
        if not self.drop_verdict(verdict):
            await self._bus.send(verdict, partition=message.reply.partition)

    async def _answer_stale(
        self,
        message: Prompt | Block,
        epoch: int,
        base: int,
        tokens: Tokens,
        gateway: str,
        finish_reason: FinishReason | None = None,
    ) -> None:
        await self._bus.send(
            Stale(
                session=message.session,
                epoch=epoch,
                round=message.round,
                base=base,
                since=message.base,
                tokens=tokens,
                gateway=gateway,
                finish_reason=finish_reason,
            ),
            partition=message.reply.partition,
        )
