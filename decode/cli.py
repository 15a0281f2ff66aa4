"""`decode start`: one decode worker."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.config import DraftOptions
from engine.errors import ConfigError
from engine.types import Role
from kvtransfer.command import worker_command

if TYPE_CHECKING:
    from engine.speculation import Speculation
    from kvtransfer.host import Services, WorkerHost

_DESCRIPTION = "A decode worker: writes answers with speculative verification."


def _services(host: WorkerHost) -> Services:
    from decode.service import DecodeServicer
    from engine.pb.diptych.internal.v1 import worker_pb2

    descriptor = worker_pb2.DESCRIPTOR.services_by_name["DecodeService"]
    return [(descriptor, DecodeServicer(host))]


def make_speculation(options: DraftOptions) -> Speculation | None:
    """The drafter that --drafter names; None drafts nothing. Raises ConfigError."""
    from decode.speculative.acceptance import Acceptance
    from decode.speculative.ngram import NgramDrafter
    from decode.speculative.pace import MeasuredPace
    from decode.speculative.step_cost import StepCost
    from decode.speculative.verify import verify
    from engine.speculation import Speculation

    if options.drafter == "model" or options.draft_model:
        raise ConfigError("--drafter model: not available yet; expected none or ngram")
    if options.drafter == "none" or options.draft_tokens == 0:
        return None
    drafter = NgramDrafter()
    pace = MeasuredPace(Acceptance(drafter.acceptance), StepCost())
    return Speculation(drafter, verify, options.draft_tokens, pace)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return worker_command(
        Role.DECODE, _DESCRIPTION, argv, _services, make_speculation, DraftOptions
    )


if __name__ == "__main__":
    sys.exit(main())
