"""Where a session goes: to the verifier whose KV cache knows most of its prompt, unless that one is much busier.

Policy only, and pure: the fleet says who is there, the caller hands in the time and acts on the answer.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from services.kv_session.fleet import Fleet
from shared.errors import ContextLengthExceeded, ModelNotFound, OutriderError, Overloaded, Unavailable
from shared.protocol import Heartbeat, Tokens
from shared.store import pack

PREFIX_ENTRIES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Place:
    """A verifier, the partition that leads to it, the model it serves, and prompt tokens it has seen before."""

    verifier: str
    partition: int
    model: str
    shared_tokens: int = 0


class PrefixIndex:
    """Which verifiers have seen which prompt prefixes, in whole blocks of `block` tokens.

    A block's key hashes the key before it and the block's tokens, so a key stands for the whole prefix. At most
    `entries` keys are kept; the least recently used go first.
    """

    def __init__(self, *, block: int, entries: int = PREFIX_ENTRIES) -> None:
        self._block = block
        self._entries = entries
        self._seen_by: OrderedDict[bytes, Set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen_by)

    def add(self, model: str, prompt: Tokens, verifier: str) -> None:
        """The verifier is going to see this prompt."""
        for key in self._chain(model, prompt):
            self._seen_by[key] = {*self._seen_by.get(key, ()), verifier}
            self._seen_by.move_to_end(key)
        while len(self._seen_by) > self._entries:
            self._seen_by.popitem(last=False)

    def shared(self, model: str, prompt: Tokens) -> dict[str, int]:
        """By verifier, the tokens at the prompt's start that it has seen; those with none are left out."""
        lengths: dict[str, int] = {}
        going: Set[str] | None = None
        for number, key in enumerate(self._chain(model, prompt), 1):
            seen_by = self._seen_by.get(key, frozenset())
            going = seen_by if going is None else going & seen_by
            if not going:
                break
            self._seen_by.move_to_end(key)
            lengths.update(dict.fromkeys(going, number * self._block))
        return lengths

    def _chain(self, model: str, prompt: Tokens) -> Iterator[bytes]:
        key = model.encode()
        for start in range(0, len(prompt) - self._block + 1, self._block):
            key = blake2b(key + pack(prompt[start : start + self._block]), digest_size=16).digest()
            yield key


class Placer:
    """Chooses verifiers.

    Of those with room that have at most `affinity_slack` sessions more than the least loaded, the one wins that
    shares the longest prefix; of several such, the least loaded, then the one with the emptier KV cache, then the first
    by name. Within a verifier, sessions spread over its partitions.
    """

    def __init__(self, fleet: Fleet, *, prefix_block: int, affinity_slack: int, retry_after_s: float) -> None:
        self._fleet = fleet
        self._prefixes = PrefixIndex(block=prefix_block)
        self._affinity_slack = affinity_slack
        self._retry_after_s = retry_after_s

    def place(
        self,
        session: str,
        *,
        model: str,
        prompt: Tokens,
        now_s: float,
        prefer: str = "",
        need_room: bool = True,
    ) -> Place:
        """Where the session goes, counted as placed there from now on.

        `prefer` counts as sharing all of the prompt. An empty `model` means whichever is served. Raises
        `ModelNotFound`, `ContextLengthExceeded`, `Unavailable` (nobody is ready) or `Overloaded` (nobody has room).
        """
        able = self._able(model, len(prompt), now_s)
        free = [heartbeat for heartbeat in able if self._has_room(heartbeat)] if need_room else able
        if not free:
            raise Overloaded(
                f"every verifier is full ({sum(one.max_sessions for one in able)} sessions in all)",
                retry_after_s=self._retry_after_s,
            )
        chosen, shared_tokens = self._choose(free, prompt, prefer)
        self._fleet.placed(chosen.verifier, now_s)
        self._prefixes.add(chosen.model, prompt, chosen.verifier)
        return Place(chosen.verifier, partition_for(session, chosen), chosen.model, shared_tokens)

    def _able(self, model: str, length: int, now_s: float) -> list[Heartbeat]:
        """The ready verifiers that serve `model` and prompts of `length`, or the error that says why there are none."""
        serving = [one for one in self._fleet.ready(now_s) if model in ("", one.model)]
        if not serving:
            raise self._nobody(model, now_s)
        able = [one for one in serving if length < _longest(one)]
        if not able:
            longest = max(map(_longest, serving)) - 1
            raise ContextLengthExceeded(
                f"the prompt has {length} tokens; at most {longest} fit, with one for the answer",
                param="prompt",
            )
        return able

    def _nobody(self, model: str, now_s: float) -> OutriderError:
        known = {sighting.heartbeat.model for sighting in self._fleet.known()}
        if known and model and model not in known:
            return ModelNotFound(
                f"model {model!r} is not served; served are: {', '.join(sorted(known))}", param="model"
            )
        drained = [one.verifier for one in self._fleet.alive(now_s) if one.verifier in self._fleet.drained]
        why = f" ({', '.join(drained)} drained)" if drained else ""
        return Unavailable(f"no verifier is ready{why}", retry_after_s=self._retry_after_s)

    def _has_room(self, heartbeat: Heartbeat) -> bool:
        return self._fleet.load(heartbeat.verifier) < heartbeat.max_sessions

    def _choose(self, free: Sequence[Heartbeat], prompt: Tokens, prefer: str) -> tuple[Heartbeat, int]:
        loads = {one.verifier: self._fleet.load(one.verifier) for one in free}
        bound = min(loads.values()) + self._affinity_slack
        shared = {one.verifier: self._prefixes.shared(one.model, prompt).get(one.verifier, 0) for one in free}
        near = [one for one in free if loads[one.verifier] <= bound]

        def merit(one: Heartbeat) -> tuple[bool, int, int, float, str]:
            name = one.verifier
            return (name != prefer, -shared[name], loads[name], one.kv_usage, name)

        best = min(near, key=merit)
        return best, shared[best.verifier]


def partition_for(session: str, heartbeat: Heartbeat) -> int:
    """The partition of the verifier that a session uses: the same whenever it is asked."""
    return heartbeat.partitions[zlib.crc32(session.encode()) % len(heartbeat.partitions)]


def _longest(heartbeat: Heartbeat) -> int:
    """The longest prompt plus answer, tokens: the model's limit, or the KV cache's if that is smaller."""
    if heartbeat.kv_capacity_tokens:
        return min(heartbeat.max_model_len, heartbeat.kv_capacity_tokens)
    return heartbeat.max_model_len
