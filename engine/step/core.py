"""The engine: one short step() over ragged rows, for both roles. It knows no thread and no wire.

    admit -> plan -> draft -> launch ... collect -> sample -> accept
                                                       '--> not finite: faults.discard

    EngineCore   requests in, events out
      Scheduler          queues, block tables, the plan of each step
      Lifecycle          requests by key, their events
      ModelRunner        the forward pass; a Drafter owns its own
      StepSampler        tokens and log-probabilities from logits
      ConstrainedAnswers masks, and which answers wait for one
      Acceptor           progress, counters
      Faults             numbers that are not finite

Every request that was added gives exactly one FinishedEvent. What an event hands over (the pinned
blocks of an AnnouncedEvent) belongs to its receiver. One thread owns all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from engine.base.errors import Unavailable
from engine.base.types import FinishReason, RoleBudgets
from engine.runner.base import ModelRunner, StepOutput
from engine.sampling import Sampler
from engine.scheduling.block_table import BlockTable
from engine.scheduling.drafts import fitted_row
from engine.scheduling.events import Event
from engine.scheduling.holds import EngineHolds, holds_of
from engine.scheduling.load import LoadReport
from engine.scheduling.plan import Plan
from engine.scheduling.request import EngineRequest, Request, State
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import PENDING
from engine.step.accept import Acceptor
from engine.step.constrained import ConstrainedAnswers
from engine.step.faults import Faults
from engine.step.health import Health
from engine.step.lifecycle import Lifecycle, degraded_peer
from engine.step.model_rows import model_rows
from engine.step.step_sampler import Sampled, StepSampler
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
        health: Health | None = None,
    ) -> None:
        """`health` checks the numbers; None: nothing is checked."""
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self._runner = runner
        self._health = health or Health()
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

    def add(self, key: int, work: EngineRequest) -> None:
        """Queue a request under a fresh key. A retry may bring an answer that is complete."""
        scheduler = self.scheduler
        columns = (scheduler.windows, scheduler.blocks_ahead)
        table = BlockTable(self.pool, scheduler.block_size, *columns)
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
            else:
                self.scheduler.go_on(request)

    def forget(self, source: str, *, for_good: bool = True) -> None:
        """Use no block that a peer, by its incarnation, had a part in; see `Faults.forget`."""
        self._faults.forget(source, for_good=for_good)

    def hold(self, hashes: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin the longest leading run of these blocks; returns their ids and generations."""
        blocks = self.pool.match(hashes)
        self.pool.pin(blocks)
        return blocks, self._lifecycle.generations(blocks)

    def pin(self, blocks: Sequence[int]) -> Sequence[int]:
        """Add one reference to each block; returns the blocks."""
        self.pool.pin(blocks)
        return blocks

    def unpin(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block."""
        self.pool.release(blocks)

    def set_role_budgets(self, role_budgets: RoleBudgets) -> None:
        """Take so much from others from the next step on."""
        self.scheduler.set_role_budgets(role_budgets)

    # -- reports -----------------------------------------------------------------------------------

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        return self._lifecycle.take_events()

    def holds(self) -> EngineHolds:
        """Every request with its blocks, and the pool, at this moment."""
        return holds_of(self._requests.values(), self.pool, self._clock())

    def load(self) -> LoadReport:
        """The load at this moment, as a value for other threads."""
        pool, scheduler = self.pool, self.scheduler
        return LoadReport(
            num_running=len(scheduler.active),
            num_waiting=len(scheduler.waiting),
            waiting_tokens=scheduler.waiting_tokens,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            held_blocks=pool.num_held,
            total_blocks=pool.num_blocks,
            totals=replace(self.totals),
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
        # Its slots change when the step is accepted.
        num_tokens, decoding = plan.num_tokens, all(row.num_tokens == 1 for row in plan.rows)
        accepted = num_tokens > 0 and self._compute(plan, watch)
        if num_tokens:
            self._constrained.look(self.scheduler.active)
        elif held:
            self._constrained.wait_for_late()
        self._record_load()
        watch.lap("emit")
        if num_tokens:
            self._metrics.iteration_tokens.observe(num_tokens)
            self._metrics.step_took(watch.laps)
            # Tokens of prompts have no logits: their cost does not apply to drafts.
            if self.scheduler.speculation is not None and decoding and accepted:
                verified_s = sum(watch.laps.values()) - watch.laps.get("draft", 0.0)
                self.scheduler.speculation.stepped(num_tokens, verified_s)
        return bool(num_tokens or held)

    def _admitted(self, request: Request) -> None:
        cached = request.num_hashed * self.scheduler.block_size
        self._metrics.prefix_cache_queries.inc(len(request.tokens))
        self._metrics.prefix_cache_hits.inc(cached)
        self.totals.prompt_tokens_cached += cached
        self._lifecycle.admitted(request)

    def _compute(self, plan: Plan, watch: Stopwatch) -> bool:
        """Run the model and accept its tokens; returns whether the step counts.

        A failure ends the requests of this step, not the worker: until `accept` no request has
        changed, so ending them leaves a consistent state. A second failure in a row is the
        device's, not a request's: it is raised. So is SelfTestFailed: a worker that has failed
        shows first that it still computes what it should.
        """
        try:
            plan = self._draft(plan, watch)
            output, sampled = self._forward(plan, watch)
            draft_ends = self._observe(plan, output, watch)
        except Exception as error:
            self._metrics.engine_step_failures.inc()
            self._num_failures += 1
            if self._num_failures > 1:
                raise
            requests = plan.requests
            _log.exception("step failed", request_ids=[r.work.request_id for r in requests])
            for request in requests:
                fault = Unavailable(f"step failed: {error}")
                self._lifecycle.finish(request, FinishReason.ABORTED, fault)
            self._faults.test()
            return False
        self._num_failures = 0
        if sampled.broken:
            self._faults.discard(sampled.broken)
            return False
        self._acceptor.accept(plan.slots, sampled, output.logits, draft_ends)
        return True

    def _draft(self, plan: Plan, watch: Stopwatch) -> Plan:
        """The plan with tokens in place of PENDING ones."""
        speculation = self.scheduler.speculation
        pending = [p for p in plan.rows if p.draft and PENDING in p.draft] if speculation else []
        if speculation is None or not pending:
            return plan
        rows = [fitted_row(row) for row in speculation.drafter.materialize(pending)]
        drafted = {row.request.key: row for row in rows}
        watch.lap("draft")
        return Plan(plan.slots, [drafted.get(row.request.key, row) for row in plan.rows])

    def _observe(self, plan: Plan, output: StepOutput, watch: Stopwatch) -> Mapping[int, int]:
        """By request key, how far the drafter's own KV reaches."""
        speculation = self.scheduler.speculation
        if speculation is None:
            return {}
        ends = speculation.drafter.observe(output, plan.rows)
        if ends:
            watch.lap("draft")
        return ends

    def _forward(self, plan: Plan, watch: Stopwatch) -> tuple[StepOutput, Sampled]:
        """Launch and collect the model's step; the tokens that its logits give."""
        self._constrained.begin(plan.rows)
        rows = model_rows(plan)
        pending = self._runner.launch(rows)
        output = pending.collect()
        watch.lap("forward")
        masks, late = self._constrained.wait(plan.rows)
        if masks:
            watch.lap("mask")
        sampled = self._sampler.sample(plan, output.logits, masks, late)
        if plan.rows:
            unsound = [
                plan.rows[i - len(plan.slots)].request for i in self._health.unsound_prompts(rows)
            ]
            sampled.broken.extend(request for request in unsound if request not in sampled.broken)
        watch.lap("sample")
        return output, sampled

    def _record_load(self) -> None:
        pool, scheduler, metrics = self.pool, self.scheduler, self._metrics
        metrics.num_requests_running.set(len(scheduler.active))
        metrics.num_requests_waiting.set(len(scheduler.waiting))
        metrics.set_blocks(free=pool.num_free, cached=pool.num_cached, held=pool.num_held)
        metrics.num_preemptions.inc(scheduler.num_preemptions - self._num_preemptions)
        self._num_preemptions = scheduler.num_preemptions
