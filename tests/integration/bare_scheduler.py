"""Our scheduler over vLLM's, without a model: a target of the test's says what a hash of session and place says."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from services.verifier.engine import launch
from services.verifier.engine.checkpoint import read_checkpoint
from services.verifier.engine.options import (
    AHEAD_KEY,
    DRAFT_LENGTHS,
    EAGER_KEY,
    FOLLOWED,
    LAUNCHED,
    SESSION_KEY,
    UNHEARD_KEY,
    EngineOptions,
)
from services.verifier.engine.scheduler import SessionScheduler
from tests.integration.engine_bench import settings_for
from tests.integration.tiny_target import TinyTarget

BLOCK = 16
"""Tokens of a KV block."""
WORDS = range(3, 60)
Made = Callable[..., SessionScheduler]


def truth(key: str, place: int) -> int:
    """What the target says as a session's output token number `place`."""
    return WORDS[zlib.crc32(f"{key}.{place}".encode()) % len(WORDS)]


@contextmanager
def bare_schedulers(tiny_target: TinyTarget) -> Iterator[Made]:
    """What makes them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    init_none_hash(sha256)
    settings, checkpoint = settings_for(tiny_target), read_checkpoint(str(tiny_target.directory))
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)

    def make(*, kv_blocks: int = 400, **more: Any) -> SessionScheduler:
        options = EngineOptions("ipc://nobody", (), "", 1, 1, **more)
        arguments = launch.arguments(settings, checkpoint, options, cuda=False)
        config = AsyncEngineArgs(**arguments).create_engine_config()
        config.cache_config.num_gpu_blocks = kv_blocks
        kv = KVCacheConfig(kv_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        return SessionScheduler(config, kv, StructuredOutputManager(config), BLOCK)

    with launch.engine_environment(1):
        launch.register_models()
        yield make


class Client:
    """One scheduler, and what its sessions have said and whether they have ended."""

    def __init__(self, scheduler: SessionScheduler) -> None:
        self.scheduler = scheduler
        self.said: dict[str, list[int]] = {}
        self.ended: dict[str, Any] = {}
        self._launched: list[str] = []

    def open(self, key: str, prompt: list[int], *, plain: bool = False, **params: Any) -> None:
        from vllm.sampling_params import SamplingParams

        eager, unheard = params.pop("eager", True), params.pop("unheard", False)
        marks = {SESSION_KEY: key, EAGER_KEY: eager, UNHEARD_KEY: unheard, AHEAD_KEY: params.pop("ahead", 0)}
        self.add(key, prompt, SamplingParams(temperature=0.0, extra_args=None if plain else marks, **params))

    def add(self, key: str, prompt: list[int], sampling: Any) -> None:
        """Open a request with vLLM's own parameters."""
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(Request(key, list(prompt), sampling, None, block_hasher=hasher))
        self.said[key] = []

    def close(self, *keys: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(keys, RequestStatus.FINISHED_ABORTED)
        self.ended |= dict.fromkeys(keys, "closed")

    def block(self, key: str, tokens: list[int], *, base: int | None = None, rows: bool = False) -> Any:
        drawn = [([token, 1], [7, 1]) for token in tokens] if rows else []
        known = len(self.said[key]) if base is None else base
        return self.scheduler.submit_block(key, known, list(tokens), [40] * len(tokens), drawn)

    def begin(self) -> Any:
        work = self.scheduler.schedule()
        self.scheduler.get_grammar_bitmask(work)  # vLLM's loop asks for it when the pass is launched
        keys = list(work.num_scheduled_tokens)
        if (places := getattr(work, LAUNCHED, None)) is not None:
            assert keys == [self._launched[place] for place in places]
            assert work.total_num_scheduled_tokens == len(keys)
        self._launched = [keys[place] for place in getattr(work, FOLLOWED, ())]
        return work

    def answer(self, work: Any) -> Any:
        """What the target makes of a step; padding it never accepts."""
        from vllm.v1.outputs import ModelRunnerOutput

        keys, lengths = list(work.num_scheduled_tokens), getattr(work, DRAFT_LENGTHS)
        return ModelRunnerOutput(
            keys,
            {key: row for row, key in enumerate(keys)},
            [
                self._verdict(key, work.scheduled_spec_decode_tokens.get(key, [])[: lengths.get(key)])
                for key in keys
            ],
        )

    def _verdict(self, key: str, block: list[int]) -> list[int]:
        if self.scheduler.requests[key].is_prefill_chunk:
            return []
        found: list[int] = []
        for token in block:
            if token != truth(key, len(self.said[key]) + len(found)):
                break
            found.append(token)
        return [*found, truth(key, len(self.said[key]) + len(found))]

    def end(self, work: Any, answer: Any) -> list[Any]:
        found = self.scheduler.update_from_output(work, answer)
        outputs = [output for each in found.values() for output in each.outputs]
        for output in outputs:
            self.said[output.request_id] += output.new_token_ids
            if output.finished:
                self.ended[output.request_id] = output.finish_reason
        return outputs

    def step(self) -> Any:
        """A whole one; its work."""
        work = self.begin()
        self.end(work, self.answer(work))
        return work
