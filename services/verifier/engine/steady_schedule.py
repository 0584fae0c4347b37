"""Steps that compute nothing but blocks, scheduled and taken in without vLLM's loops over all that a request may be.

Most steps are like this: every session that has something to compute has one token and a block, nobody waits, and there
is room. What vLLM works out anew for each of its requests in each step (budgets, encoders, connectors, grammars, ...) is
the same every time then, and KV is to be had only where a session's rows reach into another block of it. One look at each
session tells whether a step is of this kind; if anything about it is not, vLLM's own code does it.

What is left behind is what vLLM would leave: each function names the one whose effects it has. vLLM's request states, KV
manager and stop checks stay the only ones.

What nobody needs before the pass is launched waits until the device has it (`meanwhile`): books are kept, full blocks of KV
are hashed and entered in the prefix cache, answers are made ready but for what the target will say. What has been said since
is hashed before a step goes the long way (`long_way`).

While sessions go on by themselves and nobody drafts, what the next pass computes is known but for the token that each says
in this one, and that is on the device. Such a pass may be launched before this one has ended, so that the device does not
wait for the host in between (`early`). It is taken in whatever comes meanwhile: a block waits for the pass after it, as it
would for one that is under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.utils import remove_all
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from services.verifier.engine.options import (
    DRAFT_LENGTHS,
    DRAFT_LEVELS,
    DRAFT_ROWS,
    EVEN_ROWS,
    FOLLOWED,
    GATHERED,
    LAUNCHED,
)
from services.verifier.engine.session_table import Gathered, SessionTable, is_heard, padded_levels
from services.verifier.engine.sessions import PADDING, Need, Session, drawn_from, is_bare, only_on
from shared.sampling.sparse import SparseRow
from shared.speculation.pace import Mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from services.verifier.engine.scheduler import SessionScheduler


FEW: Final = 0.125
"""Share of sessions with a draft, of late, up to which passes are launched early: each of these waits a pass longer."""
NO_ROOM: Final = 1 << 62
"""Blocks of the KV cache that nobody has."""


class UnderWay(NamedTuple):
    """A session's part of the step: its rows, how many of them are a draft's, how many tokens it may say yet, and its
    answer, which lacks what it says."""

    session: Session
    request: Request
    rows: int
    drafts: int
    room: int
    answer: EngineCoreOutput


class Ready(NamedTuple):
    """The sessions whose blocks the step verifies, in the order in which vLLM would look at them, and what they need of the
    KV cache; `drafts` are how many tokens of each block are a draft's, `longest` to which length blocks are padded, None
    where they are not."""

    sessions: list[Session]
    requests: list[Request]
    drafts: list[int]
    needs: list[Need]
    longest: int | None


class SteadySchedule:
    """The short way through a step, for one scheduler. `begin` and `end` return None where the long one has to be taken,
    and have changed nothing then."""

    def __init__(self, scheduler: SessionScheduler) -> None:
        self._scheduler = scheduler
        self._possible = _is_possible(scheduler)
        longest = scheduler.max_block
        columns = -(-scheduler.max_model_len // scheduler.block_size)
        self._table = SessionTable(scheduler.scheduler_config.max_num_seqs, columns)
        self._padding = [[PADDING] * (longest - count) for count in range(longest + 1)]
        self._scheduled: list[tuple[Session, Request, int, int]] = []
        self._unsorted = False
        self._under_way: list[UnderWay] = []
        self._output: SchedulerOutput | None = None
        self._departures = 0
        self._launched: list[tuple[Session, int]] = []
        self._drafting = Mean(0.0)

    # --- what sessions do ---------------------------------------------------------------------------------------

    def entered(self, session: Session) -> None:
        """A session has come."""
        session.row = self._table.enter()

    def left(self, session: Session) -> None:
        """It has ended."""
        self._table.leave(session.row)

    def moved(self, session: Session) -> None:
        """It may hold other blocks of the KV cache than before."""
        session.held = 0

    def armed(self, session: Session) -> None:
        """Its block is to be verified: what a pass needs of that is noted now, so that it needn't be then."""
        if not (self._possible and session.plain):
            return
        own, request, drafts = self._scheduler, session.request, session.drafts
        assert session.armed is not None
        levels = session.armed.levels
        levels = levels if len(levels) <= drafts else levels[len(levels) - drafts :]
        session.block = request.spec_token_ids + self._padding[drafts]
        session.levels = levels
        session.heard = is_heard(levels, drafts, eager=session.eager, unheard=session.unheard)
        session.padded_levels = padded_levels(levels, own.max_block + 1)
        self._note_held(session)
        session.need = self._need(session, own.max_block if own.uniform else drafts)

    def _note_held(self, session: Session) -> None:
        """Write down the blocks of the KV cache that it holds, and that are not written down yet."""
        (manager,) = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        blocks = manager.req_to_blocks.get(session.request.request_id, ())
        if session.held != len(blocks):
            self._hold(session, blocks[session.held :])

    def _hold(self, session: Session, blocks: Sequence[KVCacheBlock]) -> None:
        """It holds these beyond those that are written down."""
        self._table.hold(session.row, session.held, [block.block_id for block in blocks])
        session.held += len(blocks)

    def _need(self, session: Session, longest: int) -> Need:
        """What a session needs of the KV cache with a block of that length."""
        own = self._scheduler
        end = session.request.num_tokens + longest
        tokens = min(end + own.num_lookahead_tokens, own.max_model_len)
        missing = -(-tokens // own.block_size) - session.held
        return Need(tokens, max(0, missing) if end < own.max_model_len else NO_ROOM)

    # --- schedule -----------------------------------------------------------------------------------------------

    def begin(self) -> SchedulerOutput | None:
        """As `Scheduler.schedule`, of a step in which each session that is not parked verifies a block."""
        self.meanwhile()
        self._under_way, self._output = [], None
        own = self._scheduler
        launched, self._launched = self._launched, []
        if launched and (output := self._follow(launched)) is not None:
            return output
        if not self._possible or own.waiting or own.kv_holding_waiting:
            return None
        if own._pause_state != PauseState.UNPAUSED:
            return None
        ready = self._ready()
        if ready is None or not self._has_room(ready):
            return None
        self._drafting.saw(sum(map(bool, ready.drafts)) / len(ready.drafts))
        return self._schedule(ready)

    def _follow(self, launched: list[tuple[Session, int]]) -> SchedulerOutput | None:
        """The step whose pass was launched before; None where all its sessions have gone. Blocks that are worth a pass have
        the next one, which is not launched early then."""
        own, held_back = self._scheduler, 0
        sessions: list[Session] = []
        places: list[int] = []
        for place, (session, computed) in enumerate(launched):
            there = own._by_key.get(session.key) is session and session.armed is not None
            if not there or session.request.num_computed_tokens != computed:
                continue  # it has ended, or gives way to others
            if session.drafts:
                held_back += 1
                session.pending = session.pending or session.armed
                own._arm(session, only_on(session), [])
            sessions.append(session)
            places.append(place)
        self._drafting.saw(held_back / len(launched))
        if not sessions:
            return None
        own._step.began = own.ended_s
        own.counters.early_steps += 1
        self._unsorted = len(sessions) < len(own.running)
        armed = sum(session.armed is not None for session in own._by_request.values())
        more = not held_back and armed == len(sessions)
        return self._schedule(self._bare(sessions), places, more=more)

    def _bare(self, sessions: list[Session], requests: list[Request] | None = None) -> Ready:
        """A pass of one row for each of these sessions, without drafts."""
        requests = [session.request for session in sessions] if requests is None else requests
        needs = [self._need(session, 0) for session in sessions]
        return Ready(sessions, requests, [0] * len(sessions), needs, 0)

    def _ready(self) -> Ready | None:
        """What the step is to verify; None where there is nothing, or anything else to compute."""
        own, parked = self._scheduler, False
        sessions: list[Session] = []
        requests: list[Request] = []
        known = own._by_request
        for request in own.running:
            session = known.get(request.request_id)
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
                sessions.append(session)
                requests.append(request)
        if not sessions:
            return None
        self._unsorted = parked
        if own.uniform and is_bare(sessions):
            return self._bare(sessions)
        drafts, needs = [session.drafts for session in sessions], [session.need for session in sessions]
        return Ready(sessions, requests, drafts, needs, own.max_block if own.uniform else None)

    def _has_room(self, ready: Ready) -> bool:
        """Whether there is room enough, in the KV cache, the context and the step."""
        own, count = self._scheduler, len(ready.sessions)
        total = count + (sum(ready.drafts) if ready.longest is None else count * ready.longest)
        drafting = count * own.vllm_config.speculative_config.max_num_new_slots_for_drafting
        most: int = min(own.max_num_scheduled_tokens, own.scheduler_config.max_num_batched_tokens - drafting)
        return self._are_free(ready.needs) and total <= most

    def _are_free(self, needs: list[Need]) -> bool:
        """Whether the KV cache has that many blocks left."""
        free: int = self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return sum([need.missing for need in needs]) <= free

    def _followed(self, ready: Ready) -> tuple[list[int], list[Need]]:
        """Places of sessions whose next pass is launched early, and what all then need of the KV cache; none where that
        pass had better wait for what comes."""
        own = self._scheduler
        if not own.early or ready.longest != 0 or own.waiting or self._drafting(0.0) > FEW:
            return [], ready.needs
        places = [place for place, session in enumerate(ready.sessions) if self._says_more(session)]
        if 2 * len(places) <= len(ready.sessions) or not all(session.greedy for session in ready.sessions):
            return [], ready.needs
        needs = ready.needs.copy()
        for place in places:
            needs[place] = self._need(ready.sessions[place], 1)
        return (places, needs) if self._are_free(needs) else ([], ready.needs)

    def _says_more(self, session: Session) -> bool:
        """Whether it goes on by itself after another token, whatever that is but one that ends it."""
        request, said = session.request, session.request.num_output_tokens + 1
        room: bool = said < request.max_tokens and request.num_tokens + 1 < self._scheduler.max_model_len
        return room and said - session.taken < session.permitted

    def _schedule(
        self, ready: Ready, places: list[int] | None = None, *, more: bool = True
    ) -> SchedulerOutput:
        """As the second half of `Scheduler.schedule`, and as `_update_after_schedule`, vLLM's and ours; `places` are those
        in a pass that was launched already, and `more` says whether another may be."""
        own = self._scheduler
        followed, needs = self._followed(ready) if more else ([], ready.needs)
        ready = ready._replace(needs=needs)
        own.current_step += 1
        own.prefill_capacity_bound = False
        own.kv_cache_manager.new_step_starts()
        output = self._output = self._work(ready, self._grown(ready))
        setattr(output, LAUNCHED, places)
        setattr(output, FOLLOWED, followed)
        self._launched = [
            (ready.sessions[place], ready.requests[place].num_computed_tokens + 1) for place in followed
        ]
        output.finished_req_ids, own.finished_req_ids = own.finished_req_ids, set()
        output.preempted_req_ids, own.reset_preempted_req_ids = own.reset_preempted_req_ids, set()
        output.free_encoder_mm_hashes = own.encoder_cache_manager.get_freed_mm_hashes()
        output.ec_manager_metadata = own.encoder_cache_manager.get_manager_metadata()
        counts = output.num_scheduled_tokens.values()
        self._scheduled = list(zip(ready.sessions, ready.requests, counts, ready.drafts, strict=True))
        self._departures = own.departures
        return output

    def rehearsal(self) -> SchedulerOutput | None:
        """A step of the blocks that are there, as if it began now; nothing is changed. None where it would be no step of
        even rows."""
        own = self._scheduler
        if not (self._possible and own.uniform) or own.waiting or self._scheduled or self._launched:
            return None
        ready = self._ready()
        if ready is None or not self._has_room(ready):
            return None
        return self._work(ready, [None] * len(ready.sessions))

    def _work(self, ready: Ready, new_blocks: list[tuple[list[int], ...] | None]) -> SchedulerOutput:
        """The step's work, with the blocks of the KV cache that sessions get for it."""
        sessions, requests, drafts, _, longest = ready
        ids = [request.request_id for request in requests]
        if longest is None:
            blocks = {
                own_id: session.block[:count]
                for own_id, session, count in zip(ids, sessions, drafts, strict=True)
                if count
            }
            counts = [1 + count for count in drafts]
        else:
            padded = zip(ids, sessions, strict=True)
            blocks = {own_id: session.block for own_id, session in padded} if longest else {}
            counts = [1 + longest] * len(ids)
        computed = [request.num_computed_tokens for request in requests]
        output = SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=ids,
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},  # for asynchronous scheduling and connectors alone
                new_block_ids=new_blocks,
                num_computed_tokens=computed,
                num_output_tokens=[request.num_output_tokens for request in requests],
            ),
            num_scheduled_tokens=dict(zip(ids, counts, strict=True)),
            total_num_scheduled_tokens=sum(counts),
            scheduled_spec_decode_tokens=blocks,
            scheduled_encoder_inputs={},
            finished_req_ids=set(),
            free_encoder_mm_hashes=[],
            num_spec_tokens_to_schedule=self._scheduler.num_spec_tokens,
        )
        setattr(output, DRAFT_LENGTHS, dict(zip(ids, drafts, strict=True)) if longest else {})
        setattr(output, DRAFT_LEVELS, {own_id: session.levels for own_id, session in _drafted(ids, sessions)})
        setattr(output, DRAFT_ROWS, _drawn_from(ids, sessions))
        setattr(output, EVEN_ROWS, 0 if longest is None else 1 + longest)
        if longest is not None:
            setattr(output, GATHERED, self._gathered(ready, computed, 1 + longest))
        return output

    def _gathered(self, ready: Ready, computed: list[int], width: int) -> Gathered:
        """What the pass verifies, as the runner wants it."""
        sessions = ready.sessions
        tokens = [request._all_token_ids[-1] for request in ready.requests]
        if width > 1:
            own = zip(tokens, [session.block for session in sessions], strict=True)
            tokens = [token for last, block in own for token in (last, *block)]
        return Gathered(
            tokens,
            ready.drafts,
            computed,
            self._table,
            [session.row for session in sessions],
            max([session.held for session in sessions]),
            [session.heard for session in sessions],
            [session.padded_levels for session in sessions],
            greedy=all(session.greedy for session in sessions),
        )

    def _grown(self, ready: Ready) -> list[tuple[list[int], ...] | None]:
        """As `KVCacheManager.allocate_slots`, of running requests whose KV is all of one kind, but that full blocks are not
        entered in the prefix cache yet; what each session gets."""
        (manager,) = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        found: list[tuple[list[int], ...] | None] = [None] * len(ready.sessions)
        for at, (tokens, missing) in enumerate(ready.needs):
            if missing:
                new = manager.allocate_new_blocks(ready.requests[at].request_id, tokens, tokens)
                self._hold(ready.sessions[at], new)
                found[at] = ([block.block_id for block in new],)
        return found

    def meanwhile(self) -> None:
        """The rest of the step's scheduling; to be called before anything else happens to its requests."""
        if not self._scheduled:
            return
        own, scheduled = self._scheduler, self._scheduled
        self._scheduled = []
        if self._unsorted:
            own.running.sort(key=own._rank)
        coordinator = own.kv_cache_manager.coordinator
        (manager,) = coordinator.single_type_managers
        caching, cached, size = manager.enable_caching, manager.num_cached_block, manager.block_size
        verified = own._step.verified
        for session, request, rows, drafts in scheduled:
            before = request.num_computed_tokens
            if request.spec_token_ids:
                request.spec_token_ids = []
            request.num_computed_tokens = before + rows
            request.num_in_flight_tokens += rows
            assert session.armed is not None
            session.verified, session.armed = session.armed.number, None
            session.reached = max(session.reached, before)
            verified[request.request_id] = drafts
            if caching and (before + 1) // size > cached.get(request.request_id, 0):
                request.update_block_hashes()
                coordinator.cache_blocks(request, before + 1)
        own.prev_step_scheduled_req_ids.clear()
        own.prev_step_scheduled_req_ids.update(verified)
        self._count(len(scheduled), sum(verified.values()))
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

    def long_way(self) -> None:
        """The step goes it: hash what was said, as `Request.append_output_token_ids` does; `end` leaves it over."""
        self._launched = []
        for request in self._scheduler.running:
            request.update_block_hashes()

    def _count(self, sessions: int, drafts: int) -> None:
        counters = self._scheduler.counters
        counters.steps += 1
        counters.steady_steps += 1
        counters.scheduled_tokens += sessions + drafts
        counters.blocks += sessions
        counters.block_tokens += drafts

    # --- prompts ------------------------------------------------------------------------------------------------

    def beside_prompts(self, output: SchedulerOutput) -> Gathered | None:
        """What a step of vLLM's own scheduling computes whose prompts begin and end in it, and fit into an even pass in
        parts of as many rows as a block has; None of any other. To be asked before the step is booked."""
        own, counts, width = self._scheduler, output.num_scheduled_tokens, 1 + self._scheduler.max_block
        if not (output.scheduled_new_reqs and own.prompt_places and own.max_block and self._possible):
            return None
        old, new = output.scheduled_cached_reqs.req_ids, [each.req_id for each in output.scheduled_new_reqs]
        if output.scheduled_cached_reqs.resumed_req_ids or output.kv_cache_block_copies:
            return None
        sessions = [own._by_request.get(request) for request in (*old, *new)]
        plain = [each for each in sessions if each is not None and each.plain and each.greedy]
        places = len(old) + sum(-(-counts[request] // width) for request in new)
        if len(plain) < len(counts) or places > own.scheduler_config.max_num_seqs:
            return None
        blocks, prompts = plain[: len(old)], plain[len(old) :]
        drafted = output.scheduled_spec_decode_tokens
        whole = all(self._is_block(each, counts, drafted) for each in blocks)
        whole = whole and all(self._is_prompt(each, counts) for each in prompts)
        return self._with_prompts(blocks, prompts, counts) if whole else None

    def _is_block(self, session: Session, counts: dict[str, int], drafted: dict[str, list[int]]) -> bool:
        """Whether all that a session computes is its last token and the block after it."""
        request, request_id = session.request, session.request.request_id
        rows = counts[request_id]
        last = request.num_output_tokens > 0 and request.num_computed_tokens == request.num_tokens - 1
        return last and rows == 1 + len(drafted.get(request_id, ())) and self._has_places(request, rows)

    def _is_prompt(self, session: Session, counts: dict[str, int]) -> bool:
        """Whether all that a session computes is its prompt, to the end."""
        request, rows = session.request, counts[session.request.request_id]
        return request.num_computed_tokens + rows == request.num_tokens and self._has_places(request, rows)

    def _has_places(self, request: Request, rows: int) -> bool:
        """Whether so many more rows and what pads them are within the longest text."""
        own = self._scheduler
        return bool(request.num_computed_tokens + rows + own.max_block < own.max_model_len)

    def _with_prompts(
        self, blocks: list[Session], prompts: list[Session], counts: dict[str, int]
    ) -> Gathered:
        width, sessions = 1 + self._scheduler.max_block, [*blocks, *prompts]
        tokens: list[int] = []
        computed: list[int] = []
        rows: list[int] = []
        real: list[int] = []
        ends: list[int] = []
        for session in sessions:
            self._note_held(session)
            request, count = session.request, counts[session.request.request_id]
            before, padded = request.num_computed_tokens, -(-count // width) * width
            said = request._all_token_ids[before : before + count]  # a prompt, or the token before a block
            own = [*said, *session.block][:count]
            ends.append(len(tokens) + count - 1)
            tokens += own + [PADDING] * (padded - count)
            computed += range(before, before + padded, width)
            rows += [session.row] * (padded // width)
            real += [min(width, count - done) for done in range(0, count, width)]
        untold = padded_levels((), width)
        beside = len(rows) - len(blocks)
        return Gathered(
            tokens,
            [min(session.drafts, counts[session.request.request_id] - 1) for session in blocks]
            + [0] * beside,
            computed,
            self._table,
            rows,
            max([session.held for session in sessions]),
            [session.heard for session in blocks] + [False] * beside,
            [session.padded_levels for session in blocks] + [untold] * beside,
            greedy=True,
            ends=ends[len(blocks) :],
            real=real,
        )

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


def _drafted(requests: Sequence[str], sessions: Sequence[Session]) -> Iterator[tuple[str, Session]]:
    """Those of whose blocks anything is a draft's."""
    return (each for each in zip(requests, sessions, strict=True) if each[1].drafts)


def _drawn_from(requests: Sequence[str], sessions: Sequence[Session]) -> dict[str, list[SparseRow]]:
    """What the drafts of a step's blocks were drawn from, where that was said."""
    return {
        request: drawn_from(session, session.armed, session.drafts)
        for request, session in zip(requests, sessions, strict=True)
        if session.armed is not None and session.armed.rows
    }


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
