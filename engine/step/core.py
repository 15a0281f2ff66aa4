"""The engine: one short step() over ragged rows, for both roles. It knows no thread and no wire.

    admit -> plan -> draft -> run the model -> accept -> advance
                                       '--> not finite: nothing of the step is used (`_discard`)

Every request that was added gives exactly one FinishedEvent, whatever happens to it; what an event
hands over (pinned blocks of an AnnouncedEvent) belongs to whoever receives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.attention.batch import Row
from engine.base.errors import DiptychError, InvalidRequest, SelfTestFailed, Unavailable
from engine.base.types import FinishReason, TokenLogprobs
from engine.runner.base import ModelRunner
from engine.sampling import Sampler
from engine.scheduling.block_pool import NO_SOURCES
from engine.scheduling.block_table import BlockTable
from engine.scheduling.events import (
    AnnouncedEvent,
    Counts,
    Event,
    FetchEvent,
    FinishedEvent,
    TokensEvent,
)
from engine.scheduling.holds import EngineHolds, RequestHold
from engine.scheduling.load import Limits, LoadReport
from engine.scheduling.plan import PlannedRow
from engine.scheduling.request import EngineRequest, Request, State
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import PENDING
from engine.step.constrained import ConstrainedAnswers
from engine.step.health import Health, Unchecked
from engine.step.step_sampler import SampledRow, StepSampler
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import WorkerMetrics
from engine.telemetry.stopwatch import Stopwatch

_log = get_logger(__name__)
DEGRADED_S = 60.0  # how long a worker reports that its numbers were not finite


@dataclass(slots=True)
class Totals:
    """Counted since the start."""

    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class EngineCore:
    """Requests in, events out. Owned by one thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        sampler: Sampler,
        metrics: WorkerMetrics,
        clock: Callable[[], float],
        draft_runner: ModelRunner | None = None,
        health: Health | None = None,
    ) -> None:
        """`draft_runner` computes the draft model, whose KV lies in the same blocks."""
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self.totals = Totals()
        self._runner = runner
        self._draft_runner = draft_runner
        self._drawer = StepSampler(sampler)
        self._constrained = ConstrainedAnswers(sampler.vocab_size, metrics)
        self._metrics = metrics
        self._clock = clock
        self._requests: dict[int, Request] = {}
        self._events: list[Event] = []
        self._num_failures = 0  # steps in a row
        self._health = health or Unchecked()
        self._degraded_until_s = -math.inf
        self._num_preemptions = 0  # of those, counted in the metrics

    # -- what is asked of it -----------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """What one request may need; fixed from the first step on."""
        scheduler = self.scheduler
        return Limits(
            self.pool.num_blocks,
            scheduler.block_size,
            scheduler.max_model_len,
            scheduler.draft_window,
        )

    def add(self, key: int, work: EngineRequest) -> None:
        """Queue a request under a fresh key."""
        table = BlockTable(self.pool, self.scheduler.block_size)
        request = Request(key, work, table, self._clock())
        self._requests[key] = request
        self.scheduler.add(request)
        self._check_already_done(request)

    def abort(self, key: int) -> None:
        """End a request now, unless it is unknown. No NIXL read may still write to its blocks."""
        if request := self._requests.get(key):
            self._finish(request, FinishReason.ABORTED)

    def abandon_production(self, key: int) -> None:
        """Nobody waits any longer for the blocks that this request was to bring or compute."""
        if request := self._requests.get(key):
            self.scheduler.abandon_production(request)

    def blocks_arrived(self, key: int, num_blocks: int) -> None:
        """The first `num_blocks` blocks of a fetching request are complete and passed the fence."""
        request = self._requests.get(key)
        if request is not None and request.state is State.FETCHING:
            num_tokens = num_blocks * self.scheduler.block_size
            if num_tokens > request.num_computed:
                request.sources |= {request.work.source}
                self.scheduler.advance(request, num_tokens)

    def fetch_ended(self, key: int, num_cached_tokens: int | None = None) -> None:
        """No more blocks will come, and no read is under way; what is missing is computed here."""
        request = self._requests.get(key)
        if request is not None and request.state is State.FETCHING:
            if num_cached_tokens is not None:
                request.num_cached_tokens = min(num_cached_tokens, request.num_prompt)
            request.move(State.RUNNING)
            if self.pool.has_forgotten(request.sources):
                self._finish(request, FinishReason.ABORTED, _from_sick_peer())

    def forget(self, source: str, *, for_good: bool = True) -> None:
        """A peer, by its incarnation, is sick: what it had a part in is neither found nor used.

        `for_good`: nothing more is taken from it. Where blocks of it were damaged, that is for a
        coordinator to decide, which knows whether others could compute them.
        Answers that read such blocks begin anew, after the tokens that they have.
        """
        num_blocks = self.pool.forget(source, for_good=for_good)
        self._metrics.kv_blocks_forgotten.inc(num_blocks)
        for request in list(self.scheduler.active):
            if source in request.sources and request.state is State.RUNNING:
                self.scheduler.preempt(request)
        if num_blocks:
            _log.warning("blocks of a sick peer forgotten", peer=source, num_blocks=num_blocks)

    def hold(self, names: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin the longest leading run of these blocks; returns their ids and generations."""
        blocks = self.pool.match(names)
        self.pool.pin(blocks)
        return blocks, self._generations(blocks)

    def pin(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block."""
        self.pool.pin(blocks)

    def unpin(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block."""
        self.pool.release(blocks)

    def holds(self) -> EngineHolds:
        """Every request with its blocks, and the pool, at this moment."""
        now_s = self._clock()
        requests = [
            RequestHold(
                request_id=request.work.request_id,
                state=request.state.value,
                is_answer=request.samples,
                block_ids=tuple(request.table.blocks),
                age_s=now_s - request.arrival_s,
                left_s=None if (end := request.work.deadline_s) is None else end - now_s,
            )
            for request in self._requests.values()
        ]
        pool = self.pool
        return EngineHolds(
            tuple(requests), pool.held, pool.num_free, pool.num_cached, pool.num_blocks
        )

    @property
    def idle(self) -> bool:
        """Whether there is nothing that a step could do now or later without outside help."""
        return not self.scheduler.waiting and all(
            r.state is State.FETCHING for r in self.scheduler.active
        )

    # -- the step ----------------------------------------------------------------------------------

    def step(self) -> bool:
        """One pass; False if there was nothing to compute."""
        watch = Stopwatch(self._clock)
        now_s = self._clock()
        for request in self.scheduler.admit(now_s):
            self._on_admitted(request)
        held = self._hold_constrained()
        plan = self.scheduler.plan(now_s, held)
        watch.lap("schedule")
        booked = bool(plan) and self._compute(plan, watch)
        if plan:
            self._constrained.look(self.scheduler.active)
        elif held:
            self._constrained.wait_for_late()
        self._record_load()
        watch.lap("emit")
        if plan:
            num_rows = sum(planned.num_tokens + len(planned.draft) for planned in plan)
            self._metrics.iteration_tokens.observe(num_rows)
            self._metrics.step_took(watch.laps)
            # A prompt's tokens want no logits: what they cost tells nothing about drafts.
            decoding = all(planned.num_tokens == 1 for planned in plan)
            if self.scheduler.speculation is not None and decoding and booked:
                verified_s = sum(watch.laps.values()) - watch.laps.get("draft", 0.0)
                self.scheduler.speculation.stepped(num_rows, verified_s)
        return bool(plan or held)

    def _hold_constrained(self) -> set[int]:
        """End the constrained answers that cannot go on; returns which stay out of this step."""
        self._constrained.look(self.scheduler.active)
        self._constrained.settle()
        for request in list(self.scheduler.active):
            if error := self._constraint_error(request):
                self._end_constrained(request, error)
        return self._constrained.held(self.scheduler.active)

    def _compute(self, plan: Sequence[PlannedRow], watch: Stopwatch) -> bool:
        """Run the model and accept; a failure ends the requests of this step, not the worker.
        Returns whether the step was booked.

        Until `_accept` nothing has been booked, so giving those requests up leaves a consistent
        state. A second failure in a row is the device's, not a request's: it is raised. So is
        SelfTestFailed: a worker that has failed shows first that it still computes what it should.
        """
        try:
            drafted = self._draft(plan)
            if drafted:
                watch.lap("draft")
            self._constrained.begin(plan)
            rows = [self._model_row(planned) for planned in plan]
            logits = self._runner.run(rows)
            watch.lap("forward")
            masks, late = self._constrained.wait(plan)
            if masks:
                watch.lap("mask")
            drawn = self._drawer.draw(plan, logits, masks, late)
            for index in self._health.unsound_prompts(rows):
                drawn[index].broken = True
            watch.lap("sample")
        except Exception as error:
            self._metrics.engine_step_failures.inc()
            self._num_failures += 1
            if self._num_failures > 1:
                raise
            names = [planned.request.work.request_id for planned in plan]
            _log.exception("step failed", request_ids=names)
            for planned in plan:
                fault = Unavailable(f"step failed: {error}")
                self._finish(planned.request, FinishReason.ABORTED, fault)
            self._test_health()
            return False
        self._num_failures = 0
        if any(row.broken for row in drawn):
            self._discard([row.planned.request for row in drawn if row.broken])
            return False
        self._accept(drawn, logits, drafted)
        return True

    def _discard(self, broken: Sequence[Request]) -> None:
        """A step gave these requests numbers that are not finite: end them, test, compute again.

        Nothing of the step is booked, for the other rows' numbers came from the same computation:
        no token is sent, no block is named, and the next step begins where this one began. A
        request that ends so goes on at another worker. Where a complete block that it read is
        damaged, the fault is that block's: with a peer's, all that this peer had a part in goes.
        """
        self._metrics.non_finite_requests.inc(len(broken))
        damaged = [self._health.damaged(r.table.blocks[: r.num_hashed]) for r in broken]
        # A second copy of a block has no name, and its sources are not kept: any may be it.
        causes = [
            (self.pool.sources(blocks) or request.sources) if blocks else NO_SOURCES
            for request, blocks in zip(broken, damaged, strict=True)
        ]
        for request, blocks, peers in zip(broken, damaged, causes, strict=True):
            _log.error(
                "numbers are not finite",
                request_id=request.work.request_id,
                num_damaged_blocks=len(blocks),
                peers=sorted(peers),
            )
            self.pool.hide(blocks)
            self._finish(request, FinishReason.ABORTED, self._fault(request, peers))
        for peer in NO_SOURCES.union(*causes):
            self.forget(peer, for_good=False)
        if not all(causes):
            self._degraded_until_s = self._clock() + DEGRADED_S
        self._test_health()

    @staticmethod
    def _fault(request: Request, peers: Collection[str]) -> Unavailable:
        """What a request ends with whose numbers were not finite."""
        if not peers:
            return Unavailable("this worker computed numbers that are not finite", sick=True)
        if request.work.source in peers:
            return _from_sick_peer()
        return Unavailable("cached blocks of a sick peer were dropped")

    def _test_health(self) -> None:
        """Raise SelfTestFailed unless this worker computes what it did at its start."""
        try:
            self._health.self_test()
        except SelfTestFailed:
            self._metrics.self_tested("failed")
            raise
        self._metrics.self_tested("passed")

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def _draft(self, plan: Sequence[PlannedRow]) -> dict[int, int]:
        """Write the drafts that were promised, and the draft model's KV of everybody's tokens.

        Returns, by request key, up to where that KV is there then, if the drafts stand. Who is not
        drafted for in this step is computed when much of it is missing, many tokens at once.
        """
        if self._draft_runner is None:
            return {}
        promised = [p for p in plan if PENDING in p.draft]
        if promised and self.scheduler.speculation is not None:
            self.scheduler.speculation.drafter.materialize(promised)
            for planned in promised:
                if (matcher := planned.request.work.matcher) is not None:
                    del planned.draft[matcher.num_valid(planned.draft) :]
        written = {planned.request.key for planned in promised}
        drafted, rows = {}, []
        for planned in plan:
            request = planned.request
            start = request.num_computed - request.draft_lag
            end = request.num_computed + planned.num_tokens
            if request.key in written:
                drafted[request.key] = request.num_computed + len(planned.draft)
            elif request.decoding and end - start < self.scheduler.block_size:
                drafted[request.key] = start
            else:
                drafted[request.key] = end
                rows.append(Row(request.tokens[start:end], start, request.table.blocks, 0))
        if rows:
            self._draft_runner.run(rows)
        return drafted

    def _model_row(self, planned: PlannedRow) -> Row:
        request = planned.request
        start = request.num_computed
        tokens = request.tokens[start : start + planned.num_tokens] + planned.draft
        return Row(tokens, start, request.table.blocks, planned.num_logits)

    def _accept(
        self, drawn: Sequence[SampledRow], logits: torch.Tensor, drafted: Mapping[int, int]
    ) -> None:
        """Advance every row by what it computed and emit what the verifier accepts."""
        for row in drawn:
            planned = row.planned
            request = planned.request
            if row.error is not None:
                self._finish(request, FinishReason.ABORTED, row.error)
                continue
            self._count_prompt(request, planned)
            emitted = self._verify(planned, row.tokens) if row.tokens else []
            kept, reason = self._keep(request, emitted)
            error = self._constraint_error(request)
            logprobs = self._drawer.logprobs(row, kept, logits)
            # A row without its token has its last position computed again.
            num_new = planned.num_tokens - (1 if planned.num_sampled and not kept else 0)
            request.num_scored += row.num_scored
            request.prompt_logprobs += row.prompt_logprobs
            # KV exists for the tokens before the newest: the row's own and the accepted draft's.
            num_computed = request.num_computed + num_new + max(0, len(kept) - 1)
            draft_lag = max(0, num_computed - drafted.get(request.key, num_computed))
            self.scheduler.advance(request, num_computed, draft_lag)
            self._emit(request, kept, logprobs, reason)
            if error is not None:
                self._end_constrained(request, error)

    def _verify(self, planned: PlannedRow, sampled: Sequence[int]) -> Sequence[int]:
        speculation = self.scheduler.speculation
        if speculation is None:
            return sampled
        request = planned.request
        if planned.draft:
            verified = speculation.verify(planned.draft, sampled)
            sampled = verified.tokens
            self._count_draft(request, len(planned.draft), verified.num_accepted)
        speculation.produced(str(request.key), sampled)
        return sampled

    def _count_draft(self, request: Request, num_tokens: int, num_accepted: int) -> None:
        request.num_draft_tokens += num_tokens
        request.num_accepted_tokens += num_accepted
        self.totals.draft_tokens += num_tokens
        self.totals.accepted_tokens += num_accepted
        self._metrics.spec_decode_num_drafts.inc()
        self._metrics.spec_decode_num_draft_tokens.inc(num_tokens)
        self._metrics.spec_decode_num_accepted_tokens.inc(num_accepted)

    def _keep(
        self, request: Request, emitted: Sequence[int]
    ) -> tuple[list[int], FinishReason | None]:
        """Take the tokens up to the one that ends the answer."""
        kept: list[int] = []
        for token in emitted:
            request.tokens.append(token)
            kept.append(token)
            if request.work.matcher is not None:
                request.work.matcher.advance([token])
            if reason := self._ending(request, token):
                return kept, reason
        return kept, None

    @staticmethod
    def _constraint_error(request: Request) -> InvalidRequest | None:
        """What made the constraint of no more use, if anything did."""
        matcher = request.work.matcher
        if matcher is None or matcher.busy or not (reason := matcher.error):
            return None
        return InvalidRequest("constraint", reason)

    def _end_constrained(self, request: Request, error: InvalidRequest) -> None:
        matcher = request.work.matcher
        if matcher is not None and matcher.is_too_costly:
            self._metrics.constraints_too_costly.inc()
        name = request.work.request_id
        _log.warning("constraint failed", request_id=name, reason=error.description)
        self._finish(request, FinishReason.ABORTED, error)

    def _emit(
        self,
        request: Request,
        kept: list[int],
        logprobs: list[TokenLogprobs],
        reason: FinishReason | None,
    ) -> None:
        """Say what is new; then announce, finish."""
        told: list[TokenLogprobs] = []
        if request.prompt_logprobs and request.num_scored >= request.num_to_score:
            told, request.prompt_logprobs = request.prompt_logprobs, []
        if kept or told:
            self._metrics.generation_tokens.inc(len(kept))
            counts = self._counts(request)
            self._events.append(TokensEvent(request.key, kept, counts, logprobs, told))
        self._announce(request)
        if reason:
            self._finish(request, reason)
        elif request.num_pending == 0 and not request.wants_tokens:
            self._finish(request, FinishReason.LENGTH if request.samples else FinishReason.STOP)

    def _ending(self, request: Request, token: int) -> FinishReason | None:
        """Whether the token just appended ends the answer."""
        stop = request.work.stop
        assert stop is not None
        if token in stop.stop_token_ids and request.num_output >= stop.min_tokens:
            request.matched_stop = token
            return FinishReason.STOP
        matcher = request.work.matcher
        if matcher is not None and matcher.ended and not matcher.error:
            return FinishReason.STOP  # nothing can follow, whatever min_tokens and ignore_eos say
        full = len(request.tokens) >= self.scheduler.max_model_len
        return FinishReason.LENGTH if full or request.num_output >= stop.max_tokens else None

    # -- the edges ---------------------------------------------------------------------------------

    def _check_already_done(self, request: Request) -> None:
        """A retry may bring an answer that needs nothing more."""
        stop = request.work.stop
        if stop is None or not request.work.output:
            return
        reason = self._ending(request, request.tokens[-1])
        if reason:
            self._finish(request, reason)

    def _on_admitted(self, request: Request) -> None:
        size = self.scheduler.block_size
        cached = request.num_hashed * size
        self._metrics.prefix_cache_queries.inc(len(request.tokens))
        self._metrics.prefix_cache_hits.inc(cached)
        self.totals.prompt_tokens_cached += cached
        self._announce(request)
        if request.state is State.FETCHING and self.pool.has_forgotten([request.work.source]):
            self._finish(request, FinishReason.ABORTED, _from_sick_peer())
        elif request.state is State.FETCHING:
            first, names = request.num_hashed, request.whole_hashes(size)
            blocks = request.table.blocks[first : len(names)]
            tokens = request.tokens[: len(names) * size]
            self._events.append(FetchEvent(request.key, first, blocks, names[first:], tokens))
        elif not request.samples and request.num_pending == 0:
            self._finish(request, FinishReason.STOP)

    def _announce(self, request: Request) -> None:
        if request.work.announce_from < 0 or request.num_hashed <= request.num_announced:
            return
        first, end = request.num_announced, request.num_hashed
        blocks = request.table.blocks[first:end]
        self.pool.pin(blocks)
        request.num_announced = end
        self._events.append(
            AnnouncedEvent(
                request.key, first, blocks, request.hashes[first:end], self._generations(blocks)
            )
        )

    def _finish(
        self, request: Request, reason: FinishReason, error: DiptychError | None = None
    ) -> None:
        if request.state is State.FINISHED:
            return
        self.scheduler.remove(request)
        request.move(State.FINISHED)
        del self._requests[request.key]
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.finish(str(request.key))
        self._events.append(
            FinishedEvent(
                key=request.key,
                reason=reason,
                matched_stop=request.matched_stop,
                counts=self._counts(request),
                error=error,
            )
        )

    def _counts(self, request: Request) -> Counts:
        return Counts(
            num_cached_tokens=request.num_cached_tokens,
            num_draft_tokens=request.num_draft_tokens,
            num_accepted_tokens=request.num_accepted_tokens,
            queue_s=(request.admitted_s or self._clock()) - request.arrival_s,
        )

    def _generations(self, blocks: Sequence[int]) -> list[int]:
        return [int(g) for g in self.pool.generations[list(blocks)]]

    def _count_prompt(self, request: Request, planned: PlannedRow) -> None:
        """Count what was computed of the prompt; a decode row's token belongs to the answer."""
        computed = min(planned.num_tokens, max(0, request.num_prompt - request.num_computed))
        self.totals.prompt_tokens_computed += computed
        self._metrics.prompt_tokens.inc(computed)

    def _record_load(self) -> None:
        pool, scheduler, metrics = self.pool, self.scheduler, self._metrics
        metrics.num_requests_running.set(len(scheduler.active))
        metrics.num_requests_waiting.set(len(scheduler.waiting))
        metrics.set_blocks(free=pool.num_free, cached=pool.num_cached, held=pool.num_held)
        metrics.num_preemptions.inc(scheduler.num_preemptions - self._num_preemptions)
        self._num_preemptions = scheduler.num_preemptions

    def load(self) -> LoadReport:
        """The load at this moment, as a value for other threads."""
        pool, scheduler, totals = self.pool, self.scheduler, self.totals
        return LoadReport(
            num_running=len(scheduler.active),
            num_waiting=len(scheduler.waiting),
            waiting_tokens=scheduler.waiting_tokens,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            held_blocks=pool.num_held,
            total_blocks=pool.num_blocks,
            prompt_tokens_computed=totals.prompt_tokens_computed,
            prompt_tokens_cached=totals.prompt_tokens_cached,
            draft_tokens=totals.draft_tokens,
            accepted_tokens=totals.accepted_tokens,
            degraded_until_s=self._degraded_until_s,
            role_budgets=scheduler.role_budgets,
        )


def _from_sick_peer() -> Unavailable:
    """What a request ends with whose prefill worker's blocks are not to be used."""
    return Unavailable("blocks of this prefill worker were not finite", lost="prefill", sick=True)
