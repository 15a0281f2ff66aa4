"""`decode start`: one decode worker."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from engine.base.options import DraftOptions, ModelOptions
from engine.base.types import Role
from worker.cli import worker_command

if TYPE_CHECKING:
    from engine.runner.base import ModelRunner
    from engine.sampling import Sampler
    from engine.scheduling.speculation import Speculation
    from engine.step.drafting import Drafting
    from worker.process import Services, WorkerProcess

_DESCRIPTION = "A decode worker: writes answers with speculative verification."


def _services(host: WorkerProcess) -> Services:
    from decode.service import DecodeServicer
    from engine.pb.diptych.internal.v1 import worker_pb2

    descriptor = worker_pb2.DESCRIPTOR.services_by_name["DecodeService"]
    service = DecodeServicer(host)
    service.prepare()
    return [(descriptor, service)]


def ask_drafting(model: ModelOptions, options: DraftOptions) -> Drafting | None:
    """The drafter that --drafter names; None drafts nothing. Raises ConfigError."""
    options.check(model)
    if options.drafter == "none" or options.draft_tokens == 0:
        return None
    from engine.step.drafting import Drafting

    return Drafting(options.draft_tokens, partial(_speculation, options))


def _speculation(
    options: DraftOptions, draft_model: ModelRunner | None, sampler: Sampler
) -> Speculation:
    from decode.speculative.acceptance import Acceptance
    from decode.speculative.draft_length import MeasuredDraftLength
    from decode.speculative.draft_model import ModelDrafter
    from decode.speculative.ngram import NgramDrafter
    from decode.speculative.step_cost import StepCost
    from decode.speculative.verify import verify
    from engine.scheduling.speculation import Drafter, Speculation

    passes = None if draft_model is None else StepCost()
    drafter: Drafter = NgramDrafter()
    if draft_model is not None and passes is not None:
        drafter = ModelDrafter(draft_model, sampler, passes, time.monotonic)
    pace = MeasuredDraftLength(Acceptance(drafter.acceptance), StepCost(), passes)
    return Speculation(drafter, verify, options.draft_tokens, pace)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return worker_command(Role.DECODE, _DESCRIPTION, argv, _services, ask_drafting, DraftOptions)


if __name__ == "__main__":
    sys.exit(main())
