"""Which rows the next step computes: admission, two budgets, preemption. It has no tensors.

    waiting  sorted by (priority, age)      holds nothing
    active   sorted by (priority, age)      FETCHING or RUNNING, each with its blocks

Priorities cannot keep a request out for ever: of FAIR_SHARE admissions one goes to the request that
has waited longest, whatever its priority, and from then on it precedes all others, so that it is
not preempted. Likewise one plan in FAIR_SHARE computes the oldest prompt first.

A request that waits for memory holds none: it is admitted only when its whole prompt and one draft
window fit. A running one that finds no block for its next token preempts the youngest running one,
which gives up everything and waits again. Its blocks keep their hashes, so it returns as a prefix
hit.

A request whose next missing block is in production by another one waits for it (holding nothing)
and takes over when the producer is gone or the wait has lasted `owner_wait_s`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Container
from itertools import chain

from engine.base.kv_columns import FULL
from engine.base.kv_layout import column_hash
from engine.base.types import RoleBudgets
from engine.scheduling.block_pool import BlockPool, NoRoom
from engine.scheduling.drafts import DraftPlanner
from engine.scheduling.load import Limits
from engine.scheduling.plan import (
    FAIR_SHARE,
    FIRST_RANK,
    MAX_SCORED,
    MAX_SCORED_BESIDE,
    Budgets,
    Plan,
    PlannedRow,
    StepBudget,
    blocks_ahead,
)
from engine.scheduling.prefix_hits import PrefixHits, find_hits
from engine.scheduling.request import NO_SLOT, Request, State
from engine.scheduling.slots import DecodeSlots, is_plain
from engine.scheduling.speculation import Speculation


class Scheduler:
    """Queues and the plan of each step. Owned by the engine thread."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        budgets: Budgets,
        speculation: Speculation | None,
        max_model_len: int,
        windows: tuple[int, ...] = FULL,
    ) -> None:
        """`windows`: of the columns of block tables, see kv_columns."""
        self.pool = pool
        self.windows = windows
        self.block_size = block_size
        self.budgets = budgets
        self.role_budgets = RoleBudgets(budgets.prompt_tokens, budgets.num_seqs)
        self.speculation = speculation
        self.max_model_len = max_model_len
        self.slots = DecodeSlots(max_model_len)
        self.waiting: list[Request] = []
        self.active: list[Request] = []
        self.num_preemptions = 0
        self._has_slots = not (speculation and speculation.drafter.has_kv)
        self._num_admitted = self._num_plans = 0  # since the oldest had its turn
        self._producers: dict[bytes, Request] = {}  # hash of a block in production -> its producer

    def set_role_budgets(self, role_budgets: RoleBudgets) -> None:
        """Take so much of others from now on, at most what the step's own budgets allow.

        A budget of 0 bounds nothing here: the worker refuses new calls, and the requests that it
        took before finish as fast as the step's budgets allow.
        """
        self.role_budgets = RoleBudgets(
            min(role_budgets.prompt_tokens, self.budgets.prompt_tokens),
            min(role_budgets.answers, self.budgets.num_seqs),
        )

    @property
    def limits(self) -> Limits:
        """What one request may need; its draft window is at most a block.

        A longer draft uses spare blocks.
        """
        speculation, size = self.speculation, self.block_size
        window = min(speculation.max_draft_tokens, size) if speculation else 0
        columns = (self.windows, self.blocks_ahead)
        return Limits(self.pool.num_blocks, size, self.max_model_len, window, *columns)

    @property
    def blocks_ahead(self) -> int:
        """Blocks that a column with a window holds ahead: a step's prompt tokens and a draft."""
        return blocks_ahead(self.budgets.prompt_tokens, self.block_size)

    @property
    def waiting_tokens(self) -> int:
        """Known tokens to compute, without those of answers under way."""
        pending = (r for r in chain(self.waiting, self.active) if r.slot == NO_SLOT)
        return sum(r.num_pending for r in pending if r.num_pending > 1)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        bisect.insort(self.waiting, request, key=lambda r: r.sort_key)

    def remove(self, request: Request) -> None:
        """Take a request out wherever it stands and give back all it holds."""
        if request in self.active:
            self.active.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.slots.leave(request)
        self.abandon_production(request)
        request.table.release()

    # -- admission ---------------------------------------------------------------------------------

    def admit(self, now_s: float) -> list[Request]:
        """Give room to as many waiting requests as fit, in order; returns them.

        No request overtakes one that waits for memory. One that waits for another's block is
        passed by.
        """
        admitted: list[Request] = []
        if not self.waiting:
            return admitted
        max_answers = self.role_budgets.answers or self.budgets.num_seqs
        num_answers = sum(request.is_answer for request in self.active)
        left = list(self.waiting)
        while left and len(self.active) < self.budgets.num_seqs:
            request = left[0]
            if self._num_admitted >= FAIR_SHARE - 1 and request.rank < left[-1].rank:
                request = min(left, key=lambda r: (r.arrival_s, r.key))
            is_first = request is left[0]
            left.remove(request)
            if request.is_answer and num_answers >= max_answers:
                continue
            if self._waits_for_producer(request, now_s):
                continue
            if not self._reserve(request):
                break
            self.waiting.remove(request)
            self._num_admitted = (self._num_admitted + 1) % FAIR_SHARE
            if not is_first:
                request.rank = FIRST_RANK
            self._enter(request, now_s)
            num_answers += request.is_answer
            admitted.append(request)
        return admitted

    def _reserve(self, request: Request) -> bool:
        """Pin its hits and take the rest of its room, or leave everything as it was."""
        size = self.block_size
        hits = self._hits(request)
        end = len(request.tokens) // size
        if request.is_answer:
            end = self.limits.entries_needed(len(request.tokens))
        first = request.num_whole(size) if request.fetches else hits.num_entries
        place = (hits.columns, hits.num_entries, first * size, end)
        needed = request.table.needed(*place)
        if needed + self.pool.num_cached_of(hits.blocks) > self.pool.num_available:
            return False
        request.table.open(*place)
        request.num_hashed = hits.num_entries
        request.sources = self.pool.sources(hits.blocks)
        request.num_computed = hits.num_entries * size
        request.draft_lag = 0  # a block with a hash holds the draft model's KV, too
        return True

    def _hits(self, request: Request) -> PrefixHits:
        """Cached blocks from which the request can go on."""
        size = self.block_size
        hashes = request.hittable_hashes(size)
        position = request.num_whole(size) * size if request.fetches else None
        return find_hits(self.pool, hashes, self.windows, size, position)

    def _enter(self, request: Request, now_s: float) -> None:
        hashes = request.whole_hashes(self.block_size)
        if not request.admitted_s:
            request.admitted_s = now_s
            request.num_cached_tokens = min(request.num_computed, request.num_prompt)
        for block_hash in hashes[request.num_hashed :]:
            self._producers.setdefault(block_hash, request)
        fetching = request.fetches and request.num_hashed < len(hashes)
        request.move(State.FETCHING if fetching else State.RUNNING)
        bisect.insort(self.active, request, key=lambda r: r.sort_key)

    def _waits_for_producer(self, request: Request, now_s: float) -> bool:
        hashes = request.hittable_hashes(self.block_size)
        hits = self._hits(request).num_entries
        producer = self._producers.get(hashes[hits]) if hits < len(hashes) else None
        return producer is not None and now_s - request.arrival_s < self.budgets.owner_wait_s

    def abandon_production(self, request: Request) -> None:
        """Let requests that wait for this one's blocks compute them."""
        for block_hash in request.hashes[request.num_hashed :]:
            if self._producers.get(block_hash) is request:
                del self._producers[block_hash]

    # -- one step ----------------------------------------------------------------------------------

    def plan(self, now_s: float = 0.0, held: Container[int] = ()) -> Plan:
        """The next step: plain answers, then decode rows, then prompt chunks under the budget.

        The requests of the keys `held` give no token in it.
        """
        decoding: list[Request] = []
        prompts: list[Request] = []
        without_room = set(self.slots.without_room())
        for request in list(self.active):  # the oldest first; those preempted for it come later
            if request.slot != NO_SLOT and request not in without_room:
                continue
            if request.state is not State.RUNNING:
                continue
            num_tokens = len(request.tokens)
            if not request.is_answer or num_tokens - request.num_computed != 1:
                if self._make_room_ahead(request):
                    prompts.append(request)
            elif held and request.key in held:
                continue
            elif request.table.num_positions >= num_tokens or self._make_room(request, num_tokens):
                if request.slot != NO_SLOT:
                    self.slots.got_blocks(request)
                elif self._has_slots and is_plain(request):
                    if self.speculation is not None:
                        self.speculation.id_of(request)
                    self.slots.enter(request)
                else:
                    decoding.append(request)
        prompts = [r for r in prompts if r.state is State.RUNNING]  # not preempted for a later one
        prompts.sort(key=lambda r: self._turn(r, now_s))
        self._let_the_oldest_go_first(prompts)
        num_decoding = len(self.slots) + len(decoding)
        max_scored = MAX_SCORED_BESIDE if num_decoding else MAX_SCORED
        for_others = self.role_budgets.prompt_tokens or None
        budget = StepBudget(self.budgets.prompt_tokens, max_scored, for_others)
        chunks: list[PlannedRow] = []
        for request in prompts:
            if count := budget.take(request, self.block_size, request.key in held):
                chunks.append(PlannedRow.of(request, count))
        if self.speculation is None:
            self.slots.set_no_drafts()
            rows = [PlannedRow(r, 1, (), 0, int(r.wants_tokens)) for r in decoding]
            return Plan(self.slots, rows + chunks)
        num_queued = self.limits.room_needed(len(self.waiting[0].tokens)) if self.waiting else 0
        num_columns = len(self.windows)
        spare = max(0, self.pool.num_available - num_decoding * num_columns - num_queued)
        spare //= num_columns
        planner = DraftPlanner(
            self.speculation, self.slots, self.block_size, self.max_model_len, spare
        )
        rows = planner.plan(decoding, chunks, self.budgets.num_logits)
        return Plan(self.slots, rows)

    def _let_the_oldest_go_first(self, prompts: list[Request]) -> None:
        """Once in FAIR_SHARE of the plans in which priorities decide."""
        if len({request.rank for request in prompts}) < 2:
            return
        self._num_plans = (self._num_plans + 1) % FAIR_SHARE
        if not self._num_plans:
            oldest = min(prompts, key=lambda r: (r.arrival_s, r.key))
            prompts.remove(oldest)
            prompts.insert(0, oldest)

    def _turn(self, request: Request, now_s: float) -> tuple[int, float]:
        """Which prompt goes first: of one priority, the one with the least left to compute.

        That is the order with the shortest mean time to the first token (Smith 1956; Schrage 1968),
        and by what it has waited a long prompt grows shorter, so none waits for ever.
        """
        waited_s = now_s - request.arrival_s
        left = request.num_pending - waited_s * self.budgets.aging_tokens_per_s
        return request.rank, left

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Blocks for `num_tokens` positions, at the cost of the youngest; False: that was it."""
        return self._preempt_until(request, lambda: request.table.reserve(num_tokens))

    def _make_room_ahead(self, request: Request) -> bool:
        """Blocks for a prompt's next chunk in columns with a window, likewise."""
        table, position = request.table, request.num_computed
        return self._preempt_until(request, lambda: table.reserve_ahead(position))

    def _preempt_until(self, request: Request, reserve: Callable[[], None]) -> bool:
        while True:
            try:
                reserve()
                return True
            except NoRoom:
                victim = self._youngest_running()
                self.preempt(victim)
                if victim is request:
                    return False

    def _youngest_running(self) -> Request:
        return next(r for r in reversed(self.active) if r.state is State.RUNNING)

    def preempt(self, request: Request) -> None:
        """Let a running request wait, holding nothing; its blocks with a hash stay findable."""
        self.remove(request)
        request.num_computed = request.num_hashed = request.draft_lag = 0
        request.move(State.WAITING)
        self.num_preemptions += 1
        self.add(request)

    # -- progress ----------------------------------------------------------------------------------

    def advance(self, request: Request, num_computed: int, draft_lag: int = 0) -> None:
        """KV of accepted tokens is complete up to `num_computed`: set the hashes of full blocks.

        A draft model's KV reaches `draft_lag` positions less far.
        """
        assert num_computed >= request.num_computed
        request.num_computed = num_computed
        request.draft_lag = draft_lag
        full = (num_computed - draft_lag) // self.block_size
        if full <= request.num_hashed:
            return
        if full > len(request.hashes):
            request.whole_hashes(self.block_size)
        for index in range(request.num_hashed, full):
            block_hash = request.hashes[index]
            for column, block in request.table.entry(index):
                hashed = column_hash(block_hash, column)
                self.pool.set_hash(block, hashed, request.sources)
            if self._producers.get(block_hash) is request:
                del self._producers[block_hash]
        request.num_hashed = full
        if self.windows != FULL and request.table.release_behind(num_computed):
            self.slots.got_blocks(request)

    def go_on(self, request: Request) -> None:
        """Let a running request compute what its peer did not send.

        Blocks of columns with a window were to come for the prompt's end alone. Where they did not,
        it waits again and begins where all columns have what it reads.
        """
        if not request.table.covers(request.num_computed):
            request.may_fetch = False
            self.preempt(request)
            self.num_preemptions -= 1
