"""From --drafter to a drafter, with what learns how long its drafts pay."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from engine.base.option_groups import DraftOptions, ModelOptions

if TYPE_CHECKING:
    from engine.runner.base import ModelRunner
    from engine.sampling import Sampler
    from engine.scheduling.speculation import Speculation
    from engine.step.drafting import Drafting


def make_drafting(model: ModelOptions, options: DraftOptions) -> Drafting | None:
    """The drafter that --drafter names; None drafts nothing. Raises ConfigError.

    A draft model that drafts nothing still computes its KV, for workers that draft with it.
    """
    options.check(model)
    num_tokens = 0 if options.drafter == "none" else options.draft_tokens
    if num_tokens == 0 and not model.draft_model:
        return None
    from engine.step.drafting import Drafting

    return Drafting(num_tokens, partial(_speculation, num_tokens))


def _speculation(
    num_tokens: int, draft_model: ModelRunner | None, sampler: Sampler, block_size: int
) -> Speculation:
    from decode.speculative.acceptance import Acceptance
    from decode.speculative.draft_length import MeasuredDraftLength
    from decode.speculative.draft_model import ModelDrafter
    from decode.speculative.ngram import NgramDrafter
    from decode.speculative.step_cost import StepCost
    from decode.speculative.verify import verify
    from engine.scheduling.speculation import Drafter, Speculation

    passes: StepCost | None = None
    drafter: Drafter = NgramDrafter()
    if draft_model is not None:
        passes = StepCost()
        drafter = ModelDrafter(draft_model, sampler, block_size, passes, time.monotonic)
    draft_length = MeasuredDraftLength(Acceptance(drafter.acceptance), StepCost(), passes)
    return Speculation(drafter, verify, num_tokens, draft_length)
