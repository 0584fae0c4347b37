"""Driving one engine by hand, a step at a time: its sessions, what a step takes, and when the exits' hints arrive.

A step is what the engine's own loop does between two looks at its inbox: schedule, forward, sample, update. Handing in the
blocks comes before it and is timed apart. All clocks are the machine's monotonic one.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Final

import msgspec
import zmq

from loadtest.engine_modes import Engine, Kind
from loadtest.engine_profile import Stopwatch, device_figures, step_span, traced, watched_of
from loadtest.engine_report import Step
from services.verifier.engine.channel import HINTS_IN_FLIGHT, ChannelMessage, ExitMessage
from services.verifier.engine.options import EAGER_KEY, SESSION_KEY
from services.verifier.engine.types import BlockStatus
from shared.errors import EngineError

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs

HINTS_DEADLINE_S: Final = 0.5
"""How long the last step's hints are waited for."""
POLL_MS: Final = 50
SURE_LEVEL: Final = 60
"""What the draft of the benchmark says of each of its tokens; exits listen to it."""
MOST_PREFILLS: Final = 1000
Tokens = Sequence[int]


class Ear:
    """Hears the exits of all engines: a thread stamps what arrives, and leaves the reading for later."""

    def __init__(self, address: str) -> None:
        self._heard: list[tuple[float, bytes]] = []
        self._arrived = threading.Condition()
        self._ended = threading.Event()
        self._decoder: msgspec.msgpack.Decoder[ChannelMessage] = msgspec.msgpack.Decoder(ChannelMessage)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, HINTS_IN_FLIGHT)
        self._socket.bind(address)
        self._thread = threading.Thread(target=self._listen, name="ear", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ended.is_set():
            if not self._socket.poll(POLL_MS):
                continue
            frame = self._socket.recv()
            arrived = time.monotonic()
            with self._arrived:
                self._heard.append((arrived, frame))
                self._arrived.notify()

    def take(self, wait_s: float = 0.0) -> list[tuple[float, ExitMessage]]:
        """What arrived since the last time, and when; waits for something to arrive, but no longer than that."""
        with self._arrived:
            if wait_s > 0:
                self._arrived.wait_for(lambda: self._heard, wait_s)
            heard, self._heard = self._heard, []
        read = [(arrived, self._decoder.decode(frame)) for arrived, frame in heard]
        return [(arrived, message) for arrived, message in read if isinstance(message, ExitMessage)]

    def close(self) -> None:
        """Stop listening."""
        self._ended.set()
        self._thread.join()
        self._socket.close(linger=0)
        self._context.term()


@dataclass(slots=True)
class Session:
    """One session: what the target says, and what it has said in this engine so far."""

    key: str
    truth: Tokens
    out: list[int] = field(default_factory=list)


class Driver:
    """An engine and its sessions."""

    def __init__(self, engine: Engine, ear: Ear, *, k: int, vocabulary: int, exits: int) -> None:
        """`exits` is how many hints a step of sessions with blocks gives."""
        self.mode = engine.mode
        self.sessions: list[Session] = []
        self._client = engine.client
        self._worker = engine.worker
        self._ear = ear
        self._k = k
        self._vocabulary = vocabulary
        self._exits = exits
        self._by_key: dict[str, Session] = {}
        self._awaited: dict[tuple[str, int], tuple[Step, float]] = {}
        self._steps = 0

    # --- sessions -------------------------------------------------------------------------------------------------

    def open(self, name: str, prompts: Sequence[Tokens], truths: Sequence[Tokens], room: int) -> None:
        """Prefill sessions that may say `room` tokens; each has said at least one then."""
        self.sessions = [Session(f"{self.mode.name}.{name}.{n}", truth) for n, truth in enumerate(truths)]
        self._by_key = {session.key: session for session in self.sessions}
        self._steps = 0
        for session, prompt in zip(self.sessions, prompts, strict=True):
            self._client.add_request(self._request(session.key, prompt, room))
        for _ in range(MOST_PREFILLS):
            if all(session.out for session in self.sessions):
                return
            self._take(self._client.get_output())
        raise EngineError(
            f"{self.mode.name}: {len(self.sessions)} prompts are not prefilled in {MOST_PREFILLS} steps"
        )

    def _request(self, key: str, prompt: Tokens, room: int) -> Any:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=room,
            ignore_eos=True,
            detokenize=False,
            extra_args={SESSION_KEY: key, EAGER_KEY: True} if self.mode.own else None,
        )
        return EngineCoreRequest(
            request_id=key,
            prompt_token_ids=list(prompt),
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )

    def close(self) -> None:
        """End the sessions; nothing is under way afterwards."""
        core = self._client.engine_core
        self._client.abort_requests([session.key for session in self.sessions])
        while core.scheduler.has_requests() or core.batch_queue:
            self._client.get_output()
        self._by_key = {}

    def say(self, room: int) -> list[list[int]]:
        """What the sessions say when they go on by themselves, `room` tokens each."""
        while any(len(session.out) < room for session in self.sessions):
            self._take(self._client.get_output())
        return [session.out for session in self.sessions]

    def differences(self, first: int) -> list[tuple[int, int]]:
        """Of each stream that is not the target's own: its number, from `first`, and the first token that is another."""
        found = []
        for number, session in enumerate(self.sessions, first):
            pairs = enumerate(zip(session.out, session.truth, strict=False))
            place = next((n for n, (one, other) in pairs if one != other), None)
            if place is not None:
                found.append((number, place))
        return found

    # --- steps ----------------------------------------------------------------------------------------------------

    def turn(self, random: Random, *, turn: int, steps: int, target: float, room: int) -> list[Step]:
        """Some steps, one after the other: so many, or until sessions have said `target` tokens, on average."""
        done: list[Step] = []
        while len(done) < steps and self.said < target and self._have_room(room):
            done.append(self._step(random, turn))
        self._hear_out()
        return done

    def profiled(self, random: Random, *, steps: int) -> dict[str, Any]:
        """Where the time of so many steps goes, and of as many more on the device (`engine_profile`)."""
        watch, times = Stopwatch(), []
        with watch.watching(watched_of(self._client.engine_core, self._worker)):
            for _ in range(steps):
                times.append(self._step(random, 0).ms)
                watch.step_done()
        device: dict[str, Any] = {}
        if self._worker.model_runner.device.type == "cuda":
            with traced() as events:
                for _ in range(steps):
                    with step_span():
                        self._step(random, 0)
            device = device_figures(events)
        self._hear_out()
        return {
            "mode": self.mode.name,
            "sessions": len(self.sessions),
            "step_ms": round(statistics.median(times), 3),
            "host_ms": watch.medians(),
            "device": device,
        }

    @property
    def said(self) -> float:
        """Tokens that a session has said, on average."""
        return sum(len(session.out) for session in self.sessions) / len(self.sessions)

    def _have_room(self, room: int) -> bool:
        """A step can't end any session."""
        return max(len(session.out) for session in self.sessions) + self._k + 1 < room

    def _step(self, random: Random, turn: int) -> Step:
        handed_in = time.monotonic()
        if self.mode.own:
            self._hand_in(random)
        self._steps += 1
        bases = [(session.key, len(session.out)) for session in self.sessions] if self._exits else []
        began = time.monotonic()
        outputs = self._client.get_output()
        while not outputs.outputs:
            outputs = self._client.get_output()
        ended = time.monotonic()
        step = self._measured(turn, handed_in, began, ended)
        step.tokens = self._take(outputs)
        self._awaited |= dict.fromkeys(bases, (step, began))
        return step

    def _hand_in(self, random: Random) -> None:
        """A block for each session: of every other round's all tokens are right, of the others' one isn't."""
        right = self._steps % 2 == 0
        submit = self._client.engine_core.scheduler.submit_block
        for session in self.sessions:
            base = len(session.out)
            block = list(session.truth[base : base + self._k]) if self.mode.kind is Kind.VERIFY else []
            if block and not right:
                place = random.randrange(len(block))
                block[place] = (block[place] + 1) % self._vocabulary
            status = submit(session.key, base, block, [SURE_LEVEL] * len(block), [])
            if status is not BlockStatus.ARMED:
                raise EngineError(
                    f"{self.mode.name}: a block of {len(block)} after {base} tokens is {status}"
                )

    def _measured(self, turn: int, handed_in: float, began: float, ended: float) -> Step:
        step = Step(turn=turn, ms=(ended - began) * 1000, submit_ms=(began - handed_in) * 1000)
        if self.mode.asynchronous:  # what the worker has noted belongs to the next step
            return step
        marks, forward_s = self._worker.marks, self._worker.forward_s()
        clock = getattr(self._worker.model_runner, "step_clock", None)
        sampled = marks.sampled if clock is None else clock.sampled
        on_device = self._worker.model_runner.device.type != "cpu"
        launched = marks.forward_ended if on_device else marks.forward_began
        step.launched_ms = (launched - began) * 1000
        if on_device and marks.forward_began:
            step.launch_ms = (marks.forward_ended - marks.forward_began) * 1000
        if sampled:
            step.sampled_ms = (sampled - began) * 1000
        if forward_s is not None:
            step.forward_from_ms = (marks.forward_began - began) * 1000
            step.forward_ms = forward_s * 1000
        return step

    def _take(self, outputs: EngineCoreOutputs) -> int:
        taken = 0
        for output in outputs.outputs:
            session = self._by_key.get(output.request_id)
            if session is not None:
                session.out.extend(output.new_token_ids)
                taken += len(output.new_token_ids)
        return taken

    def _hear_out(self) -> None:
        """Book when the hints of the turn's steps arrived; the last step's may still be on their way."""
        deadline = time.monotonic() + HINTS_DEADLINE_S
        while self._awaited:
            for arrived, message in self._ear.take(HINTS_DEADLINE_S):
                for outlook in message.outlooks:
                    step, began = self._awaited.get((outlook.key, outlook.base), (None, 0.0))
                    if step is not None:
                        step.exits_ms[message.layer] = (message.sent_s - began) * 1000
                        step.heard_ms[message.layer] = (arrived - began) * 1000
            missing = any(len(step.exits_ms) < self._exits for step, _ in self._awaited.values())
            if not missing or time.monotonic() > deadline:
                self._awaited.clear()
