"""The scheduler: a session is one long request that parks between blocks and keeps its KV.

A parked session stays in vLLM's `running` queue, with `next_decode_eligible_step` put off for ever: it is never
scheduled, keeps its KV blocks and stays preemptible. A client's block becomes the request's `spec_token_ids`; the next
step then computes exactly 1 + K tokens for it, vLLM's rejection sampler judges them and rolls the rest back.

    open ──▶ prefill ──one token──▶ parked ◀─────────────── outcome ──────────────┐
                                    │    ▲ block: arm                             │
                                    │    └──────────▶ armed ──next step──▶ verifying
                    preempted       ▼                   │ preempted
                                 resting ──block──▶ resuming (prefill up to the last token, then the block in one pass)

Every block that is not stale is answered by exactly one output, whatever happens on the way. What vLLM would do
otherwise, and why it is overridden:

- it would compute a preempted session again at once, and have it say a token that nobody asked for: a preempted
  session *rests* outside the queues until its next block, unless it owes an answer or may go on;
- it never preempts for a request that waits, so sessions that park would lock others out: when a waiting request
  finds no room, parked sessions give way, the one longest parked first;
- it would pad a one-token prefill with placeholder drafts (`num_spec_tokens` is 0 here for that);
- it would keep stepping while every session is parked: those do not count as unfinished.

A session may also *go on* by itself, by one token a step or with drafts of its own (`OwnDrafts`), while its verifier
commits and tells what it has said: a few tokens ahead of that, and only while no block is there. Its outputs say which
of the blocks that were submitted they answer (`ANSWERED`), since some were asked for by nobody.

It does not decide what a block's outcome is, and it knows nothing of epochs or commits.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.core.sched.scheduler import Scheduler

from services.verifier.engine.companions import Companions
from services.verifier.engine.grammar import Grammars
from services.verifier.engine.options import (
    DRAFT_LENGTHS,
    DRAFT_LEVELS,
    DRAFT_ROWS,
    EVEN_ROWS,
    GATHERED,
    HEAD_DRAFTS,
    REHEARSED_S,
    EngineOptions,
    ahead_of,
    is_eager,
    is_greedy,
    is_unheard,
    schema_of,
    session_key,
)
from services.verifier.engine.own_drafts import OwnDrafts
from services.verifier.engine.sessions import (
    PADDING,
    Block,
    Counters,
    Session,
    Step,
    drawn_from,
    is_bare,
    only_on,
    stops_of,
)
from services.verifier.engine.steady_schedule import SteadySchedule
from services.verifier.engine.step_costs import StepCosts
from services.verifier.engine.types import UNHEARD, BlockStatus
from shared.sampling.sparse import SparseRow
from shared.speculation.pace import Mean

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

NEVER: Final = 1 << 62
STEP_MS_WEIGHT: Final = 0.1
MOST_GATHERED_S: Final = 0.015
LULLS: Final = 4
AGREED: Final = 0.7
"""Share of drafted tokens that is taken to be accepted before any were."""
GATHERED_SHARE: Final = 0.15
"""How long a step waits for the next session to share it: this share of a step, and no longer than that."""


class SessionScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, with sessions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_spec_tokens = 0
        self.max_block: int = self.vllm_config.num_speculative_tokens
        options = EngineOptions.of(self.vllm_config)
        self.uniform = options.uniform
        self.early = options.uniform and options.early
        self.prompt_places = options.prompt_places if options.uniform else 0
        self._own_drafts = OwnDrafts() if options.own_drafts else None
        self.counters = Counters()
        self._costs = StepCosts()
        self._by_key: dict[str, Session] = {}
        self._by_request: dict[str, Session] = {}
        self._starved = False
        self._step = Step()
        self._grammars = Grammars(self.structured_output_manager)
        self._awaited: set[str] = set()  # eager sessions that spoke in the last step and have no block yet
        self._heard_s = 0.0
        self.ended_s = 0.0
        """When the last step did."""
        self._companions = Companions()
        self._rehearsed_s = 0.0
        self._patient = 0  # sessions that are not eager
        self._agreed = Mean()  # share of drafted tokens that were accepted
        self._going_on: set[str] = set()  # parked sessions that say another token in the next step
        self.departures = 0
        """How often a request has ended or was preempted."""
        self._steady = SteadySchedule(self)

    # --- blocks -------------------------------------------------------------------------------------------------

    def submit_block(
        self,
        key: str,
        base: int,
        tokens: list[int],
        levels: list[int],
        rows: list[tuple[list[int], list[int]]],
        number: int = 0,
        ahead: int | None = None,
    ) -> BlockStatus:
        """Take a block that continues the session's first `base` output tokens.

        A newer block takes the place of one that has not been looked at yet. Without tokens it asks a session that goes on
        by itself to do so, wherever it has come to. `ahead` is how far it may do so from now on unasked; None: as before.
        """
        session = self._by_key.get(key)
        if session is None:
            return BlockStatus.GONE
        session.taken = max(session.taken, base)
        if ahead is not None:
            session.permitted = ahead
        block = Block(base, tokens, levels, rows, number)
        bare = session.ahead and not tokens
        if session.parked_at is None and not session.resting:
            session.pending = session.pending if bare else block
            return BlockStatus.QUEUED
        if bare:
            block = block._replace(base=session.request.num_output_tokens)
        trimmed = self._trim(session, block)
        if trimmed is None:
            self.counters.stale_blocks += 1
            if session.ahead and session.resting:  # what it says next is the answer
                self._compute_anew(session, only_on(session))
            elif session.ahead:
                self._going_on.add(session.key)
            return BlockStatus.STALE
        if session.resting:
            self._compute_anew(session, block)
            return BlockStatus.QUEUED
        if bare and self._own_drafts is not None and session.permitted:
            self._going_on.add(session.key)
        else:
            self._arm(session, block, trimmed)
        return BlockStatus.ARMED

    def _compute_anew(self, session: Session, block: Block) -> None:
        """Have a session without KV wait for its turn, behind the others that wait, and verify a block then."""
        session.pending, session.resting = block, False
        self._enqueue_waiting_request(session.request)

    def _trim(self, session: Session, block: Block) -> list[int] | None:
        """What of a block is still to be verified: all of it but what was generated since. None when it is stale."""
        base, tokens = block.base, block.tokens
        request = session.request
        since = request.output_token_ids[base:] if base <= request.num_output_tokens else None
        if since is None or len(tokens) < len(since) or tokens[: len(since)] != list(since):
            return None
        return tokens[len(since) :][: self.max_block]

    def _arm_pending(self, session: Session, block: Block) -> bool:
        """Make the next step verify a block; False when it is stale, and the session is left as it was."""
        trimmed = self._trim(session, block)
        if trimmed is None:
            self.counters.stale_blocks += 1
            return False
        self._arm(session, block, trimmed)
        return True

    def _arm(self, session: Session, block: Block, trimmed: list[int]) -> None:
        """Make the next step verify what is left of a block."""
        drafts = trimmed
        if drafts and session.request.use_structured_output:
            drafts = self._grammars.allowed(session.request, trimmed)
            kept = session.request.num_output_tokens - block.base + len(drafts)
            refused = len(drafts) < len(
                trimmed
            )  # in ratio mode it is rejected by the rule: its row has to be known
            rows = block.rows[: kept + refused]
            block = block._replace(tokens=block.tokens[:kept], levels=block.levels[:kept], rows=rows)
        session.drafts = len(drafts)
        session.request.spec_token_ids = drafts
        session.request.next_decode_eligible_step = 0
        session.parked_at = None
        session.armed, session.armed_s = block, time.monotonic()
        self._steady.armed(session)
        self._going_on.discard(session.key)
        self._companions.returned(session.key, session.armed_s)
        if session.key in self._awaited:
            self._awaited.discard(session.key)
            self._heard_s = session.armed_s

    def _even_out(self) -> None:
        """Make all blocks of the step as long as each other, where batches are uniform: a batch of n sessions is then a
        whole CUDA graph. Where there is no draft at all, and nobody waits for what exits say, that of one row a session.
        A request with a grammar stays as it is, for a grammar knows no padding."""
        armed = [session for session in self._by_request.values() if session.armed is not None]
        longest = 0 if is_bare(armed) else self.max_block
        for session in armed:
            request = session.request
            if not request.use_structured_output:
                drafts = request.spec_token_ids[: session.drafts]
                request.spec_token_ids = drafts + [PADDING] * (longest - len(drafts))

    def _let_go_on(self, session: Session) -> None:
        """Have a parked session say another token in the next step, if no block comes and it isn't too far ahead."""
        if session.goes_on:
            self._going_on.add(session.key)

    def _go_on(self, session: Session, sharers: int) -> None:
        """Have a parked session, one of `sharers` that do so, say more in the step that begins, with drafts of its own
        where it has any."""
        request, drafts = session.request, list[int]()
        if self._own_drafts is not None:
            room = max(0, min(self.max_block, self.max_model_len - request.num_tokens - 1))
            drafts = self._own_drafts.draft(session, self.counters, sharers)[:room]
        levels = [UNHEARD] * len(drafts)
        self._arm(session, Block(request.num_output_tokens, drafts, levels, []), drafts)

    def _hold_back(self) -> None:
        """Keep blocks for a later step where so few have one that they are not worth their padding.

        Where batches are uniform one block makes the step of all n sessions as long as K more rows for each of them take.
        The tokens that all get in that time are more than the drafts' that are expected to be accepted, unless there are
        enough of these. Until then every session says another token, by which its block is trimmed.
        """
        armed = [session for session in self._by_request.values() if session.armed is not None]
        drafts = sum(session.drafts for session in armed)
        if not drafts or not all(session.ahead for session in armed):
            return
        counters = self.counters
        plain_ms = counters.fixed_ms + counters.row_ms * len(armed)
        padding_ms = counters.row_ms * self.max_block * len(armed)
        if self._agreed(AGREED) * drafts * plain_ms >= padding_ms * len(armed):
            return
        for session in armed:
            if session.drafts:
                session.pending = session.pending or session.armed
                self._arm(session, only_on(session), [])

    def _park(self, session: Session) -> None:
        session.request.next_decode_eligible_step = NEVER
        session.parked_at = self.current_step
        if session.pending is not None:
            pending, session.pending = session.pending, None
            if not self._arm_pending(session, pending):
                session.answered = max(session.answered, pending.number)
        if session.armed is not None:
            return
        if session.ahead:
            self._let_go_on(session)
        if not session.eager:
            self._companions.spoke(session.key, time.monotonic())
        elif not session.permitted or session.verified:  # what follows a token of its own is not worth a wait
            self._awaited.add(session.key)

    def gather_s(self) -> float:
        """For how long the next step may still wait, so that sessions that have just spoken share it; 0 when none is
        awaited.

        Their blocks are a few ms behind their outputs, and behind each other where many spoke: as long as they keep coming
        the others are waited for. A step without them would make each run in every other step, alternating with those
        that were quicker: half the speed, for all of them.
        """
        now = time.monotonic()
        most_s = min(MOST_GATHERED_S, GATHERED_SHARE * self.counters.step_ms / 1000)
        eager_s = self._heard_s + most_s - now if self._awaited else 0.0
        return max(0.0, eager_s, self._patient_s(now))

    def rehearsal(self) -> SchedulerOutput | None:
        """While patient sessions' step waits for more of them: that step as it would be now; None when it isn't time for it.

        What is computed once in a tenth of a second finds the processor's caches full of other things, and takes two or
        three times as long as it would right after; and for that time the device waits. So a step is gone through now and
        then while nobody waits for it.
        """
        now = time.monotonic()
        if now < self._rehearsed_s + REHEARSED_S or self._patient_s(now) <= 0.0:
            return None
        self._rehearsed_s = now
        return self._steady.rehearsal()

    def _patient_s(self, now: float) -> float:
        """For how long patient sessions' step waits for more of them (`Companions`); it holds up nobody else. Where a prompt
        finds no room it does not wait: who is parked then makes some, and if all were awaited nobody would be."""
        if not self._patient or self._starved:
            return 0.0
        sessions = self._by_request.values()
        patient = [session for session in sessions if not session.eager]
        if any(request.is_prefill_chunk for request in self.running):
            return 0.0
        if len(patient) < len(sessions) and any(each.eager and each.armed is not None for each in sessions):
            return 0.0
        opened = self._patient_prompts()
        if opened is None:
            return 0.0
        if opened and not self._companions.under_way:
            return _lull_s(opened, now)
        ready = [*opened, *(session.armed_s for session in patient if session.armed is not None)]
        return self._companions.wait_s(now, ready_since=ready)

    def _patient_prompts(self) -> list[float] | None:
        """Since when the prompts wait that are to be computed; None if one of them is nobody's who waits."""
        opened = []
        for request in self.waiting:
            session = self._by_request.get(request.request_id)
            if session is None or session.eager:
                return None
            opened.append(session.opened_s)
        return opened

    # --- a step -------------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step's work: blocks first, then prefills. Parked sessions come last, and so are preempted first."""
        self._awaited.clear()
        self._step = Step(began=time.monotonic())
        going_on = () if self._starved else tuple(self._going_on)  # parked ones make room
        for key in going_on:
            self._go_on(self._by_key[key], len(going_on))
        if self.uniform:
            self._hold_back()
        if not throttle_prefills and (steady := self._steady.begin()) is not None:
            self._starved = False
            return steady
        self._steady.long_way()
        if self._starved and self.waiting:
            self._make_room()
        self.running.sort(key=self._rank)
        if self.uniform:
            self._even_out()
        preemptions = self.counters.preemptions
        output = super().schedule(throttle_prefills)
        self._starved = (
            bool(self.waiting)
            and self.counters.preemptions == preemptions
            and output.total_num_scheduled_tokens < self.max_num_scheduled_tokens
        )
        return output

    def _rank(self, request: Request) -> tuple[int, int]:
        session = self._by_request.get(request.request_id)
        if session is not None and session.parked_at is not None:
            return (2, -session.parked_at)
        return (1 if request.is_prefill_chunk else 0, 0)

    def _make_room(self) -> None:
        """Preempt parked sessions, the longest parked first, until the first waiting request should fit."""
        parked = sorted(
            (session for session in self._by_request.values() if session.parked_at is not None),
            key=lambda session: session.parked_at or 0,
        )
        blocks = self.kv_cache_manager.block_pool
        for session in parked:
            self.running.remove(session.request)
            self._preempt_request(session.request, self._step.began)
            needed = -(-(self.waiting.peek_request().num_tokens + 1 + self.max_block) // self.block_size)
            if len(self.running) < self.max_num_active_reqs and blocks.get_num_free_blocks() > needed:
                return

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        verified = scheduler_output.scheduled_spec_decode_tokens
        lengths: dict[str, int] = {}
        levels: dict[str, list[int]] = {}
        rows: dict[str, list[SparseRow]] = {}
        sizes: set[int] = set()
        known: set[int] = set()
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            session, block = self._by_request.get(request_id), verified.get(request_id, ())
            drafts = len(block) if session is None else min(len(block), session.drafts)
            if block:
                lengths[request_id] = drafts
            if session is not None and session.armed is not None:
                if drafts:
                    levels[request_id] = session.armed.levels[-drafts:]
                if session.armed.rows:
                    rows[request_id] = drawn_from(session, session.armed, drafts)
            sizes.add(scheduled)
            known.add(scheduled - len(block))
            self._count(self.requests[request_id], session, scheduled - len(block) + drafts, drafts)
        # a session that is computed anew may have as many rows as the others' blocks
        even = self.uniform and len(sizes) == 1 and known == {1}
        even = even and len(self._step.verified) == len(scheduler_output.num_scheduled_tokens)
        gathered = self._steady.beside_prompts(scheduler_output)
        if gathered is not None:
            self.counters.prompt_steps += 1
            setattr(scheduler_output, GATHERED, gathered)
        setattr(scheduler_output, DRAFT_LENGTHS, lengths if self.uniform else {})
        setattr(scheduler_output, DRAFT_LEVELS, levels)
        setattr(scheduler_output, DRAFT_ROWS, rows)
        rows_each = sizes.pop() if even else 0
        setattr(scheduler_output, EVEN_ROWS, rows_each if gathered is None else 1 + self.max_block)
        self.counters.steps += bool(scheduler_output.num_scheduled_tokens)
        self._step.prefills = len(self._step.verified) < len(scheduler_output.num_scheduled_tokens)
        self.counters.prefix_cache_hit_tokens += _cached_tokens(scheduler_output)
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            session = self._by_request.get(request_id)
            if session is not None and session.request.is_prefill_chunk:
                self._prepare_resumed(session)

    def _count(self, request: Request, session: Session | None, scheduled: int, drafts: int) -> None:
        """Book a request's share of the step as first prefill, recomputation, block or plain decoding."""
        counters = self.counters
        counters.scheduled_tokens += scheduled
        if session is None:
            counters.plain_tokens += scheduled
            return
        start, end = request.num_computed_tokens, request.num_computed_tokens + scheduled - drafts
        if request.num_output_tokens and end == request.num_tokens:
            counters.blocks += 1
            counters.block_tokens += drafts
            self._step.verified[request.request_id] = drafts
            session.verified, session.armed = session.armed.number if session.armed else 0, None
            end -= 1
        known = request.num_tokens if request.num_output_tokens else session.reached
        recomputed = max(0, min(end, known) - start)
        counters.recomputed_tokens += recomputed
        counters.prefill_tokens += end - start - recomputed
        session.reached = max(session.reached, end)

    def _prepare_resumed(self, session: Session) -> None:
        """Arm a resumed session whose prefill has come up to its last token, for the next step."""
        request = session.request
        if not request.num_output_tokens or request.num_computed_tokens < request.num_tokens - 1:
            return
        pending, session.pending = session.pending, None
        if pending is None or not self._arm_pending(session, pending):
            request.next_decode_eligible_step = NEVER
            session.parked_at = self.current_step
            if pending is not None and session.ahead:  # what it says next is the answer
                session.answered = max(session.answered, pending.number)
                self._going_on.add(session.key)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """Take the step's results in; sessions that have spoken park."""
        counters, step = self.counters, self._step
        accepted = counters.accepted_tokens
        if (drafts := getattr(model_runner_output, HEAD_DRAFTS, None)) is not None:
            for request_id in scheduler_output.num_scheduled_tokens:
                if (session := self._by_request.get(request_id)) is not None:
                    session.drafted = drafts.get(request_id)
        outputs = self._steady.end(scheduler_output, model_runner_output)
        if outputs is None:
            outputs = self._take_in(scheduler_output, model_runner_output)
        if self._own_drafts is not None:
            for output in (output for several in outputs.values() for output in several.outputs):
                if (session := self._by_request.get(output.request_id)) is not None and session.ahead:
                    self._own_drafts.heard(session, output.new_token_ids)
        if verified := sum(step.verified.values()):
            self._agreed.saw((counters.accepted_tokens - accepted) / verified)
        self._heard_s = self.ended_s = time.monotonic()
        if scheduler_output.num_scheduled_tokens:
            elapsed_ms = (self._heard_s - step.began) * 1000
            counters.busy_ms += elapsed_ms
            weight = STEP_MS_WEIGHT if counters.step_ms else 1.0
            counters.step_ms += weight * (elapsed_ms - counters.step_ms)
            if not step.prefills:
                self._costs.saw(scheduler_output.total_num_scheduled_tokens, elapsed_ms)
                counters.fixed_ms, counters.row_ms = self._costs.line()
        return outputs

    def _take_in(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        counters, step = self.counters, self._step
        spoken = []
        for request_id in scheduler_output.num_scheduled_tokens:
            session = self._by_request.get(request_id)
            if session is None or session.request.is_prefill_chunk:
                continue
            spoken.append(session)
            if step.verified.get(request_id):
                row = model_runner_output.req_id_to_index[request_id]
                counters.accepted_tokens += max(0, len(model_runner_output.sampled_token_ids[row]) - 1)
        outputs: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)
        for session in spoken:
            session.spoke()
            self._steady.moved(session)
            if self._by_key.get(session.key) is session:
                self._park(session)
            session.verified = 0
        if told := {each.request.request_id: each.told for each in spoken}:
            for output in (output for several in outputs.values() for output in several.outputs):
                output.kv_transfer_params = told.get(output.request_id, output.kv_transfer_params)
        return outputs

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """As vLLM's, which asks for it when the pass is launched: time for what needn't be known before."""
        self._steady.meanwhile()
        return super().get_grammar_bitmask(scheduler_output)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Nothing drafts but the clients: what a step's drafter says must not overwrite a block."""

    # --- room ---------------------------------------------------------------------------------------------------

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        self.departures += 1
        request.update_block_hashes()
        session = self._by_request.get(request.request_id)
        if session is None:
            super()._preempt_request(request, timestamp, drop_stale_output)
            return
        self.counters.preemptions += 1
        self._steady.moved(session)
        if session.armed is not None:
            session.pending = session.pending or session.armed
            session.armed = None
        goes_on = session.goes_on or session.key in self._going_on
        self._going_on.discard(session.key)
        session.parked_at = None
        request.next_decode_eligible_step = 0
        super()._preempt_request(request, timestamp, drop_stale_output)
        if session.pending is None and request.num_output_tokens:
            self.waiting.remove_request(request)
            session.resting = True
            if goes_on:
                self._compute_anew(session, only_on(session))

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End the prefill of a resumed session before its last token, which belongs to the block's own pass."""
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.request_id not in self._by_request or not request.num_output_tokens:
            return tokens
        missing = request.num_tokens - num_computed_tokens
        return missing - 1 if missing > 1 and tokens >= missing else tokens

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """The cached prefix; for a resumed session cut so that something is left to prefill before the last token."""
        blocks, cached, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        session = self._by_request.get(request.request_id)
        if session is not None and request.num_output_tokens and cached and cached >= request.num_tokens - 1:
            cached = (cached - 1) // self.block_size * self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, cached)
        return blocks, cached, boundary, diverged

    def get_num_unfinished_requests(self) -> int:
        """Requests with something to compute; none is left when all sessions park, and the engine sleeps."""
        return int(super().get_num_unfinished_requests()) - self._parked

    # --- life ---------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Take a request in; one that is marked as a session becomes one."""
        extra = request.sampling_params.extra_args if request.sampling_params else None
        if (asked := schema_of(extra)) is not None:
            schema, committed = asked
            said = request.prompt_token_ids[request.num_prompt_tokens - committed :]
            self._grammars.begin(request, schema, said)
        if (key := session_key(extra)) is not None:
            session = Session(
                key=key,
                request=request,
                eager=is_eager(extra),
                unheard=is_unheard(extra),
                ahead=(ahead := ahead_of(extra)),
                permitted=ahead if self._own_drafts is None else 0,
                opened_s=time.monotonic(),
                plain=not (request.use_structured_output or request.has_encoder_inputs or request.resumable),
                greedy=is_greedy(request.sampling_params),
                stops=stops_of(request),
            )
            self._steady.entered(session)
            self._by_key[key] = self._by_request[request.request_id] = session
            self._patient += not session.eager
        super().add_request(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self.departures += 1
        session = self._by_request.pop(request.request_id, None)
        if session is not None:
            self._steady.left(session)
            self._patient -= not session.eager
            self._by_key.pop(session.key, None)
            if self._own_drafts is not None:
                self._own_drafts.forget(session)
            self._awaited.discard(session.key)
            self._going_on.discard(session.key)
            self._companions.left(session.key)
        return super()._free_request(request, delay_free_blocks)

    # --- what others ask ----------------------------------------------------------------------------------------

    @property
    def _parked(self) -> int:
        """Sessions with nothing to compute."""
        parked = sum(session.parked_at is not None for session in self._by_request.values())
        return parked - len(self._going_on)

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache holds; one block is vLLM's own."""
        return int((self.cache_config.num_gpu_blocks - 1) * self.block_size)

    @property
    def padded(self) -> int:
        """Rows that every block takes in a pass, however short it is; 0: those that it has."""
        return 1 + self.max_block if self.uniform else 0

    def session_stats(self) -> dict[str, int | float]:
        """The fields of `EngineStats` that the scheduler knows."""
        parked = self._parked
        counters = {name: getattr(self.counters, name) for name in Counters.__dataclass_fields__}
        return {
            **counters,
            "parked": parked,
            "running": len(self.running) - parked,
            "waiting": len(self.waiting),
            "kv_usage": float(self.get_kv_cache_usage()),
        }


def _lull_s(opened: list[float], now: float) -> float:
    """For how long a step of nothing but prompts waits for more of them: until none has come for a while, and a few times
    that in all. Prompts of a crowd come one after the other."""
    return max(0.0, min(max(opened) + MOST_GATHERED_S, min(opened) + LULLS * MOST_GATHERED_S) - now)


def _cached_tokens(scheduler_output: SchedulerOutput) -> int:
    """Tokens that the step's new and resumed requests found in the prefix cache."""
    cached = scheduler_output.scheduled_cached_reqs
    resumed = sum(
        computed
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        if request_id in cached.resumed_req_ids
    )
    return int(resumed + sum(new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs))
