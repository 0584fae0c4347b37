"""Steps that compute nothing but blocks, scheduled and taken in without vLLM's loops over all that a request may be.

Most steps are like this: every session that has something to compute has one token and a block, nobody waits, and there
is room. What vLLM works out anew for each of its requests in each step (budgets, encoders, connectors, grammars, ...) is
the same every time then, and KV is to be had only where a session's rows reach into another block of it. One look at each
session tells whether a step is of this kind; if anything about it is not, vLLM's own code does it.

What is left behind is what vLLM would leave: each function names the one whose effects it has. vLLM's request states, KV
manager and stop checks stay the only ones.

What nobody needs before the pass is launched waits until the device has it (`meanwhile`): books are kept, full blocks of KV
are hashed and entered in the prefix cache, answers are made ready but for what the target will say. What has been said since
is hashed before a step goes the long way (`catch_up`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.utils import remove_all
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from services.verifier.engine.options import DRAFT_LENGTHS, DRAFT_LEVELS, DRAFT_ROWS, EVEN_ROWS
from services.verifier.engine.sessions import PADDING, Session, drawn_from, is_bare
from shared.sampling.sparse import SparseRow

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from services.verifier.engine.scheduler import SessionScheduler


class UnderWay(NamedTuple):
    """A session's part of the step: its rows, how many of them are a draft's, how many tokens it may say yet, and its
    answer, which lacks what it says."""

    session: Session
    request: Request
    rows: int
    drafts: int
    room: int
    answer: EngineCoreOutput


Ready = list[tuple[Session, "Request"]]
Growing = list[tuple[int, int, bool]]
"""Of a session that vLLM's KV manager has to be asked for: which of those that are ready it is, for how many tokens it needs
room that it lacks (0: it has enough), and whether it has filled a block that others may share."""


class SteadySchedule:
    """The short way through a step, for one scheduler. `begin` and `end` return None where the long one has to be taken,
    and have changed nothing then."""

    def __init__(self, scheduler: SessionScheduler) -> None:
        self._scheduler = scheduler
        self._possible = _is_possible(scheduler)
        self._padding = [[PADDING] * count for count in range(scheduler.max_block + 1)]
        self._scheduled: list[tuple[Session, Request, int, int]] = []
        self._filled: list[tuple[Request, int]] = []
        self._unsorted = False
        self._under_way: list[UnderWay] = []
        self._output: SchedulerOutput | None = None
        self._departures = 0

    # --- schedule -----------------------------------------------------------------------------------------------

    def begin(self) -> SchedulerOutput | None:
        """As `Scheduler.schedule`, of a step in which each session that is not parked verifies a block."""
        self.meanwhile()
        self._under_way, self._output = [], None
        own = self._scheduler
        if not self._possible or own.waiting or own.kv_holding_waiting:
            return None
        if own._pause_state != PauseState.UNPAUSED:
            return None
        ready = self._ready()
        if not ready:
            return None
        longest = self._longest(ready)
        growing = self._growing(ready, longest)
        return None if growing is None else self._schedule(ready, longest, growing)

    def _ready(self) -> Ready | None:
        """The sessions whose blocks the step verifies, in the order in which vLLM would look at them; None where there is
        anything else to compute."""
        own, ready, parked = self._scheduler, Ready(), False
        sessions = own._by_request
        for request in own.running:
            session = sessions.get(request.request_id)
            if session is None:
                return None
            if session.parked_at is not None:
                parked = True
            elif (
                session.armed is None
                or not session.plain
                or request.is_prefill_chunk
                or request.prefill_stats is not None
                or request.num_computed_tokens != request.num_tokens - 1
            ):
                return None
            else:
                ready.append((session, request))
        self._unsorted = parked
        return ready

    def _longest(self, ready: Ready) -> int | None:
        """To which length blocks are padded; None where they are not."""
        if not self._scheduler.uniform:
            return None
        return 0 if is_bare(session for session, _ in ready) else self._scheduler.max_block

    def _growing(self, ready: Ready, longest: int | None) -> Growing | None:
        """Whom vLLM's KV manager has to be asked for; None where there is not room enough, in the KV cache, the context or
        the step."""
        own, growing = self._scheduler, Growing()
        kv = own.kv_cache_manager
        (manager,) = kv.coordinator.single_type_managers
        held, cached, size = manager.req_to_blocks, manager.num_cached_block, manager.block_size
        caching, ahead = manager.enable_caching, own.num_lookahead_tokens
        total = needed = 0
        for at, (_, request) in enumerate(ready):
            rows = 1 + (len(request.spec_token_ids) if longest is None else longest)
            total += rows
            known = request.num_computed_tokens + 1
            end = known - 1 + rows
            if end >= own.max_model_len:
                return None
            request_id = request.request_id
            room = min(end + ahead, own.max_model_len)
            missing = -(-room // size) - len(held.get(request_id, ()))
            filled = caching and known // size > cached.get(request_id, 0)
            if missing > 0:
                needed += missing
                growing.append((at, room, filled))
            elif filled:
                growing.append((at, 0, True))
        drafting = len(ready) * own.vllm_config.speculative_config.max_num_new_slots_for_drafting
        if (
            needed > kv.block_pool.get_num_free_blocks()
            or total > own.max_num_scheduled_tokens
            or total + drafting > own.scheduler_config.max_num_batched_tokens
        ):
            return None
        return growing

    def _schedule(self, ready: Ready, longest: int | None, growing: Growing) -> SchedulerOutput:
        """As the second half of `Scheduler.schedule`, and as `_update_after_schedule`, vLLM's and ours."""
        own = self._scheduler
        own.current_step += 1
        own.prefill_capacity_bound = False
        own.kv_cache_manager.new_step_starts()
        scheduled: dict[str, int] = {}
        blocks: dict[str, list[int]] = {}
        lengths: dict[str, int] = {}
        levels: dict[str, list[int]] = {}
        rows: dict[str, list[SparseRow]] = {}
        computed: list[int] = []
        said: list[int] = []
        total = 0
        new_blocks = self._grown(ready, growing)
        for session, request in ready:
            request_id, drafts, armed = request.request_id, session.drafts, session.armed
            assert armed is not None
            block = request.spec_token_ids
            if longest is not None:
                if len(block) > drafts:  # it was padded for a step that had no room for it
                    block = block[:drafts]
                if longest > drafts:
                    block = block + self._padding[longest - drafts]
            if block:
                blocks[request_id] = block
                lengths[request_id] = drafts
                request.spec_token_ids = []
            if drafts:
                told = armed.levels
                levels[request_id] = told if len(told) <= drafts else told[-drafts:]
            if armed.rows:
                rows[request_id] = drawn_from(session, armed, drafts)
            count = 1 + len(block)
            scheduled[request_id] = count
            computed.append(request.num_computed_tokens)
            said.append(request.num_output_tokens)
            self._scheduled.append((session, request, count, drafts))
            total += count
        cached = CachedRequestData(
            req_ids=list(scheduled),
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},  # for asynchronous scheduling and connectors alone
            new_block_ids=new_blocks,
            num_computed_tokens=computed,
            num_output_tokens=said,
        )
        output = SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=total,
            scheduled_spec_decode_tokens=blocks,
            scheduled_encoder_inputs={},
            finished_req_ids=own.finished_req_ids,
            free_encoder_mm_hashes=own.encoder_cache_manager.get_freed_mm_hashes(),
            preempted_req_ids=own.reset_preempted_req_ids,
            num_spec_tokens_to_schedule=own.num_spec_tokens,
            ec_manager_metadata=own.encoder_cache_manager.get_manager_metadata(),
        )
        own.finished_req_ids, own.reset_preempted_req_ids = set(), set()
        setattr(output, DRAFT_LENGTHS, {} if longest is None else lengths)
        setattr(output, DRAFT_LEVELS, levels)
        setattr(output, DRAFT_ROWS, rows)
        setattr(output, EVEN_ROWS, 0 if longest is None else 1 + longest)
        self._output, self._departures = output, own.departures
        return output

    def _grown(self, ready: Ready, growing: Growing) -> list[tuple[list[int], ...] | None]:
        """As `KVCacheManager.allocate_slots`, of running requests whose KV is all of one kind, but that full blocks are not
        entered in the prefix cache yet; what each session gets."""
        (manager,) = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        found: list[tuple[list[int], ...] | None] = [None] * len(ready)
        for at, room, filled in growing:
            request = ready[at][1]
            if room:
                blocks = manager.allocate_new_blocks(request.request_id, room, room)
                found[at] = ([block.block_id for block in blocks],)
            if filled:
                self._filled.append((request, request.num_computed_tokens + 1))
        return found

    def meanwhile(self) -> None:
        """The rest of the step's scheduling; to be called before anything else happens to its requests."""
        if not self._scheduled:
            return
        own, scheduled, filled = self._scheduler, self._scheduled, self._filled
        self._scheduled, self._filled = [], []
        if self._unsorted:
            own.running.sort(key=own._rank)
        verified = own._step.verified
        for session, request, rows, drafts in scheduled:
            before = request.num_computed_tokens
            request.num_computed_tokens = before + rows
            request.num_in_flight_tokens += rows
            assert session.armed is not None
            session.verified, session.armed = session.armed.number, None
            session.reached = max(session.reached, before)
            verified[request.request_id] = drafts
        own.prev_step_scheduled_req_ids.clear()
        own.prev_step_scheduled_req_ids.update(verified)
        self._count(len(scheduled), sum(verified.values()))
        coordinator = own.kv_cache_manager.coordinator
        for request, known in filled:
            request.update_block_hashes()
            coordinator.cache_blocks(request, known)
        self._under_way = [self._begun(*each) for each in scheduled]

    def _begun(self, session: Session, request: Request, rows: int, drafts: int) -> UnderWay:
        room = min(
            self._scheduler.max_model_len - request.num_tokens, request.max_tokens - request.num_output_tokens
        )
        answer = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            trace_headers=request.trace_headers,
            num_nans_in_logits=request.num_nans_in_logits,
        )
        return UnderWay(session, request, rows, drafts, room, answer)

    def catch_up(self) -> None:
        """Hash what requests have said, as `Request.append_output_token_ids` does; `end` leaves it over."""
        for request in self._scheduler.running:
            request.update_block_hashes()

    def _count(self, sessions: int, drafts: int) -> None:
        counters = self._scheduler.counters
        counters.steps += 1
        counters.steady_steps += 1
        counters.scheduled_tokens += sessions + drafts
        counters.blocks += sessions
        counters.block_tokens += drafts

    # --- update_from_output -------------------------------------------------------------------------------------

    def end(self, output: SchedulerOutput, said: ModelRunnerOutput) -> dict[int, EngineCoreOutputs] | None:
        """As `Scheduler.update_from_output`, and ours, of a step that `begin` has scheduled: sessions that have spoken
        park."""
        self.meanwhile()
        under_way, self._under_way = self._under_way, []
        own = self._scheduler
        if (
            output is not self._output
            or own.departures != self._departures
            or own.grammar_compile_error_reqs
            or own.encoder_cache_mismatch_reqs
            or not _is_bare(said)
        ):
            return None
        places, sampled = said.req_id_to_index, said.sampled_token_ids
        found: dict[int, list[EngineCoreOutput]] = {}
        stopped: set[Request] = set()
        accepted = 0
        for session, request, rows, drafts, room, answer in under_way:
            tokens = sampled[places[request.request_id]]
            new = len(tokens)
            request.num_in_flight_tokens -= rows
            request.num_computed_tokens -= rows - new  # drafts that were rejected
            if drafts:
                accepted += new - 1
            ends = False
            if session.stops is not None and new < room and session.stops.isdisjoint(tokens):
                request._output_token_ids.extend(tokens)
                request._all_token_ids.extend(tokens)
            else:
                tokens, ends = own._update_request_with_output(request, tokens)
            session.spoke()
            if ends:
                answer.finish_reason, answer.stop_reason = request.get_finished_reason(), request.stop_reason
                own._handle_stopped_request(request)
                own._free_request(request)
                stopped.add(request)
            else:
                own._park(session)
            session.verified = 0
            answer.new_token_ids = tokens
            if session.ahead or session.drafted:
                answer.kv_transfer_params = session.told
            found.setdefault(request.client_index, []).append(answer)
        own.counters.accepted_tokens += accepted
        if stopped:
            own.running = remove_all(own.running, stopped)
        return {client: EngineCoreOutputs(outputs=outputs) for client, outputs in found.items()}


def _is_possible(own: SessionScheduler) -> bool:
    """Whether the scheduler has nothing about it that `SteadySchedule` knows nothing of, whatever is to be computed."""
    managers = own.kv_cache_manager.coordinator.single_type_managers
    others: tuple[Any, ...] = (
        own.connector,
        own.ec_connector,
        own.aux_output_connector,
        own.lora_config,
        own.is_encoder_decoder,
        own.is_mm_encoder_only,
        own.use_pp,
        own.use_v2_model_runner,
        own.scheduler_config.async_scheduling,
        own.scheduler_config.long_prefill_token_threshold,
        own.dynamic_sd_lookup,
        own.defer_block_free,
        own.needs_kv_cache_zeroing,
        own.return_sampling_mask,
        own.log_stats,
        own.perf_metrics,
        own.kv_metrics_collector,
        own.enable_kv_cache_events,
        own.spec_decode_metrics_level != "none",
        own.num_sampled_tokens_per_step != 1,
        own.finished_req_ids_dict is not None,
        len(managers) != 1 or type(managers[0]) is not FullAttentionManager,
    )
    return not any(others)


def _is_bare(said: ModelRunnerOutput) -> bool:
    """Whether tokens are all that a step has yielded, for each request at least one."""
    others: tuple[Any, ...] = (
        said.logprobs,
        said.prompt_logprobs_dict,
        said.prompt_token_id_logprobs_dict,
        said.pooler_output,
        said.kv_connector_output,
        said.ec_connector_output,
        said.aux_output_connector_output,
        said.num_nans_in_logits,
    )
    return not any(others) and all(said.sampled_token_ids)
