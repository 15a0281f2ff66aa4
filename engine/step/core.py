"""The engine: one short step() over ragged rows, for both roles. It knows no thread and no wire.

    admit -> plan -> draft -> launch ... collect -> sample -> accept
                                                       '--> not finite: faults.discard

    EngineCore   requests in, events out
      Scheduler          queues, block tables, the plan of each step
      Lifecycle          requests by key, their events
      ModelRunner        the forward pass; DraftKv: the draft model's
      StepSampler        tokens and log-probabilities from logits
      ConstrainedAnswers masks, and which answers wait for one
      Acceptor           progress, counters
      Faults             numbers that are not finite

Every request that was added gives exactly one FinishedEvent. What an event hands over (the pinned
blocks of an AnnouncedEvent) belongs to its receiver. One thread owns all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.attention.batch import Row
from engine.base.errors import Unavailable
from engine.base.types import FinishReason
from engine.runner.base import ModelRunner, StepOutput
from engine.sampling import Sampler
from engine.scheduling.block_table import BlockTable
from engine.scheduling.events import Event
from engine.scheduling.holds import EngineHolds, RequestHold
from engine.scheduling.load import Limits, LoadReport
from engine.scheduling.plan import PlannedRow
from engine.scheduling.request import EngineRequest, Request, State
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import PENDING
from engine.step.accept import Acceptor
from engine.step.constrained import ConstrainedAnswers
from engine.step.draft_kv import DraftKv
from engine.step.faults import Faults
from engine.step.health import Health, Unchecked
from engine.step.lifecycle import Lifecycle, degraded_peer
from engine.step.step_sampler import SampledRow, StepSampler
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import WorkerMetrics
from engine.telemetry.stopwatch import Stopwatch

_log = get_logger(__name__)


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
        self._runner = runner
        self._draft_kv = DraftKv(draft_runner, scheduler.block_size) if draft_runner else None
        self._health = health or Unchecked()
        self._metrics = metrics
        self._clock = clock
        self._lifecycle = Lifecycle(scheduler, clock)
        self._requests = self._lifecycle.requests
        self._faults = Faults(scheduler, self._lifecycle, self._health, metrics, clock)
        self._sampler = StepSampler(sampler)
        self._constrained = ConstrainedAnswers(sampler.vocab_size, metrics, self._lifecycle)
        self._acceptor = Acceptor(
            scheduler, self._lifecycle, self._sampler, self._constrained, metrics
        )
        self.totals = self._acceptor.totals
        self._num_failures = 0  # steps in a row
        self._num_preemptions = 0  # of those, counted in the metrics

    # -- operations --------------------------------------------------------------------------------

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
        """Queue a request under a fresh key. A retry may bring an answer that is complete."""
        table = BlockTable(self.pool, self.scheduler.block_size)
        request = Request(key, work, table, self._clock())
        self._requests[key] = request
        self.scheduler.add(request)
        is_retry = work.stop is not None and bool(work.output)
        if is_retry and (reason := self._acceptor.ending(request, request.tokens[-1])):
            self._lifecycle.finish(request, reason)

    def abort(self, key: int) -> None:
        """End a request now, unless it is unknown. No NIXL read may still write to its blocks."""
        if request := self._requests.get(key):
            self._lifecycle.finish(request, FinishReason.ABORTED)

    def abandon_production(self, key: int) -> None:
        """Let other requests compute the blocks that this one was to fetch or compute."""
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
                self._lifecycle.finish(request, FinishReason.ABORTED, degraded_peer())

    def forget(self, source: str, *, for_good: bool = True) -> None:
        """Use no block that a peer, by its incarnation, had a part in; see `Faults.forget`."""
        self._faults.forget(source, for_good=for_good)

    def hold(self, hashes: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin the longest leading run of these blocks; returns their ids and generations."""
        blocks = self.pool.match(hashes)
        self.pool.pin(blocks)
        return blocks, self._lifecycle.generations(blocks)

    def pin(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block."""
        self.pool.pin(blocks)

    def unpin(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block."""
        self.pool.release(blocks)

    # -- reports -----------------------------------------------------------------------------------

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        return self._lifecycle.take_events()

    def holds(self) -> EngineHolds:
        """Every request with its blocks, and the pool, at this moment."""
        now_s = self._clock()
        requests = [
            RequestHold(
                request_id=request.work.request_id,
                state=request.state.value,
                is_answer=request.is_answer,
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
            degraded_until_s=self._faults.degraded_until_s,
            role_budgets=scheduler.role_budgets,
        )

    @property
    def idle(self) -> bool:
        """Whether no step can compute anything before a message comes."""
        return not self.scheduler.waiting and all(
            r.state is State.FETCHING for r in self.scheduler.active
        )

    # -- the step ----------------------------------------------------------------------------------

    def step(self) -> bool:
        """One pass; False if there was nothing to compute."""
        watch = Stopwatch(self._clock)
        now_s = self._clock()
        for request in self.scheduler.admit(now_s):
            self._admitted(request)
        held = self._constrained.held(self.scheduler.active)
        plan = self.scheduler.plan(now_s, held)
        watch.lap("schedule")
        accepted = bool(plan) and self._compute(plan, watch)
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
            if self.scheduler.speculation is not None and decoding and accepted:
                verified_s = sum(watch.laps.values()) - watch.laps.get("draft", 0.0)
                self.scheduler.speculation.stepped(num_rows, verified_s)
        return bool(plan or held)

    def _admitted(self, request: Request) -> None:
        cached = request.num_hashed * self.scheduler.block_size
        self._metrics.prefix_cache_queries.inc(len(request.tokens))
        self._metrics.prefix_cache_hits.inc(cached)
        self.totals.prompt_tokens_cached += cached
        self._lifecycle.admitted(request)

    def _compute(self, plan: Sequence[PlannedRow], watch: Stopwatch) -> bool:
        """Run the model and accept its tokens; returns whether the step counts.

        A failure ends the requests of this step, not the worker: until `accept` no request has
        changed, so ending them leaves a consistent state. A second failure in a row is the
        device's, not a request's: it is raised. So is SelfTestFailed: a worker that has failed
        shows first that it still computes what it should.
        """
        try:
            plan, draft_ends = self._draft(plan, watch)
            output, sampled = self._forward(plan, watch)
        except Exception as error:
            self._metrics.engine_step_failures.inc()
            self._num_failures += 1
            if self._num_failures > 1:
                raise
            request_ids = [planned.request.work.request_id for planned in plan]
            _log.exception("step failed", request_ids=request_ids)
            for planned in plan:
                fault = Unavailable(f"step failed: {error}")
                self._lifecycle.finish(planned.request, FinishReason.ABORTED, fault)
            self._faults.test()
            return False
        self._num_failures = 0
        if broken := [row.planned.request for row in sampled if row.broken]:
            self._faults.discard(broken)
            return False
        self._acceptor.accept(sampled, output.logits, draft_ends)
        return True

    def _draft(
        self, plan: Sequence[PlannedRow], watch: Stopwatch
    ) -> tuple[Sequence[PlannedRow], dict[int, int]]:
        """The plan with tokens in place of PENDING ones; how far the draft model's KV reaches."""
        speculation, drafted = self.scheduler.speculation, {}
        pending = [p for p in plan if p.draft and PENDING in p.draft] if speculation else []
        if speculation is not None and pending:
            rows = [_fitting(row) for row in speculation.drafter.materialize(pending)]
            drafted = {row.request.key: row for row in rows}
            plan = [drafted.get(row.request.key, row) for row in plan]
        if self._draft_kv is None:
            return plan, {}
        ends = self._draft_kv.compute(plan, drafted)
        watch.lap("draft")
        return plan, ends

    def _forward(
        self, plan: Sequence[PlannedRow], watch: Stopwatch
    ) -> tuple[StepOutput, list[SampledRow]]:
        """Launch and collect the model's step; the tokens that its logits give."""
        self._constrained.begin(plan)
        rows = [_model_row(planned) for planned in plan]
        pending = self._runner.launch(rows)
        output = pending.collect()
        watch.lap("forward")
        masks, late = self._constrained.wait(plan)
        if masks:
            watch.lap("mask")
        sampled = self._sampler.sample(plan, output.logits, masks, late)
        for index in self._health.unsound_prompts(rows):
            sampled[index].broken = True
        watch.lap("sample")
        return output, sampled

    def _record_load(self) -> None:
        pool, scheduler, metrics = self.pool, self.scheduler, self._metrics
        metrics.num_requests_running.set(len(scheduler.active))
        metrics.num_requests_waiting.set(len(scheduler.waiting))
        metrics.set_blocks(free=pool.num_free, cached=pool.num_cached, held=pool.num_held)
        metrics.num_preemptions.inc(scheduler.num_preemptions - self._num_preemptions)
        self._num_preemptions = scheduler.num_preemptions


def _fitting(row: PlannedRow) -> PlannedRow:
    """The row with as much of its draft as its constraint allows."""
    matcher = row.request.work.matcher
    return row if matcher is None else row.with_draft(row.draft[: matcher.num_valid(row.draft)])


def _model_row(planned: PlannedRow) -> Row:
    request, start = planned.request, planned.request.num_computed
    tokens = request.tokens[start : start + planned.num_tokens]
    if planned.draft:
        tokens += planned.draft
    return Row(tokens, start, request.table.ids, planned.num_logits)
