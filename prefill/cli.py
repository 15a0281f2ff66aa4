"""`prefill start`: one prefill worker."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.base.types import Role
from worker.cli import worker_command

if TYPE_CHECKING:
    from worker.process import Services, WorkerProcess

_DESCRIPTION = (
    "A prefill worker: reads prompts and fills KV-cache blocks that decode workers fetch."
)


def _services(host: WorkerProcess) -> Services:
    from engine.pb.diptych.internal.v1 import worker_pb2
    from prefill.service import PrefillServicer

    descriptor = worker_pb2.DESCRIPTOR.services_by_name["PrefillService"]
    return [(descriptor, PrefillServicer(host))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return worker_command(Role.PREFILL, _DESCRIPTION, argv, _services)


if __name__ == "__main__":
    sys.exit(main())
