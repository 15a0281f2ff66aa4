"""The draft model's KV of a step's tokens, where its drafter has not computed it.

The draft model's layers lie in the target's blocks, so each block needs both before it gets its
hash. A request without a draft is computed when nearly a block is missing, many tokens at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.attention.batch import Row
from engine.runner.base import ModelRunner
from engine.scheduling.plan import PlannedRow


class DraftKv:
    """Owned by the engine thread."""

    def __init__(self, runner: ModelRunner, block_size: int) -> None:
        self._runner = runner
        self._block_size = block_size

    def compute(self, plan: Sequence[PlannedRow], drafted: Collection[int]) -> dict[int, int]:
        """By request key, the position that the draft model's KV reaches, if the drafts stand.

        `drafted`: keys of the requests that the drafter has just computed drafts for.
        """
        ends: dict[int, int] = {}
        rows: list[Row] = []
        for planned in plan:
            request = planned.request
            start = request.num_computed - request.draft_lag
            end = request.num_computed + planned.num_tokens
            if request.key in drafted:
                end = request.num_computed + len(planned.draft)
            elif request.decoding and end - start < self._block_size:
                end = start
            else:
                rows.append(Row(request.tokens[start:end], start, request.table.ids, 0))
            ends[request.key] = end
        if rows:
            self._runner.launch(rows).collect()
        return ends
