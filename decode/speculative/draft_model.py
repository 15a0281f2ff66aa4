"""A smaller model with the same vocabulary drafts.

Its layers lie in the target's KV blocks (`engine.base.kv_layout`). A block that is computed, moved,
hashed or hit brings the draft model's KV, too, so the draft model never has to compute a prompt
afterwards. `observe` computes that KV after the target's pass, on a prefill worker, too: of prompt
chunks, and of answers without a draft. A step's drafts are computed together, a pass a token:

    tokens   ... t  t  p |                   p: the newest, position num_computed
    pass 1          t  p -> d0               t: what it has not computed yet; often none
    pass 2               d0 -> d1
    pass 3                     d1 -> d2      the KV of d2 is missing, if all three stand

Each token is the sampler's own, with the parameters, history, seed and position that the target's
token will have: the same noise. So a draft distribution that is near to the target's is coupled to
it and gives the same token more often than two independent samples would, and one that is equal to
it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from decode.speculative.step_cost import StepCost
from engine.attention.batch import Row
from engine.runner.base import ModelRunner
from engine.sampling import Sampler, UnusableLogits
from engine.scheduling.plan import PlannedRow
from engine.scheduling.request import Request
from engine.scheduling.speculation import (
    PENDING,
    DraftInputs,
    Drafts,
    Ints,
    StepResult,
    Tokens,
)
from engine.telemetry.log import get_logger

_log = get_logger(__name__)


class ModelDrafter:
    """Proposes PENDING tokens, and computes those that are chosen."""

    name = "model"
    has_kv = True
    acceptance = (0.7,)

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        block_size: int,
        cost: StepCost,
        clock: Callable[[], float],
    ) -> None:
        """`cost` learns what a pass takes."""
        self._runner = runner
        self._sampler = sampler
        self._block_size = block_size
        self._cost = cost
        self._clock = clock
        self._drafts = Drafts.empty(0, 0)  # proposed in the step under way
        self._row_of: dict[int, int] = {}  # of these, by draft id
        self._drafted: set[int] = set()  # keys of the requests drafted for in the step under way

    def propose(self, inputs: DraftInputs) -> Drafts:
        """PENDING tokens; `materialize` writes them into these drafts, too."""
        width = int(inputs.limits.max(initial=0))
        self._drafts = Drafts.empty(len(inputs.ids), width)
        self._drafts.buckets[:] = 0
        self._drafts.lengths[:] = inputs.limits
        self._row_of = {draft_id: row for row, draft_id in enumerate(inputs.ids.tolist())}
        return self._drafts

    def materialize(self, rows: Sequence[PlannedRow]) -> list[PlannedRow]:
        """Draft for all rows at once. A draft ends early where it ends the answer."""
        self._drafted = {row.request.key for row in rows}
        drafts: list[list[int]] = [[] for _ in rows]
        active = list(range(len(rows)))
        while active:
            tokens = self._pass([(rows[i].request, drafts[i]) for i in active])
            for i, token in zip(active, tokens, strict=True):
                if token != PENDING:
                    drafts[i].append(token)
            active = [
                i
                for i, token in zip(active, tokens, strict=True)
                if token != PENDING and self._continues(rows[i], drafts[i])
            ]
        for row, draft in zip(rows, drafts, strict=True):
            self._drafts.tokens[self._row_of[row.request.draft_id], : len(draft)] = draft
        return [row.with_draft(tuple(d)) for row, d in zip(rows, drafts, strict=True)]

    def observe(self, output: StepResult, rows: Sequence[PlannedRow]) -> Mapping[int, int]:
        """Compute the draft model's KV of a step's tokens that no draft has computed.

        Each block needs both models' KV before it gets its hash. A request without a draft is
        computed when nearly a block is missing, many tokens at once.
        """
        ends: dict[int, int] = {}
        missing: list[Row] = []
        for planned in rows:
            request = planned.request
            start = request.num_computed - request.draft_lag
            end = request.num_computed + planned.num_tokens
            if request.key in self._drafted:
                end = request.num_computed + len(planned.draft)
            elif request.decoding and end - start < self._block_size:
                end = start
            else:
                missing.append(Row(request.tokens[start:end], start, request.table.ids, 0))
            ends[request.key] = end
        self._drafted = set()
        if missing:
            self._runner.launch(missing).collect()
        return ends

    def produced(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        """Nothing: requests hold the tokens."""

    def finish(self, draft_id: int) -> None:
        """Nothing is kept of a request."""

    @staticmethod
    def _continues(row: PlannedRow, draft: Sequence[int]) -> bool:
        stop = row.request.work.stop
        return len(draft) < len(row.draft) and not (stop and draft[-1] in stop.stop_token_ids)

    def _pass(self, drafting: Sequence[tuple[Request, list[int]]]) -> list[int]:
        """The next token of each draft; PENDING where the model gives none."""
        begun_s = self._clock()
        rows = [self._model_row(request, draft) for request, draft in drafting]
        logits = self._runner.run(rows)
        # A copy of each draft: a sampled row is a value.
        sample_rows = [request.sample_row(tuple(draft)) for request, draft in drafting]
        try:
            tokens = self._sampler.sample(logits, sample_rows)
        except UnusableLogits as error:  # the target model decides what that means
            _log.warning("the draft model's logits are unusable", reason=str(error))
            tokens = [PENDING] * len(rows)
        self._cost.observe(sum(len(row.token_ids) for row in rows), self._clock() - begun_s)
        return tokens

    @staticmethod
    def _model_row(request: Request, draft: Sequence[int]) -> Row:
        if draft:
            start = request.num_computed + len(draft)
            return Row(draft[-1:], start, request.table.ids, 1)
        start = request.num_computed - request.draft_lag
        return Row(request.tokens[start:], start, request.table.ids, 1)
