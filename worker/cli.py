"""`prefill start` and `decode start`: options and log; a wrong option ends in one sentence.

    prefill, decode      the installed commands
    python -m worker.cli prefill|decode start ...

The two differ in their default budgets alone. Nothing heavy is imported before the options are
read: `--help` is quick, and variables that libraries read at import are set first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from decode.drafting import make_drafting
from engine.base.errors import CheckpointError, ConfigError, SelfTestFailed
from engine.base.installed import require_worker_packages, unusable
from engine.base.option_groups import WORKER_GROUPS, DraftOptions, ModelOptions
from engine.base.options import add_flags, parser, resolve, set_default_env
from engine.base.types import Role
from engine.process.core_dumps import forbid_core_dumps
from engine.process.gc_control import disable_collections, shorten_switch_interval
from worker import exit_status

# A waiting OpenMP thread must not burn the core that another worker computes on.
_LIBRARY_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
_DESCRIPTIONS = {
    Role.PREFILL: "A prefill worker: reads prompts and fills KV-cache blocks that decode workers"
    " fetch.",
    Role.DECODE: "A decode worker: writes answers with speculative verification.",
}


def main(argv: Sequence[str]) -> int:
    """Run the command that the first argument names; returns the exit status."""
    role, *rest = argv or [""]
    if role not in ("prefill", "decode"):
        print(f"worker.cli: {role!r}; expected prefill or decode", file=sys.stderr)
        return exit_status.BAD_CONFIGURATION
    return worker_command(Role(role), rest)


def worker_command(role: Role, argv: Sequence[str] | None = None) -> int:
    """Run one worker until it ends; returns the exit status: 2 for what a restart cannot cure."""
    groups = (*WORKER_GROUPS, DraftOptions) if role is Role.DECODE else WORKER_GROUPS
    description = _DESCRIPTIONS[role]
    command = parser(role.value, description)
    start = command.add_subparsers(dest="command", required=True).add_parser(
        "start", help="serve until stopped", description=description
    )
    add_flags(start, *groups)
    try:
        options = resolve(command.parse_args(argv), *groups)
        require_worker_packages(f"{role.value} workers")
        return _start(role, options)
    except (ConfigError, CheckpointError) as error:
        print(f"{role.value}: {error.message}", file=sys.stderr)
        return exit_status.BAD_CONFIGURATION
    except SelfTestFailed as error:
        print(f"{role.value}: {error.message}", file=sys.stderr)
        return exit_status.SICK
    except KeyboardInterrupt:  # while it loads; later the loop handles the signal
        return 130


prefill = partial(worker_command, Role.PREFILL)
decode = partial(worker_command, Role.DECODE)


def _start(role: Role, options: tuple[Any, ...]) -> int:
    model, cache, step, transfer, worker, trust, log, *draft = options
    set_default_env(_LIBRARY_ENV)
    shorten_switch_interval()
    disable_collections()
    import uvloop
    from prometheus_client import CollectorRegistry

    from engine.rpc.address import check_free
    from engine.rpc.auth import token_for
    from engine.telemetry.log import configure_logging

    configure_logging(log, role=role.value, worker_id=worker.worker_id)
    if not log.core_dumps:
        forbid_core_dumps()
    # Before the model: a mistake shows at once.
    token = token_for(trust, "--listen", worker.listen)
    check_free(worker.listen, worker.http)
    try:
        from engine.step.build import build_engine
        from kvtransfer.connections import unfreed
        from worker.process import WorkerSettings
        from worker.run import run_worker
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        raise unusable(error) from error

    registry = CollectorRegistry()
    drafting = make_drafting(model, draft[0] if draft else _default_drafter(model))
    engine = build_engine(role, model, cache, step, registry, drafting)
    settings = WorkerSettings(role, worker, transfer, token)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(run_worker(settings, engine, registry))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # no traceback at the very end
    if unfreed():  # the interpreter's end would free it, and might hang there
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    return status


def _default_drafter(model: ModelOptions) -> DraftOptions:
    """What a prefill worker drafts with once it has a budget for answers: it has no flags for it.

    A draft model's KV is in its blocks already.
    """
    return DraftOptions(drafter="model" if model.draft_model else "ngram")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
