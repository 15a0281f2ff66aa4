"""From a plan to the rows that the model computes."""

from __future__ import annotations

import numpy as np

from engine.attention.batch import Row, StepRows
from engine.scheduling.plan import Plan, PlannedRow


def model_rows(plan: Plan) -> StepRows:
    """The slots' newest tokens with their drafts, and then the rows: what the model computes."""
    slots, count = plan.slots, len(plan.slots)
    token_ids, num_tokens = slots.newest[:count].copy(), slots.num_draft + 1
    if slots.drafts.shape[1]:
        with_drafts = np.column_stack([token_ids, slots.drafts])
        token_ids = with_drafts[with_drafts >= 0]
    tables = slots.tables.copy()
    plain = StepRows(token_ids, slots.length[:count] - 1, num_tokens, num_tokens, tables)
    return plain.followed_by([_row(row) for row in plan.rows])


def _row(planned: PlannedRow) -> Row:
    request, start = planned.request, planned.request.num_computed
    tokens = request.tokens[start : start + planned.num_tokens]
    if planned.draft:
        tokens += planned.draft
    return Row(tokens, start, request.table.ids, planned.num_logits)
