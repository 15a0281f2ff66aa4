"""A smaller model with the same vocabulary drafts.

Its layers lie in the target's KV blocks (`engine.base.kv_layout`), so whoever computes, moves,
names or hits a block has its KV, too, and it never has a prompt to catch up with. A step's drafts
are written together, a pass a token:

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

from collections.abc import Callable, Sequence

from decode.speculative.step_cost import StepCost
from engine.attention.batch import Row
from engine.runner.base import ModelRunner
from engine.sampling import Sampler, UnusableLogits
from engine.scheduling.plan import PlannedRow
from engine.scheduling.speculation import PENDING, Draft
from engine.telemetry.log import get_logger

_log = get_logger(__name__)


class ModelDrafter:
    """Promises as many tokens as it is asked for, and writes those that are chosen."""

    name = "model"
    acceptance = (0.7,)

    def __init__(
        self, runner: ModelRunner, sampler: Sampler, cost: StepCost, clock: Callable[[], float]
    ) -> None:
        """`cost` learns what a pass takes."""
        self._runner = runner
        self._sampler = sampler
        self._cost = cost
        self._clock = clock
        self._promises: dict[str, Draft] = {}

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> Draft:
        """A promise; `write` puts the tokens into it, too."""
        count = max(0, max_tokens)
        draft = self._promises[request_id] = Draft([PENDING] * count, [0] * count)
        return draft

    def materialize(self, rows: Sequence[PlannedRow]) -> None:
        """Draft for all rows at once. A draft ends early where it ends the answer."""
        wanted = {id(row): len(row.draft) for row in rows}
        for row in rows:
            row.draft.clear()
        going = list(rows)
        while going:
            going = [
                row
                for row, token in zip(going, self._pass(going), strict=True)
                if self._goes_on(row, token, wanted[id(row)])
            ]
        for row in rows:
            self._promises[str(row.request.key)].tokens[: len(row.draft)] = row.draft

    def finish(self, request_id: str) -> None:
        """Forget the request's promise."""
        self._promises.pop(request_id, None)

    @staticmethod
    def _goes_on(row: PlannedRow, token: int, wanted: int) -> bool:
        if token == PENDING:
            return False
        row.draft.append(token)
        stop = row.request.work.stop
        return len(row.draft) < wanted and not (stop and token in stop.stop_token_ids)

    def _pass(self, rows: Sequence[PlannedRow]) -> list[int]:
        """The next token of each row's draft; PENDING where the model gives none."""
        begun_s = self._clock()
        model_rows = [self._model_row(row) for row in rows]
        logits = self._runner.run(model_rows)
        sample_rows = [row.request.sample_row(row.draft) for row in rows]
        try:
            tokens = self._sampler.sample(logits, sample_rows)
        except UnusableLogits as error:  # no reason to look further: the target will tell
            _log.warning("the draft model's logits are unusable", reason=str(error))
            tokens = [PENDING] * len(rows)
        self._cost.observe(sum(len(r.token_ids) for r in model_rows), self._clock() - begun_s)
        return tokens

    @staticmethod
    def _model_row(row: PlannedRow) -> Row:
        request = row.request
        if row.draft:
            start = request.num_computed + len(row.draft)
            return Row([row.draft[-1]], start, request.table.blocks, 1)
        start = request.num_computed - request.draft_lag
        return Row(request.tokens[start:], start, request.table.blocks, 1)
