"""From a plan to the rows that the model computes."""

from __future__ import annotations

import numpy as np

from engine.attention.batch import Row, StepRows
from engine.scheduling.plan import Plan, PlannedRow


def model_rows(plan: Plan) -> StepRows:
    """The slots' newest tokens with their drafts, and then the rows: what the model computes."""
    slots, count = plan.slots, len(plan.slots)
    token_ids = np.column_stack([slots.newest[:count], slots.drafts])
    plain = StepRows(
        token_ids[token_ids >= 0],
        slots.length[:count] - 1,
        slots.num_draft + 1,
        slots.num_draft + 1,
        slots.tables.copy(),
    )
    return plain.followed_by([_row(row) for row in plan.rows])


def _row(planned: PlannedRow) -> Row:
    request, start = planned.request, planned.request.num_computed
    tokens = request.tokens[start : start + planned.num_tokens]
    if planned.draft:
        tokens += planned.draft
    return Row(tokens, start, request.table.ids, planned.num_logits)
