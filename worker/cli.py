"""`prefill start` and `decode start`: options, log, and the way from a mistake to one sentence.

Nothing heavy is imported before the options are read: `--help` is quick, and variables that
libraries read at import are set first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.base.errors import CheckpointError, ConfigError, SelfTestFailed
from engine.base.installed import require_worker_packages, unusable
from engine.base.options import (
    CacheOptions,
    LogOptions,
    ModelOptions,
    StepOptions,
    TransferOptions,
    TrustOptions,
    WorkerOptions,
    add_flags,
    parser,
    resolve,
    set_default_env,
)
from engine.base.types import Role
from engine.process.core_dumps import forbid_core_dumps
from engine.process.gc_control import hand_over_soon, put_off_collections
from worker import exit_status

if TYPE_CHECKING:
    from engine.step.drafting import Drafting
    from worker.process import Services, WorkerProcess

_GROUPS = (
    ModelOptions,
    CacheOptions,
    StepOptions,
    TransferOptions,
    WorkerOptions,
    TrustOptions,
    LogOptions,
)
# A waiting OpenMP thread must not burn the core that the other panel computes on.
_LIBRARY_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def worker_command(
    role: Role,
    description: str,
    argv: Sequence[str] | None,
    make_services: Callable[[WorkerProcess], Services],
    ask_drafting: Callable[[ModelOptions, Any], Drafting | None] | None = None,
    own_options: type[Any] | None = None,
) -> int:
    """Run one worker until it ends; returns the exit status: 2 for what a restart cannot cure."""
    groups = (*_GROUPS, own_options) if own_options else _GROUPS
    command = parser(role.value, description)
    start = command.add_subparsers(dest="command", required=True).add_parser(
        "start", help="serve until stopped", description=description
    )
    add_flags(start, *groups)
    try:
        options = resolve(command.parse_args(argv), *groups)
        require_worker_packages(f"{role.value} workers")
        return _start(role, options, make_services, ask_drafting)
    except (ConfigError, CheckpointError) as error:
        print(f"{role.value}: {error.message}", file=sys.stderr)
        return exit_status.BAD_CONFIGURATION
    except SelfTestFailed as error:
        print(f"{role.value}: {error.message}", file=sys.stderr)
        return exit_status.SICK
    except KeyboardInterrupt:  # while it loads; later the loop has the signal
        return 130


def _start(
    role: Role,
    options: tuple[Any, ...],
    make_services: Callable[[WorkerProcess], Services],
    ask_drafting: Callable[[ModelOptions, Any], Drafting | None] | None,
) -> int:
    model, cache, step, transfer, worker, trust, log, *own = options
    set_default_env(_LIBRARY_ENV)
    hand_over_soon()
    put_off_collections()
    import uvloop
    from prometheus_client import CollectorRegistry

    from engine.rpc.address import check_free
    from engine.rpc.trust import token_for
    from engine.telemetry.log import configure_logging

    configure_logging(log, role=role.value, worker_id=worker.worker_id)
    forbid_core_dumps(allowed=log.core_dumps)
    # Before the model: a mistake shows at once.
    token = token_for(trust, "--listen", worker.listen)
    check_free(worker.listen, worker.http)
    try:
        from engine.step.build import build_engine
        from kvtransfer.connections import unfreed
        from worker.process import WorkerSettings, run_worker
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        raise unusable(error) from error

    registry = CollectorRegistry()
    drafting = ask_drafting(model, own[0]) if ask_drafting else None
    engine = build_engine(role, model, cache, step, registry, drafting)
    settings = WorkerSettings(role, worker, transfer, token)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(run_worker(settings, engine, registry, make_services))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is over; no traceback at the very end
    if unfreed():  # the interpreter's end would free it, and might hang there
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    return status
